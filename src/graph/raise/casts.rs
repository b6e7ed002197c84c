//! Identities and casts that change nothing.

use std::collections::{HashMap, HashSet};

use crate::graph::ir::{Graph, Node, ValueId};
use crate::graph::raise::{Report, Rewrite};
use crate::tensor::DType;

/// Operators whose result has the type of their first input.
const KEEPING: &[&str] = &[
    "Abs",
    "Add",
    "AveragePool",
    "Ceil",
    "Clip",
    "Concat",
    "Conv",
    "ConvTranspose",
    "Cos",
    "CumSum",
    "DepthToSpace",
    "Div",
    "Einsum",
    "Elu",
    "Erf",
    "Erfc",
    "Exp",
    "Expand",
    "Flatten",
    "Floor",
    "Gather",
    "GatherElements",
    "GatherND",
    "Gelu",
    "Gemm",
    "GlobalAveragePool",
    "GroupNormalization",
    "HardSwish",
    "Identity",
    "InstanceNormalization",
    "LayerNormalization",
    "LeakyRelu",
    "Log",
    "MatMul",
    "Max",
    "MaxPool",
    "Min",
    "Mish",
    "Mod",
    "Mul",
    "Neg",
    "Pad",
    "Pow",
    "RMSNormalization",
    "Reciprocal",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "Relu",
    "Reshape",
    "Resize",
    "Round",
    "Sigmoid",
    "Sign",
    "Sin",
    "Slice",
    "Softmax",
    "Softplus",
    "SpaceToDepth",
    "Split",
    "Sqrt",
    "Squeeze",
    "Sub",
    "Tanh",
    "Tile",
    "Transpose",
    "Trilu",
    "Unsqueeze",
];

/// Element types as far as they follow from inputs, constants and casts.
fn types(graph: &Graph) -> HashMap<ValueId, DType> {
    let mut types: HashMap<ValueId, DType> = graph.constants.iter().map(|(v, c)| (*v, c.tensor.dtype())).collect();
    types.extend(graph.inputs.iter().filter_map(|p| Some((p.value, p.dtype?))));
    for node in graph.nodes.iter().filter(|n| n.domain.is_empty()) {
        let of = |i: usize| node.input(i).and_then(|v| types.get(&v)).copied();
        let dtype = match node.op.as_str() {
            "Shape" | "Size" => Some(DType::I64),
            "Cast" | "CastLike" => target(node, &types),
            "Equal" | "Less" | "LessOrEqual" | "Greater" | "GreaterOrEqual" | "Not" | "And" | "Or" | "IsNaN" => {
                Some(DType::Bool)
            }
            "Where" => of(1),
            op if KEEPING.contains(&op) => of(0),
            _ => None,
        };
        if let Some(d) = dtype {
            types.extend(node.outputs.iter().flatten().map(|v| (*v, d)));
        }
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
            report.raised.push(Rewrite { pattern: "Cast chain", node: node.name.clone() });
            node.inputs[0] = Some(from);
        }
        sources.insert(to, from);
        if types.get(&from) == Some(&wanted) && !outputs.contains(&to) {
            alias.insert(to, from);
            report.raised.push(Rewrite { pattern: "Cast chain", node: node.name.clone() });
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
}
