//! Parity: the same inputs through libtorch and through ONNX Runtime, before anyone trains.

mod bf16;
pub mod devices;
mod mixing;
mod stored;

pub use mixing::{Mixing, batch_statistics, mixing};
pub use stored::{Stored, stored};

use std::collections::BTreeMap;

use rand::{RngExt, SeedableRng};
use serde::Serialize;
use tch::{Device, Tensor};

use crate::diffusion::{Condition, TeacherCard, TimeUnit};
use crate::error::{Context, Error, Result};
use crate::graph::ir::Port;
use crate::graph::unguarded_division;
use crate::graph::unguarded_division::Unguarded;
use crate::graph::{Model, save};
use crate::onnx::ValueInfoProto;
use crate::tensor::{DType, HostTensor};
use crate::torch::{Forward, ImportOptions, Network, convert};

/// What counts as equal: `|a - b| <= atol max(1, std(b)) + rtol |b|`.
#[derive(Debug, Clone, Copy)]
pub struct Tolerance {
    /// Absolute part, times the standard deviation of `b` where that is above 1.
    pub atol: f64,
    /// Relative part, times `|b|`.
    pub rtol: f64,
}

impl Default for Tolerance {
    fn default() -> Self {
        Self { atol: 1e-5, rtol: 1e-3 }
    }
}

/// Error of one output.
#[derive(Debug, Clone, Serialize)]
pub struct OutputError {
    /// Name of the graph's output.
    pub name: String,
    /// Whether every value is within the tolerance.
    pub ok: bool,
    /// Largest absolute difference of a value; infinite where one side is NaN and the other is not.
    pub max_abs: f64,
    /// `max_abs` over the reference's standard deviation.
    pub max_rel: f64,
    /// Share of the values that are NaN on both sides, which says nothing about either.
    #[serde(skip_serializing_if = "none")]
    pub nan: f64,
}

fn none(share: &f64) -> bool {
    *share == 0.0
}

/// The first value, in the order of computation, on which the two disagree.
#[derive(Debug, Clone, Serialize)]
pub struct Divergence {
    /// The node that makes the value, with its operator.
    pub node: String,
    /// Name of the value in the graph.
    pub value: String,
    /// Largest absolute difference of its elements; infinite where the shapes differ, or one side alone is NaN.
    pub max_abs: f64,
    /// Mean and standard deviation in libtorch.
    pub libtorch: [f64; 2],
    /// Mean and standard deviation in ONNX Runtime.
    pub onnxruntime: [f64; 2],
}

/// Outcome of [`check`].
#[derive(Debug, Clone, Serialize)]
pub struct Parity {
    /// Whether every comparison that was made is within its tolerance.
    pub ok: bool,
    /// Largest absolute difference of an output, over all comparisons with ONNX Runtime or stored outputs.
    pub max_abs: f64,
    /// Largest [`OutputError::max_rel`] over the same comparisons.
    pub max_rel: f64,
    /// libtorch against ONNX Runtime, one entry for each output; empty where ONNX Runtime cannot run the file.
    pub outputs: Vec<OutputError>,
    /// libtorch against outputs that the user gave, or that the framework left beside the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected: Option<Vec<OutputError>>,
    /// Where libtorch and ONNX Runtime part; absent where the outputs agree, or no inner value could be compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_divergence: Option<Divergence>,
    /// For a file in half precision: the largest difference that its rounding makes in libtorch, beside the same layers in
    /// f32. ONNX Runtime may be as far away, four times over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rounding: Option<f64>,
    /// What libtorch was compared with: ONNX Runtime with its version, or `nothing else` where it cannot run the file.
    pub engine: String,
    /// The CPU against another device, where one was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub devices: Option<devices::DeviceParity>,
    /// Divisions by what can be 0: both sides give NaN there, and the framework does not.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unguarded_divisions: Vec<Unguarded>,
}

impl Parity {
    /// Takes in a comparison of the same network with the framework's stored outputs.
    pub fn with_stored(mut self, other: Self) -> Self {
        self.ok &= other.ok;
        self.max_abs = self.max_abs.max(other.max_abs);
        self.max_rel = self.max_rel.max(other.max_rel);
        self.expected = other.expected;
        self.first_divergence = self.first_divergence.or(other.first_divergence);
        self
    }
}

