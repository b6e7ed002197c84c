//! `disback distill`: both stages, then the student as ONNX. `degrade` and `backtrack` share what is here.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use serde_json::json;

use super::Globals;
use super::signals;
use super::teacher::TeacherArgs;
use super::tui::{Shared, View};
use crate::distill::config::NodeCount;
use crate::distill::{Config, Stages};
use crate::error::{Context, Result};
use crate::run::{Console, Finished, Forms, PreparedRun, Request, Resume, TimeLimit};
use crate::shown::{counted, tell};
use crate::torch::dist::World;
use crate::torch::dist::launcher::Place;

/// `--resume`, and `--resume=auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum When {
    #[value(hide = true)]
    Yes,
    Auto,
}

/// Options of every command that trains.
#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub teacher: TeacherArgs,
    /// The run directory.
    #[arg(short, long, value_name = "DIR")]
    pub out: PathBuf,
    /// Goes on with the run in the directory, from its last checkpoint; `--resume=auto`: where there is one, else starts it.
    #[arg(long, value_enum, value_name = "auto", num_args = 0..=1, require_equals = true, default_missing_value = "yes")]
    pub resume: Option<When>,
    /// Stops with a checkpoint before this time is over (exit code 75), in a Slurm job also before that ends: 23h45m, 90m, 1d12h,
    /// 45s (d, h, m and s in any order), or a number of minutes.
    #[arg(long, value_name = "TIME")]
    pub time_limit: Option<String>,
    /// With several processes (torchrun, srun, mpirun): how long one waits for another, as in 30m.
    #[arg(long, value_name = "TIME", default_value = "30m")]
    pub rank_timeout: String,
    /// Takes the folder over from a process of another machine that is gone, but seems to work in it (run.lock).
    #[arg(long)]
    pub steal_lock: bool,
    /// Makes three steps of each stage in a folder of its own and prints the plan, the memory and the time; leaves nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Configuration file (TOML); what it leaves out has the defaults of config.toml in any run directory. May be repeated: later
    /// files win.
    #[arg(short, long, value_name = "FILE")]
    pub config: Vec<PathBuf>,
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
    /// Images a forward pass; `auto`: as many as fit into memory, with the images an update kept. [batch]
    #[arg(long, value_name = "N|auto")]
    pub batch: Option<String>,
    /// Forward passes an optimiser step. [accumulate]
    #[arg(long)]
    pub accumulate: Option<usize>,
    /// A view of the run in the terminal, with keys to checkpoint, sample, pause and stop.
    #[arg(long)]
    pub tui: bool,
    /// ONNX network of the student, in the place of the teacher's copy. [student.file]
    #[arg(long, value_name = "FILE")]
    pub student: Option<PathBuf>,
    /// Takes a teacher that computes a row of a batch from its neighbours. [allow_batch_mixing]
    #[arg(long)]
    pub allow_batch_mixing: bool,
    /// Noise level of the initial student; 0: where the schedule starts. [student.sigma_init]
    #[arg(long, value_name = "SIGMA")]
    pub sigma_init: Option<f64>,
}

/// Options of stage 1.
#[derive(Debug, Args)]
pub struct DegradeOptions {
    /// Nodes of the trajectory beside the teacher; 0: no trajectory, the base method; `auto`: up to 3, chosen by what stage 1 measures.
    /// [degrade.nodes]
    #[arg(long, value_name = "N|auto")]
    pub nodes: Option<NodeCount>,
    /// Steps of stage 1. [degrade.steps]
    #[arg(long, value_name = "N")]
    pub degrade_steps: Option<u64>,
}

/// Options that say what stage 2 does.
#[derive(Debug, Args)]
pub struct MethodOptions {
    /// Generator updates. [backtrack.updates]
    #[arg(long, value_name = "N")]
    pub updates: Option<u64>,
    /// dmd, diff-instruct (or vsd), sid, sim, sds; with real images (gan.data) dmd2, f-distill, uni-instruct. [objective]
    #[arg(long)]
    pub objective: Option<String>,
    /// Guidance scale of the targets. [guidance]
    #[arg(long, value_name = "SCALE")]
    pub guidance: Option<f64>,
    /// Learning rate of generator and fake score. [backtrack.lr_generator, backtrack.lr_fake]
    #[arg(long)]
    pub lr: Option<f64>,
}

/// Options of stage 2.
#[derive(Debug, Args)]
pub struct BacktrackOptions {
    #[command(flatten)]
    pub method: MethodOptions,
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
    sets.extend(args.backtrack.method.sets());
    train(&args.run, args.run.request(sets, Stages::Both, args.backtrack.forms())?, globals)
}

fn pair(key: &str, value: Option<impl ToString>) -> Option<String> {
    value.map(|v| format!("{key}={}", v.to_string()))
}

impl RunArgs {
    /// What these options ask for, with further keys of the configuration before the common ones.
    ///
    /// Errors: a configuration file after the first that cannot be read.
    pub fn request(&self, mut sets: Vec<String>, stages: Stages, forms: Forms) -> Result<Request> {
        let later = self.config.iter().skip(1).map(|file| Config::sets_of(file)).collect::<Result<Vec<_>>>()?;
        drop(sets.splice(0..0, later.into_iter().flatten()));
        sets.extend(self.sets());
        sets.extend(self.sets.iter().cloned());
        let reading = &self.teacher.reading;
        Ok(Request {
            config: self.config.first().cloned(),
            sets,
            card: reading.card.overrides(),
            freeze: reading.freeze.clone(),
            train: reading.train.clone(),
            batch_auto: self.batch_auto(),
            resume: match self.resume {
                None => Resume::Never,
                Some(When::Yes) => Resume::Always,
                Some(When::Auto) => Resume::IfBegun,
            },
            steal_lock: self.steal_lock,
            stages,
            forms,
            stop: signals::STOP.clone(),
            unbegun: signals::UNBEGUN.clone(),
            command: super::command_line(),
            ..Request::new(&self.teacher.teacher, &self.out)
        })
    }

