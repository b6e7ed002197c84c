//! Operators that ONNX Runtime's optimiser wrote or an exporter left, and ONNX's own that ONNX Runtime does not have (Swish,
//! SwiGLU), in older operators that ONNX defines: a student runs where its teacher does not, on the CPU and in other runtimes. What is met in another form than the optimiser writes stays as it is.

use std::collections::{HashMap, HashSet};

use crate::graph::edit;
use crate::graph::edit::{float_attribute, int_attribute, ints_attribute, node};
use crate::graph::tensors;
use crate::onnx::{GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto};
use crate::tensor::HostTensor;

mod attention;

/// Rewrites in place, element type f32, and returns how many nodes were rewritten.
pub fn plain(model: &mut ModelProto) -> usize {
    let opset = edit::opset(model);
    let Some(graph) = model.graph.as_mut() else { return 0 };
    let strays = ["SimplifiedLayerNormalization", "Erfc", "Swish", "SwiGLU"];
    let theirs = |n: &NodeProto| n.domain() == "com.microsoft" || strays.contains(&n.op_type());
    // Split by count and ranges as inputs are younger than some files.
    if opset < 13 || !graph.node.iter().any(theirs) {
        return 0;
    }
    let dims = graph.initializer.iter().map(|t| (t.name().to_owned(), t.dims.clone())).collect();
    let by_head = attention::by_head(graph, &dims);
    let mut w = Writer {
        opset,
        dims,
        by_head,
        nodes: Vec::new(),
        made: Vec::new(),
        taken: edit::value_names(graph),
        first: HashMap::new(),
    };
    let mut count = 0;
    for n in std::mem::take(&mut graph.node) {
        if theirs(&n) && w.rewrite(&n).is_some() {
            count += 1;
        } else {
            w.nodes.push(n);
        }
    }
    graph.node = w.nodes;
    graph.initializer.append(&mut w.made);
    if count > 0 {
        finish(model);
    }
    count
}

/// Clears what spoke of the old operators.
fn finish(model: &mut ModelProto) {
    let Some(graph) = model.graph.as_mut() else { return };
    graph.value_info.clear();
    edit::remove_dead(graph);
    let domains: HashSet<String> = used_domains(graph);
    let kept = |o: &OperatorSetIdProto| matches!(o.domain(), "" | "ai.onnx") || domains.contains(o.domain());
    model.opset_import.retain(kept);
}

fn used_domains(graph: &GraphProto) -> HashSet<String> {
    let inner = graph.node.iter().flat_map(|n| &n.attribute).flat_map(|a| a.g.iter().chain(&a.graphs));
    graph.node.iter().map(|n| n.domain().to_owned()).chain(inner.flat_map(used_domains)).collect()
}

struct Writer {
    opset: i64,
    /// Shapes of the initializers.
    dims: HashMap<String, Vec<i64>>,
    /// Values of four axes.
    by_head: HashSet<String>,
    nodes: Vec<NodeProto>,
    made: Vec<TensorProto>,
    taken: HashSet<String>,
    /// Channels-first forms of values that were turned to channels last.
    first: HashMap<String, String>,
}

impl Writer {
    fn name(&mut self, base: &str) -> String {
        let name = edit::free_name(&self.taken, base);
        self.taken.insert(name.clone());
        name
    }
    /// A node with a result of its own name.
    fn op(&mut self, op: &str, inputs: &[&str], base: &str) -> String {
        let out = self.name(&format!("{base}/{}", op.to_lowercase()));
        self.nodes.push(node(op, inputs, &out));
        out
    }
    /// The same with an attribute.
    fn op_with(&mut self, op: &str, inputs: &[&str], base: &str, attribute: crate::onnx::AttributeProto) -> String {
        let out = self.op(op, inputs, base);
        self.nodes.last_mut().expect("just pushed").attribute.push(attribute);
        out
    }
    fn held(&mut self, base: &str, t: &HostTensor) -> String {
        let name = self.name(&format!("{base}/number"));
        self.made.push(tensors::to_proto(&name, t));
        name
    }
    fn number(&mut self, base: &str, v: f64) -> String {
        self.held(base, &HostTensor::scalar(v as f32))
    }
    fn ints(&mut self, base: &str, v: &[i64]) -> String {
        self.held(base, &HostTensor::vec(v))
    }
    /// The last step: under the name that the others read.
    fn named(&mut self, value: &str, output: &str) {
        self.nodes.push(node("Identity", &[value], output));
    }
    /// `x[from..to]` of a list.
    fn slice(&mut self, x: &str, from: i64, to: i64, base: &str) -> String {
        let (from, to) = (self.ints(base, &[from]), self.ints(base, &[to]));
        let axes = self.ints(base, &[0]);
        self.op("Slice", &[x, &from, &to, &axes], base)
    }

