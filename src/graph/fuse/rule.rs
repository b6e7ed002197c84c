//! Rules: a name, patterns, and the checks that a pattern alone cannot make; and the loop that applies one everywhere.

use std::collections::{HashMap, HashSet};

use crate::graph::attributes::{Attribute, Attributes};
use crate::graph::fuse::pattern::{self, Captures, Furthest, Pattern};
use crate::graph::fuse::view::View;
use crate::graph::fuse::{NearMiss, Report};
use crate::graph::ir::{Graph, Node, ValueId};

/// The call that takes a chain's place.
pub(super) struct Replacement {
    pub op: &'static str,
    pub inputs: Vec<Option<ValueId>>,
    pub attributes: Vec<(String, Attribute)>,
}

/// One rewrite.
pub(super) struct Rule {
    /// What it makes, as `inspect` calls it.
    pub name: &'static str,
    /// Tried in order at every node.
    pub patterns: Vec<Pattern>,
    /// How many calls must fit before a misfit is a near miss (a failed check is one anyway); `None`: nothing is reported.
    pub near: Option<usize>,
    /// The call, or why not.
    pub check: fn(&View, &Captures) -> Result<Replacement, String>,
}

/// Applies a rule until it applies nowhere. Near misses are those of the last round: what an inner rewrite made fit, fits.
pub(super) fn exhaust(graph: &mut Graph, trained: &HashSet<ValueId>, rule: &Rule, report: &mut Report) {
    loop {
        let view = View::new(graph, trained);
        let mut taken: HashSet<usize> = HashSet::new();
        let mut found: HashMap<usize, Replacement> = HashMap::new();
        let mut missed = Vec::new();
        for i in 0..view.graph.nodes.len() {
            match attempt(&view, rule, i) {
                Ok((captures, replacement)) => {
                    let own: Vec<usize> = captures.nodes.iter().copied().filter(|&n| !free(&view, n)).collect();
                    // Two chains of one round may share a node: the second one waits for the next round.
                    if !own.iter().any(|n| taken.contains(n)) {
                        taken.extend(own);
                        found.insert(i, replacement);
                    }
                }
                Err(Some(reason)) => {
                    missed.push(NearMiss { pattern: rule.name, node: view.node(i).name.clone(), reason });
                }
                Err(None) => {}
            }
        }
        if found.is_empty() {
            report.near_misses.extend(missed);
            return;
        }
        for (i, replacement) in found {
            let node = &mut graph.nodes[i];
            node.op = replacement.op.to_owned();
            node.domain = "disback".to_owned();
            node.opset = 1;
            node.inputs = replacement.inputs;
            node.attributes = Attributes::new(replacement.attributes.into_iter().collect());
            node.origin = None;
        }
        graph.remove_dead();
    }
}

/// Whether a node costs nothing, so that it may stay behind for other readers: a view, or host arithmetic.
fn free(view: &View, i: usize) -> bool {
    let node = view.node(i);
    let is_view = ["Transpose", "Reshape", "Unsqueeze", "Squeeze", "Identity"].iter().any(|op| node.is(op));
    is_view || node.outputs.iter().flatten().all(|&v| view.is_host(v))
}

/// A replacement, or the reason of a near miss, or nothing.
fn attempt(view: &View, rule: &Rule, root: usize) -> Result<(Captures, Replacement), Option<String>> {
    let mut reason = None;
    let mut furthest = Furthest::default();
    for p in &rule.patterns {
        match pattern::find(view, p, root) {
            Err(f) if f.steps > furthest.steps => furthest = f,
            Err(_) => {}
            Ok(captures) => match used_elsewhere(view, &captures).map_or_else(|| (rule.check)(view, &captures), Err) {
                Ok(replacement) => return Ok((captures, replacement)),
                Err(why) => {
                    reason.get_or_insert(why);
                }
            },
        }
    }
    let Some(least) = rule.near else { return Err(None) };
    Err(reason.or((furthest.calls >= least).then_some(furthest.reason)))
}

/// Says which inner value something else reads.
fn used_elsewhere(view: &View, captures: &Captures) -> Option<String> {
    captures.nodes[1..].iter().filter(|&&i| !free(view, i)).find_map(|&i| {
        let (v, reader) = view.read_outside(i, &captures.nodes)?;
        Some(format!("value `{}` is also used by {reader}", view.name(v)))
    })
}

/// An attribute list of a replacement.
pub(super) fn attributes<const N: usize>(list: [(&str, Attribute); N]) -> Vec<(String, Attribute)> {
    list.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
}

/// The attributes of a node that a rule extends.
pub(super) fn kept(node: &Node) -> Vec<(String, Attribute)> {
    node.attributes.iter().map(|(k, v)| (k.to_owned(), v.clone())).collect()
}
