//! A file in half precision as one in f32: what `graph::widen` does to the graph that is trained, done to the file.

use std::collections::HashSet;

use crate::error::Result;
use crate::graph::edit;
use crate::graph::edit::{int_attribute, node};
use crate::graph::{Model, lower, tensors, widen};
use crate::onnx::type_proto::Value;
use crate::onnx::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto};
use crate::tensor::DType;

/// Widens in place. Casts to half precision before the first layer (features of time) still round, and are cast back; all
/// others are gone. `original`: the same nodes with weights as the file has them.
pub(crate) fn widen(model: &mut ModelProto, original: &Model) -> Result<()> {
    let lowered = lower::lower(original)?;
    let rounding = widen::rounding(&lowered);
    let rounds = |n: &&crate::graph::ir::Node| n.output(0).is_some_and(|v| rounding.contains(&v));
    let rounding: HashSet<usize> = lowered.nodes.iter().filter(rounds).filter_map(|n| n.origin).collect();
    let Some(graph) = model.graph.as_mut() else { return Ok(()) };
    let taken = edit::value_names(graph);
    let mut nodes = Vec::with_capacity(graph.node.len());
    for (i, mut n) in std::mem::take(&mut graph.node).into_iter().enumerate() {
        if !(rounding.contains(&i) && edit::int(&n, "to").is_some_and(half)) {
            widen_node(&mut n)?;
            nodes.push(n);
            continue;
        }
        let wide = n.output[0].clone();
        let narrow = edit::free_name(&taken, &format!("{wide}/rounded"));
        n.output[0].clone_from(&narrow);
        let mut back = node("Cast", &[&narrow], &wide);
        back.attribute.push(int_attribute("to", i64::from(DType::F32.to_onnx())));
        nodes.extend([n, back]);
    }
    graph.node = nodes;
    widen_values(graph)
}

fn half(code: i64) -> bool {
    i32::try_from(code).ok().and_then(|c| DType::from_onnx(c).ok()).is_some_and(|d| d.widened() != d)
}

/// Tensors and declared types of a graph or body, nodes left alone.
fn widen_values(graph: &mut GraphProto) -> Result<()> {
    graph.value_info.clear();
    graph.initializer.iter_mut().try_for_each(widen_tensor)?;
    graph.input.iter_mut().chain(&mut graph.output).for_each(widen_port);
    Ok(())
}

fn widen_tensor(t: &mut TensorProto) -> Result<()> {
    if half(i64::from(t.data_type())) {
        *t = tensors::to_proto(t.name(), &tensors::from_proto(t)?.cast(DType::F32));
    }
    Ok(())
}

fn widen_port(v: &mut ValueInfoProto) {
    if let Some(Value::TensorType(t)) = v.r#type.as_mut().and_then(|t| t.value.as_mut())
        && half(i64::from(t.elem_type()))
    {
        t.elem_type = Some(DType::F32.to_onnx());
    }
}

fn widen_node(n: &mut NodeProto) -> Result<()> {
    n.attribute.iter_mut().try_for_each(widen_attribute)
}

fn widen_attribute(a: &mut AttributeProto) -> Result<()> {
    const TYPES: &[&str] =
        &["to", "dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision", "precision"];
    let names_a_type = TYPES.contains(&a.name());
    if names_a_type && a.i.is_some_and(half) {
        a.i = Some(i64::from(DType::F32.to_onnx()));
    }
    a.t.iter_mut().chain(&mut a.tensors).try_for_each(widen_tensor)?;
    a.g.iter_mut().chain(&mut a.graphs).try_for_each(|g| {
        g.node.iter_mut().try_for_each(widen_node)?;
        widen_values(g)
    })
}
