//! `disback degrade`: stage 1 alone.

use std::process::ExitCode;

use clap::Args;

use super::Globals;
use super::distill::{DegradeOptions, RunArgs, train};
use crate::distill::Stages;
use crate::error::Result;
use crate::run::Forms;

/// Record how the teacher degrades into the initial student (stage 1); `backtrack` goes on in the same directory.
#[derive(Debug, Args)]
pub struct DegradeArgs {
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    degrade: DegradeOptions,
    /// Generator updates of the stage 2 to come: with `--nodes auto` stage 1 may cost 8 % of the whole run's forward passes.
    /// [backtrack.updates]
    #[arg(long, value_name = "N")]
    updates: Option<u64>,
}

pub fn run(args: &DegradeArgs, globals: Globals) -> Result<ExitCode> {
    let mut sets = args.degrade.sets();
    sets.extend(args.updates.map(|n| format!("backtrack.updates={n}")));
    train(&args.run, args.run.request(sets, Stages::Degrade, Forms::default())?, globals)
}
