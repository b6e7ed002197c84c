//! diffusers' `scheduler_config.json`: what it says of a card's prediction, time unit and schedule.

use std::path::Path;

use serde_json::Value as Json;

use crate::error::{Context, Error, Result};

use super::schedule::{Betas, abar_of};

/// Card keys (dotted) and values of a scheduler configuration.
pub(super) fn read(path: &Path) -> Result<Vec<(String, toml::Value)>> {
    let run = || -> Result<_> {
        let text = crate::files::read_text(path, crate::files::SETTINGS)?;
        parse(&serde_json::from_str(&text).map_err(|e| Error::usage(format!("not JSON: {e}")))?)
    };
    run().with_context(|| path.display().to_string())
}

fn parse(config: &Json) -> Result<Vec<(String, toml::Value)>> {
    let class = config["_class_name"].as_str().unwrap_or("a scheduler without _class_name");
    let refuse = |what: String| Err(Error::usage(what).hint("give schedule, prediction and time_unit in the card"));
    let number = |key: &str| config[key].as_f64();
    let mut leaves: Vec<(String, toml::Value)> = Vec::new();
    let mut put = |key: &str, value: toml::Value| leaves.push((key.to_owned(), value));
    if class.starts_with("FlowMatch") {
        if config["use_dynamic_shifting"].as_bool() == Some(true) {
            return refuse(format!("{class} with use_dynamic_shifting: the shift depends on the resolution"));
        }
        put("schedule.kind", "flow".into());
        put("schedule.shift", number("shift").unwrap_or(1.0).into());
        // Mochi's scheduler: its times are 1 - sigma.
        if config["invert_sigmas"].as_bool() == Some(true) {
            put("schedule.direction", "noise-to-data".into());
        }
        put("prediction", "flow".into());
        put("time_unit", "thousand".into());
        return Ok(leaves);
    }
    let prediction = config["prediction_type"].as_str().unwrap_or("epsilon");
    if class.starts_with("EDM") {
        if prediction != "epsilon" {
            return refuse(format!("{class} with prediction_type `{prediction}`"));
        }
        put("schedule.kind", "edm".into());
        for key in ["sigma_min", "sigma_max", "rho"] {
            if let Some(value) = number(key) {
                put(&format!("schedule.{key}"), value.into());
            }
        }
        put("sigma_data", number("sigma_data").unwrap_or(0.5).into());
        put("prediction", "edm-raw".into());
        put("time_unit", "ln-sigma-4".into());
        return Ok(leaves);
    }
    let prediction = match prediction {
        "epsilon" => "epsilon",
        "v_prediction" => "v",
        "sample" => "denoised",
        other => return refuse(format!("{class} with prediction_type `{other}`")),
    };
    let steps = config["num_train_timesteps"].as_u64().unwrap_or(1000) as usize;
    let (start, end) = (number("beta_start"), number("beta_end"));
    // diffusers' own defaults, where the file leaves them out: they differ from a card's for scaled_linear.
    let (start, end) = (start.unwrap_or(0.0001), end.unwrap_or(0.02));
    let named = match config["beta_schedule"].as_str().unwrap_or("linear") {
        "linear" => Betas::Linear,
        "scaled_linear" => Betas::ScaledLinear,
        "squaredcos_cap_v2" => Betas::Cosine,
        other => return refuse(format!("{class} with beta_schedule `{other}`")),
    };
    put("schedule.kind", "vp".into());
    put("prediction", prediction.into());
    put("time_unit", "step".into());
    let trained = config["trained_betas"].as_array();
    let zero_snr = config["rescale_betas_zero_snr"].as_bool() == Some(true);
    if trained.is_some() || zero_snr {
        let mut abar = match trained {
            Some(betas) => {
                let betas: Option<Vec<f64>> = betas.iter().map(Json::as_f64).collect();
                super::schedule::abar_from_betas(
                    &betas.ok_or_else(|| Error::usage("trained_betas holds what is not a number"))?,
                )
            }
            None => abar_of(named, Some(start), Some(end), steps)?,
        };
        if zero_snr {
            rescale_zero_snr(&mut abar);
        }
        put("schedule.betas", "table".into());
        put("schedule.table", abar.into_iter().map(toml::Value::from).collect::<Vec<_>>().into());
        return Ok(leaves);
    }
    put("schedule.steps", toml::Value::Integer(steps as i64));
    match named {
        Betas::Cosine => put("schedule.betas", "cosine".into()),
        _ => {
            put("schedule.betas", if named == Betas::Linear { "linear" } else { "scaled-linear" }.into());
            put("schedule.beta_start", start.into());
            put("schedule.beta_end", end.into());
        }
    }
    Ok(leaves)
}

