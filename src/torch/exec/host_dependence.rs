//! Which values decide about shapes and branches, and whether they are known before the data is: a plan that would have to
//! read the network's own results on the host is refused before anything runs, with the node and what it depends on.

use std::collections::{HashMap, HashSet};

use crate::error::{Error, Result};
use crate::graph::{Graph, Node, ValueId};
use crate::torch::exec::kernel::Kernel;

/// What a value comes from that is not known on the host: the name of a parameter.
type Origin<'a> = HashMap<ValueId, &'a str>;

/// Refuses nodes that read on the host what trained weights decide about.
///
/// Errors: all such nodes, each with the parameter.
pub fn check(graph: &Graph, nodes: &[Node], kernels: &[Kernel], parameters: &[ValueId]) -> Result<()> {
    let mut trained: Origin = parameters.iter().map(|&v| (v, graph.names[v].as_str())).collect();
    let mut failures = Vec::new();
    for (node, kernel) in nodes.iter().zip(kernels) {
        let reads: Vec<ValueId> = node
            .inputs
            .iter()
            .copied()
            .chain(node.captures.iter().map(|(_, v)| Some(*v)))
            .map(|v| v.unwrap_or(usize::MAX))
            .collect();
        let read = kernel.host_slots.iter().find_map(|&slot| Some((slot, *trained.get(reads.get(slot)?)?)));
        if let Some((slot, parameter)) = read {
            failures.push(format!("{}: {} by way of parameter `{parameter}`", node.label(), decides(node, slot)));
        }
        if !kernel.shape_only
            && let Some(&parameter) = reads.iter().find_map(|v| trained.get(v))
        {
            trained.extend(node.outputs.iter().flatten().map(|&v| (v, parameter)));
        }
    }
    refuse(&failures)
}

/// Refuses branches and loops that floating graph inputs decide about: their elements differ in every step, so that nothing
/// could be settled once, and no gradient goes through a decision.
///
/// Errors: all such nodes, each with the input.
pub fn check_branches(graph: &Graph) -> Result<()> {
    let floats = graph.inputs.iter().filter(|p| p.dtype.is_none_or(|d| d.is_float()));
    let mut data: Origin = floats.map(|p| (p.value, p.name.as_str())).collect();
    let mut failures = Vec::new();
    for node in &graph.nodes {
        let deciding = match node.op.as_str() {
            "If" if node.domain.is_empty() => 1,
            "Loop" if node.domain.is_empty() => 2,
            _ => 0,
        };
        for slot in 0..deciding {
            if let Some(input) = node.input(slot).and_then(|v| data.get(&v)) {
                failures.push(format!("{}: {} by way of graph input `{input}`", node.label(), decides(node, slot)));
            }
        }
        let reads = node.inputs.iter().flatten().chain(node.captures.iter().map(|(_, v)| v));
        if !matches!(node.op.as_str(), "Shape" | "Size")
            && let Some(&input) = reads.into_iter().find_map(|v| data.get(v))
        {
            data.extend(node.outputs.iter().flatten().map(|&v| (v, input)));
        }
    }
    refuse(&failures)
}

fn decides(node: &Node, slot: usize) -> String {
    let what = match (node.op.as_str(), slot) {
        ("If", 0) => "the condition chooses a branch",
        ("Loop", 0 | 1) => "the number of rounds is decided",
        _ => {
            return format!(
                "input {slot} decides about shapes but depends on the data, not only on shapes and constants,"
            );
        }
    };
    format!("{what} but depends on the data")
}

fn refuse(failures: &[String]) -> Result<()> {
    const HINT: &str = "export with this value as a constant or as an integer graph input; a branch on data becomes \
                        torch.where, which computes both sides";
    match failures {
        [] => Ok(()),
        [one] => Err(Error::unsupported(one).hint(HINT)),
        many => {
            let unique: HashSet<&String> = many.iter().collect();
            let mut lines: Vec<&String> = unique.into_iter().collect();
            lines.sort();
            let what = format!("{} nodes cannot be imported:", lines.len());
            Err(Error::unsupported(what).lines(lines).hint(HINT))
        }
    }
}
