//! The networks of stage 2 with their optimisers: one plan, one set of weights each.

use super::averages::Averages;
use crate::diffusion::{Denoiser, Guidance};
use crate::distill::batches::Batches;
use crate::distill::checkpoint::{Checkpoint, named};
use crate::distill::config::Config;
use crate::distill::draws::Draws;
use crate::distill::gan::Gan;
use crate::distill::log::Log;
use crate::distill::nonfinite::{self, Candidate, Finding, Probe};
use crate::distill::objective::Objective;
use crate::distill::student::Student;
use crate::error::{Error, Result};
use crate::torch::dist::{Named, World};
use crate::torch::train::optim::AdamW;

/// The fake score, trained on the student's samples.
pub(super) struct Fake {
    pub network: Denoiser,
    pub adam: AdamW,
}

pub(super) struct Networks {
    /// The slot into which the nodes are copied, one after the other.
    pub target: Denoiser,
    pub student: Student,
    pub adam: AdamW,
    pub averages: Averages,
    /// None where the objective has no use for it.
    pub fake: Option<Fake>,
    pub gan: Option<Gan>,
}

impl Networks {
    /// `student`: the one to begin with, which is taken over. `target`: the slot, see [`super::slot`].
    pub fn new(
        config: &Config,
        (teacher, target): (&Denoiser, Denoiser),
        student: Student,
        batches: &Batches,
        objective: &dyn Objective,
    ) -> Result<Self> {
        let settings = &config.backtrack;
        let gan = Gan::new(config, teacher, batches)?;
        for note in gan.as_ref().map_or(&[][..], Gan::notes) {
            tracing::warn!("gan.data: {note}");
        }
        if objective.needs_ratio() && gan.is_none() {
            return Err(Error::usage(format!("the objective `{}` needs gan.data", objective.name())));
        }
        let averages = Averages::new(config, &student)?;
        student.params().set_requires_grad(true)?;
        let fake = match objective.needs_fake() {
            false => None,
            true => {
                let network = teacher.copy()?;
                network.params().set_requires_grad(true)?;
                let adam = AdamW::new(network.params(), config.adamw(config.fake_lr(), &settings.betas_fake))?;
                Some(Fake { network, adam })
            }
        };
        Ok(Self {
            target,
            adam: AdamW::new(student.params(), config.adamw(settings.lr_generator, &settings.betas_generator))?,
            averages,
            student,
            fake,
            gan,
        })
    }

    /// Takes the gradients of all processes of `world` from now on, see [`AdamW::share`].
    pub fn share(&mut self, world: &World, apart: bool, sharded: bool) -> Result<()> {
        self.adam.share(world, apart, sharded)?;
        if let Some(owners) = self.adam.owners() {
            self.averages.share(owners)?;
        }
        if let Some(fake) = &mut self.fake {
            fake.adam.share(world, apart, sharded)?;
        }
        // (A head is small.)
        self.gan.as_mut().map_or(Ok(()), |gan| gan.adam.share(world, apart, false))
    }

    /// A round of micro-batches of the generator is done, where the iteration updates it.
    pub fn round_generator(&mut self, updates: bool, rows: usize) -> Result<()> {
        if updates { self.adam.round(rows) } else { Ok(()) }
    }

    /// A round of micro-batches of the fake score and of the discriminator is done.
    pub fn round_fake(&mut self, rows: usize) -> Result<()> {
        if let Some(fake) = &mut self.fake {
            fake.adam.round(rows)?;
        }
        self.gan.as_mut().map_or(Ok(()), |gan| gan.adam.round(rows))
    }

    /// Runs `f` while neither the fake score's nor the discriminator's parameters take a gradient.
    pub fn with_frozen<T>(&self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        let sets = [self.fake.as_ref().map(|f| f.network.params()), self.gan.as_ref().map(Gan::params)];
        let switch = |on: bool| sets.iter().flatten().try_for_each(|p| p.set_requires_grad(on));
        switch(false)?;
        let made = f();
        switch(true)?;
        made
    }

    /// One step of the generator and of its averages; `updates` counts this one.
    pub fn step_generator(&mut self, config: &Config, updates: u64, lr_scale: f64, log: &mut Log) -> Result<()> {
        self.adam.step(lr_scale)?;
        self.averages.update(self.student.params(), config, updates)?;
        log.meters.add("grad_norm_generator", self.adam.grad_norm())
    }

