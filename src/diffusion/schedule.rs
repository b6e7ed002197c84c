//! Noise schedules `x_t = a_t x0 + b_t e`, all in f64. Natural time `t` of a schedule: EDM sigma itself, VP the table
//! index 0..N-1 (fractions between entries), flow t in [0, 1], TrigFlow t in [0, pi/2].

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How the betas of a VP schedule are made (diffusers' `beta_schedule`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Betas {
    /// `linspace(beta_start, beta_end, N)`: DDPM.
    Linear,
    /// `linspace(sqrt(beta_start), sqrt(beta_end), N)^2`: Stable Diffusion.
    ScaledLinear,
    /// `squaredcos_cap_v2`: improved DDPM; beta_start and beta_end play no part.
    Cosine,
    /// `abar` given entry by entry.
    Table,
}

/// Which way a flow's time runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// Data at time 0, noise at 1, velocity `e - x0` (rectified flow as in Stable Diffusion 3 and Flux).
    #[default]
    DataToNoise,
    /// Noise at time 0, data at 1, velocity `x0 - e` (flow matching as in SiT, Lumina, Matcha, F5, Mochi, torchcfm, lerobot).
    NoiseToData,
}

impl Direction {
    fn is_usual(&self) -> bool {
        *self == Self::default()
    }
}

/// The schedule as a card states it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum ScheduleSpec {
    /// `a = 1, b = sigma` (EDM, VE).
    Edm {
        /// Lowest noise level that the network was trained on; 0.002 where left out.
        #[serde(default = "default_sigma_min")]
        sigma_min: f64,
        /// Highest noise level that the network was trained on; 80 where left out.
        #[serde(default = "default_sigma_max")]
        sigma_max: f64,
        /// Exponent of the spacing of noise levels, EDM equation 5; 7 where left out.
        #[serde(default = "default_rho")]
        rho: f64,
    },
    /// `a = sqrt(abar), b = sqrt(1 - abar)` (DDPM, Stable Diffusion).
    Vp {
        /// How the betas are made.
        betas: Betas,
        /// First beta; where left out 1e-4, and 0.00085 for `scaled-linear`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        beta_start: Option<f64>,
        /// Last beta; where left out 0.02, and 0.012 for `scaled-linear`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        beta_end: Option<f64>,
        /// Number of steps N; 1000 where left out, and the length of `table` where there is one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        steps: Option<usize>,
        /// abar of every step, falling; only with `betas = "table"`.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        table: Vec<f64>,
    },
    /// `a = cos t, b = scale sin t` (TrigFlow), the network seeing `x_t / scale`; `scale` is the standard deviation of data
    /// and noise, sigma_data where the network was made from an EDM one.
    #[serde(rename = "trigflow")]
    TrigFlow {
        /// Lowest noise level that the network was trained on; 0.002 where left out.
        #[serde(default = "default_sigma_min")]
        sigma_min: f64,
        /// Highest noise level that the network was trained on; 80 where left out.
        #[serde(default = "default_sigma_max")]
        sigma_max: f64,
        /// Standard deviation of data and noise; 1 where left out.
        #[serde(default = "default_shift")]
        scale: f64,
    },
    /// `a = 1 - t, b = t` (rectified flow); `shift` moves the times of sampling and training, not `a` and `b`.
    Flow {
        /// Shift of the times for higher resolutions, see [`shifted`]; 1, where left out, is none. It is that of `t`, the share
        /// of noise, whichever way the network's own time runs.
        #[serde(default = "default_shift")]
        shift: f64,
        /// Which way the network's own time runs: with `noise-to-data` it is told `1 - t` and gives `x0 - e`.
        #[serde(default, skip_serializing_if = "Direction::is_usual")]
        direction: Direction,
    },
}

