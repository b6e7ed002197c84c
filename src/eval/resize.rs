//! Resizing of images for feature networks, by the filters that published scores were made with. The filter moves a Frechet
//! distance by more than most methods differ (Parmar et al. 2022), so it is named, never chosen in silence.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How images are brought to the network's size. All work on floats without rounding in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Filter {
    /// Bilinear between pixel centres, no widening when it shrinks: PyTorch's `interpolate(mode="bilinear",
    /// align_corners=False)`, as pytorch-fid does.
    Bilinear,
    /// Bilinear with the corner as origin, as TensorFlow 1's Inception graph does (the original FID, StyleGAN, EDM).
    BilinearTf1,
    /// Triangle filter widened when it shrinks: PIL's BILINEAR.
    BilinearAntialias,
    /// Cubic filter (a = -0.5) widened when it shrinks: PIL's BICUBIC on floats, as clean-fid, DINOv2 and CLIP scores use it.
    BicubicAntialias,
    /// Mean over the area: PIL's BOX.
    Box,
}

impl Filter {
    const ALL: [(Self, &'static str); 5] = [
        (Self::Bilinear, "bilinear"),
        (Self::BilinearTf1, "bilinear-tf1"),
        (Self::BilinearAntialias, "bilinear-antialias"),
        (Self::BicubicAntialias, "bicubic-antialias"),
        (Self::Box, "box"),
    ];

    /// The filter's name in a feature card, such as `bicubic-antialias`.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(f, _)| *f == self).map_or("", |(_, n)| n)
    }

    /// Source pixels and weights of output pixel `i`.
    fn taps(self, i: usize, input: usize, output: usize) -> Vec<(usize, f64)> {
        let scale = input as f64 / output as f64;
        let two = |at: f64| {
            let at = at.clamp(0.0, (input - 1) as f64);
            let low = at.floor() as usize;
            let share = at - low as f64;
            vec![(low, 1.0 - share), ((low + 1).min(input - 1), share)]
        };
        let (support, kernel): (f64, fn(f64) -> f64) = match self {
            Self::Bilinear => return two((i as f64 + 0.5) * scale - 0.5),
            Self::BilinearTf1 => return two(i as f64 * scale),
            Self::BilinearAntialias => (1.0, |x| (1.0 - x.abs()).max(0.0)),
            Self::BicubicAntialias => (2.0, |x| {
                let (x, a) = (x.abs(), -0.5);
                if x < 1.0 {
                    ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
                } else if x < 2.0 {
                    (((x - 5.0) * x + 8.0) * x - 4.0) * a
                } else {
                    0.0
                }
            }),
            Self::Box => (0.5, |x| if x > -0.5 && x <= 0.5 { 1.0 } else { 0.0 }),
        };
        let stretch = scale.max(1.0);
        let centre = (i as f64 + 0.5) * scale;
        let reach = support * stretch;
        let first = (centre - reach + 0.5).max(0.0) as usize;
        let last = ((centre + reach + 0.5) as usize).min(input);
        let weights: Vec<f64> = (first..last).map(|k| kernel((k as f64 - centre + 0.5) / stretch)).collect();
        let sum: f64 = weights.iter().sum();
        (first..last).zip(weights).map(|(k, w)| (k, w / sum)).collect()
    }
}

impl FromStr for Filter {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.iter().find(|(_, n)| *n == text).map(|(f, _)| *f).ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|(_, n)| *n).collect();
            Error::usage(format!("resize filter `{text}`: expected one of {}", names.join(", ")))
        })
    }
}

/// A resize from one size to another, its weights worked out once.
pub struct Resizer {
    from: [usize; 2],
    to: [usize; 2],
    rows: Vec<Vec<(usize, f64)>>,
    columns: Vec<Vec<(usize, f64)>>,
}

impl Resizer {
    /// Heights and widths.
    pub fn new(filter: Filter, from: [usize; 2], to: [usize; 2]) -> Self {
        let taps = |k: usize| (0..to[k]).map(|i| filter.taps(i, from[k], to[k])).collect();
        Self { from, to, rows: taps(0), columns: taps(1) }
    }

    /// Resizes one plane [H, W], rows first by columns, then by rows (PIL's order).
    pub fn plane(&self, plane: &[f32]) -> Vec<f32> {
        let ([_, w], [oh, ow]) = (self.from, self.to);
        let sum = |taps: &[(usize, f64)], at: &dyn Fn(usize) -> f32| -> f32 {
            taps.iter().map(|&(k, weight)| f64::from(at(k)) * weight).sum::<f64>() as f32
        };
        let mut narrow = Vec::with_capacity(self.from[0] * ow);
        for line in plane.chunks_exact(w) {
            narrow.extend(self.columns.iter().map(|taps| sum(taps, &|k| line[k])));
        }
        let mut out = Vec::with_capacity(oh * ow);
        for taps in &self.rows {
            out.extend((0..ow).map(|x| sum(taps, &|k| narrow[k * ow + x])));
        }
        out
    }
}
