//! The scheduler of diffusers that makes exactly the student's steps. A student starts from `x_net = init_scale z` and gives
//! `x0 = skip x_net + out F`:
//!
//! * VP: DDIM (Song et al. 2021, equation 12) on the table of the schedule up to the student's first step: pipelines start from `z`, and
//!   the step to the level 0 is `x0` itself. With fresh noise between several steps: the sampler of latent consistency models.
//! * flow: Euler from t = 1, where `x_t = z`: `z - F`.
//! * EDM: Euler with EDM's preconditioning. Its pipelines start from noise of deviation `sqrt(sigma^2 + 1)` instead of `sigma`.
//! * consistency models: their own sampler.

use serde_json::{Map, Value as Json, json};

use crate::diffusion::{Conversion, Direction, Prediction, Schedule, ScheduleSpec, TeacherCard, TimeUnit};
use crate::error::{Error, Result};
use crate::export::Steps;

/// Schedulers by the pipelines that run them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Schedulers {
    Vp,
    Flow,
    Edm,
    Consistency,
}

/// A scheduler and how its pipeline is called.
#[derive(Debug, Clone)]
pub(super) struct Scheduling {
    pub kind: Schedulers,
    pub class: &'static str,
    /// `scheduler_config.json`.
    pub config: Map<String, Json>,
    /// Calls of the network.
    pub steps: usize,
    /// Times that the pipeline must be given.
    pub sigmas: Option<Vec<f64>>,
    pub warnings: Vec<String>,
}

/// Largest relative error of a noise level's `abar` in the f32 of diffusers' tables.
const ABAR_ERROR: f64 = 1e-6;
/// Largest relative error of the noise that a pipeline starts from.
const START_ERROR: f64 = 1e-4;

fn refuse<T>(what: String, way_out: &str) -> Result<T> {
    Err(Error::unsupported(format!("no scheduler of diffusers makes this student's steps: {what}")).hint(way_out))
}
const WITHOUT: &str = "student.onnx runs without diffusers; --format safetensors writes the weights alone";

/// The scheduler of a student.
///
/// Errors: no scheduler of diffusers makes its steps.
pub(super) fn of(card: &TeacherCard, sigma_init: Option<f64>, steps: &Steps) -> Result<Scheduling> {
    let conversion = Conversion::new(card)?;
    let start = conversion.at_start(sigma_init)?.sigma;
    let levels: Vec<f64> = std::iter::once(start).chain(steps.levels.iter().copied()).collect();
    let (kind, class, config, warnings) = match (&card.schedule, card.prediction, card.time_unit) {
        (ScheduleSpec::Vp { .. }, Prediction::Epsilon | Prediction::V | Prediction::Denoised, TimeUnit::Step) => {
            let (class, config) = vp(card, conversion.schedule(), &levels, steps.stochastic)?;
            (Schedulers::Vp, class, config, Vec::new())
        }
        (ScheduleSpec::Flow { direction, .. }, Prediction::Flow, TimeUnit::Thousand | TimeUnit::Unit) => {
            let config = flow(*direction, &levels, steps.stochastic)?;
            (Schedulers::Flow, "FlowMatchEulerDiscreteScheduler", config, Vec::new())
        }
        (ScheduleSpec::Edm { .. }, Prediction::EdmRaw, TimeUnit::LnSigma4) => {
            let (config, warnings) = edm(card, &levels)?;
            (Schedulers::Edm, "EDMEulerScheduler", config, warnings)
        }
        (ScheduleSpec::Edm { .. }, Prediction::Consistency, TimeUnit::LnSigma250) => {
            let config = consistency(card, &levels)?;
            (Schedulers::Consistency, "CMStochasticIterativeScheduler", config, Vec::new())
        }
        (_, prediction, unit) => {
            return refuse(
                format!(
                    "the card says prediction {}, time_unit {} and schedule {}",
                    name(&prediction),
                    name(&unit),
                    json!(card.schedule)["kind"].as_str().unwrap_or_default()
                ),
                "diffusers has schedulers for vp with step (epsilon, v, denoised), flow with unit or thousand (flow), edm with ln-sigma-4 \
                 (edm-raw) and edm with ln-sigma-250 (consistency); student.onnx runs without diffusers",
            );
        }
    };
    let sigmas = (kind == Schedulers::Flow && levels.len() > 1)
        .then(|| levels.iter().map(|&s| conversion.schedule().t(s)).collect::<Vec<f64>>());
    let config = config.as_object().cloned().unwrap_or_default();
    let config = std::iter::once(("_class_name".to_owned(), Json::from(class))).chain(config).collect();
    Ok(Scheduling { kind, class, config, steps: levels.len(), sigmas, warnings })
}