    fn rewrite(&mut self, n: &NodeProto) -> Option<()> {
        let out = n.output.first().filter(|o| !o.is_empty())?.clone();
        let given = |i: usize| n.input.get(i).map(String::as_str).filter(|s| !s.is_empty());
        let float = |name: &str, default: f32| {
            n.attribute.iter().find(|a| a.name() == name).and_then(|a| a.f).unwrap_or(default)
        };
        let x = given(0)?;
        match n.op_type() {
            "NhwcConv" => self.conv(n, x, given(1)?, given(2), &out),
            "GroupNorm" => {
                let y = self.group_norm(n, x, [given(1)?, given(2)?], &out)?;
                self.named(&y, &out);
            }
            "SkipGroupNorm" => {
                let last = edit::int(n, "channels_last").unwrap_or(1) == 1;
                let skip = self.spread(given(3)?, last, &out);
                let mut sum = self.op("Add", &[x, &skip], &out);
                if let Some(b) = given(4) {
                    let b = if last { b.to_owned() } else { self.per_channel(b, &out) };
                    sum = self.op("Add", &[&sum, &b], &out);
                }
                let y = self.group_norm(n, &sum, [given(1)?, given(2)?], &out)?;
                self.named(&y, &out);
                self.second(n, 1, &sum);
            }
            "BiasAdd" => {
                let sum = self.op("Add", &[x, given(1)?], &out);
                self.nodes.push(node("Add", &[&sum, given(2)?], &out));
            }
            "BiasSplitGelu" => {
                let sum = self.op("Add", &[x, given(1)?], &out);
                let [value, gate] = [0, 1].map(|k| self.name(&format!("{out}/half_{k}")));
                let mut split = node("Split", &[&sum], &value);
                split.output.push(gate.clone());
                split.attribute.push(int_attribute("axis", -1));
                if self.opset >= 18 {
                    split.attribute.push(int_attribute("num_outputs", 2));
                }
                self.nodes.push(split);
                let gate = self.gelu(&gate, &out);
                self.nodes.push(node("Mul", &[&value, &gate], &out));
            }
            "Gelu" | "BiasGelu" => {
                let sum = given(1).map(|b| self.op("Add", &[x, b], &out));
                let y = self.gelu(sum.as_deref().unwrap_or(x), &out);
                self.named(&y, &out);
            }
            "FastGelu" => {
                let sum = given(1).map(|b| self.op("Add", &[x, b], &out));
                self.tanh_gelu(sum.as_deref().unwrap_or(x), &out);
            }
            "QuickGelu" => self.swish(x, float("alpha", 1.702), &out),
            "Swish" => self.swish(x, float("alpha", 1.0), &out),
            "SwiGLU" => {
                let gate = self.name(&format!("{out}/gate"));
                self.swish(x, float("alpha", 1.0), &gate);
                self.nodes.push(node("Mul", &[&gate, given(1)?], &out));
            }
            "SkipLayerNormalization" | "SkipSimplifiedLayerNormalization" => {
                let plain = n.op_type() == "SkipLayerNormalization";
                let mut sum = self.op("Add", &[x, given(1)?], &out);
                if let Some(b) = given(if plain { 4 } else { 3 }) {
                    sum = self.op("Add", &[&sum, b], &out);
                }
                let eps = float("epsilon", 1e-12);
                let y = if plain {
                    self.layer_norm(&sum, given(2)?, given(3), eps, &out)?
                } else {
                    self.rms_norm(&sum, given(2)?, eps, &out)
                };
                self.named(&y, &out);
                self.second(n, 3, &sum);
            }
            "SimplifiedLayerNormalization" if edit::int(n, "axis").unwrap_or(-1) == -1 => {
                let y = self.rms_norm(x, given(1)?, float("epsilon", 1e-5), &out);
                self.named(&y, &out);
            }
            "Erfc" => {
                let erf = self.op("Erf", &[x], &out);
                let one = self.number(&out, 1.0);
                self.nodes.push(node("Sub", &[&one, &erf], &out));
            }
            "MultiHeadAttention" => self.multi_head(n, &out)?,
            "Attention" => self.packed(n, &out)?,
            _ => return None,
        }
        Some(())
    }

    /// `x sigmoid(alpha x)`, under this name.
    fn swish(&mut self, x: &str, alpha: f32, out: &str) {
        let scaled = if alpha == 1.0 {
            x.to_owned()
        } else {
            let alpha = self.number(out, f64::from(alpha));
            self.op("Mul", &[x, &alpha], out)
        };
        let gate = self.op("Sigmoid", &[&scaled], out);
        self.nodes.push(node("Mul", &[x, &gate], out));
    }

