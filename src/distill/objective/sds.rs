//! Score distillation sampling (Poole et al. 2022, DreamFusion).

use tch::Tensor;

use crate::distill::objective::{Objective, Terms, surrogate};
use crate::error::Result;

/// `g = w (eps_target - e)` with `w = sigma`, so that it is in the images' scale: `x0 - D_target`, since
/// `eps_target = (x_t - D_target) / sigma`. It is Diff-Instruct with every sample its own fake distribution, which is why
/// it seeks modes.
#[derive(Debug, Clone, Copy)]
pub struct Sds;

impl Objective for Sds {
    fn name(&self) -> &str {
        "sds"
    }

    fn needs_fake(&self) -> bool {
        false
    }

    fn loss(&self, t: &Terms) -> Result<Tensor> {
        let eps = t.x_t.detach().f_sub(&t.target.detach())?.f_div(t.sigma)?;
        surrogate(t.x0, &eps.f_sub(t.noise)?.f_mul(t.sigma)?)
    }
}
