//! Fusing: chains of small operators that exporters make of norms, activations and attention become single calls of the
//! `disback` domain again. Faster, and they save less for the backward pass. Beside that, what exporters write twice is
//! computed once, casts that change nothing go, transposes that undo each other meet and vanish, slices that part a value are
//! made together and before a transpose, and a layer's product and bias are one call.
//!
//! Fusing changes the plan only: the file that the weights are written back into keeps its nodes. A rewrite never swallows
//! a value that something outside the pattern reads (views and host arithmetic, which cost nothing, stay behind for their
//! other readers), and a fused kernel computes what the chain computed, whatever the shapes turn out to be at run time:
//! where they are not those of the native call, it computes the chain.

mod activation;
mod attention;
mod casts;
mod cse;
mod layout;
mod linear;
mod norm;
mod pattern;
mod ranges;
mod rule;
mod transposes;
mod view;

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::error::Result;
use crate::graph::ir::{Graph, ValueId};
use crate::graph::pass::{Pass, run_in_order};
use rule::Rule;

/// One rewrite that was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rewrite {
    /// What was made (`GroupNorm`, `SiLU`, `Attention`...) or taken away (`Transpose pair`, `Repeat`...).
    pub pattern: &'static str,
    /// The node at which the pattern ends.
    pub node: String,
}

/// A pattern that fitted but for one thing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NearMiss {
    /// The operator that would have been made, such as `GroupNorm` or `Attention`.
    pub pattern: &'static str,
    /// The name of the node at which the chain ends.
    pub node: String,
    /// What did not fit, in words for the user.
    pub reason: String,
}

/// What [`fuse`] did.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// The rewrites that were done and are still in the graph.
    pub fused: Vec<Rewrite>,
    /// The patterns that nearly fitted, sorted by node; each pattern at most once a node.
    pub near_misses: Vec<NearMiss>,
}

impl Report {
    /// Number of rewrites by pattern.
    pub fn counts(&self) -> BTreeMap<&'static str, usize> {
        let mut map = BTreeMap::new();
        for r in &self.fused {
            *map.entry(r.pattern).or_default() += 1;
        }
        map
    }
}

/// What the passes of fusing share.
struct Fusing {
    /// Constants that training changes: their numbers decide nothing here.
    trained: HashSet<ValueId>,
    report: Report,
}

/// A rewrite of the whole graph under a name.
struct Rewriting(&'static str, fn(&mut Graph, &mut Fusing));

impl Pass<Graph, Fusing> for Rewriting {
    fn name(&self) -> &'static str {
        self.0
    }
    fn applies(&self, graph: &Graph, _: &Fusing) -> bool {
        !graph.nodes.is_empty()
    }
    fn run(&self, graph: &mut Graph, fusing: &mut Fusing) -> Result<()> {
        self.1(graph, fusing);
        Ok(())
    }
    fn keeps_values(&self) -> bool {
        true
    }
}

/// Applies rules one after the other, each everywhere.
fn apply(rules: impl IntoIterator<Item = Rule>, graph: &mut Graph, fusing: &mut Fusing) {
    for rule in rules {
        rule::exhaust(graph, &fusing.trained, &rule, &mut fusing.report);
    }
}

/// Gives the fused nodes the names of what they turned out to be.
fn name_results(graph: &mut Graph) {
    for node in graph.nodes.iter_mut().filter(|n| n.domain == "disback") {
        node.op = norm::final_name(node).to_owned();
    }
}

const CASTS: Rewriting = Rewriting("casts", |g, r| casts::simplify(g, &mut r.report));
const CSE: Rewriting = Rewriting("cse", |g, r| cse::merge(g, &r.trained, &mut r.report));
const NORMS: Rewriting = Rewriting("norms", |g, r| apply(norm::rules(), g, r));
const ATTENTION: Rewriting = Rewriting("attention", |g, r| apply(attention::rules(), g, r));

