//! Transposes that undo each other. Frameworks that keep channels last wrap every convolution in two of them; between two
//! convolutions stand norms, activations, sums and concatenations, which compute the same in either order of axes. So a
//! transpose moves down through those where its inverse waits below, and there both vanish.

use std::collections::{HashMap, HashSet};

use crate::graph::attributes::{Attribute, Attributes};
use crate::graph::fuse::{Report, Rewrite};
use crate::graph::ir::{Graph, Node, ValueId};
use crate::graph::op_schema;

/// Over some axes, with a `view` attribute that says how they see their first input.
const NORMS: &[&str] = &["Normalize"];

/// Moves transposes towards their inverses and takes both away.
pub(super) fn cancel(graph: &mut Graph, report: &mut Report) {
    compose(graph, report);
    sink(graph);
    compose(graph, report);
}

pub(super) fn perm(node: &Node) -> Option<Vec<i64>> {
    node.is("Transpose").then(|| node.attributes.ints("perm").ok().flatten()).flatten().filter(|p| is_permutation(p))
}

fn is_permutation(p: &[i64]) -> bool {
    (0..p.len() as i64).all(|i| p.contains(&i))
}

/// First `p`, then `q`.
fn then(p: &[i64], q: &[i64]) -> Option<Vec<i64>> {
    (p.len() == q.len()).then(|| q.iter().map(|&i| p[i as usize]).collect())
}

fn is_identity(p: &[i64]) -> bool {
    p.iter().enumerate().all(|(i, &d)| d == i as i64)
}

fn inverse(p: &[i64]) -> Vec<i64> {
    let mut back = vec![0; p.len()];
    for (i, &d) in p.iter().enumerate() {
        back[d as usize] = i as i64;
    }
    back
}

/// A transpose of a transpose becomes one; one that changes nothing goes.
fn compose(graph: &mut Graph, report: &mut Report) {
    let outputs: HashSet<ValueId> = graph.outputs.iter().map(|p| p.value).collect();
    let mut alias: HashMap<ValueId, ValueId> = HashMap::new();
    let mut made: HashMap<ValueId, (ValueId, Vec<i64>)> = HashMap::new();
    for node in &mut graph.nodes {
        for v in node.inputs.iter_mut().flatten() {
            *v = alias.get(v).copied().unwrap_or(*v);
        }
        let (Some(mut p), Some(mut from), Some(to)) = (perm(node), node.input(0), node.output(0)) else { continue };
        if let Some((source, before)) = made.get(&from)
            && let Some(both) = then(before, &p)
        {
            (from, p) = (*source, both);
            node.inputs[0] = Some(from);
            node.attributes.set("perm", Attribute::Ints(p.clone()));
            report.fused.push(Rewrite { pattern: "Transpose pair", node: node.name.clone() });
        }
        if is_identity(&p) && !outputs.contains(&to) {
            alias.insert(to, from);
        }
        made.insert(to, (from, p));
    }
    graph.remove_dead();
}

/// What may be computed before a transpose instead of behind it.
fn movable(node: &Node) -> bool {
    let concat = node.is("Concat");
    let norm = node.domain == "disback" && NORMS.contains(&node.op.as_str()) && node.attributes.get("view").is_none();
    node.outputs.len() == 1 && node.captures.is_empty() && (op_schema::is_elementwise(node) || concat || norm)
}

/// How many inputs of a movable node have the axes of its result; the others keep their own.
pub(super) fn operands(node: &Node) -> usize {
    if NORMS.contains(&node.op.as_str()) {
        return 1;
    }
    op_schema::of(node).map_or(usize::MAX, |row| row.operands()).min(node.inputs.len())
}

/// Values that, behind a transpose `p`, lead to its inverse through movable nodes only. Along such a path no value can have
/// more dimensions than `p`.
fn leading_to_inverse(graph: &Graph, p: &[i64]) -> HashSet<ValueId> {
    let mut wanted: HashSet<ValueId> = HashSet::new();
    for node in graph.nodes.iter().rev() {
        let undoes = perm(node).is_some_and(|q| then(p, &q).is_some_and(|both| is_identity(&both)));
        let passes = movable(node) && node.output(0).is_some_and(|v| wanted.contains(&v));
        if undoes {
            wanted.extend(node.input(0));
        } else if passes {
            wanted.extend(node.inputs.iter().take(operands(node)).flatten());
        }
    }
    wanted
}

