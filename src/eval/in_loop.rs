//! Measures while a run goes on: few images, always of the same noise, so that a curve shows the run and not the draw.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::FeatureNet;
use super::collect::{Collected, Wanted};
use super::evaluation::{EvaluationRow, Plan, measure, reference};
use super::features::FeatureOptions;
use super::kernel::Estimator;
use super::source::{Draw, Source};
use super::values::Reference;
use crate::axes::written;
use crate::error::{Context, Error, Kind, Result};
use crate::io::ImageSet;
use crate::runtime::EngineOptions;
use crate::tensor::HostTensor;

/// The curve's file in the run directory: one JSON object a line.
pub const FILE: &str = "evaluations.jsonl";

/// Where a run stands when it is measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct At {
    /// Generator updates.
    pub update: u64,
    /// Images of stage 2.
    pub images: u64,
    /// Forward passes of networks, counted in images, stage 1 included.
    pub passes: u64,
    /// Seconds, stage 1 included.
    pub seconds: f64,
    /// Index of the trajectory node that is the target; 0 is the teacher.
    pub node: usize,
}

/// A point of the curve.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InLoopPoint {
    /// Where the run stood when this was measured.
    #[serde(flatten)]
    pub at: At,
    /// Frechet distance; absent without a feature network, where the sliced Wasserstein distance decides which point is
    /// best.
    pub frechet: Option<f64>,
    /// Kernel distance (Binkowski et al. 2018); absent without a feature network.
    pub kernel: Option<f64>,
    /// Standard error of the kernel distance.
    pub kernel_standard_error: Option<f64>,
    /// Precision (Kynkaanniemi et al. 2019), 0 to 1; absent where it could not be measured.
    pub precision: Option<f64>,
    /// Recall (Kynkaanniemi et al. 2019), 0 to 1; absent where it could not be measured.
    pub recall: Option<f64>,
    /// Sliced Wasserstein distance times 1000; absent where a feature network is used.
    pub sliced: Option<f64>,
    /// Images measured.
    pub samples: usize,
    /// Whether the distance is the lowest of the run so far.
    pub best: bool,
    /// Why nothing could be measured: a student that has collapsed or gives NaN does not end the run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

impl InLoopPoint {
    /// The distance that decides which point is best; infinite where nothing could be measured.
    pub fn figure(&self) -> f64 {
        self.frechet.or(self.sliced).filter(|v| v.is_finite()).unwrap_or(f64::INFINITY)
    }
}

/// What to measure with.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// Feature network; none: the sliced Wasserstein distance alone.
    pub features: Option<PathBuf>,
    /// Reference: images, or a `.npz` of statistics.
    pub reference: PathBuf,
    /// Measurements without a new lowest distance after which the run may end; 0: it never does.
    pub patience: u64,
    /// Images a call of the feature network; 0 counts as 1.
    pub batch: usize,
    /// Range of float arrays in the reference.
    pub range: [f64; 2],
    /// Samples are no images: they are measured by their values.
    pub values: bool,
    /// Samples of the student that are measured at a time.
    pub samples: usize,
}

/// Measures a run as it goes on.
pub struct InLoop {
    net: Option<FeatureNet>,
    reference: Collected,
    /// The reference where samples are measured by their values.
    values: Option<Reference>,
    draw: Draw,
    patience: u64,
    path: PathBuf,
    points: Vec<InLoopPoint>,
    /// What weakens the figures, told once.
    warnings: Vec<String>,
    warned: bool,
}

/// Reads a curve; lines that are no points are passed over.
pub fn read(path: &Path) -> Vec<InLoopPoint> {
    crate::files::rows(path).unwrap_or_default()
}

