//! Stage 1, degradation recording: a copy of the teacher is trained on the initial student's samples and recorded on
//! its way.

use tch::Tensor;

use crate::diffusion::{Conditions, Denoiser};
use crate::distill::blame::{self, Culprit, Scene, Suspect};
use crate::distill::checkpoint::{Checkpoint, Stage, State, named};
use crate::distill::config::{DegradeConfig, Spacing};
use crate::distill::draws::{Draws, Phase, Use};
use crate::distill::inputs::Inputs;
use crate::distill::student::Student;
use crate::distill::trainer::{At, Batches, Begin, Job, Log, Step, adamw, denoising_loss, recorder};
use crate::distill::trajectory::{Node, Trajectory};
use crate::error::Result;
use crate::torch::optim::AdamW;

/// Candidates recorded for each node wanted, where the nodes are chosen afterwards.
const CANDIDATES: u64 = 4;
/// What counts as a lower loss for `patience`.
const LOWER: f32 = 0.99;

/// Records the trajectory, or goes on recording it from a checkpoint. `None`: stopped from outside, with a checkpoint.
pub fn degrade(job: &mut Job, teacher: &Denoiser, resume: Option<Checkpoint>) -> Result<Option<Trajectory>> {
    let config = job.config;
    let dir = job.run.trajectory();
    if config.degrade.nodes == 0 {
        let mut trajectory =
            Trajectory::create(&dir, teacher.params(), job.student_hash(teacher)?, None, config.memory.nodes)?;
        trajectory.complete(&[0])?;
        return Ok(Some(trajectory));
    }
    let batches = Batches::new(config, teacher)?;
    let initial = job.initial(teacher)?;
    let copy = teacher.copy()?;
    copy.params().set_requires_grad(true)?;
    let mut adam = AdamW::new(copy.params(), adamw(config, config.degrade_lr(), &config.degrade.betas))?;
    let probe = Probe::new(&batches, teacher, &initial)?;
    let (mut recorder, form) = recorder(config, batches.device)?;

    let (mut state, mut trajectory) = match resume {
        Some(mut checkpoint) => {
            checkpoint.take_params("copy/", copy.params())?;
            adam.restore("adam/", &mut |name| checkpoint.take(name))?;
            let state = checkpoint.state.clone();
            checkpoint.finish()?;
            let mut trajectory = Trajectory::open(&dir, &state.teacher_hash)?;
            trajectory.truncate(state.iteration)?;
            (state, trajectory)
        }
        None => {
            let loss = probe.loss(teacher)?;
            let trajectory = Trajectory::create(
                &dir,
                teacher.params(),
                job.student_hash(teacher)?,
                Some(loss),
                config.memory.nodes,
            )?;
            job.observer.node_recorded(0, teacher)?;
            (State::new(Stage::Degrade, trajectory.teacher_hash()), trajectory)
        }
    };
    let steps = config.degrade.steps;
    let images = config.images();
    let record_at = recording_plan(&config.degrade);
    let chosen_later = chooses_later(&config.degrade);
    let mut log = Log::new(job, &state, steps, config.degrade.nodes, state.iteration * images)?;
    let (iteration, last) = (state.iteration, config.degrade.nodes);
    job.observer.stage_begins(&Begin { stage: Stage::Degrade, iteration, total: steps, updates: 0, last })?;

    while state.iteration < steps {
        let lr = adam.lr(1.0);
        for micro in 0..config.accumulate {
            let draws = batches.draws(Phase::Degrade, state.iteration, micro);
            let conditions = batches.conditions(&draws, teacher)?;
            let z = batches.latent(&draws, &initial)?;
            let uses = [Use::FakeSigma, Use::FakeNoise];
            let noised = batches.noised(&draws, &batches.degrade_levels, uses, &copy, form)?;
            let made = recorder.run(
                "degrade",
                Inputs::new(&z, &conditions, Some(noised)),
                Some(copy.params()),
                &mut |inputs: &Inputs| {
                    let (z, conditions) = (&inputs.from, &inputs.conditions);
                    let x0 = tch::no_grad(|| initial.training_images(&draws, z, conditions))?;
                    let loss = inputs.loss(&copy, &x0)?;
                    loss.f_div_scalar(config.accumulate as f64)?.f_backward()?;
                    Ok(vec![loss.detach()])
                },
            )?;
            log.meters.add("loss_fake", &made[0])?;
        }
        adam.step(1.0)?;
        log.meters.add("grad_norm_fake", adam.grad_norm())?;
        state.iteration += 1;
        let done = state.iteration;
        log.progress.tick(done);

        let mut ended = done == steps;
        let patience = config.degrade.patience;
        if patience > 0 && done.is_multiple_of((patience / 4).max(1)) {
            let loss = probe.loss(&copy)?;
            if state.best_loss.is_none_or(|best| loss < best * LOWER) {
                (state.best_loss, state.best_at) = (Some(loss), done);
            } else if done - state.best_at >= patience {
                log.progress.note(&format!("stage 1: the loss has stopped falling after {done} steps"));
                ended = true;
            }
        }
        if ended || record_at.contains(&done) {
            let node = trajectory.record(copy.params(), done, Some(probe.loss(&copy)?))?;
            if !chosen_later {
                job.observer.node_recorded(node, &copy)?;
            }
        }
        if done.is_multiple_of(config.log.every) || ended {
            log.skips(["skipped_fake", "in_a_row_fake"], &adam)?;
            let node = trajectory.last();
            let at = At { iteration: done, node, lr, updates: 0, images: done * images };
            let draws = batches.draws(Phase::Degrade, done - 1, 0);
            log.row(at, job.observer, &|| culprit(&batches, &draws, teacher, &copy, &initial))?;
        }
        let wish = job.observer.after_step(&Step {
            stage: Stage::Degrade,
            iteration: done,
            total: steps,
            updates: 0,
            updated: false,
            images: done * images,
            seconds: log.seconds(),
            node: trajectory.last(),
            networks: None,
        })?;
        if ended {
            break;
        }
        let stop = job.stopped();
        if stop
            || wish.checkpoint
            || (config.log.checkpoint_every > 0 && done.is_multiple_of(config.log.checkpoint_every))
        {
            let mut tensors = named("copy/", copy.params());
            tensors.extend(adam.state("adam/"));
            log.checkpoint(job, &mut state, &tensors)?;
        }
        if stop {
            log.progress.finish();
            return Ok(None);
        }
    }
    log.progress.finish();
    let which = match chosen_later {
        true => choose(trajectory.nodes(), config.degrade.nodes, config.degrade.spacing),
        false => (0..=trajectory.last()).collect(),
    };
    trajectory.complete(&which)?;
    if chosen_later {
        for node in 1..=trajectory.last() {
            trajectory.load(node, copy.params())?;
            job.observer.node_recorded(node, &copy)?;
        }
    }
    Ok(Some(trajectory))
}

