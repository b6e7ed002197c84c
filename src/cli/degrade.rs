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
}

pub fn run(args: &DegradeArgs, globals: Globals) -> Result<ExitCode> {
    train(&args.run, args.run.request(args.degrade.sets(), Stages::Degrade, Forms::default())?, globals)
}
