//! DMD (Yin et al. 2023; DMD2 without its GAN).

use tch::Tensor;

use crate::distill::objective::{Objective, Terms, mean_of_each, surrogate};
use crate::error::Result;

/// `g = (D_fake - D_target) / mean_chw |x0 - D_target|`.
#[derive(Debug, Clone, Copy)]
pub struct Dmd;

/// Keeps 0/0 out where a sample equals its denoised self.
const SMALLEST_DISTANCE: f64 = 1e-8;

impl Objective for Dmd {
    fn name(&self) -> &'static str {
        "dmd"
    }

    fn loss(&self, t: &Terms) -> Result<Tensor> {
        let (x0, target) = (t.x0.detach(), t.target.detach());
        let distance = mean_of_each(&x0.f_sub(&target)?.f_abs()?)?.f_clamp_min(SMALLEST_DISTANCE)?;
        surrogate(t.x0, &t.fake.detach().f_sub(&target)?.f_div(&distance)?)
    }
}
