//! `disback distill`: both stages, then the student as ONNX. `degrade` and `backtrack` share what is here.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use serde_json::{Value, json};
use tch::Device;

use super::Globals;
use super::run_observer::{Sheets, decoder};
use super::student::{self, Forms, Origin, method, objective_name};
use super::teacher::TeacherArgs;
use super::tui::{Shared, View};
use super::watcher::Watcher;
use crate::diffusion::{Denoiser, ResolvedCard};
use crate::distill::checkpoint::{Checkpoint, Stage};
use crate::distill::rundir::check_resumable;
use crate::distill::{Config, Job, Outcome, RunDir, Stages, Student, distill, metrics};
use crate::error::{Context, Error, Kind, Result};
use crate::parity::{self, Tolerance};
use crate::teacher::Teacher;
use crate::tensor::DType;
use crate::torch::{Forward, device, shim};

/// Options of every command that trains.
#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub teacher: TeacherArgs,
    /// The run directory.
    #[arg(short, long, value_name = "DIR")]
    pub out: PathBuf,
    /// Goes on with the run in the directory, from its last checkpoint.
    #[arg(long)]
    pub resume: bool,
    /// Makes three steps of each stage in a folder of its own and prints the plan, the memory and the time; leaves nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Configuration file (TOML); what it leaves out has the defaults of config.toml in any run directory.
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Any key of the configuration, as in degrade.lr=1e-4; wins over the file and the options below.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
    /// cpu, cuda, cuda:<index>, or auto: CUDA where there is one. [device]
    #[arg(long)]
    pub device: Option<String>,
    /// CPU threads. [threads]
    #[arg(long)]
    pub threads: Option<usize>,
    /// [seed]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Images a forward pass. [batch]
    #[arg(long)]
    pub batch: Option<usize>,
    /// Forward passes an optimiser step. [accumulate]
    #[arg(long)]
    pub accumulate: Option<usize>,
    /// A view of the run in the terminal, with keys to checkpoint, sample, pause and stop.
    #[arg(long)]
    pub tui: bool,
    /// ONNX network of the student, in the place of the teacher's copy. [student.file]
    #[arg(long, value_name = "FILE")]
    pub student: Option<PathBuf>,
    /// Noise level of the initial student; 0: where the schedule starts. [student.sigma_init]
    #[arg(long, value_name = "SIGMA")]
    pub sigma_init: Option<f64>,
}

/// Options of stage 1.
#[derive(Debug, Args)]
pub struct DegradeOptions {
    /// Nodes of the trajectory beside the teacher. [degrade.nodes]
    #[arg(long)]
    pub nodes: Option<usize>,
    /// Steps of stage 1. [degrade.steps]
    #[arg(long, value_name = "N")]
    pub degrade_steps: Option<u64>,
}

/// Options of stage 2.
#[derive(Debug, Args)]
pub struct BacktrackOptions {
    /// Generator updates. [backtrack.updates]
    #[arg(long, value_name = "N")]
    pub updates: Option<u64>,
    /// dmd, diff-instruct (or vsd), sid, sim, sds, dmd2 or f-distill. [objective]
    #[arg(long)]
    pub objective: Option<String>,
    /// Guidance scale of the targets. [guidance]
    #[arg(long, value_name = "SCALE")]
    pub guidance: Option<f64>,
    /// Learning rate of generator and fake score. [backtrack.lr_generator, backtrack.lr_fake]
    #[arg(long)]
    pub lr: Option<f64>,
    /// Also write student-same-graph.onnx: the teacher's graph with the student's weights.
    #[arg(long)]
    pub same_graph: bool,
    /// Of a student of several steps, also write each step as student-step-<k>.onnx.
    #[arg(long)]
    pub per_step: bool,
}

/// Distil a teacher into a one-step student: degradation recording, then distribution backtracking, then export.
#[derive(Debug, Args)]
pub struct DistillArgs {
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    degrade: DegradeOptions,
    #[command(flatten)]
    backtrack: BacktrackOptions,
}

