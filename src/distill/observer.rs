//! Who watches a run, and what the loop tells them: sample grids, event files, a person's interface.

use crate::diffusion::Denoiser;
use crate::distill::checkpoint::StageKind;
use crate::distill::debug_batch::DebugBatch;
use crate::distill::metrics::Row;
use crate::distill::student::Student;
use crate::error::Result;

/// Learns of a run's landmarks: sample grids, event files, a person's interface.
pub trait Observer {
    /// A stage begins, or goes on from a checkpoint. True: an earlier process had already brought it to its end.
    fn stage_begins(&mut self, _begin: &Begin) -> Result<bool> {
        Ok(false)
    }
    /// An iteration is done.
    fn after_step(&mut self, _step: &Step) -> Result<Wish> {
        Ok(Wish::default())
    }
    /// A row of metrics was written.
    fn metrics(&mut self, _row: &Row) -> Result<()> {
        Ok(())
    }
    /// Stage 1 recorded a node (0: the teacher itself, before the first step).
    fn node_recorded(&mut self, _node: usize, _denoiser: &Denoiser) -> Result<()> {
        Ok(())
    }
    /// Stage 2 is drawn to a target from now on (its weights are in `target`).
    fn target_entered(&mut self, _node: usize, _target: &Denoiser) -> Result<()> {
        Ok(())
    }
    /// The tensors of one batch of stage 2, to be shown: of the first update towards a target, and of the last update of all.
    fn debug_batch(&mut self, _node: usize, _updates: u64, _batch: &DebugBatch) -> Result<()> {
        Ok(())
    }
    /// Stage 2 leaves a target for the next one; the student has its averaged weights.
    fn target_left(&mut self, _node: usize, _student: &Student) -> Result<()> {
        Ok(())
    }
}

/// Where a stage begins or goes on.
#[derive(Debug, Clone, Copy)]
pub struct Begin {
    pub stage: StageKind,
    pub iteration: u64,
    /// Iterations of the whole stage.
    pub total: u64,
    pub updates: u64,
    /// Last node of the trajectory.
    pub last: usize,
}

/// Where a stage stands after an iteration.
pub struct Step<'a> {
    pub stage: StageKind,
    pub iteration: u64,
    pub total: u64,
    /// Generator updates done, and whether this iteration was one.
    pub updates: u64,
    pub updated: bool,
    /// Images generated in the stage.
    pub images: u64,
    /// Seconds spent in the stage.
    pub seconds: f64,
    pub node: usize,
    /// Stage 2's networks.
    pub networks: Option<Running<'a>>,
}

/// The networks of stage 2 as they stand.
#[derive(Clone)]
pub struct Running<'a> {
    pub student: &'a Student,
    /// The average that becomes the student.
    pub average: &'a Student,
    /// Averages of other half-lives, in images.
    pub others: Vec<(f64, &'a Student)>,
    pub target: &'a Denoiser,
    pub fake: Option<&'a Denoiser>,
}

/// What an observer asks of the loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wish {
    /// A checkpoint now.
    pub checkpoint: bool,
    /// The stage ends here, as if all its iterations were done.
    pub end: bool,
}

/// Ignores all events.
#[derive(Debug, Clone, Copy)]
pub struct Unobserved;
impl Observer for Unobserved {}
