//! What the generator minimises. One small file an objective; a trajectory node replaces the teacher in `target` alone.
//! `docs/adding-an-objective.md` says how to add one.

mod choice;
mod diff_instruct;
mod dmd;
mod f_distill;
mod sds;
mod sid;
mod sim;
#[cfg(test)]
mod tests;
mod uni_instruct;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};

pub use choice::Choice;
pub use diff_instruct::DiffInstruct;
pub use dmd::{Dmd, Dmd2};
pub use f_distill::{Divergence, FDistill, FDistillConfig};
pub use sds::Sds;
pub use sid::{Sid, SidConfig};
pub use sim::{Sim, SimConfig};
pub use uni_instruct::{UniInstruct, UniInstructConfig};

/// The objectives of this crate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ObjectiveKind {
    /// Diff-Instruct (Luo et al. 2023), also known as VSD: the gradient `g = D_fake - D_target` of the KL divergence,
    /// which is weighted by sigma^2 in score units.
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
    /// Uni-Instruct (Wang et al. 2025): an f-divergence expanded along the diffusion, SiD's loss weighted by the density ratio.
    UniInstruct,
}

/// Settings of the objectives that have any; each is a section of the configuration.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// Read with `objective = "sid"`.
    pub sid: SidConfig,
    /// Read with `objective = "sim"`.
    pub sim: SimConfig,
    /// Read with `objective = "f-distill"`.
    pub f_distill: FDistillConfig,
    /// Read with `objective = "uni-instruct"`.
    pub uni_instruct: UniInstructConfig,
}

impl Settings {
    /// Refuses numbers that no objective could be computed with.
    pub(crate) fn check(&self) -> Result<()> {
        let c = self.sim.c;
        for (key, alpha) in [("sid.alpha", self.sid.alpha), ("uni_instruct.alpha", self.uni_instruct.alpha)] {
            if !(alpha.is_finite() && alpha >= 0.0) {
                return Err(Error::usage(format!("{key} is {alpha}, expected 0 or more")));
            }
        }
        if !(c.is_finite() && c > 0.0) {
            return Err(Error::usage(format!("sim.c is {c}, expected a number above 0")));
        }
        Ok(())
    }
}

impl ObjectiveKind {
    /// Every objective of this crate.
    pub const ALL: [Self; 8] =
        [Self::Dmd, Self::DiffInstruct, Self::Sid, Self::Sim, Self::Sds, Self::Dmd2, Self::FDistill, Self::UniInstruct];

    /// The objective as it is configured.
    pub fn build(self, settings: &Settings) -> Arc<dyn Objective> {
        match self {
            Self::DiffInstruct => Arc::new(DiffInstruct),
            Self::Dmd => Arc::new(Dmd),
            Self::Dmd2 => Arc::new(Dmd2),
            Self::FDistill => Arc::new(FDistill { divergence: settings.f_distill.divergence }),
            Self::Sds => Arc::new(Sds),
            Self::Sid => Arc::new(Sid { alpha: settings.sid.alpha }),
            Self::Sim => Arc::new(Sim { c: settings.sim.c }),
            Self::UniInstruct => {
                let UniInstructConfig { divergence, alpha, ratio_gradient } = settings.uni_instruct;
                Arc::new(UniInstruct { divergence, alpha, ratio_gradient })
            }
        }
    }

    /// Its name, as `objective` in the configuration has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::DiffInstruct => "diff-instruct",
            Self::Dmd => "dmd",
            Self::Dmd2 => "dmd2",
            Self::FDistill => "f-distill",
            Self::Sds => "sds",
            Self::Sid => "sid",
            Self::Sim => "sim",
            Self::UniInstruct => "uni-instruct",
        }
    }

    /// The objective of this name; `vsd` is another one for Diff-Instruct.
    pub fn named(name: &str) -> Option<Self> {
        let name = if name == "vsd" { "diff-instruct" } else { name };
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// What an objective sees of one micro-batch; samples are f32 `[B, ...shape]` in their clean scale.
pub struct Terms<'a> {
    /// The generator's images, with the generator's graph.
    pub x0: &'a Tensor,
    /// `x_t = x0 + sigma e`, with the generator's graph.
    pub x_t: &'a Tensor,
    /// `e ~ N(0, I)`.
    pub noise: &'a Tensor,
    /// Noise levels, `[B, 1, ...]` of the samples' rank.
    pub sigma: &'a Tensor,
    /// Denoised by the target (a node of the trajectory, or the teacher), guided. It carries the graph of `x_t` where the
    /// objective asks for it ([`Objective::through_scores`]).
    pub target: &'a Tensor,
    /// Denoised by the fake score, never guided; `None` where the objective does without. Graph as `target`'s.
    pub fake: Option<&'a Tensor>,
    /// `log p_data / p_generator` of each `x_t`, `[B, 1, ...]`, without a graph, where the objective asks for it
    /// ([`Objective::needs_ratio`]) and the target is the teacher.
    pub log_ratio: Option<&'a Tensor>,
}

impl Terms<'_> {
    /// The fake score's estimate, for objectives that need one.
    ///
    /// Errors: an objective without a fake score asks for it.
    pub fn fake(&self) -> Result<&Tensor> {
        self.fake.ok_or_else(|| Error::mismatch("the objective needs a fake score, which is not there"))
    }
}

/// A score-distillation objective.
pub trait Objective: Send + Sync {
    /// The objective's name, as `objective` in the configuration has it.
    fn name(&self) -> &str;

    /// Whether the gradient runs through the two denoisers (Fisher-type objectives). If not, they are evaluated without
    /// a graph.
    fn through_scores(&self) -> bool {
        false
    }

    /// Whether there is a fake score to be trained and compared.
    fn needs_fake(&self) -> bool {
        true
    }

    /// Whether it is defined with a discriminator only, so that `gan.data` must be given.
    fn needs_discriminator(&self) -> bool {
        self.needs_ratio()
    }

    /// Whether samples are weighted by a discriminator's density ratio.
    fn needs_ratio(&self) -> bool {
        false
    }

    /// The loss (rank 0) whose gradient the generator descends. (A GAN's term is added outside.)
    fn loss(&self, terms: &Terms) -> Result<Tensor>;
}

/// Keeps 0/0 out where a sample equals its denoised self.
const SMALLEST_DISTANCE: f64 = 1e-8;

/// The mean of `|x0 - D_target|` over each sample, `[B, 1, ...]`, without a graph: the scale by which DMD and SiD divide.
fn distance_to_target(t: &Terms) -> Result<Tensor> {
    let distance = t.x0.detach().f_sub(&t.target.detach())?.f_abs()?;
    Ok(mean_of_each(&distance)?.f_clamp_min(SMALLEST_DISTANCE)?)
}

/// `0.5 mean (x0 - sg[x0 - g])^2`, a loss whose gradient with respect to `x0` is `g / numel`; its value is half the mean
/// square of `g`.
pub fn surrogate(x0: &Tensor, g: &Tensor) -> Result<Tensor> {
    let goal = x0.detach().f_sub(&g.detach())?;
    Ok(x0.f_sub(&goal)?.f_square()?.f_mean(Kind::Float)?.f_mul_scalar(0.5)?)
}

/// Mean over everything but the batch, `[B, 1, 1, ...]`.
pub fn mean_of_each(x: &Tensor) -> Result<Tensor> {
    let dims: Vec<i64> = (1..x.dim() as i64).collect();
    Ok(x.f_mean_dim(dims.as_slice(), true, Kind::Float)?)
}
