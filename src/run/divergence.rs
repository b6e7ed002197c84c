//! Whether a run leaves its own history, or its student collapses: told while it can still be helped.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::distill::Config;
use crate::distill::checkpoint::StageKind;
use crate::distill::metrics::MetricsRow;
use crate::error::{Context, Error, Result};
use crate::tensor::HostTensor;

/// The warnings' file in the run directory: one JSON object a line.
pub const FILE: &str = "warnings.jsonl";

/// Rows in a row that must be far away: one row alone is an outlier.
const ROWS: usize = 3;
/// Rows of a gradient norm before there is a history to leave.
const HISTORY: usize = 10;
/// Samples that the spread is measured on.
pub const SAMPLES: usize = 16;

/// A warning of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Warning {
    /// Stage of the run.
    pub stage: StageKind,
    /// Iteration of the stage at which it was given.
    pub iteration: u64,
    /// What was seen, and what to change.
    pub text: String,
}

/// Reads the warnings of a run.
pub fn read(run: &Path) -> Vec<Warning> {
    crate::files::rows(&run.join(FILE)).unwrap_or_default()
}

/// One number over the rows of a stage.
#[derive(Debug, Default)]
struct Course {
    recent: VecDeque<f64>,
    all: Vec<f64>,
    told: bool,
}

impl Course {
    /// Takes a row's value in. Gives the value to which it has gone and the one that it had, the first time that the last rows lie
    /// further from it than `factor` allows. `from_least`: what it had is its lowest value, otherwise the middle one of all.
    fn left(&mut self, value: f64, factor: f64, from_least: bool) -> Option<(f64, f64)> {
        let had = match from_least {
            true => self.all.iter().copied().fold(f64::INFINITY, f64::min),
            false if self.all.len() < HISTORY => f64::INFINITY,
            false => middle(&self.all),
        };
        self.recent.push_back(value);
        if self.recent.len() > ROWS {
            // (Rows that may be the beginning of the end are no history yet.)
            self.all.extend(self.recent.pop_front());
        }
        let least = self.recent.iter().copied().fold(f64::INFINITY, f64::min);
        let gone = self.recent.len() == ROWS && had > 0.0 && had.is_finite() && least > factor * had;
        (gone && !std::mem::replace(&mut self.told, true)).then_some((least, had))
    }
}

