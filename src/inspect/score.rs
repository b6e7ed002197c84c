//! How far a network, read in one way, is from being a denoiser of its own samples.
//!
//! The right reading turns the network into `D(x; sigma) = E[x0 | x0 + sigma e]`. It has two properties that need no data:
//! its sampler ends at images of moderate scale, and on these, with noise added anew, no simple change of D (another
//! time, another scale of the input, an affine mixture of D and x) lowers the squared error, which is itself below that of
//! the best linear denoiser. Wrong readings either blow up, or are bettered by such a change, or are no better than linear.
//! The score adds up what the changes gain, in nats: 0 is a perfect denoiser.

use crate::error::Result;
use crate::inspect::hypothesis::Hypothesis;
use crate::inspect::subject::{Feed, Subject};
use crate::noise::batch_noise;

/// How much is computed to score one hypothesis.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Effort {
    /// Samples drawn.
    pub rows: usize,
    /// Steps of the sampler.
    pub steps: usize,
    /// Noise levels sigma at which the denoiser is tested.
    pub levels: &'static [f64],
}

/// Noise levels sigma at which the denoiser is tested, the middle ones first: most wrong assumptions fail there.
pub const LEVELS: [f64; 5] = [1.0, 0.3, 3.0, 0.1, 10.0];
/// The same for a network that costs too much for all of [`LEVELS`].
pub const FEW_LEVELS: [f64; 3] = [1.0, 0.2, 4.0];

impl Effort {
    /// Rows of samples that the network is run on to score one hypothesis.
    pub fn cost(&self) -> usize {
        self.rows * (self.steps + 5 * self.levels.len())
    }
}

/// Where sampling starts and ends: beyond these nothing is left to tell apart.
const START: f64 = 30.0;
const END: f64 = 0.05;
/// Samples of a larger standard deviation are none of normalised data.
const WILD: f64 = 5.0;
/// Factors by which the time and the input's scale are shifted.
const OTHER_TIME: f64 = 1.6;
const OTHER_SCALE: f64 = 1.15;

/// The score of one hypothesis.
#[derive(Debug, Clone)]
pub struct Score {
    /// The score in nats; 0 is a perfect denoiser of its own samples, and higher is worse. Above the bound that
    /// [`score`] was given it is only a lower limit.
    pub total: f64,
    /// Its samples, `[rows, C, H, W]`.
    pub samples: Vec<f32>,
    /// Their standard deviation around the mean image.
    pub spread: f64,
}

/// `D(x; sigma)` under a hypothesis, the network being told `time_of` instead of sigma and given `scale` times its
/// input.
pub fn denoise(
    net: &mut Subject,
    h: &Hypothesis,
    x: &[f64],
    sigma: f64,
    time_of: f64,
    scale: f64,
    feeds: &[Feed],
) -> Result<Vec<f64>> {
    let k = h.conversion.at(sigma)?;
    let x_net: Vec<f32> = x.iter().map(|v| (v * k.c_in * scale) as f32).collect();
    let f = net.forward(&x_net, h.conversion.time(time_of), feeds)?;
    Ok(x.iter().zip(&f).map(|(x, f)| k.skip * k.c_in * x + k.out * f64::from(*f)).collect())
}

