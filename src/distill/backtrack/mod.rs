//! Stage 2, distribution backtracking: score distillation towards the nodes of the trajectory in reverse, the teacher
//! last.

mod generator;
mod switching;

use tch::{Kind, Tensor};

use crate::diffusion::Denoiser;
use crate::distill::checkpoint::{Checkpoint, Stage, State, named};
use crate::distill::draws::{Phase, Use};
use crate::distill::objective::objective;
use crate::distill::student::Student;
use crate::distill::trainer::{self, At, Batches, Job, Log, adamw, denoising_loss};
use crate::distill::trajectory::Trajectory;
use crate::error::Result;
use crate::torch::ema;
use crate::torch::optim::AdamW;

/// The networks of stage 2: one plan, four sets of weights.
struct Networks {
    /// The slot into which the nodes are copied, one after the other.
    target: Denoiser,
    /// None where the objective has no use for it.
    fake: Option<Denoiser>,
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
    let guidance = trainer::guidance(config)?;
    if !guidance.is_none() {
        teacher.check_guidance()?;
    }
    let batches = Batches::new(config, teacher)?;
    let objective = objective(config);
    let nets = Networks {
        target: teacher.copy()?,
        fake: objective.needs_fake().then(|| teacher.copy()).transpose()?,
        student: Student::new(teacher.copy()?, &config.student)?,
        average: Student::new(teacher.copy()?, &config.student)?,
    };
    nets.student.params().set_requires_grad(true)?;
    let mut adam_fake = match &nets.fake {
        None => None,
        Some(fake) => {
            fake.params().set_requires_grad(true)?;
            Some(AdamW::new(fake.params(), adamw(config, settings.lr_fake))?)
        }
    };
    let mut adam_student = AdamW::new(nets.student.params(), adamw(config, settings.lr_generator))?;
    // Sum of the mismatch since the last look at it: f32, so that a checkpoint holds it exactly.
    let mut looked = Tensor::f_zeros([0i64; 0], (Kind::Float, batches.device))?;

    let last = trajectory.last();
    let mut state = match resume {
        Some(mut checkpoint) => {
            checkpoint.take_params("student/", nets.student.params())?;
            checkpoint.take_params("average/", nets.average.params())?;
            adam_student.restore("adam_student/", &mut |name| checkpoint.take(name))?;
            if let (Some(fake), Some(adam)) = (&nets.fake, &mut adam_fake) {
                checkpoint.take_params("fake/", fake.params())?;
                adam.restore("adam_fake/", &mut |name| checkpoint.take(name))?;
            }
            looked.f_copy_(&checkpoint.take("looked")?)?;
            let state = checkpoint.state.clone();
            checkpoint.finish()?;
            state
        }
        None => {
            // The fake score starts from the degraded end, which fits the student's first samples.
            if let Some(fake) = &nets.fake {
                trajectory.load(last, fake.params())?;
            }
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
        if let Some(next) = switching::next_target(job, &mut state, update, last, &mut looked)? {
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
                    generator::generator_loss(&nets, &*objective, &batches, &draws, &x0, &conditions, guidance)?;
                log.meters.add("loss_generator", &loss)?;
                log.meters.add("mismatch", &mismatch)?;
                looked = tch::no_grad(|| looked.f_add(&mismatch.f_mul_scalar(share)?))?;
                loss.f_mul_scalar(share)?.f_backward()?;
                x0.detach()
            } else {
                tch::no_grad(|| nets.student.generate(&z, &conditions))?
            };
            if let Some(fake) = &nets.fake {
                let sigmas = draws.sigmas(Use::FakeSigma, &batches.fake_levels, batches.batch);
                let noise = batches.noise(&draws, Use::FakeNoise)?;
                let loss = denoising_loss(fake, &x0, &sigmas, &noise, &conditions)?;
                log.meters.add("loss_fake", &loss)?;
                loss.f_mul_scalar(share)?.f_backward()?;
            }
        }
        if generator_steps {
            adam_student.step(scale)?;
            let decay = ema::decay(images, (update + 1) * images, config.ema.half_life, config.ema.ramp);
            tch::no_grad(|| ema::update(nets.average.params(), nets.student.params(), decay))?;
            log.meters.add("grad_norm_generator", adam_student.grad_norm())?;
        }
        if let Some(adam) = &mut adam_fake {
            adam.step(scale)?;
            log.meters.add("grad_norm_fake", adam.grad_norm())?;
        }
        state.iteration += 1;
        let done = state.iteration;
        log.progress.tick(done);

        if done.is_multiple_of(config.log.every) || done == total {
            if let Some(adam) = &adam_fake {
                log.skips(["skipped_fake", "in_a_row_fake"], adam)?;
            }
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
            tensors.extend(adam_student.state("adam_student/"));
            if let (Some(fake), Some(adam)) = (&nets.fake, &adam_fake) {
                tensors.extend(named("fake/", fake.params()));
                tensors.extend(adam.state("adam_fake/"));
            }
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

/// Factor of both learning rates at a generator update: 1, then falling linearly to 0 over the last `share` of them.
fn cooldown(update: u64, updates: u64, share: f64) -> f64 {
    let length = updates as f64 * share;
    if length < 1.0 { 1.0 } else { ((updates - update) as f64 / length).min(1.0) }
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
}
