//! What a native module computed, beside what the imported network computes: folders written by the Python scripts.
#![allow(dead_code, reason = "each test target uses its own part")]

use std::collections::HashMap;
use std::path::Path;

use disback::io::npy::read_npz;
use disback::tensor::HostTensor;
use disback::torch::{Forward, Network, convert, params::load_tensors};
use serde_json::Value;
use tch::{Kind, Tensor};

/// Arrays of an `.npz` file.
pub fn arrays(path: &Path) -> Vec<(String, HostTensor)> {
    read_npz(path).unwrap_or_else(|e| panic!("{e}"))
}

/// The same as tensors.
pub fn tensors(path: &Path) -> Vec<(String, Tensor)> {
    arrays(path).into_iter().map(|(n, t)| (n, convert::to_torch(&t).unwrap())).collect()
}

/// The network's named outputs.
pub fn forward(net: &Network, inputs: &[(String, Tensor)]) -> Result<Vec<(String, Tensor)>, String> {
    let named: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    net.forward(&named).map_err(|e| e.to_string())
}

fn norm(t: &Tensor) -> f64 {
    t.norm().double_value(&[])
}

fn flat(t: &Tensor) -> Tensor {
    t.to_kind(Kind::Double).flatten(0, -1)
}

/// `[heads, n, k]`: of the last axis, as `[heads, n, rest]`, the `k`-th of `n`. Exporters pack q, k and v so.
type Piece = Option<[i64; 3]>;

/// A tensor of the file that may hold a native parameter: name, part, order of its axes.
type Holder<'a> = (&'a str, Piece, Vec<i64>);

fn part(gradient: Tensor, piece: Piece) -> Tensor {
    let Some([heads, n, k]) = piece.filter(|_| gradient.defined()) else { return gradient };
    let mut shape = gradient.size();
    shape.pop();
    let packed = gradient.reshape([&shape[..], &[heads, n, -1]].concat());
    packed.select(-2, k).reshape([&shape[..], &[-1]].concat())
}

/// A parameter's name in the file: copies of merged ones have `#2`, `#3` behind it.
fn base(name: &str) -> &str {
    name.split('#').next().unwrap_or(name)
}

/// How far our gradients are from the native module's.
pub struct Agreement {
    /// Largest relative L2 error of one parameter's gradient.
    pub worst: f64,
    /// Relative L2 error of all gradients together.
    pub together: f64,
}

/// Back-propagates the sum over outputs of `output * R.<output>` and compares each gradient with the native one in
/// `grads.safetensors`, found through `map.json`. Every native parameter must be found once, in a parameter of its own, and
/// all trained elements must be native parameters.
///
/// `tolerance`: of each gradient's relative L2 error; what is below 1e-6 of the largest gradient counts as rounding.
pub fn gradients(
    net: &Network,
    outputs: &[(String, Tensor)],
    folder: &Path,
    tolerance: f64,
) -> Result<Agreement, String> {
    let all = load_tensors(&folder.join("grads.safetensors")).map_err(|e| e.to_string())?;
    let all = all.into_iter().filter(|(n, _)| !n.starts_with("file."));
    let (factors, natives): (Vec<_>, Vec<_>) = all.partition(|(n, _)| n.starts_with("R."));
    let factors: HashMap<String, Tensor> = factors.into_iter().collect();
    let mut loss = Tensor::from(0f32);
    for (name, out) in outputs {
        let factor = factors.get(&format!("R.{name}")).ok_or(format!("no factor for the output `{name}`"))?;
        loss += (out.to_kind(Kind::Float) * factor).sum(Kind::Float);
    }
    loss.backward();

    let expected: usize = natives.iter().map(|(_, t)| t.numel()).sum();
    if net.params().elements() != expected {
        return Err(format!(
            "{} elements are trained, the module has {expected}\n{}",
            net.params().elements(),
            listing(net, folder)
        ));
    }
    let map: Vec<Value> = serde_json::from_slice(&std::fs::read(folder.join("map.json")).unwrap()).unwrap();
    // Which tensors of the file may hold a native parameter: several where the exporter merged equal ones.
    let integers = |v: &Value| -> Vec<i64> { v.as_array().unwrap().iter().map(|a| a.as_i64().unwrap()).collect() };
    let mut holders: HashMap<&str, Vec<Holder>> = HashMap::new();
    let mut pieces: HashMap<&str, Vec<Piece>> = HashMap::new();
    for entry in &map {
        let name = entry["onnx"].as_str().unwrap();
        let piece = entry.get("piece").map(|p| integers(p).try_into().unwrap());
        pieces.entry(name).or_default().push(piece);
        for native in entry["natives"].as_array().unwrap() {
            let holder = (name, piece, integers(&entry["permutation"]));
            holders.entry(native.as_str().unwrap()).or_default().push(holder);
        }
    }
    let mut natives: Vec<(String, Tensor, f64)> = natives.into_iter().map(|(n, t)| (n, flat(&t), norm(&t))).collect();
    // Those that vanish (a bias before a norm) last: anything small would fit them.
    natives.sort_by(|a, b| b.2.total_cmp(&a.2));
    let largest = natives.first().map_or(0.0, |n| n.2);
    let mut free: Vec<(&str, Piece, Tensor)> = Vec::new();
    for (name, tensor) in net.params().iter() {
        let parts = pieces.get(base(name)).filter(|p| p.iter().all(Option::is_some));
        for piece in parts.unwrap_or(&vec![None]) {
            free.push((name, *piece, part(tensor.grad(), *piece)));
        }
    }
    let (mut worst, mut squares) = (0f64, 0f64);
    for (native, theirs, size) in &natives {
        let held = holders.get(native.as_str()).ok_or(format!("no tensor of the file holds `{native}`"))?;
        let best = free
            .iter()
            .enumerate()
            .filter_map(|(i, (name, piece, grad))| {
                let (_, _, axes) = held.iter().find(|(n, p, _)| *n == base(name) && p == piece)?;
                let ours = match (grad.defined(), grad.dim() == axes.len()) {
                    (false, _) => theirs.zeros_like(),
                    (true, true) => flat(&grad.permute(&axes[..])),
                    (true, false) => flat(grad),
                };
                (ours.size() == theirs.size()).then(|| (i, norm(&(ours - theirs))))
            })
            .min_by(|a, b| a.1.total_cmp(&b.1));
        let (at, error) = best.ok_or(format!("no parameter is left for `{native}`\n{}", listing(net, folder)))?;
        squares += error * error;
        if !(error <= tolerance * size + 1e-6 * largest) {
            return Err(format!(
                "gradient of `{native}` (in `{}`) differs by {:.1e}, of size {size:.1e}",
                free[at].0,
                error / size
            ));
        }
        if *size > 1e-3 * largest {
            worst = worst.max(error / size);
        }
        drop(free.swap_remove(at));
    }
    let total: f64 = natives.iter().map(|n| n.2 * n.2).sum();
    Ok(Agreement { worst, together: (squares / total).sqrt() })
}

