//! `disback sweep`: a run for each combination of settings, and one table.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use serde_json::json;

use super::teacher::TeacherArgs;
use super::{Globals, signals};
use crate::distill::Config;
use crate::error::Result;
use crate::run::sweep::{self, Axis, Row};
use crate::run::{Console, Request};
use crate::shown::{say, tell};
use crate::torch::dist::launcher::Place;

/// Distil with every combination of settings, one run after the other, and compare them in a table. The same command again goes on
/// where it was interrupted.
#[derive(Debug, Args)]
pub struct SweepArgs {
    #[command(flatten)]
    teacher: TeacherArgs,
    /// Folder for the runs, each named by its settings, and sweep.json.
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Configuration file (TOML). May be repeated: later files win.
    #[arg(short, long, value_name = "FILE")]
    config: Vec<PathBuf>,
    /// A key of the configuration and its values, as in backtrack.lr_generator=1e-5,5e-5; one value holds for all runs. With
    /// evaluate.reference (and evaluate.features) the table has distances.
    #[arg(long = "set", value_name = "KEY=VALUE,...", required = true)]
    sets: Vec<String>,
}

/// Runs the command. Exit code 1 where a run failed, 75 or 130 where one was stopped.
pub fn run(args: &SweepArgs, globals: Globals) -> Result<ExitCode> {
    Place::refuse("sweep")?;
    let axes = args.sets.iter().map(|s| Axis::parse(s)).collect::<Result<Vec<_>>>()?;
    let points = sweep::grid(&axes)?;
    let later = args.config.iter().skip(1).map(|f| Config::sets_of(f)).collect::<Result<Vec<_>>>()?;
    let later: Vec<String> = later.into_iter().flatten().collect();
    let reading = &args.teacher.reading;
    let request = |folder: &Path, sets: &[String]| Request {
        config: args.config.first().cloned(),
        sets: later.iter().chain(sets).cloned().collect(),
        card: reading.card.overrides(),
        freeze: reading.freeze.clone(),
        train: reading.train.clone(),
        stop: signals::STOP.clone(),
        progress: !globals.quiet && !globals.json,
        monitor: Arc::new(Console { quiet: globals.quiet }),
        command: super::command_line(),
        ..Request::new(&args.teacher.teacher, folder)
    };
    signals::watch()?;
    signals::at_work();
    let mut told = |rows: &[Row]| {
        let done = rows.iter().filter(|r| r.outcome != "waiting").count();
        if let Some(row) = rows.get(done.wrapping_sub(1)).filter(|_| !globals.quiet) {
            let why = row.error.as_deref().map_or(String::new(), |e| format!(": {e}"));
            tell!("{done} of {}: {} {}{why}", rows.len(), row.run, row.outcome);
        }
    };
    let rows = sweep::sweep(&args.out, &points, &request, &mut told)?;
    let of = |outcome: &str| rows.iter().any(|r| r.outcome == outcome);
    if globals.json {
        println!("{}", json!({ "ok": rows.iter().all(|r| r.outcome == "finished"), "runs": rows }));
    } else if !globals.quiet {
        show(&rows);
    }
    Ok(match (of("stopped"), of("failed")) {
        (true, _) => ExitCode::from(signals::exit_code()),
        (_, true) => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    })
}

/// The runs, the least distance first.
fn show(rows: &[Row]) {
    let distance = |v: Option<f64>| v.map_or("-".to_owned(), |v| format!("{v:.4}"));
    let mismatch = |v: Option<f64>| v.map_or("-".to_owned(), |v| format!("{v:.2e}"));
    let mut table = super::table(["run", "", "distance", "mismatch", "seconds"]);
    let mut sorted: Vec<&Row> = rows.iter().collect();
    let key = |r: &Row| r.distance.unwrap_or(f64::INFINITY);
    sorted.sort_by(|a, b| key(a).total_cmp(&key(b)));
    for row in sorted {
        let seconds = format!("{:.0}", row.seconds);
        table.add_row([&row.run, row.outcome, &distance(row.distance), &mismatch(row.mismatch), &seconds]);
    }
    say!("{table}");
}