pub fn run(args: &DistillArgs, globals: Globals) -> Result<ExitCode> {
    let mut sets = args.degrade.sets();
    sets.extend(args.backtrack.sets());
    let BacktrackOptions { same_graph, per_step, .. } = args.backtrack;
    train(&args.run, sets, Plan { stages: Stages::Both, trajectory: None, same_graph, per_step }, globals)
}

/// What a command does beside the common options.
pub struct Plan<'a> {
    pub stages: Stages,
    /// A trajectory recorded elsewhere.
    pub trajectory: Option<&'a Path>,
    pub same_graph: bool,
    pub per_step: bool,
}

impl Plan<'_> {
    fn forms(&self) -> Forms {
        Forms { per_step: self.per_step, same_graph: self.same_graph }
    }

    /// Stage 2 in the directory that `degrade` has filled needs no --resume.
    fn follows(&self, out: &Path) -> bool {
        self.stages == Stages::Backtrack && self.trajectory.is_none() && out.join("config.toml").is_file()
    }
}

fn pair(key: &str, value: Option<impl ToString>) -> Option<String> {
    value.map(|v| format!("{key}={}", v.to_string()))
}

impl RunArgs {
    fn sets(&self) -> Vec<String> {
        let pairs = [
            pair("device", self.device.clone()),
            pair("threads", self.threads),
            pair("seed", self.seed),
            pair("batch", self.batch),
            pair("accumulate", self.accumulate),
            pair("student.sigma_init", self.sigma_init),
            self.student.as_ref().map(|f| format!("student.file={}", toml::Value::from(f.display().to_string()))),
        ];
        pairs.into_iter().flatten().collect()
    }
}

impl DegradeOptions {
    pub fn sets(&self) -> Vec<String> {
        let pairs = [pair("degrade.nodes", self.nodes), pair("degrade.steps", self.degrade_steps)];
        pairs.into_iter().flatten().collect()
    }
}

impl BacktrackOptions {
    pub fn sets(&self) -> Vec<String> {
        let pairs = [
            pair("backtrack.updates", self.updates),
            pair("objective", self.objective.clone()),
            pair("guidance", self.guidance),
            pair("backtrack.lr_generator", self.lr),
            pair("backtrack.lr_fake", self.lr),
        ];
        pairs.into_iter().flatten().collect()
    }
}

/// Raised by Ctrl-C or a termination signal; a second one ends the process at once.
pub(super) static STOP: AtomicBool = AtomicBool::new(false);

pub(super) fn watch_signals() -> Result<()> {
    ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    })
    .map_err(|e| Error::io(format!("cannot watch for Ctrl-C: {e}")))
}

/// The run directory and its configuration: a new one, or the one to go on with.
fn open_run(
    args: &RunArgs,
    sets: &[String],
    plan: &Plan,
    card: &ResolvedCard,
    teacher: &Denoiser,
    student: Option<&Student>,
) -> Result<(RunDir, Config)> {
    let follows = plan.follows(&args.out);
    if !args.resume && !follows {
        let mut config = args.teacher.reading.with_card(Config::resolve(args.config.as_deref(), sets)?);
        check_stages(&config, plan, teacher)?;
        let hash = teacher.params().hash()?;
        let trajectory =
            plan.trajectory.map(|dir| crate::distill::Trajectory::open(&of_run(dir), &hash)).transpose()?;
        if let Some(trajectory) = &trajectory {
            check_recorded(trajectory.dir(), &config, card)?;
            trajectory.check_student(Student::hash_of_initial(student, teacher, &config)?.as_deref())?;
            config.degrade.nodes = trajectory.last();
            config.degrade.steps = config.degrade.steps.max(trajectory.last() as u64);
        }
        if plan.stages == Stages::Backtrack && trajectory.is_none() && config.degrade.nodes > 0 {
            return Err(Error::usage(format!("{} holds no recorded trajectory", args.out.display())).hint(
                "run `disback degrade` first, give one with --trajectory, or do without: --set degrade.nodes=0",
            ));
        }
        let run = RunDir::create(&args.out, &config)?;
        run.write_card(&card.card)?;
        if let Some(trajectory) = trajectory {
            trajectory.copy_to(&run.trajectory())?;
        }
        return Ok((run, config));
    }
    let (run, saved) = RunDir::open(&args.out)?;
    run.check_card(&card.card, &card.origins)?;
    let base = args.config.clone().unwrap_or_else(|| run.config_file());
    // What the card comes out as has been compared; how it was put together is as it was.
    let wanted = Config { card: saved.card.clone(), ..Config::resolve(Some(&base), sets)? };
    // (A checkpoint of stage 1 is what `degrade` leaves.)
    let checkpoint = Checkpoint::latest_state(&run.checkpoints())?;
    let begun = checkpoint.is_some_and(|c| c.stage == Stage::Backtrack) || run.student_weights().is_file();
    if follows && !args.resume {
        if begun {
            return Err(Error::usage(format!("{} holds a run that has begun", args.out.display()))
                .hint("--resume goes on with it"));
        }
        let fixed = |key: &str| ["degrade.", "student.", "noise."].iter().any(|s| key.starts_with(s));
        if let Some((key, before, now)) = saved.differences(&wanted)?.into_iter().find(|d| fixed(&d.0)) {
            return Err(Error::usage(format!("the trajectory was recorded with {key} = {before}, now it is {now}")));
        }
    } else {
        check_resumable(&saved, &wanted)?;
    }
    check_stages(&wanted, plan, teacher)?;
    run.write_config(&wanted)?;
    run.write_card(&card.card)?;
    Ok((run, wanted))
}

