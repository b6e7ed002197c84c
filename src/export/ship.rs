//! From the student as distilled to the file that ships: batch, operator set, optimised and portable graph, precision,
//! appended parts, and what a consumer must know in the metadata. The passes are in [`super::pipeline`]; each that promises to
//! keep the values is checked against the student that came in.

use crate::error::{Error, Result};
use crate::export::attach;
use crate::export::consumer::consumer_metadata;
use crate::export::expected::Expected;
use crate::export::options::{Precision, ShipOptions, ShipReport};
use crate::export::pipeline::{IMAGE, PASSES, Shipping};
use crate::graph::{edit, save};
use crate::onnx::tensor_shape_proto::dimension;
use crate::onnx::{GraphProto, ModelProto, type_proto};
use crate::passes::evaluate::{self, Inputs};
use crate::passes::{Dump, Passes};
use crate::runtime::Dim;
use crate::runtime::student::StudentInfo;
use crate::tensor::DType;

/// Above this many bytes of weights a check after each pass takes too long: one at the end, and where that fails, the passes
/// again with a check after each.
const CHECKED_AT_ONCE: usize = 256 << 20;

/// Applies the options. `model` is a student (`StudentInfo` reads it); its own precision must be f32 for another one.
///
/// Errors: options that do not go together or with the graph ([`crate::Kind::Usage`]); a result that is not the student
/// that came in, with the pass that changed it.
pub fn ship(mut model: ModelProto, options: &ShipOptions) -> Result<(ModelProto, ShipReport)> {
    let info = StudentInfo::from_model(&model)?;
    // Written by us before, or as the teacher's file has its weights.
    let shipped = info.metadata.get("student.precision").is_some_and(|p| p != "f32");
    let stored = info.metadata.get("student.precision").map_or_else(|| weights_in(&model), |p| p.clone());
    if stored != "f32" && (options.precision != Precision::F32 || options.decoder.is_some()) {
        return Err(Error::usage(format!("the student is stored in {stored} already"))
            .hint("leave --precision out, or start from a student in f32"));
    }
    if let Some((path, range)) = &options.decoder {
        attach::decoder(&mut model, path, *range)?;
    }
    let original = model.clone();
    if let Some(n) = options.batch {
        fix_batch(&mut model, n)?;
    }
    let engine = engine_missing();
    if let Some(reason) = engine.as_ref().filter(|_| options.precision != Precision::F32) {
        return Err(Error::backend(format!(
            "--precision {} calibrates with ONNX Runtime: {reason}",
            options.precision.name()
        ))
        .hint("pip install onnxruntime (1.27 or newer) and set ORT_DYLIB_PATH to its capi folder"));
    }
    let expected = if engine.is_none() { Some(Expected::of(&original, &model)?) } else { None };
    let probes = if engine.is_none() && !shipped { Some(probes(&model)?) } else { None };
    let at_once = weight_bytes(&model) <= CHECKED_AT_ONCE;
    let start = model.clone();
    let run = |checked: bool| -> Result<(ModelProto, ShipReport)> {
        let mut report = ShipReport::new(options, &start);
        report.warnings.extend(engine.iter().map(|reason| format!("neither optimised nor made portable: {reason}")));
        let mut shared = Shipping { options, stored: stored.clone(), probes: probes.clone(), report };
        let still = expected.as_ref().filter(|_| checked);
        let mut model = start.clone();
        passes(&mut model, &mut shared, still)?;
        let precision = if stored == "f32" { options.precision.name() } else { &stored };
        consumer_metadata(&mut model, precision)?;
        let mut report = shared.report;
        report.opset = edit::opset(&model);
        if let Some(expected) = &expected {
            let rounded = report.half.as_ref().map_or(0.0, |h| h.max_abs);
            report.max_abs = Some(expected.check(&model, options, &stored, rounded, &mut report.warnings)?);
        }
        report.weight_bytes = weight_bytes(&model);
        Ok((model, report))
    };
    match run(at_once) {
        // The check after each pass names the one at fault.
        Err(e) if !at_once && e.kind() == crate::Kind::Mismatch => run(true).and(Err(e)),
        other => other,
    }
}

/// Runs the passes, each that keeps the values compared with `expected` where that is given.
fn passes(model: &mut ModelProto, shared: &mut Shipping, expected: Option<&Expected>) -> Result<()> {
    let list: Vec<_> = PASSES.into_iter().chain([IMAGE]).map(|p| p as _).collect();
    let check = |model: &ModelProto, shared: &Shipping| expected.map_or(Ok(()), |e| e.still(model, &shared.stored));
    let dump = shared.options.dump_passes.clone();
    let passes =
        Passes { list: &list, check: Some(&check), dump: dump.map(|folder| Dump { folder, write: &save::write }) };
    passes.run(model, shared)
}

/// Bytes of weights.
fn weight_bytes(model: &ModelProto) -> usize {
    let weights = model.graph.iter().flat_map(|g| &g.initializer);
    weights.map(|t| t.raw_data.as_ref().map_or(0, |b| b.len())).sum()
}

/// Inputs at batch sizes that have nothing in common, or at the fixed one.
fn probes(model: &ModelProto) -> Result<Vec<Inputs>> {
    let fixed = matches!(StudentInfo::from_model(model)?.noise.shape.first(), Some(Dim::Fixed(_)));
    let sizes: &[usize] = if fixed { &[1] } else { &[2, 3, 7] };
    sizes.iter().map(|&n| evaluate::student_inputs(model, 0, n)).collect()
}

/// The type of most weights, as precisions are called.
fn weights_in(model: &ModelProto) -> String {
    let mut bytes = [0usize; 2];
    for t in model.graph.iter().flat_map(|g| &g.initializer) {
        let len = t.dims.iter().product::<i64>().max(0) as usize;
        match DType::from_onnx(t.data_type()) {
            Ok(DType::F16) => bytes[0] += len,
            Ok(DType::F32) => bytes[1] += len,
            _ => {}
        }
    }
    if bytes[0] > bytes[1] { "fp16" } else { "f32" }.into()
}

fn engine_missing() -> Option<String> {
    #[cfg(feature = "ort")]
    return crate::runtime::ort::library().err().map(|e| Error::from(e).to_string());
    #[cfg(not(feature = "ort"))]
    Some("this build has no ONNX Runtime engine (feature `ort`)".into())
}

/// Fixes the first dimension of the inputs and outputs.
fn fix_batch(model: &mut ModelProto, n: usize) -> Result<()> {
    if n == 0 {
        return Err(Error::usage("--batch 0: expected 1 or more"));
    }
    let info = StudentInfo::from_model(model)?;
    match info.noise.shape.first() {
        Some(Dim::Fixed(m)) if *m == n => return Ok(()),
        Some(Dim::Fixed(m)) => {
            return Err(Error::usage(format!("--batch {n}: the graph fixes the batch at {m}"))
                .hint("start from the student with a dynamic batch, or export the teacher again with one"));
        }
        _ => {}
    }
    let set = |graph: &mut GraphProto| {
        for v in graph.input.iter_mut().chain(&mut graph.output) {
            if let Some(type_proto::Value::TensorType(t)) = v.r#type.as_mut().and_then(|t| t.value.as_mut())
                && let Some(first) = t.shape.as_mut().and_then(|s| s.dim.first_mut())
            {
                first.value = Some(dimension::Value::DimValue(n as i64));
            }
        }
    };
    if let Some(g) = model.graph.as_mut() {
        set(g);
    }
    Ok(())
}
