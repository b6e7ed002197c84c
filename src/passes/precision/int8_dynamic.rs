//! Arithmetic in 8 bits: matrix products and convolutions with constant weights as DynamicQuantizeLinear, MatMulInteger or
//! ConvInteger, and a product with the scales. Weights are symmetric with a scale for each output channel; activations are
//! quantised as they come, a scale for each tensor. So an image is rounded by the range of the whole batch that it is in.
//!
//! Weights are unsigned with the zero point 128: ONNX Runtime multiplies unsigned by signed numbers with instructions that cut sums
//! beyond 16 bits on processors without VNNI, and the samples would be others there.

use std::collections::{HashMap, HashSet};

use crate::error::{Error, Result};
use crate::graph::tensors;
use crate::onnx::{ModelProto, NodeProto};
use crate::tensor::{DType, HostTensor};

use crate::graph::edit;
use crate::graph::edit::int_attribute;
use crate::passes::evaluate;
use crate::passes::evaluate::Inputs;
use crate::passes::precision::half::gemm_as_matmul;
use crate::passes::precision::int8::{QuantisationReport, SMALLEST, most_within, none_within, rows};

/// How names of weights in 8 bits end.
const WEIGHT: &str = "/int8";
/// The zero point of all weights.
const MIDDLE: u8 = 128;

/// A node that can be computed in 8 bits.
struct Candidate {
    /// The value that it makes: names the node.
    output: String,
    label: String,
    /// How far its own result moves, relative (L2), on the calibration inputs.
    error: f64,
}

/// Quantises in place as many nodes as keep the sample within `limit` of the f32 network's on the calibration inputs: where
/// all of them do not, those whose own result suffers most stay in f32.
///
/// Errors, of kind [`crate::Kind::Usage`]: an opset below 11; no node that can be quantised within the limit.
pub fn quantise(model: &mut ModelProto, limit: f64, calibration: &[Inputs]) -> Result<QuantisationReport> {
    if edit::opset(model) < 11 {
        return Err(Error::usage(format!(
            "8-bit arithmetic needs opset 11 or newer, the graph is of {}",
            edit::opset(model)
        ))
        .hint("choose one with --opset, or export the teacher again"));
    }
    gemm_as_matmul(model)?;
    let reference = evaluate::samples(model, calibration)?;
    let (mut candidates, mut kept) = candidates(model);
    measure(model, &mut candidates, calibration)?;
    candidates.sort_by(|a, b| a.error.total_cmp(&b.error));
    let make = |n: usize| rewrite(model, &names(&candidates[..n]), Form::Replaced);
    let most =
        most_within(limit, candidates.len(), &reference, calibration, make)?.map_err(|e| none_within(limit, e))?;
    kept.extend(candidates[most.count..].iter().map(|c| {
        let percent = 100.0 * c.error;
        let reason = format!(
            "in 8 bits its result moves by {percent:.1} %; with it the sample would be off by more than {limit}"
        );
        (c.label.clone(), reason)
    }));
    *model = most.model;
    let weights = model.graph.iter().flat_map(|g| &g.initializer).filter(|t| t.dims.len() > 1);
    let tensors = weights.filter(|t| t.data_type() == DType::U8.to_onnx() && t.name().ends_with(WEIGHT)).count();
    Ok(QuantisationReport { tensors, kept, max_abs: most.max_abs })
}

fn names(candidates: &[Candidate]) -> HashSet<&str> {
    candidates.iter().map(|c| c.output.as_str()).collect()
}

/// Products and convolutions whose weight is an f32 initializer.
fn candidates(model: &ModelProto) -> (Vec<Candidate>, Vec<(String, String)>) {
    let Some(graph) = &model.graph else { return (Vec::new(), Vec::new()) };
    let held: HashMap<&str, &crate::onnx::TensorProto> = graph.initializer.iter().map(|t| (t.name(), t)).collect();
    let (mut found, mut kept) = (Vec::new(), Vec::new());
    for n in &graph.node {
        let weight = n.input.get(1).and_then(|w| held.get(w.as_str()));
        let Some(w) = weight.filter(|w| w.data_type() == DType::F32.to_onnx()) else { continue };
        let len: i64 = w.dims.iter().product();
        let takes = match n.op_type() {
            "MatMul" => w.dims.len() == 2,
            // Over one dimension (sequences, sound), two, or three (volumes, videos).
            "Conv" => edit::int(n, "group").unwrap_or(1) == 1 && (3..=5).contains(&w.dims.len()),
            _ => false,
        };
        if !takes || !matches!(n.domain(), "" | "ai.onnx") {
            continue;
        }
        if len < SMALLEST as i64 {
            kept.push((edit::label(n), format!("{len} weights")));
            continue;
        }
        found.push(Candidate { output: n.output[0].clone(), label: edit::label(n), error: 0.0 });
    }
    (found, kept)
}

