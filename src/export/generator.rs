//! A student with an architecture of its own as ONNX, under the same contract as the teacher's copy: `noise` and the
//! teacher's conditions in, `sample` out.

use std::sync::Arc;

use tch::{Device, Tensor};

use super::base;
use super::build::{batch_info, clip, declare};
use super::student::{StudentOptions, describe, needs_opset};
use super::trained::{self, Expected, largest};
use crate::diffusion::{Conditions, Generator, GeneratorPorts, HostConditions, TeacherCard};
use crate::error::{Error, Result};
use crate::graph::edit;
use crate::graph::edit::node;
use crate::graph::tensors;
use crate::noise::batch_noise;
use crate::onnx::{GraphProto, ModelProto};
use crate::tensor::{DType, HostTensor};
use crate::torch::{Forward, Network, ParamSet};

/// Builds the student from a generator's graph and its trained weights, and checks it in libtorch against the training
/// network at two batch sizes. `card`: the teacher's.
///
/// Errors: a graph of an operator set before 8; a file that would not compute what was trained.
pub fn generator(
    net: &Network,
    params: &ParamSet,
    ports: &Arc<GeneratorPorts>,
    card: &TeacherCard,
    options: &StudentOptions,
) -> Result<ModelProto> {
    let mut model = base::base(net, params)?;
    needs_opset(&model)?;
    let opset = edit::opset(&model);
    // What an earlier life left: the file may have been a student before.
    model.metadata_props.retain(|p| !p.key().starts_with("disback."));
    let graph = model.graph.as_mut().ok_or_else(|| Error::invalid("the model holds no graph"))?;
    graph.value_info.clear();

    free_names(graph, ports);
    let dim = ports.batch().ok_or("batch");
    let mut kept = vec![batch_info("noise", dim, &ports.noise_shape())];
    for condition in &ports.conditions {
        let input = graph.input.iter().find(|v| v.name() == condition.name);
        let mut input = input
            .cloned()
            .ok_or_else(|| Error::usage(format!("the student's graph has no input `{}`", condition.input.name)))?;
        declare(&mut input, ports.batch(), &condition.input.shape);
        kept.push(input);
    }
    graph.input = kept;

    // noise -> its own rank -> its element type
    let mut before = Vec::new();
    let mut at = "noise".to_owned();
    if ports.noise_row != ports.noise_shape() {
        let mut shape = vec![0i64];
        shape.extend(ports.noise_row.iter().map(|d| *d as i64));
        graph.initializer.push(tensors::to_proto("disback/noise_shape", &HostTensor::vec(&shape)));
        before.push(node("Reshape", &[&at, "disback/noise_shape"], "disback/noise_row"));
        at = "disback/noise_row".into();
    }
    if ports.noise.dtype != DType::F32 {
        let mut cast = node("Cast", &[&at], "disback/noise_cast");
        cast.attribute.push(edit::int_attribute("to", i64::from(ports.noise.dtype.to_onnx())));
        before.push(cast);
        at = "disback/noise_cast".into();
    }
    edit::rename(graph, &own(0), &at);
    // its sample -> f32 -> layout -> range
    let mut after = Vec::new();
    let mut out = own(1);
    if ports.output.dtype != DType::F32 {
        let mut cast = node("Cast", &[&out], "disback/sample_cast");
        cast.attribute.push(edit::int_attribute("to", i64::from(DType::F32.to_onnx())));
        after.push(cast);
        out = "disback/sample_cast".into();
    }
    if let Some(perm) = ports.layout.from_graph() {
        let mut transpose = node("Transpose", &[&out], "disback/sample_nchw");
        transpose.attribute.push(edit::ints_attribute("perm", &perm));
        after.push(transpose);
        out = "disback/sample_nchw".into();
    }
    after.push(clip(graph, &out, card.range, opset));
    let middle = std::mem::take(&mut graph.node);
    graph.node = before.into_iter().chain(middle).chain(after).collect();
    graph.output = vec![batch_info("sample", dim, &card.shape)];
    edit::remove_dead(graph);

    // A consumer wants to know what the inputs of this file take, not the teacher's.
    let mut described = card.clone();
    described.conditions = ports.conditions.iter().map(|c| (c.name.clone(), c.form.clone())).collect();
    let extra = [("architecture", "own".to_owned())];
    let model = describe(model, &described, options, &extra)?;
    if !options.unchecked {
        check(&model, net, params, ports, card)?;
    }
    Ok(model)
}

