//! f-distill (Xu et al. 2025): DMD with each sample weighted by the density ratio that a discriminator tells.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::distill::objective::{Objective, Terms, distance_to_target, surrogate};
use crate::error::Result;

/// The f-divergences of f-distill and Uni-Instruct by their weight `h(r) = r^2 f''(r)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Divergence {
    /// `h = 1`: all samples weigh alike.
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

impl Divergence {
    /// `h(r)` of `log r`.
    pub fn weight(self, log_ratio: &Tensor) -> Result<Tensor> {
        Ok(self.weight_and_slope(log_ratio)?.0)
    }

    /// `h(r)` and `r h'(r)` of `log r`: the weight and its derivative with respect to `log r`.
    pub fn weight_and_slope(self, log_ratio: &Tensor) -> Result<(Tensor, Tensor)> {
        let l = log_ratio.f_clamp(-LARGEST_LOGIT, LARGEST_LOGIT)?;
        Ok(match self {
            Self::ReverseKl => (l.f_ones_like()?, l.f_zeros_like()?),
            Self::ForwardKl => {
                let r = l.f_exp()?;
                (r.shallow_clone(), r)
            }
            // r / (1 + r), whose slope is r / (1 + r)^2.
            Self::JensenShannon => {
                let h = l.f_sigmoid()?;
                let slope = h.f_mul(&l.f_neg()?.f_sigmoid()?)?;
                (h, slope)
            }
            // sqrt r; a constant factor is lost in h / mean h.
            Self::SquaredHellinger => {
                let h = l.f_mul_scalar(0.5)?.f_exp()?;
                let slope = h.f_mul_scalar(0.5)?;
                (h, slope)
            }
            Self::Jeffreys => {
                let r = l.f_exp()?;
                (r.f_add_scalar(1.0)?, r)
            }
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
            let h = self.divergence.weight(&l.detach())?;
            g = g.f_mul(&h.f_div(&h.f_mean(Kind::Float)?)?)?;
        }
        surrogate(t.x0, &g)
    }
}