/// A value as cards write it.
fn name(value: &impl serde::Serialize) -> String {
    json!(value).as_str().unwrap_or_default().to_owned()
}

/// The end of the values of a clean sample, where they are symmetric.
fn symmetric(card: &TeacherCard) -> Option<f64> {
    card.range.filter(|[low, high]| *low == -high).map(|[_, high]| high)
}

fn vp(card: &TeacherCard, schedule: &Schedule, levels: &[f64], stochastic: bool) -> Result<(&'static str, Json)> {
    // (Levels are those of the table's entries.)
    let entries: Vec<usize> = levels.iter().map(|&s| schedule.t(s).round().max(0.0) as usize).collect();
    let (n, total) = (entries.len(), entries[0] + 1);
    let stride = total / n;
    let even: Vec<usize> = (1..=n).rev().map(|i| (i * stride).saturating_sub(1)).collect();
    if entries != even {
        let level = |&k: &usize| format!("{:.6}", schedule.sigma(k as f64));
        let at: Vec<String> = even.iter().map(level).collect();
        return refuse(
            format!("they are at {entries:?} of the schedule's table, and diffusers divides the table evenly"),
            &format!(
                "for {n} steps at {even:?} train with student.sigma_init = {} and student.sigmas = [{}]; {WITHOUT}",
                at[0],
                at[1..].join(", ")
            ),
        );
    }
    if n > 1 && stochastic && total == n {
        return refuse("its last step is at the table's entry 0, where LCMScheduler makes none".into(), WITHOUT);
    }
    let abar: Vec<f64> = (0..total).map(|i| schedule.a(schedule.sigma(i as f64)).powi(2)).collect();
    let Some(betas) = betas(&abar, &entries) else {
        return refuse("its noise levels are too high for the f32 of diffusers' tables".into(), WITHOUT);
    };
    let prediction = match card.prediction {
        Prediction::V => "v_prediction",
        Prediction::Denoised => "sample",
        _ => "epsilon",
    };
    let mut config = json!({
        "num_train_timesteps": total,
        "prediction_type": prediction,
        "rescale_betas_zero_snr": false,
        "set_alpha_to_one": true,
        "steps_offset": 1,
        "thresholding": false,
        "timestep_spacing": "trailing",
        "trained_betas": betas,
    });
    // Only the last image of several steps is cut to the range, which pipelines do themselves.
    let clip = symmetric(card).filter(|_| n == 1);
    config["clip_sample"] = clip.is_some().into();
    config["clip_sample_range"] = clip.unwrap_or(1.0).into();
    if n == 1 || !stochastic {
        return Ok(("DDIMScheduler", config));
    }
    // Its boundary condition must not act: c_skip is 0 and c_out is 1 at every time but 0.
    config["original_inference_steps"] = n.into();
    config["timestep_scaling"] = 1e9.into();
    Ok(("LCMScheduler", config))
}

/// Betas in f32 whose products are `abar` up to its end, or at least at these entries. `None`: not even there.
fn betas(abar: &[f64], entries: &[usize]) -> Option<Vec<f32>> {
    let near = |betas: &[f32]| {
        let kept = products(betas);
        entries.iter().all(|&k| (kept[k] / abar[k] - 1.0).abs() <= ABAR_ERROR)
    };
    let own = followed(abar);
    if near(&own) {
        return Some(own);
    }
    // A last beta next to 1 (zero terminal SNR) has no digits left in f32: between the entries the signal falls evenly instead.
    let mut even = Vec::with_capacity(abar.len());
    let mut before = 1.0f64;
    for &k in entries.iter().rev() {
        let from = even.len();
        let count = (k + 1 - from) as f64;
        even.extend((1..=k + 1 - from).map(|i| before * (abar[k] / before).powf(i as f64 / count)));
        before = abar[k];
    }
    let even = followed(&even);
    near(&even).then_some(even)
}

