//! Transposes in transformers. Heads are cut out of one projection by a transpose and slices or a split of what it gives:
//! parted first and turned afterwards, the backward pass writes the projection's gradient once, in its own order. And
//! PyTorch's exporter turns the keys on three axes between two reshapes, which copies them: on their own axes it is a view. What
//! comes out of a patch embedding is a transposed view, which the sums of the residual stream keep: every norm on the way would
//! copy it to have its channels side by side, so it is copied once, where it is made.

use std::collections::{HashMap, HashSet};

use crate::graph::attributes::{Attribute, Attributes};
use crate::graph::fuse::layout::{self, perm};
use crate::graph::fuse::pattern::{host, op, value};
use crate::graph::fuse::rule::{Replacement, Rule};
use crate::graph::fuse::{Report, Rewrite};
use crate::graph::ir::{Graph, Node, ValueId};
use crate::graph::op_schema;

pub(super) fn rules() -> Vec<Rule> {
    let flat = op("Reshape", [value("x"), host("flat")]).named("first");
    let turned = op("Transpose", [flat]).named("turn");
    vec![Rule {
        name: "TransposeLast",
        patterns: vec![op("Reshape", [turned, host("back")]).named("last")],
        near: None,
        check: |view, c| {
            let node = |name: &str| c.call(name).map(|i| view.node(i)).ok_or_else(|| format!("no {name}"));
            if perm(node("turn")?).as_deref() != Some(&[0, 2, 1]) {
                return Err("the last two of three axes are not exchanged".into());
            }
            for name in ["first", "last"] {
                if node(name)?.attributes.int("allowzero").ok().flatten().is_some_and(|z| z != 0) {
                    return Err("a reshape takes zeros as they are".into());
                }
            }
            let inputs = ["x", "flat", "back"].map(|name| c.value(name)).to_vec();
            Ok(Replacement { op: "TransposeLast", inputs, attributes: Vec::new() })
        },
    }]
}

/// Moves transposes behind the slices or the split that alone read them.
pub(super) fn part_first(graph: &mut Graph, report: &mut Report) {
    let consumers = graph.consumers();
    // By the value that is transposed: what it was before, and how.
    let mut turned: HashMap<ValueId, (ValueId, Vec<i64>)> = HashMap::new();
    for mut node in std::mem::take(&mut graph.nodes) {
        if let (Some(p), Some(from), Some(to)) = (perm(&node), node.input(0), node.output(0)) {
            turned.insert(to, (from, p));
        }
        let parts = node.is("Split") || (node.domain == "disback" && node.op == "Ranges");
        let source = node.input(0).filter(|v| consumers.get(v).is_some_and(|readers| readers.len() == 1));
        let Some((from, p)) = source.and_then(|v| turned.get(&v)).filter(|_| parts) else {
            graph.nodes.push(node);
            continue;
        };
        let axis = node.attributes.int_or("axis", 0).unwrap_or(0);
        let axis = if axis < 0 { axis + p.len() as i64 } else { axis };
        let Some(&axis) = usize::try_from(axis).ok().and_then(|a| p.get(a)) else {
            graph.nodes.push(node);
            continue;
        };
        report.fused.push(Rewrite { pattern: "Parts before a transpose", node: node.name.clone() });
        node.inputs[0] = Some(*from);
        node.attributes.set("axis", Attribute::Int(axis));
        let p = p.clone();
        let mut turns = Vec::new();
        for out in node.outputs.iter_mut() {
            let Some(to) = *out else { continue };
            let name = format!("{} before its transpose", graph.names[to]);
            let part = graph.add_value(&name);
            *out = Some(part);
            turns.push(Node {
                op: "Transpose".into(),
                domain: String::new(),
                name: format!("{}/Transpose {}", node.name, turns.len()),
                opset: 13,
                inputs: vec![Some(part)],
                outputs: vec![Some(to)],
                attributes: Attributes::new([("perm".to_owned(), Attribute::Ints(p.clone()))].into()),
                captures: Vec::new(),
                origin: None,
                module: node.module.clone(),
            });
        }
        graph.nodes.push(node);
        graph.nodes.extend(turns);
    }
    graph.remove_dead();
}

/// Operators over the last axis that want its elements side by side.
fn wants_rows(node: &Node) -> bool {
    let last = |axis: i64| axis == -1;
    match (node.domain.as_str(), node.op.as_str()) {
        ("", "LayerNormalization" | "RMSNormalization") => node.attributes.int_or("axis", -1).is_ok_and(last),
        ("disback", "Normalize") => {
            let axes = node.attributes.ints("axes").ok().flatten();
            axes.is_some_and(|a| a.len() == 1 && last(a[0])) && node.attributes.get("view").is_none()
        }
        _ => false,
    }
}

/// Copies a transposed value whose last axis was another one, where it goes through sums and their like to a norm over that
/// axis.
pub(super) fn straighten(graph: &mut Graph, report: &mut Report) {
    // Values that lead to such a norm with their axes as they are.
    let mut wanted: HashSet<ValueId> = HashSet::new();
    for node in graph.nodes.iter().rev() {
        if wants_rows(node) {
            wanted.extend(node.input(0));
        } else if op_schema::is_elementwise(node) && node.outputs.iter().flatten().any(|v| wanted.contains(v)) {
            wanted.extend(node.inputs.iter().take(layout::operands(node)).flatten());
        }
    }
    for mut node in std::mem::take(&mut graph.nodes) {
        let moved = perm(&node).is_some_and(|p| p.last() != Some(&(p.len() as i64 - 1)));
        let Some(to) = node.output(0).filter(|v| moved && wanted.contains(v)) else {
            graph.nodes.push(node);
            continue;
        };
        report.fused.push(Rewrite { pattern: "Copy once", node: node.name.clone() });
        let name = format!("{} as a view", graph.names[to]);
        let seen = graph.add_value(&name);
        node.outputs[0] = Some(seen);
        let copy = Node {
            op: "Contiguous".into(),
            domain: "disback".into(),
            name: format!("{}/Contiguous", node.name),
            opset: 1,
            inputs: vec![Some(seen)],
            outputs: vec![Some(to)],
            attributes: Attributes::new(Default::default()),
            captures: Vec::new(),
            origin: None,
            module: node.module.clone(),
        };
        graph.nodes.extend([node, copy]);
    }
}
