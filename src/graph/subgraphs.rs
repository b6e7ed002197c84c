//! Weights inside the bodies of If, Loop, Scan and SequenceMap. They live in the outermost graph as all others do, so that
//! they are classified, trained and recorded like them, and are written back where they came from.

use std::collections::HashSet;
use std::rc::Rc;

use crate::graph::attributes::Attribute;
use crate::graph::ir::{Constant, Graph, Node, Origin, ValueId};

/// Moves the floating constants of all subgraphs into the outermost graph: bodies read them as values of the graph around
/// them. Scales of quantisers stay, which are looked at where they are read.
pub fn lift(graph: &mut Graph) {
    let mut taken: Option<HashSet<String>> = None;
    for i in 0..graph.nodes.len() {
        for (attribute, body) in bodies(&graph.nodes[i]) {
            let mut body = (*body).clone();
            lift(&mut body);
            let moving: Vec<ValueId> = {
                let quantisers = body.nodes.iter().filter(|n| n.op.contains("QuantizeLinear") || n.op.starts_with("Q"));
                let stay: HashSet<ValueId> =
                    quantisers.flat_map(|n| n.inputs.iter().skip(1).flatten().copied()).collect();
                let floats = body.constants.iter().filter(|(v, c)| c.tensor.dtype().is_float() && !stay.contains(v));
                floats.map(|(v, _)| *v).collect()
            };
            // Nodes that we made are in no file to write back to.
            let Some(origin) = graph.nodes[i].origin else { continue };
            for v in moving {
                let Some(constant) = body.constants.remove(&v) else { continue };
                let taken = taken.get_or_insert_with(|| graph.names.iter().cloned().collect());
                let name = free_name(&body.names[v], &graph.nodes[i].name, &attribute, taken);
                let outer = graph.names.len();
                graph.names.push(name.clone());
                let from =
                    Origin::Within { node: origin, attribute: attribute.clone(), origin: constant.origin.into() };
                graph.constants.insert(outer, Constant { tensor: constant.tensor, origin: from });
                body.captures.push((name.clone(), v));
                graph.nodes[i].captures.push((name, outer));
            }
            graph.nodes[i].attributes.set(&attribute, Attribute::Graph(Rc::new(body)));
        }
    }
}

/// The body's own name where no other value has it, else with the path before it.
fn free_name(name: &str, node: &str, attribute: &str, taken: &mut HashSet<String>) -> String {
    let mut unique = name.to_owned();
    while !taken.insert(unique.clone()) {
        unique = if unique == name { format!("{node}/{attribute}/{name}") } else { format!("{unique}'") };
    }
    unique
}

fn bodies(node: &Node) -> Vec<(String, Rc<Graph>)> {
    let graph = |(name, a): (&str, &Attribute)| match a {
        Attribute::Graph(g) => Some((name.to_owned(), g.clone())),
        _ => None,
    };
    node.attributes.iter().filter_map(graph).collect()
}

/// Name of the call that stands for a choice between its inputs.
pub const EITHER: &str = "Either";

/// The graph with every body written out once in the place of its node, for looking at who reads what; it cannot run. The
/// values of the graph keep their numbers. `None` where there is no subgraph.
pub fn flatten(graph: &Graph) -> Option<Graph> {
    if graph.nodes.iter().all(|n| bodies(n).is_empty()) {
        return None;
    }
    let mut flat = Graph { nodes: Vec::new(), ..graph.clone() };
    let same: Vec<ValueId> = (0..graph.names.len()).collect();
    spread(&mut flat, &graph.nodes, &same);
    Some(flat)
}

