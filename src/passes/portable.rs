//! The portable form: what ONNX allows but several runtimes do not take is written in plainer operators. Slices that run
//! backwards, sequences, padding left to the runtime.

use std::collections::{HashMap, HashSet};

use crate::error::Result;
use crate::graph::tensors;
use crate::onnx::{GraphProto, ModelProto, NodeProto};
use crate::tensor::HostTensor;

use crate::graph::edit;
use crate::graph::edit::{int_attribute, ints_attribute};
use crate::passes::evaluate;
use crate::passes::evaluate::Inputs;

/// Rewrites in place and returns what was done, a line each. `probes` tell the sizes that the rewriting needs; what varies
/// between them stays as it is (`verify --target` names it).
pub fn portable(model: &mut ModelProto, probes: &[Inputs]) -> Result<Vec<String>> {
    let opset = edit::opset(model);
    let Some(graph) = model.graph.as_mut() else { return Ok(Vec::new()) };
    graph.value_info.clear();
    let wanted: Vec<String> = graph.node.iter().filter_map(asks_for_size).collect();
    let mut names = wanted;
    names.sort();
    names.dedup();
    let held: HashMap<String, HostTensor> = edit::constants(graph)
        .into_iter()
        .filter(|(_, t)| t.dims.len() <= 1)
        .filter_map(|(n, t)| Some((n, tensors::from_proto(t).ok()?)))
        .collect();
    let runs = evaluate::values(model, &names, probes)?;
    let sizes = Sizes { runs: &runs };
    let Some(graph) = model.graph.as_mut() else { return Ok(Vec::new()) };
    let mut writer = Writer { opset, held, made: Vec::new(), taken: edit::value_names(graph), log: Vec::new() };
    let nodes = std::mem::take(&mut graph.node);
    let mut out = Vec::with_capacity(nodes.len());
    let sequences = Sequences::of(&nodes);
    for node in nodes {
        if edit::is(&node, "Slice") && writer.slice(&node, &sizes, &mut out) {
            continue;
        }
        if edit::is(&node, "SplitToSequence")
            && sequences.simple(&node)
            && writer.split(&node, &sizes, &sequences, &mut out)
        {
            continue;
        }
        out.push(match node.op_type() {
            "Conv" | "ConvTranspose" | "AveragePool" | "MaxPool" | "LpPool" => writer.pads(node, &sizes),
            _ => node,
        });
    }
    graph.node = out;
    graph.node.retain(|n| !(edit::is(n, "SequenceAt") && writer.was_split(n)));
    graph.initializer.append(&mut writer.made);
    edit::remove_dead(graph);
    Ok(writer.log.into_iter().map(|l| l.text).collect())
}

/// The input whose size decides how a node is rewritten.
fn asks_for_size(node: &NodeProto) -> Option<String> {
    let auto = edit::text(node, "auto_pad").is_some_and(|a| !matches!(a.as_str(), "" | "NOTSET"));
    let steps = edit::is(node, "Slice") && node.input.len() > 4;
    let wanted = auto || steps || edit::is(node, "SplitToSequence");
    node.input.first().filter(|_| wanted).cloned()
}

struct Sizes<'a> {
    runs: &'a [HashMap<String, HostTensor>],
}

impl Sizes<'_> {
    /// Size of a dimension, where it is the same in all runs.
    fn dim(&self, value: &str, axis: usize) -> Option<usize> {
        let mut all = self.runs.iter().map(|r| r.get(value).and_then(|t| t.shape().get(axis).copied()));
        let first = all.next()??;
        all.all(|d| d == Some(first)).then_some(first)
    }
    fn rank(&self, value: &str) -> Option<usize> {
        self.runs.first()?.get(value).map(HostTensor::rank)
    }
}

struct Line {
    text: String,
    /// The sequence that a Split replaced.
    sequence: Option<String>,
}

struct Writer {
    opset: i64,
    held: HashMap<String, HostTensor>,
    made: Vec<crate::onnx::TensorProto>,
    taken: HashSet<String>,
    log: Vec<Line>,
}

impl Writer {
    fn name(&mut self, wanted: &str) -> String {
        let name = edit::free_name(&self.taken, wanted);
        self.taken.insert(name.clone());
        name
    }
    fn number(&mut self, wanted: &str, values: &[i64]) -> String {
        let name = self.name(wanted);
        self.made.push(tensors::to_proto(&name, &HostTensor::vec(values)));
        name
    }
    fn ints(&self, node: &NodeProto, slot: usize) -> Option<Vec<i64>> {
        self.held.get(node.input.get(slot)?).map(HostTensor::to_i64)
    }
    fn done(&mut self, text: String) {
        self.log.push(Line { text, sequence: None });
    }

