//! Guidance: classifier-free (Ho & Salimans 2022) or by a weaker network (autoguidance, Karras et al. 2024), within an interval of
//! noise levels where that is wanted (Kynkaanniemi et al. 2024: guidance at high levels costs diversity, at low ones it does
//! nothing), rescaled where that is wanted (Lin et al. 2023).

use crate::error::{Error, Result};

use super::card::TeacherCard;
use super::condition::Condition;

/// What is said of a teacher that is to be guided by its own network, in the file `weaker`.
pub(crate) fn by_itself(weaker: &str) -> Error {
    Error::usage(format!("{weaker} is the teacher itself: the difference to itself guides nothing")).hint(
        "autoguidance takes a weaker network of the same data: fewer weights, or an earlier state of the training",
    )
}

/// `D_u + scale (D_c - D_u)` for `low < sigma <= high`, `D_c` elsewhere. `D_u` is the network without its conditions, or a weaker
/// network.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Guidance {
    /// Guidance scale; 1: no guidance.
    pub scale: f64,
    /// Guidance acts only above this noise level sigma.
    pub low: f64,
    /// Guidance acts up to this noise level sigma, which is included; may be infinite.
    pub high: f64,
    /// Share `phi` of the rescaling of Lin et al. 2023 (arXiv 2305.08891, section 3.4): the network's guided output `F_g` becomes
    /// `(phi std(F_c) / std(F_g) + 1 - phi) F_g`, the deviations being those of a sample's own values. 0: none.
    ///
    /// It is the output as the network gives it (epsilon, v, flow, ...) that is rescaled, as in the paper and in diffusers
    /// (`guidance_rescale`), so that a share found there means the same here; of a network that predicts x0 it is x0.
    pub rescale: f64,
}

impl Guidance {
    /// Guidance at every noise level.
    pub fn everywhere(scale: f64) -> Self {
        Self { scale, low: 0.0, high: f64::INFINITY, rescale: 0.0 }
    }

    /// Guidance between two noise levels. Errors: an interval that is not `0 <= low < high`.
    pub fn new(scale: f64, interval: [f64; 2]) -> Result<Self> {
        let [low, high] = interval;
        if !(low >= 0.0 && low < high) {
            return Err(Error::usage(format!(
                "guidance_interval is [{low}, {high}], expected two noise levels, the second above the first"
            )));
        }
        Ok(Self { scale, low, high, rescale: 0.0 })
    }

    /// The same guidance with this share of [`Guidance::rescale`]. Errors: a share outside of 0 to 1.
    pub fn rescaled(self, share: f64) -> Result<Self> {
        match (0.0..=1.0).contains(&share) {
            true => Ok(Self { rescale: share, ..self }),
            false => Err(Error::usage(format!("guidance_rescale is {share}, expected 0 to 1"))),
        }
    }

    /// Whether the scale is the same at every noise level.
    pub fn is_everywhere(&self) -> bool {
        self.low == 0.0 && self.high == f64::INFINITY
    }

    /// An error where samples of this card are rescaled, and have one value, which has no deviation.
    pub fn check_rescale(&self, card: &TeacherCard) -> Result<()> {
        match self.rescale == 0.0 || self.is_none() || card.sample_len() > 1 {
            true => Ok(()),
            false => Err(Error::usage("guidance_rescale: a sample has one value, and so no standard deviation")
                .hint("leave guidance_rescale out")),
        }
    }

    /// The guidance scale at a noise level; 1 outside of the interval.
    pub fn at(&self, sigma: f64) -> f64 {
        if sigma > self.low && sigma <= self.high { self.scale } else { 1.0 }
    }

    /// Whether there is no guidance at any noise level.
    pub fn is_none(&self) -> bool {
        self.scale == 1.0
    }
}

/// An error unless the network of card `weaker` can guide the one of card `teacher`: both denoise the same samples, and what the weaker
/// one is told the teacher is told too. (Schedule, prediction, time, layout and null values are each network's own.)
pub fn check_weaker(teacher: &TeacherCard, weaker: &TeacherCard) -> Result<()> {
    let differ = |what: &str, a: String, b: String| {
        Err(Error::usage(format!("the weaker network's card has {what} {a}, the teacher's {b}")).hint(
            "it guides a teacher of the same samples; correct <file>.card.toml beside it, or the file's metadata",
        ))
    };
    if weaker.shape != teacher.shape {
        return differ("shape", format!("{:?}", weaker.shape), format!("{:?}", teacher.shape));
    }
    if weaker.latent_scale != teacher.latent_scale {
        return differ("latent_scale", weaker.latent_scale.to_string(), teacher.latent_scale.to_string());
    }
    if let (Some(a), Some(b)) = (weaker.range, teacher.range)
        && a != b
    {
        return differ("range", format!("{a:?}"), format!("{b:?}"));
    }
    let told = |c: &Condition| match c.classes() {
        Some(n) => format!("{n} classes"),
        None => format!("rows of {:?}", c.row_shape()),
    };
    for (name, condition) in &weaker.conditions {
        let theirs = teacher.conditions.get(name).map(told);
        if theirs.as_ref() != Some(&told(condition)) {
            let what = format!("condition `{name}` of");
            return differ(&what, told(condition), theirs.unwrap_or_else(|| "none of that name".into()));
        }
    }
    Ok(())
}

impl From<f64> for Guidance {
    fn from(scale: f64) -> Self {
        Self::everywhere(scale)
    }
}