/// Computes movable nodes on what stands before their transposed operands, and transposes the result.
fn sink(graph: &mut Graph) {
    let perms: HashSet<Vec<i64>> = graph.nodes.iter().filter_map(perm).collect();
    // Networks transpose in a handful of ways; the graph is gone through once for each.
    const MOST_WAYS: usize = 64;
    if perms.len() > MOST_WAYS {
        return;
    }
    let wanted: HashMap<Vec<i64>, HashSet<ValueId>> =
        perms.into_iter().map(|p| (p.clone(), leading_to_inverse(graph, &p))).collect();
    let numbers: HashSet<ValueId> =
        graph.constants.iter().filter(|(_, c)| c.tensor.len() == 1).map(|(v, _)| *v).collect();
    // For a value that is a transpose of another: that one, and how.
    let mut moved: HashMap<ValueId, (ValueId, Vec<i64>)> = HashMap::new();
    for mut node in std::mem::take(&mut graph.nodes) {
        let Some(out) = node.output(0) else {
            graph.nodes.push(node);
            continue;
        };
        if let (Some(p), Some(from)) = (perm(&node), node.input(0)) {
            moved.insert(out, (from, p));
            graph.nodes.push(node);
            continue;
        }
        let p = node.inputs.iter().flatten().find_map(|v| moved.get(v)).map(|(_, p)| p.clone());
        let Some(p) = p.filter(|p| movable(&node) && wanted.get(p).is_some_and(|w| w.contains(&out))) else {
            graph.nodes.push(node);
            continue;
        };
        let before = |v: Option<ValueId>| v.and_then(|v| moved.get(&v)).filter(|(_, q)| *q == p).map(|(from, _)| *from);
        if NORMS.contains(&node.op.as_str()) {
            let Some(from) = before(node.input(0)) else {
                graph.nodes.push(node);
                continue;
            };
            node.inputs[0] = Some(from);
            node.attributes.set("view", Attribute::Ints(p.clone()));
        } else if node.is("Concat") {
            let axis = node.attributes.int("axis").ok().flatten().map(|a| if a < 0 { a + p.len() as i64 } else { a });
            let sources: Option<Vec<_>> = node.inputs.iter().map(|v| before(*v).map(Some)).collect();
            let (Some(sources), Some(&axis)) = (sources, axis.and_then(|a| p.get(usize::try_from(a).ok()?))) else {
                graph.nodes.push(node);
                continue;
            };
            node.inputs = sources;
            node.attributes.set("axis", Attribute::Int(axis));
        } else {
            for slot in 0..operands(&node) {
                let Some(v) = node.input(slot).filter(|v| !numbers.contains(v)) else { continue };
                node.inputs[slot] = Some(match before(Some(v)) {
                    Some(from) => from,
                    None => {
                        let name = format!("{} as before {}", graph.names[v], node.name);
                        let aligned = graph.add_value(&name);
                        graph.nodes.push(made("Align", "disback", &node, v, aligned, inverse(&p)));
                        aligned
                    }
                });
            }
        }
        let name = format!("{} before its transpose", graph.names[out]);
        let source = graph.add_value(&name);
        node.outputs[0] = Some(source);
        let transpose = made("Transpose", "", &node, source, out, p.clone());
        moved.insert(out, (source, p));
        graph.nodes.push(node);
        graph.nodes.push(transpose);
    }
    graph.remove_dead();
}

/// A node of ours beside `node`, from one value to another.
fn made(op: &str, domain: &str, node: &Node, from: ValueId, to: ValueId, perm: Vec<i64>) -> Node {
    Node {
        op: op.to_owned(),
        domain: domain.to_owned(),
        name: format!("{}/{op}", node.name),
        opset: if domain.is_empty() { 13 } else { 1 },
        inputs: vec![Some(from)],
        outputs: vec![Some(to)],
        attributes: Attributes::new([("perm".to_owned(), Attribute::Ints(perm))].into()),
        captures: Vec::new(),
        origin: None,
        module: node.module.clone(),
    }
}
