//! What a network may be: prediction, time unit and schedule together, as one conversion to a denoiser.

use std::fmt;

use serde::Serialize;

use crate::diffusion::{Betas, Conversion, Direction, Prediction, ScheduleSpec, TeacherCard, TimeUnit};

/// A family of schedules, as far as a probe can tell them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// EDM: `x_t = x0 + sigma e`.
    Edm,
    /// Variance preserving, betas spaced evenly (DDPM).
    VpLinear,
    /// Variance preserving, square roots of the betas spaced evenly (Stable Diffusion).
    VpScaledLinear,
    /// Variance preserving, cosine schedule (improved DDPM).
    VpCosine,
    /// Rectified flow: `x_t = (1 - t) x0 + t e`.
    Flow,
    /// The same the other way round: the network's time is `1 - t`, and a velocity `x0 - e`.
    FlowReversed,
    /// The schedule that the card's sources give.
    Given,
}

impl Family {
    /// The family as the card writes it: `schedule.kind`, and `schedule.betas` where it has betas.
    pub fn keys(self) -> (&'static str, Option<&'static str>) {
        match self {
            Self::Edm => ("edm", None),
            Self::VpLinear => ("vp", Some("linear")),
            Self::VpScaledLinear => ("vp", Some("scaled-linear")),
            Self::VpCosine => ("vp", Some("cosine")),
            Self::Flow | Self::FlowReversed => ("flow", None),
            Self::Given => ("given", None),
        }
    }

    /// `schedule.direction` of a flow, as the card writes it.
    pub fn direction(self) -> Option<&'static str> {
        match self {
            Self::Flow => Some("data-to-noise"),
            Self::FlowReversed => Some("noise-to-data"),
            _ => None,
        }
    }
}

/// One assumption about what the network's input and output mean.
#[derive(Debug, Clone)]
pub struct Hypothesis {
    /// What the network's output is taken to be.
    pub prediction: Prediction,
    /// What number the time input is taken to be.
    pub time_unit: TimeUnit,
    /// Schedule that relates the time to a noise level.
    pub family: Family,
    /// Standard deviation of the data; only `edm-raw` depends on it.
    pub sigma_data: f64,
    /// All of the above as one conversion of the output to x0.
    pub conversion: Conversion,
}

impl fmt::Display for Hypothesis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} with time in {}", word(&self.prediction), word(&self.time_unit))?;
        match self.family.keys() {
            (kind, Some(betas)) => write!(f, ", schedule {kind} ({betas})")?,
            (kind, None) => write!(f, ", schedule {kind}")?,
        }
        if self.family == Family::FlowReversed {
            f.write_str(" from noise at time 0")?;
        }
        if self.prediction == Prediction::EdmRaw {
            write!(f, ", sigma_data {}", self.sigma_data)?;
        }
        Ok(())
    }
}

/// The value as a card writes it, such as `edm-raw`; empty for a value that a card does not write as text.
pub fn word<T: Serialize>(value: &T) -> String {
    toml::Value::try_from(value).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

/// What is known before the probe.
#[derive(Debug, Clone, Default)]
pub struct Settled {
    /// The prediction, where the card's sources state it; otherwise every prediction is tried.
    pub prediction: Option<Prediction>,
    /// The time unit, where the card's sources state it.
    pub time_unit: Option<TimeUnit>,
    /// The schedule, where the card's sources state it; otherwise each [`Family`] is tried.
    pub schedule: Option<ScheduleSpec>,
    /// Standard deviation of the data, where the card's sources state it; otherwise 0.5 and 1 are tried.
    pub sigma_data: Option<f64>,
    /// Whether the name of the time input contains `sigma`.
    pub named_sigma: bool,
    /// Whether the time input holds integers, which are steps of a table.
    pub integer_time: bool,
    /// Entries of a VP table, where the graph shows them.
    pub steps: Option<usize>,
}

/// All hypotheses that agree with what is known. `base` gives names and shape.
///
/// Only natural pairs of unit and schedule are tried: a network told sigma or its logarithm gets EDM's `x0 + sigma e`;
/// one told a step or a fraction of the way gets VP's or the flow's mixture. (For networks that give x0, the input's
/// scale at high noise leaves no trace to measure.) VP with `thousand` differs from `step` by a thousandth and is taken
/// for it.
pub fn all(base: &TeacherCard, settled: &Settled) -> Vec<Hypothesis> {
    use Prediction as P;
    use TimeUnit as U;
    let mut out = Vec::new();
    let families: Vec<(Family, ScheduleSpec)> = match &settled.schedule {
        Some(spec) => vec![(Family::Given, spec.clone())],
        None => {
            let vp = |betas| ScheduleSpec::Vp {
                betas,
                beta_start: None,
                beta_end: None,
                steps: settled.steps,
                table: Vec::new(),
            };
            vec![
                (Family::Edm, ScheduleSpec::Edm { sigma_min: 0.002, sigma_max: 80.0, rho: 7.0 }),
                (Family::VpLinear, vp(Betas::Linear)),
                (Family::VpScaledLinear, vp(Betas::ScaledLinear)),
                (Family::VpCosine, vp(Betas::Cosine)),
                (Family::Flow, ScheduleSpec::Flow { shift: 1.0, direction: Direction::DataToNoise }),
                (Family::FlowReversed, ScheduleSpec::Flow { shift: 1.0, direction: Direction::NoiseToData }),
            ]
        }
    };
    for (family, schedule) in families {
        let units: &[U] = match (&schedule, &settled.time_unit) {
            (_, Some(unit)) => std::slice::from_ref(unit),
            (ScheduleSpec::Edm { .. }, None) => &[U::Sigma, U::LnSigma4, U::LnSigma250],
            (ScheduleSpec::Vp { .. }, None) => &[U::Step, U::Unit],
            (ScheduleSpec::Flow { .. }, None) => &[U::Unit, U::Thousand],
            (ScheduleSpec::TrigFlow { .. }, None) => &[U::Radians],
        };
        for &time_unit in units {
            if settled.integer_time && time_unit != U::Step {
                continue;
            }
            for prediction in [P::Denoised, P::EdmRaw, P::Epsilon, P::V, P::Flow, P::TrigFlow, P::ScaledScore] {
                if settled.prediction.is_some_and(|p| p != prediction) {
                    continue;
                }
                // EDM's 0.5, and 1 for data of unit variance; elsewhere it plays no part.
                let choices: &[f64] = match (prediction, &settled.sigma_data) {
                    (_, Some(sd)) => std::slice::from_ref(sd),
                    (P::EdmRaw, None) => &[0.5, 1.0],
                    _ => &[0.5],
                };
                for &sigma_data in choices {
                    let card =
                        TeacherCard { prediction, time_unit, sigma_data, schedule: schedule.clone(), ..base.clone() };
                    // Pairs without a meaning are not readings.
                    if let Ok(conversion) = Conversion::new(&card) {
                        out.push(Hypothesis { prediction, time_unit, family, sigma_data, conversion });
                    }
                }
            }
        }
    }
    out
}
