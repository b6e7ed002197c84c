//! A file in f64 as one in f32: networks are trained in f32, and ONNX Runtime has most operators on the CPU in nothing wider.

use std::sync::Arc;

use crate::error::Result;
use crate::graph::{Model, tensors};
use crate::onnx::type_proto::Value;
use crate::onnx::{AttributeProto, GraphProto, NodeProto, TensorProto, ValueInfoProto};
use crate::tensor::DType;

/// The model in f32, where most of its floating weights are f64; `None` where they are not. (A table of frequencies in f64 inside
/// a network of f32 is meant so.)
///
/// Errors: a tensor whose data does not fit its shape.
pub fn narrowed(model: &Model) -> Result<Option<Model>> {
    let Some(graph) = &model.proto.graph else { return Ok(None) };
    let constants = graph.node.iter().flat_map(|n| &n.attribute).filter_map(|a| a.t.as_ref());
    let (mut wide, mut other) = (0i128, 0i128);
    for t in graph.initializer.iter().chain(constants) {
        let elements: i128 = t.dims.iter().map(|&d| i128::from(d)).product();
        match DType::from_onnx(t.data_type()) {
            Ok(DType::F64) => wide += elements,
            Ok(d) if d.is_float() => other += elements,
            _ => {}
        }
    }
    if wide <= other {
        return Ok(None);
    }
    let mut proto = (*model.proto).clone();
    if let Some(graph) = proto.graph.as_mut() {
        narrow_graph(graph)?;
    }
    Ok(Some(Model { proto: Arc::new(proto), ..model.clone() }))
}

fn is_wide(code: i32) -> bool {
    code == DType::F64.to_onnx()
}

fn narrow_graph(graph: &mut GraphProto) -> Result<()> {
    graph.value_info.clear();
    graph.initializer.iter_mut().try_for_each(narrow_tensor)?;
    graph.input.iter_mut().chain(&mut graph.output).for_each(narrow_port);
    graph.node.iter_mut().try_for_each(narrow_node)
}

fn narrow_tensor(t: &mut TensorProto) -> Result<()> {
    if is_wide(t.data_type()) {
        *t = tensors::to_proto(t.name(), &tensors::from_proto(t)?.cast(DType::F32));
    }
    Ok(())
}

fn narrow_port(v: &mut ValueInfoProto) {
    if let Some(Value::TensorType(t)) = v.r#type.as_mut().and_then(|t| t.value.as_mut())
        && is_wide(t.elem_type())
    {
        t.elem_type = Some(DType::F32.to_onnx());
    }
}

fn narrow_node(n: &mut NodeProto) -> Result<()> {
    n.attribute.iter_mut().try_for_each(narrow_attribute)
}

fn narrow_attribute(a: &mut AttributeProto) -> Result<()> {
    const TYPES: [&str; 7] =
        ["to", "dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision", "precision"];
    if TYPES.contains(&a.name()) && a.i == Some(i64::from(DType::F64.to_onnx())) {
        a.i = Some(i64::from(DType::F32.to_onnx()));
    }
    a.t.iter_mut().chain(&mut a.tensors).try_for_each(narrow_tensor)?;
    a.g.iter_mut().chain(&mut a.graphs).try_for_each(narrow_graph)
}