fn middle(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Mean over all elements of the standard deviation over the first samples; `None` where they are too few to say.
pub fn spread(samples: &HostTensor) -> Option<f64> {
    let rows = samples.shape().first().copied()?.min(SAMPLES);
    let width: usize = samples.shape()[1..].iter().product();
    if rows < SAMPLES / 2 || width == 0 {
        return None;
    }
    let values = samples.rows(0, rows).ok()?.to_f32();
    let deviation = |k: usize| {
        let column = || (0..rows).map(|r| f64::from(values[r * width + k]));
        let mean = column().sum::<f64>() / rows as f64;
        (column().map(|v| (v - mean).powi(2)).sum::<f64>() / (rows - 1) as f64).sqrt()
    };
    Some((0..width).map(deviation).sum::<f64>() / width as f64)
}

/// Follows the rows of metrics and the student's samples of one run.
#[derive(Debug)]
pub struct Watch {
    path: PathBuf,
    factor: f64,
    least_spread: f64,
    stops: bool,
    stage: StageKind,
    courses: [Course; 3],
    /// The largest share of the teacher's spread that the student's samples have had.
    reached: f64,
    collapsed: bool,
    warnings: Vec<Warning>,
    /// Not told yet.
    fresh: Vec<String>,
}

impl Watch {
    /// Of a run in this folder.
    pub fn new(config: &Config, run: &Path) -> Self {
        Self {
            path: run.join(FILE),
            factor: config.divergence_factor,
            least_spread: config.collapse_spread,
            stops: config.stop_on_divergence,
            stage: StageKind::Degrade,
            courses: Default::default(),
            reached: 0.0,
            collapsed: false,
            warnings: read(run),
            fresh: Vec::new(),
        }
    }

    /// A stage begins, or goes on after `iteration`, with the rows that it has already.
    pub fn begin(&mut self, stage: StageKind, iteration: u64, before: &[MetricsRow]) -> Result<()> {
        let kept = |w: &Warning| (w.stage, w.iteration) <= (stage, iteration);
        if !self.warnings.iter().all(kept) {
            self.warnings.retain(kept);
            let lines: String = self.warnings.iter().map(line).collect::<Result<_>>()?;
            crate::files::write_atomic(&self.path, lines.as_bytes())?;
        }
        (self.stage, self.courses) = (stage, Default::default());
        for row in before.iter().filter(|r| r.stage == stage && r.iteration <= iteration) {
            self.take(row);
        }
        self.fresh.clear();
        Ok(())
    }

    /// What this row brings: a sentence for each course that it leaves.
    fn take(&mut self, row: &MetricsRow) -> Vec<String> {
        let values = [
            ("loss of the fake score", row.loss_fake, true),
            ("gradient norm of the fake score", row.grad_norm_fake, false),
            ("gradient norm of the generator", row.grad_norm_generator, false),
        ];
        let mut found = Vec::new();
        for (course, (name, value, from_least)) in self.courses.iter_mut().zip(values) {
            let Some((value, had)) =
                value.filter(|v| v.is_finite()).and_then(|v| course.left(v, self.factor, from_least))
            else {
                continue;
            };
            let name = if row.stage == StageKind::Degrade {
                name.replace("fake score", "degrading copy")
            } else {
                name.into()
            };
            found.push(format!(
                "the {name} has risen to {value:.3}, {:.0} times what it had been ({had:.3})",
                value / had
            ));
        }
        found
    }

    /// A row of metrics was written. Gives the warnings to be told.
    ///
    /// Errors: the run has diverged and is to stop.
    pub fn row(&mut self, row: &MetricsRow) -> Result<Vec<String>> {
        let rate =
            if row.stage == StageKind::Degrade { "degrade.lr" } else { "backtrack.lr_generator and lr_fake (--lr)" };
        for what in self.take(row) {
            self.add(
                row.iteration,
                format!("{what}: it diverges; a lower {rate}, a smaller optimizer.clip or a longer optimizer.warmup"),
            )?;
        }
        self.told()
    }

    /// The student's samples have this share of the teacher's spread.
    pub fn samples(&mut self, iteration: u64, share: f64) -> Result<()> {
        self.reached = self.reached.max(share);
        // (An untrained student gives nearly the same for all noise: what has never spread has not collapsed.)
        if self.collapsed || !(share < self.least_spread && self.reached > 2.0 * self.least_spread) {
            return Ok(());
        }
        self.collapsed = true;
        let text = format!(
            "the student's samples have {:.1} % of the spread of the teacher's, and had {:.0} %: it collapses; a lower \
             backtrack.lr_generator, a higher backtrack.ratio, or a larger batch",
            100.0 * share,
            100.0 * self.reached
        );
        self.add(iteration, text)
    }

    fn add(&mut self, iteration: u64, text: String) -> Result<()> {
        use std::io::Write;
        let warning = Warning { stage: self.stage, iteration, text };
        let text = line(&warning)?;
        let append = || crate::files::append(&self.path)?.write_all(text.as_bytes());
        append().with_context(|| self.path.display().to_string())?;
        self.fresh.push(format!("{}, iteration {iteration}: {}", warning.stage.name(), warning.text));
        self.warnings.push(warning);
        Ok(())
    }

    fn told(&mut self) -> Result<Vec<String>> {
        let fresh = std::mem::take(&mut self.fresh);
        match fresh.first() {
            Some(text) if self.stops => Err(Error::mismatch(text.clone()).hint(
                "the run stops here (stop_on_divergence); change this in a new run: this one goes on as it was begun",
            )),
            _ => Ok(fresh),
        }
    }

    /// All warnings so far.
    pub fn warnings(&self) -> &[Warning] {
        &self.warnings
    }
}

fn line(warning: &Warning) -> Result<String> {
    let text = serde_json::to_string(warning).map_err(|e| Error::io(e.to_string()))?;
    Ok(text + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(iteration: u64, loss: f64, norm: f64) -> MetricsRow {
        serde_json::from_value(serde_json::json!({
            "stage": "backtrack", "iteration": iteration, "node": 0, "loss_fake": loss, "grad_norm_fake": norm, "lr": 1e-4,
            "updates": iteration, "images": iteration, "images_per_s": 1.0, "seconds": 1.0, "skipped": 0,
        }))
        .unwrap()
    }

    fn watch(run: &Path, stop_on_divergence: bool) -> Watch {
        let mut watch = Watch::new(&Config { stop_on_divergence, ..Config::default() }, run);
        watch.begin(StageKind::Backtrack, 0, &[]).unwrap();
        watch
    }

    #[test]
    fn a_loss_that_leaves_its_history_is_told_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut seen = watch(dir.path(), false);
        // A noisy loss, with an outlier.
        for k in 1..30 {
            let loss = if k == 20 { 400.0 } else { 0.5 + 0.4 * (k as f64).sin() };
            assert!(seen.row(&row(k, loss, 1.0)).unwrap().is_empty(), "row {k}");
        }
        let told: Vec<usize> = (30..40).map(|k| seen.row(&row(k, 90.0, 1.0)).unwrap().len()).collect();
        assert_eq!(told.iter().sum::<usize>(), 1, "{told:?}");
        assert!(
            seen.warnings()[0].text.contains("loss of the fake score has risen to 90.000"),
            "{:?}",
            seen.warnings()
        );
        assert_eq!(read(dir.path()), seen.warnings());
        // Gone on from before, it is forgotten; from after, it is not told again.
        let mut again = Watch::new(&Config::default(), dir.path());
        again.begin(StageKind::Backtrack, 39, &[]).unwrap();
        assert_eq!(again.warnings().len(), 1);
        again.begin(StageKind::Backtrack, 20, &[]).unwrap();
        assert!(again.warnings().is_empty() && read(dir.path()).is_empty());
    }

    #[test]
    fn a_run_that_diverges_from_its_first_rows_is_stopped_where_that_is_wanted() {
        let dir = tempfile::tempdir().unwrap();
        let mut seen = watch(dir.path(), true);
        let losses = [0.6, 0.9, 30.0, 800.0, 3000.0, 3000.0];
        let ended = losses.iter().enumerate().find_map(|(k, l)| seen.row(&row(k as u64 + 1, *l, 1.0)).err());
        let e = ended.unwrap().to_string();
        assert!(e.contains("lr_fake (--lr)") && e.contains("stop_on_divergence"), "{e}");
        // Norms need a history: those of a generator that starts where nothing is to be learnt rise from 0.
        let mut norms = watch(dir.path(), true);
        for k in 1..9 {
            norms.row(&row(k, 1.0, 10f64.powi(k as i32 - 9))).unwrap();
        }
    }

    #[test]
    fn a_student_that_collapses_is_told_and_one_that_has_not_begun_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let mut seen = watch(dir.path(), false);
        for share in [0.01, 0.05, 0.4, 0.9, 0.3, 0.11] {
            seen.samples(1, share).unwrap();
        }
        assert!(seen.warnings().is_empty());
        seen.samples(7, 0.05).unwrap();
        seen.samples(8, 0.04).unwrap();
        let told = seen.row(&row(8, 1.0, 1.0)).unwrap();
        assert!(told.len() == 1 && told[0].contains("5.0 % of the spread") && told[0].contains("had 90 %"), "{told:?}");
        // Columns 0 and 8 over eight rows each: sample deviations 2.449 and 0.
        let values: Vec<f32> = (0..8).flat_map(|r| [r as f32, 3.0]).collect();
        let found = spread(&HostTensor::new(&[8, 2], &values).unwrap()).unwrap();
        assert!((found - 6f64.sqrt() / 2.0).abs() < 1e-6, "{found}");
        assert!(spread(&HostTensor::new(&[4, 2], &[0f32; 8]).unwrap()).is_none());
    }
}