    fn batch_auto(&self) -> bool {
        self.batch.as_deref() == Some("auto")
    }

    /// The end of the time that was given, or that the job has, whichever comes first.
    fn time_limit(&self) -> Result<Option<TimeLimit>> {
        let given = self.time_limit.as_deref().map(TimeLimit::parse).transpose().context("--time-limit")?;
        let job = std::env::var("SLURM_JOB_END_TIME").ok().and_then(|end| TimeLimit::of_slurm(&end));
        Ok(match given.map(TimeLimit::after) {
            Some(given) => Some(given.sooner(job)),
            None => job,
        })
    }

    /// The processes that share the run, as the launcher has started them.
    fn world(&self) -> Result<World> {
        let Some(place) = Place::from_env()? else { return Ok(World::alone()) };
        let timeout = TimeLimit::parse(&self.rank_timeout).context("--rank-timeout")?;
        World::form(&place, timeout)
    }

    fn sets(&self) -> Vec<String> {
        let pairs = [
            pair("device", self.device.clone()),
            pair("threads", self.threads),
            pair("seed", self.seed),
            pair("batch", self.batch.as_ref().filter(|_| !self.batch_auto())),
            pair("accumulate", self.accumulate),
            pair("student.sigma_init", self.sigma_init),
            pair("allow_batch_mixing", self.allow_batch_mixing.then_some(true)),
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
    pub fn forms(&self) -> Forms {
        Forms { per_step: self.per_step, same_graph: self.same_graph }
    }
}

impl MethodOptions {
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

/// Does what is asked for and prints what came of it.
pub fn train(args: &RunArgs, mut request: Request, globals: Globals) -> Result<ExitCode> {
    if args.tui {
        super::tui::check()?;
    }
    signals::watch()?;
    request.time_limit = args.time_limit()?;
    request.world = args.world()?;
    let leads = request.world.leads();
    let globals = Globals { quiet: globals.quiet || !leads, ..globals };
    let shared = (args.tui && leads).then(|| Shared::new(request.stop.clone()));
    request.progress = leads && !(globals.quiet || globals.json || args.tui);
    request.monitor = match &shared {
        Some(shared) => shared.clone(),
        None => Arc::new(Console { quiet: globals.quiet }),
    };
    let alone = request.world.is_alone();
    let prepared = PreparedRun::new(request)?;
    if args.dry_run {
        super::dry_run::check(args.resume.is_some(), alone)?;
        let folder = tempfile::tempdir().context("a folder for the steps of --dry-run")?;
        prepared.rehearse(folder.path())?;
        return super::dry_run::run(&prepared, globals);
    }
    // (While the run is being prepared, a signal ends the process and leaves no folder.)
    let session = prepared.open()?;
    signals::at_work();
    let folder = session.run().path().to_owned();
    let view = shared.map(View::start).transpose()?;
    let finished = session.distill();
    // The terminal is given back before anything is printed.
    drop(view);
    let (code, text, mut result) = match finished? {
        Finished::Stopped(stage) => (
            ExitCode::from(signals::exit_code()),
            format!("stopped in stage `{}`; the same command with --resume goes on", stage.name()),
            json!({ "ok": false, "outcome": "stopped", "stage": stage.name() }),
        ),
        Finished::Followed => return Ok(ExitCode::SUCCESS),
        Finished::Recorded(trajectory) => (
            ExitCode::SUCCESS,
            format!("{} in {}", counted(trajectory.last() as u64, "node"), trajectory.dir().display()),
            json!({ "ok": true, "outcome": "recorded", "nodes": trajectory.last(), "trajectory": trajectory.dir() }),
        ),
        Finished::Distilled(made) => {
            let skipped = made.skipped_steps;
            if skipped > 0 && !globals.quiet {
                tell!(
                    "warning: {skipped} optimiser steps were skipped, their gradients were not finite (`skipped` in metrics.jsonl)"
                );
            }
            if !globals.quiet {
                made.warnings.iter().for_each(|w| tell!("warning: {w}"));
            }
            let student = made.student().clone();
            let shown: Vec<_> = made.files.iter().map(|w| w.path.display().to_string()).collect();
            if let Some((path, why)) = made.files.into_iter().find_map(|w| Some((w.path, w.failed?))) {
                let what =
                    format!("{}: the student is trained and written, but did not pass its check", path.display());
                return Err(why.context(what).hint(
                    "its weights are in student.safetensors; `disback verify` compares the file in every engine. Please report it",
                ));
            }
            (
                ExitCode::SUCCESS,
                shown.join("\n"),
                json!({ "ok": true, "outcome": "finished", "student": student, "warnings": made.warnings }),
            )
        }
    };
    if !leads {
        return Ok(code);
    }
    if globals.json {
        result["run"] = json!(folder);
    }
    // (A terminal that was closed takes no last word, which is no reason to fail.)
    let _ = match (globals.json, globals.quiet) {
        (true, _) => writeln!(std::io::stdout(), "{result}"),
        (_, false) => writeln!(std::io::stdout(), "{}", crate::shown::lines(&text)),
        _ => Ok(()),
    };
    Ok(code)
}
