//! The one-step student as ONNX: `noise` and the teacher's conditions in, `sample` out; preconditioning inside, sigma folded
//! away.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use crate::diffusion::denoiser::without_variance;
use crate::diffusion::{Coefficients, Conversion, Layout, StudentStart, TeacherCard};
use crate::error::{Context, Error, Result};
use crate::export::base;
use crate::export::fold;
use crate::graph::edit;
use crate::graph::edit::{float_attribute, ints_attribute, node, value_info};
use crate::graph::ir::Port;
use crate::graph::{Model, save, tensors};
use crate::onnx::{GraphProto, ModelProto, NodeProto, OperatorSetIdProto, ValueInfoProto};
use crate::runtime::student::ROUNDING_SCALE;
use crate::tensor::{DType, HostTensor};
use crate::torch::{Forward, ImportOptions, Network, ParamSet};

/// What the metadata of a student says beside the card.
#[derive(Debug, Clone, Default)]
pub struct StudentOptions {
    /// Noise level at which the student starts; `None` is the schedule's own.
    pub sigma_init: Option<f64>,
    /// `disback`, or the base method's name where no trajectory was used.
    pub method: String,
    pub objective: String,
    /// SHA-256 of the teacher's file.
    pub teacher_hash: String,
    /// Write it although it does not compute what was trained: a result that fails its check is still a result.
    pub unchecked: bool,
}

/// Largest difference between the exported file and the training network, relative to the largest term of the sum that makes
/// the sample.
const TOLERANCE: f64 = 1e-5;

/// Builds the one-step student from the teacher's graph and the student's weights, and checks it in libtorch against the
/// training network at two batch sizes. Its weights are not copied where they can be shared: `params` must not change as long
/// as the model is in use.
///
/// Errors: a card that does not fit the graph; a student file that would not compute what was trained.
pub fn student(net: &Network, params: &ParamSet, card: &TeacherCard, options: &StudentOptions) -> Result<ModelProto> {
    let start = Conversion::new(card)?.at_start(options.sigma_init)?;
    let ours = net.with_weights(params)?;
    let reference = Reference { net: &ours, card, start: &start };
    // A time of shape [1] broadcasts over the batch in every usual network and leaves a constant embedding. Where a graph
    // insists on one time an image, the time is expanded to the batch inside the graph instead.
    // The same goes for inputs that the card fixes to a number.
    let base = base::base(net, params)?;
    needs_opset(&base)?;
    let variance = reference.learns_variance()?;
    let expected = match reference.samples() {
        Err(_) if options.unchecked => Vec::new(),
        other => other?,
    };
    let scale = expected.iter().fold(1.0, |m, e| e.scale.max(m));
    let finish = |built: ModelProto| {
        let mut built = describe(built, card, options, &[("sigma_init", start.sigma.to_string())])?;
        save::set_metadata(&mut built, ROUNDING_SCALE, &format!("{scale:.3e}"));
        Ok(built)
    };
    let mut failure = None;
    // The form that came nearest to the training network.
    let mut nearest: Option<(f64, ModelProto)> = None;
    for forms in FORMS {
        if forms.constants == Form::Expanded && card.constants.is_empty() && forms.time == Form::Folded {
            continue;
        }
        let built = build(net, &base, card, &start, forms, variance)?;
        let apart = match compare(&built, &expected) {
            Ok(apart) if apart.within() => return finish(built),
            Ok(apart) => {
                failure = Some(apart.error());
                apart.relative()
            }
            Err(e) => {
                failure = Some(e);
                f64::INFINITY
            }
        };
        if options.unchecked && nearest.as_ref().is_none_or(|(best, _)| apart < *best) {
            nearest = Some((apart, built));
        }
    }
    if let Some((_, built)) = nearest {
        return finish(built);
    }
    Err(failure.expect("a form was tried").context("the exported student does not compute what was trained"))
}

/// The teacher's graph with the student's weights and nothing else changed.
pub fn same_graph(
    net: &Network,
    params: &ParamSet,
    card: &TeacherCard,
    options: &StudentOptions,
) -> Result<ModelProto> {
    let mut model = net.to_model(params)?;
    for (key, value) in card.to_metadata()? {
        save::set_metadata(&mut model, &key, &value);
    }
    save::set_metadata(&mut model, "disback.same_graph.method", &options.method);
    save::set_metadata(&mut model, "disback.same_graph.teacher_hash", &options.teacher_hash);
    Ok(model)
}

