//! Who watches a run, and what the loop tells them: sample grids, event files, a person's interface.

use crate::diffusion::Denoiser;
use crate::distill::checkpoint::StageKind;
use crate::distill::debug_batch::DebugBatch;
use crate::distill::metrics::MetricsRow;
use crate::distill::student::Student;
use crate::error::Result;

/// Is told what happens in a run, to write sample grids and event files or to show progress. Every method does nothing
/// by default.
///
/// Errors of its methods end the run.
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
    fn metrics(&mut self, _row: &MetricsRow) -> Result<()> {
        Ok(())
    }
    /// Stage 1 recorded a node (0: the teacher itself, before the first step).
    fn node_recorded(&mut self, _node: usize, _denoiser: &Denoiser) -> Result<()> {
        Ok(())
    }
    /// Trajectory node `node` is the target of stage 2 from now on (its weights are in `target`).
    fn target_entered(&mut self, _node: usize, _target: &Denoiser) -> Result<()> {
        Ok(())
    }
    /// The tensors of one batch of stage 2, to be shown: of the first update towards a target, and of the last update of all.
    fn debug_batch(&mut self, _node: usize, _updates: u64, _batch: &DebugBatch) -> Result<()> {
        Ok(())
    }
    /// Something is not as it should be, and the run goes on: a sentence.
    fn warning(&mut self, _text: &str) {}
    /// Whether [`Observer::after_step`] will look at the averages of the student after this step, whose networks are not there yet.
    fn looks(&mut self, _step: &Step) -> bool {
        true
    }
    /// Stage 2 leaves a target for the next one; the student has its averaged weights.
    fn target_left(&mut self, _node: usize, _student: &Student) -> Result<()> {
        Ok(())
    }
}

/// Where a stage begins or goes on.
#[derive(Debug, Clone, Copy)]
pub struct Begin {
    /// The stage.
    pub stage: StageKind,
    /// Iterations of the stage that are done; 0 where it begins.
    pub iteration: u64,
    /// Iterations of the whole stage.
    pub total: u64,
    /// Generator updates that are done; 0 in stage 1.
    pub updates: u64,
    /// Index of the trajectory's last node; `None` in a stage 1 that records candidates, of which the nodes are chosen in the end.
    pub last: Option<usize>,
}

/// Where a stage stands after an iteration.
pub struct Step<'a> {
    /// The stage.
    pub stage: StageKind,
    /// Iterations of the stage that are done, this one included.
    pub iteration: u64,
    /// Iterations of the whole stage.
    pub total: u64,
    /// Generator updates that are done; 0 in stage 1.
    pub updates: u64,
    /// Whether this iteration updated the generator.
    pub updated: bool,
    /// Images generated in the stage.
    pub images: u64,
    /// Seconds spent in the stage.
    pub seconds: f64,
    /// Stage 1: nodes recorded so far. Stage 2: index of the node that is the target; 0 is the teacher.
    pub node: usize,
    /// The networks of stage 2; absent in stage 1.
    pub networks: Option<Running<'a>>,
}

/// The networks of stage 2 as they stand.
#[derive(Clone)]
pub struct Running<'a> {
    /// The student that is trained, not averaged.
    pub student: &'a Student,
    /// The average that becomes the student.
    pub average: &'a Student,
    /// Averages with other half-lives, each with its half-life in images.
    pub others: Vec<(f64, &'a Student)>,
    /// The present target: the teacher's network with the weights of a trajectory node.
    pub target: &'a Denoiser,
    /// The fake score; absent where the objective has none.
    pub fake: Option<&'a Denoiser>,
}

/// What an observer asks of the loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wish {
    /// Write a checkpoint now.
    pub checkpoint: bool,
    /// End the stage here, as if all its iterations were done.
    pub end: bool,
    /// Stop the run here, with a checkpoint to go on from.
    pub stop: bool,
}

/// Ignores all events.
#[derive(Debug, Clone, Copy)]
pub struct Unobserved;
impl Observer for Unobserved {}
