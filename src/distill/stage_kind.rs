//! The two stages by name.

use serde::{Deserialize, Serialize};

/// One of the method's two stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StageKind {
    /// Stage 1: the teacher's copy is trained on the initial student's samples, and nodes are recorded.
    Degrade,
    /// Stage 2: the student is trained with the nodes as targets, from the last to the teacher.
    Backtrack,
}

impl StageKind {
    /// The stage's name in files and messages: `degrade` or `backtrack`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Degrade => "degrade",
            Self::Backtrack => "backtrack",
        }
    }
}