/// How a number takes an input's place: one for all images, or one for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Folded,
    Expanded,
}

#[derive(Debug, Clone, Copy)]
struct Forms {
    time: Form,
    constants: Form,
}

/// In the order in which they are tried.
const FORMS: [Forms; 3] = [
    Forms { time: Form::Folded, constants: Form::Folded },
    Forms { time: Form::Folded, constants: Form::Expanded },
    Forms { time: Form::Expanded, constants: Form::Expanded },
];

fn port<'a>(net: &'a Network, name: &str) -> Result<&'a Port> {
    net.inputs().iter().find(|p| p.name == name).ok_or_else(|| Error::usage(format!("the graph has no input `{name}`")))
}

/// Element types of the graph's inputs and outputs as the file has them.
fn declared_types(model: &ModelProto) -> HashMap<String, DType> {
    use crate::onnx::type_proto::Value;
    let values = model.graph.iter().flat_map(|g| g.input.iter().chain(&g.output));
    let typed = values.filter_map(|v| match v.r#type.as_ref()?.value.as_ref()? {
        Value::TensorType(t) => Some((v.name().to_owned(), DType::from_onnx(t.elem_type()).ok()?)),
        _ => None,
    });
    typed.collect()
}

fn build(
    net: &Network,
    base: &ModelProto,
    card: &TeacherCard,
    start: &StudentStart,
    forms: Forms,
    variance: bool,
) -> Result<ModelProto> {
    let mut model = base.clone();
    let opset = edit::opset(&model);
    let x = port(net, &card.sample)?;
    let t = port(net, &card.time)?;
    let declared = declared_types(&model);
    let dtype_of = |p: &Port| declared.get(&p.name).copied().or(p.dtype).unwrap_or(DType::F32);
    let x_dtype = dtype_of(x);
    let graph = model.graph.as_mut().ok_or_else(|| Error::invalid("the model holds no graph"))?;
    graph.value_info.clear();
    // Our names must be free: `sample` is what diffusers calls its input.
    for ours in ["noise", "sample"] {
        let taken = edit::value_names(graph);
        if taken.contains(ours) && !card.conditions.contains_key(ours) {
            edit::rename(graph, ours, &edit::free_name(&taken, &format!("teacher_{ours}")));
        }
    }
    let renamed = |graph: &GraphProto, name: &str| {
        let prefixed = format!("teacher_{name}");
        if edit::value_names(graph).contains(name) { name.to_owned() } else { prefixed }
    };
    let (x_name, t_name, f_name) =
        (renamed(graph, &card.sample), renamed(graph, &card.time), renamed(graph, &card.output));
    let constants: Vec<(String, f64)> = card.constants.iter().map(|(n, v)| (renamed(graph, n), *v)).collect();

    let batch = x.dims().and_then(|d| d.first().copied().flatten());
    let [c, h, w] = card.shape;
    let dim = batch.ok_or("batch");
    graph.input.retain(|v| v.name() != x_name && v.name() != t_name && !constants.iter().any(|(n, _)| n == v.name()));
    for (name, p) in net.inputs().iter().map(|p| (renamed(graph, &p.name), p)).collect::<Vec<_>>() {
        if let Some(v) = graph.input.iter_mut().find(|v| v.name() == name) {
            declare(v, batch, &p.dims().unwrap_or_default());
        }
    }
    graph.input.insert(0, value_info("noise", DType::F32, &[dim, Ok(c), Ok(h), Ok(w)]));

    let mut before = Vec::new();
    let number = |graph: &mut GraphProto, name: &str, t: HostTensor| {
        graph.initializer.push(tensors::to_proto(name, &t));
        name.to_owned()
    };
    // noise -> scaled -> layout -> element type -> x_net
    let mut at = "noise".to_owned();
    let push = |before: &mut Vec<_>, n| before.push(n);
    if start.init_scale != 1.0 {
        let scale = number(graph, "disback/init_scale", HostTensor::scalar(start.init_scale as f32));
        push(&mut before, node("Mul", &[&at, &scale], "disback/x_start"));
        at = "disback/x_start".into();
    }
    let x_f32 = at.clone();
    if card.layout == Layout::Nhwc {
        let mut n = node("Transpose", &[&at], "disback/x_nhwc");
        n.attribute.push(ints_attribute("perm", &[0, 2, 3, 1]));
        push(&mut before, n);
        at = "disback/x_nhwc".into();
    }
    if x_dtype != DType::F32 {
        let mut n = node("Cast", &[&at], "disback/x_cast");
        n.attribute.push(edit::int_attribute("to", i64::from(x_dtype.to_onnx())));
        push(&mut before, n);
        at = "disback/x_cast".into();
    }
    edit::rename(graph, &x_name, &at);

    // Time and other fixed inputs become initializers.
    let filled = |p: &Port, value: f64| -> Result<HostTensor> {
        let shape: Vec<usize> = p.dims().unwrap_or_default().into_iter().map(|d| d.unwrap_or(1)).collect();
        let len = shape.iter().product();
        Ok(HostTensor::new(&shape, &vec![value; len])?.cast(dtype_of(p)))
    };
    let mut all = vec![(t_name.clone(), t, start.coefficients.time, forms.time)];
    for (name, value) in &constants {
        let original =
            card.constants.keys().find(|k| renamed(graph, k) == *name).cloned().unwrap_or_else(|| name.clone());
        all.push((name.clone(), port(net, &original)?, *value, forms.constants));
    }
    let mut batch_known = false;
    for (k, (name, p, value, form)) in all.into_iter().enumerate() {
        let dims = p.dims().unwrap_or_default();
        let value = filled(p, value)?;
        if form == Form::Folded || dims.first() != Some(&None) {
            number(graph, &name, value);
            continue;
        }
        if !std::mem::replace(&mut batch_known, true) {
            push(&mut before, node("Shape", &["noise"], "disback/noise_shape"));
            let zero = number(graph, "disback/zero", HostTensor::vec(&[0i64]));
            push(&mut before, node("Gather", &["disback/noise_shape", &zero], "disback/batch"));
        }
        let one = number(graph, &format!("disback/fixed/{k}"), value);
        let mut shape = "disback/batch".to_owned();
        if dims.len() > 1 {
            let rest = number(graph, &format!("disback/ones/{k}"), HostTensor::vec(&vec![1i64; dims.len() - 1]));
            shape = format!("disback/shape/{k}");
            let mut joined = node("Concat", &["disback/batch", &rest], &shape);
            joined.attribute.push(edit::int_attribute("axis", 0));
            push(&mut before, joined);
        }
        push(&mut before, node("Expand", &[&one, &shape], &name));
    }

    // F -> f32 -> layout -> skip x_net + out F -> clip
    let mut after = Vec::new();
    let mut out = f_name;
    let f_dtype = net.outputs().iter().find(|p| p.name == card.output).map_or(x_dtype, dtype_of);
    if f_dtype != DType::F32 {
        let mut n = node("Cast", &[&out], "disback/f_cast");
        n.attribute.push(edit::int_attribute("to", i64::from(DType::F32.to_onnx())));
        after.push(n);
        out = "disback/f_cast".into();
    }
    if card.layout == Layout::Nhwc {
        let mut n = node("Transpose", &[&out], "disback/f_nchw");
        n.attribute.push(ints_attribute("perm", &[0, 3, 1, 2]));
        after.push(n);
        out = "disback/f_nchw".into();
    }
    if variance {
        let mut n = node("Slice", &[&out], "disback/f_mean");
        for (name, at) in [("starts", 0), ("ends", c as i64), ("axes", 1)] {
            if opset < 10 {
                n.attribute.push(ints_attribute(name, &[at]));
            } else {
                n.input.push(number(graph, &format!("disback/mean_{name}"), HostTensor::vec(&[at])));
            }
        }
        after.push(n);
        out = "disback/f_mean".into();
    }
    let Coefficients { skip, out: scale, .. } = start.coefficients;
    if scale != 1.0 {
        let s = number(graph, "disback/out", HostTensor::scalar(scale as f32));
        after.push(node("Mul", &[&out, &s], "disback/f_scaled"));
        out = "disback/f_scaled".into();
    }
    if skip != 0.0 {
        let s = number(graph, "disback/skip", HostTensor::scalar(skip as f32));
        after.push(node("Mul", &[&x_f32, &s], "disback/x_skip"));
        after.push(node("Add", &[&out, "disback/x_skip"], "disback/x0"));
        out = "disback/x0".into();
    }
    after.push(clip(graph, &out, card.range, opset));
    let middle = std::mem::take(&mut graph.node);
    graph.node = before.into_iter().chain(middle).chain(after).collect();
    graph.output = vec![value_info("sample", DType::F32, &[dim, Ok(c), Ok(h), Ok(w)])];
    // Some converters leave nodes in no order.
    edit::sort(graph);
    edit::remove_dead(graph);
    if forms.time == Form::Folded {
        fold::fold(&mut model, &t_name)?;
    }
    Ok(model)
}

