//! Raising: chains of small operators that exporters make of GroupNorm, SiLU, GELU and attention become single nodes of
//! the `disback` domain again. Faster, and they save less for the backward pass.
//!
//! A rewrite never touches a value that something outside the pattern reads, and every raised kernel computes exactly what
//! the chain computed, whatever the shapes turn out to be at run time.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::graph::attributes::{Attribute, Attributes};
use crate::graph::ir::{Graph, Node, ValueId};

/// One rewrite that was done, or nearly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rewrite {
    /// What was made (`GroupNorm`, `SiLU`, `Gelu`, `Attention`).
    pub pattern: &'static str,
    /// The node at which the pattern ends.
    pub node: String,
}

/// A pattern that fitted but for one thing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NearMiss {
    pub pattern: &'static str,
    pub node: String,
    pub reason: String,
}

/// What [`raise`] did.
#[derive(Debug, Clone, Default)]
pub struct Report {
    pub raised: Vec<Rewrite>,
    pub near_misses: Vec<NearMiss>,
}

impl Report {
    /// Number of rewrites by pattern.
    pub fn counts(&self) -> BTreeMap<&'static str, usize> {
        let mut map = BTreeMap::new();
        for r in &self.raised {
            *map.entry(r.pattern).or_default() += 1;
        }
        map
    }
}

/// Rewrites the graph in place.
pub fn raise(graph: &mut Graph) -> Report {
    let mut report = Report::default();
    // Sigmoid and erf chains first: they may stand behind a norm but never inside one.
    for pass in [silu, gelu, group_norm, attention] {
        loop {
            let view = View::new(graph);
            let found: Vec<Match> = (0..graph.nodes.len()).filter_map(|i| pass(&view, i, &mut report)).collect();
            if found.is_empty() {
                break;
            }
            apply(graph, found, &mut report);
        }
    }
    report.near_misses.sort_by(|a, b| a.node.cmp(&b.node));
    report.near_misses.dedup();
    report
}

/// A pattern found: which nodes go, and the one that takes their place.
struct Match {
    pattern: &'static str,
    /// All nodes of the chain; the last one makes the output.
    nodes: Vec<usize>,
    inputs: Vec<Option<ValueId>>,
    attributes: Vec<(&'static str, Attribute)>,
}

fn apply(graph: &mut Graph, found: Vec<Match>, report: &mut Report) {
    let mut gone: HashSet<usize> = HashSet::new();
    let mut placed: HashMap<usize, Node> = HashMap::new();
    for m in found {
        if m.nodes.iter().any(|i| gone.contains(i)) {
            continue;
        }
        let last = *m.nodes.last().expect("a match has nodes");
        let end = &graph.nodes[last];
        report.raised.push(Rewrite { pattern: m.pattern, node: end.name.clone() });
        let node = Node {
            op: m.pattern.to_owned(),
            domain: "disback".to_owned(),
            name: end.name.clone(),
            opset: 1,
            inputs: m.inputs,
            outputs: end.outputs.clone(),
            attributes: Attributes::new(m.attributes.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()),
            captures: Vec::new(),
            origin: None,
            module: end.module.clone(),
        };
        gone.extend(&m.nodes);
        placed.insert(last, node);
    }
    let nodes = std::mem::take(&mut graph.nodes);
    for (i, node) in nodes.into_iter().enumerate() {
        if let Some(new) = placed.remove(&i) {
            graph.nodes.push(new);
        } else if !gone.contains(&i) {
            graph.nodes.push(node);
        }
    }
}

/// The graph with its edges, for matching.
struct View<'a> {
    graph: &'a Graph,
    producers: HashMap<ValueId, usize>,
    consumers: HashMap<ValueId, Vec<(usize, usize)>>,
    /// Values known from constants and shapes alone.
    host: HashSet<ValueId>,
}