/// Keys of one kind of schedule or condition in a card: its name, the keys that it needs, the keys that it may have.
pub(super) type KindKeys = (&'static str, &'static [&'static str], &'static [&'static str]);

/// The kinds of schedules in a card.
pub(super) const KINDS: &[KindKeys] = &[
    ("edm", &[], &["sigma_min", "sigma_max", "rho"]),
    ("vp", &["betas"], &["beta_start", "beta_end", "steps", "table"]),
    ("flow", &[], &["shift", "direction"]),
    ("trigflow", &[], &["sigma_min", "sigma_max", "scale"]),
];

fn default_sigma_min() -> f64 {
    0.002
}
fn default_sigma_max() -> f64 {
    80.0
}
fn default_rho() -> f64 {
    7.0
}
fn default_shift() -> f64 {
    1.0
}

/// Flow sampling starts at this t instead of 1, where sigma is infinite; the signal left out is 1e-5 of x0.
pub const FLOW_T_MAX: f64 = 1.0 - 1e-5;
/// Smallest t of the flow's noise levels.
const FLOW_T_MIN: f64 = 1e-3;

/// A schedule ready to compute with.
#[derive(Debug, Clone, PartialEq)]
pub enum Schedule {
    /// EDM and VE: the natural time is sigma itself.
    Edm {
        /// Lowest noise level that the network was trained on.
        sigma_min: f64,
        /// Highest noise level that the network was trained on.
        sigma_max: f64,
        /// Exponent of the spacing of noise levels, EDM equation 5.
        rho: f64,
    },
    /// Variance preserving: the natural time is the index of a step, and `ln sigma` rises strictly from step to step.
    Vp {
        /// `ln sigma` of every step, strictly rising; two entries or more.
        ln_sigma: Vec<f64>,
    },
    /// Rectified flow: the natural time is t in \[0, 1\].
    Flow {
        /// Shift of the times for higher resolutions, see [`shifted`]; 1: none.
        shift: f64,
    },
    /// TrigFlow: the natural time is the angle t in \[0, pi / 2\].
    TrigFlow {
        /// Lowest noise level that the network was trained on.
        sigma_min: f64,
        /// Highest noise level that the network was trained on.
        sigma_max: f64,
        /// Standard deviation of data and noise.
        scale: f64,
    },
}

/// Noise levels and their spacing beyond which f64's powers, logarithms and tangents lose what they are computed for; those of known
/// networks lie far within.
const SIGMAS: RangeInclusive<f64> = 1e-9..=1e9;
const RHOS: RangeInclusive<f64> = 0.1..=1e3;
/// Shifts of a flow: at a hundred, the second of a thousand times of a sampler is where its first one starts ([`FLOW_T_MAX`]).
const SHIFTS: RangeInclusive<f64> = 1e-2..=1e2;
/// Standard deviations of data.
pub(super) const DEVIATIONS: RangeInclusive<f64> = 1e-6..=1e6;
/// Variances that a step of a VP schedule adds.
const BETAS: RangeInclusive<f64> = 1e-12..=0.9999;
/// The least share of the signal at the end of a VP table: sigma 1e15, whose square f32 still holds.
const ABAR_MIN: f64 = 1e-30;

/// Two noise levels, the first above 0 and below the second.
fn limits(sigma_min: f64, sigma_max: f64) -> Result<(f64, f64)> {
    let (lo, hi) = (within("sigma_min", sigma_min, SIGMAS)?, within("sigma_max", sigma_max, SIGMAS)?);
    if lo >= hi {
        return Err(Error::usage(format!("card: schedule.sigma_min {lo} is not below sigma_max {hi}")));
    }
    Ok((lo, hi))
}

fn within(name: &str, value: f64, possible: RangeInclusive<f64>) -> Result<f64> {
    if possible.contains(&value) {
        return Ok(value);
    }
    let (low, high) = possible.into_inner();
    Err(Error::usage(format!("card key `schedule.{name}` is {value:?}, expected a number from {low:?} to {high:?}")))
}

impl Schedule {
    /// Checks a card's schedule and computes its tables.
    pub fn new(spec: &ScheduleSpec) -> Result<Self> {
        match spec {
            ScheduleSpec::Edm { sigma_min, sigma_max, rho } => {
                let (sigma_min, sigma_max) = limits(*sigma_min, *sigma_max)?;
                Ok(Self::Edm { sigma_min, sigma_max, rho: within("rho", *rho, RHOS)? })
            }
            ScheduleSpec::TrigFlow { sigma_min, sigma_max, scale } => {
                let (sigma_min, sigma_max) = limits(*sigma_min, *sigma_max)?;
                Ok(Self::TrigFlow { sigma_min, sigma_max, scale: within("scale", *scale, DEVIATIONS)? })
            }
            ScheduleSpec::Flow { shift, .. } => Ok(Self::Flow { shift: within("shift", *shift, SHIFTS)? }),
            ScheduleSpec::Vp { betas, beta_start, beta_end, steps, table } => {
                let abar = match betas {
                    Betas::Table => table.clone(),
                    _ if !table.is_empty() => {
                        return Err(Error::usage("card: schedule.table is only read with schedule.betas = \"table\""));
                    }
                    _ => abar_from_betas(&betas_of(*betas, *beta_start, *beta_end, steps.unwrap_or(1000))?),
                };
                if let (Betas::Table, Some(n)) = (betas, steps)
                    && *n != abar.len()
                {
                    return Err(Error::usage(format!("card: schedule.table has {} entries, steps is {n}", abar.len())));
                }
                Self::from_abar(&abar)
            }
        }
    }

    /// A VP schedule from `abar` of every step: at least two entries from 1e-30 to below 1, strictly falling.
    pub fn from_abar(abar: &[f64]) -> Result<Self> {
        let bad = |what: String| Err(Error::usage(format!("card: VP schedule: {what}")));
        if abar.len() < 2 {
            return bad(format!("{} steps, expected 2 or more", abar.len()));
        }
        if let Some((i, v)) = abar.iter().enumerate().find(|(_, v)| !(ABAR_MIN..1.0).contains(*v)) {
            return bad(format!("abar of step {i} is {v:?}, expected a value from {ABAR_MIN:?} to below 1"));
        }
        if let Some(i) = (1..abar.len()).find(|&i| abar[i] >= abar[i - 1]) {
            return bad(format!("abar rises from step {} to {i}, expected falling values", i - 1));
        }
        let ln_sigma: Vec<f64> = abar.iter().map(|v| 0.5 * ((1.0 - v) / v).ln()).collect();
        // (Between two equal ones there is no time.)
        if let Some(i) = (1..ln_sigma.len()).find(|&i| ln_sigma[i] <= ln_sigma[i - 1]) {
            let (a, b) = (abar[i - 1], abar[i]);
            return bad(format!(
                "abar of steps {} and {i} are {a:?} and {b:?}, too near to be two noise levels",
                i - 1
            ));
        }
        Ok(Self::Vp { ln_sigma })
    }

    /// The schedule with its times shifted by another number than the card says, see [`shifted`]: other levels to draw from and another
    /// grid to sample on, of the same network. 0: as it is. `key`: what the number is called.
    ///
    /// Errors: a schedule that is no flow; a number beyond 0.01 to 100.
    pub fn with_shift(self, shift: f64, key: &str) -> Result<Self> {
        match self {
            _ if shift == 0.0 => Ok(self),
            Self::Flow { .. } if SHIFTS.contains(&shift) => Ok(Self::Flow { shift }),
            Self::Flow { .. } => {
                let (low, high) = SHIFTS.into_inner();
                Err(Error::usage(format!("{key} is {shift:?}, expected a number from {low:?} to {high:?}")))
            }
            _ => Err(Error::usage(format!(
                "{key}: only a flow's times are shifted, and this teacher's schedule is no flow"
            ))
            .hint(format!("leave {key} out"))),
        }
    }

    /// Number of table entries of a VP schedule.
    pub fn steps(&self) -> Option<usize> {
        match self {
            Self::Vp { ln_sigma } => Some(ln_sigma.len()),
            _ => None,
        }
    }

    /// sigma = b/a at natural time `t`; infinite for flow at t = 1.
    pub fn sigma(&self, t: f64) -> f64 {
        match self {
            Self::Edm { .. } => t,
            Self::Flow { .. } => t / (1.0 - t),
            Self::TrigFlow { scale, .. } => scale * t.tan(),
            Self::Vp { ln_sigma } => {
                // Between entries ln sigma is interpolated; outside it goes on with the slope of the last two.
                let low = (t.floor().max(0.0) as usize).min(ln_sigma.len() - 2);
                let fraction = t - low as f64;
                // At an entry the table is read as it stands, free of the interpolation's rounding.
                let ln = if fraction == 0.0 {
                    ln_sigma[low]
                } else if fraction == 1.0 {
                    ln_sigma[low + 1]
                } else {
                    ln_sigma[low] + fraction * (ln_sigma[low + 1] - ln_sigma[low])
                };
                ln.exp()
            }
        }
    }

    /// Natural time of a noise level, the inverse of [`Schedule::sigma`].
    pub fn t(&self, sigma: f64) -> f64 {
        match self {
            Self::Edm { .. } => sigma,
            Self::Flow { .. } if sigma.is_infinite() => 1.0,
            Self::Flow { .. } => sigma / (1.0 + sigma),
            Self::TrigFlow { scale, .. } => (sigma / scale).atan(),
            Self::Vp { ln_sigma } => {
                let ln = sigma.ln();
                let low = ln_sigma.partition_point(|v| *v <= ln).saturating_sub(1).min(ln_sigma.len() - 2);
                low as f64 + (ln - ln_sigma[low]) / (ln_sigma[low + 1] - ln_sigma[low])
            }
        }
    }

    /// `a` of the forward process at a noise level: `x_t = a x_edm`.
    pub fn a(&self, sigma: f64) -> f64 {
        match self {
            Self::Edm { .. } => 1.0,
            Self::Vp { .. } => 1.0 / sigma.hypot(1.0),
            Self::Flow { .. } => 1.0 / (1.0 + sigma),
            // cos(atan(x)) = 1 / sqrt(1 + x^2).
            Self::TrigFlow { scale, .. } => 1.0 / (sigma / scale).hypot(1.0),
        }
    }

    /// `b = a sigma` of the forward process at a noise level; 1 at an infinite one.
    pub fn b(&self, sigma: f64) -> f64 {
        if sigma.is_infinite() && matches!(self, Self::Flow { .. } | Self::Vp { .. }) {
            1.0
        } else {
            self.a(sigma) * sigma
        }
    }

    /// Lowest noise level that the network was trained on.
    pub fn sigma_min(&self) -> f64 {
        match self {
            Self::Edm { sigma_min, .. } | Self::TrigFlow { sigma_min, .. } => *sigma_min,
            Self::Vp { .. } => self.sigma(0.0),
            Self::Flow { .. } => self.sigma(FLOW_T_MIN),
        }
    }

    /// Highest finite noise level, from which sampling starts with `x_edm = sigma_max z`.
    pub fn sigma_max(&self) -> f64 {
        match self {
            Self::Edm { sigma_max, .. } | Self::TrigFlow { sigma_max, .. } => *sigma_max,
            Self::Vp { ln_sigma } => self.sigma((ln_sigma.len() - 1) as f64),
            Self::Flow { .. } => self.sigma(FLOW_T_MAX),
        }
    }

    /// The nearest noise level that the network knows: the nearest step of a VP table, the value itself elsewhere.
    pub fn snap(&self, sigma: f64) -> f64 {
        match self {
            Self::Vp { ln_sigma } => self.sigma(self.t(sigma).round().clamp(0.0, (ln_sigma.len() - 1) as f64)),
            _ => sigma,
        }
    }

    /// Noise levels to draw from in distillation, rising: EDM and TrigFlow the `n`-entry Karras table (DMD2: n = 1000), flow `n` times
    /// spread evenly over (0, 1) and shifted, VP `n` steps of its own table (each of them where n is at least as large).
    pub fn training_sigmas(&self, n: usize) -> Vec<f64> {
        let n = n.max(2);
        match self {
            Self::Edm { sigma_min, sigma_max, rho } => {
                let mut table = karras(*sigma_min, *sigma_max, *rho, n);
                table.reverse();
                table
            }
            Self::TrigFlow { sigma_min, sigma_max, .. } => {
                let mut table = karras(*sigma_min, *sigma_max, default_rho(), n);
                table.reverse();
                table
            }
            Self::Vp { ln_sigma } => {
                let last = (ln_sigma.len() - 1) as f64;
                let n = n.min(ln_sigma.len());
                (0..n).map(|i| self.sigma((last * i as f64 / (n - 1) as f64).round())).collect()
            }
            Self::Flow { shift } => (0..n).map(|i| self.sigma(shifted((i as f64 + 0.5) / n as f64, *shift))).collect(),
        }
    }

    /// The falling noise levels of a sampler with `n` steps, `n + 1` values of which the last is 0: EDM Karras, VP table
    /// entries (diffusers' "trailing" spacing, which begins at the last one), flow even times, shifted.
    pub fn sampling_sigmas(&self, n: usize) -> Vec<f64> {
        let n = n.max(1);
        let mut sigmas = match self {
            Self::Edm { sigma_min, sigma_max, rho } => karras(*sigma_min, *sigma_max, *rho, n),
            Self::TrigFlow { sigma_min, sigma_max, .. } => karras(*sigma_min, *sigma_max, default_rho(), n),
            Self::Vp { ln_sigma } => {
                let total = ln_sigma.len();
                let n = n.min(total);
                (0..n).map(|i| self.sigma((total as f64 * (1.0 - i as f64 / n as f64)).round() - 1.0)).collect()
            }
            Self::Flow { shift } => {
                (0..n).map(|i| self.sigma(shifted(1.0 - i as f64 / n as f64, *shift).min(FLOW_T_MAX))).collect()
            }
        };
        sigmas.push(0.0);
        sigmas
    }
}

impl Schedule {
    /// The falling noise levels at which a student of `n` steps is evaluated, the first where the schedule starts (infinite for a flow):
    /// flow even times, shifted, of which the last is `1/n` before its shift (FastGen's `t_list` without the 0 at its end); VP table
    /// entries with diffusers' "trailing" spacing (DMD2's 999, 749, 499, 249); EDM and TrigFlow the first `n` of `n + 1` Karras levels: the
    /// last one, `sigma_min`, stands for the clean end.
    ///
    /// Errors: more steps than a VP table has.
    pub fn student_sigmas(&self, n: usize) -> Result<Vec<f64>> {
        let n = n.max(1);
        Ok(match self {
            Self::Edm { sigma_min, sigma_max, rho } => karras(*sigma_min, *sigma_max, *rho, n + 1)[..n].to_vec(),
            Self::TrigFlow { sigma_min, sigma_max, .. } => {
                karras(*sigma_min, *sigma_max, default_rho(), n + 1)[..n].to_vec()
            }
            Self::Vp { ln_sigma } if n > ln_sigma.len() => {
                return Err(Error::usage(format!("{n} steps on a schedule of {}", ln_sigma.len())));
            }
            Self::Vp { .. } => self.sampling_sigmas(n)[..n].to_vec(),
            Self::Flow { shift } => (0..n).map(|i| self.sigma(shifted(1.0 - i as f64 / n as f64, *shift))).collect(),
        })
    }
}

/// Time shift of flow models for higher resolutions: `t' = shift t / (1 + (shift - 1) t)`, as in Stable Diffusion 3 and FastGen.
/// What SiT's successors write in their own time `s = 1 - t`, `s' = s / (s + shift - shift s)`, is the same.
pub fn shifted(t: f64, shift: f64) -> f64 {
    shift * t / (1.0 + (shift - 1.0) * t)
}

/// EDM equation 5: `n` levels from `sigma_max` down to `sigma_min`, evenly spaced in `sigma^(1/rho)`.
pub fn karras(sigma_min: f64, sigma_max: f64, rho: f64, n: usize) -> Vec<f64> {
    let (lo, hi) = (sigma_min.powf(1.0 / rho), sigma_max.powf(1.0 / rho));
    (0..n)
        .map(|i| match i {
            0 => sigma_max,
            _ if i == n - 1 => sigma_min,
            _ => (hi + i as f64 / (n - 1) as f64 * (lo - hi)).powf(rho),
        })
        .collect()
}

/// The betas of a named schedule; the defaults of start and end are DDPM's and Stable Diffusion's.
fn betas_of(betas: Betas, start: Option<f64>, end: Option<f64>, n: usize) -> Result<Vec<f64>> {
    if !(2..=1_000_000).contains(&n) {
        return Err(Error::usage(format!("card key `schedule.steps` is {n}, expected 2 to 1000000")));
    }
    let (default_start, default_end) = if betas == Betas::ScaledLinear { (0.00085, 0.012) } else { (1e-4, 0.02) };
    let start = within("beta_start", start.unwrap_or(default_start), BETAS)?;
    let end = within("beta_end", end.unwrap_or(default_end), BETAS)?;
    let ramp = |from: f64, to: f64, i: usize| from + (to - from) * i as f64 / (n - 1) as f64;
    Ok((0..n)
        .map(|i| match betas {
            Betas::ScaledLinear => ramp(start.sqrt(), end.sqrt(), i).powi(2),
            Betas::Cosine => {
                let bar = |t: f64| ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
                (1.0 - bar((i + 1) as f64 / n as f64) / bar(i as f64 / n as f64)).min(0.999)
            }
            Betas::Linear | Betas::Table => ramp(start, end, i),
        })
        .collect())
}

/// `abar_i = prod_{j <= i} (1 - beta_j)`.
pub(super) fn abar_from_betas(betas: &[f64]) -> Vec<f64> {
    betas
        .iter()
        .scan(1.0, |product, beta| {
            *product *= 1.0 - beta;
            Some(*product)
        })
        .collect()
}

/// abar of a named schedule, for the scheduler configurations that change it afterwards.
pub(super) fn abar_of(betas: Betas, start: Option<f64>, end: Option<f64>, n: usize) -> Result<Vec<f64>> {
    Ok(abar_from_betas(&betas_of(betas, start, end, n)?))
}

#[cfg(test)]
#[path = "schedule_tests.rs"]
mod tests;
