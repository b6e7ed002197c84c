//! Stage 2, distribution backtracking: score distillation towards the nodes of the trajectory in reverse, the teacher
//! last.

mod averages;
mod generator;
mod networks;
mod slot;
mod switching;

use std::sync::Arc;

use tch::{Kind, Tensor};

use self::networks::Networks;
use self::slot::Slot;
use crate::diffusion::{Conditions, Denoiser, Form, Guidance};
use crate::distill::batches::Batches;
use crate::distill::checkpoint::{Checkpoint, StageKind, State};
use crate::distill::config::{Config, CooldownShape};
use crate::distill::debug_batch::DebugBatch;
use crate::distill::draws::{Draws, Phase, Purpose};
use crate::distill::inputs::Inputs;
use crate::distill::job::{Job, recorder};
use crate::distill::log::{At, Log};
use crate::distill::nonfinite::Finding;
use crate::distill::objective::Objective;
use crate::distill::observer::Running;
use crate::distill::plan;
use crate::distill::prefetch::Nodes;
use crate::distill::stage::{self, Ended, Measured, Stage, lasting};
use crate::distill::student::Student;
use crate::distill::trajectory::Trajectory;
use crate::error::{Error, Result};
use crate::torch::dist::{Named, World};
use crate::torch::train::cuda_graph::Recorder;

/// Distils back along `trajectory`, or goes on from a checkpoint. Gives the student with its averaged weights, or `None`
/// where it was stopped from outside, with a checkpoint. In the meantime the teacher has the target's weights; of several processes
/// it keeps them after an error.
pub fn backtrack(
    job: &mut Job,
    teacher: &Denoiser,
    trajectory: &Trajectory,
    resume: Option<Checkpoint>,
) -> Result<Option<Student>> {
    let (slot, target) = Slot::lend(teacher, job.config.narrow_target())?;
    let outcome = Backtrack::new(job, (teacher, target), trajectory, resume).and_then(|(mut stage, state)| {
        match stage::run(&mut stage, job, state)? {
            Ended::Stopped => Ok(None),
            Ended::Finished => stage.finish(job).map(Some),
        }
    });
    // (Processes that have not all failed alike have nothing to tell each other any more.)
    if outcome.is_ok() || job.world.is_alone() {
        let given_back = slot.give_back(trajectory, &job.world);
        return outcome.and_then(|student| given_back.map(|()| student));
    }
    outcome
}

/// The guidance of a node of the trajectory. A weaker network guides the teacher (node 0) alone: a node is no model of the data, from
/// which that network's own faults would lead away.
pub fn guidance_of(configured: Guidance, teacher: &Denoiser, node: usize) -> Guidance {
    if node > 0 && teacher.weaker().is_some() { Guidance::everywhere(1.0) } else { configured }
}

/// Stage 2 as it runs.
struct Backtrack<'a> {
    config: &'a Config,
    teacher: &'a Denoiser,
    batches: Batches,
    objective: Arc<dyn Objective>,
    guidance: Guidance,
    networks: Networks,
    nodes: Nodes<'a>,
    last: usize,
    /// Generator updates of each target, where they are counted.
    every: u64,
    /// Node that the target's slot holds.
    target: usize,
    /// Sum of the score mismatch since the switching rule last read it: f32, so that a checkpoint holds it exactly.
    mismatch_sum: Tensor,
    /// That sum before the present iteration.
    marked_sum: Tensor,
    recorder: Recorder<Inputs>,
    form: Form,
    step: Iteration,
}

/// What holds for the present iteration.
#[derive(Debug, Clone, Copy, Default)]
struct Iteration {
    /// Generator updates before it.
    update: u64,
    /// Whether it updates the generator.
    updates_generator: bool,
    /// Factors of the learning rates of the generator and of the fake score, and the generator's rate.
    scale: f64,
    scale_fake: f64,
    lr: f64,
}

