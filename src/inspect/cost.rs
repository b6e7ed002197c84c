//! What a forward costs: multiply-adds and activations.

use std::collections::BTreeMap;

use serde::Serialize;
use tch::{Device, Tensor};

use crate::diffusion::TeacherCard;
use crate::error::Result;
use crate::graph::{Node, ValueId};
use crate::parity;
use crate::tensor::HostTensor;
use crate::torch::{Network, convert};

/// Cost of one forward.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Cost {
    /// Images of the batch that the other numbers are for.
    pub batch: Option<usize>,
    /// Multiply-adds of convolutions and matrix products.
    pub macs: Option<u64>,
    /// Bytes of all intermediate values of the fused network: what a backward pass may keep.
    pub activation_bytes: Option<u64>,
}

impl Cost {
    /// Multiply-adds of one image, where they are known.
    pub fn macs_of_one(&self) -> Option<u64> {
        Some(self.macs? / self.batch?.max(1) as u64)
    }
}

/// Runs one batch through the graph and adds up what its convolutions and matrix products cost. `batch` plays no part
/// where the graph fixes its own.
pub fn cost(net: &Network, card: Option<&TeacherCard>, batch: usize) -> Result<Cost> {
    let inputs: Vec<(String, HostTensor)> = parity::random_inputs(net.inputs(), card, batch, &BTreeMap::new(), 0)?;
    let rows = inputs.iter().filter(|(_, t)| t.rank() > 1).map(|(_, t)| t.shape()[0]).max().unwrap_or(1);
    let owned: Vec<(String, Tensor)> =
        inputs.iter().map(|(n, t)| Ok((n.clone(), convert::to_torch(t)?))).collect::<Result<_>>()?;
    let named: Vec<(&str, &Tensor)> = owned.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let mut shapes: BTreeMap<ValueId, (Vec<i64>, u64)> = BTreeMap::new();
    let mut activation_bytes = 0;
    tch::no_grad(|| {
        net.observe(&named, &mut |id, value| {
            if let Ok(t) = value.tensor(Device::Cpu) {
                let bytes = (t.numel() * t.kind().elt_size_in_bytes()) as u64;
                if !value.is_host() {
                    activation_bytes += bytes;
                }
                shapes.insert(id, (t.size(), bytes));
            }
        })
    })?;
    let graph = &net.shared().graph;
    let known: BTreeMap<ValueId, Vec<i64>> = graph
        .constants
        .iter()
        .map(|(v, c)| (*v, c.tensor.shape().iter().map(|&d| d as i64).collect()))
        .chain(net.shared().parameters.iter().map(|p| (p.value, p.shape.iter().map(|&d| d as i64).collect())))
        .chain(
            graph
                .inputs
                .iter()
                .filter_map(|p| owned.iter().find(|(n, _)| *n == p.name).map(|(_, t)| (p.value, t.size()))),
        )
        .chain(shapes.iter().map(|(v, (s, _))| (*v, s.clone())))
        .collect();
    let of = |v: Option<ValueId>| v.and_then(|v| known.get(&v)).cloned().unwrap_or_default();
    let product = |s: &[i64]| s.iter().product::<i64>().max(0) as u64;
    let mut macs = 0u64;
    for n in &graph.nodes {
        let (a, b, y) = (of(n.input(0)), of(n.input(1)), of(n.output(0)));
        macs += match n.op.as_str() {
            "Conv" | "FusedConv" | "NhwcConv" if b.len() > 2 => product(&y) * product(&b[1..]),
            "ConvTranspose" if b.len() > 2 => product(&a) * product(&b[1..]),
            "MatMul" | "FusedMatMul" | "Linear" if !a.is_empty() => {
                product(&y) * a.last().copied().unwrap_or(0).max(0) as u64
            }
            "Einsum" => einsum(n, &n.inputs.iter().map(|v| of(*v)).collect::<Vec<_>>()),
            "Gemm" | "FusedGemm" if b.len() == 2 && y.len() == 2 => product(&b) * y[0].max(0) as u64,
            // Every element of q, and of the result, takes part in a product with each of the keys.
            "Attention" if n.domain == "disback" && a.len() > 1 && b.len() > 1 => {
                let keys = match n.attributes.ints("k_perm") {
                    Ok(Some(perm)) if perm.len() > 1 => perm[perm.len() - 2] as usize,
                    _ => b.len() - 1,
                };
                (product(&a) + product(&y)) * b.get(keys).copied().unwrap_or(0).max(0) as u64
            }
            // The operators have their keys second to last, in heads or not.
            "Attention" | "MultiHeadAttention" if n.input(2).is_some() && b.len() > 2 => {
                (product(&a) + product(&y)) * b[b.len() - 2].max(0) as u64
            }
            _ => 0,
        };
    }
    Ok(Cost { batch: Some(rows), macs: Some(macs), activation_bytes: Some(activation_bytes) })
}

/// A product over all the letters of two factors; of more or fewer factors, and of dots, nothing is counted.
fn einsum(node: &Node, shapes: &[Vec<i64>]) -> u64 {
    let Ok(equation) = node.attributes.string_or("equation", "") else { return 0 };
    let letters = equation.split("->").next().unwrap_or_default().replace(' ', "");
    let terms: Vec<&str> = letters.split(',').collect();
    if terms.len() != 2 || shapes.len() != 2 || letters.contains('.') {
        return 0;
    }
    let sizes: BTreeMap<char, u64> =
        terms.iter().zip(shapes).flat_map(|(t, s)| t.chars().zip(s.iter().map(|&d| d.max(0) as u64))).collect();
    sizes.values().product()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::edit::{node, text_attribute, value_info};
    use crate::graph::{Model, tensors};
    use crate::onnx::{GraphProto, ModelProto, OperatorSetIdProto};
    use crate::tensor::DType;
    use crate::torch::ImportOptions;

    #[test]
    fn a_layer_counts_whether_it_is_fused_or_not_and_so_does_an_einsum() {
        let weight = |name: &str, shape: &[usize]| {
            let values = crate::noise::image_noise(1, 1, shape.iter().product());
            tensors::to_proto(name, &HostTensor::new(shape, &values).unwrap())
        };
        let mut last = node("Einsum", &["h", "v"], "y");
        last.attribute.push(text_attribute("equation", "ab, bc -> ac"));
        let graph = GraphProto {
            name: Some("g".into()),
            input: vec![value_info("x", DType::F32, &[Err("n"), Ok(4)])],
            output: vec![value_info("y", DType::F32, &[Err("n"), Ok(3)])],
            node: vec![node("MatMul", &["x", "w"], "m"), node("Add", &["m", "b"], "h"), last],
            initializer: vec![weight("w", &[4, 8]), weight("b", &[8]), weight("v", &[8, 3])],
            ..GraphProto::default()
        };
        let opset = OperatorSetIdProto { version: Some(20), ..OperatorSetIdProto::default() };
        let model =
            ModelProto { ir_version: Some(9), opset_import: vec![opset], graph: Some(graph), ..ModelProto::default() };
        for fuse in [true, false] {
            let options = ImportOptions { fuse, ..ImportOptions::default() };
            let net = Network::import(Model::from_proto(model.clone()), &options, Device::Cpu).unwrap();
            let fused = net.shared().graph.nodes.iter().any(|n| n.op == "Linear");
            assert_eq!((fused, cost(&net, None, 2).unwrap().macs), (fuse, Some(2 * 4 * 8 + 2 * 8 * 3)));
        }
    }
}
