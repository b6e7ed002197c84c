//! Stage 1, degradation recording: a copy of the teacher is trained on the initial student's samples and recorded on
//! its way.

use tch::Tensor;

use crate::diffusion::{Conditions, Denoiser, Form};
use crate::distill::batches::Batches;
use crate::distill::checkpoint::{Checkpoint, StageKind, State, named};
use crate::distill::config::{Config, DegradeConfig, NodeCount, Spacing};
use crate::distill::draws::{Phase, Purpose};
use crate::distill::inputs::{Inputs, Noised};
use crate::distill::job::{Job, recorder};
use crate::distill::log::{At, Log};
use crate::distill::nonfinite::{self, Candidate, Finding};
use crate::distill::plan;
use crate::distill::stage::{self, Ended, Measured, Stage, lasting};
use crate::distill::student::Student;
use crate::distill::trajectory::{Node, Trajectory};
use crate::error::Result;
use crate::shown::tell;
use crate::torch::dist::Named;
use crate::torch::train::cuda_graph::Recorder;
use crate::torch::train::optim::AdamW;

/// Candidates recorded for each node wanted, where the nodes are chosen afterwards.
const CANDIDATES: u64 = 4;
/// What counts as a lower loss for `patience`.
const LOWER: f32 = 0.99;

/// Records the trajectory, or goes on recording it from a checkpoint. `None`: stopped from outside, with a checkpoint.
pub fn degrade(job: &mut Job, teacher: &Denoiser, resume: Option<Checkpoint>) -> Result<Option<Trajectory>> {
    let config = job.config;
    if !config.degrade.nodes.any() {
        let hash = job.student_hash(teacher)?;
        let made = Trajectory::shared_one(&job.world, || {
            let dir = job.run.trajectory();
            let mut trajectory = Trajectory::create(&dir, teacher.params(), hash, None, config.memory.nodes)?;
            trajectory.complete(&[0])?;
            Ok(trajectory)
        });
        return made.map(Some);
    }
    let (mut stage, state) = Degrade::new(job, teacher, resume)?;
    match stage::run(&mut stage, job, state)? {
        Ended::Stopped => Ok(None),
        Ended::Finished => stage.finish(job).map(Some),
    }
}

/// Stage 1 as it runs.
struct Degrade<'a> {
    config: &'a Config,
    teacher: &'a Denoiser,
    batches: Batches,
    /// The student as it begins, on whose samples the copy is trained.
    initial: Student,
    copy: Denoiser,
    adam: AdamW,
    probe: Probe,
    recorder: Recorder<Inputs>,
    form: Form,
    trajectory: Trajectory,
    /// Steps that it may take.
    steps: u64,
    /// Steps after which a node (or a candidate) is recorded.
    record_at: Vec<u64>,
    /// Of the present iteration.
    lr: f64,
}

impl<'a> Degrade<'a> {
    /// A copy of the teacher and a trajectory of one node, or both as a checkpoint has them.
    fn new<'j: 'a>(job: &mut Job<'j>, teacher: &'a Denoiser, resume: Option<Checkpoint>) -> Result<(Self, State)> {
        let config = job.config;
        let dir = job.run.trajectory();
        let batches = Batches::new(config, teacher)?;
        let initial = job.initial(teacher)?;
        let copy = teacher.copy()?;
        copy.params().set_requires_grad(true)?;
        let mut adam = AdamW::new(copy.params(), config.adamw(config.degrade_lr(), &config.degrade.betas))?;
        adam.share(&job.world, config.sums_apart(batches.device), config.distributed.shares_states())?;
        let looked_at = if config.degrade.nodes.is_auto() { plan::batches_of_a_look(config.batch) } else { 1 };
        let probe = Probe::new(&batches, teacher, &initial, looked_at)?;
        let (recorder, form) = recorder(config, batches.device)?;
        let (state, trajectory) = match resume {
            Some(mut checkpoint) => {
                checkpoint.take_params("copy/", copy.params(), None)?;
                adam.restore("adam/", &mut |name| checkpoint.take(name))?;
                let state = checkpoint.state.clone();
                checkpoint.finish()?;
                let trajectory = Trajectory::shared_one(&job.world, || {
                    let mut trajectory = Trajectory::open(&dir, &state.teacher_hash)?;
                    trajectory.truncate(state.iteration)?;
                    Ok(trajectory)
                })?;
                (state, trajectory)
            }
            None => {
                let (loss, hash) = (probe.loss(teacher)?, job.student_hash(teacher)?);
                let trajectory = Trajectory::shared_one(&job.world, || {
                    Trajectory::create(&dir, teacher.params(), hash, Some(loss), config.memory.nodes)
                })?;
                job.observer.node_recorded(0, teacher)?;
                (State::new(StageKind::Degrade, trajectory.teacher_hash()), trajectory)
            }
        };
        let steps = plan::steps(config);
        let record_at = recording_plan(&config.degrade);
        let lr = adam.lr(1.0);
        let stage = Self {
            config,
            teacher,
            batches,
            initial,
            copy,
            adam,
            probe,
            recorder,
            form,
            trajectory,
            steps,
            record_at,
            lr,
        };
        Ok((stage, state))
    }