/// Mean, standard deviation.
fn statistics(values: &[f64]) -> [f64; 2] {
    let n = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / n;
    [mean, (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt()]
}

/// Compares a value with its reference.
pub fn compare(name: &str, ours: &HostTensor, theirs: &HostTensor, tolerance: Tolerance) -> Result<OutputError> {
    if ours.shape() != theirs.shape() {
        return Err(Error::mismatch(format!("`{name}` has shape {:?}, expected {:?}", ours.shape(), theirs.shape())));
    }
    let (a, b) = (ours.to_f64(), theirs.to_f64());
    let [_, std] = statistics(&b);
    let floor = tolerance.atol * std.max(1.0);
    let (mut ok, mut max_abs, mut nan) = (true, 0f64, 0usize);
    for (x, y) in a.iter().zip(&b) {
        if x.is_nan() && y.is_nan() {
            nan += 1;
            continue;
        }
        if x == y {
            continue;
        }
        let d = (x - y).abs();
        // Written so that NaN on one side fails.
        if !(d <= floor + tolerance.rtol * y.abs()) {
            ok = false;
        }
        max_abs = if d.is_nan() { f64::INFINITY } else { max_abs.max(d) };
    }
    let max_rel = if std > 0.0 { max_abs / std } else { max_abs };
    Ok(OutputError { name: name.to_owned(), ok, max_abs, max_rel, nan: nan as f64 / a.len().max(1) as f64 })
}

/// More elements than an input of any diffusion network has for a small batch: a file may declare 2^60.
const MOST_RANDOM: usize = 1 << 28;

/// Random inputs that fit the graph's signature, and the card where there is one: noise for samples, noise levels inside the
/// schedule, existing classes. `dims` fixes symbolic dimensions; the first unknown one is the batch.
pub fn random_inputs(
    ports: &[Port],
    card: Option<&TeacherCard>,
    batch: usize,
    dims: &BTreeMap<String, usize>,
    seed: u64,
) -> Result<Vec<(String, HostTensor)>> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let mut out = Vec::new();
    for (k, p) in ports.iter().enumerate() {
        let dtype = p.dtype.unwrap_or(DType::F32);
        let declared = p.shape.as_ref().ok_or_else(|| {
            Error::usage(format!("input `{}` declares no shape", p.name)).hint("give --inputs FILE.npz")
        })?;
        let shape = declared
            .iter()
            .enumerate()
            .map(|(i, d)| match d {
                Ok(n) => Ok(*n),
                Err(symbol) if dims.contains_key(symbol) => Ok(dims[symbol]),
                Err(_) if i == 0 => Ok(batch),
                Err(symbol) => match card {
                    Some(c) if c.sample == p.name && declared.len() == 1 + c.rank() => Ok(sample_dim(c, i)),
                    _ => Err(Error::usage(format!("dimension {i} (`{symbol}`) of input `{}` is free", p.name)).hint(
                        match symbol.as_str() {
                            "" => "the card's shape of this input says it, or give --inputs FILE.npz".to_owned(),
                            _ => format!("give it with --dim {symbol}=N; the card's shape of this input says it too"),
                        },
                    )),
                },
            })
            .collect::<Result<Vec<usize>>>()?;
        let len = crate::tensor::checked_len(&shape).ok().filter(|&n| n <= MOST_RANDOM).ok_or_else(|| {
            Error::usage(format!("input `{}` of shape {shape:?} is too large for random data", p.name))
                .hint("give --inputs FILE.npz")
        })?;
        let values: Vec<f64> = match (role(p, card), dtype) {
            (InputRole::Time(unit), _) => (0..len)
                .map(|_| match unit {
                    TimeUnit::Sigma => (rng.random::<f64>() * 8.0 - 5.0).exp(),
                    TimeUnit::LnSigma4 => (rng.random::<f64>() * 8.0 - 5.0) / 4.0,
                    TimeUnit::LnSigma250 => (rng.random::<f64>() * 8.0 - 5.0) * 250.0,
                    TimeUnit::LnSigmaHalf => rng.random::<f64>() * 8.0 - 5.7,
                    TimeUnit::Radians => rng.random::<f64>() * 1.5,
                    TimeUnit::Unit => rng.random(),
                    TimeUnit::Step | TimeUnit::Thousand => (rng.random::<f64>() * 1000.0).floor(),
                })
                .collect(),
            (InputRole::Classes(n), _) => (0..len).map(|_| rng.random_range(0..n.max(1)) as f64).collect(),
            (InputRole::OneHot(n), _) => {
                let mut v = vec![0.0; len];
                for row in v.chunks_mut(n.max(1)) {
                    let at = rng.random_range(0..row.len());
                    row[at] = 1.0;
                }
                v
            }
            (InputRole::Constant(v), _) => vec![v; len],
            (InputRole::Free, DType::Bool) => (0..len).map(|_| f64::from(u8::from(rng.random::<bool>()))).collect(),
            (InputRole::Free, d) if !d.is_float() => (0..len).map(|_| rng.random_range(0..2) as f64).collect(),
            // One number a sample, most likely its noise level or time: not below zero, where logarithms and roots end.
            (InputRole::Free, _) if shape.iter().skip(1).product::<usize>() == 1 && ports.len() > 1 => {
                (0..len).map(|_| 0.02 + 0.96 * rng.random::<f64>()).collect()
            }
            (InputRole::Free, _) => crate::noise::image_noise(seed, k as u64, len).into_iter().map(f64::from).collect(),
        };
        out.push((p.name.clone(), HostTensor::new(&shape, &values)?.cast(dtype)));
    }
    Ok(out)
}

