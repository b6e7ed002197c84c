//! `disback report`: the HTML report of a run.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::Globals;
use crate::error::Result;

/// Write report.html into a run directory: grids beside the teacher's, curves, configuration, in one file.
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// The run directory, finished or not.
    run: PathBuf,
}

pub fn run(args: &ReportArgs, globals: Globals) -> Result<ExitCode> {
    let path = crate::report::write(&args.run)?;
    if globals.json {
        println!("{}", serde_json::json!({ "ok": true, "report": path }));
    } else if !globals.quiet {
        println!("{}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}