impl<'a> View<'a> {
    fn new(graph: &'a Graph) -> Self {
        let mut host: HashSet<ValueId> = graph.constants.keys().copied().collect();
        for node in &graph.nodes {
            let shape = node.is("Shape") || node.is("Size");
            if shape || (node.captures.is_empty() && node.inputs.iter().flatten().all(|v| host.contains(v))) {
                host.extend(node.outputs.iter().flatten());
            }
        }
        Self { graph, producers: graph.producers(), consumers: graph.consumers(), host }
    }

    /// The node that makes `v`, if it is this operator of the default domain and nothing else reads `v`.
    fn only(&self, v: Option<ValueId>, op: &str) -> Option<usize> {
        let i = self.maker(v, op)?;
        (self.consumers.get(&v?)?.len() == 1).then_some(i)
    }

    /// The node that makes `v`, if it is this operator.
    fn maker(&self, v: Option<ValueId>, op: &str) -> Option<usize> {
        let &i = self.producers.get(&v?)?;
        self.graph.nodes[i].is(op).then_some(i)
    }

    fn node(&self, i: usize) -> &'a Node {
        &self.graph.nodes[i]
    }

    /// The single element of a constant.
    fn number(&self, v: Option<ValueId>) -> Option<f64> {
        let t = &self.graph.constants.get(&v?)?.tensor;
        (t.len() == 1).then(|| t.to_f64()[0])
    }

    /// `(data, number)` of a binary node one of whose operands is a constant number.
    fn with_number(&self, i: usize) -> Option<(Option<ValueId>, f64)> {
        let n = self.node(i);
        match (self.number(n.input(0)), self.number(n.input(1))) {
            (None, Some(c)) => Some((n.input(0), c)),
            (Some(c), None) => Some((n.input(1), c)),
            _ => None,
        }
    }
}

fn near(report: &mut Report, view: &View, pattern: &'static str, node: usize, reason: &str) {
    report.near_misses.push(NearMiss { pattern, node: view.node(node).name.clone(), reason: reason.to_owned() });
}

/// `x * sigmoid(x)`.
fn silu(view: &View, i: usize, report: &mut Report) -> Option<Match> {
    let mul = view.node(i);
    if !mul.is("Mul") {
        return None;
    }
    for (a, b) in [(0, 1), (1, 0)] {
        let Some(s) = view.maker(mul.input(b), "Sigmoid") else { continue };
        if view.node(s).input(0) != mul.input(a) {
            continue;
        }
        if view.only(mul.input(b), "Sigmoid").is_none() {
            near(report, view, "SiLU", i, "the sigmoid is also used elsewhere");
            return None;
        }
        return Some(Match { pattern: "SiLU", nodes: vec![s, i], inputs: vec![mul.input(a)], attributes: vec![] });
    }
    None
}

