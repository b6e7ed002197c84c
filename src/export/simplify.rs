//! The optimised graph: what depends on constants alone is a constant, shape arithmetic is gone wherever it can be, Identity
//! and dead nodes too.
//!
//! Nothing is computed by rules of our own: the values are read off runs of the network itself. With a fixed batch every
//! shape is one. With a free batch the network is run at several batch sizes: what is the same in all of them is a constant,
//! and a Reshape whose target varies in one place gets -1 there.

use std::collections::{HashMap, HashSet};

use crate::error::Result;
use crate::graph::tensors;
use crate::onnx::{GraphProto, ModelProto, NodeProto};
use crate::tensor::{DType, HostTensor};

use super::edit;
use super::evaluate::{self, Inputs};

/// A constant made by folding is at most this large, unless it replaces more.
const LARGEST: usize = 16 << 20;

/// What simplifying did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Simplified {
    pub nodes_before: usize,
    pub nodes_after: usize,
    /// Values that became constants.
    pub folded: usize,
    /// Reshape targets that got a -1 for the batch.
    pub reshapes: usize,
}

/// Simplifies in place. `probes` are inputs of different batch sizes (one set where the batch is fixed).
pub fn simplify(model: &mut ModelProto, probes: &[Inputs]) -> Result<Simplified> {
    let Some(graph) = model.graph.as_mut() else { return Ok(Simplified::default()) };
    let mut report = Simplified { nodes_before: graph.node.len(), ..Simplified::default() };
    graph.value_info.clear();
    edit::sort(graph);
    constants_to_initializers(graph);
    remove_identities(graph);
    let (fixed, shapely) = predictable(graph);
    let frontier = frontier(graph, &shapely);
    let names: Vec<String> = frontier.iter().cloned().collect();
    let seen = evaluate::values(model, &names, probes)?;
    if let Some(graph) = model.graph.as_mut() {
        replace(graph, &names, &seen, &fixed, &mut report);
        edit::remove_dead(graph);
        report.nodes_after = graph.node.len();
    }
    Ok(report)
}

/// Constant nodes as initializers: several runtimes take weights in no other form.
pub(super) fn constants_to_initializers(graph: &mut GraphProto) {
    let mut made = Vec::new();
    graph.node.retain(|n| {
        if !edit::is(n, "Constant") || n.attribute.len() != 1 {
            return true;
        }
        let a = &n.attribute[0];
        let tensor = match a.name() {
            "value" => a.t.clone(),
            "value_float" => a.f.map(|v| tensors::to_proto("", &HostTensor::scalar(v))),
            "value_int" => a.i.map(|v| tensors::to_proto("", &HostTensor::scalar(v))),
            "value_floats" => Some(tensors::to_proto("", &HostTensor::vec(&a.floats))),
            "value_ints" => Some(tensors::to_proto("", &HostTensor::vec(&a.ints))),
            _ => None,
        };
        match (tensor, n.output.first()) {
            (Some(mut t), Some(out)) => {
                t.name = Some(out.clone());
                made.push(t);
                false
            }
            _ => true,
        }
    });
    graph.initializer.extend(made);
}

fn remove_identities(graph: &mut GraphProto) {
    let outputs: HashSet<String> = graph.output.iter().map(|o| o.name().to_owned()).collect();
    let mut map: HashMap<String, String> = HashMap::new();
    graph.node.retain(|n| {
        let plain = edit::is(n, "Identity") || (edit::is(n, "Dropout") && n.input.len() < 3 && n.output.len() == 1);
        match (plain, n.input.first(), n.output.first()) {
            (true, Some(from), Some(to)) if !outputs.contains(to) => {
                let from = map.get(from).cloned().unwrap_or_else(|| from.clone());
                map.insert(to.clone(), from);
                false
            }
            _ => true,
        }
    });
    edit::redirect(graph, &map);
}

/// Operators whose result is not decided by their inputs, or that must stay as they are: weights stored in few bits.
fn stays(node: &NodeProto) -> bool {
    edit::has_subgraph(node)
        || matches!(
            node.op_type(),
            "RandomNormal"
                | "RandomUniform"
                | "RandomNormalLike"
                | "RandomUniformLike"
                | "Bernoulli"
                | "Multinomial"
                | "DequantizeLinear"
        )
        || node.op_type().contains("Sequence")
}