/// What an imported graph goes through, in this order: later passes read what earlier ones made.
const ON_IMPORT: &[&dyn Pass<Graph, Fusing>] = &[
    &CASTS,
    &CSE,
    &Rewriting("activations", |g, r| apply(activation::rules(), g, r)),
    &NORMS,
    &Rewriting("transposes", |g, r| apply(transposes::rules(), g, r)),
    &ATTENTION,
    &Rewriting("linear", |g, r| apply(linear::rules(), g, r)),
    &Rewriting("layout", |g, r| layout::cancel(g, &mut r.report)),
    &Rewriting("ranges", |g, r| ranges::join(g, &r.trained, &mut r.report)),
    &Rewriting("parts-first", |g, r| transposes::part_first(g, &mut r.report)),
    &Rewriting("views", |g, r| transposes::straighten(g, &mut r.report)),
    &Rewriting("names", |g, _| name_results(g)),
];

/// The chains of norms, GELU and attention alone: what ONNX has operators for.
const FOR_EXPORT: &[&dyn Pass<Graph, Fusing>] = &[
    &CASTS,
    &CSE,
    &Rewriting("gelu", |g, r| apply(activation::rules().into_iter().filter(|rule| rule.name == "Gelu"), g, r)),
    &NORMS,
    &ATTENTION,
    &Rewriting("names", |g, _| name_results(g)),
];

/// Rewrites the graph in place. `trained` are the constants that training changes: their numbers decide nothing here.
pub fn fuse(graph: &mut Graph, trained: &HashSet<ValueId>) -> Report {
    let mut fusing = Fusing { trained: trained.clone(), report: Report::default() };
    run(ON_IMPORT, graph, &mut fusing);
    let mut report = fusing.report;
    // What is in the graph now is what was fused; what a rule left behind may have been taken up by a later one.
    for node in graph.nodes.iter().filter(|n| n.domain == "disback") {
        if let Some(pattern) = FUSED.iter().find(|p| **p == node.op) {
            report.fused.push(Rewrite { pattern, node: node.name.clone() });
        }
    }
    // A node may have become something else than what it nearly was.
    let mut now: HashMap<&str, Vec<&str>> = report.near_misses.iter().map(|m| (m.node.as_str(), Vec::new())).collect();
    for n in &graph.nodes {
        if let Some(ops) = now.get_mut(n.name.as_str()) {
            ops.push(&n.op);
        }
    }
    let missed = |m: &NearMiss| now[m.node.as_str()].iter().any(|op| !m.pattern.contains(op));
    let still: Vec<bool> = report.near_misses.iter().map(missed).collect();
    let mut still = still.into_iter();
    report.near_misses.retain(|_| still.next().unwrap_or(false));
    report.near_misses.sort_by(|a, b| (&a.node, a.pattern).cmp(&(&b.node, b.pattern)));
    report.near_misses.dedup_by(|a, b| a.node == b.node && a.pattern == b.pattern);
    report
}

/// The chains of norms, GELU and attention alone, of a graph that is not trained: what `export` writes as ONNX's own
/// operators. Activations that ONNX has no operator for in most operator sets, and transposes, stay as they are.
pub(crate) fn fuse_for_export(graph: &mut Graph) {
    run(FOR_EXPORT, graph, &mut Fusing { trained: HashSet::new(), report: Report::default() });
}

/// No pass of fusing fails: one that does not fit leaves the graph as it is.
fn run(list: &[&dyn Pass<Graph, Fusing>], graph: &mut Graph, fusing: &mut Fusing) {
    if let Err(e) = run_in_order(list, graph, fusing) {
        debug_assert!(false, "{e}");
    }
}

/// Operators of the `disback` domain that stand for a chain of the file.
const FUSED: &[&str] =
    &["SiLU", "Gelu", "Mish", "GroupNorm", "LayerNorm", "RMSNorm", "TransposeLast", "Attention", "Linear"];