impl InLoop {
    /// Opens network and reference, and the run's curve so far.
    pub fn open(settings: &Settings, run: &Path, options: &EngineOptions) -> Result<Self> {
        let mut net = settings
            .features
            .as_deref()
            .map(|path| FeatureNet::open(path, &FeatureOptions::default(), options))
            .transpose()
            .context("evaluate.features")?;
        let source = match settings.values {
            true => Source::open_values(&settings.reference, &[], options),
            false => Source::open(&settings.reference, settings.range, options),
        };
        let mut source = source.context("evaluate.reference")?;
        if let Source::Images(set) = &source
            && let Some(why) = set.doubt()?
        {
            let [low, high] = settings.range;
            return Err(Error::usage(format!("evaluate.reference, {}: {why}", settings.reference.display())).hint(format!(
                "floats are read in the range of the student's images, {low} to {high}: scale them, or give 8-bit images"
            )));
        }
        let mut draw = Draw::default();
        draw.request.batch = settings.batch.max(1);
        let count = match &source {
            Source::Images(set) => set.len(),
            Source::Values(values) => values.shape()[0],
            Source::Statistics(_) => 0,
            _ => {
                return Err(Error::usage(format!("{} is a network", settings.reference.display()))
                    .hint("give reference samples, or statistics of images as a .npz"));
            }
        };
        let wanted = Wanted { rows: net.is_some(), classes: false, patches: net.is_none() };
        let context = || settings.reference.display().to_string();
        let (reference, values) = match settings.values {
            true => {
                let samples = settings.samples.max(1);
                let values = Reference::collect(&mut source, &draw, net.as_mut(), count, samples, |_| {});
                (Collected { count, ..Collected::default() }, Some(values.with_context(context)?))
            }
            false => (reference(&mut source, &draw, net.as_mut(), count, wanted, |_| {}).with_context(context)?, None),
        };
        let path = run.join(FILE);
        let points = read(&path);
        let (patience, warnings) = (settings.patience, Vec::new());
        Ok(Self { net, reference, values, draw, patience, path, points, warnings, warned: false })
    }

    /// Forgets what was measured after generator update `upto`: a run that goes on from there measures it again.
    pub fn forget_after(&mut self, upto: u64) -> Result<()> {
        self.points.retain(|p| p.at.update <= upto);
        // Lines stay as they were written. One that was cut when the process was killed goes too: the next would be written to its end.
        if self.path.is_file() {
            let known = |l: &str| serde_json::from_str::<InLoopPoint>(l).is_ok_and(|p| p.at.update <= upto);
            crate::files::keep_lines(&self.path, known)?;
        }
        Ok(())
    }

    /// Refuses samples that cannot be measured against the reference, before a run begins.
    pub fn check(&self, shape: &[usize], range: Option<[f64; 2]>) -> Result<()> {
        if let Some(values) = &self.values {
            return values.check("the student", shape);
        }
        if range.is_none() {
            return Err(Error::usage("the student makes latents: they cannot be measured while it is trained")
                .hint("log.decoder = \"decoder.onnx\" makes images of them; or leave evaluate.reference out"));
        }
        match self.reference.shape {
            Some(other) if other != *shape => Err(Error::mismatch(format!(
                "the reference holds images of {}, the student makes {}",
                crate::io::images::describe(other),
                <[usize; 3]>::try_from(shape).map_or_else(|_| written(shape), crate::io::images::describe)
            ))),
            _ => Ok(()),
        }
    }

    /// What makes the figures less reliable (fewer images than features, statistics of an unknown network), the first
    /// time it is asked for.
    pub fn take_warnings(&mut self) -> Vec<String> {
        std::mem::take(&mut self.warnings)
    }

    /// The curve so far.
    pub fn points(&self) -> &[InLoopPoint] {
        &self.points
    }

    /// Whether samples are measured by their values, whatever their range.
    pub fn by_values(&self) -> bool {
        self.values.is_some()
    }

    fn measure(&mut self, samples: HostTensor, range: [f64; 2], count: usize) -> Result<EvaluationRow> {
        let (name, net) = ("the student", self.net.as_mut());
        if let Some(values) = &self.values {
            return values.measure(
                name,
                &mut Source::Values(samples),
                &self.draw,
                net,
                (count, 1),
                Estimator::Full,
                |_| {},
            );
        }
        let mut source = Source::Images(ImageSet::from_samples(samples, range)?);
        let wanted = Wanted { rows: net.is_some(), classes: false, patches: self.reference.patches.is_some() };
        let plan = Plan { images: count, blocks: 1, wanted, kernel: Estimator::Full };
        Ok(measure(name, &mut source, &self.draw, net, &self.reference, &plan, |_| {})?.0)
    }

