//! DMD (Yin et al. 2023) and the score part of DMD2 (Yin et al. 2024), whose GAN is [`crate::distill::gan`].

use tch::Tensor;

use crate::distill::objective::{Objective, Terms, distance_to_target, surrogate};
use crate::error::Result;

/// `g = (D_fake - D_target) / mean_chw |x0 - D_target|`.
#[derive(Debug, Clone, Copy)]
pub struct Dmd;

impl Objective for Dmd {
    fn name(&self) -> &str {
        "dmd"
    }

    fn loss(&self, t: &Terms) -> Result<Tensor> {
        let difference = t.fake()?.detach().f_sub(&t.target.detach())?;
        surrogate(t.x0, &difference.f_div(&distance_to_target(t)?)?)
    }
}

/// DMD's gradient; the configuration has a GAN beside it.
#[derive(Debug, Clone, Copy)]
pub struct Dmd2;

impl Objective for Dmd2 {
    fn name(&self) -> &str {
        "dmd2"
    }

    fn needs_discriminator(&self) -> bool {
        true
    }

    fn loss(&self, t: &Terms) -> Result<Tensor> {
        Dmd.loss(t)
    }
}
