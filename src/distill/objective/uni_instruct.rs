//! Uni-Instruct (Wang et al. 2025): f-divergences expanded along the diffusion, as one loss on both scores.
//!
//! Along the diffusion `x_t = x0 + sigma e`, Theorem 3.1 writes an f-divergence of data `q` from the generator `p` as
//! `D_f = integral sigma E_p[h(r) |u|^2] d sigma`, with `r = q / p`, `h(r) = r^2 f''(r)` and `u = s_p - s_q` at every noise level. The
//! gradient of one level's term needs the derivative of `p` itself, which nobody has. As in score implicit matching, the functional
//! derivative of `E_p[h |u|^2]` and the identity `E_p[v . (s_p - grad log p(x_t | x0))] = E_p[v . s_p + div v]` for a fixed field `v`
//! give a loss with the same gradient, in which both scores and `r` are fixed functions of `x_t`:
//!
//! `E[(h - r h') |u|^2 - 2 h u . (s_p - grad log p(x_t | x0))]`.
//!
//! In denoised samples (`s = (D - x_t) / sigma^2`) and times `sigma^4 / 2` that is
//! `E[h (D_q - D_p) . (D_q - x0) - (h / 2 + r h' / 2) |D_q - D_p|^2]`: with `h = 1` (reverse KL) SiD's loss with `alpha = 1/2`.
//! The gradient of `log r` with respect to `x_t` is `-u`, so of a discriminator only the value is needed.
//!
//! The terms with `h'` and with the gradient of `log r` hold for the ratio itself. A discriminator that lags tells another one, and then they
//! drive the generator away: on the digits example the distance rose above that of noise (docs/settings.md). With `h` as a fixed weight of each
//! sample, `E[h (D_q - D_p) . (D_q - x0) - alpha h |D_q - D_p|^2]`, what is minimised is the score difference weighted by `h`, whose least value is
//! still reached by `p = q` alone.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::distill::objective::{Divergence, Objective, Terms, distance_to_target};
use crate::error::Result;

/// `objective = "uni-instruct"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct UniInstructConfig {
    /// The f-divergence that is expanded. `reverse-kl` needs no data; the others need `gan.data` for the density ratio.
    pub divergence: Divergence,
    /// Weight of `h |D_r - D_f|^2`, as in SiD. 0.5 is the gradient of the divergence itself; more takes off what a fake score that
    /// lags behind adds to it.
    pub alpha: f64,
    /// Whether the gradient has the terms that follow from the ratio's own dependence on the generator, which it has in the paper. They
    /// need a discriminator that tells the ratio well at every noise level; otherwise the ratio is a fixed weight of each sample.
    pub ratio_gradient: bool,
}

impl Default for UniInstructConfig {
    fn default() -> Self {
        Self { divergence: Divergence::JensenShannon, alpha: 1.2, ratio_gradient: false }
    }
}

/// `L = mean (h d . (D_r - x0) - alpha h d . d) / sg mean |x0 - D_r|` with `d = D_r - D_f`, and `h / mean h` for `h`; with
/// `ratio_gradient` also `- r h' / 2 d . d`, and `h` follows `x_t`.
#[derive(Debug, Clone, Copy)]
pub struct UniInstruct {
    /// The f-divergence whose weight `h` is used.
    pub divergence: Divergence,
    /// Weight of the squared difference of the scores.
    pub alpha: f64,
    /// Whether the ratio follows the generator.
    pub ratio_gradient: bool,
}

impl Objective for UniInstruct {
    fn name(&self) -> &str {
        "uni-instruct"
    }

    fn through_scores(&self) -> bool {
        true
    }

    fn needs_ratio(&self) -> bool {
        self.divergence != Divergence::ReverseKl
    }

    fn loss(&self, t: &Terms) -> Result<Tensor> {
        let difference = t.target.f_sub(t.fake()?)?;
        let projected = t.target.f_sub(t.x0)?;
        let scale = distance_to_target(t)?;
        // While the target is a node of the trajectory, the ratio of data to generator says nothing: the reverse KL.
        let Some(l) = t.log_ratio else {
            let projected = projected.f_sub(&difference.f_mul_scalar(self.alpha)?)?;
            return Ok(difference.f_mul(&projected)?.f_div(&scale)?.f_mean(Kind::Float)?);
        };
        let ratio = if self.ratio_gradient { followed(l, &difference, t)? } else { l.detach() };
        let (h, slope) = self.divergence.weight_and_slope(&ratio)?;
        let mean = h.detach().f_mean(Kind::Float)?;
        let mut squared = h.f_mul_scalar(self.alpha)?;
        if self.ratio_gradient {
            squared = squared.f_add(&slope.f_mul_scalar(0.5)?)?;
        }
        let loss = h.f_mul(&projected)?.f_sub(&squared.f_mul(&difference)?)?.f_mul(&difference)?;
        Ok(loss.f_div(&scale)?.f_div(&mean)?.f_mean(Kind::Float)?)
    }
}

/// The value of `log r` with the gradient that it has with respect to `x_t`, `s_r - s_f = (D_r - D_f) / sigma^2`.
fn followed(log_ratio: &Tensor, difference: &Tensor, t: &Terms) -> Result<Tensor> {
    let gradient = difference.detach().f_div(&t.sigma.f_square()?)?;
    let dims: Vec<i64> = (1..t.x_t.dim() as i64).collect();
    let moved = t.x_t.f_sub(&t.x_t.detach())?;
    Ok(log_ratio.detach().f_add(&moved.f_mul(&gradient)?.f_sum_dim_intlist(dims.as_slice(), true, Kind::Float)?)?)
}
