//! Samplers of the probability-flow ODE, written once over whatever holds the samples: libtorch tensors or host vectors.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

use super::card::Prediction;
use super::schedule::{Schedule, karras};

/// What a sampler needs of its state.
pub trait VectorSpace: Sized {
    /// `sum_i weight_i x_i`; the terms have the same shape, at least one is there.
    fn combine(terms: &[(f64, &Self)]) -> Result<Self>;
}

impl VectorSpace for Vec<f32> {
    fn combine(terms: &[(f64, &Self)]) -> Result<Self> {
        let mut sum = vec![0f32; terms.first().map_or(0, |(_, x)| x.len())];
        for (weight, x) in terms {
            if x.len() != sum.len() {
                return Err(Error::mismatch(format!("{} values beside {}", x.len(), sum.len())));
            }
            let weight = *weight as f32;
            sum.iter_mut().zip(x.iter()).for_each(|(s, v)| *s += weight * v);
        }
        Ok(sum)
    }
}

impl VectorSpace for Vec<f64> {
    fn combine(terms: &[(f64, &Self)]) -> Result<Self> {
        let mut sum = vec![0f64; terms.first().map_or(0, |(_, x)| x.len())];
        for (weight, x) in terms {
            if x.len() != sum.len() {
                return Err(Error::mismatch(format!("{} values beside {}", x.len(), sum.len())));
            }
            sum.iter_mut().zip(x.iter()).for_each(|(s, v)| *s += weight * v);
        }
        Ok(sum)
    }
}

#[cfg(feature = "train")]
impl VectorSpace for tch::Tensor {
    fn combine(terms: &[(f64, &Self)]) -> Result<Self> {
        let (first, rest) = terms.split_first().ok_or_else(|| Error::mismatch("nothing to add"))?;
        let mut sum = first.1.f_mul_scalar(first.0)?;
        for (weight, x) in rest {
            sum = sum.f_add(&x.f_mul_scalar(*weight)?)?;
        }
        Ok(sum)
    }
}

/// Solver of the probability-flow ODE.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Sampler {
    /// EDM algorithm 2 without stochasticity: second order, 2n - 1 evaluations for n steps.
    #[default]
    Heun,
    /// First order, n evaluations. For flow models this is the usual Euler method in t.
    Euler,
    /// DDIM with eta 0: exact where D is constant over a step, n evaluations. In `x_edm` it is the Euler step.
    Ddim,
}

/// Samples and what they cost.
#[derive(Debug)]
pub struct Sampled<V> {
    /// The samples, at the last noise level.
    pub value: V,
    /// Evaluations of the denoiser.
    pub nfe: usize,
}

impl Sampler {
    /// What samples a network of this kind, in how many steps: a consistency model makes its image in one evaluation,
    /// whatever was asked for.
    pub fn fitting(self, prediction: Prediction, steps: usize) -> (Self, usize) {
        if prediction == Prediction::Consistency { (Self::Euler, 1) } else { (self, steps) }
    }

    /// Evaluations for `n` steps that end at noise level 0.
    pub fn nfe(self, n: usize) -> usize {
        if self == Self::Heun { (2 * n).saturating_sub(1) } else { n }
    }

    /// Falling noise levels for `n` steps, the last one 0. Heun on a VP table takes the table's entries next to Karras
    /// levels: evenly spaced steps jump too far in sigma for its correction.
    pub fn sigmas(self, schedule: &Schedule, n: usize) -> Vec<f64> {
        match (self, schedule) {
            (Self::Heun, Schedule::Vp { .. }) => {
                let levels = karras(schedule.sigma_min(), schedule.sigma_max(), 7.0, n.max(1));
                let mut sigmas: Vec<f64> = levels.into_iter().map(|s| schedule.snap(s)).collect();
                sigmas.dedup();
                sigmas.push(0.0);
                sigmas
            }
            _ => schedule.sampling_sigmas(n),
        }
    }