    /// Measures samples [N,C,H,W] with values in `range` ([N,...] of any range where [`InLoop::by_values`]), and adds a point to
    /// the curve.
    pub fn look(&mut self, samples: HostTensor, range: [f64; 2], at: At) -> Result<InLoopPoint> {
        let count = samples.shape().first().copied().unwrap_or(0);
        let (row, problem) = match self.measure(samples, range, count) {
            Ok(mut row) => {
                if !std::mem::replace(&mut self.warned, true) {
                    self.warnings = std::mem::take(&mut row.warnings);
                }
                (row, None)
            }
            Err(e) if e.kind() == Kind::Mismatch => (EvaluationRow::default(), Some(e.to_string())),
            Err(e) => return Err(e),
        };
        let mut point = InLoopPoint {
            at,
            frechet: row.frechet,
            kernel: row.kernel,
            kernel_standard_error: row.kernel_standard_error,
            precision: row.precision,
            recall: row.recall,
            sliced: row.sliced,
            samples: count,
            best: false,
            problem,
        };
        let least = self.points.iter().map(InLoopPoint::figure).fold(f64::INFINITY, f64::min);
        point.best = point.figure() < least;
        let text = line(&point)?;
        let append = || -> std::io::Result<()> {
            let mut file = crate::files::append(&self.path)?;
            file.write_all(text.as_bytes())
        };
        append().with_context(|| self.path.display().to_string())?;
        self.points.push(point.clone());
        Ok(point)
    }

    /// Whether the last `patience` measurements brought no new lowest distance.
    pub fn exhausted(&self) -> bool {
        let since = self.points.iter().rev().take_while(|p| !p.best).count() as u64;
        self.patience > 0 && since >= self.patience
    }
}

