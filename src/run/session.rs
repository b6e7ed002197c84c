//! A run from its request to its student.

use std::path::PathBuf;

use tch::Device;

use crate::diffusion::Denoiser;
use crate::distill::checkpoint::{Checkpoint, StageKind};
use crate::distill::config::NodeCount;
use crate::distill::gan::taps;
use crate::distill::lock::RunLock;
use crate::distill::rundir::check_resumable;
use crate::distill::{Config, Job, Outcome, RunDir, Stages, Student, Trajectory, Unobserved, distill, trajectory};
use crate::error::{Context, Error, Result};
use crate::run::checks;
use crate::run::data_check::DataCheck;
use crate::run::identity::Identity;
use crate::run::memory;
use crate::run::origin::{self, StudentOrigin, Written};
use crate::run::ranks::{self, Settled};
use crate::run::request::{self, Request, Resume};
use crate::run::sheets::{Sheets, decoder};
use crate::run::student_file::StudentFile;
use crate::run::summary::write_summary;
use crate::run::teacher::{self, Teacher};
use crate::run::watcher::{self, Watcher};
use crate::runtime::decoder::Decoder;
use crate::torch::train::cuda_graph;
use crate::torch::{device, shim};

/// Students of more steps than this are told about while their export is tried.
const MANY_STEPS: usize = 8;

/// A request whose teacher and student are loaded and checked. Nothing is written yet.
pub struct PreparedRun {
    /// What the run was asked to do.
    pub request: Request,
    /// The configuration as resolved from the request.
    pub config: Config,
    /// Device that the networks are on.
    pub device: Device,
    /// The teacher as imported.
    pub teacher: Teacher,
    /// What decides the run's course beside configuration and card.
    pub identity: Identity,
    /// The teacher as both stages copy it.
    pub denoiser: Denoiser,
    /// The student's own network, where it has one.
    pub file: Option<StudentFile>,
    /// A student made of `file`, with the weights that `file` holds; absent where `file` is.
    pub student: Option<Student>,
    decoder: Option<Decoder>,
}

impl PreparedRun {
    /// Loads the teacher and the student, compares the import with ONNX Runtime, and checks what can be checked.
    ///
    /// Errors: whatever would make the run fail later, as far as it is known.
    pub fn new(request: Request) -> Result<Self> {
        let world = request.world.clone();
        world.agree(Self::build(request))
    }

    /// What is decided before the teacher is loaded, by rank 0.
    fn settle(request: &mut Request) -> Result<(Settled, Config)> {
        request.settle()?;
        if !request.steal_lock {
            RunLock::refuse_held(&request.out)?;
        }
        let saved = request.out.join("config.toml");
        let file = request.config.clone().or_else(|| Some(saved).filter(|p| request.goes_on() && p.is_file()));
        let config = request.resolve(file.as_deref())?;
        let batch_given = request.batch_auto || Config::gives(file.as_deref(), &request.sets, "batch")?;
        watcher::check(&config)?;
        let begun = request.remember()?;
        Ok((Settled::new(&config, batch_given, request, begun)?, config))
    }