    /// From `z ~ N(0, I)` to samples. `denoise(x_edm, sigma)` estimates x0; `sigmas` fall strictly, the last may be 0.
    ///
    /// The ODE is `dy/dc = (y - D) / c` in the schedule's own coordinates: EDM and VP `y = x_edm, c = sigma`; flow
    /// `y = x_t, c = t`, where the starting point stays bounded.
    pub fn run<V: VectorSpace>(
        self,
        schedule: &Schedule,
        z: &V,
        sigmas: &[f64],
        mut denoise: impl FnMut(&V, f64) -> Result<V>,
    ) -> Result<Sampled<V>> {
        let falling = sigmas.windows(2).all(|w| w[0] > w[1]) && sigmas.last().is_some_and(|s| *s >= 0.0);
        if sigmas.len() < 2 || !falling || !sigmas[0].is_finite() {
            return Err(Error::usage(
                "the noise levels of a sampler must be two or more, finite and falling to 0 or above",
            ));
        }
        let flow = matches!(schedule, Schedule::Flow { .. });
        let clock = |sigma: f64| if flow { schedule.t(sigma) } else { sigma };
        let mut nfe = 0;
        let mut evaluate = |y: &V, sigma: f64| -> Result<V> {
            nfe += 1;
            if flow { denoise(&V::combine(&[(1.0 / schedule.a(sigma), y)])?, sigma) } else { denoise(y, sigma) }
        };
        let mut y = V::combine(&[(clock(sigmas[0]), z)])?;
        for pair in sigmas.windows(2) {
            let (c, next) = (clock(pair[0]), clock(pair[1]));
            let d = evaluate(&y, pair[0])?;
            let step = match self {
                Self::Euler | Self::Heun => V::combine(&[(1.0 + (next - c) / c, &y), ((c - next) / c, &d)])?,
                // x' = D + (c'/c) (x - D): the noise found is kept, its size changed.
                Self::Ddim => V::combine(&[(next / c, &y), (1.0 - next / c, &d)])?,
            };
            y = if self == Self::Heun && next > 0.0 {
                // Trapezoidal rule: y + h/2 ((y - d)/c + (step - d2)/next).
                let d2 = evaluate(&step, pair[1])?;
                let (here, there) = ((next - c) / (2.0 * c), (next - c) / (2.0 * next));
                V::combine(&[(1.0 + here, &y), (-here, &d), (there, &step), (-there, &d2)])?
            } else {
                step
            };
        }
        if flow && sigmas.last().is_some_and(|s| *s > 0.0) {
            y = V::combine(&[(1.0 / schedule.a(sigmas[sigmas.len() - 1]), &y)])?;
        }
        Ok(Sampled { value: y, nfe })
    }
}

#[cfg(feature = "train")]
impl super::denoiser::Denoiser {
    /// Samples of this denoiser by a solver, without gradients: `z` standard normal `[B, ...shape]`, `guidance` 1 for
    /// none (it takes two network evaluations a step, and `nfe` says so). Values are not clipped to the card's range.
    pub fn sample(
        &self,
        z: &tch::Tensor,
        cond: &super::conditions::Conditions,
        sampler: Sampler,
        steps: usize,
        guidance: impl Into<super::Guidance>,
    ) -> Result<Sampled<tch::Tensor>> {
        self.sample_shifted(z, cond, (sampler, steps), 0.0, guidance)
    }

