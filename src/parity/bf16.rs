//! A file in bf16 as ONNX Runtime can compute it on the CPU, where it has no bf16: in f32, rounded where the file casts.

use crate::error::Result;
use crate::graph::tensors;
use crate::onnx::attribute_proto::AttributeType;
use crate::onnx::type_proto::Value as Type;
use crate::onnx::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, TypeProto};
use crate::tensor::{DType, HostTensor};

/// Attributes that name an element type.
const TYPES: &[&str] =
    &["to", "dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision", "precision"];

/// The model in f32, if any of its tensors, inputs or casts are in bf16; weights must be in the file itself.
///
/// Errors: a bf16 tensor whose bytes do not fit its shape.
pub(super) fn in_f32(model: &ModelProto) -> Result<Option<ModelProto>> {
    let mut wide = model.clone();
    let mut found = false;
    if let Some(g) = &mut wide.graph {
        found |= graph(g)?;
    }
    for f in &mut wide.functions {
        found |= nodes(&mut f.node)?;
    }
    Ok(found.then_some(wide))
}

/// An input as [`in_f32`] takes it.
pub(super) fn input(t: &HostTensor) -> HostTensor {
    if t.dtype() == DType::BF16 { t.cast(DType::F32) } else { t.clone() }
}

fn is_bf16(code: i64) -> bool {
    code == i64::from(DType::BF16.to_onnx())
}

fn graph(g: &mut GraphProto) -> Result<bool> {
    let mut found = nodes(&mut g.node)?;
    for t in &mut g.initializer {
        found |= tensor(t)?;
    }
    for v in g.input.iter_mut().chain(&mut g.output) {
        found |= v.r#type.as_mut().is_some_and(declared);
    }
    if found {
        // Types of the values between, which would contradict.
        g.value_info.clear();
    }
    Ok(found)
}

fn tensor(t: &mut TensorProto) -> Result<bool> {
    let found = is_bf16(i64::from(t.data_type()));
    if found {
        *t = tensors::to_proto(t.name(), &tensors::from_proto(t)?.cast(DType::F32));
    }
    Ok(found)
}

fn declared(t: &mut TypeProto) -> bool {
    match &mut t.value {
        Some(Type::TensorType(t)) if is_bf16(i64::from(t.elem_type())) => {
            t.elem_type = Some(DType::F32.to_onnx());
            true
        }
        Some(Type::SequenceType(s)) => s.elem_type.as_deref_mut().is_some_and(declared),
        Some(Type::OptionalType(o)) => o.elem_type.as_deref_mut().is_some_and(declared),
        _ => false,
    }
}

fn nodes(list: &mut Vec<NodeProto>) -> Result<bool> {
    let mut found = false;
    for mut node in std::mem::take(list) {
        let rounds = node.op_type() == "Cast" && node.attribute.iter().any(|a| a.name() == "to" && is_bf16(a.i()));
        if let (true, Some(output)) = (rounds, node.output.first().cloned()) {
            let rounded = format!("{output}/bf16");
            let back = NodeProto {
                input: vec![rounded.clone()],
                output: vec![output],
                name: Some(format!("{}/f32", node.name())),
                attribute: vec![AttributeProto {
                    name: Some("to".into()),
                    r#type: Some(AttributeType::Int as i32),
                    i: Some(i64::from(DType::F32.to_onnx())),
                    ..AttributeProto::default()
                }],
                ..node.clone()
            };
            node.output[0] = rounded;
            list.extend([node, back]);
            found = true;
            continue;
        }
        for a in &mut node.attribute {
            if TYPES.contains(&a.name()) && is_bf16(a.i()) {
                a.i = Some(i64::from(DType::F32.to_onnx()));
                found = true;
            }
            for t in a.t.iter_mut().chain(&mut a.tensors) {
                found |= tensor(t)?;
            }
            for g in a.g.iter_mut().chain(&mut a.graphs) {
                found |= graph(g)?;
            }
        }
        list.push(node);
    }
    Ok(found)
}