/// The denoising loss on a fixed batch of the initial student's samples with levels spread over the whole range: the
/// same number for the same weights, so that nodes can be compared.
struct Probe {
    x0: Tensor,
    sigmas: Vec<f64>,
    noise: Tensor,
    conditions: Conditions,
}

impl Probe {
    fn new(batches: &Batches, teacher: &Denoiser, initial: &Student) -> Result<Self> {
        let draws = batches.draws(Phase::Probe, 0, 0);
        let conditions = batches.conditions(&draws, teacher)?;
        let z = batches.latent(&draws, initial)?;
        let x0 = tch::no_grad(|| initial.training_images(&draws, &z, &conditions))?;
        let noise = batches.noise(&draws, Use::FakeNoise)?;
        Ok(Self { x0, sigmas: batches.degrade_levels.spread(batches.batch), noise, conditions })
    }

    fn loss(&self, denoiser: &Denoiser) -> Result<f32> {
        let loss = tch::no_grad(|| denoising_loss(denoiser, &self.x0, &self.sigmas, &self.noise, &self.conditions))?;
        Ok(loss.f_double_value(&[])? as f32)
    }
}

/// Which network gives what is not finite.
fn culprit(
    batches: &Batches,
    draws: &Draws,
    teacher: &Denoiser,
    copy: &Denoiser,
    initial: &Student,
) -> Result<Option<Culprit>> {
    let suspect = |name: &str, network, hint| Suspect {
        name: name.into(),
        network,
        levels: &batches.degrade_levels,
        guidance: 1.0.into(),
        hint,
    };
    let hint = "it has diverged: a lower degrade.lr, a smaller optimizer.clip or a longer optimizer.warmup";
    let suspects = [suspect("the teacher", teacher, blame::TEACHER), suspect("the degraded copy", copy, hint)];
    let hint = "a student.sigma_init that the network knows, or another student.file";
    Scene { batches, draws, student: initial, hint, judge: None }.culprit(&suspects)
}

/// Whether nodes are chosen from candidates once the whole course is known.
fn chooses_later(config: &DegradeConfig) -> bool {
    config.spacing == Spacing::Loss || config.patience > 0
}