/// Moves names out of the way that the student's inputs and output are to have, and gives the conditions theirs. The network's
/// noise and output are [`own`] values afterwards.
fn free_names(graph: &mut GraphProto, ports: &GeneratorPorts) {
    // An earlier student's graph has names of ours already.
    let mut before: Vec<String> = edit::value_names(graph).into_iter().filter(|n| n.starts_with("disback/")).collect();
    before.sort();
    for name in before {
        let taken = edit::value_names(graph);
        edit::rename(graph, &name, &edit::free_name(&taken, &name.replacen("disback/", "student/", 1)));
    }
    for node in &mut graph.node {
        node.name = node.name.take().map(|n| n.replacen("disback/", "student/", 1));
    }
    // Its own names go out of the way first, then everything else that has one of ours.
    edit::rename(graph, &ports.noise.name, &own(0));
    edit::rename(graph, &ports.output.name, &own(1));
    let inputs: Vec<_> = ports.conditions.iter().enumerate().map(|(k, c)| (own(k + 2), c)).collect();
    for (name, condition) in &inputs {
        edit::rename(graph, &condition.input.name, name);
    }
    for wanted in ["noise", "sample"].into_iter().chain(ports.conditions.iter().map(|c| c.name.as_str())) {
        let taken = edit::value_names(graph);
        if taken.contains(wanted) {
            edit::rename(graph, wanted, &edit::free_name(&taken, &format!("student_{wanted}")));
        }
    }
    for (name, condition) in &inputs {
        edit::rename(graph, name, &condition.name);
    }
}

/// A port of the network under a name that nothing else has.
fn own(k: usize) -> String {
    format!("disback/port_{k}")
}

/// The file against the training network on fixed noise at batch 1 and 3, or at the graph's.
fn check(
    built: &ModelProto,
    net: &Network,
    params: &ParamSet,
    ports: &Arc<GeneratorPorts>,
    card: &TeacherCard,
) -> Result<()> {
    let ours = net.duplicate()?;
    ours.params().copy_from(params)?;
    let device = net.device();
    let trained = Generator::new(Box::new(ours), ports.clone());
    let mut samples = Vec::new();
    for batch in ports.batch().map_or(vec![1, 3], |b| vec![b]) {
        let row = ports.noise_shape();
        let shape: Vec<i64> = std::iter::once(batch).chain(row.iter().copied()).map(|d| d as i64).collect();
        let z = Tensor::f_from_slice(&batch_noise(0, 0, batch, row.iter().product()))?.f_reshape(shape)?;
        let mut given = Vec::new();
        for c in &ports.conditions {
            let tensor = match c.form.classes() {
                Some(n) => HostTensor::vec(&(0..batch).map(|k| (k % n) as i64).collect::<Vec<_>>()),
                None => {
                    let mut shape = vec![batch];
                    shape.extend(c.form.row_shape());
                    HostTensor::new(&shape, &vec![1f32; shape.iter().product()])?
                }
            };
            given.push((c.name.clone(), tensor));
        }
        let conditions = Conditions::from_host(&HostConditions::new(batch, given)?, device)?;
        let expected = tch::no_grad(|| trained.generate(&z.f_to_device(device)?, &conditions))?;
        let expected = expected.f_to_device(Device::Cpu)?;
        let expected = match card.range {
            Some([low, high]) => expected.f_clamp(low, high)?,
            None => expected,
        };
        let inputs = trained.bound(&conditions)?;
        let mut named = vec![("noise".to_owned(), z)];
        for (c, t) in ports.conditions.iter().zip(inputs) {
            named.push((c.name.clone(), t.f_to_device(Device::Cpu)?));
        }
        let scale = largest(&expected)?;
        samples.push(Expected { batch, inputs: named, sample: expected, scale });
    }
    let apart = trained::compare(built, &samples)?;
    if apart.within() { Ok(()) } else { Err(apart.error()) }
}