    fn build(mut request: Request) -> Result<Self> {
        let world = request.world.clone();
        ranks::compare_requests(&request)?;
        let mut mine = None;
        let settled = world.from_leader(|| {
            let (settled, config) = Self::settle(&mut request)?;
            mine = Some(config);
            Ok(settled)
        })?;
        let told = settled.apply(&mut request)?;
        let (mut config, batch_given, begun) = (mine.unwrap_or(told), settled.batch_given, settled.begun);
        ranks::check_split(world.size(), &config)?;
        // The device decides where the teacher is loaded; the rest of the configuration is checked with it.
        let device = request.device(&config)?;
        cuda_graph::check_device(config.cuda_graphs, device)?;
        // As many as the run began with, where the library chose: its bytes depend on it.
        let chosen = begun.as_ref().filter(|_| request.goes_on()).map_or(0, |b| b.threads);
        let threads = device::set_threads(if config.threads > 0 { config.threads } else { chosen });
        shim::set_tf32(config.tf32)?;
        let teacher = Teacher::load(&request.teacher, &request.teacher_options(&config), device)?;
        let weaker = teacher::weaker(&teacher, &config)?;
        let identity = Identity::of(&request, &config, (&teacher, weaker.as_ref()), device, threads)?;
        if world.leads() {
            request.check_begun(begun.as_ref(), &identity)?;
        }
        ranks::compare_identities(&world, &identity)?;
        let denoiser = teacher::guided(&teacher, weaker.as_ref(), &config)?;
        if let Some(rows) = denoiser.fixed_batch().filter(|rows| !batch_given && *rows != config.batch) {
            config.batch = rows;
            request.monitor.remark(&format!("note: the teacher's file fixes the batch at {rows}: batch = {rows}"));
        }
        let file = origin::load(&config, &teacher, device)?;
        let own = file.as_ref().map(|f| f.student(&config.student)).transpose()?;
        let networks = (&teacher, &denoiser, own.as_ref());
        let config = ranks::shared(&request, || {
            let auto = request.batch_auto && !request.goes_on();
            let (config, found) = memory::foresee(&config, &request, networks, device, auto)?;
            if let Some(found) = found {
                request.monitor.remark(&found);
            }
            Ok(config)
        })?;
        for warning in teacher.warnings() {
            request.monitor.remark(&format!("warning: {warning}"));
        }
        if teacher.network.shared().narrowed {
            request
                .monitor
                .remark("note: the network computes in f64; it is trained in f32, and its student computes in f32");
        }
        if world.leads() {
            checks::check_import(&teacher, &config, &*request.monitor)?;
            if let Some(weaker) = &weaker {
                checks::check_import(weaker, &config, &*request.monitor).context("guidance_by")?;
            }
        }
        if request.forms.same_graph {
            StudentOrigin { teacher: &teacher, file: file.as_ref() }.check_same_graph()?;
        }
        let student = origin::given(file.as_ref(), &denoiser, &config)?;
        // (Of a trajectory that another run has recorded, how many nodes it has is known when that is opened.)
        if request.stages != Stages::Degrade && request.trajectory.is_none() {
            request.warn_of_short(&config);
        }
        let decoder = decoder(&config, &teacher.card.card)?;
        Ok(Self { request, config, device, teacher, identity, denoiser, file, student, decoder })
    }

