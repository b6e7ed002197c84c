//! The imported network against the PyTorch module it was exported from, live: values, gradients with respect to every
//! parameter, and that all and only the module's parameters are trained. Both exporters, static and dynamic batch,
//! opsets 17 to 23, with and without raising.
#![cfg(feature = "train")]

mod support;

use std::collections::HashMap;
use std::path::Path;

use disback::graph::Model;
use disback::torch::{Forward, ImportOptions, Network, convert, params::load_tensors};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

fn npz(path: &Path) -> HashMap<String, Tensor> {
    let arrays = disback::io::npy::read_npz(path).unwrap();
    arrays.into_iter().map(|(n, t)| (n, convert::to_torch(&t).unwrap())).collect()
}

fn number(t: &Tensor) -> f64 {
    t.double_value(&[])
}

/// |ours - theirs| / |theirs| in L2.
fn relative(ours: &Tensor, theirs: &Tensor) -> f64 {
    let (a, b) = (ours.to_kind(Kind::Double).flatten(0, -1), theirs.to_kind(Kind::Double).flatten(0, -1));
    if a.size() != b.size() {
        return f64::INFINITY;
    }
    number(&(&a - &b).norm()) / number(&b.norm()).max(1e-12)
}

fn check(case: &Path, raise: bool) -> Result<(), String> {
    let options = ImportOptions { raise, ..ImportOptions::default() };
    let model = Model::load(&case.join("model.onnx")).map_err(|e| e.to_string())?;
    let net = Network::import(model, &options, Device::Cpu).map_err(|e| e.to_string())?;
    net.params().set_requires_grad(true).unwrap();
    let inputs = npz(&case.join("inputs.npz"));
    let named: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    // Twice: the first run specialises the plan, the second uses what it kept.
    net.forward(&named).map_err(|e| e.to_string())?;
    let (_, out) = net.forward(&named).map_err(|e| e.to_string())?.remove(0);
    let expected = npz(&case.join("expected.npz")).into_values().next().unwrap();
    let error = number(&(&out - &expected).abs().max()) / number(&expected.std(true));
    if error > 1e-5 {
        return Err(format!("output differs by {error:.1e} of its standard deviation"));
    }
    let grads: HashMap<String, Tensor> = load_tensors(&case.join("grads.safetensors")).unwrap().into_iter().collect();
    (&out * &grads["R"]).sum(Kind::Float).backward();

    let native: usize = grads.iter().filter(|(n, _)| *n != "R").map(|(_, t)| t.numel()).sum();
    if net.params().elements() != native {
        let buffers: Vec<_> = net.shared().buffers.iter().map(|b| format!("{} ({})", b.name, b.reason)).collect();
        return Err(format!(
            "{} elements are trained, the module has {native}\n    parameters {:?}\n    buffers {buffers:?}",
            net.params().elements(),
            net.params().names()
        ));
    }
    let map: Vec<Value> = serde_json::from_slice(&std::fs::read(case.join("map.json")).unwrap()).unwrap();
    // Which initializers may hold a native parameter: several where the exporter merged tensors of equal bytes.
    let mut candidates: HashMap<&str, Vec<(&str, bool)>> = HashMap::new();
    for entry in &map {
        let held = (entry["onnx"].as_str().unwrap(), entry["transposed"].as_bool().unwrap());
        for native in entry["natives"].as_array().unwrap() {
            candidates.entry(native.as_str().unwrap()).or_default().push(held);
        }
    }
    // Each native gradient must be found once, in a parameter of its own.
    let mut free: Vec<(&str, Tensor)> = net.params().iter().map(|(n, t)| (n, t.grad())).collect();
    let mut worst: f64 = 0.0;
    for (native, theirs) in grads.iter().filter(|(n, _)| *n != "R") {
        let held = candidates.get(native.as_str()).ok_or(format!("no initializer holds `{native}`"))?;
        let best = free
            .iter()
            .enumerate()
            .filter_map(|(i, (name, grad))| {
                let base = name.split('#').next();
                let (_, transposed) = held.iter().find(|(n, _)| Some(*n) == base)?;
                let grad = if !grad.defined() {
                    return None;
                } else if *transposed {
                    grad.transpose(0, 1)
                } else {
                    grad.shallow_clone()
                };
                Some((i, relative(&grad, theirs)))
            })
            .min_by(|a, b| a.1.total_cmp(&b.1));
        let (at, error) = best.ok_or(format!("no parameter with a gradient is left for `{native}`"))?;
        // A bias before a norm has a gradient of zero: what is left there is rounding.
        let vanishing = number(&theirs.norm()) < 1e-5;
        if error > 1e-4 && !vanishing {
            return Err(format!("gradient of `{native}` differs by {error:.1e}"));
        }
        worst = if vanishing { worst } else { worst.max(error) };
        free.swap_remove(at);
    }
    println!(
        "{} raise={raise}: output {error:.1e}, gradients {worst:.1e}, raised {:?}, near misses {:?}",
        case.file_name().unwrap().to_string_lossy(),
        net.shared().raised.counts(),
        net.shared().raised.near_misses.iter().map(|m| (m.pattern, m.reason.as_str())).collect::<Vec<_>>(),
    );
    Ok(())
}

#[test]
fn values_and_gradients_are_the_native_modules() {
    let out = support::folder("native");
    support::run_python("tests/python/native_unet.py", &[out.to_str().unwrap()]);
    let cases: Vec<String> = serde_json::from_slice(&std::fs::read(out.join("cases.json")).unwrap()).unwrap();
    assert!(cases.len() >= 18, "{} cases", cases.len());
    let mut failures = Vec::new();
    for case in &cases {
        for raise in [true, false] {
            if let Err(e) = check(&out.join(case), raise) {
                failures.push(format!("{case} raise={raise}: {e}"));
            }
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}
