//! Classifier-free guidance (Ho & Salimans 2022), within an interval of noise levels where that is wanted (Kynkaanniemi et
//! al. 2024: guidance at high levels costs diversity, at low ones it does nothing).

use crate::error::{Error, Result};

/// `D_u + scale (D_c - D_u)` for `low < sigma <= high`, `D_c` elsewhere.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Guidance {
    /// Guidance scale; 1: no guidance.
    pub scale: f64,
    /// Guidance acts only above this noise level sigma.
    pub low: f64,
    /// Guidance acts up to this noise level sigma, which is included; may be infinite.
    pub high: f64,
}

impl Guidance {
    /// Guidance at every noise level.
    pub fn everywhere(scale: f64) -> Self {
        Self { scale, low: 0.0, high: f64::INFINITY }
    }

    /// Guidance between two noise levels. Errors: an interval that is not `0 <= low < high`.
    pub fn new(scale: f64, interval: [f64; 2]) -> Result<Self> {
        let [low, high] = interval;
        if !(low >= 0.0 && low < high) {
            return Err(Error::usage(format!(
                "guidance_interval is [{low}, {high}], expected two noise levels, the second above the first"
            )));
        }
        Ok(Self { scale, low, high })
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

impl From<f64> for Guidance {
    fn from(scale: f64) -> Self {
        Self::everywhere(scale)
    }
}
