//! A student file against everything that will run it: the ONNX checker, every engine of this build, the runtimes that
//! Python finds, and the run's own weights in libtorch where they are at hand.

pub mod peers;
#[cfg(feature = "train")]
pub mod reference;
pub mod targets;

use std::path::Path;

use serde::Serialize;

use crate::error::{Context, Error, Result};
use crate::io::images::quantise;
use crate::runtime::student::{SampleRequest, Student, StudentInfo, decode};
use crate::runtime::tolerance;
use crate::runtime::{Dim, EngineKind, EngineOptions};
use crate::tensor::HostTensor;

pub use targets::{Refusal, Target};

/// How a student is verified.
#[derive(Debug, Clone)]
pub struct VerifyOptions {
    /// Number of images compared, at least 1; a file with a fixed batch is run with that.
    pub images: usize,
    /// Seed of the noise and of the classes.
    pub seed: u64,
    /// Largest difference of a value that counts as agreement, over the sample's largest value where that is above 1 (for
    /// arithmetic in f32 over the largest term of the sum that makes the sample); by the file's precision where absent.
    pub tolerance: Option<f64>,
    /// Python interpreter for the checker and further runtimes; none are looked for where absent.
    pub python: Option<std::path::PathBuf>,
}

impl Default for VerifyOptions {
    fn default() -> Self {
        Self { images: 16, seed: 0, tolerance: None, python: None }
    }
}

/// One engine's verdict.
#[derive(Debug, Clone, Serialize)]
pub struct EngineResult {
    /// The engine: `onnxruntime`, `tract`, `libtorch`, or one of [`peers::PEERS`].
    pub name: String,
    /// Its version; empty where it is not known.
    pub version: String,
    /// Largest absolute difference to the reference; absent where there are no samples.
    pub max_abs: Option<f64>,
    /// Number of values that differ after rounding to 8 bits, as images are written; absent for latents.
    pub uint8_differing: Option<usize>,
    /// Whether the samples are within the tolerance.
    pub ok: bool,
    /// Why it made no samples; absent where it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Whether the verification fails where this engine makes no samples.
    pub required: bool,
}

