//! Stage 2, distribution backtracking: score distillation towards the nodes of the trajectory in reverse, the teacher
//! last.

mod generator;
mod players;
mod switching;

use tch::{Kind, Tensor};

use self::players::Players;
use crate::diffusion::Denoiser;
use crate::distill::ahead::Nodes;
use crate::distill::checkpoint::{Checkpoint, Stage, State};
use crate::distill::config::CooldownShape;
use crate::distill::draws::{Phase, Use};
use crate::distill::inputs::Inputs;
use crate::distill::look::Look;
use crate::distill::objective::objective;
use crate::distill::student::Student;
use crate::distill::trainer::{self, At, Batches, Begin, Job, Log, Running, Step};
use crate::distill::trajectory::Trajectory;
use crate::error::Result;

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
    let mut players = Players::new(config, teacher, job.initial(teacher)?, &batches, &*objective)?;
    players.target.network().configure(config.target_compute());
    // Sum of the mismatch since the last look at it: f32, so that a checkpoint holds it exactly.
    let mut looked = Tensor::f_zeros([0i64; 0], (Kind::Float, batches.device))?;

    let last = trajectory.last();
    let mut state = match resume {
        Some(mut checkpoint) => {
            players.restore(&mut checkpoint)?;
            looked.f_copy_(&checkpoint.take("looked")?)?;
            let state = checkpoint.state.clone();
            checkpoint.finish()?;
            state
        }
        None => {
            // The fake score starts from the degraded end, which fits the student's first samples.
            if let Some(fake) = &players.fake {
                trajectory.load(last, fake.network.params())?;
            }
            State { target: last.saturating_sub(1), ..State::new(Stage::Backtrack, trajectory.teacher_hash()) }
        }
    };
    let (mut recorder, form) = trainer::recorder(config, batches.device)?;
    let mut nodes = Nodes::new(trajectory, batches.device);
    nodes.load(state.target, players.target.params())?;
    job.observer.target_entered(state.target, &players.target)?;

    let images = config.images();
    let total = settings.updates * settings.ratio;
    let mut log = Log::new(job, &state, total, last, state.iteration * images)?;
    let (iteration, updates) = (state.iteration, state.iteration / settings.ratio);
    let mut ended = job.observer.stage_begins(&Begin { stage: Stage::Backtrack, iteration, total, updates, last })?;
    while state.iteration < total && !ended {
        let update = state.iteration / settings.ratio;
        let generator_steps = (state.iteration + 1).is_multiple_of(settings.ratio);
        if let Some(next) = switching::next_target(job, &mut state, update, last, &mut looked)? {
            log.progress.note(&format!("update {update}: target {} -> {next}", state.target));
            job.observer.target_left(state.target, players.average())?;
            nodes.load(next, players.target.params())?;
            (state.target, state.target_since) = (next, update);
            job.observer.target_entered(next, &players.target)?;
        }
        let scale = cooldown(update, settings.updates, settings.cooldown, settings.cooldown_shape);
        let cooldown_fake = if settings.cooldown_fake < 0.0 { settings.cooldown } else { settings.cooldown_fake };
        let scale_fake = cooldown(update, settings.updates, cooldown_fake, settings.cooldown_shape);
        let lr = players.adam.lr(scale);
        for micro in 0..config.accumulate {
            let draws = batches.draws(Phase::Backtrack, state.iteration, micro);
            let conditions = batches.conditions(&draws, teacher)?;
            let share = 1.0 / config.accumulate as f64;
            // One batch of images for both updates.
            let x0 = if generator_steps {
                let (inputs, sigmas) = generator::inputs(&players, &batches, &draws, &conditions, guidance, form)?;
                let first = update == state.target_since && micro == 0;
                let last_of_all = update + 1 == settings.updates && micro == 0;
                let looks = first || last_of_all;
                let mut seen = None;
                let mut piece = |inputs: &Inputs| -> Result<Vec<Tensor>> {
                    let x0 = players.student.training_images(&draws, &inputs.from, &inputs.conditions)?;
                    let batch = generator::Batch { batches: &batches, draws: &draws, x0: &x0, inputs };
                    let made = generator::loss(&players, &*objective, &batch, state.target == 0)?;
                    let mut results = vec![x0.detach(), made.mismatch, made.loss.detach()];
                    let mut loss = made.loss;
                    if let Some(gan) = &made.gan {
                        results.push(gan.detach());
                        loss = loss.f_add(gan)?;
                    }
                    if looks {
                        let gradient = Tensor::f_run_backward(&[&loss], &[&x0], true, false)?;
                        let gradient = gradient.into_iter().next().map_or_else(|| x0.f_zeros_like(), Ok)?;
                        seen = Some((made.seen, gradient));
                    }
                    loss.f_mul_scalar(share)?.f_backward()?;
                    Ok(results)
                };
                let mut results = match looks {
                    true => piece(&inputs)?,
                    false => recorder.run("generator", inputs, Some(players.student.params()), &mut piece)?,
                };
                for (name, value) in ["mismatch", "loss_generator", "loss_gan"].into_iter().zip(&results[1..]) {
                    log.meters.add(name, value)?;
                }
                looked = tch::no_grad(|| looked.f_add(&results[1].f_mul_scalar(share)?))?;
                if let Some(((x_t, target, fake), gradient)) = seen {
                    let look = Look { sigmas, x_t, target, fake, gradient };
                    job.observer.looked_into(state.target, update, &look)?;
                }
                results.swap_remove(0)
            } else {
                let z = batches.latent(&draws, &players.student)?;
                let images = |inputs: &Inputs| {
                    tch::no_grad(|| players.student.training_images(&draws, &inputs.from, &inputs.conditions))
                };
                let inputs = Inputs::new(&z, &conditions, None);
                recorder.run("images", inputs, None, &mut |i| Ok(vec![images(i)?]))?.swap_remove(0)
            };
            if let Some(fake) = &players.fake {
                let (levels, uses) = (&batches.fake_levels, [Use::FakeSigma, Use::FakeNoise]);
                let noised = batches.noised(&draws, levels, uses, &fake.network, form)?;
                let inputs = Inputs::new(&x0, &conditions, Some(noised));
                let made = recorder.run("fake", inputs, Some(fake.network.params()), &mut |inputs| {
                    let loss = inputs.loss(&fake.network, &inputs.from)?;
                    loss.f_mul_scalar(share)?.f_backward()?;
                    Ok(vec![loss.detach()])
                })?;
                log.meters.add("loss_fake", &made[0])?;
                if let Some(gan) = &players.gan {
                    let loss = gan.discriminator_loss(&fake.network, &batches, &draws, &x0, &conditions)?;
                    log.meters.add("loss_discriminator", &loss)?;
                    loss.f_mul_scalar(share)?.f_backward()?;
                }
            }
        }
        if generator_steps {
            players.step_generator(config, update + 1, scale, &mut log)?;
        }
        players.step_fake(scale_fake, &mut log)?;
        state.iteration += 1;
        let done = state.iteration;
        log.progress.tick(done);

        if done.is_multiple_of(config.log.every) || done == total {
            players.log_skips(&mut log)?;
            let at =
                At { iteration: done, node: state.target, lr, updates: done / settings.ratio, images: done * images };
            let draws = batches.draws(Phase::Backtrack, done - 1, 0);
            log.row(at, job.observer, &|| players.culprit(&batches, &draws, guidance, state.target))?;
        }
        let wish = job.observer.after_step(&Step {
            stage: Stage::Backtrack,
            iteration: done,
            total,
            updates: done / settings.ratio,
            updated: generator_steps,
            images: done * images,
            seconds: log.seconds(),
            node: state.target,
            networks: Some(Running {
                student: &players.student,
                average: players.average(),
                others: players.averages.iter().skip(1).map(|a| (a.half_life, &a.student)).collect(),
                target: &players.target,
                fake: players.fake.as_ref().map(|f| &f.network),
            }),
        })?;
        ended = wish.end;
        let stop = job.stopped() && done < total && !ended;
        let due = config.log.checkpoint_every > 0 && done.is_multiple_of(config.log.checkpoint_every);
        let due = due || wish.checkpoint;
        if stop || due || ended || done == total {
            let mut tensors = players.tensors();
            tensors.push(("looked".into(), looked.shallow_clone()));
            log.checkpoint(job, &mut state, &tensors)?;
        }
        if stop {
            log.progress.finish();
            return Ok(None);
        }
    }
    log.progress.finish();
    let mut averages = players.averages.into_iter();
    let first = averages.next().map(|a| a.student);
    for average in averages {
        average.student.weights()?.save(&job.run.average_weights(average.half_life))?;
    }
    Ok(first)
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