/// The trajectory's folder, where a run's was given.
fn of_run(dir: &Path) -> PathBuf {
    let inside = dir.join("trajectory");
    if !dir.join("trajectory.json").is_file() && inside.is_dir() { inside } else { dir.to_owned() }
}

/// Refuses a trajectory that a run recorded with another reading of the teacher, or on the samples of other noise levels of
/// the student. (Its weights have a hash.)
fn check_recorded(trajectory: &Path, config: &Config, card: &ResolvedCard) -> Result<()> {
    RunDir::at(&trajectory.join("..")).check_card(&card.card, &card.origins)?;
    let file = trajectory.join("../config.toml");
    if !file.is_file() {
        return Ok(());
    }
    let levels = ["student.sigma_init", "student.sigmas", "student.stochastic"];
    let recorded = Config::resolve(Some(&file), &[])?;
    match recorded.differences(config)?.into_iter().find(|d| levels.contains(&d.0.as_str())) {
        None => Ok(()),
        Some((key, before, now)) => Err(Error::usage(format!(
            "the trajectory was recorded with {key} = {before}, now it is {now}"
        ))
        .hint("stage 1 follows the initial student's samples: record it for this student with `disback degrade`")),
    }
}

/// What can be known to fail later is refused before anything is written.
fn check_stages(config: &Config, plan: &Plan, teacher: &Denoiser) -> Result<()> {
    if plan.stages == Stages::Degrade {
        check_student(config, teacher)?;
        return crate::distill::trainer::conditions(config, teacher.card()).map(drop);
    }
    check_stage_two(config, teacher)
}

/// The noise levels of a student that is the teacher's copy; one from a file was made with them.
fn check_student(config: &Config, teacher: &Denoiser) -> Result<()> {
    if config.student.file.is_empty() {
        crate::distill::student::start(teacher, &config.student)?;
        crate::distill::student::levels(teacher.conversion(), &config.student)?;
    }
    Ok(())
}

/// [`check_stages`] for runs that come to stage 2.
pub(super) fn check_stage_two(config: &Config, teacher: &Denoiser) -> Result<()> {
    let batches = crate::distill::trainer::Batches::new(config, teacher)?;
    crate::distill::gan::Gan::new(config, teacher, &batches)?;
    check_student(config, teacher)?;
    if config.guidance != 1.0 {
        teacher.check_guidance()?;
        let guidance = crate::distill::trainer::guidance(config)?;
        if !batches.generator_levels.any(|sigma| guidance.at(sigma) != 1.0) {
            let [low, high] = config.guidance_interval;
            return Err(Error::usage(format!(
                "guidance_interval is [{low}, {high}], which holds none of the noise levels that are drawn"
            ))
            .hint(
                "the interval is in noise levels (sigma), not in steps; noise.generator says which of them are drawn",
            ));
        }
    }
    Ok(())
}

