//! `disback report`: the HTML report of a run.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::Globals;
use crate::error::Result;
use crate::shown::say;

/// Write report.html into a run directory: pictures beside the teacher's, distances, curves, cost, hashes, in one file
/// that needs no network.
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// The run directory, finished or not.
    run: PathBuf,
    /// Another run whose distance curve is drawn beside this one's: the same without a trajectory, say.
    #[arg(long, value_name = "DIR")]
    baseline: Vec<PathBuf>,
}

/// Runs the command. Errors: a folder that holds no run, a file that cannot be read or written.
pub fn run(args: &ReportArgs, globals: Globals) -> Result<ExitCode> {
    let path = crate::report::write_beside(&args.run, &args.baseline)?;
    if globals.json {
        println!("{}", serde_json::json!({ "ok": true, "report": path }));
    } else if !globals.quiet {
        say!("{}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}