/// Measures, in one run of each calibration input, how far each candidate's own result moves.
fn measure(model: &ModelProto, candidates: &mut [Candidate], calibration: &[Inputs]) -> Result<()> {
    let mut watched = rewrite(model, &names(candidates), Form::Beside)?;
    let Some(graph) = watched.graph.as_mut() else { return Ok(()) };
    let mut wanted = Vec::new();
    for (k, c) in candidates.iter().enumerate() {
        let at = |what: &str| format!("disback/{what}/{k}");
        graph.node.push(edit::node("Sub", &[&c.output, &beside(&c.output)], &at("moved")));
        for (from, to) in [(at("moved"), "error"), (c.output.clone(), "size")] {
            graph.node.push(edit::node("Mul", &[&from, &from], &at(&format!("{to}_squared"))));
            let mut sum = edit::node("ReduceSum", &[&at(&format!("{to}_squared"))], &at(to));
            sum.attribute.push(int_attribute("keepdims", 0));
            graph.node.push(sum);
            wanted.push(at(to));
        }
    }
    let mut sums = vec![(0f64, 0f64); candidates.len()];
    for run in evaluate::values(&watched, &wanted, calibration)? {
        for (k, (error, size)) in sums.iter_mut().enumerate() {
            let read = |what: &str| run.get(&format!("disback/{what}/{k}")).and_then(|t| t.to_f64().first().copied());
            *error += read("error").unwrap_or(f64::INFINITY);
            *size += read("size").unwrap_or(0.0);
        }
    }
    for (c, (error, size)) in candidates.iter_mut().zip(sums) {
        c.error = if size > 0.0 { (error / size).sqrt() } else { 0.0 };
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq)]
enum Form {
    /// In place of the node.
    Replaced,
    /// Beside it, for measuring.
    Beside,
}

fn beside(output: &str) -> String {
    format!("{output}/in_8_bits")
}

/// The model with these nodes (by the value that they make) in 8 bits.
fn rewrite(model: &ModelProto, chosen: &HashSet<&str>, form: Form) -> Result<ModelProto> {
    let mut model = model.clone();
    let Some(graph) = model.graph.as_mut() else { return Ok(model) };
    let held: HashMap<String, usize> =
        graph.initializer.iter().enumerate().map(|(i, t)| (t.name().to_owned(), i)).collect();
    let mut w = Writer {
        taken: edit::value_names(graph),
        inputs: HashMap::new(),
        weights: HashMap::new(),
        middle: String::new(),
        out: Vec::new(),
    };
    for n in std::mem::take(&mut graph.node) {
        let weight = n.input.get(1).and_then(|i| held.get(i)).copied();
        match weight {
            Some(at) if chosen.contains(n.output[0].as_str()) => {
                let tensor = tensors::from_proto(&graph.initializer[at])?;
                if form == Form::Beside {
                    w.out.push(n.clone());
                }
                w.lower(graph, &n, &tensor, form)?;
            }
            _ => w.out.push(n),
        }
    }
    graph.node = w.out;
    if form == Form::Replaced {
        edit::remove_dead(graph);
    }
    Ok(model)
}

/// The shape in which a number for each of `channels` meets the result of a convolution whose weight has this rank.
fn a_channel(channels: usize, rank: usize) -> Vec<usize> {
    let mut shape = vec![1; rank - 1];
    shape[0] = channels;
    shape
}

/// An 8-bit value with its scale.
type Quantity = (String, String);

struct Writer {
    taken: HashSet<String>,
    /// Quantised activations, with the zero point, by value: one node for all that read it.
    inputs: HashMap<String, (Quantity, String)>,
    /// Quantised weights, by name and operator.
    weights: HashMap<(String, bool), Quantity>,
    /// Name of the weights' zero point, once there is one.
    middle: String,
    out: Vec<NodeProto>,
}

impl Writer {
    fn name(&mut self, wanted: &str) -> String {
        let name = edit::free_name(&self.taken, wanted);
        self.taken.insert(name.clone());
        name
    }