/// Values that follow from constants alone, and those that follow from constants and shapes.
fn predictable(graph: &GraphProto) -> (HashSet<String>, HashSet<String>) {
    let mut fixed: HashSet<String> = graph.initializer.iter().map(|t| t.name().to_owned()).collect();
    let mut shapely = fixed.clone();
    for n in graph.node.iter().filter(|n| !stays(n)) {
        let read = || n.input.iter().filter(|i| !i.is_empty());
        if read().all(|i| fixed.contains(i)) {
            fixed.extend(n.output.iter().cloned());
        }
        if edit::is(n, "Shape") || edit::is(n, "Size") || read().all(|i| shapely.contains(i)) {
            shapely.extend(n.output.iter().filter(|o| !o.is_empty()).cloned());
        }
    }
    (fixed, shapely)
}

/// Predictable values, made by nodes, that other nodes read.
fn frontier(graph: &GraphProto, shapely: &HashSet<String>) -> std::collections::BTreeSet<String> {
    let held: HashSet<&str> = graph.initializer.iter().map(|t| t.name()).collect();
    let outside = |n: &NodeProto| n.output.iter().any(|o| !o.is_empty() && !shapely.contains(o)) || stays(n);
    graph
        .node
        .iter()
        .filter(|n| outside(n))
        .flat_map(edit::reads)
        .filter(|v| shapely.contains(v) && !held.contains(v.as_str()))
        .collect()
}

fn replace(
    graph: &mut GraphProto,
    names: &[String],
    seen: &[HashMap<String, HostTensor>],
    fixed: &HashSet<String>,
    report: &mut Simplified,
) {
    let weights: usize =
        graph.initializer.iter().map(|t| t.raw_data.as_ref().map_or(0, |b| b.len())).max().unwrap_or(0);
    let mut taken = edit::value_names(graph);
    let mut map = HashMap::new();
    for name in names {
        let all: Vec<&HostTensor> = seen.iter().filter_map(|s| s.get(name)).collect();
        let Some(first) = all.first().copied() else { continue };
        let steady = fixed.contains(name) || all.iter().all(|t| *t == first);
        if steady && first.bytes().len() <= LARGEST.max(weights) {
            let new = edit::free_name(&taken, &format!("{name}/value"));
            taken.insert(new.clone());
            graph.initializer.push(tensors::to_proto(&new, first));
            map.insert(name.clone(), new);
            report.folded += 1;
        } else if let Some(target) = free_in_one_place(&all) {
            let new = edit::free_name(&taken, &format!("{name}/target"));
            let mut used = false;
            for n in graph.node.iter_mut().filter(|n| edit::is(n, "Reshape") && edit::int(n, "allowzero") != Some(1)) {
                if n.input.get(1) == Some(name) {
                    n.input[1].clone_from(&new);
                    used = true;
                }
            }
            if used {
                taken.insert(new.clone());
                graph.initializer.push(tensors::to_proto(&new, &HostTensor::vec(&target)));
                report.reshapes += 1;
            }
        }
    }
    edit::redirect(graph, &map);
}

/// The shape that varies in exactly one place, with -1 there.
fn free_in_one_place(all: &[&HostTensor]) -> Option<Vec<i64>> {
    let rows: Vec<Vec<i64>> = all.iter().map(|t| t.values::<i64>().ok()).collect::<Option<_>>()?;
    let first = rows.first()?;
    if rows.len() < 2 || rows.iter().any(|r| r.len() != first.len()) || all[0].dtype() != DType::I64 {
        return None;
    }
    let varies: Vec<usize> = (0..first.len()).filter(|&k| rows.iter().any(|r| r[k] != first[k])).collect();
    match varies.as_slice() {
        [k] if first.iter().enumerate().all(|(i, &d)| i == *k || d > 0) => {
            let mut target = first.clone();
            target[*k] = -1;
            Some(target)
        }
        _ => None,
    }
}