/// Runs the stages of `plan` and prints what came of it.
pub fn train(args: &RunArgs, mut sets: Vec<String>, plan: Plan, globals: Globals) -> Result<ExitCode> {
    sets.extend(args.sets());
    sets.extend(args.sets.iter().cloned());
    // The device decides where the teacher is loaded; the rest of the configuration is checked with it.
    let goes_on = args.resume || plan.follows(&args.out);
    let saved = args.out.join("config.toml");
    let config_file = args.config.clone().or_else(|| Some(saved).filter(|p| goes_on && p.is_file()));
    let first = args.teacher.reading.with_card(Config::resolve(config_file.as_deref(), &sets)?);
    super::watcher::check(&first)?;
    if args.tui {
        super::tui::check()?;
    }
    let device = device::parse(&first.device)?;
    crate::torch::replay::check_device(first.cuda_graphs, device)?;
    device::set_threads(first.threads);
    shim::set_tf32(first.tf32)?;
    let teacher = args.teacher.load(&first, device)?;
    let denoiser = denoiser(&teacher, &first)?;
    check_rows(&teacher, &first)?;
    check_parity(&teacher, globals)?;
    let file = student::load(&first, &teacher, device)?;
    let origin = Origin { teacher: &teacher, file: file.as_ref() };
    if plan.same_graph {
        origin.check_same_graph()?;
    }
    let given = student::given(origin.file, &denoiser, &first)?;
    if let Some(short) = first.too_short().filter(|_| plan.stages != Stages::Degrade && !globals.quiet) {
        eprintln!("warning: {short}");
    }
    let decoder = decoder(&first, &teacher.card.card)?;
    if args.dry_run {
        super::dry_run::check(args.resume)?;
        check_stages(&first, &plan, &denoiser)?;
        let whole = teacher.network.params().elements() as u64;
        let folder = tempfile::tempdir().context("a folder for the steps of --dry-run")?;
        rehearse(origin, &denoiser, given.as_ref(), &first, plan.forms(), folder.path())?;
        return super::dry_run::run(&first, &denoiser, whole, given.as_ref(), device, globals);
    }
    let (run, config) = open_run(args, &sets, &plan, &teacher.card, &denoiser, given.as_ref())?;
    watch_signals()?;
    // What turns out to be unfit now leaves no half of a run.
    let fresh = !goes_on;
    let undo = |e: Error| {
        if fresh {
            run.discard();
        }
        e
    };
    if !args.resume {
        rehearse(origin, &denoiser, given.as_ref(), &config, plan.forms(), run.path()).map_err(undo)?;
    }
    let sheets = Sheets::new(&run, &config, &teacher.card.card, given.as_ref(), decoder).map_err(undo)?;
    let shared = args.tui.then(|| Shared::new(&STOP));
    let mut watcher = Watcher::new(origin, &config, &run, sheets, shared.clone(), device).map_err(undo)?;
    let view = shared.map(View::start).transpose()?;
    let silent = globals.quiet || globals.json || args.tui;
    let student = given.as_ref();
    let job = Job { config: &config, student, run: &run, observer: &mut watcher, stop: &STOP, silent };
    // Without a trajectory stage 1 has nothing to do.
    let stages = if config.degrade.nodes == 0 && plan.trajectory.is_none() && plan.stages == Stages::Backtrack {
        Stages::Both
    } else {
        plan.stages
    };
    let outcome = distill(job, &denoiser, stages).with_context(|| args.out.display().to_string());
    // The terminal is given back before anything is printed.
    drop(view);
    let outcome = outcome?;
    let mut failed = None;
    let (code, text, mut result) = match outcome {
        Outcome::Stopped(stage) => (
            ExitCode::from(130),
            format!("stopped in stage `{}`; the same command with --resume goes on", stage.name()),
            json!({ "ok": false, "outcome": "stopped", "stage": stage.name() }),
        ),
        Outcome::Recorded(trajectory) => (
            ExitCode::SUCCESS,
            format!("{} nodes in {}", trajectory.last(), trajectory.dir().display()),
            json!({ "ok": true, "outcome": "recorded", "nodes": trajectory.last(), "trajectory": trajectory.dir() }),
        ),
        Outcome::Finished(student) => {
            watcher.finished(&student)?;
            let files = origin.export(&student, &config, plan.forms(), run.path()).map_err(|e| {
                e.context("the student is trained, but cannot be written as ONNX").hint(format!(
                    "its weights are in {}; `disback export` tries again",
                    run.student_weights().display()
                ))
            })?;
            let skipped = write_summary(origin, &args.teacher.teacher, &config, &run, device)?;
            if skipped > 0 && !globals.quiet {
                eprintln!(
                    "warning: {skipped} optimiser steps were skipped, their gradients were not finite (`skipped` in metrics.jsonl)"
                );
            }
            let shown: Vec<_> = files.iter().map(|w| w.path.display().to_string()).collect();
            let student = files[0].path.clone();
            failed = files.into_iter().find_map(|w| Some((w.path, w.failed?)));
            (ExitCode::SUCCESS, shown.join("\n"), json!({ "ok": true, "outcome": "finished", "student": student }))
        }
    };
    crate::report::write(run.path())?;
    if let Some((path, why)) = failed {
        let what = format!("{}: the student is trained and written, but did not pass its check", path.display());
        return Err(why.context(what).hint(
            "its weights are in student.safetensors; `disback verify` compares the file in every engine. Please report it",
        ));
    }
    if globals.json {
        result["run"] = json!(run.path());
        println!("{result}");
    } else if !globals.quiet {
        println!("{text}");
    }
    Ok(code)
}