/// The operator set must know what a student needs.
pub(super) fn needs_opset(model: &ModelProto) -> Result<()> {
    match edit::opset(model) {
        8.. => Ok(()),
        old => Err(Error::unsupported(format!("a student at opset {old}, expected 8 or newer"))
            .hint("export the network with a newer opset")),
    }
}

/// Calls the first dimension `batch` where the graph does not fix it: other names would let runtimes believe that inputs may
/// differ in it. The others get the sizes that the student was trained for, where the file leaves them free.
pub(super) fn declare(v: &mut ValueInfoProto, batch: Option<usize>, dims: &[Option<usize>]) {
    use crate::onnx::tensor_shape_proto::dimension::Value::{DimParam, DimValue};
    let Some(crate::onnx::type_proto::Value::TensorType(tt)) = v.r#type.as_mut().and_then(|t| t.value.as_mut()) else {
        return;
    };
    for (axis, dim) in tt.shape.iter_mut().flat_map(|s| &mut s.dim).enumerate() {
        match dims.get(axis) {
            _ if axis == 0 && batch.is_none() => dim.value = Some(DimParam("batch".into())),
            Some(Some(n)) => dim.value = Some(DimValue(*n as i64)),
            _ => {}
        }
    }
}

/// The last node: `x` cut to the range, or as it is, as `sample`.
pub(super) fn clip(graph: &mut GraphProto, x: &str, range: Option<[f64; 2]>, opset: i64) -> NodeProto {
    match range {
        Some([low, high]) if opset >= 11 => {
            let ends = [("disback/low", low), ("disback/high", high)];
            for (name, value) in ends {
                graph.initializer.push(tensors::to_proto(name, &HostTensor::scalar(value as f32)));
            }
            node("Clip", &[x, "disback/low", "disback/high"], "sample")
        }
        Some([low, high]) => {
            let mut n = node("Clip", &[x], "sample");
            n.attribute.extend([float_attribute("min", low as f32), float_attribute("max", high as f32)]);
            n
        }
        None => node("Identity", &[x], "sample"),
    }
}

