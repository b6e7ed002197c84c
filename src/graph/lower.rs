//! From the decoded file to the typed graph: names resolved, attributes parsed, the specification's rules checked.

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

use crate::error::{Context, Error, Result};
use crate::graph::attributes::{Attribute, Attributes};
use crate::graph::ir::{Constant, Graph, Node, Origin, Port, ValueId};
use crate::graph::load::Model;
use crate::graph::sizes::declared_dims;
use crate::graph::tensors;
use crate::onnx::attribute_proto::AttributeType;
use crate::onnx::{AttributeProto, GraphProto, NodeProto, ValueInfoProto, type_proto};
use crate::tensor::{DType, HostTensor};

/// Builds the graph of a model. Constant nodes become constants; everything else keeps its order, sorted where the file's
/// order is not topological.
///
/// Errors: duplicate or missing names, cycles, tensors that do not fit their shape, sparse initializers.
pub fn lower(model: &Model) -> Result<Graph> {
    let shown =
        if model.path.as_os_str().is_empty() { "the model".to_owned() } else { model.path.display().to_string() };
    let proto = model.proto.graph.as_ref().ok_or_else(|| Error::invalid("the model holds no graph"))?;
    let mut opsets = BTreeMap::new();
    for o in &model.proto.opset_import {
        opsets.insert(normal_domain(o.domain()).to_owned(), o.version());
    }
    if opsets.is_empty() {
        // IR version 1 and 2 had none: operator set 1 was meant.
        opsets.insert(String::new(), 1);
    }
    let mut graph = lower_graph(proto, &opsets, None).context(shown)?;
    graph.inputs.iter_mut().chain(&mut graph.outputs).for_each(|port| model.sizes.fill(port));
    Ok(graph)
}

fn normal_domain(domain: &str) -> &str {
    if domain == "ai.onnx" { "" } else { domain }
}

/// Attributes of a node that has no subgraph with names of the graph around it.
pub(super) fn plain_attributes(node: &NodeProto) -> Result<Attributes> {
    let mut alone = Lowering { graph: Graph::default(), ids: HashMap::new(), outer: None };
    let value = |a: &AttributeProto| Ok((a.name().to_owned(), alone.attribute(a, &BTreeMap::new(), &mut Vec::new())?));
    Ok(Attributes::new(node.attribute.iter().map(value).collect::<Result<_>>()?))
}

struct Lowering<'a> {
    graph: Graph,
    ids: HashMap<String, ValueId>,
    /// What an enclosing graph defines, for subgraphs.
    outer: Option<&'a Scope<'a>>,
}

/// Names of a graph and of those around it.
struct Scope<'a> {
    ids: &'a HashMap<String, ValueId>,
    outer: Option<&'a Scope<'a>>,
}

impl Scope<'_> {
    fn knows(&self, name: &str) -> bool {
        self.ids.contains_key(name) || self.outer.is_some_and(|o| o.knows(name))
    }
}

fn lower_graph(proto: &GraphProto, opsets: &BTreeMap<String, i64>, outer: Option<&Scope>) -> Result<Graph> {
    let mut l = Lowering {
        graph: Graph { name: proto.name().to_owned(), opsets: opsets.clone(), ..Graph::default() },
        ids: HashMap::new(),
        outer,
    };
    if let Some(s) = proto.sparse_initializer.first() {
        let name = s.values.as_ref().map_or("", |v| v.name());
        return Err(Error::unsupported(format!("sparse initializer `{name}`")).hint("export the weights dense"));
    }
    for (i, t) in proto.initializer.iter().enumerate() {
        if t.name().is_empty() {
            return Err(Error::invalid(format!("initializer {i} has no name")));
        }
        let tensor = tensors::from_proto(t)?;
        let id = l.define(t.name()).with_context(|| format!("initializer {i}"))?;
        l.graph.constants.insert(id, Constant { tensor, origin: Origin::Initializer(i) });
    }
    for input in &proto.input {
        // Up to IR version 3 initializers are listed among the inputs too: as default values, which we take.
        if l.ids.contains_key(input.name()) {
            if l.graph.inputs.iter().any(|p| p.name == input.name()) {
                return Err(Error::invalid(format!("two graph inputs are named `{}`", input.name()))
                    .hint("every value has a name of its own: rename one of the two, or export again"));
            }
            continue;
        }
        let value = l.define(input.name()).context("graph inputs")?;
        let port = port(input, value)?;
        l.graph.inputs.push(port);
    }
    // Outputs first, so that a file in the wrong order can still be sorted.
    for (i, node) in proto.node.iter().enumerate() {
        for name in node.output.iter().filter(|n| !n.is_empty()) {
            l.define(name).with_context(|| node_label(node, i))?;
        }
    }
    for (i, node) in proto.node.iter().enumerate() {
        l.node(node, i, opsets).with_context(|| node_label(node, i))?;
    }
    for output in &proto.output {
        let value = l.resolve(output.name()).context("graph outputs")?;
        let port = port(output, value)?;
        l.graph.outputs.push(port);
    }
    if l.graph.outputs.is_empty() {
        return Err(Error::invalid("the graph has no outputs"));
    }
    l.graph.sort()?;
    Ok(l.graph)
}

