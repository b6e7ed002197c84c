//! Parts appended to a student on request: 8-bit images, the decoder that turns latents into images.

use std::collections::HashMap;
use std::path::Path;

use crate::error::{Context, Error, Result};
use crate::graph::{Model, save, tensors};
use crate::onnx::{GraphProto, ModelProto, ValueInfoProto, tensor_shape_proto::dimension, type_proto};
use crate::runtime::decoder::divisor;
use crate::runtime::student::{StudentInfo, parse_value};
use crate::runtime::{Dim, model_values};
use crate::tensor::{DType, HostTensor};

use crate::graph::edit;
use crate::graph::edit::{int_attribute, ints_attribute, value_info};
use crate::passes::evaluate;

/// Name of the output that [`image`] adds.
pub const IMAGE: &str = "image";

/// Adds the output `image`, u8 `[batch, H, W, C]`: `sample` rounded as `disback sample` rounds for PNG files.
///
/// Errors, of kind [`crate::Kind::Usage`]: latents, which are no images; a file that has an `image` already.
pub fn image(model: &mut ModelProto) -> Result<()> {
    let info = StudentInfo::from_model(model)?;
    let [c, h, w] = info.image_shape().ok_or_else(|| {
        Error::usage(format!(
            "the student's samples are {:?}, which are no images: they have no 8-bit form",
            info.shape
        ))
    })?;
    let [low, high] = info.range.ok_or_else(|| {
        Error::usage("the student makes latents, which are no images").hint("append their decoder with --decoder FILE")
    })?;
    let opset = edit::opset(model);
    let Some(graph) = model.graph.as_mut() else { return Ok(()) };
    if edit::value_names(graph).contains(IMAGE) {
        return Err(Error::usage("the graph has a value named `image` already"));
    }
    let scale = 255.0 / (high - low);
    let numbers = [("image_scale", scale), ("image_offset", 0.5 - low * scale), ("black", 0.0), ("white", 255.0)];
    for (name, value) in numbers {
        graph.initializer.push(tensors::to_proto(&format!("disback/{name}"), &HostTensor::scalar(value as f32)));
    }
    let mut clip =
        edit::node("Clip", &["disback/image_shifted", "disback/black", "disback/white"], "disback/image_f32");
    if opset < 11 {
        clip.input.truncate(1);
        clip.attribute.extend([edit::float_attribute("min", 0.0), edit::float_attribute("max", 255.0)]);
    }
    let mut turn = edit::node("Transpose", &["disback/image_f32"], "disback/image_hwc");
    turn.attribute.push(ints_attribute("perm", &[0, 2, 3, 1]));
    let mut cast = edit::node("Cast", &["disback/image_hwc"], IMAGE);
    cast.attribute.push(int_attribute("to", i64::from(DType::U8.to_onnx())));
    graph.node.extend([
        edit::node("Mul", &["sample", "disback/image_scale"], "disback/image_scaled"),
        edit::node("Add", &["disback/image_scaled", "disback/image_offset"], "disback/image_shifted"),
        clip,
        turn,
        cast,
    ]);
    let batch = match info.noise.shape.first() {
        Some(Dim::Fixed(n)) => Ok(*n),
        _ => Err("batch"),
    };
    graph.output.push(value_info(IMAGE, DType::U8, &[batch, Ok(h), Ok(w), Ok(c)]));
    edit::remove_dead(graph);
    Ok(())
}

