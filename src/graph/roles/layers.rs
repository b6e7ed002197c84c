//! How the data goes through a graph: what depends on the inputs' elements, and what depends on a layer.

use std::collections::HashSet;

use crate::graph::ir::{Consumers, Graph, Node, Producers, ValueId};
use crate::graph::op_schema::{self, OpSchema};
use crate::tensor::HostTensor;

/// Which values of a graph depend on the elements of its inputs, and which on the output of a layer.
#[derive(Debug, Default)]
pub struct Flow {
    /// Depends on a graph input's elements (not merely on its shape or type).
    pub data: HashSet<ValueId>,
    /// Depends on the output of a layer.
    pub features: HashSet<ValueId>,
}

impl Flow {
    /// Follows the graph once, in its order.
    pub fn new(graph: &Graph) -> Self {
        let producers = graph.producers();
        let consumers = graph.consumers();
        let mut flow = Self {
            data: graph.inputs.iter().map(|p| p.value).chain(graph.captures.iter().map(|(_, v)| *v)).collect(),
            features: HashSet::new(),
        };
        for node in &graph.nodes {
            if !reads(node).any(|v| flow.data.contains(&v)) {
                continue;
            }
            flow.data.extend(node.outputs.iter().flatten());
            let layer = match node.op.as_str() {
                // Rows of a table; picking from the data is none.
                "Gather" => !node.input(0).is_some_and(|v| flow.data.contains(&v)),
                "MatMul" | "Einsum" => {
                    reads(node).any(|v| flow.features.contains(&v)) || !makes_waves(graph, &producers, &consumers, node)
                }
                _ => op_schema::of(node).is_some_and(OpSchema::is_layer),
            };
            if layer || reads(node).any(|v| flow.features.contains(&v)) {
                flow.features.extend(node.outputs.iter().flatten());
            }
        }
        flow
    }
}

/// The values whose elements a node computes with: not those that only give it a shape or a type.
pub fn reads(node: &Node) -> impl Iterator<Item = ValueId> {
    let count = match node.op.as_str() {
        "Shape" | "Size" => 0,
        "CastLike" => 1,
        _ => node.inputs.len(),
    };
    let captures = node.captures.iter().map(|(_, v)| *v);
    node.inputs.iter().take(count).flatten().copied().chain(captures)
}

/// The outer product of a number with a row of frequencies, on its way to Sin or Cos: written as a product of matrices, but
/// no layer.
pub fn makes_waves(graph: &Graph, producers: &Producers, consumers: &Consumers, node: &Node) -> bool {
    let row = |v: ValueId| {
        behind_moves(graph, producers, v)
            .is_some_and(|t| t.len() > 1 && t.shape().iter().max().is_some_and(|&m| m == t.len()))
    };
    node.inputs.iter().flatten().any(|&v| row(v))
        && leads_to(graph, consumers, node, &["Sin", "Cos"], &["Mul", "Add", "Concat", "Neg"], 6)
}

/// The constant that a value is a rearrangement of.
pub fn behind_moves<'a>(graph: &'a Graph, producers: &Producers, mut value: ValueId) -> Option<&'a HostTensor> {
    for _ in 0..8 {
        if let Some(c) = graph.constants.get(&value) {
            return Some(&c.tensor);
        }
        let node = &graph.nodes[*producers.get(&value)?];
        if !op_schema::hands_on(node) {
            return None;
        }
        value = node.input(0)?;
    }
    None
}

/// Whether a node's result reaches one of the operators `targets` within `steps`, through operators that only move it and
/// through those of `through`.
pub fn leads_to(
    graph: &Graph,
    consumers: &Consumers,
    node: &Node,
    targets: &[&str],
    through: &[&str],
    steps: usize,
) -> bool {
    let mut front: Vec<ValueId> = node.outputs.iter().flatten().copied().collect();
    for _ in 0..steps {
        let next: HashSet<usize> = front
            .iter()
            .filter_map(|v| consumers.get(v))
            .flatten()
            .map(|&(n, _)| n)
            .filter(|&n| n != usize::MAX)
            .collect();
        let mut after = Vec::new();
        for n in next.into_iter().filter_map(|n| graph.nodes.get(n)) {
            let op = n.op.as_str();
            if targets.contains(&op) {
                return true;
            }
            if op_schema::hands_on(n) || through.contains(&op) {
                after.extend(n.outputs.iter().flatten());
            }
        }
        if after.is_empty() {
            return false;
        }
        front = after;
    }
    false
}
