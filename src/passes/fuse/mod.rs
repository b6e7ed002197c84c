//! Fused operators in the file: chains of small operators written as the GroupNormalization, LayerNormalization,
//! RMSNormalization, Gelu or Attention that they are, where the operator set has it. The chains are found by the patterns of
//! [`crate::graph::fuse`], Gelu by tanh as the chain that ONNX Runtime joins; shapes are read off runs of the network. Each operator is checked in ONNX Runtime, and what it
//! does not take or computes differently stays a chain.

mod attention;
mod norms;

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::Serialize;

use crate::error::Result;
use crate::graph::fuse::fuse_for_export;
use crate::graph::lower::lower;
use crate::graph::{Graph, Model, Node, ValueId, tensors};
use crate::onnx::{AttributeProto, ModelProto, NodeProto, TensorProto};
use crate::runtime::student::StudentInfo;
use crate::tensor::{DType, HostTensor};

use crate::graph::edit;
use crate::passes::evaluate;
use crate::passes::evaluate::Inputs;

/// Which fused operators are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Fuse {
    /// Chains stay as the exporter wrote them.
    None,
    /// LayerNormalization and the exact Gelu: every runtime takes them, and none is slower for it. Gelu by tanh becomes the chain of
    /// additions and products that ONNX Runtime knows.
    #[default]
    Auto,
    /// GroupNormalization, RMSNormalization, Attention and Gelu's approximation by tanh too. ONNX Runtime's CPU expands
    /// GroupNormalization and is 1.6 to 1.8 times slower on it than on the chain (benches/fused_operators.py); OpenCV 5
    /// takes the approximation for the exact Gelu; Core ML and WebGPU lack some of them.
    All,
}

/// The operators that were written in the place of chains, and the chains that stay.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Written {
    /// Number of nodes written, by operator.
    pub operators: BTreeMap<String, usize>,
    /// The chains that stay as they are.
    pub kept: Vec<Chain>,
}

/// A chain that was recognised and not replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Chain {
    /// The name of the node at which the chain ends.
    pub node: String,
    /// The ONNX operator that would have replaced it, such as `LayerNormalization`.
    pub operator: String,
    /// Why it was not replaced, in words for the user.
    pub reason: String,
}

/// Samples may move by this much (over their largest value where that is above 1) for an operator to be written.
const TOLERANCE: f64 = 1e-5;

/// Operator, the opset it has the meaning used here since, whether [`Fuse::Auto`] writes it.
const OPERATORS: [(&str, i64, bool); 6] = [
    (TANH_CHAIN, 1, true),
    ("LayerNormalization", 17, true),
    ("Gelu", 20, true),
    // 18 had a scale for each group, and is deprecated.
    ("GroupNormalization", 21, false),
    ("RMSNormalization", 23, false),
    ("Attention", 23, false),
];

/// What is written for Gelu by tanh where the operator is not.
const TANH_CHAIN: &str = "Gelu by tanh (chain)";

