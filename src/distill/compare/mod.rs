//! Does the trajectory pay? The same teacher, seeds, objective and budget with and without it, and what came of each.

mod figure;
mod statistics;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::diffusion::Denoiser;
use crate::distill::checkpoint::StageKind;
use crate::distill::config::{BacktrackConfig, Config, DegradeConfig, NodeCount};
use crate::distill::cost::{passes, stage_one};
use crate::distill::observer::{Begin, Step, Wish};
use crate::distill::{Job, Observer, Outcome, RunDir, Stages, Student, Trajectory, distill, plan, trajectory};
use crate::error::{Context, Error, Result};
use crate::torch::dist::World;

pub use figure::{Axis, Group, svg};
pub use statistics::{Comparison, Interval, Reached, compare};

/// One measurement of the student in the course of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Generator updates.
    pub updates: u64,
    /// Forward passes of all networks, in images, stage 1 included.
    pub forwards: u64,
    /// Seconds of training, stage 1 included, without the time of the measurements.
    pub seconds: f64,
    /// Distance of the student from the reference, as the [`Judge`] measures it; lower is better.
    pub distance: f64,
}

/// The measurements of one run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// Seed of the run.
    pub seed: u64,
    /// Nodes of the trajectory; 0: the base method.
    pub nodes: usize,
    /// Measurements in the order of the updates.
    pub points: Vec<Point>,
}

/// Measures how far a student is from the reference.
pub trait Judge {
    /// The distance of this student from the reference; lower is better.
    fn distance(&mut self, student: &Student) -> Result<f64>;
}

/// What an unfinished run leaves beside its checkpoint.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Looks {
    /// Steps and seconds of stage 1.
    degrade_steps: u64,
    degrade_seconds: f64,
    points: Vec<Point>,
    /// Seconds of stage 2 spent looking, up to each point and with it.
    looking: Vec<f64>,
}

struct Looker<'a> {
    judge: &'a mut dyn Judge,
    config: &'a Config,
    every: u64,
    file: PathBuf,
    looks: Looks,
    note: &'a mut dyn FnMut(Point),
}

impl Looker<'_> {
    fn save(&self) -> Result<()> {
        let text = serde_json::to_vec(&self.looks).map_err(|e| Error::io(e.to_string()))?;
        crate::files::write_atomic(&self.file, &text)
    }
}

impl Observer for Looker<'_> {
    fn stage_begins(&mut self, begin: &Begin) -> Result<bool> {
        if begin.stage == StageKind::Backtrack {
            // Looks after the checkpoint that the stage goes on from will be made again.
            self.looks.points.retain(|p| p.updates <= begin.updates);
            self.looks.looking.truncate(self.looks.points.len());
            self.save()?;
        }
        Ok(false)
    }

    fn after_step(&mut self, step: &Step) -> Result<Wish> {
        if step.stage == StageKind::Degrade {
            (self.looks.degrade_steps, self.looks.degrade_seconds) = (step.iteration, step.seconds);
        }
        let (updates, last) = (step.updates, self.config.backtrack.updates);
        let student = match &step.networks {
            Some(networks) if step.updated && (updates.is_multiple_of(self.every) || updates == last) => {
                networks.average
            }
            _ => return Ok(Wish::default()),
        };
        let looked = self.looks.looking.last().copied().unwrap_or(0.0);
        let seconds = self.looks.degrade_seconds + step.seconds - looked;
        let before = Instant::now();
        let distance = self.judge.distance(student)?;
        let p = passes(self.config);
        let forwards =
            stage_one(self.config, self.looks.degrade_steps) + updates * p.of_update(self.config.backtrack.ratio);
        let point = Point { updates, forwards, seconds, distance };
        (self.note)(point);
        self.looks.points.push(point);
        self.looks.looking.push(looked + before.elapsed().as_secs_f64());
        self.save()?;
        Ok(Wish::default())
    }
}

/// Names of the files that a finished and an unfinished run leave in their folder.
const CURVE: &str = "curve.json";
const LOOKS: &str = "looks.json";