    /// The complete trajectory: all nodes, or those chosen from the candidates.
    fn finish(mut self, job: &mut Job) -> Result<Trajectory> {
        let settings = &self.config.degrade;
        let chosen_later = chooses_later(settings);
        let which = match (settings.nodes, chosen_later) {
            (NodeCount::Auto, _) => {
                let plan =
                    plan::choose(self.trajectory.nodes(), settings.nodes.most(), self.steps, &plan::limit(self.config));
                if !job.silent && job.world.leads() {
                    tell!("{}", plan.why);
                }
                self.trajectory.set_plan(plan.why);
                plan.nodes
            }
            (NodeCount::Count(count), true) => choose(self.trajectory.nodes(), count, settings.spacing),
            (NodeCount::Count(_), false) => (0..=self.trajectory.last()).collect(),
        };
        self.trajectory.complete(&which)?;
        if chosen_later && !self.trajectory.is_elsewhere() {
            for node in 1..=self.trajectory.last() {
                self.trajectory.load(node, self.copy.params())?;
                job.observer.node_recorded(node, &self.copy)?;
            }
        }
        Ok(self.trajectory)
    }

    /// Looks at the copy where it is time to, and records what is to be a candidate. Whether stage 1 ends.
    fn look(&mut self, job: &Job, state: &mut State) -> Result<bool> {
        if !plan::looks_after(state.iteration, self.steps) {
            return Ok(false);
        }
        let [loss, gap] = self.probe.look(&self.copy)?;
        let (loss, gap) = (job.world.decide(loss)?, job.world.decide(gap)?);
        let index = self.trajectory.nodes().len();
        let (file, hash) = (String::new(), String::new());
        let seen = Node { index, file, iteration: state.iteration, loss: Some(loss), hash, gap: Some(gap) };
        let look = plan::after_look(self.trajectory.nodes(), &seen, state.best_loss, self.steps);
        state.best_loss = Some(loss);
        if look.record {
            self.trajectory.record_looked(self.copy.params(), &seen)?;
        }
        Ok(look.end)
    }

    /// Whether the loss has not fallen for `degrade.patience` steps.
    fn out_of_patience(&self, job: &Job, state: &mut State, log: &Log) -> Result<bool> {
        let (done, patience) = (state.iteration, self.config.degrade.patience);
        if patience == 0 || !done.is_multiple_of((patience / 4).max(1)) {
            return Ok(false);
        }
        let loss = job.world.decide(self.probe.loss(&self.copy)?)?;
        if state.best_loss.is_none_or(|best| loss < best * LOWER) {
            (state.best_loss, state.best_at) = (Some(loss), done);
            return Ok(false);
        }
        let ended = done - state.best_at >= patience;
        if ended {
            log.progress.note(&format!("stage 1: the loss has stopped falling after {done} steps"));
        }
        Ok(ended)
    }
}