impl<'a> Backtrack<'a> {
    /// The networks as stage 2 begins with them, or as a checkpoint has them, and the first target.
    fn new<'j: 'a>(
        job: &mut Job<'j>,
        (teacher, target): (&'a Denoiser, Denoiser),
        trajectory: &'a Trajectory,
        resume: Option<Checkpoint>,
    ) -> Result<(Self, State)> {
        let config = job.config;
        let guidance = config.target_guidance()?;
        if !guidance.is_none() {
            teacher.check_guidance()?;
        }
        let batches = Batches::new(config, teacher)?;
        let objective = config.built_objective()?;
        let mut networks = Networks::new(config, (teacher, target), job.initial(teacher)?, &batches, &*objective)?;
        networks.share(&job.world, config.sums_apart(batches.device), config.distributed.shares_states())?;
        if config.narrow_target() {
            slot::narrow(&networks.target)?;
        }
        networks.target.network().configure(config.target_compute());
        let mut mismatch_sum = Tensor::f_zeros([0i64; 0], (Kind::Float, batches.device))?;
        let last = trajectory.last();
        let every = match config.degrade.nodes.is_auto() {
            true => plan::hold(trajectory.nodes()[last].iteration, last),
            false => config.backtrack.switch_every,
        };
        let state = match resume {
            Some(mut checkpoint) => {
                networks.restore(&mut checkpoint)?;
                mismatch_sum.f_copy_(&checkpoint.take("mismatch_sum")?)?;
                let state = checkpoint.state.clone();
                checkpoint.finish()?;
                state
            }
            None => {
                // The fake score starts from the degraded end, which fits the student's first samples.
                if let Some(fake) = &networks.fake {
                    trajectory.load_shared(&job.world, last, fake.network.params())?;
                }
                let target = last.saturating_sub(1);
                State { target, ..State::new(StageKind::Backtrack, trajectory.teacher_hash()) }
            }
        };
        let (recorder, form) = recorder(config, batches.device)?;
        let mut nodes = Nodes::new(trajectory, batches.device, &job.world);
        nodes.load(state.target, networks.target.params())?;
        job.observer.target_entered(state.target, &networks.target)?;
        let (target, step) = (state.target, Iteration::default());
        let stage = Self {
            config,
            teacher,
            batches,
            objective,
            guidance,
            networks,
            nodes,
            last,
            every,
            target,
            marked_sum: mismatch_sum.shallow_clone(),
            mismatch_sum,
            recorder,
            form,
            step,
        };
        Ok((stage, state))
    }

    /// The student with its averaged weights; the other averages are saved.
    fn finish(self, job: &Job) -> Result<Student> {
        let Networks { averages, student, .. } = self.networks;
        let mut averages = averages.into_whole(&job.world, student.params())?.into_iter();
        let first = averages.next().map(|a| a.student);
        for average in averages.filter(|_| job.world.leads()) {
            average.student.weights()?.save(&job.run.average_weights(average.half_life))?;
        }
        first.ok_or_else(|| Error::mismatch("a run without an average of the student"))
    }

    /// The share of one micro-batch in an iteration.
    fn share(&self) -> f64 {
        1.0 / self.config.accumulate as f64
    }

    /// Images of the student, and its gradients: one batch of images serves both updates.
    fn generator_pass(
        &mut self,
        job: &mut Job,
        since: u64,
        micro: usize,
        (draws, conditions): (&Draws, &Conditions),
        measured: &mut Measured,
    ) -> Result<Tensor> {
        let share = self.share();
        let update = self.step.update;
        let Self { config, batches, networks, objective, recorder, target, .. } = self;
        let (networks, batches) = (&*networks, &*batches);
        let guidance = guidance_of(self.guidance, self.teacher, *target);
        let (inputs, sigmas) = generator::inputs(networks, batches, draws, conditions, guidance, self.form)?;
        let first = update == since && micro == 0;
        let last_of_all = update + 1 == config.backtrack.updates && micro == 0;
        let shown = first || last_of_all;
        let mut seen = None;
        let mut piece = |inputs: &Inputs| -> Result<Vec<Tensor>> {
            let x0 = networks.student.training_images(draws, &inputs.from, &inputs.conditions)?;
            let batch = generator::Batch { batches, draws, x0: &x0, inputs };
            let made = generator::loss(networks, &**objective, &batch, *target == 0)?;
            let mut results = vec![x0.detach(), made.mismatch, made.gap, made.loss.detach()];
            let mut loss = made.loss;
            if let Some(gan) = &made.gan {
                results.push(gan.detach());
                loss = loss.f_add(gan)?;
            }
            if shown {
                let gradient = Tensor::f_run_backward(&[&loss], &[&x0], true, false)?;
                let gradient = gradient.into_iter().next().map_or_else(|| x0.f_zeros_like(), Ok)?;
                seen = Some((made.seen, gradient));
            }
            loss.f_mul_scalar(share)?.f_backward()?;
            Ok(results)
        };
        let mut results = match shown {
            true => piece(&inputs)?,
            false => recorder.run("generator", inputs, Some(networks.student.params()), &mut piece)?,
        };
        for (name, value) in ["mismatch", "gap", "loss_generator", "loss_gan"].into_iter().zip(&results[1..]) {
            measured.push((name, lasting(value, recorder.records())?));
        }
        if let Some(((x_t, target_x0, fake), gradient)) = seen {
            let shown = DebugBatch { sigmas, x_t, target: target_x0, fake, gradient };
            job.observer.debug_batch(*target, update, &shown)?;
        }
        Ok(results.swap_remove(0))
    }

    /// Images of the student alone.
    fn images(&mut self, draws: &Draws, conditions: &Conditions) -> Result<Tensor> {
        let Self { batches, networks, recorder, .. } = self;
        let student = &networks.student;
        let z = batches.latent(draws, student)?;
        let images = |i: &Inputs| tch::no_grad(|| student.training_images(draws, &i.from, &i.conditions));
        let inputs = Inputs::new(&z, conditions, None);
        Ok(recorder.run("images", inputs, None, &mut |i| Ok(vec![images(i)?]))?.swap_remove(0))
    }

    /// Gradients of the fake score and of the discriminator on these images.
    fn fake_pass(
        &mut self,
        x0: &Tensor,
        draws: &Draws,
        conditions: &Conditions,
        measured: &mut Measured,
    ) -> Result<()> {
        let share = self.share();
        let Self { batches, networks, recorder, form, .. } = self;
        let Some(fake) = &networks.fake else { return Ok(()) };
        let (levels, purposes) = (&batches.fake_levels, [Purpose::FakeSigma, Purpose::FakeNoise]);
        let noised = batches.noised(draws, levels, purposes, &fake.network, *form)?;
        let inputs = Inputs::new(x0, conditions, Some(noised));
        let made = recorder.run("fake", inputs, Some(fake.network.params()), &mut |inputs| {
            let loss = inputs.loss(&fake.network, &inputs.from)?;
            loss.f_mul_scalar(share)?.f_backward()?;
            Ok(vec![loss.detach()])
        })?;
        measured.push(("loss_fake", lasting(&made[0], recorder.records())?));
        if let Some(gan) = &networks.gan {
            let loss = gan.discriminator_loss(&fake.network, batches, draws, x0, conditions)?;
            loss.f_mul_scalar(share)?.f_backward()?;
            measured.push(("loss_discriminator", loss.detach()));
        }
        Ok(())
    }
}

impl Stage for Backtrack<'_> {
    fn kind(&self) -> StageKind {
        StageKind::Backtrack
    }
    fn total(&self) -> u64 {
        self.config.backtrack.updates * self.config.backtrack.ratio
    }
    fn last_node(&self) -> Option<usize> {
        Some(self.last)
    }

