//! Weights in 8 bits: symmetric, a scale for each output channel, DequantizeLinear before the operator that reads them.
//! Everything is still computed in f32; the file is a quarter of the size. `int8_dynamic` computes in 8 bits too.

use std::collections::{HashMap, HashSet};

use serde::Serialize;

use crate::error::{Error, Result};
use crate::graph::tensors;
use crate::onnx::ModelProto;
use crate::tensor::{DType, HostTensor};

use crate::graph::edit;
use crate::graph::edit::int_attribute;
use crate::passes::evaluate;
use crate::passes::evaluate::Inputs;

/// Smaller tensors stay: they would save nothing.
pub(super) const SMALLEST: usize = 1024;

/// What quantisation did: with the weights, or, where arithmetic is in 8 bits too, with the nodes that multiply by
/// them.
#[derive(Debug, Clone, Serialize)]
pub struct QuantisationReport {
    /// Weights stored in 8 bits.
    pub tensors: usize,
    /// Weights (or nodes) that stay f32, and why.
    pub kept: Vec<(String, String)>,
    /// Largest difference of the sample to the f32 network's over the calibration inputs.
    pub max_abs: f64,
}

struct Candidate {
    /// Index of the initializer.
    index: usize,
    name: String,
    axis: usize,
    /// Relative error of its quantised form (L2).
    error: f64,
}

/// Quantises in place as many weights as keep the sample within `limit` of the f32 network's on the calibration inputs:
/// where all of them do not, those with the largest error of their own stay f32.
///
/// Errors, of kind [`crate::Kind::Usage`]: an opset below 13; no weight that can be quantised within the limit.
pub fn quantise(model: &mut ModelProto, limit: f64, calibration: &[Inputs]) -> Result<QuantisationReport> {
    if edit::opset(model) < 13 {
        return Err(Error::usage(format!(
            "int8 weights need opset 13 or newer, the graph is of {}",
            edit::opset(model)
        ))
        .hint("export the teacher again with a newer opset"));
    }
    let reference = evaluate::samples(model, calibration)?;
    let (mut candidates, mut kept) = candidates(model);
    candidates.sort_by(|a, b| a.error.total_cmp(&b.error));
    let make = |n: usize| with_int8(model, &candidates[..n]);
    let most =
        most_within(limit, candidates.len(), &reference, calibration, make)?.map_err(|e| none_within(limit, e))?;
    for c in &candidates[most.count..] {
        kept.push((c.name.clone(), format!("with it in 8 bits the sample would be off by more than {limit}")));
    }
    *model = most.model;
    Ok(QuantisationReport { tensors: most.count, kept, max_abs: most.max_abs })
}

/// The largest number of candidates, best first, with which the sample stays within a limit.
pub(super) struct Most {
    pub count: usize,
    pub model: ModelProto,
    pub max_abs: f64,
}

/// Tries all of `candidates`, then an eighth fewer each time: each try is a run of the network. Where even the last few move the
/// sample by more than `limit`: by how much the best try does; `None` where there are no candidates.
pub(super) fn most_within(
    limit: f64,
    candidates: usize,
    reference: &[HostTensor],
    calibration: &[Inputs],
    make: impl Fn(usize) -> Result<ModelProto>,
) -> Result<std::result::Result<Most, Option<f64>>> {
    let (mut count, mut least) = (candidates, None::<f64>);
    while count > 0 {
        let model = make(count)?;
        let found = evaluate::samples(&model, calibration)?;
        let max_abs = found.iter().zip(reference).map(|(a, b)| evaluate::max_abs(a, b)).fold(0.0, f64::max);
        if max_abs <= limit {
            return Ok(Ok(Most { count, model, max_abs }));
        }
        least = Some(least.map_or(max_abs, |l| l.min(max_abs)));
        count = count.saturating_sub(candidates.div_ceil(8));
    }
    Ok(Err(least))
}

/// Why nothing was quantised: `least` is how far the best try moved the sample.
pub(super) fn none_within(limit: f64, least: Option<f64>) -> Error {
    const OTHERWISE: &str = "use --precision fp16, which takes weights of every size";
    match least {
        None => Error::usage(format!(
            "the network has no weights of {SMALLEST} elements or more that could be stored in 8 bits"
        ))
        .hint(OTHERWISE),
        Some(least) => {
            let what = format!(
                "8 bits move a value of the sample by {least:.2e}, however little of the network is quantised; --int8-limit allows \
                 {limit}"
            );
            // (Rounded up, so that what is said is enough.)
            let enough = (least * 1e3).ceil() / 1e3;
            match enough.is_finite() {
                true => Error::usage(what)
                    .hint(format!("--int8-limit {enough} allows that much; --precision fp16 stays nearer")),
                false => Error::usage(what).hint(OTHERWISE),
            }
        }
    }
}

