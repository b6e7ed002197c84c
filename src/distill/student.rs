//! The generator: the teacher's architecture at one fixed noise level, or at a few of them in turn.

use tch::Tensor;

use crate::diffusion::{Conditions, Conversion, Denoiser, StudentStart};
use crate::distill::config::StudentConfig;
use crate::distill::draws::{Draws, Use};
use crate::error::{Error, Result};
use crate::torch::{ParamSet, shim};

/// `G(z, c) = skip x_net + out F(x_net, time, c)` with `x_net = init_scale z`, `z ~ N(0, I)`; with more than one step its
/// image is noised again to the next level and denoised there, and so on.
#[derive(Debug)]
pub struct Student {
    denoiser: Denoiser,
    start: StudentStart,
    /// Noise levels of the steps after the first, falling.
    levels: Vec<f64>,
    /// Fresh noise before each further step, instead of the noise that was found.
    stochastic: bool,
}

/// Seed of the noise of further steps where an image is looked at rather than trained on.
const STEP_NOISE: u64 = 0x57e9;

impl Student {
    /// A generator with these weights, which it owns.
    ///
    /// Errors: noise levels that do not fall from the first step's to above 0.
    pub fn new(denoiser: Denoiser, config: &StudentConfig) -> Result<Self> {
        let start = start(&denoiser, config)?;
        let levels = levels(denoiser.conversion(), config)?;
        Ok(Self { denoiser, start, levels, stochastic: config.stochastic })
    }

    /// Images for standard normal `z` `[B, C, H, W]`, f32, by all steps. The noise of further steps depends on the step and
    /// the batch's shape alone.
    pub fn generate(&self, z: &Tensor, conditions: &Conditions) -> Result<Tensor> {
        let noise = |step: usize| shim::randn(STEP_NOISE + step as u64, &z.size(), z.device());
        self.unroll(z, conditions, self.levels.len(), &noise)
    }

    /// Images to train on: those of a step that is drawn at random, the steps before it simulated without a gradient
    /// (DMD2's backward simulation).
    pub fn training_images(&self, draws: &Draws, z: &Tensor, conditions: &Conditions) -> Result<Tensor> {
        let step = draws.below(Use::Step, self.levels.len() + 1);
        let noise = |step: usize| draws.step_noise(step, &z.size(), z.device());
        self.unroll(z, conditions, step, &noise)
    }

    /// The image after `last` further steps; only the last evaluation has a graph.
    fn unroll(
        &self,
        z: &Tensor,
        conditions: &Conditions,
        last: usize,
        noise: &dyn Fn(usize) -> Result<Tensor>,
    ) -> Result<Tensor> {
        if last == 0 {
            return self.denoiser.generate(z, conditions, &self.start);
        }
        let rows = conditions.len() as usize;
        let (x_edm, sigma) = tch::no_grad(|| -> Result<(Tensor, f64)> {
            let mut x0 = self.denoiser.generate(z, conditions, &self.start)?;
            // The noise in the starting point: at an infinite level it is z itself.
            let StudentStart { init_scale, sigma: first, coefficients } = self.start;
            let mut found = match first.is_finite() {
                true => z.f_mul_scalar(init_scale / coefficients.c_in)?.f_sub(&x0)?.f_div_scalar(first)?,
                false => z.shallow_clone(),
            };
            let mut made = None;
            for (k, &sigma) in self.levels[..last].iter().enumerate() {
                let e = if self.stochastic { noise(k + 1)? } else { found.shallow_clone() };
                let x_edm = x0.f_add(&e.f_mul_scalar(sigma)?)?;
                if k + 1 < last {
                    x0 = self.denoiser.denoise(&x_edm, &vec![sigma; rows], conditions)?;
                    found = x_edm.f_sub(&x0)?.f_div_scalar(sigma)?;
                }
                made = Some((x_edm, sigma));
            }
            made.ok_or_else(|| Error::mismatch("a student without further steps"))
        })?;
        self.denoiser.denoise(&x_edm, &vec![sigma; rows], conditions)
    }

    /// Noise levels of the steps after the first, falling; empty for a one-step student.
    pub fn levels(&self) -> &[f64] {
        &self.levels
    }
    pub fn is_stochastic(&self) -> bool {
        self.stochastic
    }

    pub fn params(&self) -> &ParamSet {
        self.denoiser.params()
    }
    /// The weights of the whole network, detached: what is saved and exported. With low-rank adaptation the factors are
    /// merged into the teacher's weights.
    pub fn weights(&self) -> Result<ParamSet> {
        match self.denoiser.network().merged()? {
            Some(merged) => Ok(merged),
            None => {
                let tensors = self.params().tensors().iter().map(Tensor::detach).collect();
                ParamSet::new(self.params().names().to_vec(), tensors)
            }
        }
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

/// The noise levels of the steps after the first.
pub fn levels(conversion: &Conversion, config: &StudentConfig) -> Result<Vec<f64>> {
    let first = conversion.at_start((config.sigma_init > 0.0).then_some(config.sigma_init))?.sigma;
    let schedule = conversion.schedule();
    let bad = |what: String| {
        Err(Error::usage(format!("student.sigmas is {:?}: {what}", config.sigmas))
            .hint("it lists the noise levels of the steps after the first, falling, each above 0"))
    };
    let mut before = first;
    let mut levels = Vec::new();
    for &sigma in &config.sigmas {
        if !(sigma.is_finite() && sigma > 0.0) {
            return bad(format!("{sigma} is no noise level"));
        }
        let level = schedule.snap(sigma);
        if level >= before {
            return bad(match levels.is_empty() {
                true => format!("{sigma} is not below the first step's level, {first}"),
                false => format!("{sigma} does not lie below the level before it (as the schedule knows them)"),
            });
        }
        levels.push(level);
        before = level;
    }
    Ok(levels)
}