/// Writes the operators in place. `probes` are inputs of different batch sizes.
///
/// Errors: a network that does not run.
pub fn write(model: &mut ModelProto, fuse: Fuse, probes: &[Inputs]) -> Result<Written> {
    let mut written = Written::default();
    if fuse == Fuse::None {
        return Ok(written);
    }
    let mut graph = lower(&Model::from_proto(model.clone()))?;
    fuse_for_export(&mut graph);
    let wanted: Vec<String> = values_of_interest(&graph);
    if wanted.is_empty() {
        return Ok(written);
    }
    let runs = evaluate::values(model, &wanted, probes)?;
    let look = Look { graph: &graph, runs: &runs, opset: edit::opset(model) };
    let mut found: Vec<Found> = Vec::new();
    let mut taken = model.graph.as_ref().map(edit::value_names).unwrap_or_default();
    for node in graph.nodes.iter().filter(|n| n.domain == "disback") {
        let mut emit = Emit { taken: &mut taken, nodes: Vec::new(), made: Vec::new() };
        let (operator, result) = match node.op.as_str() {
            "Gelu" if by_tanh(node) && (fuse == Fuse::Auto || look.opset < 20) => {
                (TANH_CHAIN, tanh_chain(node, &look, &mut emit))
            }
            "Gelu" => ("Gelu", gelu(node, &look, &mut emit)),
            "Attention" => ("Attention", attention::write(node, &look, &mut emit)),
            _ => norms::write(node, &look, &mut emit),
        };
        let allowed = OPERATORS.iter().find(|(o, ..)| *o == operator).map_or(Ok(()), |(_, since, auto)| {
            if look.opset < *since {
                Err(format!("{operator} exists since opset {since}, this is {}", look.opset))
            } else if fuse == Fuse::Auto && !auto {
                Err("left as a chain unless --fuse all asks for it".to_owned())
            } else {
                Ok(())
            }
        });
        match allowed.and(result) {
            Ok(()) => {
                let output = node.output(0).map_or("", |v| graph.names[v].as_str()).to_owned();
                let (nodes, made) = (emit.nodes, emit.made);
                found.push(Found { operator, output, label: node.name.clone(), nodes, made });
            }
            Err(reason) => written.kept.push(Chain { node: node.name.clone(), operator: operator.to_owned(), reason }),
        }
    }
    if found.is_empty() {
        return Ok(written);
    }
    let before = evaluate::samples(model, probes)?;
    let all: Vec<&Found> = found.iter().collect();
    if let Ok(changed) = checked(model, &all, &before, probes) {
        *model = changed;
        count(&mut written, &all);
        return Ok(written);
    }
    // Something among them is not taken: one operator at a time tells which.
    for (operator, ..) in OPERATORS {
        let these: Vec<&Found> = found.iter().filter(|f| f.operator == operator).collect();
        if these.is_empty() {
            continue;
        }
        match checked(model, &these, &before, probes) {
            Ok(changed) => {
                *model = changed;
                count(&mut written, &these);
            }
            Err(reason) => written.kept.extend(these.iter().map(|f| Chain {
                node: f.label.clone(),
                operator: operator.to_owned(),
                reason: reason.clone(),
            })),
        }
    }
    Ok(written)
}

/// The nodes that take a chain's place.
struct Found {
    operator: &'static str,
    /// The value that the chain makes.
    output: String,
    label: String,
    nodes: Vec<NodeProto>,
    made: Vec<TensorProto>,
}

fn count(written: &mut Written, found: &[&Found]) {
    for f in found {
        *written.operators.entry(f.operator.to_owned()).or_default() += 1;
    }
}

/// The model with these chains replaced, if it computes what it did.
fn checked(
    model: &ModelProto,
    found: &[&Found],
    before: &[HostTensor],
    probes: &[Inputs],
) -> std::result::Result<ModelProto, String> {
    let mut changed = model.clone();
    let Some(graph) = changed.graph.as_mut() else { return Ok(changed) };
    let by_output: HashMap<&str, &Found> = found.iter().map(|f| (f.output.as_str(), *f)).collect();
    let mut nodes = Vec::with_capacity(graph.node.len());
    for node in std::mem::take(&mut graph.node) {
        match node.output.first().and_then(|o| by_output.get(o.as_str())) {
            Some(f) => {
                let mut made = f.nodes.clone();
                // The operator keeps the name of the node at which its chain ended.
                let last = made.len().saturating_sub(1);
                let own = made.iter().position(|n| n.op_type() == f.operator).unwrap_or(last);
                if let Some(n) = made.get_mut(own) {
                    n.name.clone_from(&node.name);
                }
                nodes.extend(made);
            }
            None => nodes.push(node),
        }
    }
    graph.node = nodes;
    graph.initializer.extend(found.iter().flat_map(|f| f.made.iter().cloned()));
    edit::sort(graph);
    edit::remove_dead(graph);
    let after = evaluate::samples(&changed, probes).map_err(|e| format!("ONNX Runtime does not take it: {e}"))?;
    let worst = after.iter().zip(before).map(|(a, b)| evaluate::max_abs(a, b)).fold(0.0, f64::max);
    let size = StudentInfo::from_model(model).map_err(|e| e.to_string())?.size_of(before);
    if worst <= TOLERANCE * size { Ok(changed) } else { Err(format!("it moves the sample by {worst:.1e}")) }
}

