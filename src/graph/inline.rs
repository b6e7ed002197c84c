//! Model-local functions, replaced by their bodies before anything else looks at the graph: weights inside them are then
//! initializers and constants like all others, and the model is written back without functions.

use std::collections::{HashMap, HashSet};

use prost::Message;

use crate::error::{Error, Result};
use crate::graph::definition::{self, Call, Definition};
use crate::onnx::attribute_proto::AttributeType;
use crate::onnx::{AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto};

/// More nodes than any real network has: functions that call each other twice grow without end in few bytes.
const MOST_NODES: usize = 1 << 18;
/// The same for their size: names grow with every level, and attributes are copied with every call. Weights are shared.
const MOST_BYTES: usize = 1 << 27;
/// Deeper than exporters nest modules; subgraphs count as levels too.
const DEEPEST: usize = 64;

const GROWTH: &str = "functions that call each other several times grow at every level: export the model inlined";

/// Domain, name and overload.
type Key = (String, String, String);

fn domain(d: &str) -> &str {
    if d == "ai.onnx" { "" } else { d }
}

fn key_of(node: &NodeProto) -> Key {
    (domain(node.domain()).to_owned(), node.op_type().to_owned(), node.overload().to_owned())
}

/// Replaces every call of a model-local function, or of an operator that is defined here, by the function's body, and drops the
/// functions. Gives the replaced calls of the defined operators; those inside subgraphs and functions are not among them.
///
/// Errors: recursive functions, functions of another operator set version than the model's, more outputs or inputs than
/// the function has, attributes without a value, absurd growth.
pub fn inline(model: &mut ModelProto, definitions: &[Definition]) -> Result<Vec<Call>> {
    definition::attach(model, definitions)?;
    if model.functions.is_empty() {
        return Ok(Vec::new());
    }
    let functions = std::mem::take(&mut model.functions);
    let mut table: HashMap<Key, &FunctionProto> = HashMap::new();
    for f in &functions {
        let key = (domain(f.domain()).to_owned(), f.name().to_owned(), f.overload().to_owned());
        if table.insert(key, f).is_some() {
            return Err(Error::invalid(format!("function `{}` is defined twice", f.name())));
        }
    }
    let Some(graph) = model.graph.as_mut() else { return Ok(Vec::new()) };
    let imports = model.opset_import.iter();
    let mut inliner = Inliner {
        definitions,
        opsets: imports.map(|o| (domain(o.domain()).to_owned(), o.version())).collect(),
        replaced: Vec::new(),
        functions: table,
        used: HashSet::new(),
        calls: 0,
        nodes: 0,
        bytes: 0,
        called: HashSet::new(),
        labels: HashSet::new(),
    };
    names(graph, &mut inliner.used);
    inliner.graph(graph, 0)?;
    // A body means what the operator sets of its function say; the model's must say the same.
    let (called, replaced) = (inliner.called, inliner.replaced);
    for f in functions.iter().filter(|f| called.contains(f.name())) {
        for import in &f.opset_import {
            let mine = model.opset_import.iter().find(|o| domain(o.domain()) == domain(import.domain()));
            match mine {
                Some(o) if o.version() == import.version() => {}
                Some(o) => {
                    return Err(Error::unsupported(format!(
                        "function `{}` is written for version {} of operator set `{}`, the model for {}",
                        f.name(),
                        import.version(),
                        domain(import.domain()),
                        o.version()
                    ))
                    .hint(
                        "inline the functions with onnx.inliner.inline_local_functions(model, convert_version=True)",
                    ));
                }
                None => model.opset_import.push(import.clone()),
            }
        }
    }
    Ok(replaced)
}

/// Encoded size without the raw bytes of tensors, which copies share.
fn size(node: &NodeProto) -> usize {
    fn raw(node: &NodeProto) -> usize {
        let tensors = |g: &GraphProto| -> usize {
            g.initializer.iter().map(raw_len).sum::<usize>() + g.node.iter().map(raw).sum::<usize>()
        };
        node.attribute
            .iter()
            .map(|a| {
                a.t.iter().chain(&a.tensors).map(raw_len).sum::<usize>()
                    + a.g.iter().chain(&a.graphs).map(tensors).sum::<usize>()
            })
            .sum()
    }
    fn raw_len(t: &TensorProto) -> usize {
        t.raw_data.as_ref().map_or(0, |d| d.len())
    }
    node.encoded_len().saturating_sub(raw(node))
}

