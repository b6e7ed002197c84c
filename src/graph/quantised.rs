//! Weights in whole numbers: what quantisation leaves of a network. No gradient moves them, and the biases that stay in floats
//! would be trained alone.

use std::collections::HashSet;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::graph::roles::layers::behind_moves;
use crate::graph::{Graph, ValueId};

/// Operators that read quantised weights, and the slots in which they do.
const READERS: &[(&str, &[usize])] = &[
    ("DequantizeLinear", &[0]),
    ("MatMulInteger", &[0, 1]),
    ("ConvInteger", &[1]),
    ("QLinearMatMul", &[0, 3]),
    ("QLinearConv", &[3]),
];

/// Quantised weights of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct QuantisedWeights {
    /// Number of quantised weights: matrices and filters, without their biases.
    pub tensors: usize,
    /// Number of elements in all of them together.
    pub elements: usize,
    /// Name of the first of them.
    pub example: String,
}

impl std::fmt::Display for QuantisedWeights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { tensors, elements, example } = self;
        let what = if *tensors == 1 { "weight is" } else { "weights are" };
        write!(f, "{tensors} {what} quantised ({elements} elements; `{example}`): whole numbers cannot be trained")
    }
}

/// The quantised weights (matrices and kernels, not their biases), if there are any.
pub fn quantised(graph: &Graph) -> Option<QuantisedWeights> {
    let producers = graph.producers();
    let mut seen: HashSet<ValueId> = HashSet::new();
    let mut found: Option<QuantisedWeights> = None;
    for node in &graph.nodes {
        let slots = READERS.iter().find(|(op, _)| node.is(op)).map_or(&[][..], |r| r.1);
        for v in slots.iter().filter_map(|&k| node.input(k)) {
            let Some(t) = behind_moves(graph, &producers, v) else { continue };
            if t.dtype().is_float() || t.rank() < 2 || t.len() < 2 || !seen.insert(v) {
                continue;
            }
            let all = found.get_or_insert_with(|| QuantisedWeights {
                tensors: 0,
                elements: 0,
                example: graph.names[v].clone(),
            });
            all.tensors += 1;
            all.elements += t.len();
        }
    }
    found
}

/// Refuses a graph with quantised weights, by an error of kind [`crate::Kind::Unsupported`].
pub fn refuse(graph: &Graph) -> Result<()> {
    match quantised(graph) {
        None => Ok(()),
        Some(q) => Err(Error::unsupported(q.to_string()).hint(
            "take the export from before it was quantised; `disback export --precision int8` quantises the student",
        )),
    }
}