    /// Switches to the next target where it is time, and sets the learning rates.
    fn begin(&mut self, job: &mut Job, state: &mut State, log: &mut Log) -> Result<()> {
        let settings = &self.config.backtrack;
        let update = state.iteration / settings.ratio;
        if let Some(next) = switching::next_target(job, state, update, (self.last, self.every), &mut self.mismatch_sum)?
        {
            log.progress.note(&format!("update {update}: target {} -> {next}", state.target));
            self.gather(&job.world)?;
            job.observer.target_left(state.target, self.networks.averages.first())?;
            self.let_go()?;
            self.nodes.load(next, self.networks.target.params())?;
            (state.target, state.target_since, self.target) = (next, update, next);
            job.observer.target_entered(next, &self.networks.target)?;
        }
        let scale = |share: f64| cooldown(update, settings.updates, share, settings.cooldown_shape);
        let of_fake = if settings.cooldown_fake < 0.0 { settings.cooldown } else { settings.cooldown_fake };
        self.step = Iteration {
            update,
            updates_generator: (state.iteration + 1).is_multiple_of(settings.ratio),
            scale: scale(settings.cooldown),
            scale_fake: scale(of_fake),
            lr: self.networks.adam.lr(scale(settings.cooldown)),
        };
        Ok(())
    }

    fn micro_batch(&mut self, job: &mut Job, state: &State, micro: usize, rows: usize) -> Result<Measured> {
        let draws = self.batches.draws(Phase::Backtrack, state.iteration, micro);
        let conditions = self.batches.conditions(&draws, self.teacher)?;
        let mut measured = Measured::new();
        let x0 = match self.step.updates_generator {
            true => self.generator_pass(job, state.target_since, micro, (&draws, &conditions), &mut measured)?,
            false => self.images(&draws, &conditions)?,
        };
        // (The generator's gradients are on their way to the others while the fake score computes.)
        self.networks.round_generator(self.step.updates_generator, rows)?;
        self.fake_pass(&x0, &draws, &conditions, &mut measured)?;
        self.networks.round_fake(rows)?;
        Ok(measured)
    }