    /// A slice with a negative step: Gather with the indices written out, one for each such axis, then the plain rest.
    fn slice(&mut self, node: &NodeProto, sizes: &Sizes<'_>, out: &mut Vec<NodeProto>) -> bool {
        let Some(steps) = self.ints(node, 4).filter(|s| s.iter().any(|&s| s < 0)) else { return false };
        let (Some(starts), Some(ends), Some(rank)) =
            (self.ints(node, 1), self.ints(node, 2), sizes.rank(&node.input[0]))
        else {
            return false;
        };
        let axes = self.ints(node, 3).unwrap_or_else(|| (0..starts.len() as i64).collect());
        if [starts.len(), ends.len(), axes.len()] != [steps.len(); 3] {
            return false;
        }
        let axis_of = |a: i64| usize::try_from(if a < 0 { a + rank as i64 } else { a }).unwrap_or(usize::MAX);
        let mut gathers = Vec::new();
        for k in (0..steps.len()).filter(|&k| steps[k] < 0) {
            let Some(size) = sizes.dim(&node.input[0], axis_of(axes[k])) else { return false };
            gathers.push((axis_of(axes[k]), backwards(starts[k], ends[k], steps[k], size as i64)));
        }
        let rest: Vec<usize> = (0..steps.len()).filter(|&k| steps[k] > 0).collect();
        let result = node.output[0].clone();
        let mut at = node.input[0].clone();
        let last = gathers.len() - 1;
        for (k, (axis, indices)) in gathers.into_iter().enumerate() {
            let to = if k == last && rest.is_empty() { result.clone() } else { self.name(&format!("{result}/turned")) };
            let index = self.number(&format!("{result}/indices"), &indices);
            let mut n = edit::node("Gather", &[&at, &index], &to);
            n.attribute.push(int_attribute("axis", axis as i64));
            out.push(n);
            at = to;
        }
        if !rest.is_empty() {
            let pick = |from: &[i64]| rest.iter().map(|&k| from[k]).collect::<Vec<_>>();
            let all = [pick(&starts), pick(&ends), pick(&axes), pick(&steps)];
            let named: Vec<String> = all.iter().map(|v| self.number(&format!("{result}/slice"), v)).collect();
            out.push(edit::node("Slice", &[&at, &named[0], &named[1], &named[2], &named[3]], &result));
        }
        self.done(format!("{}: the negative step is a Gather now", edit::label(node)));
        true
    }

    /// Padding that the runtime would work out, written as numbers.
    fn pads(&mut self, mut node: NodeProto, sizes: &Sizes<'_>) -> NodeProto {
        let auto = edit::text(&node, "auto_pad").unwrap_or_default();
        let spatial = match (sizes.rank(node.input.first().map_or("", String::as_str)), auto.as_str()) {
            (Some(rank), "SAME_UPPER" | "SAME_LOWER" | "VALID") if rank > 2 => rank - 2,
            _ => return node,
        };
        let kernel: Option<Vec<i64>> = edit::ints(&node, "kernel_shape").map(<[i64]>::to_vec);
        let Some(kernel) = kernel.filter(|k| k.len() == spatial) else { return node };
        let list = |name: &str, value: i64| edit::ints(&node, name).map_or(vec![value; spatial], <[i64]>::to_vec);
        let (strides, dilations, extra) = (list("strides", 1), list("dilations", 1), list("output_padding", 0));
        let mut pads = vec![0; 2 * spatial];
        if auto != "VALID" {
            for k in 0..spatial {
                let Some(size) = sizes.dim(&node.input[0], k + 2) else { return node };
                let (size, window) = (size as i64, (kernel[k] - 1) * dilations[k] + 1);
                let total = if node.op_type() == "ConvTranspose" {
                    strides[k] * (size - 1) + extra[k] + window - size * strides[k]
                } else {
                    (((size + strides[k] - 1) / strides[k]) - 1) * strides[k] + window - size
                }
                .max(0);
                let (small, large) = (total / 2, total - total / 2);
                (pads[k], pads[k + spatial]) = if auto == "SAME_UPPER" { (small, large) } else { (large, small) };
            }
        }
        edit::take_attribute(&mut node, "auto_pad");
        edit::take_attribute(&mut node, "pads");
        node.attribute.push(ints_attribute("pads", &pads));
        self.done(format!("{}: auto_pad {auto} is pads {pads:?} now", edit::label(&node)));
        node
    }

