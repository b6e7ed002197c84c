//! The generator's side of stage 2.

use tch::Tensor;

use super::networks::Networks;
use crate::diffusion::{Conditions, Form, Guidance};
use crate::distill::batches::Batches;
use crate::distill::draws::{Draws, Purpose};
use crate::distill::inputs::{Inputs, Noised};
use crate::distill::objective::{Objective, Terms};
use crate::error::Result;

/// One micro-batch of the generator's images and what belongs to them.
pub(super) struct Batch<'a> {
    pub batches: &'a Batches,
    pub draws: &'a Draws,
    /// With the generator's graph.
    pub x0: &'a Tensor,
    pub inputs: &'a Inputs,
}

/// What an update of the generator takes, and its noise levels.
pub(super) fn inputs(
    networks: &Networks,
    batches: &Batches,
    draws: &Draws,
    conditions: &Conditions,
    guidance: Guidance,
    form: Form,
) -> Result<(Inputs, Vec<f64>)> {
    let z = batches.latent(draws, &networks.student)?;
    let sigmas = draws.sigmas(Purpose::GeneratorSigma, &batches.generator_levels, batches.batch);
    let noise = batches.noise(draws, Purpose::GeneratorNoise)?;
    let noised = Noised::new(&networks.target, &sigmas, &noise, form)?;
    // Guidance is the target's alone.
    let guided = match guidance.is_none() {
        true => None,
        false => Some(networks.target.prepare_guided(&sigmas, guidance, form, batches.device)?),
    };
    Ok((Inputs { guided, ..Inputs::new(&z, conditions, Some(noised)) }, sigmas))
}

/// Losses of one micro-batch, all of rank 0.
pub(super) struct Made {
    /// The objective's.
    pub loss: Tensor,
    /// The weighted term against the discriminator.
    pub gan: Option<Tensor>,
    /// The score mismatch to the target: the excess of the target's denoising loss over the fake score's on the student's
    /// samples (the target's alone where an objective has no fake score). Without a graph.
    pub mismatch: Tensor,
    /// Mean weighted square of the difference between target and fake score (the mismatch, where there is no fake score): what of the
    /// mismatch there would be if the fake score followed at once, see [`crate::distill::plan`]. Without a graph.
    pub gap: Tensor,
    /// Noised samples, and x0 by target and fake score, without a graph.
    pub seen: (Tensor, Tensor, Option<Tensor>),
}

/// What the generator descends. The gradient reaches the generator alone: the parameters of fake score and discriminator
/// are held still while they are differentiated through. `last`: the target is the teacher itself.
pub(super) fn loss(networks: &Networks, objective: &dyn Objective, batch: &Batch, last: bool) -> Result<Made> {
    let Batch { batches, draws, x0, inputs } = *batch;
    let (noised, conditions) = (inputs.noised()?, &inputs.conditions);
    let x_t = noised.add_to(x0)?;
    let told = networks.gan.as_ref().filter(|_| objective.needs_ratio() && last);
    let judged = networks.gan.as_ref().filter(|gan| gan.shares_pass());
    let taps = told.or(judged).map_or(&[][..], |g| g.taps());
    type Tapped = (Tensor, Vec<Tensor>);
    let scores = || -> Result<(Tensor, Option<Tapped>)> {
        let guided = inputs.guided.as_ref().unwrap_or(&noised.prepared);
        let (target, _) = networks.target.denoise_prepared(&x_t, guided, conditions, &[])?;
        let fake = networks.fake.as_ref();
        let fake = fake.map(|f| f.network.denoise_prepared(&x_t, &noised.prepared, conditions, taps));
        Ok((target, fake.transpose()?))
    };
    let (target, fake) = if objective.through_scores() { networks.with_frozen(scores)? } else { tch::no_grad(scores)? };
    let log_ratio = match (told, &fake) {
        (Some(gan), Some((_, features))) => Some(tch::no_grad(|| gan.log_ratio(features, x_t.dim()))?),
        _ => None,
    };
    let judged = match (judged, &fake) {
        (Some(gan), Some((_, features))) => Some(networks.with_frozen(|| gan.loss_of(features))?),
        _ => None,
    };
    let fake = fake.map(|(d, _)| d);
    let (mismatch, gap) = tch::no_grad(|| noised.mismatch(x0, &target, fake.as_ref()))?;
    let terms = Terms {
        x0,
        x_t: &x_t,
        noise: &noised.noise,
        sigma: &noised.sigma,
        target: &target,
        fake: fake.as_ref(),
        log_ratio: log_ratio.as_ref(),
    };
    let gan = match (&networks.gan, &networks.fake) {
        _ if judged.is_some() => judged,
        (Some(gan), Some(fake)) => {
            let judge = || gan.generator_loss(&fake.network, batches, draws, x0, conditions);
            Some(networks.with_frozen(judge)?)
        }
        _ => None,
    };
    let loss = objective.loss(&terms)?;
    let seen = (x_t.detach(), target.detach(), fake.as_ref().map(Tensor::detach));
    Ok(Made { loss, gan, mismatch, gap, seen })
}
