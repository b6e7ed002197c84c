//! What a run is asked to do.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use crate::distill::checkpoint::StageKind;
use crate::distill::objective::Objective;
use crate::distill::{Config, RunDir, Stages};
use crate::error::{Error, Result};
use crate::graph::TrainableChoice;
use crate::run::monitor::{Console, Monitor};
use crate::run::origin::Forms;
use crate::run::teacher::TeacherOptions;
use crate::run::time_limit::TimeLimit;
use crate::torch::Operators;
use crate::torch::device;
use crate::torch::dist::{self, World};

/// Makes the paths of a configuration absolute: a run goes on from any folder.
pub fn from_anywhere(config: &mut Config) {
    let paths = [
        &mut config.guidance_by,
        &mut config.student.file,
        &mut config.conditions.file,
        &mut config.gan.data,
        &mut config.evaluate.reference,
        &mut config.evaluate.features,
        &mut config.log.decoder,
    ];
    for path in paths.into_iter().filter(|p| !p.is_empty()) {
        if let Some(absolute) = std::path::absolute(&*path).ok().and_then(|p| p.to_str().map(str::to_owned)) {
            *path = absolute;
        }
    }
}

/// Whether a request goes on with the run in its directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Resume {
    /// It starts a new run.
    #[default]
    Never,
    /// There must be one.
    Always,
    /// It goes on where one has begun, and starts one otherwise: for launchers that repeat a command line.
    IfBegun,
}

/// The folder of a new run that is being prepared: its student is tried before the first step, and nothing in it is worth keeping.
#[derive(Debug, Clone, Default)]
pub struct Unbegun(Arc<Mutex<Option<RunDir>>>);

impl Unbegun {
    /// From now on [`Unbegun::discard`] removes this folder; with `None` nothing.
    pub(super) fn set(&self, run: Option<RunDir>) {
        *self.0.lock().unwrap_or_else(|e| e.into_inner()) = run;
    }

    /// Removes the folder, where there is one: for a process that ends at once.
    pub fn discard(&self) {
        if let Some(run) = self.0.lock().unwrap_or_else(|e| e.into_inner()).take() {
            run.discard();
        }
    }
}

/// A run as it is asked for: which teacher, where, with which settings.
#[derive(Clone)]
pub struct Request {
    /// The teacher, an ONNX diffusion model.
    pub teacher: PathBuf,
    /// The run directory.
    pub out: PathBuf,
    /// Configuration file (TOML); for a run that goes on, its own where absent.
    pub config: Option<PathBuf>,
    /// Keys of the configuration as `key=value`; they win over the file.
    pub sets: Vec<String>,
    /// Values of the teacher card as `key=value`; they win over every other source.
    pub card: Vec<String>,
    /// Globs over names of tensors that are not trained.
    pub freeze: Vec<String>,
    /// Globs over names of tensors that are trained whatever they are used for; they win over `freeze`.
    pub train: Vec<String>,
    /// Whether to go on with the run in the directory, from its last checkpoint.
    pub resume: Resume,
    /// Takes the run folder over from a process of another machine that cannot be asked whether it lives.
    pub steal_lock: bool,
    /// Finds the largest batch that fits into memory, with the images an update that the configuration has; a run that goes on keeps
    /// its own.
    pub batch_auto: bool,
    /// Which stages to run.
    pub stages: Stages,
    /// A trajectory recorded elsewhere, or the run that recorded it; for stage 2 alone.
    pub trajectory: Option<PathBuf>,
    /// Operators of the teacher's file beside those of this crate.
    pub operators: Arc<Operators>,
    /// An objective of the caller's own; it wins over the configuration's.
    pub objective: Option<Arc<dyn Objective>>,
    /// The forms in which the student is written beside `student.onnx`.
    pub forms: Forms,
    /// Is told how the run goes on, and may pause it or ask for samples and checkpoints.
    pub monitor: Arc<dyn Monitor>,
    /// Raised from outside: the run stops after the present step, with a checkpoint.
    pub stop: Arc<AtomicBool>,
    /// Knows the folder of a new run as long as that is being prepared.
    pub unbegun: Unbegun,
    /// When the run must be over: it stops before, with a checkpoint.
    pub time_limit: Option<TimeLimit>,
    /// Whether a progress bar is shown on standard error.
    pub progress: bool,
    /// The processes that share the run. Each of them has this request, and rank 0 alone writes.
    pub world: World,
    /// Command line that `summary.json` names as the run's.
    pub command: String,
}

