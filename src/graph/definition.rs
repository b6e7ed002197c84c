//! Operators that ONNX does not define, written in operators that it does: what a caller hands in for a file whose exporter left
//! an operator of a domain of its own.

use std::collections::{HashMap, HashSet};
use std::ops::RangeInclusive;

use crate::error::{Error, Result};
use crate::graph::ir::{Graph, Node, ValueId};
use crate::graph::{edit, lower};
use crate::onnx::{AttributeProto, FunctionProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto};

/// An operator of another domain as a function of ONNX's own operators, as a model-local function of ONNX is one.
///
/// ```
/// use disback::graph::Definition;
///
/// // Snake (Ziyin et al. 2020): x + sin(alpha x)^2 / alpha.
/// let snake = Definition::new("com.example", "Snake", &["x", "alpha"], &["y"])
///     .node("Mul", &["alpha", "x"], &["angle"])
///     .node("Sin", &["angle"], &["sine"])
///     .node("Mul", &["sine", "sine"], &["squared"])
///     .node("Div", &["squared", "alpha"], &["wave"])
///     .node("Add", &["x", "wave"], &["y"]);
/// assert_eq!(snake.name(), "com.example.Snake");
/// ```
#[derive(Debug, Clone)]
pub struct Definition {
    function: FunctionProto,
    opsets: RangeInclusive<i64>,
}

impl Definition {
    /// An operator with these inputs and outputs; its body is still empty. The body's operators must mean the same in all
    /// versions of ONNX's operator set from 7 on, unless [`Definition::opsets`] says otherwise.
    pub fn new(domain: &str, op: &str, inputs: &[&str], outputs: &[&str]) -> Self {
        let names = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
        let function = FunctionProto {
            domain: Some(domain.to_owned()),
            name: Some(op.to_owned()),
            input: names(inputs),
            output: names(outputs),
            ..FunctionProto::default()
        };
        Self { function, opsets: 7..=i64::MAX }
    }

    /// The versions of ONNX's operator set in which the body means what is wanted.
    #[must_use]
    pub fn opsets(mut self, opsets: RangeInclusive<i64>) -> Self {
        self.opsets = opsets;
        self
    }

    /// Adds a call of one of ONNX's operators to the body.
    #[must_use]
    pub fn node(self, op: &str, inputs: &[&str], outputs: &[&str]) -> Self {
        self.node_with(op, inputs, outputs, Vec::new())
    }

    /// [`Definition::node`] with attributes, which [`edit`] has functions for.
    #[must_use]
    pub fn node_with(mut self, op: &str, inputs: &[&str], outputs: &[&str], attributes: Vec<AttributeProto>) -> Self {
        let mut node = edit::node(op, inputs, "");
        node.name = outputs.first().map(|s| (*s).to_owned());
        node.output = outputs.iter().map(|s| (*s).to_owned()).collect();
        node.attribute = attributes;
        self.function.node.push(node);
        self
    }

    /// Adds a number (f32, rank 0) to the body.
    #[must_use]
    pub fn constant(mut self, name: &str, value: f32) -> Self {
        let mut node = NodeProto { name: Some(name.to_owned()), ..edit::node("Constant", &[], name) };
        let tensor = TensorProto {
            data_type: Some(crate::onnx::tensor_proto::DataType::Float as i32),
            raw_data: Some(value.to_le_bytes().to_vec().into()),
            ..TensorProto::default()
        };
        node.attribute.push(edit::tensor_attribute("value", tensor));
        self.function.node.push(node);
        self
    }

    /// Declares an attribute that every call gives.
    #[must_use]
    pub fn attribute(mut self, name: &str) -> Self {
        self.function.attribute.push(name.to_owned());
        self
    }

    /// Domain and operator, with a point between them.
    pub fn name(&self) -> String {
        format!("{}.{}", self.domain(), self.op())
    }

    /// The operator's domain.
    pub fn domain(&self) -> &str {
        self.function.domain()
    }

    /// The operator's name in its domain.
    pub fn op(&self) -> &str {
        self.function.name()
    }

    pub(super) fn is(&self, domain: &str, op: &str) -> bool {
        self.function.domain() == domain && self.function.name() == op
    }

    /// The function as a model of this operator set carries it.
    fn function(&self, opset: i64) -> Result<FunctionProto> {
        if !self.opsets.contains(&opset) {
            let (first, last) = (self.opsets.start(), self.opsets.end());
            let last = if *last == i64::MAX { "on".to_owned() } else { format!("to {last}") };
            return Err(Error::unsupported(format!(
                "the operator {} is defined for operator set {first} {last}, the file has {opset}",
                self.name()
            ))
            .hint("export with an operator set within that range, or extend the definition"));
        }
        let import = OperatorSetIdProto { domain: Some(String::new()), version: Some(opset) };
        Ok(FunctionProto { opset_import: vec![import], ..self.function.clone() })
    }
}

/// Gives the model the functions for those operators that it calls and does not define itself.
pub(super) fn attach(model: &mut ModelProto, definitions: &[Definition]) -> Result<()> {
    let opset = edit::opset(model);
    for definition in definitions {
        let own = model.functions.iter().any(|f| definition.is(f.domain(), f.name()));
        let called = model.graph.as_ref().is_some_and(|g| g.node.iter().any(|n| calls(n, definition)));
        let called = called || model.functions.iter().flat_map(|f| &f.node).any(|n| calls(n, definition));
        if called && !own {
            model.functions.push(definition.function(opset)?);
        }
    }
    Ok(())
}

fn calls(node: &NodeProto, definition: &Definition) -> bool {
    let inner = |a: &AttributeProto| a.g.iter().chain(&a.graphs).any(|g| g.node.iter().any(|n| calls(n, definition)));
    definition.is(node.domain(), node.op_type()) || node.attribute.iter().any(inner)
}

/// A call that was replaced by its function's body.
#[derive(Debug, Clone)]
pub struct Call {
    /// The call as the file had it.
    pub node: NodeProto,
    /// Version of its domain's operator set.
    pub opset: i64,
    /// Names of all values that the body makes, the call's outputs among them.
    pub body: Vec<String>,
}

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
    use crate::graph::Model;
    use crate::onnx::GraphProto;
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

    #[test]
    fn a_definition_for_other_operator_sets_is_refused() {
        let e = load(11, &[squared_sum()]).unwrap_err().to_string();
        assert!(e.contains("com.example.SquaredSum is defined for operator set 13 to 20, the file has 11"), "{e}");
    }
}