impl Stage for Degrade<'_> {
    fn kind(&self) -> StageKind {
        StageKind::Degrade
    }
    fn total(&self) -> u64 {
        self.steps
    }
    fn last_node(&self) -> Option<usize> {
        (!chooses_later(&self.config.degrade)).then(|| self.config.degrade.nodes.most())
    }

    fn begin(&mut self, _job: &mut Job, _state: &mut State, _log: &mut Log) -> Result<()> {
        self.lr = self.adam.lr(1.0);
        Ok(())
    }

    /// Denoising score matching of the copy on the initial student's samples.
    fn micro_batch(&mut self, _job: &mut Job, state: &State, micro: usize, rows: usize) -> Result<Measured> {
        let Self { config, teacher, batches, initial, copy, recorder, form, adam, .. } = self;
        let (initial, copy) = (&*initial, &*copy);
        let draws = batches.draws(Phase::Degrade, state.iteration, micro);
        let conditions = batches.conditions(&draws, teacher)?;
        let z = batches.latent(&draws, initial)?;
        let purposes = [Purpose::FakeSigma, Purpose::FakeNoise];
        let noised = batches.noised(&draws, &batches.degrade_levels, purposes, copy, *form)?;
        let inputs = Inputs::new(&z, &conditions, Some(noised));
        let made = recorder.run("degrade", inputs, Some(copy.params()), &mut |inputs: &Inputs| {
            let (z, conditions) = (&inputs.from, &inputs.conditions);
            let x0 = tch::no_grad(|| initial.training_images(&draws, z, conditions))?;
            let loss = inputs.loss(copy, &x0)?;
            loss.f_div_scalar(config.accumulate as f64)?.f_backward()?;
            Ok(vec![loss.detach()])
        })?;
        adam.round(rows)?;
        Ok(vec![("loss_fake", lasting(&made[0], recorder.records())?)])
    }

    fn idle(&mut self, rows: usize) -> Result<()> {
        self.adam.round(rows)
    }

    fn update(&mut self, _state: &State, log: &mut Log) -> Result<()> {
        self.adam.step(1.0)?;
        log.meters.add("grad_norm_fake", self.adam.grad_norm())
    }

    fn device(&self) -> tch::Device {
        self.batches.device
    }

    /// Records a node where the plan has one, and at the end.
    fn after_update(&mut self, job: &mut Job, state: &mut State, log: &mut Log) -> Result<bool> {
        if self.config.degrade.nodes.is_auto() {
            return self.look(job, state);
        }
        let ended = self.out_of_patience(job, state, log)? || state.iteration == self.total();
        if ended || self.record_at.contains(&state.iteration) {
            let loss = self.probe.loss(&self.copy)?;
            let node = self.trajectory.record(self.copy.params(), state.iteration, Some(loss))?;
            if !chooses_later(&self.config.degrade) {
                job.observer.node_recorded(node, &self.copy)?;
            }
        }
        Ok(ended)
    }

    fn at(&self, state: &State) -> At {
        let images = state.iteration * self.config.images();
        At { iteration: state.iteration, node: self.trajectory.last(), lr: self.lr, updates: 0, images }
    }

    fn log_skips(&self, log: &mut Log) -> Result<()> {
        log.skips(["skipped_fake", "in_a_row_fake"], &self.adam)
    }

    fn find_nonfinite(&self, state: &State) -> Result<Option<Finding>> {
        let draws = self.batches.draws(Phase::Degrade, state.iteration - 1, 0);
        let candidate = |name: &str, network, hint| Candidate {
            name: name.into(),
            network,
            levels: &self.batches.degrade_levels,
            guidance: 1.0.into(),
            hint,
        };
        let hint = "it has diverged: a lower degrade.lr, a smaller optimizer.clip or a longer optimizer.warmup";
        let candidates = [
            candidate("the teacher", self.teacher, nonfinite::TEACHER),
            candidate("the degraded copy", &self.copy, hint),
        ];
        let hint = "a student.sigma_init that the network knows, or another student.file";
        let probe =
            nonfinite::Probe { batches: &self.batches, draws: &draws, student: &self.initial, hint, judge: None };
        probe.find_nonfinite(&candidates)
    }

    fn tensors(&self) -> Vec<Named> {
        let mut tensors = named("copy/", self.copy.params(), None);
        tensors.extend(self.adam.state("adam/"));
        tensors
    }

    fn ends_with_a_checkpoint(&self) -> bool {
        false
    }
}

