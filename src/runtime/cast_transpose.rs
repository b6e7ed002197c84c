//! A pattern that ONNX Runtime's own optimiser does not survive (seen in 1.32): a Transpose of batches, a Cast, a MatMul whose
//! operands differ in rank. Its `MatmulTransposeFusion` exchanges Transpose and Cast, then finds that it cannot fuse them, and
//! reports the graph unchanged; the next optimiser (`NchwcTransformer`) follows a node that is gone, and the process ends.
//! On the CPU the Cast is ONNX Runtime's own where a MatMul in 16 bits reads the Transpose. Multi-head attention over
//! sequences first (as `torch.nn.MultiheadAttention` is traced) is of this form.
//!
//! Files that come in are opened with that fusion turned off; files that we write have a Reshape to the same shape between.

use std::collections::{HashMap, HashSet};

use prost::Message;

use crate::graph::edit;
use crate::onnx::{GraphProto, NodeProto, TensorProto, ValueInfoProto};
use crate::tensor::DType;

/// The name by which sessions leave the fusion out.
pub const FUSION: &str = "MatmulTransposeFusion";

/// Of a file, what the pattern is seen in: no weights are read.
#[derive(Clone, PartialEq, Message)]
struct Outline {
    #[prost(message, optional, tag = "7")]
    graph: Option<GraphOutline>,
}

#[derive(Clone, PartialEq, Message)]
struct GraphOutline {
    #[prost(message, repeated, tag = "1")]
    node: Vec<NodeProto>,
    #[prost(message, repeated, tag = "5")]
    initializer: Vec<TensorOutline>,
    #[prost(message, repeated, tag = "11")]
    input: Vec<ValueInfoProto>,
}

#[derive(Clone, PartialEq, Message)]
struct TensorOutline {
    #[prost(int64, repeated, tag = "1")]
    dims: Vec<i64>,
    #[prost(int32, optional, tag = "2")]
    data_type: Option<i32>,
    #[prost(string, optional, tag = "8")]
    name: Option<String>,
}

/// Whether a file has the pattern, or may have it once ONNX Runtime has rewritten it for the CPU (`cpu`): there it puts
/// Casts around every MatMul in 16 bits, and moves Transposes. What is no model has it not.
pub fn in_file(bytes: &[u8], cpu: bool) -> bool {
    let Some(outline) = Outline::decode(bytes).ok().and_then(|o| o.graph) else { return false };
    let tensor =
        |t: TensorOutline| TensorProto { dims: t.dims, data_type: t.data_type, name: t.name, ..TensorProto::default() };
    let graph = GraphProto {
        node: outline.node,
        initializer: outline.initializer.into_iter().map(tensor).collect(),
        input: outline.input,
        ..GraphProto::default()
    };
    let any = |op: &str| graph.node.iter().any(|n| edit::is(n, op));
    cpu && narrow(&graph) && any("Transpose") && any("MatMul") || in_graph(&graph, false)
}

/// Whether a graph has the pattern as it is written.
pub fn is_in(graph: &GraphProto) -> bool {
    in_graph(graph, false)
}

fn in_graph(graph: &GraphProto, outer_narrow: bool) -> bool {
    let narrow = outer_narrow || narrow(graph);
    let inner = graph.node.iter().flat_map(|n| &n.attribute).flat_map(|a| a.g.iter().chain(&a.graphs));
    !places(graph, narrow).is_empty() || inner.into_iter().any(|g| in_graph(g, narrow))
}

/// Puts a Reshape to the same shape in front of every MatMul of the pattern. Returns how many.
pub fn part(graph: &mut GraphProto) -> usize {
    part_in(graph, false, &mut edit::value_names(graph))
}

fn part_in(graph: &mut GraphProto, outer_narrow: bool, taken: &mut HashSet<String>) -> usize {
    let narrow = outer_narrow || narrow(graph);
    let mut count = 0;
    let mut before: HashMap<usize, Vec<NodeProto>> = HashMap::new();
    for Place { node, slot, rank } in places(graph, narrow) {
        let value = graph.node[node].input[slot].clone();
        let mut name = |what: &str| {
            let name = edit::free_name(taken, &format!("{value}/{what}"));
            taken.insert(name.clone());
            name
        };
        let (shape, same) = (name("shape"), name("same"));
        // 0 stands for the size as it is.
        let zeros = crate::tensor::HostTensor::vec(&vec![0i64; rank]);
        graph.initializer.push(crate::graph::tensors::to_proto(&shape, &zeros));
        before.entry(node).or_default().push(edit::node("Reshape", &[&value, &shape], &same));
        graph.node[node].input[slot] = same;
        count += 1;
    }
    for (k, node) in std::mem::take(&mut graph.node).into_iter().enumerate() {
        graph.node.extend(before.remove(&k).unwrap_or_default());
        graph.node.push(node);
    }
    for a in graph.node.iter_mut().flat_map(|n| &mut n.attribute) {
        for g in a.g.iter_mut().chain(&mut a.graphs) {
            count += part_in(g, narrow, taken);
        }
    }
    count
}