enum InputRole {
    Time(TimeUnit),
    Classes(usize),
    OneHot(usize),
    Constant(f64),
    Free,
}

fn role(p: &Port, card: Option<&TeacherCard>) -> InputRole {
    let Some(card) = card else { return InputRole::Free };
    if p.name == card.time {
        return InputRole::Time(card.time_unit);
    }
    if let Some(&v) = card.constants.get(&p.name) {
        return InputRole::Constant(v);
    }
    match card.conditions.get(&p.name) {
        Some(Condition::ClassIndex { classes, .. }) => InputRole::Classes(*classes),
        Some(Condition::OneHot { classes, .. }) => InputRole::OneHot(*classes),
        _ => InputRole::Free,
    }
}

fn sample_dim(card: &TeacherCard, axis: usize) -> usize {
    axis.checked_sub(1).and_then(|at| card.graph_shape().get(at).copied()).unwrap_or(1)
}

/// Runs `net` in libtorch and the same file in ONNX Runtime on the CPU; a file in bf16, which that has no kernels for, in
/// f32 with its bf16 weights.
///
/// Errors: ONNX Runtime not found; a network that either of them cannot run, of kind [`crate::Kind::Unsupported`] where ONNX
/// Runtime has an operator for other devices only, unless there are `expected` values to compare with.
pub fn check(
    net: &Network,
    inputs: &[(String, HostTensor)],
    expected: Option<&[(String, HostTensor)]>,
    tolerance: Tolerance,
) -> Result<Parity> {
    let mut proto = (*net.shared().model.proto).clone();
    save::internalise(&mut proto);
    let wide = bf16::in_f32(&proto)?;
    let in_bf16 = wide.is_some();
    if let Some(wide) = wide {
        proto = wide;
    }
    let given: Vec<(String, HostTensor)> = inputs.iter().map(|(n, t)| (n.clone(), bf16::input(t))).collect();
    let named: Vec<(&str, &HostTensor)> = given.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let reference = |proto: &crate::onnx::ModelProto| -> Result<(String, Vec<(String, HostTensor)>)> {
        let mut engine = crate::passes::evaluate::open(proto)?;
        let name = if in_bf16 { format!("{}, bf16 as f32", engine.name()) } else { engine.name() };
        Ok((name, engine.run(&named)?))
    };
    let (engine, theirs) = match reference(&proto).map_err(no_kernel) {
        Err(e) if e.kind() == crate::Kind::Unsupported && expected.is_some() => ("nothing else".to_owned(), Vec::new()),
        other => other.context("ONNX Runtime")?,
    };
    let ours = forward(net, inputs)?;
    let rounding = if net.shared().widened { Some(rounding(net, inputs, &ours)?) } else { None };
    let outputs = match &rounding {
        None => pairs(&ours, &theirs, tolerance)?,
        Some(noise) => theirs
            .iter()
            .map(|output| {
                let noise = noise.iter().find(|(n, _)| *n == output.0).map_or(0.0, |(_, d)| *d);
                let [_, std] = statistics(&output.1.to_f64());
                let atol = tolerance.atol + 4.0 * noise / std.max(1.0);
                Ok(pairs(&ours, std::slice::from_ref(output), Tolerance { atol, ..tolerance })?.remove(0))
            })
            .collect::<Result<_>>()?,
    };
    let expected = expected.map(|e| pairs(&ours, e, tolerance)).transpose()?;
    let ok = outputs.iter().chain(expected.iter().flatten()).all(|o| o.ok);
    let first_divergence =
        if outputs.iter().all(|o| o.ok) { None } else { locate(net, inputs, &proto, &reference, tolerance)? };
    let worst = |f: fn(&OutputError) -> f64| outputs.iter().chain(expected.iter().flatten()).map(f).fold(0.0, f64::max);
    Ok(Parity {
        ok,
        max_abs: worst(|o| o.max_abs),
        max_rel: worst(|o| o.max_rel),
        outputs,
        expected,
        first_divergence,
        rounding: rounding.map(|r| r.into_iter().map(|(_, d)| d).fold(0.0, f64::max)),
        engine,
        devices: None,
        unguarded_divisions: unguarded_division::unguarded(&net.shared().graph),
    })
}