/// Steps after which a node (or a candidate) is recorded, rising; the last is the last step.
fn recording_plan(config: &DegradeConfig) -> Vec<u64> {
    let (steps, nodes) = (config.steps, config.nodes as u64);
    let count = if chooses_later(config) { (CANDIDATES * nodes).min(steps) } else { nodes };
    let even = |k: u64| (steps as f64 * k as f64 / count as f64).round() as u64;
    let log = |k: u64| (steps as f64).powf(k as f64 / count as f64).round() as u64;
    let mut plan: Vec<u64> = Vec::with_capacity(count as usize);
    for k in 1..=count {
        let at = if config.spacing == Spacing::Iteration { even(k) } else { log(k) };
        // Early logarithmic points coincide after rounding: each at least one step after the one before, and early
        // enough for those that follow.
        plan.push(at.max(plan.last().map_or(1, |p| p + 1)).min(steps - (count - k)));
    }
    plan
}

/// Indices of node 0, the last one and `count - 1` between, nearest to equal distances on the scale of `spacing`.
fn choose(nodes: &[Node], count: usize, spacing: Spacing) -> Vec<usize> {
    let last = nodes.len() - 1;
    let count = count.min(last);
    let place = |k: usize| match spacing {
        Spacing::Iteration => nodes[k].iteration as f64,
        Spacing::LogIteration => (nodes[k].iteration.max(1) as f64).ln(),
        Spacing::Loss => f64::from(nodes[k].loss.unwrap_or_default()),
    };
    let (from, to) = (place(0), place(last));
    let mut chosen = vec![0];
    for k in 1..count {
        let ideal = from + (to - from) * k as f64 / count as f64;
        let first = chosen[k - 1] + 1;
        let nearest = (first..=last - (count - k))
            .min_by(|&a, &b| (place(a) - ideal).abs().total_cmp(&(place(b) - ideal).abs()))
            .unwrap_or(first);
        chosen.push(nearest);
    }
    if last > 0 {
        chosen.push(last);
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(spacing: Spacing, nodes: usize, steps: u64) -> DegradeConfig {
        DegradeConfig { nodes, steps, spacing, ..DegradeConfig::default() }
    }

    #[test]
    fn nodes_are_spaced_evenly_or_by_ratio() {
        assert_eq!(recording_plan(&config(Spacing::Iteration, 5, 400)), [80, 160, 240, 320, 400]);
        assert_eq!(recording_plan(&config(Spacing::Iteration, 3, 10)), [3, 7, 10]);
        // 400^(k/5) = 3.3, 11.0, 36.4, 120.7, 400
        assert_eq!(recording_plan(&config(Spacing::LogIteration, 5, 400)), [3, 11, 36, 121, 400]);
        assert_eq!(recording_plan(&config(Spacing::LogIteration, 4, 5)), [1, 2, 3, 5]);
        assert_eq!(recording_plan(&config(Spacing::LogIteration, 5, 5)), [1, 2, 3, 4, 5]);
        assert_eq!(recording_plan(&config(Spacing::Loss, 5, 400)).len(), 20);
        for (nodes, steps) in [(1, 1), (5, 5), (7, 9), (10, 1000)] {
            for spacing in [Spacing::Iteration, Spacing::LogIteration, Spacing::Loss] {
                let plan = recording_plan(&config(spacing, nodes, steps));
                assert!(plan.windows(2).all(|w| w[0] < w[1]), "{plan:?}");
                assert!(plan[0] >= 1 && plan[plan.len() - 1] == steps, "{plan:?}");
            }
        }
    }

    #[test]
    fn candidates_are_chosen_by_loss() {
        let node = |(index, (iteration, loss)): (usize, (u64, f32))| Node {
            index,
            file: String::new(),
            iteration,
            loss: Some(loss),
            hash: String::new(),
        };
        let nodes: Vec<Node> = [(0, 10.0), (1, 9.5), (3, 8.0), (9, 6.1), (27, 4.2), (81, 2.2), (100, 2.0)]
            .into_iter()
            .enumerate()
            .map(node)
            .collect();
        assert_eq!(choose(&nodes, 4, Spacing::Loss), [0, 2, 3, 4, 6]);
        assert_eq!(choose(&nodes, 2, Spacing::Iteration), [0, 4, 6]);
        assert_eq!(choose(&nodes, 1, Spacing::Loss), [0, 6]);
        assert_eq!(choose(&nodes, 9, Spacing::Loss), [0, 1, 2, 3, 4, 5, 6], "no more than there are");
        // A loss that does not fall still gives as many distinct nodes as wanted.
        let flat: Vec<Node> = (0..9).map(|k| node((k, (k as u64, 1.0)))).collect();
        let chosen = choose(&flat, 5, Spacing::Loss);
        assert!(chosen.len() == 6 && chosen.windows(2).all(|w| w[0] < w[1]) && chosen[5] == 8, "{chosen:?}");
    }
}
