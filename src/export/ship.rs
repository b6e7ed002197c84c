//! From the student as distilled to the file that ships: batch, operator set, optimised and portable graph, precision,
//! appended parts, and what a consumer must know in the metadata. The passes are in [`super::pipeline`]; each that promises to
//! keep the values is checked against the student that came in.

use std::path::PathBuf;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::export::attach;
use crate::export::consumer::consumer_metadata;
use crate::export::expected::Expected;
use crate::export::pipeline::{IMAGE, PASSES, Shipping};
use crate::graph::{edit, save};
use crate::onnx::tensor_shape_proto::dimension;
use crate::onnx::{GraphProto, ModelProto, type_proto};
use crate::passes::evaluate::{self, Inputs};
use crate::passes::fuse::{Raise, Written};
use crate::passes::precision::half::Converted;
use crate::passes::precision::int8::Quantised;
use crate::passes::simplify::Simplified;
use crate::passes::{Dump, Passes};
use crate::runtime::Dim;
use crate::runtime::student::StudentInfo;
use crate::tensor::DType;

/// Element type of the student's arithmetic or weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// As distilled.
    #[default]
    F32,
    /// f16 where it holds, f32 elsewhere.
    Fp16,
    /// bf16 where ONNX has it, f32 elsewhere.
    Bf16,
    /// Weights in 8 bits, arithmetic in f32.
    Int8,
    /// Weights in 8 bits, and products and convolutions computed in them where that holds.
    #[serde(rename = "int8-dynamic")]
    Int8Dynamic,
}

impl Precision {
    /// The name on the command line and in the metadata.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Fp16 => "fp16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Int8Dynamic => "int8-dynamic",
        }
    }
}

/// What to make of a student.
#[derive(Debug, Clone)]
pub struct ShipOptions {
    pub precision: Precision,
    /// Globs of node names that stay in f32.
    pub keep_f32: Vec<String>,
    /// How far 8 bits may move a value of the sample.
    pub int8_limit: f64,
    /// Images of the calibration noise.
    pub calibration: usize,
    /// Fixes the batch; as it is where absent.
    pub batch: Option<usize>,
    pub opset: Option<i64>,
    /// Fold constants and shape arithmetic.
    pub optimise: bool,
    /// Which chains are written as the operators that they are, where the graph is optimised.
    pub raise: Raise,
    /// Write what several runtimes do not take in plainer operators.
    pub portable: bool,
    /// Add the output `image` (u8).
    pub image: bool,
    /// ONNX file that turns latents into images, and its output's range.
    pub decoder: Option<(PathBuf, [f64; 2])>,
    /// Folder that gets the graph before the first pass and after each.
    pub dump_passes: Option<PathBuf>,
}

impl Default for ShipOptions {
    fn default() -> Self {
        Self {
            precision: Precision::F32,
            keep_f32: Vec::new(),
            int8_limit: 0.1,
            calibration: 16,
            batch: None,
            opset: None,
            optimise: true,
            raise: Raise::Auto,
            portable: true,
            image: false,
            decoder: None,
            dump_passes: None,
        }
    }
}

/// What was done, for people and machines.
#[derive(Debug, Clone, Serialize)]
pub struct ShipReport {
    pub precision: Precision,
    pub opset: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub simplified: Option<Simplified>,
    /// Raised operators that were written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub raised: Option<Written>,
    /// Nodes rewritten for the portable form.
    pub portable: Vec<String>,
    /// Nodes that no portable form was found for, and what they have.
    pub not_portable: Vec<(String, String)>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub half: Option<Converted>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub int8: Option<Quantised>,
    /// Largest difference of the sample to the student that came in, on other noise than the calibration's; in 16 bits also
    /// on that, with every value rounded. `None`: not measured, because ONNX Runtime was not found.
    pub max_abs: Option<f64>,
    /// Bytes of weights.
    pub weight_bytes: usize,
    pub warnings: Vec<String>,
}

/// Above this many bytes of weights a check after each pass takes too long: one at the end, and where that fails, the passes
/// again with a check after each.
const CHECKED_AT_ONCE: usize = 256 << 20;

/// Applies the options. `model` is a student (`StudentInfo` reads it); its own precision must be f32 for another one.
///
/// Errors: options that do not go together or with the graph (2); a result that is not the student that came in, with the pass
/// that changed it.
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

impl ShipReport {
    /// Nothing done yet.
    fn new(options: &ShipOptions, model: &ModelProto) -> Self {
        Self {
            precision: options.precision,
            opset: edit::opset(model),
            simplified: None,
            raised: None,
            portable: Vec::new(),
            not_portable: Vec::new(),
            half: None,
            int8: None,
            max_abs: None,
            weight_bytes: 0,
            warnings: Vec::new(),
        }
    }
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
