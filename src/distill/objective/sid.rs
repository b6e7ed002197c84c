//! Score identity distillation (Zhou et al. 2024): the Fisher divergence, differentiated through both scores.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::distill::objective::{Objective, Terms, distance_to_target};
use crate::error::Result;

/// `objective = "sid"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SidConfig {
    /// Weight of the squared distance between the scores that is taken off the projected one; 1.0 to 1.2 in the paper.
    pub alpha: f64,
}

impl Default for SidConfig {
    fn default() -> Self {
        Self { alpha: 1.2 }
    }
}

/// `L = mean (D_r - D_f) [(D_r - x0) - alpha (D_r - D_f)] / sg mean_chw |x0 - D_r|`.
#[derive(Debug, Clone, Copy)]
pub struct Sid {
    /// How much of `|D_r - D_f|^2`, whose gradient is biased by the fake score's error, is taken off.
    pub alpha: f64,
}

impl Objective for Sid {
    fn name(&self) -> &str {
        "sid"
    }

    fn through_scores(&self) -> bool {
        true
    }

    fn loss(&self, t: &Terms) -> Result<Tensor> {
        let difference = t.target.f_sub(t.fake()?)?;
        let projected = t.target.f_sub(t.x0)?.f_sub(&difference.f_mul_scalar(self.alpha)?)?;
        Ok(difference.f_mul(&projected)?.f_div(&distance_to_target(t)?)?.f_mean(Kind::Float)?)
    }
}
