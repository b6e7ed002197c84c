//! A graph with its edges and what is known of its values before anything runs.

use std::collections::HashSet;

use crate::graph::ir::{Consumers, Graph, Node, Producers, ValueId};
use crate::tensor::{DType, HostTensor};

/// A single number that the graph computes from constants, and how exactly its element type holds it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Number {
    pub value: f64,
    /// Relative rounding of the narrowest element type on the way.
    pub rounding: f64,
}

/// Read-only access to a graph for matching. A view is made anew after every change.
pub(super) struct View<'a> {
    pub graph: &'a Graph,
    pub producers: Producers,
    pub consumers: Consumers,
    /// Of each value, whether it follows from shapes and from constants that never change: known on the host.
    host: Vec<bool>,
    /// Of each value, whether it follows from constants and trained tensors alone, without any input.
    weights: Vec<bool>,
    trained: &'a HashSet<ValueId>,
}

impl<'a> View<'a> {
    pub fn new(graph: &'a Graph, trained: &'a HashSet<ValueId>) -> Self {
        let mut weights = vec![false; graph.names.len()];
        let mut host = vec![false; graph.names.len()];
        for &v in graph.constants.keys() {
            (weights[v], host[v]) = (true, !trained.contains(&v));
        }
        for node in &graph.nodes {
            let reads = |of: &[bool]| node.captures.is_empty() && node.inputs.iter().flatten().all(|v| of[*v]);
            let shape = node.is("Shape") || node.is("Size");
            let (known, weight) = (shape || reads(&host), reads(&weights));
            for &v in node.outputs.iter().flatten() {
                host[v] |= known;
                weights[v] |= weight;
            }
        }
        Self { graph, producers: graph.producers(), consumers: graph.consumers(), host, weights, trained }
    }

    pub fn node(&self, i: usize) -> &'a Node {
        &self.graph.nodes[i]
    }

    pub fn name(&self, v: ValueId) -> &'a str {
        &self.graph.names[v]
    }

    /// The node that makes `v`.
    pub fn maker(&self, v: ValueId) -> Option<usize> {
        self.producers.get(&v).copied()
    }

    /// Whether the elements of `v` are known on the host when a plan is specialised.
    pub fn is_host(&self, v: ValueId) -> bool {
        self.host.get(v).is_some_and(|known| *known)
    }

    /// Whether `v` depends on no graph input: a weight, or a constant, perhaps reshaped.
    pub fn is_weight(&self, v: ValueId) -> bool {
        self.weights.get(v).is_some_and(|known| *known)
    }

    /// A constant that no training changes.
    pub fn constant(&self, v: Option<ValueId>) -> Option<&'a HostTensor> {
        let v = v.filter(|v| !self.trained.contains(v))?;
        self.graph.constants.get(&v).map(|c| &c.tensor)
    }

    /// The tensor in the file of a constant or of a weight.
    pub fn stored(&self, v: Option<ValueId>) -> Option<&'a HostTensor> {
        self.graph.constants.get(&v?).map(|c| &c.tensor)
    }

    /// Host integers of an axes or permutation input.
    pub fn ints(&self, v: Option<ValueId>) -> Option<Vec<i64>> {
        self.constant(v).filter(|t| !t.dtype().is_float()).map(HostTensor::to_i64)
    }

    /// The one number that `v` is, through the arithmetic on plain numbers that exporters leave in the graph
    /// (`Sqrt(64)`, `CastLike(1e-6, x)`).
    pub fn number(&self, v: ValueId) -> Option<Number> {
        self.number_within(v, 6)
    }

    fn number_within(&self, v: ValueId, depth: usize) -> Option<Number> {
        if let Some(t) = self.constant(Some(v)) {
            let rounding = match t.dtype() {
                DType::F16 => 1e-3,
                DType::BF16 => 8e-3,
                _ => 2e-6,
            };
            return (t.len() == 1).then(|| Number { value: t.to_f64()[0], rounding });
        }
        let node = self.node(self.maker(v)?);
        if !node.domain.is_empty() || depth == 0 {
            return None;
        }
        let input = |i: usize| self.number_within(node.input(i)?, depth - 1);
        let one = |f: fn(f64) -> f64| input(0).map(|n| Number { value: f(n.value), ..n });
        let two = |f: fn(f64, f64) -> f64| {
            let (a, b) = (input(0)?, input(1)?);
            Some(Number { value: f(a.value, b.value), rounding: a.rounding.max(b.rounding) })
        };
        match node.op.as_str() {
            "CastLike" | "Identity" | "Reshape" | "Unsqueeze" | "Squeeze" | "Expand" => one(|x| x),
            // To a float type only: an integer would be cut off.
            "Cast" if matches!(node.attributes.int("to").ok()??, 1 | 10 | 11 | 16) => one(|x| x),
            "Sqrt" => one(f64::sqrt),
            "Reciprocal" => one(f64::recip),
            "Neg" => one(|x| -x),
            "Mul" => two(|a, b| a * b),
            "Div" => two(|a, b| a / b),
            "Add" => two(|a, b| a + b),
            "Sub" => two(|a, b| a - b),
            "Pow" => two(f64::powf),
            _ => None,
        }
    }

    /// The axes of a reduction that keeps its dimensions: an attribute, from opset 18 on an input (13 for ReduceSum).
    pub fn kept_axes(&self, i: usize) -> Option<Vec<i64>> {
        let node = self.node(i);
        if !node.attributes.flag("keepdims", true).ok()? {
            return None;
        }
        match node.attributes.ints("axes").ok()? {
            Some(axes) => Some(axes),
            None => self.ints(node.input(1)),
        }
        .filter(|axes| !axes.is_empty())
    }

    /// The axes of a Squeeze or Unsqueeze: an attribute, from opset 13 on an input.
    pub fn listed_axes(&self, i: usize) -> Option<Vec<i64>> {
        let node = self.node(i);
        node.attributes.ints("axes").ok()?.or_else(|| self.ints(node.input(1)))
    }

    /// A reader of one of the outputs of node `i` that is not in `inside`, as `(value, reader)`. Who asks for a shape only
    /// reads no value: the chain stays for it, and a specialised plan, which has the shape, does not run it.
    pub fn read_outside(&self, i: usize, inside: &[usize]) -> Option<(ValueId, String)> {
        self.node(i).outputs.iter().flatten().find_map(|v| {
            let asks = |n: usize| self.graph.nodes.get(n).is_some_and(|n| n.is("Shape") || n.is("Size"));
            let reader = self.consumers.get(v)?.iter().find(|(n, _)| !inside.contains(n) && !asks(*n))?.0;
            let reader = self.graph.nodes.get(reader).map_or("the graph's outputs".to_owned(), Node::label);
            Some((*v, reader))
        })
    }
}