/// Scores a hypothesis, and stops as soon as the score is above `bound`. `None` where the samples diverge or all become
/// equal, or where the network fails on its inputs.
pub fn score(net: &mut Subject, h: &Hypothesis, effort: Effort, feeds: &[Feed], bound: f64) -> Option<Score> {
    let len = net.elements();
    let noise =
        |k: u64| -> Vec<f64> { batch_noise(1000 + k, 0, effort.rows, len).into_iter().map(f64::from).collect() };
    let samples = sample(net, h, effort, feeds, noise(0))?;
    let mean: Vec<f64> =
        (0..len).map(|i| samples.chunks_exact(len).map(|r| r[i]).sum::<f64>() / effort.rows as f64).collect();
    let centred = |x: &[f64]| -> Vec<f64> { x.iter().enumerate().map(|(i, v)| v - mean[i % len]).collect() };
    let goal = centred(&samples);
    // The mean is of the same rows.
    let unbiased = effort.rows as f64 / (effort.rows as f64 - 1.0).max(1.0);
    let variance = dot(&goal, &goal) / goal.len() as f64 * unbiased;
    let spread = variance.sqrt();
    if !(spread > 0.02 && spread < WILD) {
        return None;
    }
    let (mut total, mut lowest, mut response) = (0.0, f64::INFINITY, 0.0f64);
    for (k, &sigma) in effort.levels.iter().enumerate() {
        let e = noise(1 + k as u64);
        let x: Vec<f64> = samples.iter().zip(&e).map(|(x0, e)| x0 + sigma * e).collect();
        let mut error = |time: f64, scale: f64| -> Option<(f64, Vec<f64>)> {
            let d = denoise(net, h, &x, sigma, time, scale, feeds).ok()?;
            let m = d.iter().zip(&samples).map(|(d, x0)| (d - x0).powi(2)).sum::<f64>() / d.len() as f64;
            Some((if m.is_finite() { m.max(1e-10) } else { 1e10 }, d))
        };
        let (base, d) = error(sigma, 1.0)?;
        let ratio = base / (variance * sigma * sigma / (variance + sigma * sigma));
        // A change that the network refuses gains nothing.
        let mut other = |time: f64, scale: f64| error(time, scale).map_or(base, |(m, _)| m);
        let (early, late) = (other(sigma / OTHER_TIME, 1.0), other(sigma * OTHER_TIME, 1.0));
        let (small, large) = (other(sigma, 1.0 / OTHER_SCALE), other(sigma, OTHER_SCALE));
        let gain = |m: f64| (base / m).ln().max(0.0);
        total += ratio.ln().max(0.0)
            + gain(mixed(&centred(&d), &centred(&x), &goal))
            + gain(early.min(late))
            + gain(small.min(large));
        lowest = lowest.min(ratio);
        if total > bound * effort.levels.len() as f64 {
            response = 1.0;
            break;
        }
        response = response.max((early / base).ln().abs()).max((late / base).ln().abs());
    }
    total /= effort.levels.len() as f64;
    // A reading under which the time has no effect, or which nowhere betters a linear denoiser, has nothing for it.
    total +=
        10.0 * (0.1 - response).max(0.0) + 3.0 * (lowest.max(0.05).ln() + 0.15).max(0.0) + (spread / 2.5).ln().max(0.0);
    let samples = samples.into_iter().map(|v| v as f32).collect();
    total.is_finite().then_some(Score { total, samples, spread })
}

/// Euler steps of the probability-flow equation, evenly spaced in ln sigma.
fn sample(net: &mut Subject, h: &Hypothesis, effort: Effort, feeds: &[Feed], z: Vec<f64>) -> Option<Vec<f64>> {
    let level = |i: usize| START * (END / START).powf(i as f64 / (effort.steps - 1) as f64);
    let mut x: Vec<f64> = z.into_iter().map(|v| v * level(0)).collect();
    for i in 0..effort.steps {
        let sigma = level(i);
        let d = denoise(net, h, &x, sigma, sigma, 1.0, feeds).ok()?;
        let power = dot(&d, &d) / d.len() as f64;
        // Written so that NaN gives up.
        if !(power < WILD * WILD) {
            return None;
        }
        let next = if i + 1 < effort.steps { level(i + 1) / sigma } else { 0.0 };
        x = x.iter().zip(&d).map(|(x, d)| d + next * (x - d)).collect();
    }
    Some(x)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Mean squared error of the best `alpha d + beta x` for `goal` (all centred).
fn mixed(d: &[f64], x: &[f64], goal: &[f64]) -> f64 {
    let (dd, dx, xx) = (dot(d, d), dot(d, x), dot(x, x));
    let (dg, xg, gg) = (dot(d, goal), dot(x, goal), dot(goal, goal));
    let det = dd * xx - dx * dx;
    let explained = if det > 1e-9 * dd * xx {
        (dg * dg * xx - 2.0 * dg * xg * dx + xg * xg * dd) / det
    } else if xx > 0.0 {
        xg * xg / xx
    } else {
        0.0
    };
    ((gg - explained) / goal.len() as f64).max(1e-10)
}
