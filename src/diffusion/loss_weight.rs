//! Weights of the denoising loss.

use tch::{Device, Tensor};

use super::card::Prediction;
use super::denoiser::Denoiser;
use crate::error::Result;
use crate::torch::convert::column;

/// Weight of the denoising loss in x0 space that makes it the teacher's own: the error of the network's output F, since
/// `x0 = skip x_net + out F`, weighs `1/out^2` (epsilon-, v-, flow-matching loss, and for EDM
/// `lambda = (s^2 + sd^2) / (s sd)^2`, which is also the weight for networks that give x0 itself).
pub fn loss_weight(denoiser: &Denoiser, sigma: f64) -> Result<f64> {
    let card = denoiser.card();
    // (A consistency model's output weighs nothing at sigma_min, where its conversion would weigh without bounds.)
    if matches!(card.prediction, Prediction::Denoised | Prediction::Consistency) {
        let sd = card.sigma_data;
        return Ok((sigma * sigma + sd * sd) / (sigma * sd).powi(2));
    }
    Ok(1.0 / denoiser.conversion().at(sigma)?.out.powi(2))
}

/// Loss weights of a batch as a column.
pub fn weights(denoiser: &Denoiser, sigmas: &[f64], device: Device) -> Result<Tensor> {
    column(
        &sigmas.iter().map(|&s| loss_weight(denoiser, s)).collect::<Result<Vec<_>>>()?,
        denoiser.card().rank(),
        device,
    )
}