/// Adds nodes whose values are called `at[..]` in the flat graph.
fn spread(flat: &mut Graph, nodes: &[Node], at: &[ValueId]) {
    for node in nodes {
        let mapped = |list: &[Option<ValueId>]| list.iter().map(|v| v.map(|v| at[v])).collect::<Vec<_>>();
        let inside = bodies(node);
        let call =
            Node { inputs: mapped(&node.inputs), outputs: mapped(&node.outputs), captures: vec![], ..node.clone() };
        if inside.is_empty() {
            flat.nodes.push(call);
            continue;
        }
        let around: Vec<(&str, ValueId)> = node.captures.iter().map(|(n, v)| (n.as_str(), at[*v])).collect();
        let mut made: Vec<Vec<Option<ValueId>>> = vec![Vec::new(); node.outputs.len()];
        for (_, body) in inside {
            let start = flat.names.len();
            flat.names.extend(body.names.iter().cloned());
            let mut local: Vec<ValueId> = (start..flat.names.len()).collect();
            for (name, v) in &body.captures {
                if let Some((_, outer)) = around.iter().find(|(n, _)| n == name) {
                    local[*v] = *outer;
                }
            }
            flat.constants.extend(body.constants.iter().map(|(v, c)| (local[*v], c.clone())));
            let ports = Ports::of(node, &body);
            for (port, (slot, returned)) in body.inputs.iter().zip(&ports.inputs) {
                let first = call.input(*slot);
                let kept = returned.is_none_or(|r| unchanged(&body, body.outputs.get(r).map(|p| p.value), port.value));
                let mut inputs = vec![first];
                if !kept {
                    // From the second round on it is what the body made of everything.
                    inputs.extend(call.inputs.iter().filter(|v| **v != first));
                    inputs.extend(around.iter().map(|(_, v)| Some(*v)));
                }
                flat.nodes.push(link(node, "Identity", inputs, local[port.value]));
            }
            spread(flat, &body.nodes, &local);
            for (list, k) in made.iter_mut().zip(ports.outputs..) {
                list.extend(body.outputs.get(k).map(|p| Some(local[p.value])));
            }
        }
        for (list, out) in made.into_iter().zip(&call.outputs) {
            if let Some(out) = out {
                flat.nodes.push(link(node, EITHER, list, *out));
            }
        }
    }
}

fn link(of: &Node, op: &str, inputs: Vec<Option<ValueId>>, output: ValueId) -> Node {
    Node {
        op: op.to_owned(),
        domain: String::new(),
        inputs,
        outputs: vec![Some(output)],
        captures: Vec::new(),
        attributes: Default::default(),
        ..of.clone()
    }
}

/// How the ports of a body meet those of its node.
struct Ports {
    /// For each input of the body: the node's input, and the body's output that follows on it in the next round.
    inputs: Vec<(usize, Option<usize>)>,
    /// The body's output that is the node's first.
    outputs: usize,
}

impl Ports {
    fn of(node: &Node, body: &Graph) -> Self {
        let count = body.inputs.len();
        match node.op.as_str() {
            "Loop" => {
                let next = |i: usize| (i, (i >= 2).then(|| i - 1));
                Self { inputs: (0..count).map(next).collect(), outputs: 1 }
            }
            "Scan" => {
                let scanned = node.attributes.int_or("num_scan_inputs", 1).unwrap_or(1).max(0) as usize;
                let states = count.saturating_sub(scanned);
                let before = usize::from(node.opset < 9);
                let next = |i: usize| (i + before, (i < states).then_some(i));
                Self { inputs: (0..count).map(next).collect(), outputs: 0 }
            }
            _ => Self { inputs: (0..count).map(|i| (i, None)).collect(), outputs: 0 },
        }
    }
}

/// Whether a body hands an input on as it is.
fn unchanged(body: &Graph, mut output: Option<ValueId>, input: ValueId) -> bool {
    for _ in 0..8 {
        match output {
            Some(v) if v == input => return true,
            Some(v) => {
                let maker = body.nodes.iter().find(|n| n.output(0) == Some(v));
                output = maker.filter(|n| n.is("Identity")).and_then(|n| n.input(0));
            }
            None => return false,
        }
    }
    false
}
