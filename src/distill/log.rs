//! Metrics, progress and time of one stage, and its checkpoints.

use std::time::Instant;

use crate::distill::checkpoint::{self, StageKind, State};
use crate::distill::job::Job;
use crate::distill::metrics::{Means, Meters, MetricsFile, MetricsRow};
use crate::distill::nonfinite::Finding;
use crate::distill::observer::Observer;
use crate::distill::plan;
use crate::distill::progress::Progress;
use crate::error::{Error, Result};
use crate::torch::dist::{Named, World};
use crate::torch::train::optim::AdamW;

/// Metrics, progress and time of one stage.
pub(crate) struct Log {
    stage: StageKind,
    /// Of the present iteration, until it is [`Log::done`].
    pub meters: Meters,
    /// Of the iterations since the row before.
    since_row: Meters,
    /// Rank 0's alone.
    file: Option<MetricsFile>,
    pub progress: Progress,
    started: Instant,
    seconds_before: f64,
    row_at: Instant,
    row_images: u64,
    /// Seconds waited for other processes until the row before.
    row_waited: f64,
    world: World,
    /// Steps in a row that may be skipped: of the generator, and of the others.
    max_skips: [u64; 2],
}

impl Log {
    /// Opens `metrics.jsonl`, dropping the rows after the checkpoint that the stage goes on from.
    pub fn new(job: &Job, state: &State, total: u64, last: Option<usize>, device: tch::Device) -> Result<Self> {
        let images = state.iteration * job.config.images();
        // A run that is shorter than what may be skipped must not end well either where nothing was ever done.
        let most = |steps: u64| job.config.optimizer.max_skips.min(steps);
        let keep = |row: &MetricsRow| match (row.stage, state.stage) {
            (StageKind::Degrade, StageKind::Backtrack) => true,
            (StageKind::Backtrack, StageKind::Degrade) => false,
            _ => row.iteration <= state.iteration,
        };
        Ok(Self {
            stage: state.stage,
            meters: Meters::default(),
            since_row: Meters::restore(&state.meters, device)?,
            file: job.world.leads().then(|| MetricsFile::open(&job.run.metrics(), keep)).transpose()?,
            progress: Progress::new(state.stage, total, state.iteration, last, job.silent || !job.world.leads()),
            started: Instant::now(),
            seconds_before: state.seconds,
            row_at: Instant::now(),
            row_images: images,
            row_waited: job.world.waited(),
            world: job.world.clone(),
            max_skips: [most(total / job.config.backtrack.ratio), most(total)],
        })
    }

    /// Seconds spent in the stage, earlier processes included.
    pub fn seconds(&self) -> f64 {
        self.seconds_before + self.started.elapsed().as_secs_f64()
    }

    /// The iteration is done: what it has measured counts.
    pub fn done(&mut self) -> Result<()> {
        self.since_row.take_over(&mut self.meters)
    }

    /// Adds an optimiser's counters of skipped steps: in all, and in a row.
    pub fn skips(&mut self, names: [&'static str; 2], adam: &AdamW) -> Result<()> {
        let (total, row) = adam.skipped();
        self.meters.set(names[0], total)?;
        self.meters.set(names[1], row)
    }

    /// Reads the meters, writes a row, shows it.
    pub fn row(&mut self, at: At, observer: &mut dyn Observer) -> Result<Means> {
        self.done()?;
        let means = self.since_row.take()?;
        let seconds = self.row_at.elapsed().as_secs_f64().max(1e-9);
        let skips = |names: &[&str]| names.iter().filter_map(|n| means.get(n)).sum::<f64>() as u64;
        let row = MetricsRow {
            stage: self.stage,
            iteration: at.iteration,
            node: at.node,
            loss_fake: means.get("loss_fake"),
            loss_generator: means.get("loss_generator"),
            grad_norm_fake: means.get("grad_norm_fake"),
            grad_norm_generator: means.get("grad_norm_generator"),
            mismatch: means.get("mismatch"),
            tracking: tracking(&means),
            loss_gan: means.get("loss_gan"),
            loss_discriminator: means.get("loss_discriminator"),
            lr: at.lr,
            updates: at.updates,
            images: at.images,
            images_per_s: (at.images - self.row_images) as f64 / seconds,
            seconds: self.seconds(),
            skipped: skips(&["skipped_fake", "skipped_generator", "skipped_head"]),
            waited: (!self.world.is_alone()).then(|| self.world.waited() - self.row_waited),
        };
        self.row_waited = self.world.waited();
        self.row_at = Instant::now();
        self.row_images = at.images;
        self.file.as_mut().map_or(Ok(()), |file| file.append(&row))?;
        self.progress.row(&row);
        observer.metrics(&row)?;
        Ok(means)
    }

    /// Errors where a network has had nothing but gradients that are not finite for too long; `finding` tells which network is at
    /// fault.
    pub fn check_skips(
        &self,
        means: &Means,
        iteration: u64,
        finding: &dyn Fn() -> Result<Option<Finding>>,
    ) -> Result<()> {
        let [most_generator, most] = self.max_skips;
        let trained = if self.stage == StageKind::Degrade { "the degraded copy" } else { "the fake score" };
        for (name, network, most) in [
            ("in_a_row_generator", "the generator", most_generator),
            ("in_a_row_fake", trained, most),
            ("in_a_row_head", "the discriminator's head", most),
        ] {
            let Some(steps) = means.get(name).filter(|n| *n >= most as f64) else { continue };
            let what = format!(
                "{}, iteration {}: the gradient of {network} has not been finite for {steps} steps in a row",
                self.stage.name(),
                iteration
            );
            return Err(match finding()? {
                Some(c) => Error::backend(format!("{what}: {}", c.found)).hint(c.hint),
                None => Error::backend(format!(
                    "{what}, though each network gives finite values: it overflows on its way back"
                ))
                .hint("a lower learning rate, a smaller optimizer.clip, or f32 where precision is bf16"),
            });
        }
        Ok(())
    }

    /// Writes a checkpoint; rank 0 does, and the others send it what they keep.
    pub fn checkpoint(&self, job: &Job, state: &mut State, tensors: &[Named]) -> Result<()> {
        if let Some(file) = &self.file {
            job.run.check_taken()?;
            file.sync()?;
            state.meters = self.since_row.save()?;
            state.seconds = self.seconds();
        }
        checkpoint::save(&job.run.checkpoints(), state, tensors, job.config.log.keep, &job.world)
    }
}

/// Where a row of metrics stands.
pub(crate) struct At {
    pub iteration: u64,
    pub node: usize,
    pub lr: f64,
    pub updates: u64,
    pub images: u64,
}

/// How far the fake score has come, where there is one.
fn tracking(means: &Means) -> Option<f64> {
    means.get("loss_fake")?;
    plan::tracking(means.get("gap")?, means.get("mismatch")?)
}
