//! The student's graph around the teacher's: noise becomes the network's sample, time and fixed inputs become constants, and the
//! output becomes `x0 = skip x + out F`, cut to the range.

use std::collections::HashMap;

use crate::diffusion::{Coefficients, StudentStart, TeacherCard};
use crate::error::{Error, Result};
use crate::export::fold;
use crate::export::trained::port;
use crate::graph::edit::{self, float_attribute, ints_attribute, node, value_info};
use crate::graph::ir::Port;
use crate::graph::tensors;
use crate::onnx::{GraphProto, ModelProto, NodeProto, ValueInfoProto};
use crate::tensor::{DType, HostTensor};
use crate::torch::Network;

/// How a number takes an input's place: one for all images, or one for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Folded,
    Expanded,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Forms {
    pub time: Form,
    pub constants: Form,
}

/// In the order in which they are tried.
pub(super) const FORMS: [Forms; 3] = [
    Forms { time: Form::Folded, constants: Form::Folded },
    Forms { time: Form::Folded, constants: Form::Expanded },
    Forms { time: Form::Expanded, constants: Form::Expanded },
];

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

/// A batch of f32 samples as a graph's input or output.
pub(super) fn batch_info(name: &str, batch: std::result::Result<usize, &str>, shape: &[usize]) -> ValueInfoProto {
    let dims: Vec<_> = std::iter::once(batch).chain(shape.iter().copied().map(Ok)).collect();
    value_info(name, DType::F32, &dims)
}

/// What a student is built of.
pub(super) struct Plan<'a> {
    pub net: &'a Network,
    pub card: &'a TeacherCard,
    pub start: &'a StudentStart,
    pub forms: Forms,
    /// Whether the network gives a variance behind its prediction.
    pub variance: bool,
}

/// The student's graph with the weights of `base`.
pub(super) fn build(base: &ModelProto, plan: &Plan) -> Result<ModelProto> {
    let mut model = base.clone();
    let opset = edit::opset(&model);
    let declared = declared_types(&model);
    let graph = model.graph.as_mut().ok_or_else(|| Error::invalid("the model holds no graph"))?;
    graph.value_info.clear();
    let Plan { net, card, .. } = plan;
    free_our_names(graph, card);
    let names = present_names(graph, net, card);
    let batch = port(net, &card.sample)?.dims().and_then(|d| d.first().copied().flatten());
    let mut wiring = Wiring { plan, graph, names, declared, opset, before: Vec::new(), after: Vec::new() };
    let (time, output) = (wiring.named(&card.time), wiring.named(&card.output));
    wiring.inputs(batch);
    let x = wiring.sample_in()?;
    wiring.fixed_inputs()?;
    wiring.sample_out(output, &x)?;
    let Wiring { before, after, graph, .. } = wiring;
    let middle = std::mem::take(&mut graph.node);
    graph.node = before.into_iter().chain(middle).chain(after).collect();
    graph.output = vec![batch_info("sample", batch.ok_or("batch"), &card.shape)];
    // Some converters leave nodes in no order.
    edit::sort(graph);
    edit::remove_dead(graph);
    if plan.forms.time == Form::Folded {
        fold::fold(&mut model, &time)?;
    }
    Ok(model)
}

/// Our names must be free: `sample` is what diffusers calls its input.
fn free_our_names(graph: &mut GraphProto, card: &TeacherCard) {
    for ours in ["noise", "sample"] {
        let taken = edit::value_names(graph);
        if taken.contains(ours) && !card.conditions.contains_key(ours) {
            edit::rename(graph, ours, &edit::free_name(&taken, &format!("teacher_{ours}")));
        }
    }
}

/// What the teacher's inputs and its output are called now, before values of ours come in.
fn present_names(graph: &GraphProto, net: &Network, card: &TeacherCard) -> HashMap<String, String> {
    let taken = edit::value_names(graph);
    let present = |name: &str| if taken.contains(name) { name.to_owned() } else { format!("teacher_{name}") };
    let all = net.inputs().iter().map(|p| &p.name).chain([&card.sample, &card.time, &card.output]);
    all.chain(card.constants.keys()).map(|name| (name.clone(), present(name))).collect()
}

/// A graph on its way to a student.
struct Wiring<'a> {
    plan: &'a Plan<'a>,
    graph: &'a mut GraphProto,
    names: HashMap<String, String>,
    /// Element types of inputs and outputs as the file has them.
    declared: HashMap<String, DType>,
    opset: i64,
    /// Nodes in front of the teacher's, and behind them.
    before: Vec<NodeProto>,
    after: Vec<NodeProto>,
}