/// Weights of Conv, ConvTranspose, Gemm, MatMul and embedding tables, with the axis of the scales.
fn candidates(model: &ModelProto) -> (Vec<Candidate>, Vec<(String, String)>) {
    let Some(graph) = &model.graph else { return (Vec::new(), Vec::new()) };
    let mut axes: HashMap<&str, Option<usize>> = HashMap::new();
    let rank: HashMap<&str, usize> = graph.initializer.iter().map(|t| (t.name(), t.dims.len())).collect();
    for n in &graph.node {
        for (slot, input) in n.input.iter().enumerate() {
            let rank = rank.get(input.as_str()).copied().unwrap_or(0);
            let axis = match (n.op_type(), slot) {
                ("Conv", 1) => Some(0),
                ("ConvTranspose", 1) if edit::int(n, "group").unwrap_or(1) == 1 => Some(1),
                ("Gemm", 1) => Some(if edit::int(n, "transB").unwrap_or(0) == 1 { 0 } else { 1 }),
                ("MatMul", 1) if rank >= 2 => Some(rank - 1),
                ("Gather", 0) if edit::int(n, "axis").unwrap_or(0) == 0 && rank == 2 => Some(0),
                _ => None,
            };
            let entry = axes.entry(input).or_insert(axis);
            if *entry != axis {
                *entry = None;
            }
        }
    }
    let (mut found, mut kept) = (Vec::new(), Vec::new());
    for (index, t) in graph.initializer.iter().enumerate() {
        let Some(Some(axis)) = axes.get(t.name()).copied() else { continue };
        let Ok(tensor) = tensors::from_proto(t) else { continue };
        if tensor.dtype() != DType::F32 || axis >= tensor.rank() {
            continue;
        }
        if tensor.len() < SMALLEST {
            kept.push((t.name().to_owned(), format!("{} elements", tensor.len())));
            continue;
        }
        let values = tensor.to_f32();
        let (q, scales) = rows(&values, tensor.shape(), axis);
        let (mut error, mut size) = (0f64, 0f64);
        for (k, v) in values.iter().enumerate() {
            let back = f64::from(q[k]) * f64::from(scales[channel(k, tensor.shape(), axis)]);
            error += (back - f64::from(*v)).powi(2);
            size += f64::from(*v).powi(2);
        }
        let error = if size > 0.0 { (error / size).sqrt() } else { 0.0 };
        found.push(Candidate { index, name: t.name().to_owned(), axis, error });
    }
    (found, kept)
}

fn channel(k: usize, shape: &[usize], axis: usize) -> usize {
    let inner: usize = shape[axis + 1..].iter().product();
    k / inner % shape[axis]
}

/// Symmetric 8-bit values and the scale of each channel.
pub(super) fn rows(values: &[f32], shape: &[usize], axis: usize) -> (Vec<i8>, Vec<f32>) {
    let mut largest = vec![0f32; shape[axis]];
    for (k, v) in values.iter().enumerate() {
        let c = channel(k, shape, axis);
        largest[c] = largest[c].max(v.abs());
    }
    let scales: Vec<f32> = largest.iter().map(|m| if *m > 0.0 { m / 127.0 } else { 1.0 }).collect();
    let q = values
        .iter()
        .enumerate()
        .map(|(k, v)| (v / scales[channel(k, shape, axis)]).round().clamp(-127.0, 127.0) as i8);
    (q.collect(), scales)
}

fn with_int8(model: &ModelProto, chosen: &[Candidate]) -> Result<ModelProto> {
    let mut model = model.clone();
    let Some(graph) = model.graph.as_mut() else { return Ok(model) };
    let mut taken: HashSet<String> = edit::value_names(graph);
    let mut before = Vec::new();
    for c in chosen {
        let tensor = tensors::from_proto(&graph.initializer[c.index])?;
        let (q, scales) = rows(&tensor.to_f32(), tensor.shape(), c.axis);
        let mut name = |what: &str| {
            let name = edit::free_name(&taken, &format!("{}/{what}", c.name));
            taken.insert(name.clone());
            name
        };
        let (weight, scale) = (name("int8"), name("scale"));
        graph.initializer[c.index] = tensors::to_proto(&weight, &HostTensor::new(tensor.shape(), &q)?);
        graph.initializer.push(tensors::to_proto(&scale, &HostTensor::vec(&scales)));
        // The value keeps its name, so that whoever reads it need not change. ONNX Runtime fuses DequantizeLinear and MatMul
        // into MatMulNBits, which rounds the activations to 8 bits too (session.qdq_matmulnbits_accuracy_level is 4 by
        // default): with a Reshape to the same shape in between it folds the weight into f32 instead.
        let product = graph.node.iter().any(|n| edit::is(n, "MatMul") && n.input.contains(&c.name));
        let made = if product { name("f32") } else { c.name.clone() };
        let mut n = edit::node("DequantizeLinear", &[&weight, &scale], &made);
        n.attribute.push(int_attribute("axis", c.axis as i64));
        before.push(n);
        if product {
            let shape = name("shape");
            let dims: Vec<i64> = tensor.shape().iter().map(|&d| d as i64).collect();
            graph.initializer.push(tensors::to_proto(&shape, &HostTensor::vec(&dims)));
            before.push(edit::node("Reshape", &[&made, &shape], &c.name));
        }
    }
    before.append(&mut graph.node);
    graph.node = before;
    Ok(model)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_of_channels() {
        // [2, 3] with channels in axis 1.
        let (q, scales) = rows(&[1.0, -2.0, 0.0, 0.5, 4.0, 0.0], &[2, 3], 1);
        assert_eq!(scales, [1.0 / 127.0, 4.0 / 127.0, 1.0]);
        assert_eq!(q, [127, -64, 0, 64, 127, 0]);
    }
}