/// The values whose shapes decide, and shapes themselves where they are no constants.
fn values_of_interest(graph: &Graph) -> Vec<String> {
    let fused = graph.nodes.iter().filter(|n| n.domain == "disback");
    let read = fused.flat_map(|n| n.inputs.iter().flatten().copied());
    let names: std::collections::BTreeSet<&str> =
        read.filter(|v| !graph.constants.contains_key(v)).map(|v| graph.names[v].as_str()).collect();
    names.into_iter().map(str::to_owned).collect()
}

/// What is known of values.
struct Look<'a> {
    graph: &'a Graph,
    runs: &'a [HashMap<String, HostTensor>],
    opset: i64,
}

impl Look<'_> {
    fn name(&self, v: ValueId) -> &str {
        &self.graph.names[v]
    }
    /// The tensor of a constant.
    fn constant(&self, v: Option<ValueId>) -> Option<&HostTensor> {
        self.graph.constants.get(&v?).map(|c| &c.tensor)
    }
    /// The value in each run.
    fn in_runs(&self, v: ValueId) -> Option<Vec<&HostTensor>> {
        match self.constant(Some(v)) {
            Some(t) => Some(self.runs.iter().map(|_| t).collect()),
            None => self.runs.iter().map(|r| r.get(self.name(v))).collect(),
        }
    }
    /// Shape in each run, of an f32 value.
    fn shapes(&self, v: Option<ValueId>) -> std::result::Result<Vec<Vec<usize>>, String> {
        let runs = v.and_then(|v| self.in_runs(v)).ok_or("its operands are unknown")?;
        match runs.first() {
            Some(t) if t.dtype() == DType::F32 => Ok(runs.iter().map(|t| t.shape().to_vec()).collect()),
            Some(t) => Err(format!("it computes in {}", t.dtype())),
            None => Err("the network was not run".into()),
        }
    }
    /// Sizes of the dimensions from `first` on, where they are the same in all runs.
    fn fixed(&self, shapes: &[Vec<usize>], first: usize) -> Option<Vec<usize>> {
        let dims = shapes.first()?.get(first..)?;
        shapes.iter().all(|s| s.get(first..) == Some(dims)).then(|| dims.to_vec())
    }
    /// The permutation of the Transpose that makes `v`, and what it turns.
    fn transpose(&self, v: ValueId) -> Option<(Vec<i64>, ValueId)> {
        let node = self.graph.nodes.iter().find(|n| n.output(0) == Some(v))?;
        let perm = node.is("Transpose").then(|| node.attributes.ints("perm").ok().flatten()).flatten()?;
        Some((perm, node.input(0)?))
    }
}

/// Nodes and constants being made.
struct Emit<'a> {
    taken: &'a mut HashSet<String>,
    nodes: Vec<NodeProto>,
    made: Vec<TensorProto>,
}

impl Emit<'_> {
    fn name(&mut self, wanted: &str) -> String {
        let name = edit::free_name(self.taken, wanted);
        self.taken.insert(name.clone());
        name
    }
    fn constant(&mut self, wanted: &str, tensor: &HostTensor) -> String {
        let name = self.name(wanted);
        self.made.push(tensors::to_proto(&name, tensor));
        name
    }
    fn node(&mut self, op: &str, inputs: &[&str], output: &str, attributes: Vec<AttributeProto>) {
        let mut n = edit::node(op, inputs, output);
        n.attribute = attributes;
        self.nodes.push(n);
    }
    /// A node whose result gets a name of its own.
    fn value(&mut self, op: &str, inputs: &[&str], near: &str, attributes: Vec<AttributeProto>) -> String {
        let to = self.name(near);
        self.node(op, inputs, &to, attributes);
        to
    }
}

/// The value that a fused node makes, and the one that it takes first.
fn ends<'a>(node: &Node, look: &'a Look<'_>) -> std::result::Result<(&'a str, &'a str), String> {
    match (node.input(0), node.output(0)) {
        (Some(x), Some(y)) => Ok((look.name(x), look.name(y))),
        _ => Err("an operand is missing".into()),
    }
}

fn by_tanh(node: &Node) -> bool {
    node.attributes.string_or("approximate", "none").is_ok_and(|a| a == "tanh")
}

