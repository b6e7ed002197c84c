//! What an ONNX file holds and what would become of it: signature, parameters by role and group, operators, what is fused,
//! what is not supported, cost, and a proposed teacher card.

mod axes;
mod cost;
pub mod findings;
pub mod hypothesis;
mod joined;
pub mod probe;
mod proposal;
pub mod score;
mod structure;
pub mod subject;

pub use cost::{Cost, cost};
pub use findings::{Finding, Findings, How};
pub use joined::join_parts;
pub use probe::{Options as ProbeOptions, Report as ProbeReport};
pub use proposal::{Proposal, propose};
pub use structure::rows_looked_up;

use std::collections::BTreeMap;

use serde::Serialize;
use tch::Device;

use crate::error::{Kind, Result};
use crate::graph::fuse::{NearMiss, Report as Fused};
use crate::graph::quantised::{self, QuantisedWeights};
use crate::graph::roles::{Buffer, Declared, Parameter};
use crate::graph::unguarded_division;
use crate::graph::unguarded_division::Unguarded;
use crate::graph::{Graph, Model, TrainableChoice, lower};
use crate::torch::exec::registry::advice;
use crate::torch::ops;
use crate::torch::{ImportOptions, Network};

/// A graph input or output.
#[derive(Debug, Clone, Serialize)]
pub struct Signature {
    /// Name of the input or output in the graph.
    pub name: String,
    /// Element type, such as `f32`; absent where the file does not state it.
    pub dtype: Option<String>,
    /// One entry a dimension: a number, the symbol of a free dimension, or null where unknown. Absent where the file
    /// states no shape.
    pub shape: Option<Vec<serde_json::Value>>,
    /// Element type and shape for a table, such as `f32[batch, 3, 64, 64]`.
    #[serde(skip)]
    pub text: String,
}

/// How many tensors and elements.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Count {
    /// Number of tensors.
    pub count: usize,
    /// Number of values in all of them together.
    pub elements: usize,
}

impl Count {
    fn add(&mut self, shape: &[usize]) {
        self.count += 1;
        self.elements += shape.iter().product::<usize>();
    }
}

/// A tensor of the file.
#[derive(Debug, Clone, Serialize)]
pub struct TensorRow {
    /// Name of the tensor in the file.
    pub name: String,
    /// A parameter's role (`conv weight`, `bias`, ...); for a tensor that is not trained, the reason why not.
    pub role: String,
    /// Size of each dimension; empty for a scalar.
    pub shape: Vec<usize>,
    /// Element type, such as `f32`.
    pub dtype: String,
}

/// A node that cannot be imported.
#[derive(Debug, Clone, Serialize)]
pub struct UnsupportedNode {
    /// Operator; with its domain in front (`domain.Op`) where the domain is not ONNX's own.
    pub operator: String,
    /// Version of the operator set that the file uses for this operator.
    pub opset: i64,
    /// Name of the node; may be empty.
    pub node: String,
    /// Why the node cannot be imported, in one line.
    pub reason: String,
    /// What the user can do about it; absent where nothing is known to help.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub way_out: Option<String>,
}

/// Everything that `disback inspect` says about a file except the proposed card.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    /// Name and version of the program that wrote the file; empty where the file does not state it.
    pub producer: String,
    /// Version of the ONNX file format.
    pub ir_version: i64,
    /// Version of each operator set by its domain; ONNX's own domain is `ai.onnx`.
    pub opset: BTreeMap<String, i64>,
    /// Inputs of the graph; one that has an initializer is not among them.
    pub inputs: Vec<Signature>,
    /// Outputs of the graph.
    pub outputs: Vec<Signature>,
    /// All trainable tensors together.
    pub parameters: Count,
    /// Whether a converter wrote down which tensors the framework trains; otherwise roles decide.
    pub parameters_declared: bool,
    /// Names that the framework has for one tensor, each group with the initializer's first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tied: Vec<Vec<String>>,
    /// Trainable tensors by what they do: `conv weight`, `linear weight`, `bias`, `scale` or `embedding`.
    pub parameters_by_role: BTreeMap<String, Count>,
    /// Trainable tensors by the first part of their names, such as `down_blocks.0`.
    pub parameters_by_group: BTreeMap<String, Count>,
    /// Constant tensors that are not trained.
    pub buffers: Vec<TensorRow>,
    /// How many nodes of each operator there are; after fusing, where the file can be imported.
    pub operators: BTreeMap<String, usize>,
    /// How many rewrites of each pattern were made when groups of nodes were fused to one operator.
    pub fused: BTreeMap<&'static str, usize>,
    /// Places where a rewrite nearly applied.
    pub near_misses: Vec<NearMissRow>,
    /// Nodes that cannot be imported; empty where the file can be.
    pub unsupported: Vec<UnsupportedNode>,
    /// Weights that the file stores as integers; absent where there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantised: Option<QuantisedWeights>,
    /// Divisions whose divisor can become 0.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unguarded_divisions: Vec<Unguarded>,
    /// Nodes of BatchNormalization in training mode, which mix the rows of a batch.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub batch_statistics: Vec<String>,
    /// Cost of one forward pass; its values are null where the sizes of the inputs are not known.
    #[serde(flatten)]
    pub cost: Cost,
    /// Every parameter (`--parameters`).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub parameter_list: Vec<TensorRow>,
}

/// A rewrite that nearly applied.
#[derive(Debug, Clone, Serialize)]
pub struct NearMissRow {
    /// Name of the pattern that nearly matched.
    pub pattern: &'static str,
    /// Name of the node that the pattern was tried at.
    pub node: String,
    /// Why the pattern did not match.
    pub reason: String,
}

