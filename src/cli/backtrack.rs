//! `disback backtrack`: stage 2 alone.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::Globals;
use super::distill::{BacktrackOptions, Plan, RunArgs, train};
use crate::distill::Stages;
use crate::error::Result;

/// Distil along a recorded trajectory (stage 2) and export the student.
#[derive(Debug, Args)]
pub struct BacktrackArgs {
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    backtrack: BacktrackOptions,
    /// Another run of the same teacher and student, or its trajectory/; without it the trajectory in the run directory.
    #[arg(long, value_name = "DIR")]
    trajectory: Option<PathBuf>,
}

pub fn run(args: &BacktrackArgs, globals: Globals) -> Result<ExitCode> {
    let plan = Plan {
        stages: Stages::Backtrack,
        trajectory: args.trajectory.as_deref(),
        same_graph: args.backtrack.same_graph,
        per_step: args.backtrack.per_step,
    };
    train(&args.run, args.backtrack.sets(), plan, globals)
}
