//! f-distill (Xu et al. 2025): DMD with each sample weighted by the density ratio that a discriminator tells.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::distill::objective::{Objective, Terms, distance_to_target, surrogate};
use crate::error::Result;

/// The f-divergences of f-distill by their weight `h(r) = r^2 f''(r)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Divergence {
    /// `h = 1`: DMD2.
    ReverseKl,
    /// `h = r`.
    ForwardKl,
    /// `h = r / (1 + r)`.
    JensenShannon,
    /// `h = sqrt r`.
    SquaredHellinger,
    /// `h = 1 + r`.
    Jeffreys,
}

/// `objective = "f-distill"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FDistillConfig {
    /// The f-divergence that weights the samples.
    pub divergence: Divergence,
}

impl Default for FDistillConfig {
    fn default() -> Self {
        Self { divergence: Divergence::JensenShannon }
    }
}

/// DMD's gradient times `h(r) / mean h(r)`, `h(r) = r^2 f''(r)` of the f-divergence and `r = p_data / p_generator`.
#[derive(Debug, Clone, Copy)]
pub struct FDistill {
    /// The f-divergence whose weight `h` is used.
    pub divergence: Divergence,
}

/// Log ratios beyond this say no more than this.
const LARGEST_LOGIT: f64 = 10.0;

impl FDistill {
    /// `h(r)` of `log r`.
    pub fn weight(&self, log_ratio: &Tensor) -> Result<Tensor> {
        let l = log_ratio.f_clamp(-LARGEST_LOGIT, LARGEST_LOGIT)?;
        Ok(match self.divergence {
            Divergence::ReverseKl => l.f_ones_like()?,
            Divergence::ForwardKl => l.f_exp()?,
            // r / (1 + r)
            Divergence::JensenShannon => l.f_sigmoid()?,
            // sqrt r; a constant factor is lost in h / mean h.
            Divergence::SquaredHellinger => l.f_mul_scalar(0.5)?.f_exp()?,
            Divergence::Jeffreys => l.f_exp()?.f_add_scalar(1.0)?,
        })
    }
}

impl Objective for FDistill {
    fn name(&self) -> &str {
        "f-distill"
    }

    fn needs_ratio(&self) -> bool {
        true
    }

    fn loss(&self, t: &Terms) -> Result<Tensor> {
        let mut g = t.fake()?.detach().f_sub(&t.target.detach())?.f_div(&distance_to_target(t)?)?;
        // The ratio is that of data to generator: while the target is a node of the trajectory it says nothing.
        if let Some(l) = t.log_ratio {
            let h = self.weight(&l.detach())?;
            g = g.f_mul(&h.f_div(&h.f_mean(Kind::Float)?)?)?;
        }
        surrogate(t.x0, &g)
    }
}