fn node_label(node: &NodeProto, index: usize) -> String {
    if node.name().is_empty() {
        format!("{} node number {index}", node.op_type())
    } else {
        format!("{} node `{}`", node.op_type(), node.name())
    }
}

fn port(info: &ValueInfoProto, value: ValueId) -> Result<Port> {
    let mut port = Port { name: info.name().to_owned(), value, dtype: None, shape: None };
    let declared = info.r#type.as_ref().and_then(|t| t.value.as_ref());
    let other = match declared {
        Some(type_proto::Value::SparseTensorType(_)) => "a sparse tensor",
        Some(type_proto::Value::MapType(_)) => "a map",
        Some(type_proto::Value::OpaqueType(_)) => "of an opaque type",
        _ => "",
    };
    if !other.is_empty() {
        return Err(Error::unsupported(format!("`{}` is {other}", info.name()))
            .hint("export the network with dense tensors as its inputs and outputs"));
    }
    if let Some(type_proto::Value::TensorType(t)) = declared {
        port.dtype = match t.elem_type() {
            0 => None,
            code => Some(DType::from_onnx(code).with_context(|| format!("`{}`", info.name()))?),
        };
        port.shape = declared_dims(info);
    }
    Ok(port)
}

impl Lowering<'_> {
    fn define(&mut self, name: &str) -> Result<ValueId> {
        if name.is_empty() {
            return Err(Error::invalid("a value has no name"));
        }
        let id = self.graph.names.len();
        if self.ids.insert(name.to_owned(), id).is_some() {
            return Err(Error::invalid(format!("value `{name}` is defined twice"))
                .hint("every value has a name of its own: rename one of the two, or export again"));
        }
        self.graph.names.push(name.to_owned());
        Ok(id)
    }

    fn resolve(&mut self, name: &str) -> Result<ValueId> {
        if let Some(&id) = self.ids.get(name) {
            return Ok(id);
        }
        if self.outer.is_some_and(|o| o.knows(name)) {
            let id = self.define(name)?;
            self.graph.captures.push((name.to_owned(), id));
            return Ok(id);
        }
        Err(Error::invalid(format!(
            "value `{name}` is read but never made: no input, initializer or node has this name"
        ))
        .hint("where the file was cut from a larger one, onnx.utils.extract_model keeps what is needed"))
    }

    fn node(&mut self, proto: &NodeProto, index: usize, opsets: &BTreeMap<String, i64>) -> Result<()> {
        let domain = normal_domain(proto.domain()).to_owned();
        let opset = opsets.get(&domain).copied().unwrap_or(1);
        let optional = |l: &mut Self, name: &String| -> Result<Option<ValueId>> {
            if name.is_empty() { Ok(None) } else { l.resolve(name).map(Some) }
        };
        let inputs = proto.input.iter().map(|n| optional(self, n)).collect::<Result<Vec<_>>>()?;
        let outputs = proto.output.iter().map(|n| optional(self, n)).collect::<Result<Vec<_>>>()?;
        let mut captures: Vec<(String, ValueId)> = Vec::new();
        let mut values = BTreeMap::new();
        for a in &proto.attribute {
            let value =
                self.attribute(a, opsets, &mut captures).with_context(|| format!("attribute `{}`", a.name()))?;
            if values.insert(a.name().to_owned(), value).is_some() {
                return Err(Error::invalid(format!("attribute `{}` is given twice", a.name()))
                    .hint("only one can hold: remove the other, or export again"));
            }
        }
        if domain.is_empty()
            && proto.op_type() == "Constant"
            && let (Some(tensor), Some(&Some(out))) = (constant_value(&values)?, outputs.first())
        {
            self.graph.constants.insert(out, Constant { tensor, origin: Origin::ConstantNode(index) });
            return Ok(());
        }
        let name = match proto.name() {
            "" => format!("{}_{index}", proto.op_type()),
            name => name.to_owned(),
        };
        let metadata = |key: &str| proto.metadata_props.iter().find(|p| p.key() == key).map(|p| p.value().to_owned());
        let module = metadata("pkg.torch.onnx.name_scopes").or_else(|| metadata("namespace"));
        self.graph.nodes.push(Node {
            op: proto.op_type().to_owned(),
            domain,
            name,
            opset,
            inputs,
            outputs,
            attributes: Attributes::new(values),
            captures,
            origin: Some(index),
            module,
        });
        Ok(())
    }

    fn attribute(
        &mut self,
        a: &AttributeProto,
        opsets: &BTreeMap<String, i64>,
        captures: &mut Vec<(String, ValueId)>,
    ) -> Result<Attribute> {
        if !a.ref_attr_name().is_empty() {
            return Err(Error::invalid("refers to a function's attribute, outside any function"));
        }
        let text = |b: &bytes::Bytes| String::from_utf8_lossy(b).into_owned();
        Ok(match attribute_type(a) {
            AttributeType::Int => Attribute::Int(a.i()),
            AttributeType::Float => Attribute::Float(a.f()),
            AttributeType::String => Attribute::String(text(a.s.as_ref().unwrap_or(&bytes::Bytes::new()))),
            AttributeType::Ints => Attribute::Ints(a.ints.clone()),
            AttributeType::Floats => Attribute::Floats(a.floats.clone()),
            AttributeType::Strings => Attribute::Strings(a.strings.iter().map(text).collect()),
            AttributeType::Tensor => match &a.t {
                Some(t) => Attribute::Tensor(tensors::from_proto(t)?),
                None => return Err(Error::invalid("says it is a tensor but holds none")),
            },
            AttributeType::Graph => {
                let g = a.g.as_ref().ok_or_else(|| Error::invalid("says it is a graph but holds none"))?;
                let scope = Scope { ids: &self.ids, outer: self.outer };
                let sub = lower_graph(g, opsets, Some(&scope))?;
                for (name, _) in &sub.captures {
                    let id = self.resolve(name)?;
                    if !captures.iter().any(|(n, _)| n == name) {
                        captures.push((name.clone(), id));
                    }
                }
                Attribute::Graph(Rc::new(sub))
            }
            AttributeType::Tensors => Attribute::Other("a list of tensors"),
            AttributeType::Graphs => Attribute::Other("a list of graphs"),
            AttributeType::SparseTensor | AttributeType::SparseTensors => Attribute::Other("a sparse tensor"),
            AttributeType::TypeProto | AttributeType::TypeProtos => Attribute::Other("a type"),
            AttributeType::Undefined => {
                return Err(Error::invalid("has no type and no value").hint("the file is damaged here: export again"));
            }
        })
    }
}

