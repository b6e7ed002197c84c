//! The generator: a network at one fixed noise level, or at a few of them in turn (by default a copy of the teacher), or a
//! network of another kind that makes samples in one call.

use std::cell::RefCell;
use std::rc::Rc;

use tch::{Device, Tensor};

use crate::diffusion::{
    Conditions, Conversion, Denoiser, Generator, HostConditions, PreparedLevels, Schedule, StudentStart, TeacherCard,
};
use crate::distill::config::{Config, Init, StudentConfig};
use crate::distill::draws::{Draws, Purpose};
use crate::error::{Context, Error, Result};
use crate::torch::{Forward, ParamSet, shim};

/// The student with its own weights.
#[derive(Debug)]
pub enum Student {
    /// A network with a time input, evaluated at one fixed noise level or at a few in turn.
    Levels(Box<AtLevels>),
    /// A network without a time input, which makes a sample in one call.
    Generator(Generator),
}

/// `G(z, c) = skip x_net + out F(x_net, time, c)` with `x_net = init_scale z`, `z ~ N(0, I)`; with more than one step its
/// image is noised again to the next level and denoised there, and so on.
#[derive(Debug)]
pub struct AtLevels {
    denoiser: Denoiser,
    start: StudentStart,
    /// Noise levels of the steps after the first, falling.
    levels: Vec<f64>,
    /// Fresh noise before each further step, instead of the noise that was found.
    stochastic: bool,
    /// The first step's evaluation of so many rows, the same for every batch.
    first: RefCell<Option<(usize, Device, Rc<PreparedLevels>)>>,
}

/// Seed of the noise of further steps where an image is looked at rather than trained on.
const STEP_NOISE: u64 = 0x57e9;

impl Student {
    /// A generator with these weights, which it owns, at the configured noise levels.
    ///
    /// Errors: noise levels that do not fall from the first step's to above 0.
    pub fn new(denoiser: Denoiser, config: &StudentConfig) -> Result<Self> {
        let start = start(&denoiser, config)?;
        let levels = levels(denoiser.conversion(), config)?;
        Ok(Self::Levels(Box::new(AtLevels {
            denoiser,
            start,
            levels,
            stochastic: config.stochastic,
            first: RefCell::default(),
        })))
    }

    /// A generator of one call.
    ///
    /// Errors: noise levels in the configuration, of which such a network knows nothing.
    pub fn of_generator(generator: Generator, config: &StudentConfig) -> Result<Self> {
        let set = [
            ("student.sigmas", !config.sigmas.is_empty()),
            ("student.steps", config.steps > 0),
            ("student.sigma_init", config.sigma_init > 0.0),
        ];
        match set.iter().find(|(_, set)| *set) {
            None => Ok(Self::Generator(generator)),
            Some((key, _)) => Err(Error::usage(format!(
                "{key} is set, but the student makes its samples in one call that takes no noise level"
            ))
            .hint("a student with a time input and a card of its own has noise levels, as the teacher's copy has")),
        }
    }

    /// The same student with its own weights of equal values.
    pub fn copy(&self) -> Result<Self> {
        Ok(match self {
            Self::Levels(s) => Self::Levels(Box::new(AtLevels {
                denoiser: s.denoiser.copy()?,
                start: s.start,
                levels: s.levels.clone(),
                stochastic: s.stochastic,
                first: RefCell::default(),
            })),
            Self::Generator(g) => Self::Generator(g.copy()?),
        })
    }

    /// The student that a run begins with: of `given`'s network, or of the teacher's; fresh weights where configured.
    pub fn initial(given: Option<&Self>, teacher: &Denoiser, config: &StudentConfig, seed: u64) -> Result<Self> {
        let student = match given {
            Some(student) => student.copy()?,
            None => Self::new(teacher.copy()?, config)?,
        };
        if config.init == Init::Random {
            student.network().reinitialise(seed)?;
        }
        Ok(student)
    }

    /// Hash of the weights that a run begins with, where they are not the teacher's: a trajectory is recorded for them.
    pub fn hash_of_initial(given: Option<&Self>, teacher: &Denoiser, config: &Config) -> Result<Option<String>> {
        if given.is_none() && config.student.init == Init::Given {
            return Ok(None);
        }
        Self::initial(given, teacher, &config.student, config.seed)?.params().hash().map(Some)
    }

