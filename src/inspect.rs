//! What an ONNX file holds and what would become of it: signature, parameters by role, operators, what is raised, what is
//! not supported, cost, and a proposed teacher card.

use std::collections::BTreeMap;

use serde::Serialize;
use tch::{Device, Tensor};

use crate::diffusion::TeacherCard;
use crate::error::Result;
use crate::graph::raise::{NearMiss, Report as Raised};
use crate::graph::roles::{Buffer, Parameter};
use crate::graph::{Graph, Model, TrainableChoice, ValueId, lower};
use crate::parity;
use crate::tensor::HostTensor;
use crate::torch::convert;
use crate::torch::registry::Registry;
use crate::torch::{ImportOptions, Network};

/// A graph input or output.
#[derive(Debug, Clone, Serialize)]
pub struct Signature {
    pub name: String,
    pub dtype: Option<String>,
    /// Numbers, symbols, or null where unknown.
    pub shape: Option<Vec<serde_json::Value>>,
    #[serde(skip)]
    pub text: String,
}

/// How many tensors and elements.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Count {
    pub count: usize,
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
    pub name: String,
    pub role: String,
    pub shape: Vec<usize>,
    pub dtype: String,
}

/// A node that cannot be imported.
#[derive(Debug, Clone, Serialize)]
pub struct UnsupportedNode {
    pub operator: String,
    pub opset: i64,
    pub node: String,
    pub reason: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub way_out: Option<String>,
}

/// Cost of one forward.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Cost {
    /// Multiply-adds of convolutions and matrix products, for one image.
    pub macs: u64,
    /// Bytes of all intermediate values of the raised network, for one image: what a backward pass may keep.
    pub activation_bytes: u64,
}

/// See the module's text.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    pub producer: String,
    pub ir_version: i64,
    pub opset: BTreeMap<String, i64>,
    pub inputs: Vec<Signature>,
    pub outputs: Vec<Signature>,
    pub parameters: Count,
    pub parameters_by_role: BTreeMap<String, Count>,
    pub buffers: Vec<TensorRow>,
    pub operators: BTreeMap<String, usize>,
    pub raised: BTreeMap<&'static str, usize>,
    pub near_misses: Vec<NearMissRow>,
    pub unsupported: Vec<UnsupportedNode>,
    #[serde(flatten)]
    pub cost: Option<Cost>,
    /// Every parameter (`--parameters`).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub parameter_list: Vec<TensorRow>,
}

/// A rewrite that nearly applied.
#[derive(Debug, Clone, Serialize)]
pub struct NearMissRow {
    pub pattern: &'static str,
    pub node: String,
    pub reason: String,
}

impl From<&NearMiss> for NearMissRow {
    fn from(m: &NearMiss) -> Self {
        Self { pattern: m.pattern, node: m.node.clone(), reason: m.reason.clone() }
    }
}

/// Looks at a model. A file whose operators are not all supported is described as far as it goes; one that breaks ONNX's
/// rules is an error.
pub fn inspect(model: &Model, card: Option<&TeacherCard>, choice: &TrainableChoice, raise: bool) -> Result<Inspection> {
    let graph = lower::lower(model)?;
    let unsupported = unsupported(&graph);
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
        parameters_by_role: BTreeMap::new(),
        buffers: Vec::new(),
        operators: BTreeMap::new(),
        raised: BTreeMap::new(),
        near_misses: Vec::new(),
        unsupported,
        cost: None,
        parameter_list: Vec::new(),
    };
    if out.unsupported.is_empty() {
        let options = ImportOptions { raise, trainable: choice.clone() };
        let net = Network::import(model.clone(), &options, Device::Cpu)?;
        let shared = net.shared();
        out.tensors(&shared.parameters, &shared.buffers);
        out.operators = shared.operators.clone();
        out.rewrites(&shared.raised);
        // Cost needs numbers for all dimensions; a file with free spatial sizes and no card has none.
        out.cost = cost(&net, card).ok();
    } else {
        let mut graph = graph;
        let rewired = crate::graph::roles::part_merged(&mut graph, choice.declared.as_deref());
        let roles = crate::graph::roles::classify(&graph, choice, &rewired)?;
        out.tensors(&roles.parameters, &roles.buffers);
        for n in &graph.nodes {
            *out.operators.entry(n.op.clone()).or_insert(0) += 1;
        }
        if raise {
            out.rewrites(&crate::graph::raise::raise(&mut graph));
        }
    }
    Ok(out)
}