/// Betas one after the other, each of which takes the product, with what rounding left of it, to where it should be.
fn followed(abar: &[f64]) -> Vec<f32> {
    let mut kept = 1.0f64;
    let next = |target: &f64| {
        let beta = (1.0 - target / kept).max(0.0) as f32;
        kept *= f64::from(1.0 - beta);
        beta
    };
    abar.iter().map(next).collect()
}

/// `abar` as diffusers computes it: `1 - beta` in f32, their products.
fn products(betas: &[f32]) -> Vec<f64> {
    let mut kept = 1.0f64;
    let next = |beta: &f32| {
        kept *= f64::from(1.0 - beta);
        kept
    };
    betas.iter().map(next).collect()
}

fn flow(direction: Direction, levels: &[f64], stochastic: bool) -> Result<Json> {
    if levels[0].is_finite() {
        return refuse(
            format!("it starts at sigma {}, and diffusers' flows start at pure noise", levels[0]),
            &format!("train without student.sigma_init; {WITHOUT}"),
        );
    }
    let inverted = direction == Direction::NoiseToData;
    let stochastic = stochastic && levels.len() > 1;
    if inverted && stochastic {
        return refuse(
            "its time runs from noise to data, and its steps draw fresh noise".into(),
            &format!("train with student.stochastic = false; {WITHOUT}"),
        );
    }
    // The times are those of training: no shift comes on top.
    Ok(json!({
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": false,
        "invert_sigmas": inverted,
        "stochastic_sampling": stochastic,
    }))
}

/// sigma_min, sigma_max (where the student starts) and rho. Errors: more than one step.
fn karras(card: &TeacherCard, levels: &[f64]) -> Result<(f64, f64, f64)> {
    let ScheduleSpec::Edm { sigma_min, rho, .. } = card.schedule else {
        return Err(Error::mismatch("a schedule that is not `edm`"));
    };
    match levels {
        [sigma] => Ok((sigma_min, *sigma, rho)),
        _ => refuse(
            format!("it has {} steps, and diffusers' EDM schedulers end theirs at sigma_min", levels.len()),
            WITHOUT,
        ),
    }
}

fn edm(card: &TeacherCard, levels: &[f64]) -> Result<(Json, Vec<String>)> {
    let (sigma_min, sigma, rho) = karras(card, levels)?;
    let error = sigma.hypot(1.0) / sigma - 1.0;
    if error > START_ERROR {
        return refuse(
            format!(
                "it starts from noise of deviation {sigma}, EDMEulerScheduler from {:.4}, which is {:.1}% more",
                sigma.hypot(1.0),
                100.0 * error
            ),
            &format!("above sigma 71 the difference is below 1e-4; {WITHOUT}"),
        );
    }
    let warning = format!(
        "EDMEulerScheduler starts from noise of deviation sqrt(sigma^2 + 1): {error:.1e} more than student.onnx does."
    );
    let config = json!({
        "sigma_min": sigma_min,
        "sigma_max": sigma,
        "sigma_data": card.sigma_data,
        "sigma_schedule": "karras",
        "rho": rho,
        "prediction_type": "epsilon",
        "final_sigmas_type": "zero",
    });
    Ok((config, vec![warning]))
}

fn consistency(card: &TeacherCard, levels: &[f64]) -> Result<Json> {
    let (sigma_min, sigma, rho) = karras(card, levels)?;
    Ok(json!({
        "num_train_timesteps": 40,
        "sigma_min": sigma_min,
        "sigma_max": sigma,
        "sigma_data": card.sigma_data,
        "s_noise": 1.0,
        "rho": rho,
        "clip_denoised": symmetric(card) == Some(1.0),
    }))
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
