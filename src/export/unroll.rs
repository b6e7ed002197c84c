//! A student of several steps as one graph: the steps one after the other, their weights shared.

use std::collections::HashMap;

use crate::diffusion::{Conversion, TeacherCard};
use crate::error::{Error, Result};
use crate::export::student::{StudentOptions, student};
use crate::graph::edit;
use crate::graph::edit::node;
use crate::graph::{save, tensors};
use crate::onnx::{GraphProto, ModelProto};
use crate::runtime::student::{ROUNDING_SCALE, StudentInfo};
use crate::tensor::HostTensor;
use crate::torch::{Network, ParamSet};

/// The steps of a student.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Steps {
    /// Noise levels of the steps after the first, falling; empty: one step.
    pub levels: Vec<f64>,
    /// Fresh noise before each further step; else the noise that was found is kept.
    pub stochastic: bool,
}

/// One graph for each step. That of a further step takes `noise = (x0 + sigma e) / sigma` in an EDM schedule (generally
/// `c_in x_edm / init_scale`), where `x0` is the step before's sample, not clipped.
pub fn per_step(
    net: &Network,
    params: &ParamSet,
    card: &TeacherCard,
    options: &StudentOptions,
    steps: &Steps,
) -> Result<Vec<ModelProto>> {
    let mut models = Vec::new();
    for k in 0..=steps.levels.len() {
        // Only the last image is cut to the range: the others are noised again as they are.
        let mut card = card.clone();
        if k < steps.levels.len() {
            card.range = None;
        }
        let sigma_init = if k == 0 { options.sigma_init } else { Some(steps.levels[k - 1]) };
        models.push(student(net, params, &card, &StudentOptions { sigma_init, ..options.clone() })?);
    }
    Ok(models)
}

/// All steps in one graph. `noise` has n times the channels for a stochastic student of n steps, `[batch, n C, H, W]` for images
/// (the noise of its first step in the first C channels, and so on), and is `[batch, ...shape]` otherwise. Where no dimension
/// holds channels it is the first behind the batch.
pub fn unrolled(
    net: &Network,
    params: &ParamSet,
    card: &TeacherCard,
    options: &StudentOptions,
    steps: &Steps,
) -> Result<ModelProto> {
    let models = per_step(net, params, card, options, steps)?;
    let scales = models.iter().map(|m| Ok(StudentInfo::from_model(m)?.rounding_scale)).collect::<Result<Vec<_>>>()?;
    let largest = scales.into_iter().fold(1.0, f64::max);
    let mut models = models.into_iter();
    let mut model = models.next().ok_or_else(|| Error::mismatch("a student without steps"))?;
    if steps.levels.is_empty() {
        return Ok(model);
    }
    let conversion = Conversion::new(card)?;
    let start = conversion.at_start(options.sigma_init)?;
    let opset = edit::opset(&model);
    let axis = card.channel_axis().unwrap_or(0);
    let c = card.shape[axis];
    let total = steps.levels.len() + 1;
    let graph = model.graph.as_mut().ok_or_else(|| Error::invalid("the model holds no graph"))?;
    let mut numbers = Numbers::default();
    // The first step reads its own part of the noise and leaves its image under another name.
    edit::rename(graph, "sample", &image(0));
    if steps.stochastic {
        edit::rename(graph, "noise", &part(0));
        let mut input = graph.input.remove(0);
        let mut nodes = Vec::new();
        for k in 0..total {
            let range = [k * c, (k + 1) * c].map(|v| v as i64);
            nodes.push(numbers.slice(graph, "noise", (1 + axis, range), &part(k), opset));
        }
        nodes.append(&mut graph.node);
        graph.node = nodes;
        set_channels(&mut input, "noise", 1 + axis, total * c);
        graph.input.insert(0, input);
    }
    let mut found = String::new();
    if !steps.stochastic {
        found = "disback/found_0".into();
        if start.sigma.is_finite() {
            // e = (x_edm - x0) / sigma with x_edm = init_scale z / c_in.
            let scale = start.init_scale / start.coefficients.c_in;
            numbers.combine(graph, ("noise", scale / start.sigma), (&image(0), -1.0 / start.sigma), &found);
        } else {
            graph.node.push(node("Identity", &["noise"], &found));
        }
    }
    for (k, (&sigma, step)) in steps.levels.iter().zip(models).enumerate() {
        let k = k + 1;
        let at = conversion.at_start(Some(sigma))?;
        // z = (c_in / init_scale) (x0 + sigma e).
        let factor = at.coefficients.c_in / at.init_scale;
        let e = if steps.stochastic { part(k) } else { found.clone() };
        let z = format!("disback/z_{k}");
        numbers.combine(graph, (&image(k - 1), factor), (&e, factor * sigma), &z);
        let last = k + 1 == total;
        append(graph, step, k, &z, if last { "sample" } else { "" })?;
        if !steps.stochastic && !last {
            let next = format!("disback/found_{k}");
            numbers.combine(graph, (&image(k - 1), 1.0), (&found, sigma), &format!("disback/x_{k}"));
            let x = format!("disback/x_{k}");
            numbers.combine(graph, (&x, 1.0 / sigma), (&image(k), -1.0 / sigma), &next);
            found = next;
        }
    }
    graph.value_info.clear();
    for (key, value) in card.to_metadata()? {
        save::set_metadata(&mut model, &key, &value);
    }
    save::set_metadata(&mut model, ROUNDING_SCALE, &format!("{largest:.3e}"));
    save::set_metadata(&mut model, "disback.student.steps", &total.to_string());
    save::set_metadata(&mut model, "disback.student.sigmas", &format!("{:?}", steps.levels));
    save::set_metadata(&mut model, "disback.student.stochastic", &steps.stochastic.to_string());
    Ok(model)
}

