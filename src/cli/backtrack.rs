//! `disback backtrack`: stage 2 alone.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::Globals;
use super::distill::{BacktrackOptions, RunArgs, train};
use crate::distill::Stages;
use crate::error::Result;
use crate::run::Request;

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
    let asked = args.run.request(args.backtrack.method.sets(), Stages::Backtrack, args.backtrack.forms())?;
    train(&args.run, Request { trajectory: args.trajectory.clone(), ..asked }, globals)
}
