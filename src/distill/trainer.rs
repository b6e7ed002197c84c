//! What both stages share: the run's surroundings, batches, losses, metrics and checkpoints.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use tch::{Device, Tensor};

use crate::diffusion::{ConditionSource, Conditions, Denoiser, Form, Guidance, Prediction, TeacherCard};
use crate::distill::blame::Culprit;
use crate::distill::checkpoint::{self, Stage, State};
use crate::distill::config::{Config, Distribution, FakeDistribution};
use crate::distill::draws::{Draws, Levels, Phase, Use};
use crate::distill::inputs::{Inputs, Noised};
use crate::distill::look::Look;
use crate::distill::metrics::{Means, Meters, MetricsFile, Row};
use crate::distill::progress::Progress;
use crate::distill::rundir::RunDir;
use crate::distill::student::Student;
use crate::error::{Error, Result};
use crate::torch::ParamSet;
use crate::torch::optim::{AdamW, AdamWConfig};
use crate::torch::replay::Recorder;

/// Learns of a run's landmarks: sample grids, event files, a person's interface.
pub trait Observer {
    /// A stage begins, or goes on from a checkpoint. True: an earlier process had already brought it to its end.
    fn stage_begins(&mut self, _begin: &Begin) -> Result<bool> {
        Ok(false)
    }
    /// An iteration is done.
    fn after_step(&mut self, _step: &Step) -> Result<Wish> {
        Ok(Wish::default())
    }
    /// A row of metrics was written.
    fn metrics(&mut self, _row: &Row) -> Result<()> {
        Ok(())
    }
    /// Stage 1 recorded a node (0: the teacher itself, before the first step).
    fn node_recorded(&mut self, _node: usize, _denoiser: &Denoiser) -> Result<()> {
        Ok(())
    }
    /// Stage 2 is drawn to a target from now on (its weights are in `target`).
    fn target_entered(&mut self, _node: usize, _target: &Denoiser) -> Result<()> {
        Ok(())
    }
    /// One batch of stage 2 to look at: of the first update towards a target, and of the last update of all.
    fn looked_into(&mut self, _node: usize, _updates: u64, _look: &Look) -> Result<()> {
        Ok(())
    }
    /// Stage 2 leaves a target for the next one; the student has its averaged weights.
    fn target_left(&mut self, _node: usize, _student: &Student) -> Result<()> {
        Ok(())
    }
}

/// Where a stage begins or goes on.
#[derive(Debug, Clone, Copy)]
pub struct Begin {
    pub stage: Stage,
    pub iteration: u64,
    /// Iterations of the whole stage.
    pub total: u64,
    pub updates: u64,
    /// Last node of the trajectory.
    pub last: usize,
}

/// Where a stage stands after an iteration.
pub struct Step<'a> {
    pub stage: Stage,
    pub iteration: u64,
    pub total: u64,
    /// Generator updates done, and whether this iteration was one.
    pub updates: u64,
    pub updated: bool,
    /// Images generated in the stage.
    pub images: u64,
    /// Seconds spent in the stage.
    pub seconds: f64,
    pub node: usize,
    /// Stage 2's networks.
    pub networks: Option<Running<'a>>,
}

/// The networks of stage 2 as they stand.
#[derive(Clone)]
pub struct Running<'a> {
    pub student: &'a Student,
    /// The average that becomes the student.
    pub average: &'a Student,
    /// Averages of other half-lives, in images.
    pub others: Vec<(f64, &'a Student)>,
    pub target: &'a Denoiser,
    pub fake: Option<&'a Denoiser>,
}

/// What an observer asks of the loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wish {
    /// A checkpoint now.
    pub checkpoint: bool,
    /// The stage ends here, as if all its iterations were done.
    pub end: bool,
}

/// An observer that looks away.
#[derive(Debug, Clone, Copy)]
pub struct Unobserved;
impl Observer for Unobserved {}

