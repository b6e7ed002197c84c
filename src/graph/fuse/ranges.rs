//! Slices of one value along one axis, made together: where they part it without a gap, the backward pass then joins the
//! gradients once instead of filling each up with zeros and adding them.

use std::collections::{HashMap, HashSet};

use crate::graph::attributes::{Attribute, Attributes};
use crate::graph::fuse::view::View;
use crate::graph::fuse::{Report, Rewrite};
use crate::graph::ir::{Graph, ValueId};

/// A node, and the start and end of its slice.
type Part = (usize, i64, i64);

/// One `Slice` along one axis with step 1: what it reads, the axis, start and end.
fn slice(view: &View, i: usize) -> Option<(ValueId, i64, i64, i64)> {
    let node = view.node(i);
    if !node.is("Slice") || !node.captures.is_empty() || node.outputs.len() != 1 {
        return None;
    }
    let one = |k: usize| view.ints(node.input(k)).filter(|v| v.len() == 1).map(|v| v[0]);
    let step = if node.input(4).is_some() { one(4)? } else { 1 };
    (step == 1).then_some(())?;
    Some((node.input(0)?, one(3)?, one(1)?, one(2)?))
}

/// Joins the slices of each value.
pub(super) fn join(graph: &mut Graph, trained: &HashSet<ValueId>, report: &mut Report) {
    let view = View::new(graph, trained);
    let mut groups: HashMap<(ValueId, i64), Vec<Part>> = HashMap::new();
    for i in 0..graph.nodes.len() {
        if let Some((x, axis, start, end)) = slice(&view, i)
            && !view.is_host(x)
        {
            groups.entry((x, axis)).or_default().push((i, start, end));
        }
    }
    // In the order of their bounds, each beginning where the one before ends; whether they cover everything shows at run time.
    let mut joined: Vec<(i64, Vec<Part>)> = Vec::new();
    for ((_, axis), mut list) in groups {
        list.sort_by_key(|&(i, start, _)| (start, i));
        if list.len() > 1 && list[0].1 == 0 && list.windows(2).all(|w| w[0].2 == w[1].1) {
            joined.push((axis, list));
        }
    }
    // The report lists them in the graph's order.
    joined.sort_by_key(|(_, list)| list[0].0);
    let mut gone: HashSet<usize> = HashSet::new();
    for (axis, list) in joined {
        let first = list.iter().map(|l| l.0).min().expect("two at least");
        let outputs = list.iter().map(|l| graph.nodes[l.0].outputs[0]).collect();
        let bounds = list.iter().flat_map(|l| [l.1, l.2]).collect();
        gone.extend(list.iter().map(|l| l.0).filter(|&i| i != first));
        let node = &mut graph.nodes[first];
        report.fused.push(Rewrite { pattern: "Slices", node: node.name.clone() });
        node.op = "Ranges".into();
        node.domain = "disback".into();
        node.opset = 1;
        node.inputs.truncate(1);
        node.outputs = outputs;
        node.attributes = Attributes::new(
            [("axis", Attribute::Int(axis)), ("bounds", Attribute::Ints(bounds))]
                .map(|(k, v)| (k.to_owned(), v))
                .into_iter()
                .collect(),
        );
        node.origin = None;
    }
    let mut i = 0;
    graph.nodes.retain(|_| {
        i += 1;
        !gone.contains(&(i - 1))
    });
    graph.remove_dead();
}
