//! Stage 2, distribution backtracking: score distillation towards the nodes of the trajectory in reverse, the teacher
//! last.

use tch::{Kind, Tensor};

use crate::diffusion::{Conditions, Denoiser};
use crate::distill::checkpoint::{Checkpoint, Stage, State, named};
use crate::distill::config::Switch;
use crate::distill::draws::{Draws, Phase, Use};
use crate::distill::objective::{Objective, Terms, objective};
use crate::distill::student::Student;
use crate::distill::trainer::{At, Batches, Job, Log, adamw, column, denoising_loss, weights};
use crate::distill::trajectory::{Trajectory, target_by_count};
use crate::error::Result;
use crate::torch::ema;
use crate::torch::optim::AdamW;

/// Relative fall of the mismatch below which it counts as not falling.
const FALL: f32 = 0.02;

/// The networks of stage 2: one plan, four sets of weights.
struct Networks {
    /// The slot into which the nodes are copied, one after the other.
    target: Denoiser,
    fake: Denoiser,
    student: Student,
    /// The student's averaged weights (f32).
    average: Student,
}

/// Distils back along `trajectory`, or goes on from a checkpoint. Gives the student with its averaged weights, or `None`
/// where it was stopped from outside, with a checkpoint.
pub fn backtrack(
    job: &mut Job,
    teacher: &Denoiser,
    trajectory: &Trajectory,
    resume: Option<Checkpoint>,
) -> Result<Option<Student>> {
    let config = job.config;
    let settings = &config.backtrack;
    if config.guidance != 1.0 {
        teacher.check_guidance()?;
    }
    let batches = Batches::new(config, teacher)?;
    let objective = objective(config.objective);
    let nets = Networks {
        target: teacher.copy()?,
        fake: teacher.copy()?,
        student: Student::new(teacher.copy()?, &config.student)?,
        average: Student::new(teacher.copy()?, &config.student)?,
    };
    nets.fake.params().set_requires_grad(true)?;
    nets.student.params().set_requires_grad(true)?;
    let mut adam_fake = AdamW::new(nets.fake.params(), adamw(config, settings.lr_fake))?;
    let mut adam_student = AdamW::new(nets.student.params(), adamw(config, settings.lr_generator))?;
    // Sum of the mismatch since the last look at it: f32, so that a checkpoint holds it exactly.
    let mut looked = Tensor::f_zeros([0i64; 0], (Kind::Float, batches.device))?;

    let last = trajectory.last();
    let mut state = match resume {
        Some(mut checkpoint) => {
            checkpoint.take_params("student/", nets.student.params())?;
            checkpoint.take_params("average/", nets.average.params())?;
            checkpoint.take_params("fake/", nets.fake.params())?;
            adam_student.restore("adam_student/", &mut |name| checkpoint.take(name))?;
            adam_fake.restore("adam_fake/", &mut |name| checkpoint.take(name))?;
            looked.f_copy_(&checkpoint.take("looked")?)?;
            let state = checkpoint.state.clone();
            checkpoint.finish()?;
            state
        }
        None => {
            // The fake score starts from the degraded end, which fits the student's first samples.
            trajectory.load(last, nets.fake.params())?;
            State { target: last.saturating_sub(1), ..State::new(Stage::Backtrack, trajectory.teacher_hash()) }
        }
    };
    trajectory.load(state.target, nets.target.params())?;
    job.observer.target_entered(state.target, &nets.target)?;

    let images = config.images();
    let total = settings.updates * settings.ratio;
    let mut log = Log::new(job, &state, total, last, state.iteration * images)?;
    while state.iteration < total {
        let update = state.iteration / settings.ratio;
        let generator_steps = (state.iteration + 1).is_multiple_of(settings.ratio);
        if let Some(next) = next_target(job, &mut state, update, last, &mut looked)? {
            log.progress.note(&format!("update {update}: target {} -> {next}", state.target));
            job.observer.target_left(state.target, &nets.average)?;
            trajectory.load(next, nets.target.params())?;
            (state.target, state.target_since) = (next, update);
            job.observer.target_entered(next, &nets.target)?;
        }
        let scale = cooldown(update, settings.updates, settings.cooldown);
        let lr = adam_student.lr(scale);
        for micro in 0..config.accumulate {
            let draws = batches.draws(Phase::Backtrack, state.iteration, micro);
            let conditions = batches.conditions(&draws, teacher)?;
            let z = batches.noise(&draws, Use::Latent)?;
            let share = 1.0 / config.accumulate as f64;
            // One batch of images for both updates.
            let x0 = if generator_steps {
                let x0 = nets.student.generate(&z, &conditions)?;
                let (loss, mismatch) =
                    generator_loss(&nets, &*objective, &batches, &draws, &x0, &conditions, config.guidance)?;
                log.meters.add("loss_generator", &loss)?;
                log.meters.add("mismatch", &mismatch)?;
                looked = tch::no_grad(|| looked.f_add(&mismatch.f_mul_scalar(share)?))?;
                loss.f_mul_scalar(share)?.f_backward()?;
                x0.detach()
            } else {
                tch::no_grad(|| nets.student.generate(&z, &conditions))?
            };
            let sigmas = draws.sigmas(Use::FakeSigma, &batches.fake_levels, batches.batch);
            let noise = batches.noise(&draws, Use::FakeNoise)?;
            let loss = denoising_loss(&nets.fake, &x0, &sigmas, &noise, &conditions)?;
            log.meters.add("loss_fake", &loss)?;
            loss.f_mul_scalar(share)?.f_backward()?;
        }
        if generator_steps {
            adam_student.step(scale)?;
            let decay = ema::decay(images, (update + 1) * images, config.ema.half_life, config.ema.ramp);
            tch::no_grad(|| ema::update(nets.average.params(), nets.student.params(), decay))?;
            log.meters.add("grad_norm_generator", adam_student.grad_norm())?;
        }
        adam_fake.step(scale)?;
        log.meters.add("grad_norm_fake", adam_fake.grad_norm())?;
        state.iteration += 1;
        let done = state.iteration;
        log.progress.tick(done);

        if done.is_multiple_of(config.log.every) || done == total {
            log.skips(["skipped_fake", "in_a_row_fake"], &adam_fake)?;
            log.skips(["skipped_generator", "in_a_row_generator"], &adam_student)?;
            let at =
                At { iteration: done, node: state.target, lr, updates: done / settings.ratio, images: done * images };
            log.row(at, job.observer)?;
        }
        let stop = job.stopped() && done < total;
        let due = config.log.checkpoint_every > 0 && done.is_multiple_of(config.log.checkpoint_every);
        if stop || due || done == total {
            let mut tensors = named("student/", nets.student.params());
            tensors.extend(named("average/", nets.average.params()));
            tensors.extend(named("fake/", nets.fake.params()));
            tensors.extend(adam_student.state("adam_student/"));
            tensors.extend(adam_fake.state("adam_fake/"));
            tensors.push(("looked".into(), looked.shallow_clone()));
            log.checkpoint(job, &mut state, &tensors)?;
        }
        if stop {
            log.progress.finish();
            return Ok(None);
        }
    }
    log.progress.finish();
    Ok(Some(nets.average))
}