    fn input(&mut self, x: &str) -> (Quantity, String) {
        if let Some(found) = self.inputs.get(x) {
            return found.clone();
        }
        let [q, scale, zero] = ["u8", "u8_scale", "u8_zero"].map(|what| self.name(&format!("{x}/{what}")));
        let mut n = edit::node("DynamicQuantizeLinear", &[x], &q);
        n.output = vec![q.clone(), scale.clone(), zero.clone()];
        self.out.push(n);
        self.inputs.insert(x.to_owned(), ((q, scale), zero));
        self.inputs[x].clone()
    }

    /// The constant [`MIDDLE`].
    fn middle(&mut self, graph: &mut crate::onnx::GraphProto) -> String {
        if self.middle.is_empty() {
            self.middle = self.name("disback/int8_zero");
            graph.initializer.push(tensors::to_proto(&self.middle, &HostTensor::scalar(MIDDLE)));
        }
        self.middle.clone()
    }

    /// The weight in 8 bits, and its scales in the shape in which they meet the result: one number a channel.
    fn weight(
        &mut self,
        graph: &mut crate::onnx::GraphProto,
        name: &str,
        tensor: &HostTensor,
        conv: bool,
    ) -> Result<Quantity> {
        let key = (name.to_owned(), conv);
        if let Some(found) = self.weights.get(&key) {
            return Ok(found.clone());
        }
        let axis = if conv { 0 } else { tensor.rank() - 1 };
        let (q, scales) = rows(&tensor.to_f32(), tensor.shape(), axis);
        let q: Vec<u8> = q.into_iter().map(|v| (i16::from(v) + i16::from(MIDDLE)) as u8).collect();
        let shape = if conv { a_channel(scales.len(), tensor.rank()) } else { vec![scales.len()] };
        let names = ["int8", "scale"].map(|what| self.name(&format!("{name}/{what}")));
        graph.initializer.push(tensors::to_proto(&names[0], &HostTensor::new(tensor.shape(), &q)?));
        graph.initializer.push(tensors::to_proto(&names[1], &HostTensor::new(&shape, &scales)?));
        let [q, scale] = names;
        self.weights.insert(key.clone(), (q, scale));
        Ok(self.weights[&key].clone())
    }

    fn lower(
        &mut self,
        graph: &mut crate::onnx::GraphProto,
        n: &NodeProto,
        tensor: &HostTensor,
        form: Form,
    ) -> Result<()> {
        let (conv, tensor_rank) = (n.op_type() == "Conv", tensor.rank());
        let (weight, weight_scale) = self.weight(graph, &n.input[1], tensor, conv)?;
        let ((q, scale), zero) = self.input(&n.input[0]);
        let y = if form == Form::Replaced { n.output[0].clone() } else { beside(&n.output[0]) };
        let steps = ["product", "product_f32", "scale", "scaled"].map(|what| self.name(&format!("{y}/{what}")));
        let bias = n.input.get(2).filter(|b| !b.is_empty()).cloned();
        let op = if conv { "ConvInteger" } else { "MatMulInteger" };
        let middle = self.middle(graph);
        let mut product = edit::node(op, &[&q, &weight, &zero, &middle], &steps[0]);
        product.attribute.clone_from(&n.attribute);
        if form == Form::Replaced {
            product.name.clone_from(&n.name);
        }
        let mut cast = edit::node("Cast", &[&steps[0]], &steps[1]);
        cast.attribute.push(int_attribute("to", i64::from(DType::F32.to_onnx())));
        let last = if bias.is_some() { &steps[3] } else { &y };
        self.out.extend([
            product,
            cast,
            edit::node("Mul", &[&scale, &weight_scale], &steps[2]),
            edit::node("Mul", &[&steps[1], &steps[2]], last),
        ]);
        if let Some(b) = bias {
            // One number a channel, where the convolution had it.
            let shaped = self.name(&format!("{y}/bias"));
            let mut of_any = vec![1i64; tensor_rank - 1];
            of_any[0] = -1;
            let held = graph.initializer.iter().find(|t| t.name() == b);
            let tensor = held.map(tensors::from_proto).transpose()?;
            match tensor {
                Some(t) => {
                    let t = t.reshaped(&a_channel(t.len(), tensor_rank))?;
                    graph.initializer.push(tensors::to_proto(&shaped, &t));
                }
                None => {
                    let target = self.name(&format!("{y}/bias_shape"));
                    graph.initializer.push(tensors::to_proto(&target, &HostTensor::vec(&of_any)));
                    self.out.push(edit::node("Reshape", &[&b, &target], &shaped));
                }
            }
            self.out.push(edit::node("Add", &[last, &shaped], &y));
        }
        Ok(())
    }
}