/// Operand `slot` of the MatMul `node` (index), a value of this rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    node: usize,
    slot: usize,
    rank: usize,
}

/// Where the pattern is; `narrow`: the file holds 16-bit numbers, and a Cast may be put in.
fn places(graph: &GraphProto, narrow: bool) -> Vec<Place> {
    let makers: HashMap<&str, &NodeProto> =
        graph.node.iter().flat_map(|n| n.output.iter().map(move |o| (o.as_str(), n))).collect();
    let ranks: HashMap<&str, usize> = graph.initializer.iter().map(|t| (t.name(), t.dims.len())).collect();
    // The Transpose behind an operand: the permutation, and whether a Cast is between.
    let turned = |value: &str| {
        let mut n = *makers.get(value)?;
        let mut cast = false;
        // ONNX Runtime takes out what does nothing before it looks.
        while ["Cast", "Identity", "Dropout"].iter().any(|op| edit::is(n, op)) {
            cast |= edit::is(n, "Cast");
            n = makers.get(n.input.first()?.as_str())?;
        }
        let perm = edit::ints(n, "perm").filter(|_| edit::is(n, "Transpose"))?;
        Some((perm, cast))
    };
    let rank = |value: &str| turned(value).map(|(p, _)| p.len()).or_else(|| ranks.get(value).copied());
    let mut found = Vec::new();
    for (k, n) in graph.node.iter().enumerate() {
        if !edit::is(n, "MatMul") || n.input.len() != 2 {
            continue;
        }
        for slot in 0..2 {
            let Some((perm, cast)) = turned(&n.input[slot]) else { continue };
            // Operands of equal rank are fused.
            if (cast || narrow) && of_batches(perm) && rank(&n.input[1 - slot]) != Some(perm.len()) {
                found.push(Place { node: k, slot, rank: perm.len() });
            }
        }
    }
    found
}

/// Whether the first dimension goes to the end, or next to the last one, and the others keep their order.
fn of_batches(perm: &[i64]) -> bool {
    let Some(last) = perm.len().checked_sub(1).filter(|&l| l >= 2) else { return false };
    let moved = perm[..last - 1].iter().enumerate().all(|(i, &p)| p == i as i64 + 1);
    moved && matches!((perm[last - 1], perm[last]), (0, p) | (p, 0) if p == last as i64)
}

/// Whether 16-bit numbers occur: inputs, weights, constants, casts.
fn narrow(graph: &GraphProto) -> bool {
    let is = |t: i64| [DType::F16, DType::BF16].iter().any(|d| i64::from(d.to_onnx()) == t);
    let held =
        graph.initializer.iter().chain(graph.node.iter().flat_map(|n| &n.attribute).filter_map(|a| a.t.as_ref()));
    let given = graph.input.iter().filter_map(|v| match v.r#type.as_ref()?.value.as_ref()? {
        crate::onnx::type_proto::Value::TensorType(t) => t.elem_type,
        _ => None,
    });
    let mut types = held.filter_map(|t| t.data_type).chain(given).map(i64::from);
    types.any(is) || graph.node.iter().any(|n| edit::is(n, "Cast") && edit::int(n, "to").is_some_and(is))
}

#[cfg(all(test, feature = "ort"))]
mod tests {
    use super::*;
    use crate::runtime::testing::{initializer, model, node, value};
    use crate::runtime::{EngineKind, EngineOptions, open_bytes};
    use crate::tensor::HostTensor;

    /// Opened with every fusion, these three nodes end the process.
    #[test]
    fn a_file_of_the_pattern_opens_and_computes() {
        let mut turn = node("Transpose", &["x"], "turned");
        turn.attribute = vec![edit::ints_attribute("perm", &[1, 0, 2])];
        let mut cast = node("Cast", &["turned"], "full");
        cast.attribute = vec![edit::int_attribute("to", 1)];
        let graph = GraphProto {
            node: vec![turn, cast, node("MatMul", &["full", "w"], "z")],
            initializer: vec![initializer("w", &HostTensor::new(&[2, 1], &[1f32, 10.0]).unwrap())],
            input: vec![value("x", DType::F16, &["2", "3", "2"])],
            output: vec![value("z", DType::F32, &["3", "2", "1"])],
            ..GraphProto::default()
        };
        let bytes = model(graph, &[]);
        let options = EngineOptions { engine: EngineKind::Ort, ..EngineOptions::default() };
        let x: Vec<f32> = (0..12).map(|k| k as f32).collect();
        let x = HostTensor::new(&[2, 3, 2], &x).unwrap().cast(DType::F16);
        let found = open_bytes(&bytes, None, &options).unwrap().run(&[("x", &x)]).unwrap();
        assert_eq!(found[0].1.to_f32(), [10.0, 76.0, 32.0, 98.0, 54.0, 120.0]);
    }
}
