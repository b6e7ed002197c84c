//! Does the trajectory pay? The same teacher, seeds, objective and budget with and without it, and what came of each.

mod figure;
mod statistics;

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::diffusion::Denoiser;
use crate::distill::checkpoint::Stage;
use crate::distill::config::Config;
use crate::distill::metrics::Row;
use crate::distill::objective::objective;
use crate::distill::trainer::{Step, Wish};
use crate::distill::{Job, Observer, Outcome, RunDir, Stages, Student, distill};
use crate::error::{Context, Error, Result};

pub use figure::{Axis, svg};
pub use statistics::{Comparison, Interval, Reached, compare};

/// A look at the student on its way.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Generator updates.
    pub updates: u64,
    /// Forward passes of all networks, in images, stage 1 included.
    pub forwards: u64,
    /// Seconds of training, stage 1 included, looks excluded.
    pub seconds: f64,
    pub distance: f64,
}

/// One run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    pub seed: u64,
    /// Nodes of the trajectory; 0: the base method.
    pub nodes: usize,
    pub points: Vec<Point>,
}

/// Tells how far a student is from the reference.
pub trait Judge {
    fn distance(&mut self, student: &Student) -> Result<f64>;
}

/// Forward passes in images: of one step of stage 1, of one iteration of stage 2, and of one generator update beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passes {
    pub degrade: u64,
    pub iteration: u64,
    pub update: u64,
}

/// What the configuration costs in forward passes. (A backward pass costs about two; it comes with every pass of the
/// student, of the degrading copy and of the fake score in training, in both arms alike.)
pub fn passes(config: &Config) -> Passes {
    let images = config.images();
    let fake = u64::from(objective(config).needs_fake());
    let gan = u64::from(!config.gan.data.is_empty());
    let target = if config.guidance == 1.0 { 1 } else { 2 };
    Passes { degrade: 2 * images, iteration: (1 + fake + 2 * gan) * images, update: (target + fake + gan) * images }
}

struct Looker<'a> {
    judge: &'a mut dyn Judge,
    every: u64,
    passes: Passes,
    ratio: u64,
    started: Instant,
    looking: Duration,
    degrade_steps: u64,
    points: Vec<Point>,
    note: &'a mut dyn FnMut(Point),
}

impl Observer for Looker<'_> {
    fn metrics(&mut self, row: &Row) -> Result<()> {
        if row.stage == Stage::Degrade {
            self.degrade_steps = row.iteration;
        }
        Ok(())
    }

    fn after_step(&mut self, step: &Step) -> Result<Wish> {
        let updates = step.updates;
        let student = match &step.networks {
            Some(networks) if step.updated && updates.is_multiple_of(self.every) => networks.average,
            _ => return Ok(Wish::default()),
        };
        let seconds = (self.started.elapsed() - self.looking).as_secs_f64();
        let before = Instant::now();
        let distance = self.judge.distance(student)?;
        let p = self.passes;
        let forwards = self.degrade_steps * p.degrade + updates * (self.ratio * p.iteration + p.update);
        let point = Point { updates, forwards, seconds, distance };
        (self.note)(point);
        self.points.push(point);
        self.looking += before.elapsed();
        Ok(Wish::default())
    }
}

/// Name of the file that a finished run leaves in its folder.
const CURVE: &str = "curve.json";

/// Runs one arm in `dir` and looks at it after every `every` updates; one that was finished
/// earlier is read back. `student`: where it is not the teacher's copy. `None`: stopped from outside.
#[allow(clippy::too_many_arguments)]
pub fn run_arm(
    config: &Config,
    teacher: &Denoiser,
    student: Option<&Student>,
    dir: &Path,
    every: u64,
    judge: &mut dyn Judge,
    stop: &AtomicBool,
    note: &mut dyn FnMut(Point),
) -> Result<Option<Curve>> {
    let file = dir.join(CURVE);
    if file.is_file() {
        let bytes = std::fs::read(&file)?;
        let curve = serde_json::from_slice(&bytes).map_err(|e| Error::io(format!("not a curve: {e}")));
        let (_, saved) = RunDir::open(dir)?;
        if saved != *config {
            return Err(Error::usage(format!("{} was run with another configuration", dir.display()))
                .hint("compare in a new folder"));
        }
        return curve.with_context(|| file.display().to_string()).map(Some);
    }
    // What an interrupted comparison left: the run is short and starts anew.
    if dir.join("config.toml").is_file() {
        std::fs::remove_dir_all(dir).with_context(|| dir.display().to_string())?;
    }
    let run = RunDir::create(dir, config)?;
    let mut looker = Looker {
        judge,
        every,
        passes: passes(config),
        ratio: config.backtrack.ratio,
        started: Instant::now(),
        looking: Duration::ZERO,
        degrade_steps: 0,
        points: Vec::new(),
        note,
    };
    let job = Job { config, student, run: &run, observer: &mut looker, stop, silent: true };
    let outcome = distill(job, teacher, Stages::Both).with_context(|| dir.display().to_string())?;
    if matches!(outcome, Outcome::Stopped(_)) {
        return Ok(None);
    }
    let curve = Curve { seed: config.seed, nodes: config.degrade.nodes, points: looker.points };
    let text = serde_json::to_vec_pretty(&curve).map_err(|e| Error::io(e.to_string()))?;
    crate::files::write_atomic(&file, &text)?;
    Ok(Some(curve))
}

/// The configuration of one arm.
pub fn arm(config: &Config, seed: u64, with_trajectory: bool) -> Config {
    let mut arm = Config { seed, ..config.clone() };
    if !with_trajectory {
        arm.degrade.nodes = 0;
    }
    // Every step of stage 1 must be counted; checkpoints are of no use to a short run.
    (arm.log.every, arm.log.checkpoint_every) = (1, 0);
    arm
}
