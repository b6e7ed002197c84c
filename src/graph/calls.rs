//! Calls of a caller's own operators: in the file they are written as their bodies, in the graph that is trained they may be one
//! node again.

use std::collections::{HashMap, HashSet};

use crate::graph::definition::Call;
use crate::graph::ir::{Graph, Node, ValueId};
use crate::graph::lower;

/// Puts calls back in the place of their bodies, for those operators that there is a kernel for. Gives how many.
///
/// A call whose body was rewritten meanwhile keeps its body, which computes the same.
pub fn restore(graph: &mut Graph, calls: &[Call], has_kernel: &dyn Fn(&str, &str) -> bool) -> usize {
    let mut ids: HashMap<String, ValueId> = HashMap::new();
    for (id, name) in graph.names.iter().enumerate() {
        ids.entry(name.clone()).or_insert(id);
    }
    let mut restored = 0;
    for call in calls.iter().filter(|c| has_kernel(c.node.domain(), c.node.op_type())) {
        if let Some(node) = node_of(graph, call, &ids) {
            let made: HashSet<ValueId> = node.outputs.iter().flatten().copied().collect();
            let makes = |n: &Node| n.outputs.iter().flatten().any(|v| made.contains(v));
            let Some(last) = graph.nodes.iter().rposition(makes) else { continue };
            graph.nodes[last] = node;
            // (An output that another node of the body made is the call's now.)
            let mut at = 0;
            graph.nodes.retain(|n| {
                at += 1;
                at - 1 == last || !makes(n)
            });
            restored += 1;
        }
    }
    graph.remove_dead();
    restored
}

