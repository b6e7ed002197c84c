//! The objectives and what they have to be told.

use serde::{Deserialize, Serialize};

/// The score-distillation objective of the generator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ObjectiveKind {
    /// Diff-Instruct (Luo et al. 2023), also known as VSD: the gradient `g = D_fake - D_target` of the KL divergence,
    /// which is weighted by sigma^2 in score units.
    #[serde(alias = "vsd")]
    DiffInstruct,
    /// DMD (Yin et al. 2023): Diff-Instruct's gradient divided by `mean |x - D_target|` of each sample.
    Dmd,
    /// DMD2 (Yin et al. 2024): DMD with a diffusion GAN on the fake score's features; needs `gan.data` and `gan.taps`.
    Dmd2,
    /// f-distill (Xu et al. 2025): DMD2 with each sample weighted by the density ratio of an f-divergence.
    FDistill,
    /// Score distillation sampling (Poole et al. 2022): `w (eps_target - e)`, without a fake score.
    Sds,
    /// Score identity distillation (Zhou et al. 2024): the Fisher divergence, differentiated through both scores.
    Sid,
    /// Score implicit matching (Luo et al. 2024) with the pseudo-Huber distance, differentiated through the fake score.
    Sim,
}

/// The f-divergences of f-distill by their weight `h(r) = r^2 f''(r)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Divergence {
    /// `h = 1`: DMD2.
    ReverseKl,
    /// `h = r`.
    ForwardKl,
    /// `h = r / (1 + r)`.
    JensenShannon,
    /// `h = sqrt r`.
    SquaredHellinger,
    /// `h = 1 + r`.
    Jeffreys,
}

/// `objective = "f-distill"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FDistillConfig {
    /// The f-divergence that weights the samples.
    pub divergence: Divergence,
}

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

/// `objective = "sid"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SidConfig {
    /// Weight of the squared distance between the scores that is taken off the projected one; 1.0 to 1.2 in the paper.
    pub alpha: f64,
}

/// `objective = "sim"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SimConfig {
    /// Softening of the pseudo-Huber distance `sqrt(|y|^2 + c^2) - c` between scores.
    pub c: f64,
}

impl Default for FDistillConfig {
    fn default() -> Self {
        Self { divergence: Divergence::JensenShannon }
    }
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
impl Default for SidConfig {
    fn default() -> Self {
        Self { alpha: 1.2 }
    }
}
impl Default for SimConfig {
    fn default() -> Self {
        Self { c: 0.01 }
    }
}