/// `(x / 2) (1 + tanh(sqrt(2 / pi) x (1 + 0.044715 x x)))` in this order of the operands, which ONNX Runtime joins to one kernel and others
/// compute as it stands. (The exporters' order is not joined: three quarters of its time are lost, benches/fused_operators.py.)
fn tanh_chain(node: &Node, look: &Look<'_>, emit: &mut Emit<'_>) -> std::result::Result<(), String> {
    let (x, y) = ends(node, look)?;
    look.shapes(node.input(0))?;
    let number =
        |emit: &mut Emit<'_>, name: &str, v: f64| emit.constant(&format!("{y}_{name}"), &HostTensor::scalar(v as f32));
    let (half, one) = (number(emit, "half", 0.5), number(emit, "one", 1.0));
    let (cubic, scale) = (number(emit, "cubic", 0.044715), number(emit, "scale", (2.0 / std::f64::consts::PI).sqrt()));
    let part =
        |emit: &mut Emit<'_>, op: &str, a: &str, b: &str| emit.value(op, &[a, b], &format!("{y}_part"), Vec::new());
    let linear = part(emit, "Mul", x, &cubic);
    let squared = part(emit, "Mul", &linear, x);
    let bracket = part(emit, "Add", &squared, &one);
    let scaled = part(emit, "Mul", x, &scale);
    let inner = part(emit, "Mul", &scaled, &bracket);
    let tanh = emit.value("Tanh", &[&inner], &format!("{y}_part"), Vec::new());
    let sum = part(emit, "Add", &tanh, &one);
    let halved = part(emit, "Mul", x, &half);
    emit.node("Mul", &[&halved, &sum], y, Vec::new());
    Ok(())
}

fn gelu(node: &Node, look: &Look<'_>, emit: &mut Emit<'_>) -> std::result::Result<(), String> {
    let (x, y) = ends(node, look)?;
    look.shapes(node.input(0))?;
    let approximate = node.attributes.string_or("approximate", "none").map_err(|e| e.to_string())?;
    let attributes = match approximate.as_str() {
        "none" => Vec::new(),
        other => vec![edit::text_attribute("approximate", other)],
    };
    emit.node("Gelu", &[x], y, attributes);
    Ok(())
}

/// `t` broadcast to `shape`; `None` where it does not fit.
fn broadcast(t: &HostTensor, shape: &[usize]) -> Option<HostTensor> {
    let own = t.shape();
    let (extra, missing) = (own.len().saturating_sub(shape.len()), shape.len().saturating_sub(own.len()));
    if own[..extra].iter().any(|&d| d != 1) {
        return None;
    }
    let own: Vec<usize> = std::iter::repeat_n(1, missing).chain(own[extra..].iter().copied()).collect();
    if own.iter().zip(shape).any(|(&a, &b)| a != 1 && a != b) {
        return None;
    }
    let values = t.to_f32();
    let len: usize = shape.iter().product();
    let mut all = Vec::with_capacity(len);
    for k in 0..len {
        let (mut rest, mut at, mut stride) = (k, 0, 1);
        for (&size, &have) in shape.iter().zip(&own).rev() {
            if have != 1 {
                at += (rest % size) * stride;
                stride *= have;
            }
            rest /= size;
        }
        all.push(values[at]);
    }
    HostTensor::new(shape, &all).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_are_broadcast_as_onnx_does() {
        let t = HostTensor::new(&[1, 2, 1], &[1f32, 2.0]).unwrap();
        assert_eq!(broadcast(&t, &[2, 3]).unwrap().to_f32(), [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]);
        assert_eq!(broadcast(&HostTensor::scalar(3f32), &[2]).unwrap().to_f32(), [3.0, 3.0]);
        let row = HostTensor::vec(&[1f32, 2.0, 3.0]);
        assert_eq!(broadcast(&row, &[2, 3]).unwrap().to_f32(), [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]);
        assert!(broadcast(&row, &[2]).is_none() && broadcast(&t, &[3, 3]).is_none());
        assert!(broadcast(&HostTensor::new(&[2, 2], &[0f32; 4]).unwrap(), &[2]).is_none());
    }
}