/// The generator's loss on its images `x0`, and the score mismatch to the target (both rank 0): the excess of the
/// target's denoising loss over the fake score's on the student's samples.
fn generator_loss(
    nets: &Networks,
    objective: &dyn Objective,
    batches: &Batches,
    draws: &Draws,
    x0: &Tensor,
    conditions: &Conditions,
    guidance: f64,
) -> Result<(Tensor, Tensor)> {
    let sigmas = draws.sigmas(Use::GeneratorSigma, &batches.generator_levels, batches.batch);
    let sigma = column(&sigmas, batches.device)?;
    let x_t = x0.f_add(&batches.noise(draws, Use::GeneratorNoise)?.f_mul(&sigma)?)?;
    let (target, fake, mismatch) = tch::no_grad(|| -> Result<_> {
        // Guidance is the target's alone.
        let target = nets.target.guided(&x_t, &sigmas, conditions, guidance)?;
        let fake = nets.fake.denoise(&x_t, &sigmas, conditions)?;
        let excess = target.f_sub(x0)?.f_square()?.f_sub(&fake.f_sub(x0)?.f_square()?)?;
        let mismatch = excess.f_mul(&weights(&nets.target, &sigmas, batches.device)?)?.f_mean(Kind::Float)?;
        Ok((target, fake, mismatch))
    })?;
    let loss = objective.loss(&Terms { x0, x_t: &x_t, sigma: &sigma, target: &target, fake: &fake })?;
    Ok((loss, mismatch))
}

