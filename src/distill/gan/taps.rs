//! The tensors that a discriminator reads: by name, or by share of the network's depth.

use tch::{Device, Kind, Tensor};

use crate::axes::written;
use crate::diffusion::{Condition, Conditions, Denoiser, TeacherCard};
use crate::distill::config::Config;
use crate::error::{Error, Result};
use crate::graph::depth::Places;
use crate::torch::network::no_such_tap;
use crate::torch::shim;

/// Depths that are tried around a share, nearest first, until there is a tensor that a head can read.
const TRIED: usize = 6;
/// Rows of the batch that tells shapes.
const ROWS: usize = 2;

/// A tensor that the discriminator reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tap {
    /// What the configuration says: the tensor's name, or a share as in `75%`.
    pub said: String,
    /// The tensor's name.
    pub name: String,
    /// The tensor's depth, the whole network's, and the tensor's shape without the batch; absent where the network is no graph.
    pub place: Option<(usize, usize, Vec<usize>)>,
}

impl std::fmt::Display for Tap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.place {
            None => write!(f, "`{}`", self.name),
            Some((depth, whole, shape)) => {
                if self.said != self.name {
                    write!(f, "{} = ", self.said)?;
                }
                write!(f, "`{}` {}, after {depth} of {whole} layers", self.name, written(shape))
            }
        }
    }
}

/// The share that a tap says, 0 to 1; `None`: it is a name.
///
/// Errors: a share that is not above 0 and below 100 %, nothing at all.
fn share(tap: &str) -> Result<Option<f64>> {
    if tap.trim().is_empty() {
        return Err(Error::usage("gan.taps holds an empty entry, expected the name of a tensor or a share as in 75%"));
    }
    let Some(text) = tap.strip_suffix('%') else { return Ok(None) };
    let number: f64 = text.trim().parse().map_err(|_| {
        Error::usage(format!("gan.taps: `{tap}` is no share of the depth, expected a number before the %, as in 75%"))
    })?;
    match number > 0.0 && number < 100.0 {
        true => Ok(Some(number / 100.0)),
        false => Err(Error::usage(format!("gan.taps: {tap} of the depth, expected more than 0% and less than 100%"))),
    }
}

/// Refuses shares that are none, without a network.
pub(crate) fn check(taps: &[String]) -> Result<()> {
    taps.iter().try_for_each(|tap| share(tap).map(drop))
}

/// The tensors of these taps. A share of the depth is counted in layers, see [`crate::graph::depth`]: the end of the block nearest to it
/// whose tensor a head can read (features `[B, C, ...]` or `[B, T, C]`; of several at one depth the largest, of equal ones the first). The
/// choice depends on the graph alone.
///
/// Errors: a share of a network that is no graph or has no such tensor; a name that no tensor has, or one that the sample has no part in;
/// two taps that are one tensor.
pub fn resolve(taps: &[String], teacher: &Denoiser) -> Result<Vec<Tap>> {
    let card = teacher.card();
    let mut found: Vec<Tap> = Vec::with_capacity(taps.len());
    let mut places = None;
    for said in taps {
        let share = share(said)?;
        let places = places.get_or_insert_with(|| teacher.network().places(&card.sample, &card.output));
        let tap = match share {
            None => named(said, places, teacher)?,
            Some(share) => at(said, share, places, teacher)?,
        };
        if let Some(same) = found.iter().find(|t| t.name == tap.name) {
            return Err(Error::usage(format!(
                "gan.taps: {} and {} are one tensor, `{}`",
                same.said, tap.said, tap.name
            ))
            .hint("a network of few blocks has no more places than that: leave one of them out"));
        }
        found.push(tap);
    }
    Ok(found)
}

/// [`resolve`] of the configured taps, without a discriminator none.
pub fn configured(config: &Config, teacher: &Denoiser) -> Result<Vec<Tap>> {
    if config.gan.data.is_empty() { Ok(Vec::new()) } else { resolve(&config.gan.taps, teacher) }
}