    /// Calls the network once on two samples: what does not fit is an error before the first step.
    pub fn try_out(&self, card: &TeacherCard, conditions: &HostConditions) -> Result<()> {
        let device = self.device();
        let rows = conditions.len() as i64;
        let z = shim::randn(STEP_NOISE, &self.noise_size(rows), device)?;
        let conditions = Conditions::from_host(conditions, device)?;
        let made = tch::no_grad(|| self.generate(&z, &conditions)).context("the student's first samples")?;
        let (found, expected) = (made.size(), card.size_of(conditions.len() as usize));
        if found != expected {
            return Err(Error::mismatch(format!(
                "the student makes samples of shape {found:?}, expected {expected:?}"
            )));
        }
        if made.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
            return Err(Error::invalid("the student's first samples hold NaN or infinity"));
        }
        Ok(())
    }

    /// Shape of the noise of `rows` samples.
    pub fn noise_size(&self, rows: i64) -> Vec<i64> {
        std::iter::once(rows).chain(self.noise_shape().into_iter().map(|d| d as i64)).collect()
    }

    /// Shape of the noise of one sample.
    pub fn noise_shape(&self) -> Vec<usize> {
        match self {
            Self::Levels(s) => s.denoiser.card().shape.clone(),
            Self::Generator(g) => g.ports().noise_shape(),
        }
    }

    /// Images for standard normal `z` of [`Student::noise_size`], `[B, ...shape]` f32, by all steps. The noise of further
    /// steps depends on the step and the batch's shape alone.
    pub fn generate(&self, z: &Tensor, conditions: &Conditions) -> Result<Tensor> {
        match self {
            Self::Levels(s) => {
                let noise = |step: usize| shim::randn(STEP_NOISE + step as u64, &z.size(), z.device());
                s.unroll(z, conditions, s.levels.len(), &noise)
            }
            Self::Generator(g) => g.generate(z, conditions),
        }
    }

    /// Images to train on: those of a step that is drawn at random, the steps before it simulated without a gradient
    /// (DMD2's backward simulation).
    pub fn training_images(&self, draws: &Draws, z: &Tensor, conditions: &Conditions) -> Result<Tensor> {
        match self {
            Self::Levels(s) => {
                let step = draws.below(Purpose::Step, s.levels.len() + 1);
                let noise = |step: usize| draws.step_noise(step, &z.size(), z.device());
                s.unroll(z, conditions, step, &noise)
            }
            Self::Generator(g) => g.generate(z, conditions),
        }
    }

    /// Device that the weights are on.
    pub fn device(&self) -> Device {
        self.params().tensors().first().map_or(Device::Cpu, Tensor::device)
    }
    /// The network that makes the samples.
    pub fn network(&self) -> &dyn Forward {
        match self {
            Self::Levels(s) => s.denoiser.network(),
            Self::Generator(g) => g.network(),
        }
    }
    /// The weights that are trained: with low-rank adaptation the factors alone.
    pub fn params(&self) -> &ParamSet {
        self.network().params()
    }

    /// The weights of the whole network, detached: what is saved and exported. With low-rank adaptation the factors are
    /// merged into the teacher's weights.
    pub fn weights(&self) -> Result<ParamSet> {
        match self.network().merged()? {
            Some(merged) => Ok(merged),
            None => {
                let tensors = self.params().tensors().iter().map(Tensor::detach).collect();
                self.params().with_tensors(tensors)
            }
        }
    }
}

impl AtLevels {
    /// The image of the first step.
    fn begin(&self, z: &Tensor, conditions: &Conditions) -> Result<Tensor> {
        let (rows, device) = (z.size().first().copied().unwrap_or(0) as usize, z.device());
        let kept = self.first.borrow().as_ref().filter(|f| (f.0, f.1) == (rows, device)).map(|f| f.2.clone());
        let prepared = match kept {
            Some(kept) => kept,
            None => {
                let made = Rc::new(self.denoiser.prepare_start(rows, &self.start, device)?);
                *self.first.borrow_mut() = Some((rows, device, made.clone()));
                made
            }
        };
        Ok(self.denoiser.denoise_prepared(z, &prepared, conditions, &[])?.0)
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
            return self.begin(z, conditions);
        }
        let rows = conditions.len() as usize;
        let (x_edm, sigma) = tch::no_grad(|| -> Result<(Tensor, f64)> {
            let mut x0 = self.begin(z, conditions)?;
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
}

/// Where the student starts under this configuration.
///
/// Errors: a noise level that the teacher's schedule does not have.
pub fn start(denoiser: &Denoiser, config: &StudentConfig) -> Result<StudentStart> {
    if config.sigma_init > 0.0 {
        known(denoiser.conversion(), "student.sigma_init", config.sigma_init)?;
    }
    denoiser.conversion().at_start((config.sigma_init > 0.0).then_some(config.sigma_init))
}

/// Refuses noise levels beyond the schedule, by more than what rounding a number for a person does.
fn known(conversion: &Conversion, key: &str, sigma: f64) -> Result<()> {
    let schedule = conversion.schedule();
    let (low, high) = (schedule.sigma_min(), schedule.sigma_max());
    let beyond = sigma > 1.01 * high && !matches!(schedule, Schedule::Flow { .. });
    match beyond || sigma < 0.99 * low {
        true => Err(Error::usage(format!("{key}: the teacher's noise levels are {low:.4} to {high:.4}, {sigma} is none of them"))
            .hint("levels are in sigma, the noise beside a sample of scale 1, not in steps; the card's schedule says where they end")),
        false => Ok(()),
    }
}

/// The noise levels of the steps after the first: those that are listed, or those of the grid.
pub fn levels(conversion: &Conversion, config: &StudentConfig) -> Result<Vec<f64>> {
    match config.steps {
        0 => listed(conversion, config),
        steps => {
            let schedule = conversion.schedule().clone().with_shift(config.shift, "student.shift")?;
            let first = conversion.at_start((config.sigma_init > 0.0).then_some(config.sigma_init))?.sigma;
            let levels = schedule.student_sigmas(steps).context("student.steps")?.split_off(1);
            match levels.first().is_none_or(|second| *second < first) {
                true => Ok(levels),
                // (`sigma_init`, or a table whose end is so steep that the student starts before it.)
                false => Err(Error::usage(format!(
                    "student.steps is {steps}: the second level would be {:.4}, and the student starts at {first:.4}",
                    levels[0]
                ))
                .hint("list the levels of the further steps in student.sigmas instead")),
            }
        }
    }
}

fn listed(conversion: &Conversion, config: &StudentConfig) -> Result<Vec<f64>> {
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
        known(conversion, "student.sigmas", sigma)?;
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