/// The declared type, or (IR version 1) the one of the field that is set.
fn attribute_type(a: &AttributeProto) -> AttributeType {
    match a.r#type() {
        AttributeType::Undefined => {}
        t => return t,
    }
    if a.f.is_some() {
        AttributeType::Float
    } else if a.i.is_some() {
        AttributeType::Int
    } else if a.s.is_some() {
        AttributeType::String
    } else if a.t.is_some() {
        AttributeType::Tensor
    } else if a.g.is_some() {
        AttributeType::Graph
    } else if !a.floats.is_empty() {
        AttributeType::Floats
    } else if !a.ints.is_empty() {
        AttributeType::Ints
    } else if !a.strings.is_empty() {
        AttributeType::Strings
    } else {
        AttributeType::Undefined
    }
}

/// The tensor of a Constant node; `None` for forms that have no dense tensor (the node then stays and is refused later).
fn constant_value(values: &BTreeMap<String, Attribute>) -> Result<Option<HostTensor>> {
    Ok(match (values.iter().next(), values.len()) {
        (Some((name, value)), 1) => match (name.as_str(), value) {
            ("value", Attribute::Tensor(t)) => Some(t.clone()),
            ("value_float", Attribute::Float(v)) => Some(HostTensor::scalar(*v)),
            ("value_floats", Attribute::Floats(v)) => Some(HostTensor::vec(v)),
            ("value_int", Attribute::Int(v)) => Some(HostTensor::scalar(*v)),
            ("value_ints", Attribute::Ints(v)) => Some(HostTensor::vec(v)),
            ("sparse_value", _) => {
                return Err(Error::unsupported("a sparse tensor").hint("export the weights dense"));
            }
            ("value_string" | "value_strings", _) => {
                return Err(Error::unsupported("a text where a tensor of numbers is expected")
                    .hint("texts are turned into numbers before the network: export what follows the tokenizer"));
            }
            _ => None,
        },
        _ => return Err(Error::invalid("a Constant must have exactly one value attribute")),
    })
}