/// The gradients that [`gradients`] left, against those of the file as it is, computed in f64 (`said.py`), tensor by tensor of
/// the file: parts of a merged one together. Returns the largest relative L2 error.
pub fn file_gradients(net: &Network, folder: &Path, tolerance: f64) -> Result<f64, String> {
    let all = load_tensors(&folder.join("grads.safetensors")).map_err(|e| e.to_string())?;
    let said = all.into_iter().filter_map(|(n, t)| Some((n.strip_prefix("file.")?.to_owned(), flat(&t))));
    let said: HashMap<String, Tensor> = said.collect();
    let mut ours: HashMap<&str, Tensor> = HashMap::new();
    for (name, p) in net.params().names().iter().zip(net.params().tensors()) {
        let grad = if p.grad().defined() { flat(&p.grad()) } else { flat(&p.zeros_like()) };
        let sum = ours.remove(base(name)).map_or_else(|| grad.shallow_clone(), |g| g + &grad);
        ours.insert(base(name), sum);
    }
    let largest = said.values().map(norm).fold(0.0, f64::max);
    let (mut worst, mut compared) = (0f64, 0);
    for (name, theirs) in &said {
        // One native tensor that the file has twice is one parameter, under the first one's name.
        let Some(ours) = ours.get(name.as_str()) else { continue };
        compared += 1;
        let (error, size) = (norm(&(ours - theirs)), norm(theirs));
        if !(error <= tolerance * size + 1e-6 * largest) {
            return Err(format!("gradient of the file's `{name}` is off by {:.1e}, of size {size:.1e}", error / size));
        }
        if size > 1e-3 * largest {
            worst = worst.max(error / size);
        }
    }
    if compared < ours.len() { Err(format!("{compared} of {} tensors compared", ours.len())) } else { Ok(worst) }
}

/// What is trained and what is not, with shapes: for messages.
fn listing(net: &Network, folder: &Path) -> String {
    let map = std::fs::read_to_string(folder.join("map.json")).unwrap_or_default();
    let known: Vec<Value> = serde_json::from_str(&map).unwrap_or_default();
    let is_known = |name: &str| known.iter().any(|e| e["onnx"].as_str() == Some(base(name)));
    let mut lines = Vec::new();
    for p in &net.shared().parameters {
        if !is_known(&p.name) {
            lines.push(format!("    trained, but native to nothing: {} {:?} {}", p.name, p.shape, p.role));
        }
    }
    for b in &net.shared().buffers {
        if is_known(&b.name) {
            lines.push(format!("    native, but not trained: {} {:?} {}", b.name, b.shape, b.reason));
        }
    }
    for entry in &known {
        let name = entry["onnx"].as_str().unwrap_or_default();
        let natives = entry["natives"].as_array().map_or(0, Vec::len);
        let parted = net.params().names().iter().filter(|n| base(n) == name).count();
        if natives != parted {
            lines.push(format!("    {name}: {natives} native parameters, {parted} trained"));
        }
    }
    lines.join("\n")
}
