//! `disback degrade`: stage 1 alone.

use std::process::ExitCode;

use clap::Args;

use super::Globals;
use super::distill::{DegradeOptions, Plan, RunArgs, train};
use crate::distill::Stages;
use crate::error::Result;

/// Record how the teacher degrades into the initial student (stage 1); `backtrack` goes on in the same directory.
#[derive(Debug, Args)]
pub struct DegradeArgs {
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    degrade: DegradeOptions,
}

pub fn run(args: &DegradeArgs, globals: Globals) -> Result<ExitCode> {
    let plan = Plan { stages: Stages::Degrade, trajectory: None, same_graph: false, per_step: false };
    train(&args.run, args.degrade.sets(), plan, globals)
}
