//! Small models from text, and the comparison of a fused plan with an unfused one.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use disback::graph::{Model, TrainableChoice};
use disback::onnx::tensor_shape_proto::{Dimension, dimension};
use disback::onnx::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, TensorShapeProto, TypeProto,
    ValueInfoProto, attribute_proto::AttributeType, type_proto,
};
use disback::torch::{Forward, ImportOptions, Network};
use disback::{DType, Element};
use tch::{Device, Kind, Tensor};

/// Tensors by name.
type Named = Vec<(String, Tensor)>;

/// A model in a line a node: `y = Mul(x, 0.5)`, `m = ReduceMean(x, [-1]) {keepdims=1}`.
///
/// An operator of another domain is written with it: `com.microsoft.Gelu(x)`. Numbers become constants of the model's float type, lists become int64 constants, `ones3` and `zeros3` vectors, `bool` inputs are made from names
/// that start with `seen`; `FLOAT` in an attribute is the float type. `inputs` and `weights` are names with shapes; values that are read by nobody are the outputs.
pub struct Text<'a> {
    pub opset: i64,
    pub inputs: &'a [(&'a str, &'a [i64])],
    pub weights: &'a [(&'a str, &'a [i64])],
    pub nodes: &'a str,
}

/// What fusing did to a model.
pub struct Outcome {
    pub fused: BTreeMap<&'static str, usize>,
    pub near_misses: Vec<(&'static str, String)>,
    /// Operators that are left, in order.
    pub left: Vec<String>,
}

pub fn noise(name: &str, count: usize) -> Vec<f32> {
    let seed = name.bytes().fold(7u64, |h, b| h.wrapping_mul(31).wrapping_add(u64::from(b)));
    disback::noise::image_noise(seed, 0, count)
}

fn tensor_proto<T: Element>(name: &str, shape: &[i64], values: &[T]) -> TensorProto {
    let mut raw = Vec::new();
    values.iter().for_each(|v| v.append_le(&mut raw));
    TensorProto {
        name: Some(name.to_owned()),
        dims: shape.to_vec(),
        data_type: Some(T::DTYPE.to_onnx()),
        raw_data: Some(raw.into()),
        ..TensorProto::default()
    }
}

fn floats(name: &str, shape: &[i64], values: &[f64], dtype: DType) -> TensorProto {
    match dtype {
        DType::F64 => tensor_proto(name, shape, values),
        _ => tensor_proto(name, shape, &values.iter().map(|&v| v as f32).collect::<Vec<_>>()),
    }
}

fn port(name: &str, shape: Option<&[i64]>, dtype: DType) -> ValueInfoProto {
    let dim = |&d: &i64| Dimension { value: Some(dimension::Value::DimValue(d)), ..Dimension::default() };
    let shape = shape.map(|s| TensorShapeProto { dim: s.iter().map(dim).collect() });
    let tensor = type_proto::Tensor { elem_type: Some(dtype.to_onnx()), shape };
    let r#type = TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..TypeProto::default() };
    ValueInfoProto { name: Some(name.to_owned()), r#type: Some(r#type), ..ValueInfoProto::default() }
}

fn attribute(text: &str, dtype: DType) -> AttributeProto {
    let (name, value) = text.split_once('=').expect("name=value");
    let own = dtype.to_onnx().to_string();
    let value = value.replace("FLOAT", &own);
    let mut a = AttributeProto { name: Some(name.trim().to_owned()), ..AttributeProto::default() };
    let value = value.trim();
    if let Some(list) = value.strip_prefix('[') {
        a.ints = list.trim_end_matches(']').split(',').map(|n| n.trim().parse().expect("an integer")).collect();
        a.set_type(AttributeType::Ints);
    } else if let Some(s) = value.strip_prefix('"') {
        a.s = Some(s.trim_end_matches('"').to_owned().into());
        a.set_type(AttributeType::String);
    } else if let Ok(n) = value.parse() {
        a.i = Some(n);
        a.set_type(AttributeType::Int);
    } else {
        a.f = Some(value.parse().expect("a number"));
        a.set_type(AttributeType::Float);
    }
    a
}

/// Splits at commas outside of brackets and quotes.
fn split(text: &str) -> Vec<&str> {
    let (mut depth, mut quoted, mut start, mut parts) = (0, false, 0, Vec::new());
    for (i, c) in text.char_indices() {
        match c {
            '"' => quoted = !quoted,
            '[' => depth += 1,
            ']' => depth -= 1,
            ',' if depth == 0 && !quoted => {
                parts.push(text[start..i].trim());
                start = i + 1;
            }
            _ => {}
        }
    }
    parts.push(text[start..].trim());
    parts.retain(|p| !p.is_empty());
    parts
}

impl Text<'_> {
    pub fn model(&self, dtype: DType) -> Model {
        let mut graph = GraphProto { name: Some("text".into()), ..GraphProto::default() };
        for (name, shape) in self.weights {
            let values: Vec<f64> =
                noise(name, shape.iter().product::<i64>() as usize).iter().map(|&v| f64::from(v) * 0.5 + 0.2).collect();
            graph.initializer.push(floats(name, shape, &values, dtype));
        }
        for (name, shape) in self.inputs {
            let dtype = if name.starts_with("seen") { DType::Bool } else { dtype };
            graph.input.push(port(name, Some(shape), dtype));
        }
        let mut read = Vec::new();
        let mut made = Vec::new();
        let mut domains = BTreeSet::from([String::new()]);
        for (i, line) in self.nodes.lines().map(str::trim).filter(|l| !l.is_empty()).enumerate() {
            let (out, call) = line.split_once('=').expect("output = Op(...)");
            let (op, rest) = call.trim().split_once('(').expect("Op(");
            let (args, rest) = rest.split_once(')').expect("Op(...)");
            let mut inputs = Vec::new();
            for arg in split(args) {
                let name = format!("c_{i}_{}", inputs.len());
                let constant = if let Some(list) = arg.strip_prefix('[') {
                    let list: Vec<i64> =
                        split(list.trim_end_matches(']')).iter().map(|n| n.parse().expect("an integer")).collect();
                    Some(tensor_proto(&name, &[list.len() as i64], &list))
                } else if let Some(count) = ["ones", "zeros"].iter().find_map(|p| arg.strip_prefix(p)) {
                    let count: usize = count.parse().expect("a length");
                    let fill = f64::from(u8::from(arg.starts_with("ones")));
                    Some(floats(&name, &[count as i64], &vec![fill; count], dtype))
                } else {
                    arg.parse::<f64>().ok().map(|n| floats(&name, &[], &[n], dtype))
                };
                inputs.push(match constant {
                    Some(t) => {
                        graph.initializer.push(t);
                        name
                    }
                    None => arg.to_owned(),
                });
            }
            let braces = rest.trim().trim_start_matches('{').trim_end_matches('}');
            read.extend(inputs.clone());
            made.push(out.trim().to_owned());
            let (domain, op) = op.trim().rsplit_once('.').unwrap_or(("", op.trim()));
            domains.insert(domain.to_owned());
            graph.node.push(NodeProto {
                domain: Some(domain.to_owned()),
                op_type: Some(op.to_owned()),
                name: Some(format!("n_{}", out.trim())),
                input: inputs,
                output: vec![out.trim().to_owned()],
                attribute: split(braces).into_iter().map(|a| attribute(a, dtype)).collect(),
                ..NodeProto::default()
            });
        }
        for name in made.iter().filter(|m| !read.contains(m)) {
            graph.output.push(port(name, None, dtype));
        }
        let set = |domain: String| {
            let version = if domain.is_empty() { self.opset } else { 1 };
            OperatorSetIdProto { domain: Some(domain), version: Some(version) }
        };
        Model::from_proto(ModelProto {
            ir_version: Some(10),
            opset_import: domains.into_iter().map(set).collect(),
            graph: Some(graph),
            ..ModelProto::default()
        })
    }

    fn network(&self, dtype: DType, fuse: bool) -> Network {
        let trainable =
            TrainableChoice { train: self.weights.iter().map(|w| w.0.to_owned()).collect(), ..Default::default() };
        let net = Network::import(
            self.model(dtype),
            &ImportOptions { fuse, trainable, widen: false, narrow: false, ..ImportOptions::default() },
            Device::Cpu,
        )
        .unwrap();
        net.params().set_requires_grad(true).unwrap();
        net
    }

    /// Fixed random inputs, and the outputs they give.
    fn outputs(&self, net: &Network, dtype: DType) -> (Named, Named) {
        let kind = if dtype == DType::F64 { Kind::Double } else { Kind::Float };
        let inputs: Vec<(String, Tensor)> = self
            .inputs
            .iter()
            .map(|(name, shape)| {
                let t = Tensor::from_slice(&noise(name, shape.iter().product::<i64>() as usize)).reshape(*shape);
                let seen = name.starts_with("seen");
                ((*name).to_owned(), if seen { t.gt(-0.5) } else { t.to_kind(kind).set_requires_grad(true) })
            })
            .collect();
        let named: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
        // Twice: the second run is that of a specialised plan.
        net.forward(&named).unwrap();
        let outputs = net.forward(&named).unwrap();
        (inputs, outputs)
    }

    /// Outputs, then gradients of inputs and of weights, of a fixed random weighting of the outputs.
    fn run(&self, net: &Network, dtype: DType) -> Vec<(String, Tensor)> {
        let kind = if dtype == DType::F64 { Kind::Double } else { Kind::Float };
        let (inputs, outputs) = self.outputs(net, dtype);
        let mut loss = Tensor::zeros([0i64; 0], (kind, Device::Cpu));
        for (name, y) in &outputs {
            let r = Tensor::from_slice(&noise(&format!("r{name}"), y.numel())).to_kind(kind).reshape(y.size());
            loss += (y * r).sum(kind);
        }
        loss.backward();
        let mut all: Vec<(String, Tensor)> = outputs.into_iter().map(|(n, t)| (n, t.detach())).collect();
        all.extend(
            inputs.iter().filter(|(_, t)| t.requires_grad()).map(|(n, t)| (format!("gradient of {n}"), t.grad())),
        );
        all.extend(net.params().iter().map(|(n, t)| (format!("gradient of weight {n}"), t.grad())));
        all
    }

    /// Values and gradients of the fused plan are those of the unfused one, in f32 (relative to `tolerance`) and in f64.
    pub fn check(&self, tolerance: f64) -> Outcome {
        self.compare(DType::F64, 1e-9);
        self.compare(DType::F32, tolerance)
    }

    fn compare(&self, dtype: DType, tolerance: f64) -> Outcome {
        let (plain, fused) = (self.network(dtype, false), self.network(dtype, true));
        let theirs: HashMap<String, Tensor> = self.run(&plain, dtype).into_iter().collect();
        for (what, mine) in self.run(&fused, dtype) {
            // Master weights, and so their gradients, are f32 whatever the graph computes in.
            let within = if what.contains("weight") { tolerance.max(2e-6) } else { tolerance };
            let (a, b) = (mine.to_kind(Kind::Double), theirs[&what].to_kind(Kind::Double));
            assert_eq!(a.size(), b.size(), "{what}");
            let error = (&a - &b).norm().double_value(&[]) / b.norm().double_value(&[]).max(1e-6);
            assert!(error <= within, "{dtype} {what} differs by {error:.1e}\n{}", self.nodes);
        }
        let report = &fused.shared().fused;
        Outcome {
            fused: report.counts(),
            near_misses: report.near_misses.iter().map(|m| (m.pattern, m.reason.clone())).collect(),
            left: fused.shared().graph.nodes.iter().map(|n| n.op.clone()).collect(),
        }
    }

    fn left_is(&self, outcome: &Outcome, left: &[&str]) {
        assert_eq!(outcome.left, left, "{:?}\n{}", outcome.near_misses, self.nodes);
    }

    /// [`Text::check`], and that exactly these operators are left.
    pub fn becomes(&self, left: &[&str]) {
        self.left_is(&self.check(2e-5), left);
    }

    /// [`Text::becomes`] for a graph that only makes sense in f32.
    pub fn becomes_in_f32(&self, left: &[&str]) {
        self.left_is(&self.compare(DType::F32, 2e-5), left);
    }

    /// The largest magnitude of the first output, in f32.
    pub fn largest_output(&self, fuse: bool) -> f64 {
        let all = self.outputs(&self.network(DType::F32, fuse), DType::F32).1;
        all[0].1.abs().max().double_value(&[])
    }

    /// [`Text::check`], and that one of these was fused.
    pub fn makes_one(&self, pattern: &str) {
        let outcome = self.check(2e-5);
        assert_eq!(outcome.fused.get(pattern), Some(&1), "{:?}\n{}", outcome.near_misses, self.nodes);
    }

    /// [`Text::check`], and that nothing was fused, for this reason.
    pub fn stays(&self, pattern: &str, reason: &str) {
        let outcome = self.check(2e-5);
        let made: Vec<_> = outcome.fused.keys().filter(|k| pattern.contains(**k)).collect();
        assert!(made.is_empty(), "{made:?} was fused\n{}", self.nodes);
        let told = outcome.near_misses.iter().any(|(p, r)| p.contains(pattern) && r.contains(reason));
        assert!(told, "no near miss of {pattern} because {reason}: {:?}\n{}", outcome.near_misses, self.nodes);
    }
}

/// Those of `all` that the nodes read.
pub fn read<'a>(nodes: &str, all: &[(&'a str, &'a [i64])]) -> Vec<(&'a str, &'a [i64])> {
    let words = || nodes.split(|c: char| !c.is_alphanumeric() && c != '_');
    all.iter().filter(|(name, _)| words().any(|w| w == *name)).copied().collect()
}
