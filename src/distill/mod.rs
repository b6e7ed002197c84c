//! DisBack: stage 1 records how the teacher degrades into the initial student, stage 2 distils back along that path.

pub mod backtrack;
pub mod batches;
pub mod checkpoint;
pub mod compare;
pub mod config;
pub mod cost;
pub mod debug_batch;
pub mod degrade;
pub mod draws;
pub mod estimate;
pub mod gan;
pub mod inputs;
pub mod job;
pub mod lock;
mod log;
pub mod metrics;
mod nonfinite;
pub mod objective;
pub mod observer;
pub mod plan;
mod prefetch;
pub mod progress;
pub mod rundir;
mod sealed;
mod stage;
pub mod stage_kind;
pub mod student;
#[cfg(test)]
mod tests;
pub mod trajectory;

pub use config::Config;
pub use debug_batch::DebugBatch;
pub use job::Job;
pub use observer::{Observer, Running, Step, Unobserved, Wish};
pub use rundir::RunDir;
pub use student::Student;
pub use trajectory::Trajectory;

use crate::diffusion::Denoiser;
use crate::distill::checkpoint::{Checkpoint, StageKind};
use crate::error::{Error, Result};

/// Which stages to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stages {
    /// Stage 1, then stage 2.
    Both,
    /// Stage 1 alone: the run directory is left with a complete trajectory.
    Degrade,
    /// Stage 2 alone, on the complete trajectory in the run directory.
    Backtrack,
}

/// How a run ended.
#[derive(Debug)]
pub enum Outcome {
    /// Stopped from outside, with a checkpoint to go on from.
    Stopped(StageKind),
    /// Stage 1 is done.
    Recorded(Trajectory),
    /// Stage 2 is done: the student with its averaged weights.
    Finished(Student),
}

/// Runs the stages, each from its checkpoint where there is one. The final weights are saved as `student.safetensors`.
pub fn distill(mut job: Job, teacher: &Denoiser, stages: Stages) -> Result<Outcome> {
    let hash = teacher.params().hash()?;
    // Copies compute as the teacher does.
    teacher.network().configure(job.config.compute());
    job::lay_out(job.config, teacher.params())?;
    job.student.map_or(Ok(()), |s| job::lay_out(job.config, s.params()))?;
    if let Some(weaker) = teacher.weaker() {
        weaker.network().configure(job.config.target_compute());
        job::lay_out(job.config, weaker.params())?;
    }
    let world = job.world.clone();
    let mut checkpoint = Checkpoint::shared(&world, || Checkpoint::latest(&job.run.checkpoints(), &hash))?;
    if let Some(found) = &checkpoint {
        for problem in &found.passed_over {
            let (stage, iteration) = (found.state.stage.name(), found.state.iteration);
            job.observer
                .warning(&format!("{problem}; going on from the checkpoint before it: {stage}, iteration {iteration}"));
        }
    }
    let dir = job.run.trajectory();
    let open = || dir.join(trajectory::INDEX).is_file().then(|| Trajectory::open(&dir, &hash)).transpose();
    let recorded = Trajectory::shared(&world, open)?;
    if let Some(recorded) = &recorded {
        recorded.check_student(job.student_hash(teacher)?.as_deref())?;
    }
    let trajectory = match recorded {
        Some(trajectory) if trajectory.is_complete() => trajectory,
        _ if stages == Stages::Backtrack => {
            return Err(Error::usage(format!("{} holds no complete trajectory", job.run.path().display()))
                .hint("run `disback degrade` first, or give one with --trajectory"));
        }
        _ => {
            let from = checkpoint.take_if(|c| c.state.stage == StageKind::Degrade);
            match degrade::degrade(&mut job, teacher, from)? {
                Some(trajectory) => trajectory,
                None => return Ok(Outcome::Stopped(StageKind::Degrade)),
            }
        }
    };
    if stages == Stages::Degrade {
        return Ok(Outcome::Recorded(trajectory));
    }
    let from = checkpoint.filter(|c| c.state.stage == StageKind::Backtrack);
    match backtrack::backtrack(&mut job, teacher, &trajectory, from)? {
        Some(student) => {
            if world.leads() {
                student.weights()?.save(&job.run.student_weights())?;
            }
            Ok(Outcome::Finished(student))
        }
        None => Ok(Outcome::Stopped(StageKind::Backtrack)),
    }
}