/// The verdict of ONNX's own checker.
#[derive(Debug, Clone, Serialize)]
pub struct Checked {
    /// Whether the file is correct.
    pub ok: bool,
    /// Who checked: `onnx 1.22.0, full_check` or the engine that loaded the file.
    pub by: String,
    /// What is wrong with the file; absent where it is correct.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The result of [`verify`].
#[derive(Debug, Clone, Serialize)]
pub struct Verification {
    /// Whether the checker accepts the file, every engine that ran agrees, at least one did, and none that must run
    /// failed.
    pub ok: bool,
    /// What ONNX's checker says about the file.
    pub checker: Checked,
    /// What the engines are compared with.
    pub reference: String,
    /// Precision of the file: `f32`, `fp16`, `bf16`, `int8` or `int8-dynamic`.
    pub precision: String,
    /// Largest absolute difference that counted as agreement.
    pub tolerance: f64,
    /// Number of images compared; the file's batch where that is fixed.
    pub images: usize,
    /// Number of values in all images together.
    pub values: usize,
    /// One verdict for each engine that was found.
    pub engines: Vec<EngineResult>,
    /// For each target asked for, what it refuses of the file.
    pub targets: Vec<(Target, Vec<Refusal>)>,
    /// Of each target, the nodes that it takes and was seen to compute wrongly. They fail nothing.
    pub target_warnings: Vec<(Target, Vec<Refusal>)>,
}

/// Samples of a reference: its name, images `0..n` of the request.
pub struct Reference {
    /// What made the samples, with its version.
    pub name: String,
    /// The samples, `[B, ...shape]`.
    pub samples: HostTensor,
    /// Whether it computes with the run's own weights in f32, not with those in the file; for a file with weights in 8
    /// bits the tolerance is then wider.
    pub original_weights: bool,
}

/// Makes images `0..n` of a request from other weights.
pub type Reproduce<'a> = dyn Fn(&SampleRequest, usize) -> Result<Reference> + 'a;

/// Runs the file in every engine and compares. `reference` computes the samples of the run's own weights; without it ONNX
/// Runtime (else tract) is the reference.
///
/// Errors: a file that is no student. An engine that fails is a row of the table, not an error.
pub fn verify(
    path: &Path,
    options: &VerifyOptions,
    targets: &[Target],
    reference: Option<&Reproduce>,
) -> Result<Verification> {
    let bytes = crate::files::map(path).with_context(|| path.display().to_string())?;
    let model = decode(&bytes).with_context(|| path.display().to_string())?;
    let info = StudentInfo::from_model(&model).with_context(|| path.display().to_string())?;
    if options.images == 0 {
        return Err(Error::usage("--images 0: expected 1 or more"));
    }
    let images = match info.noise.shape.first() {
        // A whole batch, so that every engine sees the same call.
        Some(Dim::Fixed(n)) => *n,
        _ => options.images,
    };
    let mut request = SampleRequest { seed: options.seed, batch: images, ..SampleRequest::default() };
    request.embeddings = info.random_rows(11, images)?;
    let precision = info.metadata.get("student.precision").cloned().unwrap_or_else(|| "f32".into());

    let mut ran: Vec<(String, String, bool, Result<HostTensor>)> = Vec::new();
    for kind in [EngineKind::Ort, EngineKind::Tract] {
        let (built, name) = match kind {
            EngineKind::Ort => (cfg!(feature = "ort"), "onnxruntime"),
            _ => (cfg!(feature = "tract"), "tract"),
        };
        if !built {
            continue;
        }
        let engine = EngineOptions { engine: kind, ..EngineOptions::default() };
        let run = || -> Result<(String, HostTensor)> {
            let mut student = Student::open(path, &engine)?;
            let samples = student.sample(&request, 0, images)?;
            Ok((student.engine_name(), samples))
        };
        // Neither ONNX Runtime 1.32 nor tract 0.23 computes in bf16 on the CPU (OpenVINO and libtorch do): no defect of the
        // file.
        let required = precision != "bf16";
        match run() {
            Ok((full, samples)) => {
                let version = full.split_whitespace().nth(1).unwrap_or_default().to_owned();
                ran.push((name.into(), version, required, Ok(samples)));
            }
            Err(e) if !required => {
                let e = e.context("there is no bf16 on the CPU in this engine");
                ran.push((name.into(), String::new(), required, Err(e)));
            }
            Err(e) => ran.push((name.into(), String::new(), required, Err(e))),
        }
    }
    let mut checker = None;
    if let Some(python) = &options.python {
        let inputs = Student::inputs_of(&info, &request, 0, images)?;
        checker = peers::checker(python, path)?;
        for peer in peers::run_all(python, path, &inputs)? {
            ran.push((peer.name, peer.version, false, peer.samples));
        }
    }
    #[cfg(feature = "train")]
    ran.push(("libtorch".into(), String::new(), false, reference::file_in_libtorch(path, &info, &request, images)));

    let reference = match reference {
        Some(make) => make(&request, images)?,
        None => {
            let first = ran.iter().find_map(|r| r.3.as_ref().ok().map(|samples| (&r.0, &r.1, samples)));
            let (name, version, samples) = first.ok_or_else(|| {
                let why = ran.iter().find_map(|r| r.3.as_ref().err()).map(|e| e.to_string()).unwrap_or_default();
                Error::mismatch(format!("{}: no engine runs this student: {why}", path.display()))
            })?;
            Reference { name: format!("{name} {version}"), samples: samples.clone(), original_weights: false }
        }
    };
    let expected = reference.samples.to_f32();
    // In half precision rounding is to be seen: a sample that is mostly rounding is no good, however rightly it is rounded.
    let halves = ["fp16", "bf16"].contains(&precision.as_str());
    let size = match halves {
        true => expected.iter().fold(1f64, |m, v| m.max(f64::from(v.abs()))),
        false => info.size_of(std::slice::from_ref(&reference.samples)),
    };
    let base = match (precision.as_str(), reference.original_weights) {
        ("int8" | "int8-dynamic", true) => 1e-1,
        (p, _) => tolerance::of(p),
    };
    let tolerance = options.tolerance.unwrap_or(base) * size;
    let engines: Vec<EngineResult> = ran
        .into_iter()
        .map(|(name, version, required, samples)| match samples {
            Ok(samples) => {
                let max_abs = crate::passes::evaluate::max_abs(&samples, &reference.samples);
                let range = info.range.unwrap_or([-1.0, 1.0]);
                let differs = |(a, b): (f32, &f32)| quantise(f64::from(a), range) != quantise(f64::from(*b), range);
                let uint8 = info
                    .range
                    .map(|_| samples.to_f32().into_iter().zip(&expected).filter(|p| differs((p.0, p.1))).count());
                EngineResult {
                    name,
                    version,
                    max_abs: Some(max_abs),
                    uint8_differing: uint8,
                    ok: max_abs <= tolerance,
                    error: None,
                    required,
                }
            }
            Err(e) => EngineResult {
                name,
                version,
                max_abs: None,
                uint8_differing: None,
                ok: false,
                error: Some(e.to_string()),
                required,
            },
        })
        .collect();
    let checker = checker.unwrap_or_else(|| by_engine(&engines));
    // What ran must agree; what had to run must have run.
    let ok = checker.ok
        && engines.iter().all(|e| e.ok || (e.error.is_some() && !e.required))
        && engines.iter().any(|e| e.ok);
    let target_warnings = targets.iter().map(|t| (*t, targets::warnings(&model, *t))).collect();
    let targets = targets.iter().map(|t| (*t, targets::refusals(&model, *t))).collect();
    Ok(Verification {
        ok,
        checker,
        reference: reference.name,
        precision,
        tolerance,
        images,
        values: expected.len(),
        engines,
        targets,
        target_warnings,
    })
}

/// Without ONNX's checker the engine that loaded the file vouches for it.
fn by_engine(engines: &[EngineResult]) -> Checked {
    match engines.iter().find(|e| e.error.is_none()) {
        Some(e) => {
            Checked { ok: true, by: format!("{} {} loaded it (no onnx package found)", e.name, e.version), error: None }
        }
        None => Checked { ok: false, by: "no engine".into(), error: engines.iter().find_map(|e| e.error.clone()) },
    }
}
