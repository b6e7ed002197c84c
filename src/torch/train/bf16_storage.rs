//! Weights that may lie in memory as bf16 where a network computes in bf16: those that meet nothing but convolutions and
//! matrix products, which would round them to bf16 themselves.

use tch::{Kind, Tensor};

use crate::error::Result;
use crate::graph::op_schema::{self, Class, Weight};
use crate::graph::roles::Parameter;
use crate::graph::{Graph, Node, ValueId};
use crate::tensor::DType;
use crate::torch::params::ParamSet;

/// For each parameter whether only matrix products and convolutions read it. `widened`: the layers of a file in half
/// precision are computed in f32 (see [`crate::graph::widen`]).
pub fn kernels(graph: &Graph, parameters: &[Parameter], widened: bool) -> Vec<bool> {
    let of = |p: &Parameter| {
        let float = p.dtype == DType::F32 || (widened && p.dtype != DType::F64);
        float && p.shape.len() > 1 && only_products(graph, p.value)
    };
    parameters.iter().map(of).collect()
}

fn only_products(graph: &Graph, value: ValueId) -> bool {
    let reads = |node: &Node| node.inputs.contains(&Some(value)) || node.captures.iter().any(|(_, v)| *v == value);
    if graph.outputs.iter().any(|port| port.value == value) {
        return false;
    }
    graph.nodes.iter().filter(|node| reads(node)).all(|node| {
        let inside = node.captures.iter().any(|(_, v)| *v == value);
        let Some(row) = op_schema::of(node).filter(|_| !inside) else { return false };
        match row.class {
            // A bias stays in f32.
            _ if row.autocast => {
                let mut slots = node.inputs.iter().enumerate().filter(|(_, v)| **v == Some(value));
                slots.all(|(slot, _)| row.weight(slot) != Some(Weight::Bias))
            }
            Class::View => node.outputs.iter().flatten().all(|v| only_products(graph, *v)),
            _ => false,
        }
    })
}

/// A deep copy with these parameters in bf16.
pub fn narrowed(params: &ParamSet, kernels: &[bool]) -> Result<ParamSet> {
    let copy = |(t, narrow): (&Tensor, &bool)| -> Result<Tensor> {
        let kind = if *narrow { Kind::BFloat16 } else { t.kind() };
        Ok(t.detach().f_to_device_(t.device(), kind, false, true)?)
    };
    let tensors = params.tensors().iter().zip(kernels).map(copy).collect::<Result<_>>()?;
    params.with_tensors(tensors)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tch::Device;

    use super::*;
    use crate::torch::{Compute, Forward, Network, shim};

    #[test]
    fn narrow_copies_compute_the_same_in_bf16() {
        for path in [
            "examples/digits/teacher.onnx",
            "converters/teachers/edm_unet/teacher.onnx",
            "converters/teachers/paddle_unet/teacher.onnx",
        ] {
            let whole = Network::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join(path), Device::Cpu).unwrap();
            whole.configure(Compute { bf16: true, ..Compute::default() });
            let narrow = whole.copy_narrow().unwrap();
            let bytes =
                |p: &ParamSet| p.tensors().iter().map(|t| t.numel() * t.kind().elt_size_in_bytes()).sum::<usize>();
            let share = bytes(narrow.params()) as f64 / bytes(whole.params()) as f64;
            assert!(share < 0.6, "{path}: {share:.2} of the bytes");
            println!("{path}: {share:.3} of the bytes");
            let inputs: Vec<(String, Tensor)> = whole
                .inputs()
                .iter()
                .map(|port| {
                    let shape: Vec<i64> = port.dims().unwrap().into_iter().map(|d| d.map_or(2, |n| n as i64)).collect();
                    let t = shim::randn(3, &shape, Device::Cpu).unwrap();
                    let t = if shape.len() > 2 { t } else { t.abs() + 0.5 };
                    (port.name.clone(), if port.dtype == Some(DType::I64) { t.to_kind(Kind::Int64) } else { t })
                })
                .collect();
            let named: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
            let run = |n: &dyn Forward| tch::no_grad(|| n.forward(&named)).unwrap().remove(0).1;
            assert_eq!(run(&*narrow), run(&whole), "{path}: bit for bit");
            // Where it does not compute in bf16 after all, it still computes.
            narrow.configure(Compute::default());
            whole.configure(Compute::default());
            let (a, b) = (run(&*narrow), run(&whole));
            assert!((&a - &b).abs().max().double_value(&[]) < 0.05 * b.abs().max().double_value(&[]), "{path}");
        }
    }
}