fn image(k: usize) -> String {
    format!("disback/image_{k}")
}
fn part(k: usize) -> String {
    format!("disback/noise_{k}")
}

/// Scalar initializers and small computations under names of our own.
#[derive(Default)]
struct Numbers(usize);

impl Numbers {
    fn scalar(&mut self, graph: &mut GraphProto, value: f64) -> String {
        self.constant(graph, HostTensor::scalar(value as f32))
    }

    fn constant(&mut self, graph: &mut GraphProto, value: HostTensor) -> String {
        let name = format!("disback/number_{}", self.0);
        self.0 += 1;
        graph.initializer.push(tensors::to_proto(&name, &value));
        name
    }

    /// `out = a x + b y`.
    fn combine(&mut self, graph: &mut GraphProto, (x, a): (&str, f64), (y, b): (&str, f64), out: &str) {
        let (a, b) = (self.scalar(graph, a), self.scalar(graph, b));
        let (left, right) = (format!("{out}/left"), format!("{out}/right"));
        graph.node.extend([
            node("Mul", &[x, &a], &left),
            node("Mul", &[y, &b], &right),
            node("Add", &[&left, &right], out),
        ]);
    }

    /// Elements `from..to` of `x` along an axis.
    fn slice(
        &mut self,
        graph: &mut GraphProto,
        x: &str,
        (axis, [from, to]): (usize, [i64; 2]),
        out: &str,
        opset: i64,
    ) -> crate::onnx::NodeProto {
        if opset < 10 {
            let mut n = node("Slice", &[x], out);
            n.attribute.push(edit::ints_attribute("starts", &[from]));
            n.attribute.push(edit::ints_attribute("ends", &[to]));
            n.attribute.push(edit::ints_attribute("axes", &[axis as i64]));
            return n;
        }
        let [from, to, axis] = [from, to, axis as i64].map(|v| self.constant(graph, HostTensor::vec(&[v])));
        node("Slice", &[x, &from, &to, &axis], out)
    }
}

fn set_channels(input: &mut crate::onnx::ValueInfoProto, name: &str, axis: usize, channels: usize) {
    use crate::onnx::tensor_shape_proto::dimension::Value;
    input.name = Some(name.into());
    if let Some(crate::onnx::type_proto::Value::TensorType(t)) = input.r#type.as_mut().and_then(|t| t.value.as_mut())
        && let Some(dim) = t.shape.as_mut().and_then(|s| s.dim.get_mut(axis))
    {
        dim.value = Some(Value::DimValue(channels as i64));
    }
}

/// Adds a step's nodes behind `z`, with names of their own but the weights of the steps before. Its image is called `out`,
/// or as the next step expects it where that is empty.
fn append(graph: &mut GraphProto, step: ModelProto, k: usize, z: &str, out: &str) -> Result<()> {
    let mut theirs = step.graph.ok_or_else(|| Error::invalid("the model holds no graph"))?;
    let ours: HashMap<String, usize> =
        graph.initializer.iter().enumerate().map(|(i, t)| (t.name().to_owned(), i)).collect();
    let same = |t: &crate::onnx::TensorProto| {
        ours.get(t.name()).is_some_and(|&i| {
            let mine = &graph.initializer[i];
            mine == t
        })
    };
    let shared: Vec<String> = theirs.initializer.iter().filter(|t| same(t)).map(|t| t.name().to_owned()).collect();
    let inputs: Vec<String> = theirs.input.iter().map(|v| v.name().to_owned()).filter(|n| n != "noise").collect();
    let mut names: Vec<String> = edit::value_names(&theirs).into_iter().filter(|n| !n.is_empty()).collect();
    names.sort();
    let mut map: HashMap<String, String> = HashMap::new();
    for name in names {
        let to = if name == "noise" {
            z.to_owned()
        } else if name == "sample" {
            if out.is_empty() { image(k) } else { out.to_owned() }
        } else if shared.contains(&name) || inputs.contains(&name) {
            continue;
        } else {
            format!("step{k}/{name}")
        };
        map.insert(name, to);
    }
    rename_all(&mut theirs, &map);
    for n in &mut theirs.node {
        n.name = n.name.take().map(|name| format!("step{k}/{name}"));
    }
    graph.initializer.extend(theirs.initializer.into_iter().filter(|t| !shared.iter().any(|s| s == t.name())));
    graph.node.extend(theirs.node);
    if !out.is_empty() {
        graph.output = theirs.output;
    }
    Ok(())
}

/// Renames many values at once, subgraphs included.
fn rename_all(graph: &mut GraphProto, map: &HashMap<String, String>) {
    let swap = |s: &mut String| {
        if let Some(to) = map.get(s.as_str()) {
            s.clone_from(to);
        }
    };
    for t in &mut graph.initializer {
        t.name.iter_mut().for_each(swap);
    }
    for v in graph.input.iter_mut().chain(&mut graph.output).chain(&mut graph.value_info) {
        v.name.iter_mut().for_each(swap);
    }
    for n in &mut graph.node {
        n.input.iter_mut().chain(&mut n.output).for_each(swap);
        for a in &mut n.attribute {
            for g in a.g.iter_mut().chain(&mut a.graphs) {
                rename_all(g, map);
            }
        }
    }
}