/// Puts the card and what a student's file says about it into the metadata.
pub(super) fn describe(
    mut model: ModelProto,
    card: &TeacherCard,
    options: &StudentOptions,
    extra: &[(&str, String)],
) -> Result<ModelProto> {
    // IR version 4 is the first where initializers need not be inputs; ours are not.
    model.ir_version = Some(model.ir_version().max(4));
    if model.opset_import.is_empty() {
        model.opset_import.push(OperatorSetIdProto { domain: Some(String::new()), version: Some(8) });
    }
    model.producer_name = Some("disback".into());
    model.producer_version = Some(env!("CARGO_PKG_VERSION").into());
    // The framework's list speaks of the teacher's graph.
    model.metadata_props.retain(|p| !p.key().starts_with("disback.parameters"));
    for (key, value) in card.to_metadata()? {
        save::set_metadata(&mut model, &key, &value);
    }
    let entries = [
        ("method", options.method.clone()),
        ("objective", options.objective.clone()),
        ("steps", "1".to_owned()),
        ("teacher_hash", options.teacher_hash.clone()),
        ("noise", "standard normal".to_owned()),
        (
            "seed_convention",
            "image k of seed s: ChaCha8 keyed by (s, k), Box-Muller pairs in row-major order; see disback::noise"
                .to_owned(),
        ),
    ];
    for (key, value) in entries.iter().chain(extra) {
        save::set_metadata(&mut model, &format!("disback.student.{key}"), value);
    }
    Ok(model)
}

/// A built file as it will be read, for [`compare`].
pub(super) fn read_back(built: &ModelProto) -> Result<Network> {
    let options = ImportOptions { raise: false, ..ImportOptions::default() };
    Network::import(Model::from_proto(built.clone()), &options, Device::Cpu)
}

/// What the training network makes of fixed inputs.
pub(super) struct Expected {
    pub batch: usize,
    pub inputs: Vec<(String, Tensor)>,
    pub sample: Tensor,
    /// The largest term of the sum that makes the sample.
    pub scale: f64,
}

