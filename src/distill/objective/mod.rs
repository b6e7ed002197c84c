//! What the generator minimises. One small file an objective; a trajectory node replaces the teacher in `target` alone.

mod diff_instruct;
mod dmd;
mod f_distill;
mod sds;
mod sid;
mod sim;
#[cfg(test)]
mod tests;

use tch::{Kind, Tensor};

use crate::distill::config::{Config, ObjectiveKind};
use crate::error::{Error, Result};

pub use diff_instruct::DiffInstruct;
pub use dmd::{Dmd, Dmd2};
pub use f_distill::FDistill;
pub use sds::Sds;
pub use sid::Sid;
pub use sim::Sim;

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
    fn fake(&self) -> Result<&Tensor> {
        self.fake.ok_or_else(|| Error::mismatch("the objective needs a fake score, which is not there"))
    }
}

/// A score-distillation objective.
pub trait Objective: Send + Sync {
    /// The objective's name, as `objective` in the configuration has it.
    fn name(&self) -> &'static str;

    /// Whether the gradient runs through the two denoisers (Fisher-type objectives). If not, they are evaluated without
    /// a graph.
    fn through_scores(&self) -> bool {
        false
    }

    /// Whether there is a fake score to be trained and compared.
    fn needs_fake(&self) -> bool {
        true
    }

    /// Whether samples are weighted by a discriminator's density ratio.
    fn needs_ratio(&self) -> bool {
        false
    }

    /// The loss (rank 0) whose gradient the generator descends. (A GAN's term is added outside.)
    fn loss(&self, terms: &Terms) -> Result<Tensor>;
}

/// The configured objective.
pub fn objective(config: &Config) -> Box<dyn Objective> {
    match config.objective {
        ObjectiveKind::DiffInstruct => Box::new(DiffInstruct),
        ObjectiveKind::Dmd => Box::new(Dmd),
        ObjectiveKind::Dmd2 => Box::new(Dmd2),
        ObjectiveKind::FDistill => Box::new(FDistill { divergence: config.f_distill.divergence }),
        ObjectiveKind::Sds => Box::new(Sds),
        ObjectiveKind::Sid => Box::new(Sid { alpha: config.sid.alpha }),
        ObjectiveKind::Sim => Box::new(Sim { c: config.sim.c }),
    }
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
