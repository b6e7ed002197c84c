//! The network as optimum's ONNX Runtime pipelines call it: the inputs' and the output's names are theirs, its time stays free.

use super::FolderStudent;
use super::folder::{Family, PipelineFolder};
use crate::diffusion::{TeacherCard, TimeUnit};
use crate::error::{Error, Result};
use crate::export::base;
use crate::export::build::{batch_info, declare};
use crate::export::student::needs_opset;
use crate::export::trained::port;
use crate::graph::edit::{self, node, value_info};
use crate::graph::{save, tensors};
use crate::onnx::{GraphProto, ModelProto, NodeProto};
use crate::tensor::{DType, HostTensor};

/// Names of a network's sample and of its output in optimum's calls.
fn names(family: Family) -> [&'static str; 2] {
    match family {
        Family::Sd3 => ["hidden_states", "out_hidden_states"],
        _ => ["sample", "out_sample"],
    }
}

/// Errors: a network or a card that optimum's pipelines do not call.
pub(super) fn check(card: &TeacherCard, teacher: &PipelineFolder) -> Result<()> {
    let no = |what: String| {
        Err(Error::unsupported(format!("optimum's ORTDiffusionPipeline does not run this network: {what}"))
            .hint("student.onnx runs in ONNX Runtime by itself; --format diffusers writes a folder for diffusers"))
    };
    if !matches!(teacher.family(), Family::Unet2DCondition | Family::Sd3) {
        let class = teacher.config()["_class_name"].as_str().unwrap_or_default();
        return no(format!(
            "it has pipelines for UNet2DConditionModel and SD3Transformer2DModel as their teachers' graphs are, not for {class}"
        ));
    }
    if let Some((name, _)) = teacher.not_given(card) {
        return no(format!("its pipelines give no `{name}`"));
    }
    if let Some(name) = card.constants.keys().next() {
        return no(format!("its pipelines give no `{name}`, which the card fixes to a number"));
    }
    if card.layout.to_graph().is_some() {
        return no("its samples have their channels last".into());
    }
    if !matches!(card.time_unit, TimeUnit::Step | TimeUnit::Thousand | TimeUnit::LnSigma4) {
        return no(format!("its time_unit is {:?}", card.time_unit));
    }
    Ok(())
}

/// The teacher's graph with the student's weights, under optimum's names.
pub(super) fn network(student: &FolderStudent, family: Family) -> Result<ModelProto> {
    let FolderStudent { network: net, params, card, options, .. } = student;
    let mut model = base::base(net, params)?;
    needs_opset(&model)?;
    let (sample, time) = (port(net, &card.sample)?, port(net, &card.time)?);
    let batch = sample.dims().and_then(|d| d.first().copied().flatten());
    let [x, out] = names(family);
    let graph = model.graph.as_mut().ok_or_else(|| Error::invalid("the model holds no graph"))?;
    graph.value_info.clear();
    graph.output.retain(|v| v.name() == card.output);
    // Under names that no other value has, before the new ones are given.
    let [from, at, made] = [&card.sample, &card.time, &card.output].map(|name| parked(graph, name));
    for name in [x, "timestep", out] {
        if edit::value_names(graph).contains(name) {
            parked(graph, name);
        }
    }
    edit::rename(graph, &from, x);
    edit::rename(graph, &made, out);
    for p in net.inputs() {
        let name = if p.name == card.sample { x } else { p.name.as_str() };
        if let Some(v) = graph.input.iter_mut().find(|v| v.name() == name) {
            declare(v, batch, &p.dims().unwrap_or_default());
        }
    }
    let result = graph.output.first().and_then(element_type).unwrap_or(DType::F32);
    graph.output = vec![batch_info(out, batch.ok_or("batch"), &card.shape)];
    if result != DType::F32 {
        return Err(Error::unsupported(format!("the output `{}` is {result}, expected f32", card.output)));
    }
    time_input(graph, &at, family, time.dims().unwrap_or_default().as_slice());
    edit::sort(graph);
    edit::remove_dead(graph);
    for (key, value) in card.to_metadata()? {
        save::set_metadata(&mut model, &key, &value);
    }
    save::set_metadata(&mut model, "disback.same_graph.method", &options.method);
    save::set_metadata(&mut model, "disback.same_graph.teacher_hash", &options.teacher_hash);
    Ok(model)
}

/// Renames a value to a name that is free; gives that.
fn parked(graph: &mut GraphProto, name: &str) -> String {
    let free = edit::free_name(&edit::value_names(graph), &format!("disback/{name}"));
    edit::rename(graph, name, &free);
    free
}

fn element_type(v: &crate::onnx::ValueInfoProto) -> Option<DType> {
    match v.r#type.as_ref()?.value.as_ref()? {
        crate::onnx::type_proto::Value::TensorType(t) => DType::from_onnx(t.elem_type()).ok(),
        _ => None,
    }
}

/// `timestep`, one number for a UNet and one a sample for a transformer, becomes the graph's own time `at` of shape `dims`.
fn time_input(graph: &mut GraphProto, at: &str, family: Family, dims: &[Option<usize>]) {
    let Some(place) = graph.input.iter().position(|v| v.name() == at) else { return };
    let dtype = element_type(&graph.input[place]).unwrap_or(DType::F32);
    let per_sample = family == Family::Sd3;
    let shape: &[std::result::Result<usize, &str>] = if per_sample { &[Err("batch")] } else { &[] };
    graph.input[place] = value_info("timestep", dtype, shape);
    let mut before: Vec<NodeProto> = Vec::new();
    let mut number = |name: &str, values: &[i64]| {
        graph.initializer.push(tensors::to_proto(name, &HostTensor::vec(values)));
    };
    match (per_sample, dims) {
        (true, [_]) | (false, []) => before.push(node("Identity", &["timestep"], at)),
        // One value for all of them.
        (true, []) => {
            number("disback/first", &[0]);
            number("disback/scalar", &[]);
            before.push(node("Gather", &["timestep", "disback/first"], "disback/one"));
            before.push(node("Reshape", &["disback/one", "disback/scalar"], at));
        }
        (true, _) => {
            let columns: Vec<i64> = std::iter::once(-1).chain(dims[1..].iter().map(|_| 1)).collect();
            number("disback/columns", &columns);
            before.push(node("Reshape", &["timestep", "disback/columns"], at));
        }
        (false, _) => {
            number("disback/ones", &vec![1; dims.len()]);
            before.push(node("Reshape", &["timestep", "disback/ones"], "disback/one"));
            if dims[0].is_some() {
                before.push(node("Identity", &["disback/one"], at));
            } else {
                // The batch is the sample's.
                number("disback/first", &[0]);
                before.push(node("Shape", &["sample"], "disback/sizes"));
                before.push(node("Gather", &["disback/sizes", "disback/first"], "disback/batch"));
                let mut size = "disback/batch".to_owned();
                if dims.len() > 1 {
                    number("disback/rest", &vec![1; dims.len() - 1]);
                    size = "disback/size".into();
                    let mut joined = node("Concat", &["disback/batch", "disback/rest"], &size);
                    joined.attribute.push(edit::int_attribute("axis", 0));
                    before.push(joined);
                }
                before.push(node("Expand", &["disback/one", &size], at));
            }
        }
    }
    before.append(&mut graph.node);
    graph.node = before;
}
