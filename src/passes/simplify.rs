//! The optimised graph: what depends on constants alone is a constant, shape arithmetic is gone wherever it can be, Identity
//! and dead nodes too.
//!
//! Nothing is computed by rules of our own: the values are read off runs of the network itself. With a fixed batch every
//! shape is one. With a free batch the network is run at several batch sizes: what is the same in all of them is a constant,
//! a Reshape whose target varies in one place gets -1 there, and what has the same row for every image (the embedding of a
//! time that a network wants once an image) is that row, expanded. What varies otherwise is looked into, as far as it goes.

use std::collections::{HashMap, HashSet};

use crate::error::Result;
use crate::graph::tensors;
use crate::onnx::{GraphProto, ModelProto, NodeProto};
use crate::tensor::{DType, HostTensor};

use crate::graph::edit;
use crate::passes::branches;
use crate::passes::evaluate;
use crate::passes::evaluate::Inputs;

/// A constant made by folding is at most this large, unless it replaces more.
const LARGEST: usize = 16 << 20;
/// How far values that vary are looked into.
const LEVELS: usize = 48;
/// Rows that are apart by this much of the largest value are the same: kernels round by the place in a batch.
const SAME_ROW: f32 = 1e-6;

/// What simplifying did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Simplified {
    /// Number of nodes before.
    pub nodes_before: usize,
    /// Number of nodes after.
    pub nodes_after: usize,
    /// Values that became constants.
    pub folded: usize,
    /// Reshape targets that got a -1 for the batch.
    pub reshapes: usize,
    /// Values that are the same for every image and are now stored once.
    pub rows: usize,
}

/// Simplifies in place. `probes` are inputs of different batch sizes (one set where the batch is fixed).
pub fn simplify(model: &mut ModelProto, probes: &[Inputs]) -> Result<Simplified> {
    let Some(graph) = model.graph.as_mut() else { return Ok(Simplified::default()) };
    let mut report = Simplified { nodes_before: graph.node.len(), ..Simplified::default() };
    graph.value_info.clear();
    // Conditions become constants, and what follows from the branch that is taken does then.
    loop {
        once(model, probes, &mut report)?;
        let Some(graph) = model.graph.as_mut() else { break };
        let inlined = branches::inline_decided(graph);
        edit::remove_dead(graph);
        report.nodes_after = graph.node.len();
        if inlined == 0 {
            break;
        }
    }
    Ok(report)
}

fn once(model: &mut ModelProto, probes: &[Inputs], report: &mut Simplified) -> Result<()> {
    let Some(graph) = model.graph.as_mut() else { return Ok(()) };
    edit::sort(graph);
    constants_to_initializers(graph);
    remove_identities(graph);
    let (fixed, shapely) = predictable(graph);
    let mut names: Vec<String> = frontier(graph, &shapely).into_iter().collect();
    let mut tried: HashSet<String> = HashSet::new();
    let batches: Vec<usize> = probes.iter().filter_map(|p| p.first()?.1.shape().first().copied()).collect();
    for _ in 0..LEVELS {
        if names.is_empty() {
            break;
        }
        let seen = evaluate::values(model, &names, probes)?;
        let Some(graph) = model.graph.as_mut() else { break };
        let left = replace(graph, &names, &seen, &batches, &fixed, report);
        edit::remove_dead(graph);
        tried.extend(names);
        names = behind(graph, &left, &shapely).into_iter().filter(|v| !tried.contains(v)).collect();
    }
    Ok(())
}

/// Predictable values that the makers of these read.
fn behind(graph: &GraphProto, left: &HashSet<String>, shapely: &HashSet<String>) -> std::collections::BTreeSet<String> {
    let made: HashSet<&str> = graph.node.iter().flat_map(|n| &n.output).map(String::as_str).collect();
    let makers = graph.node.iter().filter(|n| n.output.iter().any(|o| left.contains(o)));
    makers.flat_map(edit::reads).filter(|v| shapely.contains(v) && made.contains(v.as_str())).collect()
}