    /// One step of the fake score and of the discriminator's head.
    pub fn step_fake(&mut self, lr_scale: f64, log: &mut Log) -> Result<()> {
        if let Some(fake) = &mut self.fake {
            fake.adam.step(lr_scale)?;
            log.meters.add("grad_norm_fake", fake.adam.grad_norm())?;
        }
        match &mut self.gan {
            Some(gan) => gan.adam.step(lr_scale),
            None => Ok(()),
        }
    }

    /// Counts of skipped steps for the next row of metrics.
    pub fn log_skips(&self, log: &mut Log) -> Result<()> {
        log.skips(["skipped_generator", "in_a_row_generator"], &self.adam)?;
        if let Some(fake) = &self.fake {
            log.skips(["skipped_fake", "in_a_row_fake"], &fake.adam)?;
        }
        match &self.gan {
            Some(gan) => log.skips(["skipped_head", "in_a_row_head"], &gan.adam),
            None => Ok(()),
        }
    }

    /// Which network gives what is not finite; `node` is the target's.
    pub fn find_nonfinite(
        &self,
        batches: &Batches,
        draws: &Draws,
        guidance: Guidance,
        node: usize,
    ) -> Result<Option<Finding>> {
        let (name, hint) = match node {
            0 => ("the teacher".to_owned(), nonfinite::TEACHER),
            node => (
                format!("the target, node {node} of the trajectory,"),
                "a teacher that overflows there, or a copy that diverged in stage 1: fewer noise levels (noise.fake), a lower degrade.lr",
            ),
        };
        let levels = &batches.generator_levels;
        let mut candidates = Vec::new();
        candidates.extend(self.target.weaker().map(|network| Candidate {
            name: "the network of guidance_by".into(),
            network,
            levels,
            guidance: 1.0.into(),
            hint: "keep guidance to noise levels that it knows (guidance_interval), or export it anew",
        }));
        candidates.push(Candidate { name, network: &self.target, levels, guidance, hint });
        let hint = "it has diverged: a lower backtrack.lr_fake, a smaller optimizer.clip or a longer optimizer.warmup";
        candidates.extend(self.fake.as_ref().map(|fake| Candidate {
            name: "the fake score".into(),
            network: &fake.network,
            levels: &batches.fake_levels,
            guidance: 1.0.into(),
            hint,
        }));
        let hint =
            "a lower backtrack.lr_generator, a smaller optimizer.clip, or a student.sigma_init that the network knows";
        let judge = self.gan.as_ref().zip(self.fake.as_ref().map(|f| &f.network));
        Probe { batches, draws, student: &self.student, hint, judge }.find_nonfinite(&candidates)
    }

    /// Everything that a checkpoint holds of the networks.
    pub fn tensors(&self) -> Vec<Named> {
        let mut tensors = named("student/", self.student.params(), None);
        tensors.extend(self.adam.state("adam_student/"));
        tensors.extend(self.averages.tensors());
        if let Some(fake) = &self.fake {
            tensors.extend(named("fake/", fake.network.params(), None));
            tensors.extend(fake.adam.state("adam_fake/"));
        }
        if let Some(gan) = &self.gan {
            tensors.extend(named("head/", gan.params(), None));
            tensors.extend(gan.adam.state("adam_head/"));
        }
        tensors
    }

    /// Takes back what [`Networks::tensors`] gave.
    pub fn restore(&mut self, checkpoint: &mut Checkpoint) -> Result<()> {
        checkpoint.take_params("student/", self.student.params(), None)?;
        self.adam.restore("adam_student/", &mut |name| checkpoint.take(name))?;
        self.averages.restore(checkpoint)?;
        if let Some(fake) = &mut self.fake {
            checkpoint.take_params("fake/", fake.network.params(), None)?;
            fake.adam.restore("adam_fake/", &mut |name| checkpoint.take(name))?;
        }
        if let Some(gan) = &mut self.gan {
            checkpoint.take_params("head/", gan.params(), None)?;
            gan.adam.restore("adam_head/", &mut |name| checkpoint.take(name))?;
        }
        Ok(())
    }
}

pub(super) fn average_prefix(k: usize) -> String {
    if k == 0 { "average/".into() } else { format!("average-{k}/") }
}