/// Every name that a graph defines or reads.
fn names(graph: &GraphProto, into: &mut HashSet<String>) {
    into.extend(graph.input.iter().map(|i| i.name().to_owned()));
    into.extend(graph.initializer.iter().map(|i| i.name().to_owned()));
    for node in &graph.node {
        into.extend(node.input.iter().chain(&node.output).cloned());
        for a in &node.attribute {
            a.g.iter().chain(&a.graphs).for_each(|g| names(g, into));
        }
    }
}

struct Inliner<'a> {
    definitions: &'a [Definition],
    /// Versions of the model's operator sets.
    opsets: HashMap<String, i64>,
    replaced: Vec<Call>,
    functions: HashMap<Key, &'a FunctionProto>,
    used: HashSet<String>,
    calls: usize,
    nodes: usize,
    /// Encoded size of the bodies inlined so far.
    bytes: usize,
    called: HashSet<String>,
    labels: HashSet<String>,
}

impl Inliner<'_> {
    fn graph(&mut self, graph: &mut GraphProto, depth: usize) -> Result<()> {
        let nodes = std::mem::take(&mut graph.node);
        for node in nodes {
            self.node(node, depth, &mut graph.node)?;
        }
        Ok(())
    }

    fn node(&mut self, mut node: NodeProto, depth: usize, out: &mut Vec<NodeProto>) -> Result<()> {
        if depth > DEEPEST {
            return Err(Error::invalid(format!(
                "functions nest deeper than {DEEPEST}: `{}` is recursive",
                node.op_type()
            ))
            .hint("a function must not call itself, directly or through others: write the repetition as a Loop"));
        }
        for a in &mut node.attribute {
            for g in a.g.iter_mut().chain(&mut a.graphs) {
                self.graph(g, depth + 1)?;
            }
        }
        self.nodes += 1;
        if self.nodes > MOST_NODES {
            return Err(Error::invalid(format!("more than {MOST_NODES} nodes once functions are inlined")).hint(GROWTH));
        }
        match self.functions.get(&key_of(&node)).copied() {
            Some(f) => {
                let before = out.len();
                self.call(&node, f, depth, out)?;
                if depth == 0 && self.definitions.iter().any(|d| d.is(node.domain(), node.op_type())) {
                    let body = out[before..].iter().flat_map(|n| n.output.iter().cloned()).collect();
                    let opset = self.opsets.get(node.domain()).copied().unwrap_or(1);
                    self.replaced.push(Call { node, opset, body });
                }
                Ok(())
            }
            None => {
                out.push(node);
                Ok(())
            }
        }
    }

    fn call(&mut self, call: &NodeProto, f: &FunctionProto, depth: usize, out: &mut Vec<NodeProto>) -> Result<()> {
        let context = |e: Error| e.context(format!("call of function `{}`", f.name()));
        if call.input.len() > f.input.len() || call.output.len() > f.output.len() {
            return Err(context(Error::invalid(format!(
                "{} inputs and {} outputs, the function has {} and {}",
                call.input.len(),
                call.output.len(),
                f.input.len(),
                f.output.len()
            ))));
        }
        self.called.insert(f.name().to_owned());
        self.calls += 1;
        let label = if call.name().is_empty() { f.name() } else { call.name() };
        // Only the first call under a name has it to itself.
        let repeated = !self.labels.insert(label.to_owned());
        let prefix = if repeated { format!("{label}#{}/", self.calls) } else { format!("{label}/") };
        let mut bytes = self.bytes;
        let mut renaming = Renaming { map: HashMap::new(), prefix, used: &mut self.used };
        for (i, formal) in f.input.iter().enumerate() {
            renaming.map.insert(formal.clone(), call.input.get(i).cloned().unwrap_or_default());
        }
        let mut handed_on = Vec::new();
        for (formal, actual) in f.output.iter().zip(&call.output).filter(|(_, actual)| !actual.is_empty()) {
            match renaming.map.get(formal) {
                // An input, or an output given twice: handed on as it is.
                Some(source) => handed_on.push((source.clone(), actual.clone())),
                None => {
                    renaming.map.insert(formal.clone(), actual.clone());
                }
            }
        }
        let attributes = Attributes {
            given: &call.attribute,
            defaults: &f.attribute_proto,
            declared: f
                .attribute
                .iter()
                .map(String::as_str)
                .chain(f.attribute_proto.iter().map(|a| a.name()))
                .collect(),
        };
        let body =
            f.node
                .iter()
                .map(|n| {
                    let mut n = renaming.node(n, &attributes)?;
                    if !n.name().is_empty() {
                        n.name = Some(format!("{}{}", renaming.prefix, n.name()));
                    }
                    if n.metadata_props.is_empty() {
                        n.metadata_props = call.metadata_props.clone();
                    }
                    bytes += size(&n);
                    if bytes > MOST_BYTES {
                        return Err(Error::invalid(format!("more than {MOST_BYTES} bytes once functions are inlined"))
                            .hint(GROWTH));
                    }
                    Ok(n)
                })
                .collect::<Result<Vec<_>>>()
                .map_err(context)?;
        self.bytes = bytes;
        for n in body {
            self.node(n, depth + 1, out)?;
        }
        for (source, target) in handed_on {
            out.push(NodeProto {
                op_type: Some("Identity".into()),
                input: vec![source],
                output: vec![target],
                ..NodeProto::default()
            });
        }
        Ok(())
    }
}

