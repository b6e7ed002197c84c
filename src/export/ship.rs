//! From the student as distilled to the file that ships: batch, operator set, optimised and portable graph, precision,
//! appended parts, and what a consumer must know in the metadata. Each step is checked against the student that came in.

use std::path::PathBuf;

use serde::Serialize;
use serde_json::json;

use crate::error::{Error, Result};
use crate::graph::{save, tensors};
use crate::onnx::tensor_shape_proto::dimension;
use crate::onnx::{GraphProto, ModelProto, TensorProto, type_proto};
use crate::runtime::student::{ConditionKind, StudentInfo};
use crate::runtime::{Dim, cast_transpose, model_values};
use crate::tensor::{DType, HostTensor};

use super::evaluate::{self, Inputs};
use super::half::{Converted, gemm_as_matmul, to_half};
use super::int8::{Quantised, quantise};
use super::raised::{self, Raise, Written};
use super::simplify::{Simplified, remove_identities, simplify};
use super::{attach, edit, int8_dynamic, opset, portable};

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

/// Rewriting in f32 may move a sample by this much, times its largest value.
const TOLERANCE: f64 = 1e-4;

/// Applies the options. `model` is a student (`StudentInfo` reads it); its own precision must be f32 for another one.
///
/// Errors: options that do not go together or with the graph (2); a result that is not the student that came in.
pub fn ship(mut model: ModelProto, options: &ShipOptions) -> Result<(ModelProto, ShipReport)> {
    let info = StudentInfo::from_model(&model)?;
    // Written by us before, or as the teacher's file has its weights.
    let shipped = info.metadata.get("student.precision").is_some_and(|p| p != "f32");
    let stored = info.metadata.get("student.precision").map_or_else(|| weights_in(&model), |p| p.clone());
    if stored != "f32" && (options.precision != Precision::F32 || options.decoder.is_some()) {
        return Err(Error::usage(format!("the student is stored in {stored} already"))
            .hint("leave --precision out, or start from a student in f32"));
    }
    let mut report = ShipReport {
        precision: options.precision,
        opset: edit::opset(&model),
        simplified: None,
        raised: None,
        portable: Vec::new(),
        not_portable: Vec::new(),
        half: None,
        int8: None,
        max_abs: None,
        weight_bytes: 0,
        warnings: Vec::new(),
    };
    if let Some((path, range)) = &options.decoder {
        attach::decoder(&mut model, path, *range)?;
    }
    let original = model.clone();
    if let Some(n) = options.batch {
        fix_batch(&mut model, n)?;
    }
    let engine = engine_missing();
    if let Some(reason) = &engine {
        if options.precision != Precision::F32 {
            return Err(Error::backend(format!(
                "--precision {} calibrates with ONNX Runtime: {reason}",
                options.precision.name()
            ))
            .hint("pip install onnxruntime (1.27 or newer) and set ORT_DYLIB_PATH to its capi folder"));
        }
        report.warnings.push(format!("neither optimised nor made portable: {reason}"));
    }
    let can = engine.is_none();
    let expected = if can { Some(Expected::of(&original, &model)?) } else { None };
    let probes = if can && !shipped { Some(probes(&model)?) } else { None };
    if let Some(probes) = &probes {
        if options.optimise {
            report.simplified = Some(simplify(&mut model, probes)?);
        }
        if options.portable {
            report.portable = portable::portable(&mut model, probes)?;
            if let (true, Some(graph)) = (options.optimise, model.graph.as_mut()) {
                remove_identities(graph);
                if let Some(s) = report.simplified.as_mut() {
                    s.nodes_after = graph.node.len();
                }
            }
            if stored == "fp16" && gemm_as_matmul(&mut model)? > 0 {
                report.portable.push("Gemm in f16 is a MatMul and an Add now".into());
            }
        }
    }
    if let Some(target) = options.opset {
        opset::convert(&mut model, target)?;
    }
    report.opset = edit::opset(&model);
    if let Some(probes) = probes.as_ref().filter(|_| options.optimise && options.raise != Raise::None) {
        report.raised = Some(raised::write(&mut model, options.raise, probes)?);
    }
    if options.portable {
        report.not_portable = model.graph.as_ref().map_or_else(Vec::new, portable::left_over);
    }
    let calibration = || -> Result<Vec<Inputs>> {
        let rows = 4.min(options.calibration.max(1));
        let runs = options.calibration.max(1).div_ceil(rows);
        (0..runs as u64).map(|k| evaluate::student_inputs(&model, 1000 + k, rows)).collect()
    };
    match options.precision {
        Precision::F32 => {}
        Precision::Fp16 | Precision::Bf16 => {
            let dtype = if options.precision == Precision::Fp16 { DType::F16 } else { DType::BF16 };
            let inputs = calibration()?;
            report.half = Some(to_half(&mut model, dtype, &options.keep_f32, &inputs)?);
        }
        Precision::Int8 => {
            let inputs = calibration()?;
            report.int8 = Some(quantise(&mut model, options.int8_limit, &inputs)?);
        }
        Precision::Int8Dynamic => {
            let inputs = calibration()?;
            report.int8 = Some(int8_dynamic::quantise(&mut model, options.int8_limit, &inputs)?);
            report.warnings.push(
                "activations are quantised with one scale for a whole batch: an image changes a little with those beside it"
                    .into(),
            );
        }
    }
    // Whatever else was asked for: the file must open in ONNX Runtime, whose optimiser is on by default.
    let parted = model.graph.as_mut().map_or(0, cast_transpose::part);
    if parted > 0 {
        report.portable.push(format!(
            "{parted} Reshapes to the same shape between Transpose and MatMul: ONNX Runtime's MatmulTransposeFusion fails without"
        ));
    }
    if options.image {
        attach::image(&mut model)?;
    }
    let precision = if stored == "f32" { options.precision.name() } else { &stored };
    consumer_metadata(&mut model, precision)?;
    if let Some(expected) = &expected {
        let rounded = report.half.as_ref().map_or(0.0, |h| h.max_abs);
        report.max_abs = Some(expected.check(&model, options, &stored, rounded, &mut report.warnings)?);
    }
    let weights = model.graph.iter().flat_map(|g| &g.initializer);
    report.weight_bytes = weights.map(|t| t.raw_data.as_ref().map_or(0, |b| b.len())).sum();
    Ok((model, report))
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

/// Inputs at batch sizes that have nothing in common, or at the fixed one.
fn probes(model: &ModelProto) -> Result<Vec<Inputs>> {
    let fixed = matches!(StudentInfo::from_model(model)?.noise.shape.first(), Some(Dim::Fixed(_)));
    let sizes: &[usize] = if fixed { &[1] } else { &[2, 3, 7] };
    sizes.iter().map(|&n| evaluate::student_inputs(model, 0, n)).collect()
}

/// What the student that came in makes of noise that no step sees, at batch sizes that none sees.
struct Expected {
    inputs: [Inputs; 2],
    samples: Vec<HostTensor>,
}

impl Expected {
    /// `like` has the batch of the file that ships.
    ///
    /// Errors: a student that gives NaN or infinity: nothing could be told of its forms.
    fn of(original: &ModelProto, like: &ModelProto) -> Result<Self> {
        let inputs = [evaluate::student_inputs(like, 77, 5)?, evaluate::student_inputs(like, 78, 1)?];
        let samples = evaluate::samples(original, &inputs)?;
        if samples.iter().flat_map(HostTensor::to_f32).all(f32::is_finite) {
            return Ok(Self { inputs, samples });
        }
        let broken = |t: &&TensorProto| tensors::from_proto(t).is_ok_and(|t| !t.is_finite());
        let weight = original.graph.iter().flat_map(|g| &g.initializer).find(broken);
        let what = "the student gives NaN or infinity, whatever form it is written in";
        Err(match weight {
            Some(t) => Error::mismatch(format!("{what}: its weight `{}` holds some", t.name())),
            None => Error::mismatch(what),
        }
        .hint("its training diverged: take the weights of an earlier checkpoint or another average (--ema)"))
    }

    /// The largest difference of the file that ships. `rounded`: what calibration found where every value is rounded to 16
    /// bits.
    fn check(
        &self,
        shipped: &ModelProto,
        options: &ShipOptions,
        stored: &str,
        rounded: f64,
        warnings: &mut Vec<String>,
    ) -> Result<f64> {
        let found = match evaluate::samples(shipped, &self.inputs) {
            Ok(found) => found,
            Err(_) if options.precision == Precision::Bf16 => self.samples.clone(),
            Err(e) => return Err(e.context("the exported student does not run")),
        };
        let max_abs = found.iter().zip(&self.samples).map(|(a, b)| evaluate::max_abs(a, b)).fold(rounded, f64::max);
        // What stores fewer bits is judged by the sample that comes out, not by what f32 could have kept of it.
        let values = self.samples.iter().flat_map(|t| t.to_f32()).fold(1f64, |m, v| m.max(f64::from(v.abs())));
        let exact = options.precision == Precision::F32 && stored == "f32";
        let size = if exact { StudentInfo::from_model(shipped)?.size_of(&self.samples) } else { values };
        let (limit, hard) = match options.precision {
            // What computes in 16 bits rounds otherwise when constants are folded.
            Precision::F32 => {
                (TOLERANCE.max(if stored == "f32" { 0.0 } else { crate::verify::tolerance_of(stored) }), true)
            }
            Precision::Fp16 => (2e-2, false),
            Precision::Bf16 => (2e-1, false),
            Precision::Int8 | Precision::Int8Dynamic => (options.int8_limit, false),
        };
        if !(max_abs <= limit * size) {
            let what =
                format!("the sample differs by {max_abs:.2e} from the student as distilled (values reach {values:.2})");
            if hard || !max_abs.is_finite() {
                return Err(Error::mismatch(what)
                    .hint("this is a defect of the export: --no-optimise and --no-portable narrow it down"));
            }
            let start = StudentInfo::from_model(shipped)?.rounding_scale;
            let why = if start > 16.0 * values {
                format!(
                    ", and its sample is a difference of terms of up to {start:.0}: a lower student.sigma_init makes them smaller"
                )
            } else {
                String::new()
            };
            warnings.push(format!("{what}; --keep-f32 GLOB keeps nodes in f32{why}"));
        }
        Ok(max_abs)
    }
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

/// What a program that has never heard of us needs to feed the file: one JSON document under `disback.consumer`.
pub fn consumer_metadata(model: &mut ModelProto, precision: &str) -> Result<()> {
    let info = StudentInfo::from_model(model)?;
    let (_, outputs) = model_values(model)?;
    let dims = |shape: &[Dim]| {
        shape
            .iter()
            .map(|d| match d {
                Dim::Fixed(n) => json!(n),
                Dim::Symbol(_) => json!("batch"),
            })
            .collect::<Vec<_>>()
    };
    let mut inputs = vec![json!({
        "name": "noise", "dtype": info.noise.dtype.to_string(), "shape": dims(&info.noise.shape),
        "layout": "nchw", "distribution": "standard normal",
    })];
    for c in &info.conditions {
        let mut entry =
            json!({ "name": c.input.name, "dtype": c.input.dtype.to_string(), "shape": dims(&c.input.shape) });
        match c.kind {
            ConditionKind::ClassIndex { classes } => {
                entry["distribution"] = json!(format!("class index, 0 to {}", classes.saturating_sub(1)));
                entry["classes"] = json!(classes);
            }
            ConditionKind::OneHot { classes } => {
                entry["distribution"] = json!("one-hot class");
                entry["classes"] = json!(classes);
            }
            ConditionKind::Embedding => entry["distribution"] = json!("embedding rows of the teacher's encoder"),
        }
        inputs.push(entry);
    }
    let outputs: Vec<_> = outputs
        .iter()
        .map(|o| match o.name.as_str() {
            attach::IMAGE => {
                json!({ "name": o.name, "dtype": "u8", "shape": dims(&o.shape), "layout": "nhwc", "range": [0, 255] })
            }
            _ => json!({ "name": o.name, "dtype": o.dtype.to_string(), "shape": dims(&o.shape), "layout": "nchw",
                "range": info.range }),
        })
        .collect();
    let text = json!({ "inputs": inputs, "outputs": outputs, "precision": precision,
        "seed_convention": crate::noise::SEED_CONVENTION })
    .to_string();
    save::set_metadata(model, "disback.consumer", &text);
    save::set_metadata(model, "disback.student.precision", precision);
    Ok(())
}
