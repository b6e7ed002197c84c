//! Rewriting a graph so that chosen nodes compute in 16 bits.

use std::collections::{HashMap, HashSet};

use crate::graph::tensors;
use crate::onnx::{GraphProto, ModelProto, NodeProto};
use crate::tensor::DType;

use crate::graph::edit;
use crate::graph::edit::int_attribute;
use crate::graph::op_schema;

/// How the chosen nodes are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// In the element type itself, casts where the type changes.
    Stored,
    /// In f32, everything they read and make rounded to the type: what `Stored` computes, for engines without kernels.
    Rounded,
}

/// The model with the nodes `half` (indices) in `dtype`. `types` are the element types of the model as it is.
pub fn rewrite(
    model: &ModelProto,
    dtype: DType,
    types: &HashMap<String, DType>,
    half: &HashSet<usize>,
    form: Form,
) -> ModelProto {
    let mut model = model.clone();
    let Some(graph) = model.graph.as_mut() else { return model };
    let held: HashMap<String, usize> =
        graph.initializer.iter().enumerate().map(|(i, t)| (t.name().to_owned(), i)).collect();
    let nodes = std::mem::take(&mut graph.node);
    let mut w = Rewriter {
        dtype,
        form,
        types,
        held,
        made_half: HashSet::new(),
        low: HashMap::new(),
        full: HashMap::new(),
        out: Vec::with_capacity(nodes.len() * 2),
        copies: Vec::new(),
        taken: edit::value_names(graph),
    };
    for (k, node) in nodes.into_iter().enumerate() {
        if half.contains(&k) { w.lower(graph, node) } else { w.keep(node) }
    }
    graph.node = w.out;
    graph.initializer.extend(w.copies);
    edit::remove_dead(graph);
    // Where nobody reads the f32 weight any more, the 16-bit one takes its name.
    let names: HashSet<String> = graph.initializer.iter().map(|t| t.name().to_owned()).collect();
    let back: HashMap<String, String> = w
        .low
        .into_iter()
        .filter(|(v, low)| w.held.contains_key(v) && !names.contains(v) && v != low)
        .map(|(v, low)| (low, v))
        .collect();
    for t in &mut graph.initializer {
        if let Some(name) = back.get(t.name()) {
            t.name = Some(name.clone());
        }
    }
    edit::redirect(graph, &back);
    model
}

/// Whether an input keeps its type whatever the node computes in.
fn keeps_type(node: &NodeProto, slot: usize) -> bool {
    op_schema::find(node.domain(), node.op_type()).is_some_and(|row| row.keeps_type.contains(&slot))
}

struct Rewriter<'a> {
    dtype: DType,
    form: Form,
    types: &'a HashMap<String, DType>,
    held: HashMap<String, usize>,
    /// Values whose own name now stands for 16 bits.
    made_half: HashSet<String>,
    /// 16-bit copies of f32 values, by the value.
    low: HashMap<String, String>,
    /// f32 copies of 16-bit values.
    full: HashMap<String, String>,
    out: Vec<NodeProto>,
    copies: Vec<crate::onnx::TensorProto>,
    taken: HashSet<String>,
}

impl Rewriter<'_> {
    fn is_f32(&self, value: &str) -> bool {
        self.types.get(value) == Some(&DType::F32)
    }
    fn name(&mut self, wanted: &str) -> String {
        let name = edit::free_name(&self.taken, wanted);
        self.taken.insert(name.clone());
        name
    }
    fn cast(&mut self, from: &str, to: &str, dtype: DType) {
        let mut n = edit::node("Cast", &[from], to);
        // The node that made `to` so far may carry the name that ours would get.
        n.name = Some(format!("disback/cast/{to}"));
        n.attribute.push(int_attribute("to", i64::from(dtype.to_onnx())));
        self.out.push(n);
    }
    /// f32 -> 16 bits -> f32.
    fn round(&mut self, from: &str, to: &str) {
        let middle = self.name(&format!("{to}/16"));
        self.cast(from, &middle, self.dtype);
        self.cast(&middle, to, DType::F32);
    }

    /// The 16-bit form of an f32 value.
    fn low(&mut self, graph: &GraphProto, value: &str) -> String {
        if self.made_half.contains(value) {
            return value.to_owned();
        }
        if let Some(name) = self.low.get(value) {
            return name.clone();
        }
        let name = self.name(&format!("{value}/{}", self.dtype));
        let tensor = self.held.get(value).and_then(|&i| tensors::from_proto(&graph.initializer[i]).ok());
        match (tensor, self.form) {
            (Some(t), Form::Stored) => self.copies.push(tensors::to_proto(&name, &t.cast(self.dtype))),
            (Some(t), Form::Rounded) => {
                self.copies.push(tensors::to_proto(&name, &t.cast(self.dtype).cast(DType::F32)));
            }
            (None, Form::Stored) => self.cast(value, &name, self.dtype),
            (None, Form::Rounded) => self.round(value, &name),
        }
        self.low.insert(value.to_owned(), name.clone());
        name
    }

    fn lower(&mut self, graph: &GraphProto, mut node: NodeProto) {
        for slot in 0..node.input.len() {
            let value = node.input[slot].clone();
            if self.is_f32(&value) && !keeps_type(&node, slot) {
                node.input[slot] = self.low(graph, &value);
            }
        }
        if node.op_type() == "Cast" {
            for a in node.attribute.iter_mut().filter(|a| a.name() == "to" && self.form == Form::Stored) {
                if a.i == Some(i64::from(DType::F32.to_onnx())) {
                    a.i = Some(i64::from(self.dtype.to_onnx()));
                }
            }
        }
        let floats: Vec<String> = node.output.iter().filter(|o| self.is_f32(o)).cloned().collect();
        match self.form {
            Form::Stored => {
                self.made_half.extend(floats);
                self.out.push(node);
            }
            Form::Rounded => {
                let mut pairs = Vec::new();
                for o in node.output.iter_mut().filter(|o| floats.contains(o)) {
                    let raw = edit::free_name(&self.taken, &format!("{o}/raw"));
                    self.taken.insert(raw.clone());
                    pairs.push((raw.clone(), std::mem::replace(o, raw)));
                }
                self.out.push(node);
                for (raw, o) in pairs {
                    self.round(&raw, &o);
                    self.made_half.insert(o);
                }
            }
        }
    }

    fn keep(&mut self, node: NodeProto) {
        let mut map = HashMap::new();
        if self.form == Form::Stored && !matches!(node.op_type(), "Cast" | "Shape" | "Size") {
            for value in edit::reads(&node) {
                if !self.made_half.contains(&value) {
                    continue;
                }
                if !self.full.contains_key(&value) {
                    let name = self.name(&format!("{value}/f32"));
                    self.cast(&value, &name, DType::F32);
                    self.full.insert(value.clone(), name);
                }
                map.insert(value.clone(), self.full[&value].clone());
            }
        }
        let mut alone = GraphProto { node: vec![node], ..GraphProto::default() };
        edit::redirect(&mut alone, &map);
        self.out.append(&mut alone.node);
    }
}
