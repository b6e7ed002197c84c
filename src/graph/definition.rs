//! Operators that ONNX does not define, written in operators that it does: what a caller hands in for a file whose exporter left
//! an operator of a domain of its own.

use std::ops::RangeInclusive;

use crate::error::{Error, Result};
use crate::graph::edit;
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

    /// [`Definition::node`] with attributes, which [`edit`] has functions for; [`edit::attribute_of_call`] takes a value from the
    /// call.
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

    /// Declares an attribute that a call may give; [`edit::attribute_of_call`] refers to it in the body.
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
