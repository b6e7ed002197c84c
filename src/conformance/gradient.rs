//! Autograd against central differences: the whole graph in f64, at the case's own inputs (moved by a thousandth, off the
//! kinks at which hand-written inputs like to sit), along random directions, through a random projection of the outputs.

use std::path::Path;
use std::rc::Rc;

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::{DataSet, data_sets};
use crate::error::{Error, Result};
use crate::graph::load::Model;
use crate::graph::lower::lower;
use crate::graph::{Attribute, Graph};
use crate::noise::image_noise;
use crate::tensor::DType;
use crate::torch::convert::is_float;
use crate::torch::exec::kernel::Value;
use crate::torch::exec::plan::Plan;
use crate::torch::ops;

/// Largest accepted error of a directional derivative, relative to its size.
pub const GRADIENT_TOLERANCE: f64 = 1e-4;
/// Half the distance of the central difference.
const STEP: f64 = 1e-6;
const DIRECTIONS: u64 = 3;

/// How the gradient check of one case ended.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Gradient {
    /// Autograd agrees with central differences.
    Passed {
        /// Largest error of a directional derivative, relative to its size; at most [`GRADIENT_TOLERANCE`].
        error: f64,
    },
    /// The network is not differentiable at the case's inputs, or has nothing to differentiate.
    Excepted {
        /// Why autograd and central differences must differ there.
        reason: String,
    },
    /// The two do not agree, or the gradient could not be computed.
    Wrong {
        /// What differs and by how much, or what failed.
        reason: String,
    },
}

/// Cases in which autograd and central differences must differ, by the start of their names, and why.
const EXCEPTIONS: &[(&str, &str)] = &[
    ("test_attention_23_boolmask_fullymasked_row_nan_robustness_expanded", BLIND),
    ("test_attention_23_fullymasked_qk_matmul_output_mode3_zero_expanded", BLIND),
    ("test_attention_24_fullymasked_qk_matmul_output_mode3_zero_expanded", BLIND),
    ("test_attention_24_qk_matmul_output_mode3_softmax_precision_expanded", BLIND),
    ("test_attention_4d_causal_nonpad_negative_offset_structural_empty_expanded", BLIND),
    ("test_attention_4d_causal_padded_kv_bf16_expanded", BLIND),
    ("test_attention_causal_boolmask_nan_robustness_expanded", BLIND),
    ("test_attention_local_window_gqa_rank4_mask_expanded", BLIND),
    ("test_mod_float_edge_cases_fmod_0", "remainders by 0 and of infinity are NaN, and so is the gradient there"),
];
/// (The operator itself has the right gradient: the cases without `_expanded` are checked.)
const BLIND: &str =
    "a row of the softmax sees nothing: NaN, which a Where hides in the value and autograd not in the gradient";

/// `None` where the case has no floats in or none out.
pub(super) fn of_case(name: &str, dir: &Path, device: Device) -> Result<Option<Gradient>> {
    let model = Model::load(&dir.join("model.onnx"))?;
    let mut graph = lower(&model)?;
    let floating = |d: Option<DType>| d.is_some_and(DType::is_float);
    if !graph.inputs.iter().any(|p| floating(p.dtype)) || !graph.outputs.iter().any(|p| floating(p.dtype)) {
        return Ok(None);
    }
    if let Some((_, reason)) = EXCEPTIONS.iter().find(|(prefix, _)| name.starts_with(prefix)) {
        return Ok(Some(Gradient::Excepted { reason: (*reason).to_owned() }));
    }
    let set = data_sets(dir, &model, &graph)?.into_iter().next().ok_or_else(|| Error::io("no data"))?;
    widen(&mut graph);
    check(&graph, set, device).map(Some)
}

fn widened(code: i64) -> i64 {
    if matches!(code, 1 | 10 | 16) { 11 } else { code }
}

/// All floats of a graph to f64: constants, declared types and types named by attributes.
fn widen(graph: &mut Graph) {
    let wide = |t: &crate::tensor::HostTensor| if t.dtype().is_float() { t.cast(DType::F64) } else { t.clone() };
    for c in graph.constants.values_mut() {
        c.tensor = wide(&c.tensor);
    }
    for port in graph.inputs.iter_mut().chain(&mut graph.outputs) {
        if port.dtype.is_some_and(DType::is_float) {
            port.dtype = Some(DType::F64);
        }
    }
    for node in &mut graph.nodes {
        let changed: Vec<(String, Attribute)> = node
            .attributes
            .iter()
            .filter_map(|(name, value)| {
                let value = match value {
                    Attribute::Tensor(t) => Attribute::Tensor(wide(t)),
                    Attribute::Graph(g) => {
                        let mut g = (**g).clone();
                        widen(&mut g);
                        Attribute::Graph(Rc::new(g))
                    }
                    Attribute::Int(v) if TYPE_ATTRIBUTES.contains(&name) => Attribute::Int(widened(*v)),
                    _ => return None,
                };
                Some((name.to_owned(), value))
            })
            .collect();
        for (name, value) in changed {
            node.attributes.set(&name, value);
        }
        // Its default is f32, where an attribute could say otherwise.
        if matches!(node.op.as_str(), "ConstantOfShape") && node.attributes.get("value").is_none() {
            node.attributes.set("value", Attribute::Tensor(crate::tensor::HostTensor::vec(&[0f64])));
        }
    }
}

