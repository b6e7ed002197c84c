//! What a run costs in forward passes of all networks, counted in images.

use crate::distill::config::Config;
use crate::distill::plan;

/// Forward passes of all networks, counted in images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passes {
    /// Forward passes of one step of stage 1.
    pub degrade: u64,
    /// Forward passes of one iteration of stage 2: the student's images and the fake score's training.
    pub iteration: u64,
    /// Forward passes of one generator update, beside the iteration that it is part of.
    pub update: u64,
}

impl Passes {
    /// Forward passes, in images, of a generator update with its `ratio` iterations.
    pub fn of_update(&self, ratio: u64) -> u64 {
        ratio * self.iteration + self.update
    }
}

/// What the configuration costs in forward passes. (A backward pass costs about two; it comes with every pass of the
/// student, of the degrading copy and of the fake score in training, in both arms alike.)
pub fn passes(config: &Config) -> Passes {
    let images = config.images();
    let fake = u64::from(config.has_fake());
    // A student of several steps is trained at one of them, each as often, and the steps before that one are run too.
    let made = images * (config.student.further_steps() as u64 + 2) / 2;
    let gan = u64::from(!config.gan.data.is_empty());
    let judged = if config.gan.shared_pass { 0 } else { gan };
    // (By a weaker network the second pass is that network's, and the teacher's as the target alone: at most so many.)
    let target = if config.guidance == 1.0 { 1 } else { 2 };
    Passes {
        degrade: 2 * images,
        iteration: made + (fake + 2 * gan) * images,
        update: (target + fake + judged) * images,
    }
}

/// Forward passes, in images, of a stage 1 of so many steps, with the looks at its copy where `degrade.nodes` is `auto`.
pub fn stage_one(config: &Config, steps: u64) -> u64 {
    steps * passes(config).degrade + plan::passes_of_looks(config, steps)
}