/// The denoising loss on fixed samples of the initial student with levels spread over the whole range: the same number for the same
/// weights, so that nodes can be compared.
struct Probe {
    batches: Vec<Fixed>,
}

/// One batch of them.
struct Fixed {
    x0: Tensor,
    sigmas: Vec<f64>,
    noise: Tensor,
    conditions: Conditions,
    /// What the teacher denoises.
    by_teacher: Tensor,
}

impl Fixed {
    /// Errors of what a denoiser makes of them, with their weights: to the samples, and to what the teacher makes.
    fn errors(&self, denoiser: &Denoiser) -> Result<[Tensor; 2]> {
        let noised = Noised::new(denoiser, &self.sigmas, &self.noise, Form::Short)?;
        let (x_t, prepared) = (noised.add_to(&self.x0)?, &noised.prepared);
        let (made, _) = denoiser.denoise_prepared(&x_t, prepared, &self.conditions, &[])?;
        let mean =
            |t: Tensor| -> Result<Tensor> { Ok(t.f_square()?.f_mul(&noised.weights)?.f_mean(tch::Kind::Float)?) };
        Ok([mean(made.f_sub(&self.x0)?)?, mean(made.f_sub(&self.by_teacher)?)?])
    }
}

impl Probe {
    /// Of so many batches.
    fn new(batches: &Batches, teacher: &Denoiser, initial: &Student, count: usize) -> Result<Self> {
        let one = |k: usize| -> Result<Fixed> {
            let draws = batches.draws(Phase::Probe, 0, k);
            let conditions = batches.conditions(&draws, teacher)?;
            let z = batches.latent(&draws, initial)?;
            let x0 = initial.training_images(&draws, &z, &conditions)?;
            let (noise, sigmas) =
                (batches.noise(&draws, Purpose::FakeNoise)?, batches.degrade_levels.spread(batches.batch));
            let x_t = Noised::new(teacher, &sigmas, &noise, Form::Short)?.add_to(&x0)?;
            let by_teacher = teacher.denoise(&x_t, &sigmas, &conditions)?;
            Ok(Fixed { x0, sigmas, noise, conditions, by_teacher })
        };
        Ok(Self { batches: (0..count).map(|k| tch::no_grad(|| one(k))).collect::<Result<_>>()? })
    }

    /// A denoiser's loss, and its gap to the teacher: the mean weighted square of the difference between what the two denoise.
    fn look(&self, denoiser: &Denoiser) -> Result<[f32; 2]> {
        let mut sums = [0.0; 2];
        for fixed in &self.batches {
            for (sum, value) in sums.iter_mut().zip(tch::no_grad(|| fixed.errors(denoiser))?) {
                *sum += value.f_double_value(&[])?;
            }
        }
        Ok(sums.map(|sum| (sum / self.batches.len() as f64) as f32))
    }

    fn loss(&self, denoiser: &Denoiser) -> Result<f32> {
        let [loss, _] = self.look(denoiser)?;
        Ok(loss)
    }
}

/// Whether nodes are chosen from candidates once the whole course is known.
fn chooses_later(config: &DegradeConfig) -> bool {
    config.nodes.is_auto() || config.spacing == Spacing::Loss || config.patience > 0
}

/// Steps after which a node (or a candidate) is recorded, rising; the last is the last step.
fn recording_plan(config: &DegradeConfig) -> Vec<u64> {
    let (steps, nodes) = (config.steps, config.nodes.most() as u64);
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
        DegradeConfig { nodes: nodes.into(), steps, spacing, ..DegradeConfig::default() }
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
            gap: None,
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
