//! Classifier-free guidance (Ho & Salimans 2022), within an interval of noise levels where that is wanted (Kynkaanniemi et
//! al. 2024: guidance at high levels costs diversity, at low ones it does nothing).

use crate::error::{Error, Result};

/// `D_u + scale (D_c - D_u)` for `low < sigma <= high`, `D_c` elsewhere.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Guidance {
    /// 1: none.
    pub scale: f64,
    pub low: f64,
    pub high: f64,
}

impl Guidance {
    /// Guidance at every noise level.
    pub fn everywhere(scale: f64) -> Self {
        Self { scale, low: 0.0, high: f64::INFINITY }
    }

    /// Refuses what is no interval of noise levels.
    pub fn new(scale: f64, interval: [f64; 2]) -> Result<Self> {
        let [low, high] = interval;
        if !(low >= 0.0 && low < high) {
            return Err(Error::usage(format!(
                "guidance_interval is [{low}, {high}], expected two noise levels, the second above the first"
            )));
        }
        Ok(Self { scale, low, high })
    }

    /// The scale at a noise level.
    pub fn at(&self, sigma: f64) -> f64 {
        if sigma > self.low && sigma <= self.high { self.scale } else { 1.0 }
    }

    pub fn is_none(&self) -> bool {
        self.scale == 1.0
    }
}

impl From<f64> for Guidance {
    fn from(scale: f64) -> Self {
        Self::everywhere(scale)
    }
}
