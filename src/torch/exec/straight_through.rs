//! Quantised networks that can be trained: pairs of QuantizeLinear and DequantizeLinear as one operator on floats.

use std::collections::HashSet;

use crate::graph::{Graph, Node, ValueId};

/// Integers carry no gradient. Where a DequantizeLinear undoes a QuantizeLinear with the same scale and zero point, the
/// pair becomes one operator on floats that has the same values and the straight-through gradient. `None` where there is
/// no such pair.
pub(super) fn fake_quantized(graph: &Graph) -> Option<Vec<Node>> {
    if !graph.nodes.iter().any(|n| n.is("DequantizeLinear")) {
        return None;
    }
    let producers = graph.producers();
    let same = |a: Option<ValueId>, b: Option<ValueId>| {
        let data = |v: Option<ValueId>| v.and_then(|v| graph.constants.get(&v)).map(|c| &c.tensor);
        a == b || (data(a).is_some() && data(a) == data(b))
    };
    let mut nodes = graph.nodes.clone();
    let mut changed = false;
    for node in nodes.iter_mut().filter(|n| n.is("DequantizeLinear")) {
        let source = node.input(0).and_then(|v| producers.get(&v)).map(|&i| &graph.nodes[i]);
        let Some(q) = source.filter(|q| q.is("QuantizeLinear")) else { continue };
        let number = |n: &Node, name: &str, default: i64| n.attributes.int_or(name, default).ok();
        let alike = number(q, "axis", 1) == number(node, "axis", 1)
            && number(q, "block_size", 0) == number(node, "block_size", 0)
            && number(q, "precision", 0) == Some(0)
            && number(node, "output_dtype", 0) == Some(0);
        if !(alike && same(q.input(1), node.input(1)) && same(q.input(2), node.input(2))) {
            continue;
        }
        node.domain = "disback".to_owned();
        node.op = "FakeQuantize".to_owned();
        node.inputs = q.inputs.clone();
        node.attributes = q.attributes.clone();
        changed = true;
    }
    if !changed {
        return None;
    }
    // What only the other half of a pair read is not computed any more.
    let read: HashSet<ValueId> = nodes
        .iter()
        .flat_map(|n| n.inputs.iter().flatten().copied().chain(n.captures.iter().map(|(_, v)| *v)))
        .chain(graph.outputs.iter().map(|p| p.value))
        .collect();
    nodes.retain(|n| !n.is("QuantizeLinear") || n.outputs.iter().flatten().any(|v| read.contains(v)));
    Some(nodes)
}
