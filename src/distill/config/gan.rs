//! The diffusion GAN that goes with an objective.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The diffusion GAN: there is one where `data` is given.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GanConfig {
    /// Real images: a folder or .zip of image files, a .npz, an IDX file, or latents (.npz, .npy, .safetensors); empty: no GAN.
    pub data: String,
    /// Low and high of the floats in `data`, which are mapped to the card's range; empty: they are the teacher's samples.
    pub range: Vec<f64>,
    /// Tensors inside the teacher's graph whose features the discriminator reads: names, or shares of the network's depth as in
    /// `["50%", "75%", "99%"]`, or both. Depth is counted in layers (convolutions and linear layers) on the longest way from the sample's
    /// input; a share is the end of the block (where a skip connection is added) that is nearest to it. `disback inspect --taps` and
    /// `--dry-run` say which tensors those are.
    pub taps: Vec<String>,
    /// What makes logits of the features: `layers`, convolutions or a linear layer of their own for each tap (DMD2), or `channel-mean`,
    /// the mean over the channels at each place, a logit each and no weights (SiDA).
    pub head: HeadKind,
    /// Judges the generator's samples as the objective has noised them, in the objective's own pass of the fake score (SiDA), and not at
    /// levels and noise of their own, which costs a further pass. For objectives that differentiate the scores: `sid`, `sim`,
    /// `uni-instruct`.
    pub shared_pass: bool,
    /// Weight of `softplus(-l(fake))` in the generator's loss.
    pub weight_generator: f64,
    /// Weight of `softplus(l(fake)) + softplus(-l(real))` in the fake score's and the head's loss.
    pub weight_discriminator: f64,
    /// Learning rate of the discriminator's head.
    pub lr: f64,
    /// First and last entry of the table of noise levels at which images are judged.
    pub levels: [usize; 2],
}

/// What makes a discriminator of features.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HeadKind {
    /// Layers of their own for each tap.
    #[default]
    Layers,
    /// The mean over the channels at each place (Zhou et al. 2024, SiDA).
    ChannelMean,
}

/// How data sets of real images are treated.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DataConfig {
    /// Passes over images that cannot be read, each replaced by the next one that can, and counts and names them; otherwise the first
    /// one ends the run.
    pub skip_broken: bool,
}

impl GanConfig {
    /// `range`, where it is given.
    ///
    /// Errors: other than a low and a higher number.
    pub fn said_range(&self) -> Result<Option<[f64; 2]>> {
        match self.range[..] {
            [] => Ok(None),
            [low, high] if low < high => Ok(Some([low, high])),
            _ => Err(Error::usage(format!("gan.range is {:?}: expected [low, high]", self.range))),
        }
    }
}

impl Default for GanConfig {
    fn default() -> Self {
        Self {
            data: String::new(),
            range: Vec::new(),
            taps: Vec::new(),
            head: HeadKind::Layers,
            shared_pass: false,
            weight_generator: 3e-3,
            weight_discriminator: 1e-2,
            lr: 1e-4,
            levels: [0, 999],
        }
    }
}