/// What a run needs beside the teacher.
pub struct Job<'a> {
    pub config: &'a Config,
    /// The student's network and weights, where it is not the teacher's copy.
    pub student: Option<&'a Student>,
    pub run: &'a RunDir,
    pub observer: &'a mut dyn Observer,
    /// Raised from outside (Ctrl-C): the run stops after the present step, with a checkpoint.
    pub stop: &'a AtomicBool,
    /// Shows no progress.
    pub silent: bool,
}

impl Job<'_> {
    /// The student that the run begins with.
    pub(crate) fn initial(&self, teacher: &Denoiser) -> Result<Student> {
        Student::initial(self.student, teacher, &self.config.student, self.config.seed)
    }

    /// Hash of the initial student's weights, where it is not the teacher's copy.
    pub(crate) fn student_hash(&self, teacher: &Denoiser) -> Result<Option<String>> {
        Student::hash_of_initial(self.student, teacher, self.config)
    }

    pub(crate) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// Batches and losses for one teacher card and configuration.
#[derive(Debug)]
pub struct Batches {
    pub batch: usize,
    pub device: Device,
    seed: u64,
    shape: [i64; 3],
    conditions: ConditionSource,
    pub generator_levels: Levels,
    /// Of the fake score in stage 2.
    pub fake_levels: Levels,
    /// Of the degrading copy in stage 1.
    pub degrade_levels: Levels,
}

impl Batches {
    pub fn new(config: &Config, teacher: &Denoiser) -> Result<Self> {
        let card = teacher.card();
        let schedule = card.schedule()?;
        let table = schedule.training_sigmas(config.noise.levels);
        let discrete = schedule.steps().is_some();
        let noise = &config.noise;
        let levels = |distribution, range| Levels::new(noise, distribution, range, &table, discrete);
        let fake = match noise.fake_distribution {
            FakeDistribution::Same => noise.distribution,
            FakeDistribution::Table => Distribution::Table,
            FakeDistribution::Lognormal => Distribution::Lognormal,
        };
        Ok(Self {
            batch: config.batch,
            device: teacher.params().tensors().first().map_or(Device::Cpu, Tensor::device),
            seed: config.seed,
            shape: card.shape.map(|d| d as i64),
            conditions: conditions(config, card)?,
            generator_levels: levels(noise.distribution, noise.generator),
            fake_levels: levels(fake, noise.fake),
            degrade_levels: levels(noise.distribution, noise.fake),
        })
    }

    /// Noise levels and noise of a loss of `denoiser`; `form` as the step is to have it.
    pub fn noised(
        &self,
        draws: &Draws,
        levels: &Levels,
        uses: [Use; 2],
        denoiser: &Denoiser,
        form: Form,
    ) -> Result<Noised> {
        let [sigma, noise] = uses;
        Noised::new(denoiser, &draws.sigmas(sigma, levels, self.batch), &self.noise(draws, noise)?, form)
    }

    /// Draws of one micro-batch.
    pub fn draws(&self, phase: Phase, iteration: u64, micro: usize) -> Draws {
        Draws::new(self.seed, phase, iteration, micro)
    }

    /// Standard normal images.
    pub fn noise(&self, draws: &Draws, what: Use) -> Result<Tensor> {
        let [c, h, w] = self.shape;
        draws.noise(what, &[self.batch as i64, c, h, w], self.device)
    }

    /// Standard normal noise for a batch of a student's images.
    pub fn latent(&self, draws: &Draws, student: &Student) -> Result<Tensor> {
        draws.noise(Use::Latent, &student.noise_size(self.batch as i64), self.device)
    }

    /// Random conditions of a batch.
    pub fn conditions(&self, draws: &Draws, denoiser: &Denoiser) -> Result<Conditions> {
        Conditions::from_host(&draws.conditions(&self.conditions, denoiser.card(), self.batch)?, self.device)
    }
}

/// Where the configured conditions come from, checked against the card.
pub fn conditions(config: &Config, card: &TeacherCard) -> Result<ConditionSource> {
    let file = Some(Path::new(&config.conditions.file)).filter(|p| !p.as_os_str().is_empty());
    ConditionSource::new(card, file, &config.conditions.weights)
}

