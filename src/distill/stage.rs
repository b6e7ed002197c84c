//! The loop that both stages run in. A stage says what happens in each place; the order of the places, metrics, checkpoints and
//! stopping are here, once.
//!
//! Several processes would enter in three places: the gradients are complete between [`Stage::micro_batch`] and
//! [`Stage::update`] (one reduction), [`Stage::begin`] and [`Stage::after_update`] decide by numbers that must be the same
//! everywhere (one decider), and what [`run`] and the observer write is written by one of them.

use tch::Tensor;

use crate::distill::checkpoint::{self, StageKind, State};
use crate::distill::job::Job;
use crate::distill::log::{At, Log};
use crate::distill::nonfinite::Finding;
use crate::distill::observer::{Begin, Running, Step};
use crate::error::{Kind, Result};

/// One stage of a run.
pub(crate) trait Stage {
    fn kind(&self) -> StageKind;

    /// Iterations of the whole stage.
    fn total(&self) -> u64;

    /// Last node of the trajectory, or the number of nodes that are wanted.
    fn last_node(&self) -> usize;

    /// Before the micro-batches of an iteration: what depends on where the run stands, such as the target.
    fn begin(&mut self, job: &mut Job, state: &mut State, log: &mut Log) -> Result<()>;

    /// Losses and gradients of one micro-batch, on top of those of the micro-batches before.
    fn micro_batch(&mut self, job: &mut Job, state: &State, micro: usize, log: &mut Log) -> Result<()>;

    /// The optimisers' step with the gradients of all micro-batches.
    fn update(&mut self, state: &State, log: &mut Log) -> Result<()>;

    /// Holds on to what changes before [`Stage::update`] and a checkpoint has; [`Stage::rewind`] puts it back.
    fn mark(&mut self) {}

    /// As before the iteration that has failed before its update.
    fn rewind(&mut self) {}

    /// Device of the networks.
    fn device(&self) -> tch::Device;

    /// After an iteration, which `state` counts already. True: the stage ends here.
    fn after_update(&mut self, job: &mut Job, state: &mut State, log: &mut Log) -> Result<bool>;

    /// Where the stage stands, for a row of metrics.
    fn at(&self, state: &State) -> At;

    /// Whether the last iteration updated the generator.
    fn updated_generator(&self) -> bool {
        false
    }

    /// The optimisers' counts of skipped steps, for the next row of metrics.
    fn log_skips(&self, log: &mut Log) -> Result<()>;

    /// Which network gives what is not finite, on the draws of the last iteration.
    fn find_nonfinite(&self, state: &State) -> Result<Option<Finding>>;

    /// The networks that an observer sees.
    fn running(&self) -> Option<Running<'_>> {
        None
    }

    /// Everything that a checkpoint holds.
    fn tensors(&self) -> Vec<(String, Tensor)>;

    /// Whether the end of the stage is a checkpoint, and whether an observer may bring it about. (What stage 1 ends with is the
    /// trajectory.)
    fn ends_with_a_checkpoint(&self) -> bool;
}

/// How a stage came out of the loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// All its iterations are done, or as many as it wanted.
    Finished,
    /// Stopped from outside, with a checkpoint.
    Stopped,
}

/// Everything of an iteration that comes before its update.
fn gradients(stage: &mut dyn Stage, job: &mut Job, state: &mut State, log: &mut Log) -> Result<()> {
    stage.begin(job, state, log)?;
    (0..job.config.accumulate).try_for_each(|micro| stage.micro_batch(job, state, micro, log))
}

/// Something has failed: the last good state becomes a checkpoint. Where that cannot be written either, what failed first is told.
fn keep(stage: &dyn Stage, job: &Job, log: &Log, mut state: State) {
    if state.iteration > 0 && !checkpoint::is_there(&job.run.checkpoints(), &state) {
        let _ = log.checkpoint(job, &mut state, &stage.tensors());
    }
}

/// Runs a stage from where `state` stands.
pub(crate) fn run(stage: &mut dyn Stage, job: &mut Job, mut state: State) -> Result<Ended> {
    let config = job.config;
    let (kind, total, last) = (stage.kind(), stage.total(), stage.last_node());
    let mut log = Log::new(job, &state, total, last, stage.device())?;
    let (iteration, updates) = (state.iteration, stage.at(&state).updates);
    let mut ended = job.observer.stage_begins(&Begin { stage: kind, iteration, total, updates, last })?;
    while state.iteration < total && !ended {
        let before = state.clone();
        stage.mark();
        if let Err(e) = gradients(stage, job, &mut state, &mut log) {
            stage.rewind();
            log.meters.clear();
            keep(stage, job, &log, before);
            return Err(e);
        }
        stage.update(&state, &mut log)?;
        state.iteration += 1;
        log.done()?;
        let done = state.iteration;
        log.progress.tick(done);

        ended = stage.after_update(job, &mut state, &mut log)? || done == total;
        if done.is_multiple_of(config.log.every) || ended {
            stage.log_skips(&mut log)?;
            let means = log.row(stage.at(&state), job.observer)?;
            log.check_skips(&means, done, &|| stage.find_nonfinite(&state))?;
        }
        let At { node, updates, images, .. } = stage.at(&state);
        let (seconds, updated) = (log.seconds(), stage.updated_generator());
        let networks = stage.running();
        let step = Step { stage: kind, iteration: done, total, updates, updated, images, seconds, node, networks };
        let wish = match job.observer.after_step(&step) {
            Ok(wish) => wish,
            Err(e) => {
                // (What could not be written of this iteration is missing, and a resume must write it again.)
                if e.kind() != Kind::Io {
                    keep(stage, job, &log, state);
                }
                return Err(e);
            }
        };
        ended |= wish.end && stage.ends_with_a_checkpoint();
        let stop = (job.stopped() || wish.stop) && !ended;
        let due = config.log.checkpoint_every > 0 && done.is_multiple_of(config.log.checkpoint_every);
        if if ended { stage.ends_with_a_checkpoint() } else { stop || due || wish.checkpoint } {
            log.checkpoint(job, &mut state, &stage.tensors())?;
        }
        if stop {
            log.progress.finish();
            return Ok(Ended::Stopped);
        }
    }
    log.progress.finish();
    Ok(Ended::Finished)
}
