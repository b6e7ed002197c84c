//! Identities and casts that change nothing.

use std::collections::{HashMap, HashSet};

use crate::graph::fuse::{Report, Rewrite};
use crate::graph::ir::{Graph, Node, ValueId};
use crate::graph::op_schema::{self, ResultType};
use crate::tensor::DType;

/// Element types as far as they follow from inputs, constants and casts.
fn types(graph: &Graph) -> HashMap<ValueId, DType> {
    let mut types: HashMap<ValueId, DType> = graph.constants.iter().map(|(v, c)| (*v, c.tensor.dtype())).collect();
    types.extend(graph.inputs.iter().filter_map(|p| Some((p.value, p.dtype?))));
    for node in &graph.nodes {
        let of = |i: usize| node.input(i).and_then(|v| types.get(&v)).copied();
        let dtype = match op_schema::of(node).map(|row| row.result) {
            Some(ResultType::Input(i)) => of(i),
            Some(ResultType::Bool) => Some(DType::Bool),
            Some(ResultType::Int64) => Some(DType::I64),
            Some(ResultType::Other) | None => target(node, &types),
        };
        let Some(d) = dtype else { continue };
        // What stands beside the first result is of another type (indices, a mask), but for parts of one tensor.
        let alike = if node.is("Split") || node.op == "Ranges" { node.outputs.len() } else { 1 };
        types.extend(node.outputs.iter().take(alike).flatten().map(|v| (*v, d)));
    }
    types
}

/// What a Cast or CastLike node casts to, where that is known.
fn target(node: &Node, types: &HashMap<ValueId, DType>) -> Option<DType> {
    if node.is("CastLike") {
        return types.get(&node.input(1)?).copied();
    }
    node.is("Cast").then(|| node.attributes.int("to").ok()?.and_then(|c| DType::from_onnx(c as i32).ok())).flatten()
}

/// Whether every value of `a` is exactly a value of `b`.
fn embeds(a: DType, b: DType) -> bool {
    use DType::{BF16, Bool, F16, F32, F64, I8, I16, I32, I64, U8, U16, U32};
    a == b
        || match a {
            Bool => true,
            F16 | BF16 => matches!(b, F32 | F64),
            F32 => b == F64,
            U8 => matches!(b, I16 | I32 | I64 | U16 | U32 | F16 | F32 | F64),
            I8 => matches!(b, I16 | I32 | I64 | F16 | F32 | F64),
            I16 | U16 => matches!(b, I32 | I64 | F32 | F64),
            I32 | U32 => matches!(b, I64 | F64),
            _ => false,
        }
}

/// Reads what stands before identities and idle casts directly, and casts once where a wider type on the way changed
/// nothing. The nodes themselves stay where a graph output or a subgraph has their value.
pub(super) fn simplify(graph: &mut Graph, report: &mut Report) {
    let types = types(graph);
    let outputs: HashSet<ValueId> = graph.outputs.iter().map(|p| p.value).collect();
    let mut alias: HashMap<ValueId, ValueId> = HashMap::new();
    // For the result of a cast, what was cast.
    let mut sources: HashMap<ValueId, ValueId> = HashMap::new();
    for node in &mut graph.nodes {
        for v in node.inputs.iter_mut().flatten() {
            *v = alias.get(v).copied().unwrap_or(*v);
        }
        let (Some(from), Some(to)) = (node.input(0), node.output(0)) else { continue };
        if node.is("Identity") && !outputs.contains(&to) {
            alias.insert(to, from);
            continue;
        }
        let Some(wanted) = target(node, &types) else { continue };
        // Cast(Cast(x)), the inner one exact.
        let mut from = from;
        while let Some(&before) = sources.get(&from)
            && let (Some(&a), Some(&b)) = (types.get(&before), types.get(&from))
            && embeds(a, b)
        {
            from = before;
            report.fused.push(Rewrite { pattern: "Cast chain", node: node.name.clone() });
            node.inputs[0] = Some(from);
        }
        sources.insert(to, from);
        if types.get(&from) == Some(&wanted) && !outputs.contains(&to) {
            alias.insert(to, from);
            report.fused.push(Rewrite { pattern: "Cast chain", node: node.name.clone() });
        }
    }
    // Captures name outer values; the bodies that read them are not looked into.
    graph.remove_dead();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lossless_types_embed() {
        assert!(embeds(DType::F16, DType::F32) && embeds(DType::F32, DType::F64) && embeds(DType::Bool, DType::I64));
        assert!(!embeds(DType::F32, DType::F16) && !embeds(DType::I32, DType::F32) && !embeds(DType::F32, DType::I64));
        assert!(!embeds(DType::BF16, DType::F16) && !embeds(DType::I64, DType::F64) && !embeds(DType::U8, DType::I8));
    }

    #[test]
    fn results_beside_the_first_have_types_of_their_own() {
        let mut graph = Graph::default();
        let [x, y, indices, a, b] = ["x", "y", "indices", "a", "b"].map(|name| graph.add_value(name));
        graph.inputs.push(crate::graph::Port { name: "x".into(), value: x, dtype: Some(DType::F32), shape: None });
        for (op, outputs) in [("MaxPool", [y, indices]), ("Split", [a, b])] {
            graph.nodes.push(Node {
                op: op.into(),
                domain: String::new(),
                name: op.into(),
                opset: 20,
                inputs: vec![Some(x)],
                outputs: outputs.map(Some).into(),
                attributes: crate::graph::Attributes::new(Default::default()),
                captures: Vec::new(),
                origin: None,
                module: None,
            });
        }
        let types = types(&graph);
        assert_eq!(
            [y, indices, a, b].map(|v| types.get(&v).copied()),
            [Some(DType::F32), None, Some(DType::F32), Some(DType::F32)]
        );
    }
}