/// Runs one arm in `dir` and measures it after every `every` updates; one that was finished earlier is read back, one
/// that was interrupted goes on from its checkpoint. `student`: where it is not the teacher's copy. `None`: stopped
/// from outside.
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
    let (file, looks_file) = (dir.join(CURVE), dir.join(LOOKS));
    let begun = dir.join("config.toml").is_file();
    if begun {
        let (run, saved) = RunDir::open(dir)?;
        run.check_card(teacher.card(), &Default::default())?;
        if saved != *config {
            let changed = saved.differences(config)?;
            let what = changed.first().map_or(String::new(), |(k, was, now)| format!(": {k} was {was}, is {now}"));
            return Err(Error::usage(format!("{} was run with another configuration{what}", dir.display()))
                .hint("compare in a new folder"));
        }
    }
    if file.is_file() {
        return read(&file).map(Some);
    }
    let (run, mut looks) = match begun {
        true => (taken(dir)?, if looks_file.is_file() { read(&looks_file)? } else { Looks::default() }),
        false => (RunDir::create(dir, config)?, Looks::default()),
    };
    run.write_card(teacher.card())?;
    // (A process that ended between the stages had not written down how long the first one was.)
    if run.trajectory().join(trajectory::INDEX).is_file() && config.degrade.nodes.any() {
        let recorded = Trajectory::open(&run.trajectory(), &teacher.params().hash()?)?;
        looks.degrade_steps = recorded.nodes().last().map_or(0, |n| n.iteration);
    }
    let mut looker = Looker { judge, config, every, file: looks_file.clone(), looks, note };
    let job = Job { config, student, run: &run, observer: &mut looker, stop, silent: true, world: World::alone() };
    let outcome = distill(job, teacher, Stages::Both).with_context(|| dir.display().to_string())?;
    if matches!(outcome, Outcome::Stopped(_)) {
        looker.save()?;
        return Ok(None);
    }
    let nodes = match config.degrade.nodes {
        NodeCount::Count(nodes) => nodes,
        NodeCount::Auto => Trajectory::open(&run.trajectory(), &teacher.params().hash()?)?.last(),
    };
    let curve = Curve { seed: config.seed, nodes, points: looker.looks.points };
    let text = serde_json::to_vec_pretty(&curve).map_err(|e| Error::io(e.to_string()))?;
    crate::files::write_atomic(&file, &text)?;
    let _ = std::fs::remove_file(looks_file);
    Ok(Some(curve))
}

fn taken(dir: &Path) -> Result<RunDir> {
    let (mut run, _) = RunDir::open(dir)?;
    run.take(false)?;
    Ok(run)
}

fn read<T: serde::de::DeserializeOwned>(file: &Path) -> Result<T> {
    let bytes = crate::files::read(file, crate::files::JSON).with_context(|| file.display().to_string())?;
    serde_json::from_slice(&bytes)
        .map_err(|e| Error::io(format!("not what a comparison writes: {e}")))
        .with_context(|| file.display().to_string())
}

/// The configuration of one arm. The base method's does not depend on the settings of stage 1 and of switching, which it has
/// no use for: its runs serve any trajectory.
pub fn arm(config: &Config, seed: u64, with_trajectory: bool) -> Config {
    let mut arm = Config { seed, ..config.clone() };
    if !with_trajectory {
        arm.degrade = DegradeConfig { nodes: 0.into(), ..DegradeConfig::default() };
        let d = BacktrackConfig::default();
        let b = &mut arm.backtrack;
        (b.switch, b.switch_every, b.switch_patience, b.switch_max) =
            (d.switch, d.switch_every, d.switch_patience, d.switch_max);
    }
    arm
}

/// The same arm with as many generator updates as this number of forward passes (in images) pays for, stage 1 included.
///
/// Errors: a budget that does not pay for one update.
pub fn within(mut arm: Config, budget: u64) -> Result<Config> {
    let p = passes(&arm);
    let stage_one = match arm.degrade.nodes {
        NodeCount::Count(0) => 0,
        NodeCount::Count(_) => arm.degrade.steps * p.degrade,
        // (At most: where it takes less, the run costs less than the budget.)
        NodeCount::Auto => budget - plan::left_for_stage_two(budget),
    };
    let each = p.of_update(arm.backtrack.ratio);
    arm.backtrack.updates = budget.saturating_sub(stage_one) / each;
    if arm.backtrack.updates == 0 {
        return Err(Error::usage(format!(
            "a budget of {budget} forward passes does not pay for one generator update: stage 1 takes {stage_one}, an \
             update {each} (in images)"
        )));
    }
    Ok(arm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_counts_stage_one_and_the_base_method_knows_nothing_of_the_trajectory() {
        let sets = ["batch=4", "degrade.nodes=3", "degrade.steps=10", "backtrack.switch_every=7", "backtrack.ratio=2"];
        let config = Config::resolve(None, &sets.map(String::from)).unwrap();
        // Stage 1: 10 steps of 8; an update: 2 iterations of (student + fake score), target and fake score again: 24.
        let updates = |with, budget| within(arm(&config, 1, with), budget).map(|c| c.backtrack.updates);
        assert_eq!((updates(true, 320).unwrap(), updates(false, 320).unwrap()), (10, 13));
        assert!(updates(true, 100).unwrap_err().to_string().contains("stage 1 takes 80, an update 24"));
        let mut other = config.clone();
        (other.degrade.nodes, other.degrade.lr, other.backtrack.switch_every) = (1.into(), 1.0, 2);
        assert_eq!(arm(&config, 5, false), arm(&other, 5, false));
        assert_ne!(arm(&config, 5, true), arm(&other, 5, true));
    }
}
