//! `disback export`: trained weights into ONNX.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::json;
use tch::Device;

use crate::cli::Globals;
use crate::cli::distill::{method, objective_name};
use crate::cli::teacher::TeacherArgs;
use crate::distill::{Config, RunDir};
use crate::error::{Error, Result};
use crate::export::{self, StudentOptions};
use crate::graph::save;
use crate::torch::Forward;

/// Write a student (or any set of weights of the teacher's graph) as ONNX.
#[derive(Debug, Args)]
pub struct ExportArgs {
    #[command(flatten)]
    pub teacher: TeacherArgs,
    /// Run directory: takes its final weights and its configuration.
    #[arg(long, value_name = "DIR", required_unless_present = "weights")]
    pub run: Option<PathBuf>,
    /// Weights as safetensors, e.g. a trajectory node; over those of the run.
    #[arg(long, value_name = "FILE")]
    pub weights: Option<PathBuf>,
    /// Where to write.
    #[arg(short, long)]
    pub out: PathBuf,
    /// The teacher's own graph with the weights replaced, for pipelines that bring their own scheduler.
    #[arg(long)]
    pub same_graph: bool,
    /// Noise level at which the student starts; the run's, else the schedule's.
    #[arg(long)]
    pub sigma_init: Option<f64>,
}

/// Runs the command.
pub fn run(args: &ExportArgs, globals: Globals) -> Result<ExitCode> {
    let run: Option<(RunDir, Config)> = args.run.as_ref().map(|p| RunDir::open(p)).transpose()?;
    let teacher = args.teacher.load(Device::Cpu)?;
    let weights = match (&args.weights, &run) {
        (Some(w), _) => w.clone(),
        (None, Some((run, _))) => run.student_weights(),
        (None, None) => return Err(Error::usage("give --run or --weights")),
    };
    if !weights.is_file() {
        return Err(Error::io(format!("{}: no such file", weights.display()))
            .hint("the run has not finished; --weights takes a node of its trajectory"));
    }
    let params = teacher.network.params().deep_copy(Device::Cpu)?;
    params.load(&weights)?;
    let configured = run.as_ref().map(|(_, c)| c.student.sigma_init).filter(|&s| s > 0.0);
    let options = StudentOptions {
        sigma_init: args.sigma_init.or(configured),
        method: run.as_ref().map_or_else(|| "weights".into(), |(_, c)| method(c).into()),
        objective: run.as_ref().map(|(_, c)| objective_name(c)).unwrap_or_default(),
        teacher_hash: teacher.hash.clone(),
    };
    let build = if args.same_graph { export::same_graph } else { export::student };
    let model = build(&teacher.network, &params, &teacher.card.card, &options)?;
    save::write(&model, &args.out)?;
    if globals.json {
        println!("{}", json!({ "ok": true, "out": args.out, "same_graph": args.same_graph }));
    } else if !globals.quiet {
        println!("{}", args.out.display());
    }
    Ok(ExitCode::SUCCESS)
}