    /// The teacher with the student's own network.
    pub fn origin(&self) -> StudentOrigin<'_> {
        StudentOrigin { teacher: &self.teacher, file: self.file.as_ref() }
    }

    /// Refuses settings that do not go together, or with the teacher, and writes, checks and runs an untrained student in a
    /// folder inside `place` that is removed again.
    pub fn rehearse(&self, place: &std::path::Path) -> Result<()> {
        checks::check_stages(&self.config, self.request.stages, &self.denoiser)?;
        let student = self.student.as_ref();
        checks::rehearse(self.origin(), &self.denoiser, student, &self.config, self.request.forms, place)
    }

    /// Opens the run directory: a new one, or the one to go on with.
    fn open_run(&self) -> Result<(RunDir, Config)> {
        let Request { out, stages, trajectory, .. } = &self.request;
        let card = &self.teacher.card;
        if self.request.goes_on() {
            return self.reopen();
        }
        let mut config = self.config.clone();
        checks::check_stages(&config, *stages, &self.denoiser)?;
        let hash = self.denoiser.params().hash()?;
        let recorded = trajectory.as_ref().map(|dir| Trajectory::open(&checks::of_run(dir), &hash)).transpose()?;
        if let Some(recorded) = &recorded {
            checks::check_recorded(recorded.dir(), &config, card)?;
            let initial = Student::hash_of_initial(self.student.as_ref(), &self.denoiser, &config)?;
            recorded.check_student(initial.as_deref())?;
            config.degrade.nodes = self.nodes_of(recorded)?;
            config.degrade.steps = config.degrade.steps.max(recorded.last() as u64);
            self.request.warn_of_short(&config);
        }
        if *stages == Stages::Backtrack && recorded.is_none() && config.degrade.nodes.any() {
            return Err(Error::usage(format!("{} holds no recorded trajectory", out.display())).hint(
                "run `disback degrade` first, give one with --trajectory, or do without: --set degrade.nodes=0",
            ));
        }
        let run = RunDir::create_with(out, &config, self.request.steal_lock)?;
        let filled =
            run.write_card(&card.card).and_then(|()| self.identity.write(&run)).and_then(|()| match recorded {
                Some(recorded) => recorded.copy_to(&run.trajectory()).map(drop),
                None => Ok(()),
            });
        match filled {
            Ok(()) => Ok((run, config)),
            Err(e) => {
                run.discard();
                Err(e)
            }
        }
    }

    /// `degrade.nodes` for a trajectory that another run has recorded. What `auto` has measured says how long each node is the target,
    /// unless this run was told a number of nodes.
    fn nodes_of(&self, recorded: &Trajectory) -> Result<NodeCount> {
        let Request { config, sets, monitor, .. } = &self.request;
        let said = Config::gives(config.as_deref(), sets, "degrade.nodes")?;
        let auto = self.config.degrade.nodes.is_auto();
        match recorded.plan() {
            Some(_) if auto || !said => {
                if !auto {
                    monitor.remark(
                        "note: the trajectory was planned by measurement, and the nodes are the target as long as it says \
                         (degrade.nodes = \"auto\"; give a number for backtrack.switch_every updates each)",
                    );
                }
                Ok(NodeCount::Auto)
            }
            None if auto => {
                monitor.remark(
                    "note: degrade.nodes is `auto`, but the trajectory was recorded without a plan by measurement: each node is the \
                     target for backtrack.switch_every updates",
                );
                Ok(recorded.last().into())
            }
            _ => Ok(recorded.last().into()),
        }
    }

    /// The run that is there, where this request may go on with it.
    fn reopen(&self) -> Result<(RunDir, Config)> {
        let request = &self.request;
        let (mut run, mut saved) = RunDir::open(&request.out)?;
        run.take(request.steal_lock)?;
        run.sweep();
        let card = &self.teacher.card;
        run.check_card(&card.card, &card.origins)?;
        let base = request.config.clone().unwrap_or_else(|| run.config_file());
        // What the card comes out as has been compared; how it was put together is as it was.
        let mut wanted = Config {
            card: saved.card.clone(),
            ..Config::resolve_with(Some(&base), &request.sets, request.objective.clone())?
        };
        if let Some(rows) = self.denoiser.fixed_batch()
            && !Config::gives(Some(&base), &request.sets, "batch")?
        {
            wanted.batch = rows;
        }
        [&mut wanted, &mut saved].into_iter().for_each(request::from_anywhere);
        let begun = Identity::read(&run)?;
        let same = begun.as_ref().map_or_else(Vec::new, |begun| begun.same_files(&self.identity));
        if request.resume == Resume::Always {
            check_resumable(&saved, &wanted, &same)?;
        } else {
            if run.has_begun(StageKind::Backtrack)? {
                return Err(Error::usage(format!("{} holds a run that has begun", request.out.display()))
                    .hint("--resume goes on with it"));
            }
            let fixed = |key: &str| ["degrade.", "student.", "noise."].iter().any(|s| key.starts_with(s));
            if let Some((key, before, now)) = saved.differences(&wanted)?.into_iter().find(|d| fixed(&d.0)) {
                return Err(Error::usage(format!(
                    "the trajectory was recorded with {key} = {before}, now it is {now}"
                )));
            }
        }
        checks::check_stages(&wanted, request.stages, &self.denoiser)?;
        run.write_config(&wanted)?;
        run.write_card(&card.card)?;
        // (The version stays that of the beginning.)
        if begun.is_none() {
            self.identity.write(&run)?;
        }
        Ok((run, wanted))
    }

    /// Opens the run directory and tries the export of an untrained student. What turns out to be unfit leaves no half of a run.
    pub fn open(self) -> Result<Session> {
        let world = self.request.world.clone();
        if !world.leads() {
            // Rank 0 writes; the others learn what it has settled.
            let config = ranks::shared(&self.request, || Ok(self.config.clone()))?;
            return Ok(Session { run: RunDir::at(&self.request.out), config, prepared: self });
        }
        let request = self.request.clone();
        let mut opened = None;
        ranks::shared(&request, || {
            let session = opened.insert(self.open_here()?);
            Ok(session.config.clone())
        })?;
        opened.ok_or_else(|| Error::mismatch("a run that was not opened"))
    }

    /// [`PreparedRun::open`] of one process.
    fn open_here(self) -> Result<Session> {
        let (run, config) = self.open_run()?;
        let fresh = !self.request.goes_on();
        let session = Session { run, config, prepared: self };
        if session.prepared.request.resume != Resume::Always {
            let p = &session.prepared;
            let (student, forms) = (p.student.as_ref(), p.request.forms);
            let steps = session.config.student.further_steps() + 1;
            if steps > MANY_STEPS {
                p.request.monitor.remark(&format!(
                    "note: writing and running an untrained student of {steps} steps in one graph before the first step; this takes longer \
                     the more steps it has"
                ));
            }
            p.request.unbegun.set(fresh.then(|| session.run.clone()));
            let tried = checks::rehearse(p.origin(), &p.denoiser, student, &session.config, forms, session.run.path());
            p.request.unbegun.set(None);
            tried.map_err(|e| session.undo(fresh, e))?;
        }
        Ok(session)
    }
}

