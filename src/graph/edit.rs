//! Editing an ONNX graph in place: renaming, adding nodes, dropping what nothing reads.

use std::collections::{HashMap, HashSet};

use crate::onnx::attribute_proto::AttributeType;
use crate::onnx::tensor_shape_proto::{Dimension, dimension};
use crate::onnx::{
    AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto,
    type_proto,
};
use crate::shown::line;
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

/// An attribute holding a tensor.
pub fn tensor_attribute(name: &str, value: TensorProto) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        r#type: Some(AttributeType::Tensor as i32),
        t: Some(value),
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

/// Replaces what nodes read, subgraphs included: every input named by a key becomes the key's value. A subgraph that
/// makes a value of that name itself is left alone.
pub fn redirect(graph: &mut GraphProto, map: &HashMap<String, String>) {
    if map.is_empty() {
        return;
    }
    for n in &mut graph.node {
        for input in &mut n.input {
            if let Some(to) = map.get(input.as_str()) {
                input.clone_from(to);
            }
        }
        for a in &mut n.attribute {
            for g in a.g.iter_mut().chain(&mut a.graphs) {
                let own: HashSet<String> = defined(g);
                let seen: HashMap<String, String> =
                    map.iter().filter(|(k, _)| !own.contains(*k)).map(|(k, v)| (k.clone(), v.clone())).collect();
                redirect(g, &seen);
                for o in &mut g.output {
                    if let Some(to) = seen.get(o.name()) {
                        o.name = Some(to.clone());
                    }
                }
            }
        }
    }
}

/// Values that a graph itself makes or takes.
fn defined(graph: &GraphProto) -> HashSet<String> {
    let named = graph.initializer.iter().map(|t| t.name().to_owned());
    let inputs = graph.input.iter().map(|v| v.name().to_owned());
    named.chain(inputs).chain(graph.node.iter().flat_map(|n| n.output.iter().cloned())).collect()
}

/// All that a node reads: its inputs, and what its subgraphs take from outside.
pub fn reads(node: &NodeProto) -> Vec<String> {
    fn outer(graph: &GraphProto, out: &mut Vec<String>) {
        let own = defined(graph);
        let mut all: Vec<String> = graph.node.iter().flat_map(reads).collect();
        all.extend(graph.output.iter().map(|o| o.name().to_owned()));
        out.extend(all.into_iter().filter(|v| !own.contains(v)));
    }
    let mut all: Vec<String> = node.input.iter().filter(|i| !i.is_empty()).cloned().collect();
    for g in node.attribute.iter().flat_map(|a| a.g.iter().chain(&a.graphs)) {
        outer(g, &mut all);
    }
    all
}

/// Whether a node holds a graph of its own (If, Loop, Scan).
pub fn has_subgraph(node: &NodeProto) -> bool {
    node.attribute.iter().any(|a| a.g.is_some() || !a.graphs.is_empty())
}

/// Puts nodes after those whose results they read; otherwise the order stays. A cycle is left as it is.
pub fn sort(graph: &mut GraphProto) {
    let makes: HashMap<String, usize> =
        graph.node.iter().enumerate().flat_map(|(i, n)| n.output.iter().map(move |o| (o.clone(), i))).collect();
    let (mut done, mut order) = (vec![0u8; graph.node.len()], Vec::with_capacity(graph.node.len()));
    for root in 0..graph.node.len() {
        let mut stack = vec![(root, false)];
        while let Some((i, finished)) = stack.pop() {
            if finished {
                order.push(i);
                continue;
            }
            if std::mem::replace(&mut done[i], 1) == 1 {
                continue;
            }
            stack.push((i, true));
            let before = reads(&graph.node[i]);
            stack.extend(
                before.iter().rev().filter_map(|v| makes.get(v)).filter(|&&p| done[p] == 0).map(|&p| (p, false)),
            );
        }
    }
    let mut nodes: Vec<Option<NodeProto>> = std::mem::take(&mut graph.node).into_iter().map(Some).collect();
    graph.node = order.into_iter().filter_map(|i| nodes[i].take()).collect();
}

/// How errors and tables call a node: ``Conv node `/down.0/Conv` ``.
pub fn label(node: &NodeProto) -> String {
    let shown = match node.name() {
        "" => format!("{} node of `{}`", node.op_type(), node.output.first().map_or("", String::as_str)),
        name => format!("{} node `{name}`", node.op_type()),
    };
    line(&shown).into_owned()
}

/// Whether a node is of ONNX's own operators, and of this name.
pub fn is(node: &NodeProto, op: &str) -> bool {
    matches!(node.domain(), "" | "ai.onnx") && node.op_type() == op
}

/// An integer attribute.
pub fn int(node: &NodeProto, name: &str) -> Option<i64> {
    node.attribute.iter().find(|a| a.name() == name).and_then(|a| a.i)
}

/// A list of integers.
pub fn ints<'a>(node: &'a NodeProto, name: &str) -> Option<&'a [i64]> {
    node.attribute.iter().find(|a| a.name() == name).map(|a| a.ints.as_slice())
}

/// A text attribute.
pub fn text(node: &NodeProto, name: &str) -> Option<String> {
    let found = node.attribute.iter().find(|a| a.name() == name)?;
    found.s.as_ref().map(|s| String::from_utf8_lossy(s).into_owned())
}

/// Removes an attribute and returns it.
pub fn take_attribute(node: &mut NodeProto, name: &str) -> Option<AttributeProto> {
    let at = node.attribute.iter().position(|a| a.name() == name)?;
    Some(node.attribute.remove(at))
}

/// The tensors that never change: initializers and the values of Constant nodes, by name.
pub fn constants(graph: &GraphProto) -> HashMap<String, &TensorProto> {
    let held = graph.initializer.iter().map(|t| (t.name().to_owned(), t));
    let nodes = graph.node.iter().filter(|n| is(n, "Constant")).filter_map(|n| {
        let t = n.attribute.iter().find(|a| a.name() == "value")?.t.as_ref()?;
        Some((n.output.first()?.clone(), t))
    });
    held.chain(nodes).collect()
}

/// The attribute `name` of a node in a function's body that takes the value of the call's attribute `of`.
pub fn attribute_of_call(name: &str, of: &str) -> AttributeProto {
    AttributeProto { name: Some(name.to_owned()), ref_attr_name: Some(of.to_owned()), ..AttributeProto::default() }
}

/// An attribute holding text.
pub fn text_attribute(name: &str, value: &str) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        r#type: Some(AttributeType::String as i32),
        s: Some(bytes::Bytes::copy_from_slice(value.as_bytes())),
        ..AttributeProto::default()
    }
}
