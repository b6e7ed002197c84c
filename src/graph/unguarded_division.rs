//! Divisions by what can be exactly 0: by a sum over rectified values, by a norm without its epsilon. Exporters lose epsilons
//! (1e-15 is taken for 0, or rounds to 0 in f16), and the network then gives NaN for inputs that its framework has an answer
//! for. Nothing but the structure is looked at.

use std::collections::HashSet;

use serde::Serialize;

use crate::graph::{Graph, Node, ValueId, op_schema};

/// A division by a value that can be 0 everywhere and that no epsilon is added to: the result is NaN there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unguarded {
    /// The node that divides, with its operator, as [`Node::label`] writes it.
    pub node: String,
    /// Name of the value that it divides by.
    pub divisor: String,
}

impl std::fmt::Display for Unguarded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} divides by `{}`, which is 0 where all that it sums is, and no epsilon is added: NaN there. Exporters drop \
             epsilons that they take for 0; compare with the network's code",
            self.node, self.divisor
        )
    }
}

/// All such divisions of a graph, in the order of its nodes.
pub fn unguarded(graph: &Graph) -> Vec<Unguarded> {
    let single = |v: Option<ValueId>| {
        let t = &graph.constants.get(&v?)?.tensor;
        (t.len() == 1).then(|| t.to_f64()[0])
    };
    // What depends on an input, and of that what can be 0 everywhere at once.
    let mut varies: HashSet<ValueId> = graph.inputs.iter().map(|p| p.value).collect();
    let mut zero: HashSet<ValueId> = HashSet::new();
    let mut above: HashSet<ValueId> = HashSet::new();
    let mut found = Vec::new();
    for n in &graph.nodes {
        if !n.inputs.iter().flatten().any(|v| varies.contains(v)) {
            continue;
        }
        varies.extend(n.outputs.iter().flatten());
        if !n.domain.is_empty() {
            continue;
        }
        let is_zero = |i: usize| n.input(i).is_some_and(|v| zero.contains(&v));
        let divisor = match n.op.as_str() {
            "Div" => n.input(1),
            "Reciprocal" => n.input(0),
            "Pow" if single(n.input(1)).is_some_and(|e| e < 0.0) => n.input(0),
            _ => None,
        };
        if let Some(v) = divisor.filter(|v| zero.contains(v)) {
            found.push(Unguarded { node: n.label(), divisor: graph.names[v].clone() });
        }
        let is_above = |i: usize| {
            n.input(i).is_some_and(|v| above.contains(&v)) || single(n.input(i)).is_some_and(|number| number > 0.0)
        };
        if is_positive(n, &is_zero, &is_above) {
            above.extend(n.outputs.iter().flatten());
        } else if can_be_zero(n, &is_zero, &single) {
            zero.extend(n.outputs.iter().flatten());
        }
    }
    found
}

/// Whether a node's result is above 0, as what an epsilon was added to is.
fn is_positive(n: &Node, zero: &dyn Fn(usize) -> bool, above: &dyn Fn(usize) -> bool) -> bool {
    let inputs = n.inputs.len();
    match n.op.as_str() {
        "Exp" | "Sigmoid" | "Softplus" | "Softmax" => true,
        "Add" => (0..inputs).any(above) && (0..inputs).all(|i| above(i) || zero(i)),
        "Max" => (0..inputs).any(above),
        "Clip" => above(1),
        "Mul" | "Div" => (0..inputs).all(above),
        "Sqrt" | "Pow" | "Abs" | "Relu" | "Reciprocal" | "Split" | "Gather" | "Tile" | "ReduceSum" | "ReduceMean"
        | "ReduceMax" | "ReduceL1" | "ReduceL2" | "ReduceSumSquare" => above(0),
        _ => op_schema::hands_on(n) && above(0),
    }
}