/// The tensor of this name.
fn named(name: &str, places: &Places, teacher: &Denoiser) -> Result<Tap> {
    let tap = |place| Tap { said: name.into(), name: name.into(), place };
    // What is no graph knows its own names.
    if places.all.is_empty() {
        return Ok(tap(None));
    }
    let Some(place) = places.all.iter().find(|place| place.name == name) else {
        if teacher.network().tap_names().iter().any(|known| known == name) {
            return Err(Error::usage(format!(
                "gan.taps: `{name}` depends on the noise level or on conditions alone, so that it says nothing about a sample"
            )));
        }
        let names: Vec<String> = places.all.iter().map(|place| place.name.clone()).collect();
        return Err(no_such_tap(name, &names).context("gan.taps"));
    };
    let Some(seen) = tapped(name, teacher)? else { return Ok(tap(None)) };
    match shape(&seen, 2) {
        Some(shape) => Ok(tap(Some((place.depth, places.whole, shape)))),
        None => Err(Error::usage(format!(
            "gan.taps: `{name}` is {:?} of {:?}, expected features in floating point, tokens [B, T, C] or maps [B, C, ...] of up to three \
             axes",
            seen.size(),
            seen.kind()
        ))),
    }
}

/// The tensor nearest to a share of the depth.
fn at(said: &str, share: f64, places: &Places, teacher: &Denoiser) -> Result<Tap> {
    for (depth, names) in places.near(share).into_iter().take(TRIED) {
        let mut best: Option<(usize, &str, Vec<usize>)> = None;
        for name in names {
            let least = if teacher.card().rank() > 1 { 3 } else { 2 };
            let Some(shape) = tapped(name, teacher)?.and_then(|seen| shape(&seen, least)) else { continue };
            let values = shape.iter().product();
            if best.as_ref().is_none_or(|(most, ..)| values > *most) {
                best = Some((values, name, shape));
            }
        }
        if let Some((_, name, shape)) = best {
            return Ok(Tap { said: said.into(), name: name.into(), place: Some((depth, places.whole, shape)) });
        }
    }
    Err(Error::usage(format!(
        "gan.taps: {said} of the depth: this network has no features between its sample and its output that a head can read"
    ))
    .hint("name tensors of the graph instead: an error about an empty gan.taps lists them"))
}

/// Conditions that are only to be of the right shape.
fn stand_ins(card: &TeacherCard, device: Device) -> Result<Conditions> {
    let rows = ROWS as i64;
    let one = |(name, condition): (&String, &Condition)| {
        let shape: Vec<i64> = std::iter::once(rows).chain(condition.row_shape().iter().map(|d| *d as i64)).collect();
        Ok(match condition.classes() {
            Some(_) => (name.clone(), Tensor::f_zeros([rows], (Kind::Int64, device))?),
            None => (name.clone(), Tensor::f_zeros(&shape[..], (Kind::Float, device))?),
        })
    };
    Conditions::new(rows, card.conditions.iter().map(one).collect::<Result<_>>()?)
}

/// A tensor of the network for some samples; `None` where it cannot be computed so.
fn tapped(name: &str, teacher: &Denoiser) -> Result<Option<Tensor>> {
    let card = teacher.card();
    let device = teacher.params().tensors().first().map_or(Device::Cpu, Tensor::device);
    let conditions = stand_ins(card, device)?;
    let x = shim::randn(0, &card.size_of(ROWS), device)?;
    let schedule = teacher.conversion().schedule();
    let sigma = schedule.snap(1f64.clamp(schedule.sigma_min(), schedule.sigma_max()));
    let tapped = tch::no_grad(|| teacher.denoise_tapped(&x, &[sigma; ROWS], &conditions, &[name.to_owned()]));
    Ok(tapped.ok().and_then(|(_, features)| features.into_iter().next()))
}

/// Shape without the batch of a tensor of at least `least` axes that a head can read; `None` for others.
fn shape(seen: &Tensor, least: usize) -> Option<Vec<usize>> {
    // What is no row a sample is no feature.
    let fits = (least..=5).contains(&seen.dim())
        && seen.size()[0] == ROWS as i64
        && matches!(seen.kind(), Kind::Float | Kind::BFloat16 | Kind::Half);
    fits.then(|| seen.size()[1..].iter().map(|n| *n as usize).collect())
}
