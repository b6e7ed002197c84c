//! Editing an ONNX graph in place: renaming, adding nodes, dropping what nothing reads.

use std::collections::HashSet;

use crate::onnx::attribute_proto::AttributeType;
use crate::onnx::tensor_shape_proto::{Dimension, dimension};
use crate::onnx::{
    AttributeProto, GraphProto, ModelProto, NodeProto, TensorShapeProto, TypeProto, ValueInfoProto, type_proto,
};
use crate::tensor::DType;

/// A node of the default domain with one output.
pub fn node(op: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto {
        op_type: Some(op.to_owned()),
        name: Some(format!("disback/{output}")),
        input: inputs.iter().map(|s| (*s).to_owned()).collect(),
        output: vec![output.to_owned()],
        ..NodeProto::default()
    }
}

/// An attribute holding one integer.
pub fn int_attribute(name: &str, value: i64) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        r#type: Some(AttributeType::Int as i32),
        i: Some(value),
        ..AttributeProto::default()
    }
}

/// An attribute holding one float.
pub fn float_attribute(name: &str, value: f32) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        r#type: Some(AttributeType::Float as i32),
        f: Some(value),
        ..AttributeProto::default()
    }
}

/// An attribute holding a list of integers.
pub fn ints_attribute(name: &str, values: &[i64]) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        r#type: Some(AttributeType::Ints as i32),
        ints: values.to_vec(),
        ..AttributeProto::default()
    }
}

/// A graph input or output. `Err` is a symbolic dimension.
pub fn value_info(name: &str, dtype: DType, shape: &[Result<usize, &str>]) -> ValueInfoProto {
    let dim = shape
        .iter()
        .map(|d| Dimension {
            value: Some(match d {
                Ok(n) => dimension::Value::DimValue(*n as i64),
                Err(s) => dimension::Value::DimParam((*s).to_owned()),
            }),
            denotation: None,
        })
        .collect();
    let tensor = type_proto::Tensor { elem_type: Some(dtype.to_onnx()), shape: Some(TensorShapeProto { dim }) };
    ValueInfoProto {
        name: Some(name.to_owned()),
        r#type: Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), denotation: None }),
        ..ValueInfoProto::default()
    }
}

/// All names in use for values of the graph, its subgraphs included.
pub fn value_names(graph: &GraphProto) -> HashSet<String> {
    let mut names: HashSet<String> = HashSet::new();
    names.extend(graph.initializer.iter().map(|t| t.name().to_owned()));
    names.extend(graph.input.iter().chain(&graph.output).map(|v| v.name().to_owned()));
    for n in &graph.node {
        names.extend(n.input.iter().chain(&n.output).cloned());
        for a in &n.attribute {
            for g in a.g.iter().chain(&a.graphs) {
                names.extend(value_names(g));
            }
        }
    }
    names
}

/// `wanted`, or `wanted_2`, `wanted_3`... where taken.
pub fn free_name(taken: &HashSet<String>, wanted: &str) -> String {
    let mut name = wanted.to_owned();
    let mut n = 1;
    while taken.contains(&name) {
        n += 1;
        name = format!("{wanted}_{n}");
    }
    name
}

/// Renames a value everywhere, subgraphs included.
pub fn rename(graph: &mut GraphProto, from: &str, to: &str) {
    let swap = |s: &mut String| {
        if s == from {
            *s = to.to_owned();
        }
    };
    for t in &mut graph.initializer {
        if t.name() == from {
            t.name = Some(to.to_owned());
        }
    }
    for v in graph.input.iter_mut().chain(&mut graph.output).chain(&mut graph.value_info) {
        if v.name() == from {
            v.name = Some(to.to_owned());
        }
    }
    for n in &mut graph.node {
        n.input.iter_mut().chain(&mut n.output).for_each(swap);
        for a in &mut n.attribute {
            for g in a.g.iter_mut().chain(&mut a.graphs) {
                rename(g, from, to);
            }
        }
    }
}

/// Drops nodes and initializers that no graph output needs.
pub fn remove_dead(graph: &mut GraphProto) {
    let mut live: HashSet<String> = graph.output.iter().map(|v| v.name().to_owned()).collect();
    let mut keep = vec![false; graph.node.len()];
    for (i, n) in graph.node.iter().enumerate().rev() {
        if n.output.iter().any(|o| !o.is_empty() && live.contains(o)) {
            keep[i] = true;
            live.extend(n.input.iter().cloned());
            for g in n.attribute.iter().flat_map(|a| a.g.iter().chain(&a.graphs)) {
                live.extend(value_names(g));
            }
        }
    }
    let mut keep = keep.into_iter();
    graph.node.retain(|_| keep.next().unwrap_or(false));
    graph.initializer.retain(|t| live.contains(t.name()));
}

/// Version of the default operator set.
pub fn opset(model: &ModelProto) -> i64 {
    let default = |d: &str| d.is_empty() || d == "ai.onnx";
    model.opset_import.iter().filter(|o| default(o.domain())).map(|o| o.version()).max().unwrap_or(1)
}