/// What runs the pieces of a step on this device: as they are written, or as CUDA graphs where that is configured.
pub(crate) fn recorder(config: &Config, device: Device) -> Result<(Recorder<Inputs>, Form)> {
    let recorder = Recorder::new(config.cuda_graphs, device)?;
    let form = if recorder.records() { Form::Fixed } else { Form::Short };
    Ok((recorder, form))
}

/// Lays out a network's filters as configured, and with them those of all copies to come.
pub(crate) fn lay_out(config: &Config, params: &ParamSet) -> Result<()> {
    match config.channels_last(params.tensors().first().map_or(Device::Cpu, Tensor::device)) {
        true => params.channels_last(),
        false => Ok(()),
    }
}

/// The configured guidance of the targets.
pub fn guidance(config: &Config) -> Result<Guidance> {
    Guidance::new(config.guidance, config.guidance_interval)
}

/// f32 `[B, 1, 1, 1]` on `device`, without waiting for the device.
pub fn column(values: &[f64], device: Device) -> Result<Tensor> {
    let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
    let host = Tensor::f_from_slice(&values)?.f_view([values.len() as i64, 1, 1, 1])?;
    crate::torch::device::send(&host, device)
}

/// Weight of the denoising loss in x0 space that makes it the teacher's own: the error of the network's output F, since
/// `x0 = skip x_net + out F`, weighs `1/out^2` (epsilon-, v-, flow-matching loss, and for EDM
/// `lambda = (s^2 + sd^2) / (s sd)^2`, which is also the weight for networks that give x0 itself).
pub fn loss_weight(denoiser: &Denoiser, sigma: f64) -> Result<f64> {
    let card = denoiser.card();
    // (A consistency model's output weighs nothing at sigma_min, where its conversion would weigh without bounds.)
    if matches!(card.prediction, Prediction::Denoised | Prediction::Consistency) {
        let sd = card.sigma_data;
        return Ok((sigma * sigma + sd * sd) / (sigma * sd).powi(2));
    }
    Ok(1.0 / denoiser.conversion().at(sigma)?.out.powi(2))
}

/// Loss weights of a batch as a column.
pub fn weights(denoiser: &Denoiser, sigmas: &[f64], device: Device) -> Result<Tensor> {
    column(&sigmas.iter().map(|&s| loss_weight(denoiser, s)).collect::<Result<Vec<_>>>()?, device)
}

/// Denoising score matching on fixed images: `mean weight(sigma) (D(x0 + sigma e; sigma) - x0)^2`.
pub fn denoising_loss(
    denoiser: &Denoiser,
    x0: &Tensor,
    sigmas: &[f64],
    noise: &Tensor,
    conditions: &Conditions,
) -> Result<Tensor> {
    Noised::new(denoiser, sigmas, noise, Form::Short)?.loss(denoiser, x0, conditions)
}

/// AdamW settings with this learning rate, and these betas where they are given.
pub fn adamw(config: &Config, lr: f64, betas: &[f64]) -> AdamWConfig {
    let o = &config.optimizer;
    AdamWConfig {
        lr,
        beta1: betas.first().copied().unwrap_or(o.beta1),
        beta2: betas.get(1).copied().unwrap_or(o.beta2),
        eps: o.eps,
        weight_decay: o.weight_decay,
        clip: o.clip,
        warmup: o.warmup,
    }
}

/// Metrics, progress and time of one stage.
pub(crate) struct Log {
    stage: Stage,
    pub meters: Meters,
    file: MetricsFile,
    pub progress: Progress,
    started: Instant,
    seconds_before: f64,
    row_at: Instant,
    row_images: u64,
    /// Steps in a row that may be skipped: of the generator, and of the others.
    max_skips: [u64; 2],
}

