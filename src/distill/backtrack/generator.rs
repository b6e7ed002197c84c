//! The generator's side of stage 2.

use tch::{Kind, Tensor};

use super::Networks;
use crate::diffusion::{Conditions, Guidance};
use crate::distill::draws::{Draws, Use};
use crate::distill::objective::{Objective, Terms};
use crate::distill::trainer::{Batches, column, weights};
use crate::error::Result;

/// The generator's loss on its images `x0`, and the score mismatch to the target (both rank 0): the excess of the
/// target's denoising loss over the fake score's on the student's samples (the target's alone where an objective has no
/// fake score).
///
/// The gradient reaches the generator alone: the fake score's parameters are held still while it is differentiated
/// through.
pub(super) fn generator_loss(
    nets: &Networks,
    objective: &dyn Objective,
    batches: &Batches,
    draws: &Draws,
    x0: &Tensor,
    conditions: &Conditions,
    guidance: Guidance,
) -> Result<(Tensor, Tensor)> {
    let sigmas = draws.sigmas(Use::GeneratorSigma, &batches.generator_levels, batches.batch);
    let sigma = column(&sigmas, batches.device)?;
    let noise = batches.noise(draws, Use::GeneratorNoise)?;
    let x_t = x0.f_add(&noise.f_mul(&sigma)?)?;
    let scores = || -> Result<(Tensor, Option<Tensor>)> {
        // Guidance is the target's alone.
        let target = nets.target.guided(&x_t, &sigmas, conditions, guidance)?;
        let fake = nets.fake.as_ref().map(|fake| fake.denoise(&x_t, &sigmas, conditions)).transpose()?;
        Ok((target, fake))
    };
    let (target, fake) = match (objective.through_scores(), &nets.fake) {
        (false, _) => tch::no_grad(scores)?,
        (true, None) => scores()?,
        (true, Some(network)) => {
            network.params().set_requires_grad(false)?;
            let both = scores();
            network.params().set_requires_grad(true)?;
            both?
        }
    };
    let mismatch = tch::no_grad(|| -> Result<Tensor> {
        let mut excess = target.f_sub(x0)?.f_square()?;
        if let Some(fake) = &fake {
            excess = excess.f_sub(&fake.f_sub(x0)?.f_square()?)?;
        }
        Ok(excess.f_mul(&weights(&nets.target, &sigmas, batches.device)?)?.f_mean(Kind::Float)?)
    })?;
    let terms = Terms { x0, x_t: &x_t, noise: &noise, sigma: &sigma, target: &target, fake: fake.as_ref() };
    Ok((objective.loss(&terms)?, mismatch))
}