impl Inspection {
    fn tensors(&mut self, parameters: &[Parameter], buffers: &[Buffer]) {
        for p in parameters {
            self.parameters.add(&p.shape);
            self.parameters_by_role.entry(p.role.to_string()).or_default().add(&p.shape);
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

    fn rewrites(&mut self, report: &Raised) {
        self.raised = report.counts();
        self.near_misses = report.near_misses.iter().map(NearMissRow::from).collect();
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

fn unsupported(graph: &Graph) -> Vec<UnsupportedNode> {
    graph
        .nodes
        .iter()
        .filter_map(|n| {
            let e = Registry::global().build(n).err()?;
            Some(UnsupportedNode {
                operator: if n.domain.is_empty() { n.op.clone() } else { format!("{}.{}", n.domain, n.op) },
                opset: n.opset,
                node: n.name.clone(),
                reason: e.to_string().lines().next().unwrap_or_default().to_owned(),
                way_out: e.hint_text().map(str::to_owned),
            })
        })
        .collect()
}

/// Runs one image through the graph and adds up what its convolutions and matrix products cost.
fn cost(net: &Network, card: Option<&TeacherCard>) -> Result<Cost> {
    let inputs: Vec<(String, HostTensor)> = parity::random_inputs(net.inputs(), card, 1, &BTreeMap::new(), 0)?;
    let owned: Vec<(String, Tensor)> =
        inputs.iter().map(|(n, t)| Ok((n.clone(), convert::to_torch(t)?))).collect::<Result<_>>()?;
    let named: Vec<(&str, &Tensor)> = owned.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let mut shapes: BTreeMap<ValueId, (Vec<i64>, u64)> = BTreeMap::new();
    let mut activation_bytes = 0;
    tch::no_grad(|| {
        net.observe(&named, &mut |id, value| {
            if let Ok(t) = value.tensor(Device::Cpu) {
                let bytes = (t.numel() * t.kind().elt_size_in_bytes()) as u64;
                if !value.is_host() {
                    activation_bytes += bytes;
                }
                shapes.insert(id, (t.size(), bytes));
            }
        })
    })?;
    let graph = &net.shared().graph;
    let known: BTreeMap<ValueId, Vec<i64>> = graph
        .constants
        .iter()
        .map(|(v, c)| (*v, c.tensor.shape().iter().map(|&d| d as i64).collect()))
        .chain(net.shared().parameters.iter().map(|p| (p.value, p.shape.iter().map(|&d| d as i64).collect())))
        .chain(
            graph
                .inputs
                .iter()
                .filter_map(|p| owned.iter().find(|(n, _)| *n == p.name).map(|(_, t)| (p.value, t.size()))),
        )
        .chain(shapes.iter().map(|(v, (s, _))| (*v, s.clone())))
        .collect();
    let of = |v: Option<ValueId>| v.and_then(|v| known.get(&v)).cloned().unwrap_or_default();
    let product = |s: &[i64]| s.iter().product::<i64>().max(0) as u64;
    let mut macs = 0u64;
    for n in &graph.nodes {
        let (a, b, y) = (of(n.input(0)), of(n.input(1)), of(n.output(0)));
        macs += match n.op.as_str() {
            "Conv" if b.len() > 2 => product(&y) * product(&b[1..]),
            "ConvTranspose" if b.len() > 2 => product(&a) * product(&b[1..]),
            "MatMul" if !a.is_empty() => product(&y) * a.last().copied().unwrap_or(0).max(0) as u64,
            "Gemm" if b.len() == 2 && y.len() == 2 => product(&b) * y[0].max(0) as u64,
            // q [..., n, d] times k^T [..., d, m], and the result times v [..., m, e].
            "Attention" if n.domain == "disback" && a.len() > 1 && b.len() > 1 => {
                let m = b[b.len() - 1].max(0) as u64;
                product(&a) * m + product(&y) * m
            }
            _ => 0,
        };
    }
    Ok(Cost { macs, activation_bytes })
}