const TYPE_ATTRIBUTES: &[&str] = &["to", "dtype", "output_datatype", "output_dtype", "softmax_precision", "precision"];

/// Standard normal, f64, of the shape and on the device of `like`; the same in every run.
fn noise(seed: u64, index: u64, like: &Tensor) -> Result<Tensor> {
    let values: Vec<f64> = image_noise(seed, index, like.numel()).into_iter().map(f64::from).collect();
    Ok(Tensor::f_from_slice(&values)?.f_reshape(&like.size()[..])?.f_to_device(like.device())?)
}

fn check(graph: &Graph, set: DataSet, device: Device) -> Result<Gradient> {
    let plan = Plan::new(graph, &[], ops::registry())?;
    let mut free: Vec<usize> = Vec::new();
    let mut point: Vec<Value> = Vec::new();
    for (i, (port, value)) in graph.inputs.iter().zip(set.inputs).enumerate() {
        // Sequences and optionals stay as they are, and so do integers.
        let t = match value.tensor(Device::Cpu) {
            Ok(t) if is_float(t.kind()) => t,
            _ => {
                point.push(value);
                continue;
            }
        };
        let t = t.f_to_kind(Kind::Double)?;
        if plan.is_host_input(port) {
            point.push(Value::host(t));
            continue;
        }
        free.push(i);
        let t = t.f_to_device(device)?;
        // Upwards, so that zero stays in the domain of logarithms and powers; masks of -inf stay as they are.
        let size = t.f_abs()?.f_clamp_max(1e3)?.f_add_scalar(0.1)?;
        let jitter = noise(8, i as u64, &t)?.f_abs()?.f_mul(&size)?.f_mul_scalar(1e-3)?;
        point.push(Value::device(t.f_add(&jitter)?));
    }
    if free.is_empty() {
        return Ok(Gradient::Excepted {
            reason: "every float input decides about shapes or is read on the host".into(),
        });
    }
    let forward = |point: &[Value]| -> Result<Tensor> {
        let inputs: Vec<(&str, Value)> =
            graph.inputs.iter().zip(point).map(|(p, v)| (p.name.as_str(), v.clone())).collect();
        let out = plan.run_typed(&inputs, &[], device, &mut |_, _| {})?;
        let mut sum = Tensor::f_zeros([0i64; 0], (Kind::Double, device))?;
        for (k, v) in out.iter().enumerate() {
            let Ok(y) = v.tensor(device) else { continue };
            if is_float(y.kind()) && y.numel() > 0 {
                // Infinite elements (masks) have no derivative that could be compared.
                let y = y.f_to_kind(Kind::Double)?;
                let y = y.f_where_self(&y.f_isfinite()?, &y.f_zeros_like()?)?;
                sum = sum.f_add(&y.f_mul(&noise(11, k as u64, &y)?)?.f_sum(Kind::Double)?)?;
            }
        }
        Ok(sum)
    };
    let leaves: Vec<Tensor> = free
        .iter()
        .map(|&i| Ok(point[i].tensor(device)?.detach().copy().f_set_requires_grad(true)?))
        .collect::<Result<_>>()?;
    let mut with_leaves = point.clone();
    for (&i, leaf) in free.iter().zip(&leaves) {
        with_leaves[i] = Value::device(leaf.shallow_clone());
    }
    let loss = forward(&with_leaves)?;
    if !loss.f_double_value(&[])?.is_finite() {
        return Ok(Gradient::Excepted { reason: "the outputs are not finite".into() });
    }
    if loss.requires_grad() {
        loss.f_backward()?;
    }
    let mut worst = 0f64;
    for (&i, leaf) in free.iter().zip(&leaves) {
        let x = leaf.detach();
        let finite = x.f_isfinite()?;
        let grad = leaf.grad();
        let grad = if grad.defined() { grad } else { x.f_zeros_like()? };
        let grad = grad.f_where_self(&finite, &grad.f_zeros_like()?)?;
        for direction in 0..DIRECTIONS {
            let v = noise(13 + direction, i as u64, &x)?.f_mul(&x.f_abs()?.f_clamp_min(0.1)?)?;
            let v = v.f_where_self(&finite, &v.f_zeros_like()?)?;
            let at = |h: f64| -> Result<f64> {
                let mut moved = point.clone();
                moved[i] = Value::device(x.f_add(&v.f_mul_scalar(h)?)?);
                Ok(forward(&moved)?.f_double_value(&[])?)
            };
            let numeric = (at(STEP)? - at(-STEP)?) / (2.0 * STEP);
            let products = grad.f_mul(&v)?;
            let analytic = products.f_sum(Kind::Double)?.f_double_value(&[])?;
            // Terms that cancel leave rounding of their own size.
            let size = products.f_abs()?.f_sum(Kind::Double)?.f_double_value(&[])?;
            let error = (numeric - analytic).abs() / (numeric.abs() + analytic.abs() + 1e-2 * size + 1e-4);
            if !(error <= GRADIENT_TOLERANCE) {
                return Ok(Gradient::Wrong {
                    reason: format!(
                        "input `{}`: autograd gives {analytic:.9e} along a direction, central differences {numeric:.9e}",
                        graph.inputs[i].name
                    ),
                });
            }
            worst = worst.max(error);
        }
    }
    Ok(Gradient::Passed { error: worst })
}
