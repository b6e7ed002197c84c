//! What a piece of a training step computes with beside the weights, all of it on the device: noise, conditions, and what the
//! host has made of the noise levels. A step that has it computes without the host (see [`crate::torch::train::cuda_graph`]).

use tch::{Device, Kind, Tensor};

use crate::diffusion::loss_weight::weights;
use crate::diffusion::{Conditions, Denoiser, Form, PreparedLevels};
use crate::error::{Error, Result};
use crate::torch::convert::column;
use crate::torch::train::cuda_graph::Feed;

/// Noise levels of a batch, ready for one denoiser, and the noise.
#[derive(Debug)]
pub struct Noised {
    /// `e ~ N(0, I)`, f32 `[B, ...shape]`.
    pub noise: Tensor,
    /// Noise level of each sample, f32 `[B, 1, ...]`.
    pub sigma: Tensor,
    /// Weight of each sample in the denoising loss, f32 `[B, 1, ...]`.
    pub weights: Tensor,
    /// The denoiser's coefficients and times at the noise levels.
    pub prepared: PreparedLevels,
}

impl Noised {
    /// Prepares noise levels `sigmas`, one a sample, and `noise` `[B, ...shape]` for an evaluation of `denoiser`.
    pub fn new(denoiser: &Denoiser, sigmas: &[f64], noise: &Tensor, form: Form) -> Result<Self> {
        let device: Device = noise.device();
        Ok(Self {
            noise: noise.shallow_clone(),
            sigma: column(sigmas, denoiser.card().rank(), device)?,
            weights: weights(denoiser, sigmas, device)?,
            prepared: denoiser.prepare(sigmas, form, device)?,
        })
    }

    /// `x0 + sigma e`.
    pub fn add_to(&self, x0: &Tensor) -> Result<Tensor> {
        Ok(x0.f_add(&self.noise.f_mul(&self.sigma)?)?)
    }

    /// How far the student's samples `x0` are from what the target describes, of the denoised samples of target and fake score (all f32
    /// `[B, ...shape]`): the mismatch, the mean weighted excess of the target's squared error over the fake score's, and the gap, that of the
    /// square of their difference. Of both [`crate::distill::plan`] tells how far the fake score has come. Without a fake score both
    /// are the target's error.
    pub fn mismatch(&self, x0: &Tensor, target: &Tensor, fake: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        let mean = |squares: Tensor| -> Result<Tensor> { Ok(squares.f_mul(&self.weights)?.f_mean(Kind::Float)?) };
        let of_target = target.f_sub(x0)?.f_square()?;
        let Some(fake) = fake else {
            let error = mean(of_target)?;
            return Ok((error.shallow_clone(), error));
        };
        let excess = of_target.f_sub(&fake.f_sub(x0)?.f_square()?)?;
        Ok((mean(excess)?, mean(target.f_sub(fake)?.f_square()?)?))
    }

    /// `mean weight(sigma) (D(x0 + sigma e; sigma) - x0)^2`, rank 0.
    pub fn loss(&self, denoiser: &Denoiser, x0: &Tensor, conditions: &Conditions) -> Result<Tensor> {
        let x_t = self.add_to(x0)?;
        let (denoised, _) = denoiser.denoise_prepared(&x_t, &self.prepared, conditions, &[])?;
        Ok(denoised.f_sub(x0)?.f_square()?.f_mul(&self.weights)?.f_mean(Kind::Float)?)
    }
}

/// Denoising score matching on fixed images: `mean weight(sigma) (D(x0 + sigma e; sigma) - x0)^2`.
pub fn denoising_loss(
    denoiser: &Denoiser,
    x0: &Tensor,
    sigmas: &[f64],
    noise: &Tensor,
    conditions: &Conditions,
) -> Result<Tensor> {
    Noised::new(denoiser, sigmas, noise, Form::Short)?.loss(denoiser, x0, conditions)
}

/// What a piece of a step is fed with.
#[derive(Debug)]
pub struct Inputs {
    /// The generator's noise, or its images.
    pub from: Tensor,
    /// Conditions of the samples.
    pub conditions: Conditions,
    /// Noise levels and noise; absent for a piece that only makes images.
    pub noised: Option<Noised>,
    /// The target's evaluation at the levels of `noised`, where it is guided.
    pub guided: Option<PreparedLevels>,
}

impl Inputs {
    /// Collects the inputs of an evaluation without guidance. The tensors are shared, not copied.
    pub fn new(from: &Tensor, conditions: &Conditions, noised: Option<Noised>) -> Self {
        Self { from: from.shallow_clone(), conditions: conditions.shallow_clone(), noised, guided: None }
    }

    /// The denoising loss on images at the levels of `noised`.
    pub fn loss(&self, denoiser: &Denoiser, x0: &Tensor) -> Result<Tensor> {
        self.noised()?.loss(denoiser, x0, &self.conditions)
    }

    /// The noise levels and noise. Errors: there are none.
    pub fn noised(&self) -> Result<&Noised> {
        self.noised.as_ref().ok_or_else(|| Error::mismatch("a loss without noise levels"))
    }
}

impl Feed for Inputs {
    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self {
            from: f(&self.from)?,
            conditions: self.conditions.map(self.conditions.len(), &mut *f)?,
            noised: match &self.noised {
                None => None,
                Some(n) => Some(Noised {
                    noise: f(&n.noise)?,
                    sigma: f(&n.sigma)?,
                    weights: f(&n.weights)?,
                    prepared: n.prepared.map(f)?,
                }),
            },
            guided: self.guided.as_ref().map(|p| p.map(f)).transpose()?,
        })
    }

    fn form(&self, out: &mut Vec<f64>) {
        for prepared in [self.noised.as_ref().map(|n| &n.prepared), self.guided.as_ref()].into_iter().flatten() {
            prepared.form(out);
        }
    }
}