/// The call as a node, where all that it reads and makes is what its body reads and makes.
fn node_of(graph: &Graph, call: &Call, ids: &HashMap<String, ValueId>) -> Option<Node> {
    let body: HashSet<ValueId> = call.body.iter().filter_map(|name| ids.get(name).copied()).collect();
    let nodes = || graph.nodes.iter().filter(|n| n.outputs.iter().flatten().any(|v| body.contains(v)));
    let read: HashSet<ValueId> = nodes().flat_map(|n| n.inputs.iter().flatten().copied()).collect();
    let values = |names: &[String], among: &HashSet<ValueId>| -> Option<Vec<Option<ValueId>>> {
        let value = |name: &String| match name.as_str() {
            "" => Some(None),
            name => ids.get(name).copied().filter(|v| among.contains(v)).map(Some),
        };
        names.iter().map(value).collect()
    };
    let made: HashSet<ValueId> = nodes().flat_map(|n| n.outputs.iter().flatten().copied()).collect();
    Some(Node {
        op: call.node.op_type().to_owned(),
        domain: call.node.domain().to_owned(),
        name: Some(call.node.name()).filter(|n| !n.is_empty()).unwrap_or(call.node.output.first()?).to_owned(),
        opset: call.opset,
        inputs: values(&call.node.input, &read)?,
        outputs: values(&call.node.output, &made)?,
        attributes: lower::plain_attributes(&call.node).ok()?,
        captures: Vec::new(),
        origin: None,
        module: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Result;
    use crate::graph::{Definition, Model, edit};
    use crate::onnx::{GraphProto, ModelProto, OperatorSetIdProto};
    use crate::tensor::DType;

    fn squared_sum() -> Definition {
        Definition::new("com.example", "SquaredSum", &["a", "b"], &["y"])
            .node("Add", &["a", "b"], &["s"])
            .node("Mul", &["s", "s"], &["y"])
            .opsets(13..=20)
    }

    fn model(opset: i64) -> ModelProto {
        let mut call = edit::node("SquaredSum", &["x", "x2"], "y");
        call.domain = Some("com.example".into());
        let port = |name: &str| edit::value_info(name, DType::F32, &[Ok(2)]);
        let graph = GraphProto {
            name: Some("g".into()),
            node: vec![edit::node("Neg", &["x"], "x2"), call, edit::node("Exp", &["y"], "z")],
            input: vec![port("x")],
            output: vec![port("z")],
            ..GraphProto::default()
        };
        let import = |domain: &str, version| OperatorSetIdProto { domain: Some(domain.into()), version: Some(version) };
        let opset_import = vec![import("", opset), import("com.example", 3)];
        ModelProto { ir_version: Some(8), opset_import, graph: Some(graph), ..ModelProto::default() }
    }

    fn load(opset: i64, definitions: &[Definition]) -> Result<Model> {
        Model::from_bytes_with(prost::Message::encode_to_vec(&model(opset)).into(), definitions)
    }

    #[test]
    fn a_call_becomes_its_body_and_a_call_again() {
        let loaded = load(17, &[squared_sum()]).unwrap();
        let ops = |graph: &Graph| graph.nodes.iter().map(|n| n.op.clone()).collect::<Vec<_>>();
        let mut graph = lower::lower(&loaded).unwrap();
        assert_eq!(ops(&graph), ["Neg", "Add", "Mul", "Exp"]);
        assert_eq!(restore(&mut graph, &loaded.calls, &|_, _| false), 0);
        assert_eq!(restore(&mut graph, &loaded.calls, &|domain, op| (domain, op) == ("com.example", "SquaredSum")), 1);
        assert_eq!(ops(&graph), ["Neg", "SquaredSum", "Exp"]);
        let call = &graph.nodes[1];
        let names: Vec<_> = call.inputs.iter().flatten().map(|v| graph.names[*v].as_str()).collect();
        assert_eq!((names, call.opset), (vec!["x", "x2"], 3));
    }

    #[test]
    fn a_call_whose_body_was_rewritten_keeps_its_body() {
        let loaded = load(17, &[squared_sum()]).unwrap();
        let mut graph = lower::lower(&loaded).unwrap();
        let x = graph.inputs[0].value;
        let add = graph.nodes.iter_mut().find(|n| n.is("Add")).unwrap();
        add.inputs = vec![Some(x), Some(x)];
        assert_eq!(restore(&mut graph, &loaded.calls, &|_, _| true), 0);
    }

    /// `y = 2 LeakyRelu(x)` whose slope is the call's.
    #[test]
    fn a_definition_has_constants_attributes_and_the_attributes_of_its_calls() {
        let slope = edit::attribute_of_call("alpha", "slope");
        let leaky = Definition::new("com.example", "SquaredSum", &["a", "b"], &["y"])
            .attribute("slope")
            .constant("two", 2.0)
            .node_with("LeakyRelu", &["a"], &["bent"], vec![slope])
            .node_with("Concat", &["bent", "two"], &["joined"], vec![edit::int_attribute("axis", 0)])
            .node("Mul", &["bent", "two"], &["y"]);
        let mut file = model(17);
        file.graph.as_mut().unwrap().node[1].attribute = vec![edit::float_attribute("slope", 0.25)];
        let loaded =
            Model::from_bytes_with(prost::Message::encode_to_vec(&file).into(), std::slice::from_ref(&leaky)).unwrap();
        let nodes = &loaded.proto.graph.as_ref().unwrap().node;
        let bent = nodes.iter().find(|n| n.op_type() == "LeakyRelu").unwrap();
        assert_eq!((bent.attribute[0].name(), bent.attribute[0].f()), ("alpha", 0.25));
        let joined = nodes.iter().find(|n| n.op_type() == "Concat").unwrap();
        assert_eq!((joined.attribute[0].name(), joined.attribute[0].i()), ("axis", 0));
        let graph = lower::lower(&loaded).unwrap();
        let product = graph.nodes.iter().find(|n| n.is("Mul")).unwrap();
        let two = product.inputs.iter().flatten().find_map(|v| graph.constants.get(v)).unwrap();
        assert_eq!(two.tensor.to_f32(), [2.0]);
        // A reference to what is not declared is refused by its name.
        let undeclared = Definition::new("com.example", "SquaredSum", &["a", "b"], &["y"]).node_with(
            "LeakyRelu",
            &["a"],
            &["y"],
            vec![edit::attribute_of_call("alpha", "slope")],
        );
        let e = load(17, &[undeclared]).unwrap_err().to_string();
        assert!(e.contains("refers to attribute `slope`, which the function does not declare"), "{e}");
    }

    #[test]
    fn a_definition_for_other_operator_sets_is_refused() {
        let e = load(11, &[squared_sum()]).unwrap_err().to_string();
        assert!(e.contains("com.example.SquaredSum is defined for operator set 13 to 20, the file has 11"), "{e}");
    }
}
