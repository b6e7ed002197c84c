//! The objectives and what they have to be told.

use serde::{Deserialize, Serialize};

/// The score-distillation objective of the generator (method: section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ObjectiveKind {
    /// `g = D_fake - D_target`: the KL gradient, weighted by sigma^2 in score units. Also known as VSD.
    #[serde(alias = "vsd")]
    DiffInstruct,
    /// The same over `mean |x - D_target|` of each sample.
    Dmd,
    /// Score distillation sampling: `w (eps_target - e)`, without a fake score.
    Sds,
    /// Score identity distillation: the Fisher divergence, differentiated through both scores.
    Sid,
    /// Score implicit matching with the pseudo-Huber distance, differentiated through the fake score.
    Sim,
}

/// `objective = "sid"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SidConfig {
    /// Weight of the squared distance between the scores that is taken off the projected one; 1.0 to 1.2 in the paper.
    pub alpha: f64,
}

/// `objective = "sim"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SimConfig {
    /// Softening of the pseudo-Huber distance `sqrt(|y|^2 + c^2) - c` between scores.
    pub c: f64,
}

impl Default for SidConfig {
    fn default() -> Self {
        Self { alpha: 1.2 }
    }
}
impl Default for SimConfig {
    fn default() -> Self {
        Self { c: 0.01 }
    }
}