impl Log {
    /// Opens `metrics.jsonl`, dropping the rows after the checkpoint that the stage goes on from.
    pub fn new(job: &Job, state: &State, total: u64, last: usize, images: u64) -> Result<Self> {
        // A run that is shorter than what may be skipped must not end well either where nothing was ever done.
        let most = |steps: u64| job.config.optimizer.max_skips.min(steps);
        let keep = |row: &Row| match (row.stage, state.stage) {
            (Stage::Degrade, Stage::Backtrack) => true,
            (Stage::Backtrack, Stage::Degrade) => false,
            _ => row.iteration <= state.iteration,
        };
        Ok(Self {
            stage: state.stage,
            meters: Meters::default(),
            file: MetricsFile::open(&job.run.metrics(), keep)?,
            progress: Progress::new(state.stage, total, state.iteration, last, job.silent),
            started: Instant::now(),
            seconds_before: state.seconds,
            row_at: Instant::now(),
            row_images: images,
            max_skips: [most(total / job.config.backtrack.ratio), most(total)],
        })
    }

    /// Seconds spent in the stage, earlier processes included.
    pub fn seconds(&self) -> f64 {
        self.seconds_before + self.started.elapsed().as_secs_f64()
    }

    /// Adds an optimiser's counters of skipped steps: in all, and in a row.
    pub fn skips(&mut self, names: [&'static str; 2], adam: &AdamW) -> Result<()> {
        let (total, row) = adam.skipped();
        self.meters.set(names[0], total)?;
        self.meters.set(names[1], row)
    }

    /// Reads the meters, writes a row, shows it. Fails where a network has had nothing but gradients that are not finite
    /// for too long; `culprit` tells which network is at fault.
    pub fn row(
        &mut self,
        at: At,
        observer: &mut dyn Observer,
        culprit: &dyn Fn() -> Result<Option<Culprit>>,
    ) -> Result<Means> {
        let means = self.meters.take()?;
        let seconds = self.row_at.elapsed().as_secs_f64().max(1e-9);
        let skips = |names: &[&str]| names.iter().filter_map(|n| means.get(n)).sum::<f64>() as u64;
        let row = Row {
            stage: self.stage,
            iteration: at.iteration,
            node: at.node,
            loss_fake: means.get("loss_fake"),
            loss_generator: means.get("loss_generator"),
            grad_norm_fake: means.get("grad_norm_fake"),
            grad_norm_generator: means.get("grad_norm_generator"),
            mismatch: means.get("mismatch"),
            loss_gan: means.get("loss_gan"),
            loss_discriminator: means.get("loss_discriminator"),
            lr: at.lr,
            updates: at.updates,
            images: at.images,
            images_per_s: (at.images - self.row_images) as f64 / seconds,
            seconds: self.seconds(),
            skipped: skips(&["skipped_fake", "skipped_generator", "skipped_head"]),
        };
        self.row_at = Instant::now();
        self.row_images = at.images;
        self.file.append(&row)?;
        self.progress.row(&row);
        observer.metrics(&row)?;
        let [most_generator, most] = self.max_skips;
        let trained = if self.stage == Stage::Degrade { "the degraded copy" } else { "the fake score" };
        for (name, network, most) in [
            ("in_a_row_generator", "the generator", most_generator),
            ("in_a_row_fake", trained, most),
            ("in_a_row_head", "the discriminator's head", most),
        ] {
            let Some(steps) = means.get(name).filter(|n| *n >= most as f64) else { continue };
            let what = format!(
                "{}, iteration {}: the gradient of {network} has not been finite for {steps} steps in a row",
                self.stage.name(),
                at.iteration
            );
            return Err(match culprit()? {
                Some(c) => Error::backend(format!("{what}: {}", c.found)).hint(c.hint),
                None => Error::backend(format!(
                    "{what}, though each network gives finite values: it overflows on its way back"
                ))
                .hint("a lower learning rate, a smaller optimizer.clip, or f32 where precision is bf16"),
            });
        }
        Ok(means)
    }

    /// Writes a checkpoint.
    pub fn checkpoint(&self, job: &Job, state: &mut State, tensors: &[(String, Tensor)]) -> Result<()> {
        state.seconds = self.seconds();
        checkpoint::save(&job.run.checkpoints(), state, tensors)
    }
}

/// Where a row of metrics stands.
pub(crate) struct At {
    pub iteration: u64,
    pub node: usize,
    pub lr: f64,
    pub updates: u64,
    pub images: u64,
}