/// Constant nodes as initializers: several runtimes take weights in no other form.
pub(crate) fn constants_to_initializers(graph: &mut GraphProto) {
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

/// Identity and Dropout nodes that make no output of the graph.
pub(crate) fn remove_identities(graph: &mut GraphProto) {
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

/// Returns what could not be replaced everywhere.
fn replace(
    graph: &mut GraphProto,
    names: &[String],
    seen: &[HashMap<String, HostTensor>],
    batches: &[usize],
    fixed: &HashSet<String>,
    report: &mut Simplified,
) -> HashSet<String> {
    let weights: usize =
        graph.initializer.iter().map(|t| t.raw_data.as_ref().map_or(0, |b| b.len())).max().unwrap_or(0);
    let largest = LARGEST.max(weights);
    let mut taken = edit::value_names(graph);
    let mut free = |wanted: String| {
        let name = edit::free_name(&taken, &wanted);
        taken.insert(name.clone());
        name
    };
    let expanded: HashSet<String> =
        graph.node.iter().filter(|n| edit::is(n, "Expand")).flat_map(|n| n.output.clone()).collect();
    let mut map = HashMap::new();
    let mut left = HashSet::new();
    let mut rows = Rows::default();
    for name in names {
        let all: Vec<&HostTensor> = seen.iter().filter_map(|s| s.get(name)).collect();
        let Some(first) = all.first().copied() else { continue };
        let steady = fixed.contains(name) || all.iter().all(|t| *t == first);
        if steady && first.bytes().len() <= largest {
            let new = free(format!("{name}/value"));
            graph.initializer.push(tensors::to_proto(&new, first));
            map.insert(name.clone(), new);
            report.folded += 1;
        } else if let Some(row) =
            the_row(&all, batches).filter(|r| r.bytes().len() <= largest && !expanded.contains(name))
        {
            map.insert(name.clone(), rows.add(graph, name, &row, &mut free));
            report.rows += 1;
        } else {
            left.insert(name.clone());
            let Some(target) = free_in_one_place(&all) else { continue };
            let new = free(format!("{name}/target"));
            let mut used = false;
            for n in graph.node.iter_mut().filter(|n| edit::is(n, "Reshape") && edit::int(n, "allowzero") != Some(1)) {
                if n.input.get(1) == Some(name) {
                    n.input[1].clone_from(&new);
                    used = true;
                }
            }
            if used {
                graph.initializer.push(tensors::to_proto(&new, &HostTensor::vec(&target)));
                report.reshapes += 1;
            }
        }
    }
    edit::redirect(graph, &map);
    rows.nodes.append(&mut graph.node);
    graph.node = rows.nodes;
    left
}

/// The nodes that expand a row to all images.
#[derive(Default)]
struct Rows {
    nodes: Vec<NodeProto>,
    batch: Option<String>,
}

impl Rows {
    /// Expands the row as often as there are images; the name of the result.
    fn add(
        &mut self,
        graph: &mut GraphProto,
        name: &str,
        row: &HostTensor,
        free: &mut dyn FnMut(String) -> String,
    ) -> String {
        let mut hold = |graph: &mut GraphProto, wanted: String, t: &HostTensor| {
            let name = free(wanted);
            graph.initializer.push(tensors::to_proto(&name, t));
            name
        };
        let stored = hold(graph, format!("{name}/row"), row);
        let zero = self.batch.is_none().then(|| hold(graph, "disback/rows/first".into(), &HostTensor::vec(&[0i64])));
        let rest: Vec<i64> = row.shape()[1..].iter().map(|&d| d as i64).collect();
        let rest = (!rest.is_empty()).then(|| hold(graph, format!("{name}/row_shape"), &HostTensor::vec(&rest)));
        if let Some(zero) = zero {
            let (shape, batch) = (free("disback/rows/shape".into()), free("disback/rows/batch".into()));
            self.nodes.push(edit::node("Shape", &["noise"], &shape));
            self.nodes.push(edit::node("Gather", &[&shape, &zero], &batch));
            self.batch = Some(batch);
        }
        let mut shape = self.batch.clone().unwrap_or_default();
        if let Some(rest) = rest {
            let whole = free(format!("{name}/rows_shape"));
            let mut joined = edit::node("Concat", &[&shape, &rest], &whole);
            joined.attribute.push(edit::int_attribute("axis", 0));
            self.nodes.push(joined);
            shape = whole;
        }
        let rows = free(format!("{name}/rows"));
        self.nodes.push(edit::node("Expand", &[&stored, &shape], &rows));
        rows
    }
}

/// The row that a value has for every image, whatever the batch.
fn the_row(all: &[&HostTensor], batches: &[usize]) -> Option<HostTensor> {
    let first = all.first()?;
    if all.len() < 2 || all.len() != batches.len() || !first.dtype().is_float() || first.rank() == 0 {
        return None;
    }
    let row = first.rows(0, 1).ok()?;
    let values = row.to_f32();
    let limit = SAME_ROW * values.iter().fold(0f32, |m, v| m.max(v.abs()));
    let same = |t: &HostTensor, batch: usize| {
        let fits = t.shape().first() == Some(&batch) && t.shape()[1..] == first.shape()[1..] && !values.is_empty();
        fits && t.to_f32().chunks(values.len()).all(|r| r.iter().zip(&values).all(|(a, b)| (a - b).abs() <= limit))
    };
    all.iter().zip(batches).all(|(t, &b)| same(t, b)).then_some(row)
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
