//! Whoever follows a run while it goes on: a terminal view, a log, another program.

use std::path::Path;

use crate::distill::metrics::MetricsRow;
use crate::distill::observer::Begin;
use crate::distill::progress::tell;

/// Learns how a run goes, and may ask something of it. Called from the training thread: a slow method slows the run.
pub trait Monitor: Send + Sync {
    /// A stage begins, or goes on from a checkpoint.
    fn stage_begins(&self, _run: &Path, _begin: &Begin) {}
    /// So many iterations of the stage are done.
    fn iteration(&self, _iteration: u64) {}
    /// A row of metrics was written. `device_bytes`: the most that the device has held in memory, where there is one.
    fn row(&self, _row: &MetricsRow, _device_bytes: Option<u64>) {}
    /// The student's samples were measured; lower is better.
    fn measured(&self, _distance: f64) {}
    /// Something worth a line happened: a node was recorded, samples were written.
    fn note(&self, _text: &str) {}
    /// What a person should know, but can do without.
    fn remark(&self, text: &str) {
        tell(text);
    }
    /// Something is not as it should be, and the run goes on.
    fn warning(&self, text: &str) {
        tell(&format!("warning: {text}"));
    }
    /// Whether a checkpoint was asked for since the last call.
    fn wants_checkpoint(&self) -> bool {
        false
    }
    /// Whether samples were asked for since the last call.
    fn wants_samples(&self) -> bool {
        false
    }
    /// Returns when the run may go on.
    fn wait_while_paused(&self) {}
}

/// Prints warnings and, unless it is quiet, remarks to standard error.
#[derive(Debug, Clone, Copy, Default)]
pub struct Console {
    /// Whether remarks are left out.
    pub quiet: bool,
}

impl Monitor for Console {
    fn remark(&self, text: &str) {
        if !self.quiet {
            tell(text);
        }
    }
}