impl Request {
    /// Both stages with the default configuration, without a progress bar.
    pub fn new(teacher: impl Into<PathBuf>, out: impl Into<PathBuf>) -> Self {
        Self {
            teacher: teacher.into(),
            out: out.into(),
            config: None,
            sets: Vec::new(),
            card: Vec::new(),
            freeze: Vec::new(),
            train: Vec::new(),
            resume: Resume::Never,
            steal_lock: false,
            batch_auto: false,
            stages: Stages::Both,
            trajectory: None,
            operators: Arc::default(),
            objective: None,
            forms: Forms::default(),
            monitor: Arc::new(Console::default()),
            stop: Arc::new(AtomicBool::new(false)),
            unbegun: Unbegun::default(),
            time_limit: None,
            progress: false,
            world: World::alone(),
            command: "library call".into(),
        }
    }

    /// Warns of a run that ends before the teacher itself is the target.
    pub(super) fn warn_of_short(&self, config: &Config) {
        if let Some(short) = config.too_short() {
            self.monitor.remark(&format!("warning: {short}"));
        }
    }

    /// Sets a key of the configuration, as in `backtrack.updates=2000`.
    #[must_use]
    pub fn set(mut self, pair: impl Into<String>) -> Self {
        self.sets.push(pair.into());
        self
    }

    /// Adds operators that the teacher's file has and ONNX does not define.
    #[must_use]
    pub fn operators(mut self, operators: Operators) -> Self {
        self.operators = Arc::new(operators);
        self
    }

    /// Trains with an objective of the caller's own. A run that goes on wants the same one again.
    #[must_use]
    pub fn objective(mut self, objective: impl Objective + 'static) -> Self {
        self.objective = Some(Arc::new(objective));
        self
    }

    /// Takes the configuration from a file.
    #[must_use]
    pub fn config_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.config = Some(path.into());
        self
    }

    /// Whether this is stage 2 in the directory that stage 1 has filled, which needs no `resume`.
    pub(crate) fn follows(&self) -> bool {
        let recorded = self.out.join("config.toml").is_file();
        self.stages == Stages::Backtrack && self.trajectory.is_none() && recorded
    }

    /// Whether there is a run to go on with.
    pub(crate) fn goes_on(&self) -> bool {
        self.resume == Resume::Always || self.follows()
    }

    /// Settles [`Resume::IfBegun`].
    pub(crate) fn settle(&mut self) -> Result<()> {
        if self.resume == Resume::IfBegun {
            let run = RunDir::at(&self.out);
            let begun = match self.follows() {
                // (A checkpoint of stage 1 is what `degrade` leaves.)
                true => run.has_begun(StageKind::Backtrack)?,
                false => run.has_begun(StageKind::Degrade)?,
            };
            self.resume = if begun { Resume::Always } else { Resume::Never };
        }
        Ok(())
    }

    /// The configuration of a file with this request's keys and card.
    pub(crate) fn resolve(&self, file: Option<&Path>) -> Result<Config> {
        let mut config = Config::resolve_with(file, &self.sets, self.objective.clone())?;
        config.card.extend(self.card.iter().cloned());
        from_anywhere(&mut config);
        Ok(config)
    }

    /// The device of this process: with several of them `auto` and `cuda` are the CUDA device of its number on the machine.
    pub(crate) fn device(&self, config: &Config) -> Result<tch::Device> {
        if self.world.is_alone() {
            return device::parse(&config.device);
        }
        let device = device::parse_for(&config.device, self.world.number_here())?;
        if device.is_cuda() && !dist::has_nccl() {
            return Err(Error::unsupported(
                "this build has no NCCL, by which the CUDA devices of several processes work together",
            )
            .hint("build it where the headers of NCCL and CUDA are; --device cpu shares the run among CPUs"));
        }
        Ok(device)
    }

    /// How the teacher is read under this configuration.
    pub(crate) fn teacher_options(&self, config: &Config) -> TeacherOptions {
        TeacherOptions {
            card: config.card.clone(),
            conditions: config.conditions.file.clone(),
            trainable: TrainableChoice { declared: None, freeze: self.freeze.clone(), train: self.train.clone() },
            operators: self.operators.clone(),
        }
    }
}
