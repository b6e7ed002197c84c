//! The one-step generator: the teacher's architecture at one fixed noise level.

use tch::Tensor;

use crate::diffusion::{Conditions, Denoiser, StudentStart};
use crate::distill::config::StudentConfig;
use crate::error::Result;
use crate::torch::ParamSet;

/// `G(z, c) = skip x_net + out F(x_net, time, c)` with `x_net = init_scale z`, `z ~ N(0, I)`.
#[derive(Debug)]
pub struct Student {
    denoiser: Denoiser,
    start: StudentStart,
}

impl Student {
    /// A generator with these weights, which it owns.
    pub fn new(denoiser: Denoiser, config: &StudentConfig) -> Result<Self> {
        let start = start(&denoiser, config)?;
        Ok(Self { denoiser, start })
    }

    /// Images for standard normal `z` `[B, C, H, W]`, f32.
    pub fn generate(&self, z: &Tensor, conditions: &Conditions) -> Result<Tensor> {
        self.denoiser.generate(z, conditions, &self.start)
    }

    pub fn params(&self) -> &ParamSet {
        self.denoiser.params()
    }
    pub fn denoiser(&self) -> &Denoiser {
        &self.denoiser
    }
    /// The noise level and coefficients that export folds into the graph.
    pub fn start(&self) -> &StudentStart {
        &self.start
    }
}

/// Where the student starts under this configuration.
pub fn start(denoiser: &Denoiser, config: &StudentConfig) -> Result<StudentStart> {
    denoiser.conversion().at_start((config.sigma_init > 0.0).then_some(config.sigma_init))
}