/// Runs the student's latents through a decoder, so that `sample` becomes images in `range`: the latents are divided by the
/// card's `latent_scale`, the decoder's output is clipped to `range`.
///
/// Errors, of kind [`crate::Kind::Usage`]: a student of images; a decoder whose input does not take the latents or
/// whose output is no batch of images.
pub fn decoder(model: &mut ModelProto, path: &Path, range: [f64; 2]) -> Result<()> {
    let shown = path.display().to_string();
    let info = StudentInfo::from_model(model)?;
    if info.range.is_some() {
        return Err(Error::usage("--decoder: the student makes images, not latents (its card has a range)"));
    }
    let mut decoder = (*Model::load(path)?.proto).clone();
    save::internalise(&mut decoder);
    let (inputs, outputs) = model_values(&decoder).with_context(|| shown.clone())?;
    if info.shape.len() != 3 {
        return Err(Error::usage(format!(
            "--decoder: a decoder makes images of latents [C, h, w]; the student's samples are {:?}",
            info.shape
        )));
    }
    let fits = |shape: &[Dim], want: &[usize]| {
        shape.len() == 4
            && shape[1..].iter().zip(want).all(|(d, n)| matches!(d, Dim::Symbol(_)) || *d == Dim::Fixed(*n))
    };
    let [input] = inputs.as_slice() else {
        let names: Vec<String> = inputs.iter().map(|i| i.to_string()).collect();
        return Err(Error::usage(format!("{shown}: a decoder has one input, this has {}", names.join("; "))));
    };
    if !fits(&input.shape, &info.shape) || !input.dtype.is_float() {
        return Err(Error::usage(format!("{shown}: input {input} does not take latents of {:?}", info.shape)));
    }
    let images = outputs.iter().find(|o| o.shape.len() == 4 && o.dtype.is_float());
    let images = images.ok_or_else(|| Error::usage(format!("{shown}: no output is a batch of images")))?.clone();
    align(model, &mut decoder).with_context(|| shown.clone())?;
    let scale = info.metadata.get("latent_scale").map(|t| parse_value(t)).and_then(|v| v.as_float()).unwrap_or(1.0);
    let scale = divisor(&decoder, scale);
    let Some(mut part) = decoder.graph else { return Ok(()) };
    prefix(&mut part, "decoder/");
    let (entry, exit) = (format!("decoder/{}", input.name), format!("decoder/{}", images.name));
    let Some(graph) = model.graph.as_mut() else { return Ok(()) };
    edit::rename(graph, "sample", "latent");
    for n in graph.node.iter_mut().filter(|n| n.name() == "disback/sample") {
        n.name = Some("disback/latent_out".into());
    }
    let mut at = "latent".to_owned();
    if scale != 1.0 {
        graph.initializer.push(tensors::to_proto("disback/latent_scale", &HostTensor::scalar((1.0 / scale) as f32)));
        graph.node.push(edit::node("Mul", &[&at, "disback/latent_scale"], "disback/latent"));
        at = "disback/latent".into();
    }
    let cast = |from: &str, to: &str, dtype: DType| {
        let mut n = edit::node("Cast", &[from], to);
        n.attribute.push(int_attribute("to", i64::from(dtype.to_onnx())));
        n
    };
    graph.node.push(cast(&at, &entry, input.dtype));
    graph.node.append(&mut part.node);
    graph.initializer.append(&mut part.initializer);
    let mut numbers = |name: &str, v: f64| {
        let name = format!("disback/decoded_{name}");
        graph.initializer.push(tensors::to_proto(&name, &HostTensor::scalar(v as f32)));
        name
    };
    let (low, high) = (numbers("low", range[0]), numbers("high", range[1]));
    graph.node.push(cast(&exit, "disback/decoded", DType::F32));
    graph.node.push(edit::node("Clip", &["disback/decoded", &low, &high], "sample"));
    graph.output = vec![output(&images.shape, info.noise.shape.first())];
    for f in decoder.functions {
        if !model.functions.iter().any(|g| g.name() == f.name() && g.domain() == f.domain()) {
            model.functions.push(f);
        }
    }
    if images.shape[1..].iter().any(|d| matches!(d, Dim::Symbol(_))) {
        // The decoder's file leaves its size open; a run tells it.
        let run = evaluate::samples(model, &[evaluate::student_inputs(model, 0, 1)?])?;
        let size = run.first().map(|t| t.shape().to_vec()).filter(|s| s.len() == 4).unwrap_or_default();
        let dims: Vec<Dim> = size.into_iter().map(Dim::Fixed).collect();
        if let Some(graph) = model.graph.as_mut().filter(|_| dims.len() == 4) {
            graph.output = vec![output(&dims, info.noise.shape.first())];
        }
    }
    save::set_metadata(model, "disback.range", &format!("[{:?}, {:?}]", range[0], range[1]));
    save::set_metadata(model, "disback.student.decoder", path.file_name().and_then(|n| n.to_str()).unwrap_or("yes"));
    Ok(())
}

/// Brings both graphs to the newer of their operator sets.
fn align(a: &mut ModelProto, b: &mut ModelProto) -> Result<()> {
    let newest = edit::opset(a).max(edit::opset(b));
    for m in [&mut *a, &mut *b] {
        crate::passes::opset::convert(m, newest)?;
    }
    for o in &b.opset_import {
        if !a.opset_import.iter().any(|p| p.domain() == o.domain()) {
            a.opset_import.push(o.clone());
        }
    }
    a.ir_version = Some(a.ir_version().max(b.ir_version()));
    Ok(())
}

/// Puts a prefix before every name of a graph.
fn prefix(graph: &mut GraphProto, with: &str) {
    let names: HashMap<String, String> = edit::value_names(graph)
        .into_iter()
        .filter(|n| !n.is_empty())
        .map(|n| (n.clone(), format!("{with}{n}")))
        .collect();
    for n in &mut graph.node {
        n.name = Some(format!("{with}{}", n.name()));
    }
    names.iter().for_each(|(from, to)| edit::rename(graph, from, to));
}

fn output(shape: &[Dim], batch: Option<&Dim>) -> ValueInfoProto {
    let mut info = value_info("sample", DType::F32, &[]);
    if let Some(type_proto::Value::TensorType(t)) = info.r#type.as_mut().and_then(|t| t.value.as_mut()) {
        let dim = |d: &Dim| match d {
            Dim::Fixed(n) => dimension::Value::DimValue(*n as i64),
            Dim::Symbol(s) => dimension::Value::DimParam(s.clone()),
        };
        let all = batch.into_iter().chain(shape.iter().skip(1));
        let dims = all.map(|d| crate::onnx::tensor_shape_proto::Dimension { value: Some(dim(d)), denotation: None });
        t.shape = Some(crate::onnx::TensorShapeProto { dim: dims.collect() });
    }
    info
}