/// A run whose folder is open: ready to train, or to go on.
pub struct Session {
    prepared: PreparedRun,
    run: RunDir,
    config: Config,
}

/// What a run came to.
#[derive(Debug)]
pub enum Finished {
    /// Stopped from outside in this stage, with a checkpoint.
    Stopped(StageKind),
    /// Stage 1 is done.
    Recorded(Trajectory),
    /// The student is trained and written.
    Distilled(Distilled),
    /// This process has done its share of a run that another one leads.
    Followed,
}

/// The student's files.
#[derive(Debug)]
pub struct Distilled {
    /// The first is `student.onnx`, or what became of it.
    pub files: Vec<Written>,
    /// Optimiser steps that were skipped because their gradients were not finite.
    pub skipped_steps: u64,
    /// What the run was warned of: losses that left their history, a student that collapsed.
    pub warnings: Vec<String>,
}

impl Distilled {
    /// The student, all its steps in one graph.
    pub fn student(&self) -> &PathBuf {
        &self.files[0].path
    }

    /// The first file that did not pass its check, and what the check said.
    pub fn failed(&self) -> Option<(&PathBuf, &Error)> {
        self.files.iter().find_map(|w| Some((&w.path, w.failed.as_ref()?)))
    }
}

impl Session {
    /// Loads, checks and opens everything that the request needs.
    ///
    /// Errors: whatever would make the run fail later, as far as it is known; a new run's folder is then not left behind.
    pub fn open(request: Request) -> Result<Self> {
        PreparedRun::new(request)?.open()
    }

    /// The run directory.
    pub fn run(&self) -> &RunDir {
        &self.run
    }

    /// The configuration as resolved.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// An error in the middle of a run, with what the run has reached and how it goes on.
    fn what_is_kept(&self, e: Error) -> Error {
        let run = &self.run;
        let how = "the same command with --resume goes on";
        match Checkpoint::latest_state(&run.checkpoints()) {
            Ok(Some(state)) => {
                let (stage, iteration) = (state.stage.name(), state.iteration);
                e.also(format!("the run is kept as it was after iteration {iteration} of stage `{stage}`: {how}"))
            }
            _ if run.trajectory().join(trajectory::INDEX).is_file() => e.also(format!("the trajectory is kept: {how}")),
            _ => e,
        }
    }