    fn idle(&mut self, rows: usize) -> Result<()> {
        self.networks.round_generator(self.step.updates_generator, rows)?;
        self.networks.round_fake(rows)
    }

    fn measured(&mut self, all: &[Measured]) -> Result<()> {
        let share = self.share();
        for (_, mismatch) in all.iter().flatten().filter(|(name, _)| *name == "mismatch") {
            // (Not in place: the loop may hold on to the sum of before.)
            self.mismatch_sum = tch::no_grad(|| self.mismatch_sum.f_add(&mismatch.f_mul_scalar(share)?))?;
        }
        Ok(())
    }

    fn update(&mut self, _state: &State, log: &mut Log) -> Result<()> {
        let Iteration { update, updates_generator, scale, scale_fake, .. } = self.step;
        if updates_generator {
            self.networks.step_generator(self.config, update + 1, scale, log)?;
        }
        self.networks.step_fake(scale_fake, log)
    }

    fn mark(&mut self) {
        self.marked_sum = self.mismatch_sum.shallow_clone();
    }

    fn rewind(&mut self) {
        self.mismatch_sum = self.marked_sum.shallow_clone();
    }

    fn device(&self) -> tch::Device {
        self.batches.device
    }

    fn after_update(&mut self, _job: &mut Job, _state: &mut State, _log: &mut Log) -> Result<bool> {
        Ok(false)
    }

    fn at(&self, state: &State) -> At {
        At {
            iteration: state.iteration,
            node: self.target,
            lr: self.step.lr,
            updates: state.iteration / self.config.backtrack.ratio,
            images: state.iteration * self.config.images(),
        }
    }

    fn updated_generator(&self) -> bool {
        self.step.updates_generator
    }

    fn log_skips(&self, log: &mut Log) -> Result<()> {
        self.networks.log_skips(log)
    }

    fn find_nonfinite(&self, state: &State) -> Result<Option<Finding>> {
        let draws = self.batches.draws(Phase::Backtrack, state.iteration - 1, 0);
        let guidance = guidance_of(self.guidance, self.teacher, self.target);
        self.networks.find_nonfinite(&self.batches, &draws, guidance, self.target)
    }

    fn running(&self) -> Option<Running<'_>> {
        let networks = &self.networks;
        Some(Running {
            student: &networks.student,
            average: networks.averages.first(),
            others: networks.averages.others(),
            target: &networks.target,
            fake: networks.fake.as_ref().map(|f| &f.network),
        })
    }

    fn is_shared_out(&self) -> bool {
        self.networks.averages.are_shared()
    }

    fn gather(&mut self, world: &World) -> Result<()> {
        self.networks.averages.gather(world, self.networks.student.params())
    }

    fn let_go(&mut self) -> Result<()> {
        self.networks.averages.let_go()
    }

    fn tensors(&self) -> Vec<Named> {
        let mut tensors = self.networks.tensors();
        tensors.push(Named::new("mismatch_sum", &self.mismatch_sum));
        tensors
    }

    fn ends_with_a_checkpoint(&self) -> bool {
        true
    }
}

/// Factor of a learning rate at a generator update: 1, then falling to 0 over the last `share` of them.
fn cooldown(update: u64, updates: u64, share: f64, shape: CooldownShape) -> f64 {
    let length = updates as f64 * share;
    let left = if length < 1.0 { 1.0 } else { ((updates - update) as f64 / length).min(1.0) };
    match shape {
        CooldownShape::Linear => left,
        CooldownShape::Cosine => 0.5 - 0.5 * (std::f64::consts::PI * left).cos(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn learning_rates_cool_down_over_the_last_share() {
        let rates: Vec<f64> =
            [0, 400, 401, 500, 599].iter().map(|&u| cooldown(u, 600, 1.0 / 3.0, CooldownShape::Linear)).collect();
        for (rate, expected) in rates.iter().zip([1.0, 1.0, 0.995, 0.5, 0.005]) {
            assert!((rate - expected).abs() < 1e-12, "{rates:?}");
        }
        assert_eq!(cooldown(599, 600, 0.0, CooldownShape::Linear), 1.0);
        let half = |u| cooldown(u, 600, 0.5, CooldownShape::Cosine);
        assert_eq!((half(0), half(300)), (1.0, 1.0));
        assert!((half(450) - 0.5).abs() < 1e-12 && half(599) < 1e-4, "{} {}", half(450), half(599));
    }
}