    /// A further output of the old node, where it is read.
    fn second(&mut self, n: &NodeProto, k: usize, value: &str) {
        if let Some(o) = n.output.get(k).filter(|o| !o.is_empty()) {
            self.named(value, o);
        }
    }

    /// A value with its channels first.
    fn channels_first(&mut self, x: &str, base: &str) -> String {
        match self.first.get(x) {
            Some(y) => y.clone(),
            None => self.op_with("Transpose", &[x], base, ints_attribute("perm", &[0, 3, 1, 2])),
        }
    }
    /// The channels of `y` last, under this name.
    fn channels_last(&mut self, y: &str, out: &str) {
        let mut n = node("Transpose", &[y], out);
        n.attribute.push(ints_attribute("perm", &[0, 2, 3, 1]));
        self.nodes.push(n);
        self.first.insert(out.to_owned(), y.to_owned());
    }

    fn conv(&mut self, n: &NodeProto, x: &str, weight: &str, bias: Option<&str>, out: &str) {
        let (x, weight) = (self.channels_first(x, out), self.channels_first(weight, out));
        let inputs: Vec<&str> = [x.as_str(), weight.as_str()].into_iter().chain(bias).collect();
        let y = self.op("Conv", &inputs, out);
        let made = self.nodes.last_mut().expect("just pushed");
        // As the file calls it: nodes are chosen by name.
        made.name.clone_from(&n.name);
        made.attribute.clone_from(&n.attribute);
        self.channels_last(&y, out);
    }

    /// A weight of one number a channel beside an image with its channels first.
    fn per_channel(&mut self, b: &str, base: &str) -> String {
        let shape = self.ints(base, &[-1, 1, 1]);
        self.op("Reshape", &[b, &shape], base)
    }

    /// A skip of shape [N, C] with the axes of an image; one that has them as it is.
    fn spread(&mut self, skip: &str, last: bool, base: &str) -> String {
        let size = self.op("Shape", &[skip], base);
        let ones = self.ints(base, &[1, 1]);
        let axis = || int_attribute("axis", 0);
        let shape = if last {
            let [a, middle, b] = [(0, 1), (1, -1), (-1, i64::MAX)].map(|(f, t)| self.slice(&size, f, t, base));
            let middle = self.op_with("Concat", &[&middle, &ones], base, axis());
            let middle = self.slice(&middle, 0, 2, base);
            self.op_with("Concat", &[&a, &middle, &b], base, axis())
        } else {
            let all = self.op_with("Concat", &[&size, &ones], base, axis());
            self.slice(&all, 0, 4, base)
        };
        self.op("Reshape", &[skip, &shape], base)
    }

    /// Returns the result in the layout of `x`.
    fn group_norm(&mut self, n: &NodeProto, x: &str, affine: [&str; 2], out: &str) -> Option<String> {
        let groups = edit::int(n, "groups").filter(|g| (1..=1 << 20).contains(g))?;
        let last = edit::int(n, "channels_last").unwrap_or(1) == 1;
        let silu = match edit::int(n, "activation").unwrap_or(0) {
            0 => false,
            1 => true,
            _ => return None,
        };
        let eps = n.attribute.iter().find(|a| a.name() == "epsilon").and_then(|a| a.f).unwrap_or(1e-5);
        let x = if last { self.channels_first(x, out) } else { x.to_owned() };
        let grouped = self.ints(out, &[0, groups, -1]);
        let rows = self.op("Reshape", &[&x, &grouped], out);
        let [ones, zeros] = [1f32, 0.0].map(|v| self.held(out, &HostTensor::vec(&vec![v; groups as usize])));
        let epsilon = float_attribute("epsilon", eps);
        let rows = self.op_with("InstanceNormalization", &[&rows, &ones, &zeros], out, epsilon);
        let size = self.op("Shape", &[&x], out);
        let y = self.op("Reshape", &[&rows, &size], out);
        let [scale, bias] = affine.map(|a| self.per_channel(a, out));
        let y = self.op("Mul", &[&y, &scale], out);
        let mut y = self.op("Add", &[&y, &bias], out);
        if silu {
            let gate = self.op("Sigmoid", &[&y], out);
            y = self.op("Mul", &[&y, &gate], out);
        }
        if !last {
            return Some(y);
        }
        let turned = self.name(&format!("{out}/last"));
        self.channels_last(&y, &turned);
        // Who reads the result by the old name may have it channels first too.
        self.first.insert(out.to_owned(), y);
        Some(turned)
    }

