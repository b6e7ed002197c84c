//! Repeated work: calls of one operator with equal attributes on the same values are made once. Exporters write the shape
//! arithmetic of a dynamic batch anew for every layer.

use std::collections::{HashMap, HashSet};
use std::fmt::Write;
use std::hash::{DefaultHasher, Hash, Hasher};

use crate::graph::attributes::Attribute;
use crate::graph::fuse::{Report, Rewrite};
use crate::graph::ir::{Graph, Node, ValueId};

/// Constants of at most this many elements are compared by their elements.
const SMALL: usize = 16;

/// Merges equal calls. Weights stay apart even where they are equal: training parts them.
pub(super) fn merge(graph: &mut Graph, trained: &HashSet<ValueId>, report: &mut Report) {
    let outputs: HashSet<ValueId> = graph.outputs.iter().map(|p| p.value).collect();
    let mut alias: HashMap<ValueId, ValueId> = HashMap::new();
    let mut constants: HashMap<String, ValueId> = HashMap::new();
    for (&v, c) in graph.constants.iter().filter(|(v, c)| !trained.contains(v) && c.tensor.len() <= SMALL) {
        let key = format!("{} {:?} {:?}", c.tensor.dtype(), c.tensor.shape(), c.tensor.bytes());
        let first = *constants.entry(key).or_insert(v);
        if first != v && !outputs.contains(&v) {
            alias.insert(v, first);
        }
    }
    // By a hash of their keys, which of a large graph take more memory than the graph: keys are compared where hashes are equal.
    let mut calls: HashMap<u64, usize> = HashMap::new();
    let mut gone: HashSet<usize> = HashSet::new();
    for i in 0..graph.nodes.len() {
        for v in graph.nodes[i].inputs.iter_mut().flatten() {
            *v = alias.get(v).copied().unwrap_or(*v);
        }
        let node = &graph.nodes[i];
        let Some(key_of) = key(node) else { continue };
        if node.outputs.iter().flatten().any(|v| outputs.contains(v)) {
            continue;
        }
        let mut hasher = DefaultHasher::new();
        key_of.hash(&mut hasher);
        let hash = hasher.finish();
        match calls.get(&hash) {
            Some(&first) if key(&graph.nodes[first]).as_ref() != Some(&key_of) => {}
            Some(&first) if graph.nodes[first].outputs.len() >= node.outputs.len() => {
                let pairs: Vec<_> = node.outputs.iter().zip(&graph.nodes[first].outputs).collect();
                // An output that only this call asks for keeps it.
                if pairs.iter().any(|(mine, theirs)| mine.is_some() && theirs.is_none()) {
                    continue;
                }
                alias.extend(pairs.into_iter().filter_map(|(mine, theirs)| Some(((*mine)?, (*theirs)?))));
                report.fused.push(Rewrite { pattern: "Repeat", node: node.name.clone() });
                gone.insert(i);
            }
            _ => {
                calls.insert(hash, i);
            }
        }
    }
    // A subgraph's captures go by value too.
    for (_, v) in graph.nodes.iter_mut().flat_map(|n| &mut n.captures) {
        *v = alias.get(v).copied().unwrap_or(*v);
    }
    let mut i = 0;
    graph.nodes.retain(|_| {
        i += 1;
        !gone.contains(&(i - 1))
    });
    graph.remove_dead();
}

/// What two calls must agree in; `None` for calls that are never merged.
fn key(node: &Node) -> Option<String> {
    // Subgraphs are not compared; random numbers differ from call to call.
    if !node.captures.is_empty()
        || node.op.starts_with("Random")
        || matches!(node.op.as_str(), "Bernoulli" | "Multinomial")
    {
        return None;
    }
    let mut key = format!("{}.{} {} {:?} {{", node.domain, node.op, node.opset, node.inputs);
    for (name, a) in node.attributes.iter() {
        match a {
            Attribute::Graph(_) | Attribute::Other(_) => return None,
            Attribute::Tensor(t) if t.len() > SMALL => return None,
            Attribute::Tensor(t) => write!(key, "{name}: {} {:?} {:?}, ", t.dtype(), t.shape(), t.bytes()).ok()?,
            other => write!(key, "{name}: {other:?}, ").ok()?,
        }
    }
    Some(key)
}