/// The largest absolute value.
pub(super) fn largest(t: &Tensor) -> Result<f64> {
    Ok(t.f_abs()?.f_max()?.f_double_value(&[])?)
}

/// How far a built file is from the training network, where it is farthest for its tolerance.
pub(super) struct Apart {
    batch: usize,
    /// Largest difference of a value.
    error: f64,
    /// Largest value of the sample, and largest term of the sum that makes it.
    size: f64,
    scale: f64,
}

impl Apart {
    /// The difference over what it is relative to. NaN counts as infinite.
    fn relative(&self) -> f64 {
        let relative = self.error / self.scale.max(1.0);
        if relative.is_nan() { f64::INFINITY } else { relative }
    }

    pub(super) fn within(&self) -> bool {
        self.relative() <= TOLERANCE
    }

    pub(super) fn error(&self) -> Error {
        let Self { batch, error, size, scale } = self;
        Error::mismatch(format!(
            "max abs error {error:.2e} at batch {batch} where values reach {size:.2} and are sums of terms of up to {scale:.1}"
        ))
    }
}

/// A built file against what the training network made of the same inputs.
///
/// Errors: a file that cannot be read back or run, or whose sample has another shape.
pub(super) fn compare(built: &ModelProto, expected: &[Expected]) -> Result<Apart> {
    let exported = read_back(built)?;
    let mut worst = Apart { batch: 0, error: 0.0, size: 0.0, scale: 1.0 };
    for Expected { batch, inputs, sample, scale } in expected {
        let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let (_, ours) =
            tch::no_grad(|| exported.forward(&inputs)).with_context(|| format!("at batch {batch}"))?.remove(0);
        if ours.size() != sample.size() {
            let (found, expected) = (ours.size(), sample.size());
            return Err(Error::mismatch(format!("shape {found:?} at batch {batch}, expected {expected:?}")));
        }
        let error = largest(&ours.f_sub(sample)?)?;
        let found = Apart { batch: *batch, error, size: largest(sample)?, scale: *scale };
        if worst.batch == 0 || found.relative() > worst.relative() {
            worst = found;
        }
    }
    Ok(worst)
}

/// The student as it was trained.
struct Reference<'a> {
    net: &'a Network,
    card: &'a TeacherCard,
    start: &'a StudentStart,
}