/// Factor of both learning rates at a generator update: 1, then falling linearly to 0 over the last `share` of them.
fn cooldown(update: u64, updates: u64, share: f64) -> f64 {
    let length = updates as f64 * share;
    if length < 1.0 { 1.0 } else { ((updates - update) as f64 / length).min(1.0) }
}

/// The next target, where it is time to switch before generator update `update`.
fn next_target(job: &Job, state: &mut State, update: u64, last: usize, looked: &mut Tensor) -> Result<Option<usize>> {
    let settings = &job.config.backtrack;
    if !state.iteration.is_multiple_of(settings.ratio) {
        return Ok(None);
    }
    match settings.switch {
        Switch::Count => {
            let target = target_by_count(update, settings.switch_every, last);
            Ok((target != state.target).then_some(target))
        }
        Switch::Mismatch => {
            let spent = update - state.target_since;
            if state.target == 0 || spent == 0 || !spent.is_multiple_of(settings.switch_every) {
                return Ok(None);
            }
            let mismatch = (looked.f_double_value(&[])? / settings.switch_every as f64) as f32;
            let _ = looked.f_zero_()?;
            if !plateaued(state, mismatch, settings.switch_patience) && spent < settings.switch_max {
                return Ok(None);
            }
            (state.best_mismatch, state.stale) = (None, 0);
            Ok(Some(state.target - 1))
        }
    }
}

/// Whether the mismatch has stopped falling: `patience` looks without a new low. None left at all counts as a look
/// without one.
fn plateaued(state: &mut State, mismatch: f32, patience: u64) -> bool {
    if state.best_mismatch.is_none_or(|best| mismatch < best - FALL * best.abs()) {
        state.best_mismatch = Some(mismatch);
        state.stale = u64::from(mismatch <= 0.0);
    } else {
        state.stale += 1;
    }
    state.stale >= patience
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn learning_rates_cool_down_over_the_last_share() {
        let rates: Vec<f64> = [0, 400, 401, 500, 599].iter().map(|&u| cooldown(u, 600, 1.0 / 3.0)).collect();
        for (rate, expected) in rates.iter().zip([1.0, 1.0, 0.995, 0.5, 0.005]) {
            assert!((rate - expected).abs() < 1e-12, "{rates:?}");
        }
        assert_eq!(cooldown(599, 600, 0.0), 1.0);
    }

    #[test]
    fn the_mismatch_plateaus_after_patience_looks_without_a_fall() {
        let mut state = State::new(Stage::Backtrack, "");
        let looks = [5.0, 3.0, 2.99, 3.1, 2.0, 1.99, 2.2, 1.97];
        let found: Vec<bool> = looks.iter().map(|&m| plateaued(&mut state, m, 3)).collect();
        assert_eq!(found, [false, false, false, false, false, false, false, true]);
        // Nothing left to teach.
        let mut state = State::new(Stage::Backtrack, "");
        assert!(plateaued(&mut state, -0.1, 1));
        // NaN is no new low.
        let mut state = State { best_mismatch: Some(1.0), ..State::new(Stage::Backtrack, "") };
        assert!(plateaued(&mut state, f32::NAN, 1));
    }
}