/// Attribute values of one call.
struct Attributes<'a> {
    given: &'a [AttributeProto],
    defaults: &'a [AttributeProto],
    declared: HashSet<&'a str>,
}

impl Attributes<'_> {
    /// The attribute with a reference replaced by its value; `None` where the caller left an optional one out.
    fn resolve(&self, a: &AttributeProto) -> Result<Option<AttributeProto>> {
        let wanted = a.ref_attr_name();
        if wanted.is_empty() {
            return Ok(Some(a.clone()));
        }
        if !self.declared.contains(wanted) {
            return Err(Error::invalid(format!("refers to attribute `{wanted}`, which the function does not declare")));
        }
        let found = self.given.iter().chain(self.defaults).find(|g| g.name() == wanted);
        Ok(found.map(|v| AttributeProto { name: a.name.clone(), ..v.clone() }))
    }
}

/// Names of a function's body in the graph that calls it.
struct Renaming<'a> {
    map: HashMap<String, String>,
    prefix: String,
    used: &'a mut HashSet<String>,
}

impl Renaming<'_> {
    fn name(&mut self, name: &str) -> String {
        if name.is_empty() {
            return String::new();
        }
        if let Some(known) = self.map.get(name) {
            return known.clone();
        }
        let mut fresh = format!("{}{name}", self.prefix);
        while self.used.contains(&fresh) {
            fresh.push('\'');
        }
        self.used.insert(fresh.clone());
        self.map.insert(name.to_owned(), fresh.clone());
        fresh
    }

    fn node(&mut self, node: &NodeProto, attributes: &Attributes) -> Result<NodeProto> {
        let mut n = node.clone();
        n.input = node.input.iter().map(|v| self.name(v)).collect();
        n.output = node.output.iter().map(|v| self.name(v)).collect();
        n.attribute = Vec::with_capacity(node.attribute.len());
        for a in &node.attribute {
            let Some(mut a) = attributes.resolve(a)? else { continue };
            let kind = a.r#type();
            if matches!(kind, AttributeType::Graph | AttributeType::Graphs) || a.g.is_some() {
                for g in a.g.iter_mut().chain(&mut a.graphs) {
                    *g = self.graph(g, attributes)?;
                }
            }
            n.attribute.push(a);
        }
        Ok(n)
    }

    fn graph(&mut self, graph: &GraphProto, attributes: &Attributes) -> Result<GraphProto> {
        let mut g = graph.clone();
        for port in g.input.iter_mut().chain(&mut g.output).chain(&mut g.value_info) {
            port.name = Some(self.name(port.name()));
        }
        for t in &mut g.initializer {
            t.name = Some(self.name(t.name()));
        }
        g.node = graph.node.iter().map(|n| self.node(n, attributes)).collect::<Result<_>>()?;
        Ok(g)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::{OperatorSetIdProto, ValueInfoProto};

    fn node(op: &str, domain: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
        NodeProto {
            op_type: Some(op.into()),
            domain: Some(domain.into()),
            input: inputs.iter().map(|s| (*s).to_owned()).collect(),
            output: outputs.iter().map(|s| (*s).to_owned()).collect(),
            ..NodeProto::default()
        }
    }

    fn opset(domain: &str, version: i64) -> OperatorSetIdProto {
        OperatorSetIdProto { domain: Some(domain.into()), version: Some(version) }
    }

    fn value(name: &str) -> ValueInfoProto {
        ValueInfoProto { name: Some(name.into()), ..ValueInfoProto::default() }
    }

    fn function(name: &str, nodes: Vec<NodeProto>) -> FunctionProto {
        FunctionProto {
            name: Some(name.into()),
            domain: Some("mine".into()),
            input: vec!["a".into()],
            output: vec!["b".into()],
            node: nodes,
            opset_import: vec![opset("", 20)],
            ..FunctionProto::default()
        }
    }

    fn model(nodes: Vec<NodeProto>, functions: Vec<FunctionProto>) -> ModelProto {
        ModelProto {
            graph: Some(GraphProto {
                node: nodes,
                input: vec![value("x")],
                output: vec![value("y")],
                ..GraphProto::default()
            }),
            opset_import: vec![opset("", 20), opset("mine", 1)],
            functions,
            ..ModelProto::default()
        }
    }

    fn ops(m: &ModelProto) -> Vec<(&str, &[String], &[String])> {
        let nodes = &m.graph.as_ref().unwrap().node;
        nodes.iter().map(|n| (n.op_type(), &n.input[..], &n.output[..])).collect()
    }

    #[test]
    fn nested_calls_get_their_own_names() {
        let twice = function("Twice", vec![node("Exp", "", &["a"], &["t"]), node("Neg", "", &["t"], &["b"])]);
        let outer =
            function("Outer", vec![node("Twice", "mine", &["a"], &["t"]), node("Twice", "mine", &["t"], &["b"])]);
        let mut m = model(vec![node("Outer", "mine", &["x"], &["y"])], vec![twice, outer]);
        inline(&mut m, &[]).unwrap();
        assert!(m.functions.is_empty());
        let all = ops(&m);
        assert_eq!(all.iter().map(|o| o.0).collect::<Vec<_>>(), ["Exp", "Neg", "Exp", "Neg"]);
        // A chain from x to y, every value made once.
        assert_eq!(all[0].1, ["x"]);
        assert_eq!(all[3].2, ["y"]);
        for pair in all.windows(2) {
            assert_eq!(pair[0].2, pair[1].1);
        }
        let made: HashSet<_> = all.iter().map(|o| &o.2[0]).collect();
        assert_eq!(made.len(), 4);
    }

    #[test]
    fn attributes_are_taken_from_the_call_or_the_default() {
        let int = |name: &str, v: i64| AttributeProto {
            name: Some(name.into()),
            i: Some(v),
            r#type: Some(AttributeType::Int as i32),
            ..AttributeProto::default()
        };
        let reference = |name: &str, to: &str| AttributeProto {
            name: Some(name.into()),
            ref_attr_name: Some(to.into()),
            r#type: Some(AttributeType::Int as i32),
            ..AttributeProto::default()
        };
        let mut inner = node("Softmax", "", &["a"], &["b"]);
        inner.attribute = vec![reference("axis", "dim")];
        let mut f = function("F", vec![inner]);
        f.attribute_proto = vec![int("dim", 1)];
        let mut given = node("F", "mine", &["x"], &["t"]);
        given.attribute = vec![int("dim", 2)];
        let mut m = model(vec![given, node("F", "mine", &["t"], &["y"])], vec![f]);
        inline(&mut m, &[]).unwrap();
        let nodes = &m.graph.as_ref().unwrap().node;
        let axis = |n: &NodeProto| (n.attribute[0].name().to_owned(), n.attribute[0].i());
        assert_eq!(axis(&nodes[0]), ("axis".into(), 2));
        assert_eq!(axis(&nodes[1]), ("axis".into(), 1));
    }

    #[test]
    fn recursion_growth_and_other_versions_are_refused() {
        let mut m = model(
            vec![node("F", "mine", &["x"], &["y"])],
            vec![function("F", vec![node("F", "mine", &["a"], &["b"])])],
        );
        assert!(inline(&mut m, &[]).unwrap_err().to_string().contains("recursive"));

        let bomb: Vec<FunctionProto> = (0..40)
            .map(|i| {
                let next = format!("F{}", i + 1);
                let body = vec![node(&next, "mine", &["a"], &["t"]), node(&next, "mine", &["t"], &["b"])];
                function(&format!("F{i}"), body)
            })
            .collect();
        let mut m = model(vec![node("F0", "mine", &["x"], &["y"])], bomb);
        assert!(inline(&mut m, &[]).unwrap_err().to_string().contains("more than"));

        let mut old = function("F", vec![node("Exp", "", &["a"], &["b"])]);
        old.opset_import = vec![opset("", 12)];
        let mut m = model(vec![node("F", "mine", &["x"], &["y"])], vec![old]);
        assert!(inline(&mut m, &[]).unwrap_err().to_string().contains("version 12"));
    }
}