/// Runs the network in libtorch on random inputs of this many rows.
///
/// Errors: what fails, with its node; a first output of another number of rows.
pub fn runs(net: &Network, card: &TeacherCard, rows: usize, seed: u64) -> Result<()> {
    let inputs = random_inputs(net.inputs(), Some(card), rows, &BTreeMap::new(), seed)?;
    let made = forward(net, &inputs)?;
    match made.iter().find(|(name, t)| *name == card.output && t.shape().first() != Some(&rows)) {
        None => Ok(()),
        Some((name, t)) => Err(Error::mismatch(format!("output `{name}` has shape {:?} for {rows} rows", t.shape()))),
    }
}

/// What ONNX Runtime has no kernel for on the CPU is nothing that a comparison could tell.
fn no_kernel(e: Error) -> Error {
    // What it says, and what to do about it. The second: its Attention of opset 23 wants a row of the mask for each query.
    const REFUSALS: [(&str, &str); 3] = [
        (
            "Could not find an implementation for",
            "the file was optimised for another device than the CPU: compare the export from before, or give --expected values",
        ),
        (
            "No Op registered for",
            "the exporter left an operator of its framework in the file, which ONNX does not define: give --expected values. \
             Students are written without it",
        ),
        (
            "inconsistent q_sequence_length (between attn_mask and Q)",
            "ONNX Runtime takes no attention mask that is the same for all rows: export with opset 22 or older, or give \
             --expected values",
        ),
    ];
    let message = e.to_string();
    match REFUSALS.iter().find(|(says, _)| message.contains(says)) {
        None => e,
        Some((says, help)) => {
            // Without the C++ around it.
            let from = message.find(says).unwrap_or(0);
            let line = message[from..].lines().next().unwrap_or_default();
            Error::unsupported(format!("it refuses the file: {line}")).hint(*help)
        }
    }
}

/// Largest difference, for each output, between the layers in f32 and the file as it is written.
fn rounding(
    net: &Network,
    inputs: &[(String, HostTensor)],
    ours: &[(String, HostTensor)],
) -> Result<Vec<(String, f64)>> {
    let options = ImportOptions { fuse: false, widen: false, ..ImportOptions::default() };
    let written = Network::import(net.shared().model.clone(), &options, Device::Cpu)?;
    let written = forward(&written, inputs).context("in the file's own half precision")?;
    let far = |a: &HostTensor, b: &HostTensor| {
        let (a, b) = (a.to_f64(), b.to_f64());
        a.iter().zip(&b).map(|(x, y)| (x - y).abs()).filter(|d| d.is_finite()).fold(0.0, f64::max)
    };
    Ok(ours.iter().zip(&written).map(|((name, a), (_, b))| (name.clone(), far(a, b))).collect())
}

fn tensors(inputs: &[(String, HostTensor)], device: Device) -> Result<Vec<(String, Tensor)>> {
    inputs.iter().map(|(n, t)| Ok((n.clone(), convert::to_torch(t)?.f_to_device(device)?))).collect()
}

fn forward(net: &Network, inputs: &[(String, HostTensor)]) -> Result<Vec<(String, HostTensor)>> {
    let owned = tensors(inputs, net.device())?;
    let named: Vec<(&str, &Tensor)> = owned.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let out = tch::no_grad(|| net.forward(&named))?;
    out.into_iter().map(|(n, t)| Ok((n, convert::to_host(&t)?))).collect()
}