impl From<&NearMiss> for NearMissRow {
    fn from(m: &NearMiss) -> Self {
        Self { pattern: m.pattern, node: m.node.clone(), reason: m.reason.clone() }
    }
}

/// Looks at a model. A file whose operators are not all supported is described as far as it goes; one that breaks ONNX's
/// rules is an error.
///
/// Beside the description: the network, where it can be imported, and the graph before fusing.
pub fn inspect(model: &Model, choice: &TrainableChoice, fuse: bool) -> Result<(Inspection, Option<Network>, Graph)> {
    let as_read = lower::lower(model)?;
    let graph = &as_read;
    let mut network = None;
    let unsupported = unsupported(graph, model.proto.producer_name());
    let declared = Declared::of(model)?;
    let choice = &TrainableChoice { declared: choice.declared.clone().or(declared.parameters), ..choice.clone() };
    let proto = &model.proto;
    let mut out = Inspection {
        producer: format!("{} {}", proto.producer_name(), proto.producer_version()).trim().to_owned(),
        ir_version: proto.ir_version(),
        opset: graph
            .opsets
            .iter()
            .map(|(d, v)| (if d.is_empty() { "ai.onnx".into() } else { d.clone() }, *v))
            .collect(),
        inputs: graph.inputs.iter().map(signature).collect(),
        outputs: graph.outputs.iter().map(signature).collect(),
        parameters: Count::default(),
        parameters_declared: choice.declared.is_some(),
        tied: declared.tied,
        parameters_by_role: BTreeMap::new(),
        parameters_by_group: BTreeMap::new(),
        buffers: Vec::new(),
        operators: BTreeMap::new(),
        fused: BTreeMap::new(),
        near_misses: Vec::new(),
        unsupported,
        quantised: quantised::quantised(graph),
        unguarded_divisions: unguarded_division::unguarded(graph),
        batch_statistics: crate::parity::batch_statistics(graph),
        cost: Cost::default(),
        parameter_list: Vec::new(),
    };
    if out.unsupported.is_empty() {
        let options = ImportOptions { fuse, trainable: choice.clone(), ..ImportOptions::default() };
        let net = Network::import(model.clone(), &options, Device::Cpu)?;
        let shared = net.shared();
        out.tensors(&shared.parameters, &shared.buffers);
        out.operators = shared.operators.clone();
        out.rewrites(&shared.fused);
        network = Some(net);
    } else {
        let mut graph = as_read.clone();
        let provenance = crate::graph::roles::untangle(&mut graph, choice.declared.as_deref());
        let roles = crate::graph::roles::classify(&graph, choice, &provenance)?;
        out.tensors(&roles.parameters, &roles.buffers);
        for n in &graph.nodes {
            *out.operators.entry(n.op.clone()).or_insert(0) += 1;
        }
        if fuse {
            let trained = roles.parameters.iter().map(|p| p.value).collect();
            out.rewrites(&crate::graph::fuse::fuse(&mut graph, &trained));
        }
    }
    Ok((out, network, as_read))
}

impl Inspection {
    fn tensors(&mut self, parameters: &[Parameter], buffers: &[Buffer]) {
        for p in parameters {
            self.parameters.add(&p.shape);
            self.parameters_by_role.entry(p.role.to_string()).or_default().add(&p.shape);
            self.parameters_by_group.entry(group(&p.name)).or_default().add(&p.shape);
            self.parameter_list.push(TensorRow {
                name: p.name.clone(),
                role: p.role.to_string(),
                shape: p.shape.clone(),
                dtype: p.dtype.to_string(),
            });
        }
        for b in buffers {
            self.buffers.push(TensorRow {
                name: b.name.clone(),
                role: b.reason.to_owned(),
                shape: b.shape.clone(),
                dtype: b.dtype.to_string(),
            });
        }
    }

    fn rewrites(&mut self, report: &Fused) {
        self.fused = report.counts();
        self.near_misses = report.near_misses.iter().map(NearMissRow::from).collect();
    }
}

/// The part of a network that a parameter's name places it in: its first component, and the index after it.
fn group(name: &str) -> String {
    let parts: Vec<&str> = name.trim_start_matches('/').split(['.', '/']).collect();
    match parts.as_slice() {
        [] | [_] => "(unnamed)".to_owned(),
        [first, second, _, ..] if second.bytes().all(|b| b.is_ascii_digit()) => format!("{first}.{second}"),
        [first, ..] => (*first).to_owned(),
    }
}

fn signature(p: &crate::graph::Port) -> Signature {
    let dim = |d: &Result<usize, String>| match d {
        Ok(n) => serde_json::json!(n),
        Err(s) if s.is_empty() => serde_json::Value::Null,
        Err(s) => serde_json::json!(s),
    };
    Signature {
        name: p.name.clone(),
        dtype: p.dtype.map(|d| d.to_string()),
        shape: p.shape.as_ref().map(|s| s.iter().map(dim).collect()),
        text: p.describe(),
    }
}

fn unsupported(graph: &Graph, producer: &str) -> Vec<UnsupportedNode> {
    graph
        .nodes
        .iter()
        .filter_map(|n| {
            let e = ops::registry().build(n).err()?;
            Some(UnsupportedNode {
                operator: if n.domain.is_empty() { n.op.clone() } else { format!("{}.{}", n.domain, n.op) },
                opset: n.opset,
                node: n.name.clone(),
                reason: e.to_string().lines().next().unwrap_or_default().to_owned(),
                way_out: e.hint_text().or((e.kind() == Kind::Unsupported).then(|| advice(producer))).map(str::to_owned),
            })
        })
        .collect()
}