impl Reference<'_> {
    /// What the training network makes of fixed noise at batch 1 and 3 (or the graph's fixed batch).
    fn samples(&self) -> Result<Vec<Expected>> {
        let fixed = port(self.net, &self.card.sample)?.dims().and_then(|d| d.first().copied().flatten());
        let batches = fixed.map_or(vec![1, 3], |b| vec![b]);
        let one = |batch: usize| {
            let noise = self.noise(batch)?;
            let conditions = self.conditions(batch)?;
            let (sample, scale) =
                tch::no_grad(|| self.forward(&noise, &conditions)).with_context(|| format!("at batch {batch}"))?;
            let inputs = std::iter::once(("noise".to_owned(), noise)).chain(conditions).collect();
            Ok(Expected { batch, inputs, sample, scale })
        };
        batches.into_iter().map(one).collect()
    }

    /// The element type in which training feeds an input.
    fn fed(&self, p: &Port) -> Kind {
        let dtype = p.dtype.unwrap_or(DType::F32);
        crate::torch::convert::kind(if self.net.shared().widened { dtype.widened() } else { dtype })
    }

    fn noise(&self, batch: usize) -> Result<Tensor> {
        let [c, h, w] = self.card.shape;
        let values = crate::noise::batch_noise(0, 0, batch, c * h * w);
        Ok(Tensor::f_from_slice(&values)?.f_reshape([batch as i64, c as i64, h as i64, w as i64])?)
    }

    /// Different class indices for the images, ones for other conditions.
    fn conditions(&self, batch: usize) -> Result<Vec<(String, Tensor)>> {
        self.card
            .conditions
            .iter()
            .map(|(name, condition)| {
                let p = port(self.net, name)?;
                let mut size: Vec<i64> =
                    p.dims().unwrap_or_default().iter().map(|d| d.map_or(1, |n| n as i64)).collect();
                if let Some(first) = size.first_mut() {
                    *first = batch as i64;
                }
                let kind = self.fed(p);
                let classes = condition.classes().unwrap_or(1).max(1) as i64;
                let t = if kind == Kind::Int64 || kind == Kind::Int {
                    let n: i64 = size.iter().product();
                    Tensor::f_arange(n, (kind, Device::Cpu))?.f_remainder(classes)?.f_reshape(&size[..])?
                } else {
                    Tensor::f_ones(&size[..], (kind, Device::Cpu))?
                };
                Ok((name.clone(), t))
            })
            .collect()
    }

    /// Whether the network gives a variance behind its prediction, which has no place in a student.
    fn learns_variance(&self) -> Result<bool> {
        let axis = if self.card.layout == Layout::Nhwc { 3 } else { 1 };
        let output = self.net.outputs().iter().find(|p| p.name == self.card.output);
        let channels = match output.and_then(|p| p.dims()).and_then(|d| d.get(axis).copied().flatten()) {
            Some(n) => n,
            // Exporters may leave it open.
            None => {
                let dims = port(self.net, &self.card.sample)?.dims();
                let batch = dims.and_then(|d| d.first().copied().flatten()).unwrap_or(1);
                tch::no_grad(|| self.raw(&self.noise(batch)?, &self.conditions(batch)?))?.size()[1] as usize
            }
        };
        Ok(channels == 2 * self.card.shape[0])
    }

    /// The sample, and the largest term of the sum that makes it.
    fn forward(&self, noise: &Tensor, conditions: &[(String, Tensor)]) -> Result<(Tensor, f64)> {
        let x = noise.f_mul_scalar(self.start.init_scale)?;
        let f = without_variance(self.raw(noise, conditions)?, self.card.shape[0])?;
        let Coefficients { skip, out, .. } = self.start.coefficients;
        let terms = [f.f_mul_scalar(out)?, x.f_mul_scalar(skip)?];
        let scale = largest(&terms[0])?.max(largest(&terms[1])?);
        let x0 = terms[0].f_add(&terms[1])?;
        let x0 = match self.card.range {
            Some([low, high]) => x0.f_clamp(low, high)?,
            None => x0,
        };
        Ok((x0, scale))
    }

    /// The network's own output on this noise, as [B, C, H, W] in f32.
    fn raw(&self, noise: &Tensor, conditions: &[(String, Tensor)]) -> Result<Tensor> {
        let batch = noise.size()[0];
        let x = noise.f_mul_scalar(self.start.init_scale)?;
        let nhwc = self.card.layout == Layout::Nhwc;
        let x_port = port(self.net, &self.card.sample)?;
        let cast = |t: &Tensor, p: &Port| -> Result<Tensor> { Ok(t.f_to_kind(self.fed(p))?) };
        let x_in = cast(&if nhwc { x.f_permute([0, 2, 3, 1])? } else { x.shallow_clone() }, x_port)?;
        let full = |p: &Port, v: f64| -> Result<Tensor> {
            let size: Vec<i64> = p.dims().unwrap_or_default().iter().map(|d| d.map_or(batch, |n| n as i64)).collect();
            cast(&Tensor::f_full(&size[..], v, (Kind::Double, Device::Cpu))?, p)
        };
        let time = full(port(self.net, &self.card.time)?, self.start.coefficients.time)?;
        let constants = self
            .card
            .constants
            .iter()
            .map(|(n, v)| Ok((n.clone(), full(port(self.net, n)?, *v)?)))
            .collect::<Result<Vec<_>>>()?;
        let mut inputs: Vec<(&str, &Tensor)> = vec![(&self.card.sample, &x_in), (&self.card.time, &time)];
        inputs.extend(conditions.iter().chain(&constants).map(|(n, t)| (n.as_str(), t)));
        // The training network may live on another device; the check is made on the CPU.
        let device = self.net.device();
        let moved: Vec<(&str, Tensor)> =
            inputs.iter().map(|(n, t)| Ok((*n, t.f_to_device(device)?))).collect::<Result<_>>()?;
        let refs: Vec<(&str, &Tensor)> = moved.iter().map(|(n, t)| (*n, t)).collect();
        let out = self.net.forward(&refs)?;
        let (_, f) = out
            .into_iter()
            .find(|(n, _)| *n == self.card.output)
            .ok_or_else(|| Error::usage(format!("the graph has no output `{}`", self.card.output)))?;
        let f = f.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?;
        Ok(if nhwc { f.f_permute([0, 3, 1, 2])? } else { f })
    }
}
