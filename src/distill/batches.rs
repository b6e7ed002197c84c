//! The data of a step: random draws of one micro-batch, conditions and noise levels.

use std::path::Path;

use tch::{Device, Tensor};

use crate::diffusion::{ConditionSource, Conditions, Denoiser, Form, TeacherCard};
use crate::distill::config::{Config, Distribution, FakeDistribution};
use crate::distill::draws::{Draws, Levels, Phase, Purpose};
use crate::distill::inputs::Noised;
use crate::distill::student::Student;
use crate::error::Result;

/// Batches and losses for one teacher card and configuration.
#[derive(Debug)]
pub struct Batches {
    /// Images a micro-batch.
    pub batch: usize,
    /// Device on which tensors are made: the teacher's.
    pub device: Device,
    seed: u64,
    /// Of a micro-batch of samples.
    size: Vec<i64>,
    conditions: ConditionSource,
    /// Noise levels at which target and fake score are compared in stage 2.
    pub generator_levels: Levels,
    /// Noise levels of the fake score's training in stage 2.
    pub fake_levels: Levels,
    /// Noise levels of the degrading copy's training in stage 1.
    pub degrade_levels: Levels,
}

impl Batches {
    /// Reads the noise levels and the source of conditions from the configuration.
    ///
    /// Errors: conditions that do not fit the teacher's card.
    pub fn new(config: &Config, teacher: &Denoiser) -> Result<Self> {
        let card = teacher.card();
        let (table, discrete) = table(config, card)?;
        let noise = &config.noise;
        let levels = |distribution, range| Levels::new(noise, distribution, range, &table, discrete);
        let fake = match noise.fake_distribution {
            FakeDistribution::Same => noise.distribution,
            FakeDistribution::Table => Distribution::Table,
            FakeDistribution::Lognormal => Distribution::Lognormal,
        };
        Ok(Self {
            batch: config.batch,
            device: teacher.params().tensors().first().map_or(Device::Cpu, Tensor::device),
            seed: config.seed,
            size: card.size_of(config.batch),
            conditions: conditions(config, card)?,
            generator_levels: levels(noise.distribution, noise.generator),
            fake_levels: levels(fake, noise.fake),
            degrade_levels: levels(noise.distribution, noise.fake),
        })
    }

    /// Noise levels and noise of a loss of `denoiser`; `form` as the step is to have it.
    pub fn noised(
        &self,
        draws: &Draws,
        levels: &Levels,
        uses: [Purpose; 2],
        denoiser: &Denoiser,
        form: Form,
    ) -> Result<Noised> {
        let [sigma, noise] = uses;
        Noised::new(denoiser, &draws.sigmas(sigma, levels, self.batch), &self.noise(draws, noise)?, form)
    }

    /// Draws of one micro-batch.
    pub fn draws(&self, phase: Phase, iteration: u64, micro: usize) -> Draws {
        Draws::new(self.seed, phase, iteration, micro)
    }

    /// Standard normal samples.
    pub fn noise(&self, draws: &Draws, what: Purpose) -> Result<Tensor> {
        draws.noise(what, &self.size, self.device)
    }

    /// Standard normal noise for a batch of a student's images.
    pub fn latent(&self, draws: &Draws, student: &Student) -> Result<Tensor> {
        draws.noise(Purpose::Latent, &student.noise_size(self.batch as i64), self.device)
    }

    /// Random conditions of a batch.
    pub fn conditions(&self, draws: &Draws, denoiser: &Denoiser) -> Result<Conditions> {
        Conditions::from_host(&draws.conditions(&self.conditions, denoiser.card(), self.batch)?, self.device)
    }
}

/// The table of noise levels that training draws from, rising, and whether the network knows no others.
///
/// Errors: `noise.shift` for a schedule that is no flow.
pub fn table(config: &Config, card: &TeacherCard) -> Result<(Vec<f64>, bool)> {
    let schedule = card.schedule()?.with_shift(config.noise.shift, "noise.shift")?;
    Ok((schedule.training_sigmas(config.noise.levels), schedule.steps().is_some()))
}

/// Where the configured conditions come from, checked against the card.
pub fn conditions(config: &Config, card: &TeacherCard) -> Result<ConditionSource> {
    let file = Some(Path::new(&config.conditions.file)).filter(|p| !p.as_os_str().is_empty());
    ConditionSource::new(card, file, &config.conditions.weights)
}
