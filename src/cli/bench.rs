//! `disback bench`: how fast a student runs.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::Globals;
use super::engine::EngineArgs;
use crate::error::{Error, Result};
use crate::runtime::{EngineKind, EngineOptions, bench};

/// Time a student: latency and throughput for each batch size, engines side by side.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// student.onnx.
    student: PathBuf,
    /// Images a call, several by commas.
    #[arg(long, default_value = "1,16,64", value_delimiter = ',')]
    batch: Vec<usize>,
    /// Seconds for each engine and batch size.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    #[command(flatten)]
    engine: EngineArgs,
}

pub fn run(args: &BenchArgs, globals: Globals) -> Result<ExitCode> {
    let options = args.engine.options();
    // `auto` here means: every engine that can run it, side by side.
    let engines = match options.engine {
        EngineKind::Auto if options.provider.eq_ignore_ascii_case("cpu") => vec![EngineKind::Ort, EngineKind::Tract],
        EngineKind::Auto => vec![EngineKind::Ort],
        one => vec![one],
    };
    let (mut timings, mut failures) = (Vec::new(), Vec::new());
    for engine in &engines {
        match bench::run(
            &args.student,
            &EngineOptions { engine: *engine, ..options.clone() },
            &args.batch,
            args.seconds,
        ) {
            Ok(found) => timings.extend(found),
            Err(e) if engines.len() == 1 || e.exit_code() == 2 => return Err(e),
            Err(e) => failures.push(e),
        }
    }
    if timings.is_empty() {
        return Err(failures.into_iter().next().unwrap_or_else(|| Error::backend("no engine could run the student")));
    }
    let notes: Vec<String> = failures.iter().map(|e| e.to_string()).collect();
    if globals.json {
        println!("{}", json!({ "ok": true, "student": args.student, "timings": timings, "failures": notes }));
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = super::table(["engine", "batch", "load ms", "first ms", "p50 ms", "p95 ms", "p99 ms", "images/s"]);
    for t in &timings {
        let ms = |v: f64| format!("{v:.2}");
        let row = [t.load_ms, t.first_ms, t.p50_ms, t.p95_ms, t.p99_ms].map(ms);
        let mut cells = vec![t.engine.clone(), t.batch.to_string()];
        cells.extend(row);
        cells.push(format!("{:.0}", t.images_per_s));
        table.add_row(cells);
    }
    println!("{table}");
    notes.iter().for_each(|n| eprintln!("warning: {n}"));
    Ok(ExitCode::SUCCESS)
}