    fn undo(&self, fresh: bool, e: Error) -> Error {
        if fresh {
            self.run.discard();
        }
        e
    }

    /// Runs the stages that were asked for, writes the student, the summary and the report.
    ///
    /// Errors: what stops a run, with a checkpoint to go on from where one was due; a student that cannot be written as ONNX (its
    /// weights are saved). A student that fails its check is written and told in [`Distilled::failed`].
    pub fn distill(self) -> Result<Finished> {
        if self.prepared.request.world.leads() { self.lead() } else { self.follow() }
    }

    /// A process that computes its share and writes nothing.
    fn follow(self) -> Result<Finished> {
        let Self { prepared, run, config } = &self;
        let PreparedRun { request, denoiser, student, .. } = prepared;
        request.world.agree(Ok(()))?;
        let (stop, world): (&std::sync::atomic::AtomicBool, _) = (&request.stop, request.world.clone());
        let observer = &mut Unobserved;
        let job = Job { config, student: student.as_ref(), run, observer, stop, silent: true, world };
        match distill(job, denoiser, self.stages())? {
            Outcome::Stopped(stage) => Ok(Finished::Stopped(stage)),
            Outcome::Recorded(_) | Outcome::Finished(_) => Ok(Finished::Followed),
        }
    }

    /// The stages that are to be run. (Without a trajectory stage 1 has nothing to do.)
    fn stages(&self) -> Stages {
        let request = &self.prepared.request;
        let none = !self.config.degrade.nodes.any() && request.trajectory.is_none();
        if none && request.stages == Stages::Backtrack { Stages::Both } else { request.stages }
    }

    fn lead(mut self) -> Result<Finished> {
        let fresh = !self.prepared.request.goes_on();
        let decoder = self.prepared.decoder.take();
        let Self { prepared, run, config } = &self;
        let PreparedRun { request, device, teacher, denoiser, file, student, .. } = prepared;
        let (origin, student) = (StudentOrigin { teacher, file: file.as_ref() }, student.as_ref());
        let watched = || -> Result<Watcher> {
            let sheets = Sheets::new(run, config, &teacher.card.card, student, decoder)?;
            let mut watcher = Watcher::new(origin, config, run, sheets, request.monitor.clone(), *device)?;
            watcher.time_limit = request.time_limit;
            if request.stages != Stages::Degrade {
                for tap in taps::configured(config, denoiser)?.iter().filter(|tap| tap.said != tap.name) {
                    request.monitor.remark(&format!("gan.taps: {tap}"));
                }
                watcher.data = DataCheck::begin(config, &teacher.card.card, fresh, &*request.monitor)?;
            }
            Ok(watcher)
        };
        let mut watcher = request.world.agree(watched()).map_err(|e| self.undo(fresh, e))?;
        let (stop, world): (&std::sync::atomic::AtomicBool, _) = (&request.stop, request.world.clone());
        let job = Job { config, student, run, observer: &mut watcher, stop, silent: !request.progress, world };
        let outcome = distill(job, denoiser, self.stages()).with_context(|| request.out.display().to_string());
        let outcome = outcome.map_err(|e| self.what_is_kept(e))?;
        let finished = match outcome {
            Outcome::Stopped(stage) => Finished::Stopped(stage),
            Outcome::Recorded(trajectory) => Finished::Recorded(trajectory),
            Outcome::Finished(student) => {
                watcher.finished(&student)?;
                let files = origin.export(&student, config, request.forms, run.path()).map_err(|e| {
                    e.context("the student is trained, but cannot be written as ONNX").hint(format!(
                        "its weights are in {}; `disback export` tries again",
                        run.student_weights().display()
                    ))
                })?;
                let skipped_steps = write_summary(origin, request, config, run, (*device, watcher.seconds_looking()))?;
                Finished::Distilled(Distilled { files, skipped_steps, warnings: watcher.warnings() })
            }
        };
        crate::report::write(run.path())?;
        Ok(finished)
    }
}