/// Lin et al. 2023, algorithm 1: sqrt(abar) shifted and scaled so that the last step is pure noise. Its abar becomes
/// 2^-24 instead of 0, as in diffusers' Euler schedulers, so that sigma stays finite.
fn rescale_zero_snr(abar: &mut [f64]) {
    let roots: Vec<f64> = abar.iter().map(|v| v.sqrt()).collect();
    let (Some(first), Some(last)) = (roots.first(), roots.last()) else { return };
    for (value, root) in abar.iter_mut().zip(&roots) {
        *value = ((root - last) * first / (first - last)).powi(2);
    }
    if let Some(end) = abar.last_mut() {
        *end = 2f64.powi(-24);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get<'a>(leaves: &'a [(String, toml::Value)], key: &str) -> Option<&'a toml::Value> {
        leaves.iter().find(|(k, _)| k == key).map(|(_, v)| v)
    }

    #[test]
    fn stable_diffusion_flow_edm_and_cosine() {
        let sd = parse(&serde_json::json!({
            "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
            "num_train_timesteps": 1000, "prediction_type": "v_prediction", "trained_betas": null,
        }))
        .unwrap();
        assert_eq!(get(&sd, "prediction"), Some(&"v".into()));
        assert_eq!(get(&sd, "schedule.betas"), Some(&"scaled-linear".into()));
        assert_eq!(get(&sd, "schedule.beta_end"), Some(&0.012.into()));
        assert_eq!(get(&sd, "time_unit"), Some(&"step".into()));
        let flow =
            parse(&serde_json::json!({ "_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0 })).unwrap();
        assert_eq!(get(&flow, "schedule.shift"), Some(&3.0.into()));
        assert_eq!(get(&flow, "time_unit"), Some(&"thousand".into()));
        assert_eq!(get(&flow, "schedule.direction"), None);
        let mochi = serde_json::json!({ "_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": true });
        assert_eq!(get(&parse(&mochi).unwrap(), "schedule.direction"), Some(&"noise-to-data".into()));
        let edm = parse(&serde_json::json!({ "_class_name": "EDMEulerScheduler", "sigma_max": 80.0 })).unwrap();
        assert_eq!(get(&edm, "prediction"), Some(&"edm-raw".into()));
        let cosine = parse(&serde_json::json!({
            "_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample",
            "num_train_timesteps": 400,
        }))
        .unwrap();
        assert_eq!(get(&cosine, "schedule.betas"), Some(&"cosine".into()));
        assert_eq!(get(&cosine, "schedule.steps"), Some(&400.into()));
        assert_eq!(get(&cosine, "prediction"), Some(&"denoised".into()));
    }

    #[test]
    fn zero_terminal_snr_becomes_a_table() {
        let leaves = parse(&serde_json::json!({
            "_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
            "beta_end": 0.012, "rescale_betas_zero_snr": true,
        }))
        .unwrap();
        let table: Vec<f64> =
            get(&leaves, "schedule.table").unwrap().as_array().unwrap().iter().map(|v| v.as_float().unwrap()).collect();
        assert_eq!((table.len(), table[999]), (1000, 2f64.powi(-24)));
        // The first step is kept: abar_0 = 1 - 0.00085.
        assert!((table[0] - (1.0 - 0.00085)).abs() < 1e-12);
        super::super::schedule::Schedule::from_abar(&table).unwrap();
    }

    #[test]
    fn what_it_cannot_express_is_refused() {
        for config in [
            serde_json::json!({ "_class_name": "DDPMScheduler", "beta_schedule": "sigmoid" }),
            serde_json::json!({ "_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": true }),
            serde_json::json!({ "_class_name": "DDPMScheduler", "prediction_type": "learned" }),
        ] {
            assert!(parse(&config).unwrap_err().to_string().contains("help: give schedule"));
        }
    }
}
