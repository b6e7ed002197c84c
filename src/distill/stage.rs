//! The loop that both stages run in. A stage says what happens in each place; the order of the places, metrics, checkpoints and
//! stopping are here, once.
//!
//! Several processes share the micro-batches of an iteration: process r of W takes r, r + W, r + 2 W. Their gradients are summed in the
//! order of the micro-batches on the way to [`Stage::update`], what they measured is gathered, rank 0 decides what is not in the draws
//! (an observer's wishes, the end of a stage), and rank 0 alone writes.

use tch::Tensor;

use crate::distill::checkpoint::{self, StageKind, State};
use crate::distill::job::Job;
use crate::distill::log::{At, Log};
use crate::distill::nonfinite::Finding;
use crate::distill::observer::{Begin, Running, Step};
use crate::error::{Kind, Result};
use crate::torch::dist::{Named, World};

/// What a micro-batch measures: scalars (rank 0), the same names in the same order in every micro-batch of an iteration.
pub(crate) type Measured = Vec<(&'static str, Tensor)>;

/// One stage of a run.
pub(crate) trait Stage {
    fn kind(&self) -> StageKind;

    /// Iterations of the whole stage.
    fn total(&self) -> u64;

    /// Last node of the trajectory, or the number of nodes that are wanted. `None` where what is recorded are candidates, of which the
    /// nodes are chosen in the end.
    fn last_node(&self) -> Option<usize>;

    /// Before the micro-batches of an iteration: what depends on where the run stands, such as the target.
    fn begin(&mut self, job: &mut Job, state: &mut State, log: &mut Log) -> Result<()>;

    /// Losses and gradients of one micro-batch, on top of those of the micro-batches before. The round that it belongs to has `rows` of
    /// them, one of each of the first processes.
    fn micro_batch(&mut self, job: &mut Job, state: &State, micro: usize, rows: usize) -> Result<Measured>;

    /// A round in which this process has no micro-batch: it takes part in the sums all the same.
    fn idle(&mut self, rows: usize) -> Result<()>;

    /// What the micro-batches of all processes have measured, in their order.
    fn measured(&mut self, _all: &[Measured]) -> Result<()> {
        Ok(())
    }

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
    fn tensors(&self) -> Vec<Named>;

    /// Whether an observer sees all of [`Stage::running`] only between [`Stage::gather`] and [`Stage::let_go`], since each process keeps a
    /// share.
    fn is_shared_out(&self) -> bool {
        false
    }

    /// Rank 0 gets what the others keep. All processes call this.
    fn gather(&mut self, _world: &World) -> Result<()> {
        Ok(())
    }

    /// Rank 0 keeps its own share alone again.
    fn let_go(&mut self) -> Result<()> {
        Ok(())
    }

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
    let (world, total) = (job.world.clone(), job.config.accumulate);
    let mut mine = Vec::new();
    for first in (0..total).step_by(world.size()) {
        let rows = world.size().min(total - first);
        match world.rank() < rows {
            true => mine.push(stage.micro_batch(job, state, first + world.rank(), rows)?),
            false => stage.idle(rows)?,
        }
    }
    let all = everyones(&world, mine, total)?;
    stage.measured(&all)?;
    all.iter().flatten().try_for_each(|(name, value)| log.meters.add(name, value))
}

/// A measured scalar that stays as it is: what a recorded step makes lies where the next one makes its own.
pub(crate) fn lasting(value: &Tensor, recorded: bool) -> Result<Tensor> {
    Ok(if recorded { value.f_detach()?.f_to_dtype(value.kind(), false, true)? } else { value.f_detach()? })
}

/// What the micro-batches of all processes have measured, in their order, from what those of this one have.
fn everyones(world: &World, mine: Vec<Measured>, total: usize) -> Result<Vec<Measured>> {
    let Some(names) = mine.first().filter(|_| !world.is_alone()) else { return Ok(mine) };
    let names: Vec<&'static str> = names.iter().map(|(name, _)| *name).collect();
    let rounds = total.div_ceil(world.size());
    let values: Vec<&Tensor> = mine.iter().flatten().map(|(_, value)| value).collect();
    let mut row = Tensor::f_stack(&values, 0)?.f_to_kind(tch::Kind::Float)?;
    // (A process that was idle in the last round has less to say.)
    let missing = (rounds * names.len() - values.len()) as i64;
    row = row.f_constant_pad_nd([0, missing])?;
    let all = world.gather(&row)?;
    let value = |micro: usize, k: usize| {
        let (rank, at) = (micro % world.size(), micro / world.size() * names.len() + k);
        all.f_get(rank as i64)?.f_get(at as i64)
    };
    let of = |micro: usize| -> Result<Measured> {
        names.iter().enumerate().map(|(k, name)| Ok((*name, value(micro, k)?))).collect()
    };
    (0..total).map(of).collect()
}

/// Something has failed: the last good state becomes a checkpoint. Where that cannot be written either, what failed first is told.
/// (Where another process is gone nothing is: what this one has may be half of an update. Nor where others keep a part of it, since
/// they have not all failed in the same place.)
fn keep(stage: &dyn Stage, job: &Job, log: &Log, mut state: State) {
    let tensors = stage.tensors();
    if job.world.leads()
        && !job.world.is_broken()
        && tensors.iter().all(|t| t.owner.is_none())
        && state.iteration > 0
        && !checkpoint::is_there(&job.run.checkpoints(), &state)
    {
        let _ = log.checkpoint(job, &mut state, &tensors);
    }
}

/// Runs a stage from where `state` stands.
pub(crate) fn run(stage: &mut dyn Stage, job: &mut Job, mut state: State) -> Result<Ended> {
    let config = job.config;
    let (kind, total, last) = (stage.kind(), stage.total(), stage.last_node());
    let mut log = Log::new(job, &state, total, last, stage.device())?;
    let (iteration, updates) = (state.iteration, stage.at(&state).updates);
    let ended = job.observer.stage_begins(&Begin { stage: kind, iteration, total, updates, last })?;
    let [mut ended] = job.world.any([ended])?;
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
        let step =
            Step { stage: kind, iteration: done, total, updates, updated, images, seconds, node, networks: None };
        let mut looks = job.observer.looks(&step);
        if stage.is_shared_out() {
            [looks] = job.world.any([looks && job.world.leads()])?;
            if looks {
                stage.gather(&job.world)?;
            }
        }
        let wish = match job.observer.after_step(&Step { networks: stage.running(), ..step }) {
            Ok(wish) => wish,
            Err(e) => {
                // (What could not be written of this iteration is missing, and a resume must write it again.)
                if e.kind() != Kind::Io {
                    keep(stage, job, &log, state);
                }
                return Err(e);
            }
        };
        if looks {
            stage.let_go()?;
        }
        let [end, stop, saves] = job.world.any([wish.end, wish.stop || job.stopped(), wish.checkpoint])?;
        ended |= end && stage.ends_with_a_checkpoint();
        let stop = stop && !ended;
        let due = config.log.checkpoint_every > 0 && done.is_multiple_of(config.log.checkpoint_every);
        if if ended { stage.ends_with_a_checkpoint() } else { stop || due || saves } {
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