impl Wiring<'_> {
    fn dtype_of(&self, p: &Port) -> DType {
        self.declared.get(&p.name).copied().or(p.dtype).unwrap_or(DType::F32)
    }

    /// What an input or the output of the teacher is called now.
    fn named(&self, name: &str) -> String {
        self.names.get(name).cloned().unwrap_or_else(|| name.to_owned())
    }

    fn number(&mut self, name: &str, t: HostTensor) -> String {
        self.graph.initializer.push(tensors::to_proto(name, &t));
        name.to_owned()
    }

    /// `noise` and the conditions are the inputs that are left.
    fn inputs(&mut self, batch: Option<usize>) {
        let Plan { net, card, .. } = self.plan;
        let gone: Vec<String> =
            [&card.sample, &card.time].into_iter().chain(card.constants.keys()).map(|name| self.named(name)).collect();
        let ports: Vec<(String, &Port)> = net.inputs().iter().map(|p| (self.named(&p.name), p)).collect();
        self.graph.input.retain(|v| !gone.iter().any(|name| name == v.name()));
        for (name, p) in ports {
            if let Some(v) = self.graph.input.iter_mut().find(|v| v.name() == name) {
                declare(v, batch, &p.dims().unwrap_or_default());
            }
        }
        self.graph.input.insert(0, batch_info("noise", batch.ok_or("batch"), &card.shape));
    }

    /// noise -> scaled -> layout -> element type -> the network's sample. Gives the name of the scaled noise.
    fn sample_in(&mut self) -> Result<String> {
        let Plan { net, card, start, .. } = self.plan;
        let (x_name, x_dtype) = (self.named(&card.sample), self.dtype_of(port(net, &card.sample)?));
        let mut at = "noise".to_owned();
        if start.init_scale != 1.0 {
            let scale = self.number("disback/init_scale", HostTensor::scalar(start.init_scale as f32));
            self.before.push(node("Mul", &[&at, &scale], "disback/x_start"));
            at = "disback/x_start".into();
        }
        let scaled = at.clone();
        if let Some(perm) = card.layout.to_graph() {
            let mut n = node("Transpose", &[&at], "disback/x_nhwc");
            n.attribute.push(ints_attribute("perm", &perm));
            self.before.push(n);
            at = "disback/x_nhwc".into();
        }
        if x_dtype != DType::F32 {
            let mut n = node("Cast", &[&at], "disback/x_cast");
            n.attribute.push(edit::int_attribute("to", i64::from(x_dtype.to_onnx())));
            self.before.push(n);
            at = "disback/x_cast".into();
        }
        edit::rename(self.graph, &x_name, &at);
        Ok(scaled)
    }

    /// Time and the inputs that the card fixes become initializers, expanded to the batch where the graph insists on that.
    fn fixed_inputs(&mut self) -> Result<()> {
        let Plan { net, card, start, forms, .. } = self.plan;
        let mut all = vec![(&card.time, start.coefficients.time, forms.time)];
        all.extend(card.constants.iter().map(|(name, value)| (name, *value, forms.constants)));
        let mut batch_known = false;
        for (k, (original, value, form)) in all.into_iter().enumerate() {
            let p = port(net, original)?;
            let name = self.named(original);
            let dims = p.dims().unwrap_or_default();
            let shape: Vec<usize> = dims.iter().map(|d| d.unwrap_or(1)).collect();
            let value = HostTensor::new(&shape, &vec![value; shape.iter().product()])?.cast(self.dtype_of(p));
            if form == Form::Folded || dims.first() != Some(&None) {
                self.number(&name, value);
                continue;
            }
            if !std::mem::replace(&mut batch_known, true) {
                self.before.push(node("Shape", &["noise"], "disback/noise_shape"));
                let zero = self.number("disback/zero", HostTensor::vec(&[0i64]));
                self.before.push(node("Gather", &["disback/noise_shape", &zero], "disback/batch"));
            }
            let one = self.number(&format!("disback/fixed/{k}"), value);
            let mut shape = "disback/batch".to_owned();
            if dims.len() > 1 {
                let rest = self.number(&format!("disback/ones/{k}"), HostTensor::vec(&vec![1i64; dims.len() - 1]));
                shape = format!("disback/shape/{k}");
                let mut joined = node("Concat", &["disback/batch", &rest], &shape);
                joined.attribute.push(edit::int_attribute("axis", 0));
                self.before.push(joined);
            }
            self.before.push(node("Expand", &[&one, &shape], &name));
        }
        Ok(())
    }

    /// F -> f32 -> layout -> skip x + out F -> range, as `sample`.
    fn sample_out(&mut self, mut out: String, x: &str) -> Result<()> {
        let Plan { net, card, start, variance, .. } = self.plan;
        let x_dtype = self.dtype_of(port(net, &card.sample)?);
        let f_dtype = net.outputs().iter().find(|p| p.name == card.output).map_or(x_dtype, |p| self.dtype_of(p));
        if f_dtype != DType::F32 {
            let mut n = node("Cast", &[&out], "disback/f_cast");
            n.attribute.push(edit::int_attribute("to", i64::from(DType::F32.to_onnx())));
            self.after.push(n);
            out = "disback/f_cast".into();
        }
        if let Some(perm) = card.layout.from_graph() {
            let mut n = node("Transpose", &[&out], "disback/f_nchw");
            n.attribute.push(ints_attribute("perm", &perm));
            self.after.push(n);
            out = "disback/f_nchw".into();
        }
        if let Some(axis) = card.variance_axis().filter(|_| *variance) {
            let mut n = node("Slice", &[&out], "disback/f_mean");
            for (name, at) in [("starts", 0), ("ends", card.shape[axis] as i64), ("axes", 1 + axis as i64)] {
                if self.opset < 10 {
                    n.attribute.push(ints_attribute(name, &[at]));
                } else {
                    n.input.push(self.number(&format!("disback/mean_{name}"), HostTensor::vec(&[at])));
                }
            }
            self.after.push(n);
            out = "disback/f_mean".into();
        }
        let Coefficients { skip, out: scale, .. } = start.coefficients;
        if scale != 1.0 {
            let s = self.number("disback/out", HostTensor::scalar(scale as f32));
            self.after.push(node("Mul", &[&out, &s], "disback/f_scaled"));
            out = "disback/f_scaled".into();
        }
        if skip != 0.0 {
            let s = self.number("disback/skip", HostTensor::scalar(skip as f32));
            self.after.push(node("Mul", &[x, &s], "disback/x_skip"));
            self.after.push(node("Add", &[&out, "disback/x_skip"], "disback/x0"));
            out = "disback/x0".into();
        }
        let clipped = clip(self.graph, &out, card.range, self.opset);
        self.after.push(clipped);
        Ok(())
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