/// `x * 0.5 * (1 + erf(x / sqrt 2))` in any order of the factors.
fn gelu(view: &View, i: usize, _: &mut Report) -> Option<Match> {
    let close = |a: f64, b: f64| (a - b).abs() < 1e-6 * b.abs();
    // The last Mul of three: ((x * (1 + erf)) * 0.5), (x * 0.5) * (1 + erf), (0.5 * (1 + erf)) * x.
    let end = view.node(i);
    if !end.is("Mul") {
        return None;
    }
    let one_plus_erf = |v: Option<ValueId>| -> Option<(ValueId, Vec<usize>)> {
        let add = view.only(v, "Add")?;
        let (inner, one) = view.with_number(add)?;
        let erf = view.only(inner, "Erf").filter(|_| close(one, 1.0))?;
        let scaled = view.node(erf).input(0);
        let (scale, by) = match (view.only(scaled, "Div"), view.only(scaled, "Mul")) {
            (Some(d), _) => (d, 1.0 / view.number(view.node(d).input(1))?),
            (_, Some(m)) => (m, view.with_number(m)?.1),
            _ => return None,
        };
        let x = view.with_number(scale)?.0?;
        close(by, std::f64::consts::FRAC_1_SQRT_2).then(|| (x, vec![scale, erf, add]))
    };
    let done = |x: ValueId, mut nodes: Vec<usize>, more: &[usize]| {
        nodes.extend(more);
        Some(Match {
            pattern: "Gelu",
            nodes,
            inputs: vec![Some(x)],
            attributes: vec![("approximate", Attribute::String("none".into()))],
        })
    };
    for (a, b) in [(0, 1), (1, 0)] {
        let (p, q) = (end.input(a), end.input(b));
        // (x * (1 + erf)) * 0.5
        if let (Some(m), Some(half)) = (view.only(p, "Mul"), view.number(q)) {
            for (c, d) in [(0, 1), (1, 0)] {
                let inner = view.node(m);
                if let Some((x, nodes)) = one_plus_erf(inner.input(d))
                    && inner.input(c) == Some(x)
                    && close(half, 0.5)
                {
                    return done(x, nodes, &[m, i]);
                }
            }
        }
        if let Some((x, nodes)) = one_plus_erf(q) {
            // (x * 0.5) * (1 + erf)
            if let Some(m) = view.only(p, "Mul")
                && view.with_number(m).is_some_and(|(v, c)| v == Some(x) && close(c, 0.5))
            {
                return done(x, nodes, &[m, i]);
            }
        }
        // x * (0.5 * (1 + erf))
        if let Some(m) = view.only(q, "Mul")
            && let Some((v, c)) = view.with_number(m)
            && let Some((x, nodes)) = one_plus_erf(v)
            && p == Some(x)
            && close(c, 0.5)
        {
            return done(x, nodes, &[m, i]);
        }
    }
    None
}

/// Reshape to `[N, G, ...]`, InstanceNormalization with ones and zeros, Reshape back, Mul by a scale and Add of a bias a
/// channel: torch's GroupNorm below opset 21. The two shapes travel along, so that the kernel can check them.
fn group_norm(view: &View, i: usize, report: &mut Report) -> Option<Match> {
    let add = view.node(i);
    if !add.is("Add") {
        return None;
    }
    for (a, b) in [(0, 1), (1, 0)] {
        let Some(mul) = view.maker(add.input(a), "Mul") else { continue };
        for (c, d) in [(0, 1), (1, 0)] {
            let m = view.node(mul);
            let Some(back) = view.maker(m.input(c), "Reshape") else { continue };
            let Some(norm) = view.maker(view.node(back).input(0), "InstanceNormalization") else { continue };
            let Some(split) = view.maker(view.node(norm).input(0), "Reshape") else { continue };
            let miss = |report: &mut Report, why: &str| {
                near(report, view, "GroupNorm", i, why);
                None
            };
            let single = |v: Option<ValueId>| v.and_then(|v| view.consumers.get(&v)).is_some_and(|u| u.len() == 1);
            if ![add.input(a), m.input(c), view.node(back).input(0), view.node(norm).input(0)].into_iter().all(single) {
                return miss(report, "a value inside the chain is used elsewhere");
            }
            let constant = |v: Option<ValueId>| v.and_then(|v| view.graph.constants.get(&v)).map(|c| &c.tensor);
            let all = |v: Option<ValueId>, n: f64| constant(v).is_some_and(|t| t.to_f64().iter().all(|&x| x == n));
            let n = view.node(norm);
            if !all(n.input(1), 1.0) || !all(n.input(2), 0.0) {
                return miss(report, "the instance norm has a scale or bias of its own");
            }
            let groups = constant(n.input(1))?.len();
            let (scale, bias) = (m.input(d), add.input(b));
            let per_channel = |v: Option<ValueId>| {
                constant(v).filter(|t| {
                    let s = t.shape();
                    let trailing = s.iter().rev().take_while(|&&k| k == 1).count();
                    // [C, 1, 1] or [1, C, 1, 1]: one run of channels before the spatial ones.
                    t.len() > 1 && trailing >= 1 && s.iter().filter(|&&k| k > 1).count() == 1 && s.len() - trailing <= 2
                })
            };
            let (Some(s), Some(t)) = (per_channel(scale), per_channel(bias)) else {
                return miss(report, "scale or bias is not one number a channel");
            };
            if s.len() != t.len() || s.len() % groups != 0 {
                return miss(report, "scale, bias and groups do not fit");
            }
            let trailing = |t: &crate::tensor::HostTensor| t.shape().iter().rev().take_while(|&&k| k == 1).count();
            if trailing(s) != trailing(t) {
                return miss(report, "scale and bias lie on different axes");
            }
            let (inner, outer) = (view.node(split).input(1), view.node(back).input(1));
            if ![inner, outer].iter().all(|v| v.is_some_and(|v| view.host.contains(&v))) {
                return miss(report, "a shape inside the chain depends on the data");
            }
            let eps = n.attributes.float_or("epsilon", 1e-5).ok()?;
            return Some(Match {
                pattern: "GroupNorm",
                nodes: vec![split, norm, back, mul, i],
                inputs: vec![view.node(split).input(0), scale, bias, inner, outer],
                attributes: vec![
                    ("groups", Attribute::Int(groups as i64)),
                    ("spatial", Attribute::Int(trailing(s) as i64)),
                    ("epsilon", Attribute::Float(eps as f32)),
                ],
            });
        }
    }
    None
}

