//! What the student that came in computes, which its other forms are compared with.

use crate::error::{Error, Result};
use crate::export::options::{Precision, ShipOptions};
use crate::graph::tensors;
use crate::onnx::{ModelProto, TensorProto};
use crate::passes::evaluate::{self, Inputs};
use crate::runtime::student::StudentInfo;
use crate::runtime::tolerance;
use crate::tensor::HostTensor;

/// Rewriting in f32 may move a sample by this much, times its largest value.
const TOLERANCE: f64 = 1e-4;

/// [`TOLERANCE`], or what a file in fewer bits rounds otherwise when its constants are folded.
fn exact_limit(stored: &str) -> f64 {
    if stored == "f32" { TOLERANCE } else { TOLERANCE.max(tolerance::of(stored)) }
}

/// What the student that came in makes of noise that no step sees, at batch sizes that none sees.
pub(super) struct Expected {
    inputs: [Inputs; 2],
    samples: Vec<HostTensor>,
}

impl Expected {
    /// `like` has the batch of the file that ships.
    ///
    /// Errors: a student that gives NaN or infinity: nothing could be told of its forms.
    pub(super) fn of(original: &ModelProto, like: &ModelProto) -> Result<Self> {
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

    /// Whether a model on its way still computes the sample, up to the rounding of its arithmetic. Looks at the first inputs only.
    pub(super) fn still(&self, model: &ModelProto, stored: &str) -> Result<()> {
        let found =
            evaluate::samples(model, &self.inputs[..1]).map_err(|e| e.context("the graph does not run any more"))?;
        let max_abs = found.iter().zip(&self.samples).map(|(a, b)| evaluate::max_abs(a, b)).fold(0.0, f64::max);
        let info = StudentInfo::from_model(model)?;
        let limit = exact_limit(stored) * info.size_of(&self.samples);
        if max_abs <= limit {
            return Ok(());
        }
        Err(Error::mismatch(format!("it moves the sample by {max_abs:.2e}, expected at most {limit:.1e}"))
            .hint("this is a defect of the export; `disback export --dump-passes DIR` writes the graph before and after: please report it"))
    }

    /// The largest difference of the file that ships. `rounded`: what calibration found where every value is rounded to 16
    /// bits.
    pub(super) fn check(
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
            Precision::F32 => (exact_limit(stored), true),
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
            let way_out = match options.precision {
                Precision::Int8 | Precision::Int8Dynamic => "a smaller --int8-limit keeps more of it in f32",
                _ => "--keep-f32 GLOB keeps nodes in f32",
            };
            warnings.push(format!("{what}; {way_out}{why}"));
        }
        Ok(max_abs)
    }
}