/// Whether a node's whole result can be 0: it rectifies or squares, or it is linear in what can be.
fn can_be_zero(n: &Node, zero: &dyn Fn(usize) -> bool, single: &dyn Fn(Option<ValueId>) -> Option<f64>) -> bool {
    let inputs = n.inputs.len();
    let nothing = |i: usize| single(n.input(i)) == Some(0.0);
    match n.op.as_str() {
        "Relu" | "Abs" | "ReduceSumSquare" | "ReduceL1" | "ReduceL2" => true,
        "Mul" => zero(0) || zero(1) || (n.input(0).is_some() && n.input(0) == n.input(1)),
        "Pow" => single(n.input(1)).is_some_and(|e| e > 0.0 && (zero(0) || e % 2.0 == 0.0)),
        "MatMul" | "Einsum" => (0..inputs).any(zero),
        "Sqrt" | "Neg" | "Split" | "Gather" | "Tile" | "ReduceSum" | "ReduceMean" | "ReduceMax" | "Div" => zero(0),
        "Add" | "Max" => (0..inputs).all(|i| zero(i) || nothing(i)) && (0..inputs).any(zero),
        "Concat" | "Sum" => (0..inputs).all(zero),
        "Clip" => zero(0) && single(n.input(1)).is_none_or(|low| low <= 0.0),
        _ => op_schema::hands_on(n) && zero(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{Model, lower::lower};
    use crate::onnx::{GraphProto, NodeProto};
    use crate::runtime::student::decode;
    use crate::runtime::testing::{initializer, model, node, value};
    use crate::tensor::{DType, HostTensor};

    fn divisions(nodes: Vec<NodeProto>) -> Vec<String> {
        let graph = GraphProto {
            node: nodes,
            initializer: vec![
                initializer("two", &HostTensor::scalar(2f32)),
                initializer("half", &HostTensor::scalar(-0.5f32)),
                initializer("eps", &HostTensor::scalar(1e-15f32)),
                initializer("none", &HostTensor::scalar(0f32)),
                initializer("axes", &HostTensor::vec(&[1i64])),
                initializer("w", &HostTensor::new(&[4, 4], &[0.5f32; 16]).unwrap()),
            ],
            input: vec![value("x", DType::F32, &["n", "4"])],
            output: vec![value("y", DType::F32, &["n", "4"])],
            ..Default::default()
        };
        let model = Model::from_proto(decode(&model(graph, &[])).unwrap());
        unguarded(&lower(&model).unwrap()).into_iter().map(|u| u.divisor).collect()
    }

    #[test]
    fn what_lost_its_epsilon_is_found_and_what_has_one_is_not() {
        // A linear attention over rectified values.
        let attention = |last: NodeProto, by: &str| {
            vec![node("Relu", &["x"], "q"), node("MatMul", &["q", "w"], "sums"), last, node("Div", &["x", by], "y")]
        };
        assert_eq!(divisions(attention(node("Identity", &["sums"], "same"), "same")), ["same"]);
        assert_eq!(divisions(attention(node("Add", &["sums", "none"], "plus"), "plus")), ["plus"]);
        assert!(divisions(attention(node("Add", &["sums", "eps"], "plus"), "plus")).is_empty());
        assert!(divisions(attention(node("Max", &["sums", "eps"], "most"), "most")).is_empty());
        assert!(divisions(attention(node("Exp", &["sums"], "more"), "more")).is_empty());
        // A norm.
        let norm = |eps: &str| {
            vec![
                node("Pow", &["x", "two"], "squares"),
                node("ReduceSum", &["squares", "axes"], "sum"),
                node("Add", &["sum", eps], "safe"),
                node("Pow", &["safe", "half"], "inverse"),
                node("Mul", &["x", "inverse"], "y"),
            ]
        };
        assert_eq!(divisions(norm("none")), ["safe"]);
        assert!(divisions(norm("eps")).is_empty());
        // Preconditioning: a root of what is above 0, squared again.
        let scales = vec![
            node("Mul", &["x", "x"], "squares"),
            node("Add", &["squares", "two"], "sum"),
            node("Sqrt", &["sum"], "root"),
            node("Pow", &["root", "two"], "again"),
            node("Reciprocal", &["again"], "scale"),
            node("Mul", &["x", "scale"], "y"),
        ];
        assert!(divisions(scales).is_empty());
        // Of weights alone: they are what they are.
        let weights = vec![
            node("ReduceL2", &["w"], "length"),
            node("Div", &["w", "length"], "unit"),
            node("MatMul", &["x", "unit"], "y"),
        ];
        assert!(divisions(weights).is_empty());
    }
}
