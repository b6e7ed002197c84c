//! DMD (Yin et al. 2023; DMD2 without its GAN).

use tch::Tensor;

use crate::distill::objective::{Objective, Terms, distance_to_target, surrogate};
use crate::error::Result;

/// `g = (D_fake - D_target) / mean_chw |x0 - D_target|`.
#[derive(Debug, Clone, Copy)]
pub struct Dmd;

impl Objective for Dmd {
    fn name(&self) -> &'static str {
        "dmd"
    }

    fn loss(&self, t: &Terms) -> Result<Tensor> {
        let difference = t.fake()?.detach().f_sub(&t.target.detach())?;
        surrogate(t.x0, &difference.f_div(&distance_to_target(t)?)?)
    }
}