    fn gelu(&mut self, x: &str, base: &str) -> String {
        let root = self.number(base, std::f64::consts::SQRT_2);
        let scaled = self.op("Div", &[x, &root], base);
        let erf = self.op("Erf", &[&scaled], base);
        let one = self.number(base, 1.0);
        let gate = self.op("Add", &[&erf, &one], base);
        let both = self.op("Mul", &[x, &gate], base);
        let half = self.number(base, 0.5);
        self.op("Mul", &[&both, &half], base)
    }

    /// x (0.5 + 0.5 tanh(x (a + b x x))), as ONNX Runtime defines FastGelu.
    fn tanh_gelu(&mut self, x: &str, out: &str) {
        let [a, b, half] = [0.7978845608028654, 0.035677408136300125, 0.5].map(|v| self.number(out, v));
        let square = self.op("Mul", &[x, x], out);
        let cubic = self.op("Mul", &[&square, &b], out);
        let factor = self.op("Add", &[&cubic, &a], out);
        let inner = self.op("Mul", &[x, &factor], out);
        let tanh = self.op("Tanh", &[&inner], out);
        let scaled = self.op("Mul", &[&tanh, &half], out);
        let gate = self.op("Add", &[&scaled, &half], out);
        self.nodes.push(node("Mul", &[x, &gate], out));
    }

    fn layer_norm(&mut self, x: &str, scale: &str, bias: Option<&str>, eps: f32, base: &str) -> Option<String> {
        if self.opset < 17 {
            return None;
        }
        let inputs: Vec<&str> = [x, scale].into_iter().chain(bias).collect();
        let y = self.op_with("LayerNormalization", &inputs, base, float_attribute("epsilon", eps));
        self.nodes.last_mut().expect("just pushed").attribute.push(int_attribute("axis", -1));
        Some(y)
    }

    fn rms_norm(&mut self, x: &str, scale: &str, eps: f32, base: &str) -> String {
        let square = self.op("Mul", &[x, x], base);
        let mean = if self.opset >= 18 {
            let axes = self.ints(base, &[-1]);
            self.op("ReduceMean", &[&square, &axes], base)
        } else {
            self.op_with("ReduceMean", &[&square], base, ints_attribute("axes", &[-1]))
        };
        let eps = self.number(base, f64::from(eps));
        let sum = self.op("Add", &[&mean, &eps], base);
        let root = self.op("Sqrt", &[&sum], base);
        let y = self.op("Div", &[x, &root], base);
        self.op("Mul", &[&y, scale], base)
    }
}

#[cfg(all(test, feature = "ort"))]
mod tests {
    use super::*;
    use crate::graph::edit::value_info;
    use crate::passes::evaluate;
    use crate::tensor::DType;

    #[test]
    fn swish_and_swiglu_run_in_onnx_runtime() {
        let alpha = 1.5f32;
        let swish = |n: NodeProto| NodeProto { attribute: vec![float_attribute("alpha", alpha)], ..n };
        let info = |name: &str| value_info(name, DType::F32, &[Err("batch"), Ok(2)]);
        let graph = GraphProto {
            name: Some("gates".into()),
            node: vec![
                swish(node("SwiGLU", &["a", "b"], "h")),
                swish(node("Swish", &["h"], "y")),
                node("Swish", &["y"], "z"),
            ],
            input: vec![info("a"), info("b")],
            output: vec![info("z")],
            ..GraphProto::default()
        };
        let opset = OperatorSetIdProto { domain: Some(String::new()), version: Some(28) };
        let mut model =
            ModelProto { ir_version: Some(10), opset_import: vec![opset], graph: Some(graph), ..ModelProto::default() };
        assert!(evaluate::open(&model).is_err(), "this ONNX Runtime has SwiGLU: the rewrite is needless");
        assert_eq!(plain(&mut model), 3);
        let (a, b) = ([-2.0f32, 0.5, 1.0, 3.0], [1.5f32, -1.0, 0.25, 2.0]);
        let given = [a, b].map(|v| HostTensor::new(&[2, 2], &v).unwrap());
        let made = evaluate::open(&model).unwrap().run(&[("a", &given[0]), ("b", &given[1])]).unwrap();
        let swish = |x: f32, alpha: f32| x / (1.0 + (-alpha * x).exp());
        for (i, z) in made[0].1.to_f32().into_iter().enumerate() {
            let y = swish(swish(a[i], alpha) * b[i], alpha);
            assert!((z - swish(y, 1.0)).abs() < 1e-6, "{i}: {z}");
        }
    }
}
