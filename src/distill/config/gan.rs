//! The diffusion GAN that goes with an objective.

use serde::{Deserialize, Serialize};

/// The diffusion GAN: there is one where `data` is given.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GanConfig {
    /// Real images: a folder or .zip of PNG files, a .npz, or latents (.npz, .npy, .safetensors); empty: no GAN.
    pub data: String,
    /// Names of tensors inside the teacher's graph whose features the discriminator reads.
    pub taps: Vec<String>,
    /// Weight of `softplus(-l(fake))` in the generator's loss.
    pub weight_generator: f64,
    /// Weight of `softplus(l(fake)) + softplus(-l(real))` in the fake score's and the head's loss.
    pub weight_discriminator: f64,
    /// Learning rate of the discriminator's head.
    pub lr: f64,
    /// First and last entry of the table of noise levels at which images are judged.
    pub levels: [usize; 2],
}

/// How data sets of real images are treated.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DataConfig {
    /// Passes over images that cannot be read, each replaced by the next one that can, and counts and names them; otherwise the first
    /// one ends the run.
    pub skip_broken: bool,
}

impl Default for GanConfig {
    fn default() -> Self {
        Self {
            data: String::new(),
            taps: Vec::new(),
            weight_generator: 3e-3,
            weight_discriminator: 1e-2,
            lr: 1e-4,
            levels: [0, 999],
        }
    }
}
