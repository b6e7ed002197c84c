//! Branches whose condition is known: exporters write an If for `squeeze` of a dimension that they take for free, and most
//! runtimes would rather not see it.

use std::collections::HashMap;

use crate::graph::tensors;
use crate::onnx::{AttributeProto, GraphProto, NodeProto};

use crate::graph::edit;

/// Puts the nodes of the branch that is taken in the place of each If with a constant for its condition; how many there were.
pub(super) fn inline_decided(graph: &mut GraphProto) -> usize {
    let constants: HashMap<String, bool> = graph
        .initializer
        .iter()
        .filter_map(|t| {
            let value = tensors::from_proto(t).ok().filter(|t| t.len() == 1)?;
            Some((t.name().to_owned(), value.to_f64()[0] != 0.0))
        })
        .collect();
    let mut taken = edit::value_names(graph);
    let mut inlined = 0;
    for node in std::mem::take(&mut graph.node) {
        let decided = node.input.first().and_then(|c| constants.get(c)).copied();
        let branch = decided.filter(|_| edit::is(&node, "If")).and_then(|yes| branch(&node, yes));
        let Some(mut branch) = branch else {
            graph.node.push(node);
            continue;
        };
        // What the branch makes gets names that the graph does not have; what it takes from outside keeps its own.
        let made = branch.node.iter().flat_map(|n| n.output.iter().cloned());
        let own: Vec<String> = made.chain(branch.initializer.iter().map(|t| t.name().to_owned())).collect();
        for name in own.into_iter().filter(|n| !n.is_empty()) {
            let free = edit::free_name(&taken, &format!("{}/{name}", node.name()));
            taken.insert(free.clone());
            edit::rename(&mut branch, &name, &free);
        }
        graph.initializer.append(&mut branch.initializer);
        graph.node.append(&mut branch.node);
        let ends = branch.output.iter().zip(&node.output).filter(|(_, to)| !to.is_empty());
        graph.node.extend(ends.map(|(from, to)| edit::node("Identity", &[from.name()], to)));
        inlined += 1;
    }
    inlined
}

fn branch(node: &NodeProto, yes: bool) -> Option<GraphProto> {
    let name = if yes { "then_branch" } else { "else_branch" };
    node.attribute.iter().find(|a: &&AttributeProto| a.name() == name)?.g.clone()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::ValueInfoProto;
    use crate::onnx::attribute_proto::AttributeType;
    use crate::tensor::HostTensor;

    #[test]
    fn the_branch_that_is_taken_replaces_its_if_and_names_stay_apart() {
        let body = |name: &str, op: &str| AttributeProto {
            name: Some(name.into()),
            r#type: Some(AttributeType::Graph as i32),
            g: Some(GraphProto {
                // `h` is a name of the graph outside too.
                node: vec![edit::node(op, &["x"], "h"), edit::node("Neg", &["h"], "end")],
                output: vec![ValueInfoProto { name: Some("end".into()), ..ValueInfoProto::default() }],
                ..GraphProto::default()
            }),
            ..AttributeProto::default()
        };
        let choose = |condition: &str, out: &str| NodeProto {
            attribute: vec![body("then_branch", "Exp"), body("else_branch", "Abs")],
            ..edit::node("If", &[condition], out)
        };
        let flag = |name: &str, v: bool| tensors::to_proto(name, &HostTensor::scalar(v));
        let mut graph = GraphProto {
            node: vec![edit::node("Sin", &["x"], "h"), choose("yes", "a"), choose("no", "b"), choose("open", "c")],
            initializer: vec![flag("yes", true), flag("no", false)],
            ..GraphProto::default()
        };
        assert_eq!(inline_decided(&mut graph), 2);
        let ops: Vec<_> = graph.node.iter().map(|n| n.op_type()).collect();
        assert_eq!(ops, ["Sin", "Exp", "Neg", "Identity", "Abs", "Neg", "Identity", "If"]);
        let outputs: Vec<&String> = graph.node.iter().flat_map(|n| &n.output).collect();
        assert_eq!(outputs.iter().collect::<std::collections::HashSet<_>>().len(), outputs.len());
        assert_eq!(
            (graph.node[3].input[0].as_str(), graph.node[3].output[0].as_str()),
            (graph.node[2].output[0].as_str(), "a")
        );
        assert_eq!(graph.node[1].input, ["x"]);
    }
}