fn line(point: &InLoopPoint) -> Result<String> {
    let mut text = serde_json::to_string(point).map_err(|e| Error::io(e.to_string()))?;
    text.push('\n');
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::batch_noise;
    use crate::runtime::testing;

    fn samples(seed: u64, scale: f32) -> HostTensor {
        let values: Vec<f32> = batch_noise(seed, 0, 40, 4).iter().map(|v| v * scale).collect();
        HostTensor::new(&[40, 1, 2, 2], &values).unwrap()
    }

    fn at(update: u64) -> At {
        At { update, images: update * 8, passes: update * 32, seconds: update as f64, node: 0 }
    }

    #[test]
    fn the_curve_survives_a_resume_and_patience_runs_out() {
        let dir = tempfile::tempdir().unwrap();
        crate::io::npy::write(&dir.path().join("reference.npy"), &samples(1, 0.3)).unwrap();
        let weight: Vec<f32> = (0..8).map(|k| ((k * 5) % 7) as f32 - 3.0).collect();
        std::fs::write(dir.path().join("net.onnx"), testing::features(&weight)).unwrap();
        let settings = Settings {
            features: Some(dir.path().join("net.onnx")),
            reference: dir.path().join("reference.npy"),
            patience: 2,
            batch: 16,
            range: [-1.0, 1.0],
            values: false,
            samples: 40,
        };
        let open = |upto| {
            let mut judge = InLoop::open(&settings, dir.path(), &EngineOptions::default()).unwrap();
            judge.forget_after(upto).unwrap();
            judge
        };
        let mut judge = open(0);
        judge.check(&[1, 2, 2], Some([-1.0, 1.0])).unwrap();
        assert!(judge.check(&[1, 2, 3], Some([-1.0, 1.0])).is_err() && judge.check(&[1, 2, 2], None).is_err());
        let look =
            |judge: &mut InLoop, update, scale| judge.look(samples(2, scale), [-1.0, 1.0], at(update)).unwrap().best;
        assert!(look(&mut judge, 10, 0.6));
        assert!(judge.take_warnings().is_empty());
        assert!(look(&mut judge, 20, 0.3));
        assert!(!look(&mut judge, 30, 0.5) && !judge.exhausted());
        assert!(!look(&mut judge, 40, 0.45) && judge.exhausted());
        assert_eq!(read(&dir.path().join(FILE)).len(), 4);
        // Going on from update 30 forgets what came after it, a line that was cut too, and remembers what was best.
        let whole = std::fs::read_to_string(dir.path().join(FILE)).unwrap();
        std::fs::write(dir.path().join(FILE), format!("{whole}{{\"update\":50,\"ima")).unwrap();
        let mut judge = open(40);
        assert_eq!((judge.points().len(), std::fs::read_to_string(dir.path().join(FILE)).unwrap()), (4, whole));
        judge.forget_after(30).unwrap();
        assert_eq!((judge.points().len(), judge.exhausted()), (3, false));
        assert!(!look(&mut judge, 40, 0.45) && judge.exhausted());
        // A student that gives NaN, or always the same image, is no reason to end.
        let broken = HostTensor::new(&[4, 1, 2, 2], &[f32::NAN; 16]).unwrap();
        let point = judge.look(broken, [-1.0, 1.0], at(50)).unwrap();
        assert!(!point.best && point.frechet.is_none() && point.problem.unwrap().contains("image 0 holds NaN"));
        let equal = HostTensor::new(&[4, 1, 2, 2], &[0f32; 16]).unwrap();
        let point = judge.look(equal, [-1.0, 1.0], at(60)).unwrap();
        assert!(point.problem.unwrap().contains("same features"));
        // Fewer images than features: said once, with what it means.
        let two = HostTensor::new(&[2, 1, 2, 2], &batch_noise(3, 0, 2, 4)).unwrap();
        let mut judge = open(40);
        judge.look(two.clone(), [-1.0, 1.0], at(70)).unwrap();
        let warnings = judge.take_warnings();
        assert!(warnings.len() == 1 && warnings[0].contains("2 images for 2 features"), "{warnings:?}");
        judge.look(two, [-1.0, 1.0], at(80)).unwrap();
        assert!(judge.take_warnings().is_empty());
        judge.forget_after(40).unwrap();
        let lines = std::fs::read_to_string(dir.path().join(FILE)).unwrap();
        assert!(lines.lines().count() == 4 && lines.starts_with("{\"update\":10,\"images\":80,"), "{lines}");
    }

    /// Samples that are no images need neither a network nor a range.
    #[test]
    fn values_are_measured_while_training() {
        let dir = tempfile::tempdir().unwrap();
        let rows = |seed: u64, scale: f32| {
            let values: Vec<f32> = batch_noise(seed, 0, 60, 5).iter().map(|v| v * scale).collect();
            HostTensor::new(&[60, 5], &values).unwrap()
        };
        crate::io::npy::write(&dir.path().join("reference.npy"), &rows(1, 1.0)).unwrap();
        let reference = dir.path().join("reference.npy");
        let settings = Settings { reference, batch: 16, values: true, samples: 60, ..Settings::default() };
        let mut judge = InLoop::open(&settings, dir.path(), &EngineOptions::default()).unwrap();
        assert!(judge.by_values() && judge.check(&[5], None).is_ok());
        let error = judge.check(&[4], None).unwrap_err().to_string();
        assert!(error.contains("[B, 4], the reference [B, 5]"), "{error}");
        let far = judge.look(rows(2, 3.0), [-1.0, 1.0], at(10)).unwrap();
        let near = judge.look(rows(2, 1.0), [-1.0, 1.0], at(20)).unwrap();
        assert!(far.best && near.best && near.frechet < far.frechet && near.sliced < far.sliced, "{near:?} {far:?}");
        let broken = HostTensor::new(&[4, 5], &[f32::NAN; 20]).unwrap();
        let point = judge.look(broken, [-1.0, 1.0], at(30)).unwrap();
        assert!(!point.best && point.problem.unwrap().contains("sample 0 holds NaN"));
    }
}