fn pairs(
    ours: &[(String, HostTensor)],
    theirs: &[(String, HostTensor)],
    tolerance: Tolerance,
) -> Result<Vec<OutputError>> {
    theirs
        .iter()
        .map(|(name, t)| {
            let mine = ours.iter().find(|(n, _)| n == name).map(|(_, t)| t).ok_or_else(|| {
                let names: Vec<_> = ours.iter().map(|(n, _)| format!("`{n}`")).collect();
                Error::usage(format!("`{name}` is no output of the graph; it has {}", names.join(", ")))
            })?;
            let mut error = compare(name, mine, t, tolerance)?;
            // Nothing but NaN is no agreement.
            error.ok &= error.nan < 1.0;
            Ok(error)
        })
        .collect()
}

type Reference<'a> = dyn Fn(&crate::onnx::ModelProto) -> Result<(String, Vec<(String, HostTensor)>)> + 'a;

/// Makes every intermediate value an output, in both, and finds the first that differs.
fn locate(
    net: &Network,
    inputs: &[(String, HostTensor)],
    proto: &crate::onnx::ModelProto,
    reference: &Reference,
    tolerance: Tolerance,
) -> Result<Option<Divergence>> {
    let mut all = proto.clone();
    let Some(graph) = all.graph.as_mut() else { return Ok(None) };
    let known: Vec<String> = graph.output.iter().map(|o| o.name().to_owned()).collect();
    let extra: Vec<String> = graph
        .node
        .iter()
        .filter(|n| n.op_type() != "Constant")
        .flat_map(|n| n.output.iter())
        .filter(|o| !o.is_empty() && !known.contains(o))
        .cloned()
        .collect();
    graph.output.extend(extra.into_iter().map(|name| ValueInfoProto { name: Some(name), ..ValueInfoProto::default() }));
    let theirs: BTreeMap<String, HostTensor> = match reference(&all) {
        Ok((_, v)) => v.into_iter().collect(),
        // Sequences and unusual types cannot all be outputs; the comparison of the real outputs stands without this.
        Err(_) => return Ok(None),
    };
    let options = ImportOptions { fuse: false, widen: false, ..ImportOptions::default() };
    let coarse = Tolerance { atol: tolerance.atol.max(1e-2), rtol: tolerance.rtol.max(1e-2) };
    let tolerance = if net.shared().widened { coarse } else { tolerance };
    let plain = Network::import(net.shared().model.clone(), &options, Device::Cpu)?;
    let owned = tensors(inputs, Device::Cpu)?;
    let named: Vec<(&str, &Tensor)> = owned.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let mut seen: Vec<(usize, HostTensor)> = Vec::new();
    tch::no_grad(|| {
        plain.observe(&named, &mut |id, value| {
            if let Ok(t) = value.tensor(Device::Cpu).and_then(convert::to_host) {
                seen.push((id, t));
            }
        })
    })?;
    let graph = &plain.shared().graph;
    let producers = graph.producers();
    for (id, ours) in &seen {
        let name = &graph.names[*id];
        let Some(t) = theirs.get(name) else { continue };
        let node = producers.get(id).map_or_else(|| name.clone(), |&n| graph.nodes[n].label());
        let divergence = |max_abs| Divergence {
            node: node.clone(),
            value: name.clone(),
            max_abs,
            libtorch: statistics(&ours.to_f64()),
            onnxruntime: statistics(&t.to_f64()),
        };
        match compare(name, ours, t, tolerance) {
            Ok(e) if e.ok => {}
            Ok(e) => return Ok(Some(divergence(e.max_abs))),
            Err(_) => return Ok(Some(divergence(f64::INFINITY))),
        }
    }
    Ok(None)
}

/// Parity of a model file that nobody has imported yet, with random inputs by its signature and card.
pub fn check_model(model: Model, card: Option<&TeacherCard>, batch: usize, tolerance: Tolerance) -> Result<Parity> {
    let net = Network::import(model, &ImportOptions::default(), Device::Cpu)?;
    let inputs = random_inputs(net.inputs(), card, batch, &BTreeMap::new(), 0)?;
    check(&net, &inputs, None, tolerance)
}

#[cfg(test)]
mod tests;