    /// [`super::denoiser::Denoiser::sample`] in steps whose times are shifted by another number than the card's, see [`Schedule::with_shift`].
    ///
    /// Errors: a shift for a teacher that is no flow.
    pub fn sample_shifted(
        &self,
        z: &tch::Tensor,
        cond: &super::conditions::Conditions,
        (sampler, steps): (Sampler, usize),
        shift: f64,
        guidance: impl Into<super::Guidance>,
    ) -> Result<Sampled<tch::Tensor>> {
        let guidance = guidance.into();
        let schedule = &self.conversion().schedule().clone().with_shift(shift, "the sampler's time shift")?;
        let (sampler, steps) = sampler.fitting(self.card().prediction, steps);
        let rows = z.size().first().copied().unwrap_or(0) as usize;
        let _no_grad = tch::no_grad_guard();
        let mut sampled = sampler.run(schedule, z, &sampler.sigmas(schedule, steps), |x: &tch::Tensor, sigma| {
            self.guided(x, &vec![sigma; rows], cond, guidance)
        })?;
        if !guidance.is_none() {
            sampled.nfe *= 2;
        }
        Ok(sampled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::schedule::{Betas, ScheduleSpec};

    const MU: f64 = 0.3;
    const SD: f64 = 0.5;

    /// Posterior mean for data N(MU, SD^2): the exact denoiser.
    fn exact(x: &[f64], sigma: f64) -> Vec<f64> {
        x.iter().map(|x| (SD * SD * x + sigma * sigma * MU) / (SD * SD + sigma * sigma)).collect()
    }

    /// The ODE's solution: `x(s) - mu` is proportional to `sqrt(sd^2 + s^2)`.
    fn solution(z: f64, from: f64, to: f64) -> f64 {
        MU + (from * z - MU) * (SD * SD + to * to).sqrt() / (SD * SD + from * from).sqrt()
    }

    fn error(sampler: Sampler, schedule: &Schedule, n: usize) -> f64 {
        let z = vec![-1.5, -0.2, 0.7, 2.0];
        let sigmas = sampler.sigmas(schedule, n);
        let found = sampler.run(schedule, &z, &sigmas, |x: &Vec<f64>, s| Ok(exact(x, s))).unwrap();
        assert_eq!(found.nfe, sampler.nfe(sigmas.len() - 1));
        let errors = found.value.iter().zip(&z).map(|(x, z)| (x - solution(*z, sigmas[0], 0.0)).abs());
        errors.fold(0.0, f64::max)
    }

    fn edm() -> Schedule {
        Schedule::new(&ScheduleSpec::Edm { sigma_min: 0.002, sigma_max: 80.0, rho: 7.0 }).unwrap()
    }

    #[test]
    fn heun_is_of_second_order_and_euler_of_first() {
        for (sampler, order) in [(Sampler::Heun, 2.0), (Sampler::Euler, 1.0), (Sampler::Ddim, 1.0)] {
            let errors: Vec<f64> = [64, 128, 256].iter().map(|n| error(sampler, &edm(), *n)).collect();
            for pair in errors.windows(2) {
                let found = (pair[0] / pair[1]).log2();
                assert!((found - order).abs() < 0.15, "{sampler:?}: order {found}, errors {errors:?}");
            }
        }
    }

    #[test]
    fn vp_and_flow_reach_the_solution() {
        let vp = |betas| {
            Schedule::new(&ScheduleSpec::Vp { betas, beta_start: None, beta_end: None, steps: None, table: vec![] })
                .unwrap()
        };
        let flow = |shift| Schedule::new(&ScheduleSpec::Flow { shift, direction: Default::default() }).unwrap();
        for (sampler, schedule, n, limit) in [
            (Sampler::Heun, vp(Betas::Linear), 80, 0.004),
            (Sampler::Ddim, vp(Betas::Linear), 250, 0.02),
            (Sampler::Ddim, vp(Betas::ScaledLinear), 250, 0.02),
            (Sampler::Heun, flow(1.0), 40, 0.002),
            (Sampler::Euler, flow(1.0), 250, 0.02),
            (Sampler::Euler, flow(3.0), 250, 0.02),
        ] {
            let found = error(sampler, &schedule, n);
            assert!(found < limit, "{sampler:?} {n} steps: {found}");
        }
        let ratio = error(Sampler::Heun, &flow(1.0), 32) / error(Sampler::Heun, &flow(1.0), 64);
        assert!((ratio.log2() - 2.0).abs() < 0.2, "{ratio}");
    }

    #[test]
    fn ddim_is_the_papers_step_in_x_t() {
        // x_t' = a' x0 + b' (x_t - a x0) / b, on the VP schedule's own x_t.
        let spec =
            ScheduleSpec::Vp { betas: Betas::Linear, beta_start: None, beta_end: None, steps: None, table: vec![] };
        let schedule = Schedule::new(&spec).unwrap();
        let sigmas = schedule.sampling_sigmas(10);
        let found =
            Sampler::Ddim.run(&schedule, &vec![0.8], &sigmas, |x: &Vec<f64>, s| Ok(exact(x, s))).unwrap().value[0];
        let mut x_t = schedule.b(sigmas[0]) * 0.8;
        for pair in sigmas.windows(2) {
            let (a, b) = (schedule.a(pair[0]), schedule.b(pair[0]));
            let (a2, b2) = if pair[1] == 0.0 { (1.0, 0.0) } else { (schedule.a(pair[1]), schedule.b(pair[1])) };
            let x0 = exact(&[x_t / a], pair[0])[0];
            x_t = a2 * x0 + b2 * (x_t - a * x0) / b;
        }
        assert!((found - x_t).abs() < 1e-12, "{found} {x_t}");
    }

    #[test]
    fn host_f32_and_libtorch_agree_with_f64() {
        let schedule = edm();
        let sigmas = Sampler::Heun.sigmas(&schedule, 18);
        let z = [-1.5, -0.2, 0.7, 2.0];
        let wide = Sampler::Heun.run(&schedule, &z.to_vec(), &sigmas, |x: &Vec<f64>, s| Ok(exact(x, s))).unwrap();
        assert_eq!(wide.nfe, 35);
        let narrow: Vec<f32> = z.iter().map(|v| *v as f32).collect();
        let host = Sampler::Heun
            .run(&schedule, &narrow, &sigmas, |x: &Vec<f32>, s| {
                let x: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
                Ok(exact(&x, s).into_iter().map(|v| v as f32).collect())
            })
            .unwrap();
        for (x, y) in host.value.iter().zip(&wide.value) {
            assert!((f64::from(*x) - y).abs() < 1e-4, "{x} {y}");
        }
        #[cfg(feature = "train")]
        {
            let z = tch::Tensor::from_slice(&z);
            let torch = Sampler::Heun
                .run(&schedule, &z, &sigmas, |x: &tch::Tensor, s| {
                    let sum = SD * SD + s * s;
                    Ok(x.f_mul_scalar(SD * SD / sum)?.f_add_scalar(s * s * MU / sum)?)
                })
                .unwrap();
            for (x, y) in Vec::<f64>::try_from(&torch.value).unwrap().iter().zip(&wide.value) {
                assert!((x - y).abs() < 1e-12, "{x} {y}");
            }
        }
    }

    #[test]
    fn impossible_noise_levels_are_refused() {
        for sigmas in [vec![], vec![1.0], vec![1.0, 1.0], vec![1.0, 2.0], vec![f64::INFINITY, 0.0], vec![1.0, -1.0]] {
            let found = Sampler::Euler.run(&edm(), &vec![1f64], &sigmas, |x: &Vec<f64>, _| Ok(x.clone()));
            assert_eq!(found.unwrap_err().exit_code(), 2, "{sigmas:?}");
        }
    }
}
