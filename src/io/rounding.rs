//! Floats to 8 bits, as the reference implementations do it before they compute features.

/// How a float `x` of [-1, 1] becomes 8 bits, always in f32 arithmetic, cut off at 0 and 255. The choice moves a figure in its
/// second or third digit, so every tool must say which it uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Rounding {
    /// `x * 127.5 + 128`, truncated: EDM, StyleGAN.
    #[default]
    Edm,
    /// `(x + 1) * 127.5`, truncated: ADM (guided-diffusion).
    Adm,
    /// `(x + 1) / 2 * 255 + 0.5`, truncated: torchvision's `save_image`.
    Torchvision,
}

impl Rounding {
    /// The formula as text, for reports.
    pub fn formula(self) -> &'static str {
        match self {
            Self::Edm => "trunc(x * 127.5 + 128)",
            Self::Adm => "trunc((x + 1) * 127.5)",
            Self::Torchvision => "trunc((x + 1) / 2 * 255 + 0.5)",
        }
    }

    /// Value `x` of `range` -> 8 bits.
    pub fn apply(self, x: f64, range: [f64; 2]) -> u8 {
        let unit = ((x - range[0]) / (range[1] - range[0]) * 2.0 - 1.0) as f32;
        let value = match self {
            Self::Edm => unit * 127.5 + 128.0,
            Self::Adm => (unit + 1.0) * 127.5,
            Self::Torchvision => (unit + 1.0) / 2.0 * 255.0 + 0.5,
        };
        // `as` truncates and saturates.
        value.clamp(0.0, 255.0) as u8
    }
}

/// Value `x` of `range` -> 8 bits, as EDM does for [-1, 1].
pub fn quantise(x: f64, range: [f64; 2]) -> u8 {
    Rounding::Edm.apply(x, range)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_the_references() {
        // numpy: (x * 127.5 + 128).clip(0, 255).astype(np.uint8)
        let cases = [
            (-1.0, 0),
            (-0.999, 0),
            (-0.99, 1),
            (0.0, 128),
            (0.5, 191),
            (0.996, 254),
            (1.0, 255),
            (3.0, 255),
            (-3.0, 0),
        ];
        for (x, want) in cases {
            assert_eq!(quantise(x, [-1.0, 1.0]), want, "{x}");
        }
        assert_eq!(quantise(0.5, [0.0, 1.0]), 128);
    }

    #[test]
    fn every_rounding_is_its_references() {
        // numpy f32: (x * 127.5 + 128), ((x + 1) * 127.5), ((x + 1) / 2 * 255 + 0.5), clipped, astype(uint8)
        let cases: [(f64, [u8; 3]); 6] = [
            (-1.0, [0, 0, 0]),
            (-0.5, [64, 63, 64]),
            (0.0, [128, 127, 128]),
            (0.003, [128, 127, 128]),
            (0.996, [254, 254, 254]),
            (1.0, [255, 255, 255]),
        ];
        for (x, want) in cases {
            let got = [Rounding::Edm, Rounding::Adm, Rounding::Torchvision].map(|r| r.apply(x, [-1.0, 1.0]));
            assert_eq!(got, want, "{x}");
        }
    }
}