/// The teacher as stage 1 and 2 copy it: adapted, where the configuration says so.
pub(super) fn denoiser(teacher: &Teacher, config: &Config) -> Result<Denoiser> {
    let network = teacher.network.alias();
    let network = match config.lora() {
        Some(options) => network.adapt(&options)?,
        None => network,
    };
    Denoiser::new(Box::new(network), Arc::new(teacher.card.card.clone()), &teacher.inputs())
}

/// An export that fails must not cost a run either: the untrained student is written, checked and run in a folder that is
/// removed again.
fn rehearse(
    origin: Origin,
    teacher: &Denoiser,
    given: Option<&Student>,
    config: &Config,
    forms: Forms,
    place: &Path,
) -> Result<()> {
    let folder = tempfile::Builder::new().prefix(".disback-export-").tempdir_in(place);
    let folder = folder.with_context(|| place.display().to_string())?;
    let student = Student::initial(given, teacher, &config.student, config.seed)?;
    origin.rehearse(&student, config, forms, folder.path()).map_err(|e| {
        let e = e.context("the student could not be exported, so training was not begun");
        let wide = origin.teacher.network.inputs().iter().any(|p| p.dtype == Some(DType::F64));
        match wide {
            true => e.hint(
                "the network computes in f64, for which ONNX Runtime lacks most operators on the CPU: export the teacher in \
                 f32 (in PyTorch: model.float())",
            ),
            false => e,
        }
    })
}

/// Refuses a file that declares a free batch and takes one number of rows only: libtorch runs it at several.
fn check_rows(teacher: &Teacher, config: &Config) -> Result<()> {
    const ROWS: [usize; 3] = [2, 3, 5];
    let net = &teacher.network;
    let card = &teacher.card.card;
    let sample = net.inputs().iter().find(|p| p.name == card.sample);
    if sample.and_then(|p| p.dims()?.first().copied().flatten()).is_some() {
        return Ok(());
    }
    let runs = |rows: usize| parity::runs(net, card, rows, config.seed);
    let failed: Vec<(usize, Error)> = ROWS.into_iter().filter_map(|rows| Some((rows, runs(rows).err()?))).collect();
    let Some((rows, first)) = failed.into_iter().next() else { return Ok(()) };
    const TRIED: usize = 8;
    let takes: Vec<String> = (1..=TRIED).filter(|&rows| runs(rows).is_ok()).map(|rows| rows.to_string()).collect();
    if takes.is_empty() {
        return Err(first);
    }
    Err(first
        .context(format!(
            "the file declares a free batch, but does not run with {rows} rows (of 1 to {TRIED} rows it takes: {})",
            takes.join(", ")
        ))
        .hint(
            "the exporter wrote the batch of its example into the graph: export it again with the batch as a dynamic dimension \
             (in the forward, -1 for the batch in reshapes and no sizes turned into Python numbers), or declare that batch in the \
             file's inputs",
        ))
}