    /// SplitToSequence whose pieces are taken out by constant numbers: a Split with an output each.
    fn split(&mut self, node: &NodeProto, sizes: &Sizes<'_>, sequences: &Sequences, out: &mut Vec<NodeProto>) -> bool {
        let Some(rank) = sizes.rank(&node.input[0]) else { return false };
        let axis = edit::int(node, "axis").unwrap_or(0);
        let at = if axis < 0 { axis + rank as i64 } else { axis };
        let Some(size) = usize::try_from(at).ok().and_then(|a| sizes.dim(&node.input[0], a)) else { return false };
        let given = node.input.get(1).filter(|i| !i.is_empty());
        let parts: Vec<i64> = match given.map(|i| self.held.get(i)) {
            None => vec![1; size],
            Some(Some(t)) if t.rank() == 1 => t.to_i64(),
            Some(Some(t)) => {
                let step = t.to_i64().first().copied().unwrap_or(0);
                if step <= 0 {
                    return false;
                }
                (0..size as i64).step_by(step as usize).map(|s| step.min(size as i64 - s)).collect()
            }
            Some(None) => return false,
        };
        let squeeze = given.is_none() && edit::int(node, "keepdims") == Some(0);
        let readers = &sequences.readers[&node.output[0]];
        let index = |input: &str| {
            let k = self.held.get(input)?.to_i64().first().copied()?;
            usize::try_from(if k < 0 { k + parts.len() as i64 } else { k }).ok().filter(|&k| k < parts.len())
        };
        let Some(picked) = readers.iter().map(|(i, o)| Some((index(i)?, o.clone()))).collect::<Option<Vec<_>>>() else {
            return false;
        };
        let names: Vec<String> = (0..parts.len()).map(|k| self.name(&format!("{}/{k}", node.output[0]))).collect();
        let mut split = edit::node("Split", &[&node.input[0]], &names[0]);
        split.output.clone_from(&names);
        split.attribute.push(int_attribute("axis", axis));
        if self.opset >= 13 {
            let sizes = self.number(&format!("{}/sizes", node.output[0]), &parts);
            split.input.push(sizes);
        } else {
            split.attribute.push(ints_attribute("split", &parts));
        }
        out.push(split);
        for (k, to) in picked {
            let mut n = if squeeze {
                edit::node("Squeeze", &[&names[k]], &to)
            } else {
                edit::node("Identity", &[&names[k]], &to)
            };
            if squeeze && self.opset >= 13 {
                let axes = self.number(&format!("{to}/axes"), &[axis]);
                n.input.push(axes);
            } else if squeeze {
                n.attribute.push(ints_attribute("axes", &[axis]));
            }
            out.push(n);
        }
        let text = format!("{}: a Split with {} outputs now", edit::label(node), parts.len());
        self.log.push(Line { text, sequence: Some(node.output[0].clone()) });
        true
    }

    fn was_split(&self, node: &NodeProto) -> bool {
        let from = node.input.first();
        self.log.iter().any(|l| l.sequence.is_some() && l.sequence.as_ref() == from)
    }
}

/// Indices of `start:end:step` with a negative step over a dimension of this size.
fn backwards(start: i64, end: i64, step: i64, size: i64) -> Vec<i64> {
    let wrap = |v: i64| if v < 0 { v.saturating_add(size) } else { v };
    let start = wrap(start).clamp(-1, size - 1);
    let end = wrap(end).clamp(-1, size - 1);
    (0..).map(|k: i64| start.saturating_add(k.saturating_mul(step))).take_while(|&i| i > end).collect()
}

/// Who reads which sequence.
struct Sequences {
    /// `(index value, result)` of each SequenceAt, by sequence.
    readers: HashMap<String, Vec<(String, String)>>,
    /// Sequences that something else reads.
    other: HashSet<String>,
}

impl Sequences {
    fn of(nodes: &[NodeProto]) -> Self {
        let mut readers: HashMap<String, Vec<(String, String)>> = HashMap::new();
        let mut other: HashSet<String> = HashSet::new();
        for n in nodes {
            if edit::is(n, "SequenceAt") && n.input.len() == 2 {
                readers.entry(n.input[0].clone()).or_default().push((n.input[1].clone(), n.output[0].clone()));
            } else {
                other.extend(edit::reads(n));
            }
        }
        Self { readers, other }
    }
    fn simple(&self, node: &NodeProto) -> bool {
        let name = &node.output[0];
        self.readers.contains_key(name) && !self.other.contains(name)
    }
}

/// Operators and forms of the graph that the portable form does not have: `(node, what)`.
pub fn left_over(graph: &GraphProto) -> Vec<(String, String)> {
    let held = edit::constants(graph);
    let ints = |n: &NodeProto, slot: usize| {
        let t = held.get(n.input.get(slot)?)?;
        tensors::from_proto(t).ok().map(|t| t.to_i64())
    };
    let text = |a: Option<String>| a.filter(|a| !matches!(a.as_str(), "" | "NOTSET"));
    let mut out = Vec::new();
    for n in &graph.node {
        if edit::is(n, "Slice") && ints(n, 4).is_some_and(|s| s.iter().any(|&s| s < 0)) {
            out.push((edit::label(n), "a negative step".to_owned()));
        } else if n.op_type().contains("Sequence") {
            out.push((edit::label(n), "sequences".to_owned()));
        } else if let Some(auto) = text(edit::text(n, "auto_pad")) {
            out.push((edit::label(n), format!("auto_pad {auto}")));
        } else if edit::has_subgraph(n) {
            out.push((edit::label(n), "a graph inside a node".to_owned()));
        }
    }
    out
}