/// `softmax((q s1) (k^T s2)) v`: scaled dot-product attention. The scales may be constants or follow from shapes.
fn attention(view: &View, i: usize, report: &mut Report) -> Option<Match> {
    let end = view.node(i);
    if !end.is("MatMul") {
        return None;
    }
    let softmax = view.maker(end.input(0), "Softmax")?;
    let s = view.node(softmax);
    if view.only(end.input(0), "Softmax").is_none() {
        near(report, view, "Attention", i, "the attention weights are also used elsewhere");
        return None;
    }
    if s.attributes.int_or("axis", if s.opset < 13 { 1 } else { -1 }).ok()? != -1 {
        near(report, view, "Attention", i, "the softmax does not run over the last axis");
        return None;
    }
    let mut nodes = vec![softmax];
    let mut scales: Vec<Option<ValueId>> = Vec::new();
    // A factor after the product, in the other scale style.
    let mut scores = s.input(0);
    if let Some((m, data, factor)) = scaled(view, scores) {
        nodes.push(m);
        scales.push(Some(factor));
        scores = data;
    }
    let Some(product) = view.only(scores, "MatMul") else {
        if scores.is_some_and(|v| view.producers.contains_key(&v)) {
            let maker = &view.node(view.producers[&scores?]).op;
            near(report, view, "Attention", i, &format!("{maker} stands between the product and the softmax"));
        }
        return None;
    };
    nodes.push(product);
    let operand = |v: Option<ValueId>, nodes: &mut Vec<usize>, scales: &mut Vec<Option<ValueId>>| match scaled(view, v)
    {
        Some((m, data, factor)) => {
            nodes.push(m);
            scales.push(Some(factor));
            data
        }
        None => v,
    };
    let q = operand(view.node(product).input(0), &mut nodes, &mut scales);
    let k = operand(view.node(product).input(1), &mut nodes, &mut scales);
    nodes.push(i);
    let mut inputs = vec![q, k, end.input(1)];
    inputs.extend(scales);
    Some(Match { pattern: "Attention", nodes, inputs, attributes: vec![] })
}

/// `x * c` or `x / c`... with `c` a single number known on the host; only Mul, so that the kernel has one meaning.
fn scaled(view: &View, v: Option<ValueId>) -> Option<(usize, Option<ValueId>, ValueId)> {
    let m = view.only(v, "Mul")?;
    let n = view.node(m);
    for (data, factor) in [(0, 1), (1, 0)] {
        let f = n.input(factor)?;
        let single = view.graph.constants.get(&f).is_none_or(|c| c.tensor.len() == 1);
        if view.host.contains(&f) && single && n.input(data).is_some_and(|d| !view.host.contains(&d)) {
            return Some((m, n.input(data), f));
        }
    }
    None
}