/// A wrong import must not cost a night of training: a small batch through ONNX Runtime first, where it is installed.
fn check_parity(teacher: &Teacher, globals: Globals) -> Result<()> {
    if !ort_is_here() {
        if !globals.quiet {
            eprintln!(
                "note: ONNX Runtime was not found, so the import is not compared with it (`disback doctor` says more)"
            );
        }
        return Ok(());
    }
    let inputs = parity::random_inputs(teacher.network.inputs(), Some(&teacher.card.card), 2, &Default::default(), 0)?;
    let found = match parity::check(&teacher.network, &inputs, None, Tolerance::default()) {
        Err(e) if e.kind() == Kind::Unsupported => {
            if !globals.quiet {
                eprintln!("note: the import is not compared with ONNX Runtime: {e}");
            }
            return Ok(());
        }
        other => other?,
    };
    if found.ok {
        return Ok(());
    }
    let at = found.first_divergence.map_or_else(String::new, |d| format!(", first at {} (`{}`)", d.node, d.value));
    Err(Error::mismatch(format!(
        "libtorch and ONNX Runtime disagree on this network by {:.1e} of the output's standard deviation{at}",
        found.max_rel
    ))
    .hint(
        "`disback parity` shows the values; `--no-raise` there tells whether a rewrite is at fault; please report it",
    ))
}

fn ort_is_here() -> bool {
    #[cfg(feature = "ort")]
    return !matches!(crate::runtime::ort::library(), Err(e) if e.is_absent());
    #[cfg(not(feature = "ort"))]
    false
}

/// Most bytes that this process has held in memory.
fn peak_host() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// `summary.json`: what the run was and what it cost. Keys of others (evaluations) stay.
/// Gives how many optimiser steps were skipped.
fn write_summary(origin: Origin, teacher: &Path, config: &Config, run: &RunDir, device: Device) -> Result<u64> {
    let path = run.summary();
    let old = std::fs::read(&path).ok().and_then(|b| serde_json::from_slice::<Value>(&b).ok());
    let mut summary = old.filter(Value::is_object).unwrap_or_else(|| json!({}));
    let rows = metrics::read(&run.metrics())?;
    let last = |stage: &str| rows.iter().rev().find(|r| r.stage.name() == stage);
    let seconds = |stage: &str| last(stage).map_or(0.0, |r| r.seconds);
    let skipped = ["degrade", "backtrack"].iter().filter_map(|stage| last(stage)).map(|r| r.skipped).sum::<u64>();
    summary["run"] = json!({
        "command": super::command_line(),
        // Where it lies from anywhere.
        "teacher": teacher.canonicalize().unwrap_or_else(|_| teacher.to_path_buf()),
        "method": method(config),
        "objective": objective_name(config),
        "guidance": config.guidance,
        "nodes": config.degrade.nodes,
        "generator_updates": config.backtrack.updates,
        "images_degrade": last("degrade").map_or(0, |r| r.images),
        "images_backtrack": last("backtrack").map_or(0, |r| r.images),
        "seconds_degrade": seconds("degrade"),
        "seconds_backtrack": seconds("backtrack"),
        "skipped_steps": skipped,
        "parameters": origin.teacher.network.params().elements(),
        "teacher_hash": origin.teacher.hash.clone(),
        "student": student::describe(config),
        "student_parameters": origin.file.map_or(origin.teacher.network.params(), |f| f.network.params()).elements(),
        "student_hash": origin.file.map(|f| f.hash.clone()),
        "device": device::name(device),
        "peak_host_bytes": peak_host(),
        "peak_device_bytes": shim::memory(device)?.map(|m| m.peak),
    });
    let text = serde_json::to_vec_pretty(&summary).map_err(|e| Error::io(e.to_string()))?;
    crate::files::write_atomic(&path, &text)?;
    Ok(skipped)
}
