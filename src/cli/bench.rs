//! `disback bench`: how fast a student runs.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::Globals;
use super::card_args::CardArgs;
use super::engine::EngineArgs;
use crate::error::{Error, Result};
use crate::eval::bench;
use crate::eval::bench::{TeacherTiming, Timing};
use crate::runtime::{EngineKind, EngineOptions};
use crate::shown::{say, tell};

/// Time a student: latency and throughput for each batch size, engines and providers side by side, its teacher's sampler too.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// student.onnx.
    student: PathBuf,
    /// Images a call, several by commas.
    #[arg(long, default_value = "1,16,64", value_delimiter = ',')]
    batch: Vec<usize>,
    /// Seconds for each engine, batch size and way of calling.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// The teacher: its sampler is timed in the same run, with the same engines and batch sizes.
    #[arg(long, value_name = "TEACHER.onnx")]
    teacher: Option<PathBuf>,
    /// Steps of the teacher's sampler (Heun: two network calls a step but for the last).
    #[arg(long, default_value_t = 18, requires = "teacher")]
    steps: usize,
    #[command(flatten)]
    card: CardArgs,
    /// Keep the figures in this run directory (bench.json): `disback report` shows them.
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
    #[command(flatten)]
    engine: EngineArgs,
}

/// One engine with one provider for each of `--provider`; `auto` here means every engine that can run it.
fn engines(options: &EngineOptions) -> Vec<EngineOptions> {
    let mut all = Vec::new();
    for provider in options.provider.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let cpu = provider.eq_ignore_ascii_case("cpu");
        let kinds = match options.engine {
            EngineKind::Auto if cpu => vec![EngineKind::Ort, EngineKind::Tract],
            EngineKind::Auto => vec![EngineKind::Ort],
            one => vec![one],
        };
        all.extend(kinds.into_iter().map(|engine| EngineOptions {
            engine,
            provider: provider.into(),
            ..options.clone()
        }));
    }
    all
}

/// Runs the command. Errors: options that do not fit together, a student or teacher that does not run.
pub fn run(args: &BenchArgs, globals: Globals) -> Result<ExitCode> {
    if !args.card.is_empty() && args.teacher.is_none() {
        return Err(Error::usage("--card and --dim speak of the teacher: give --teacher too"));
    }
    let card = args.card.overrides();
    let card = card.as_slice();
    let engines = engines(&args.engine.options(&args.batch)?);
    if engines.is_empty() {
        return Err(Error::usage("--provider names no provider"));
    }
    let (mut timings, mut teachers, mut failures) = (Vec::new(), Vec::new(), Vec::new());
    for options in &engines {
        let one = || -> Result<(Vec<Timing>, Vec<TeacherTiming>)> {
            let timings = bench::run(&args.student, options, &args.batch, args.seconds)?;
            let teacher = args.teacher.iter().flat_map(|path| {
                args.batch.iter().map(move |&b| bench::teacher(path, card, options, b, args.steps, args.seconds))
            });
            Ok((timings, teacher.collect::<Result<_>>()?))
        };
        match one() {
            Ok((found, beside)) => {
                timings.extend(found);
                teachers.extend(beside);
            }
            Err(e) if engines.len() == 1 || (e.exit_code() == 2 && timings.is_empty()) => return Err(e),
            Err(e) => failures.push(e),
        }
    }
    if timings.is_empty() {
        return Err(failures.into_iter().next().unwrap_or_else(|| Error::backend("no engine could run the student")));
    }
    let notes: Vec<String> = failures.iter().map(|e| e.to_string()).collect();
    let speed: Vec<_> = speedups(&timings, &teachers)
        .into_iter()
        .map(|(engine, batch, times)| json!({ "engine": engine, "batch": batch, "times": times }))
        .collect();
    let document = json!({ "ok": true, "student": args.student, "timings": timings, "teacher": teachers,
        "student_faster_by": speed, "failures": notes });
    if let Some(run) = &args.run {
        let text = serde_json::to_vec_pretty(&document).map_err(|e| Error::io(e.to_string()))?;
        crate::files::write_atomic(&run.join("bench.json"), &text)?;
    }
    if globals.json {
        println!("{document}");
        return Ok(ExitCode::SUCCESS);
    }
    show(&timings, &teachers);
    notes.iter().for_each(|n| tell!("warning: {n}"));
    Ok(ExitCode::SUCCESS)
}

/// Time an image of the teacher over that of the student, where both ran in the same engine at the same batch.
fn speedups(timings: &[Timing], teachers: &[TeacherTiming]) -> Vec<(String, usize, f64)> {
    let pair = |t: &TeacherTiming| {
        let student = timings.iter().find(|s| s.engine == t.engine && s.batch == t.batch)?;
        Some((t.engine.clone(), t.batch, t.p50_ms / student.p50_ms))
    };
    teachers.iter().filter_map(pair).collect()
}

fn show(timings: &[Timing], teachers: &[TeacherTiming]) {
    let ms = |v: f64| format!("{v:.2}");
    let mut table = super::table([
        "engine",
        "batch",
        "load ms",
        "first ms",
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "no copies",
        "samples/s",
        "peak MiB",
    ]);
    for t in timings {
        let mut cells = vec![t.engine.clone(), t.batch.to_string()];
        cells.extend([t.load_ms, t.first_ms, t.p50_ms, t.p95_ms, t.p99_ms, t.bound_p50_ms].map(ms));
        cells.push(format!("{:.0}", t.images_per_s));
        cells.push(t.peak_mib.map_or("-".into(), |m| format!("{m:.0}")));
        table.add_row(cells);
    }
    say!("{table}");
    if teachers.is_empty() {
        return;
    }
    let mut table = super::table([
        "teacher on",
        "batch",
        "steps",
        "network calls",
        "ms a batch",
        "ms a sample",
        "student faster by",
    ]);
    for t in teachers {
        let found = speedups(timings, std::slice::from_ref(t));
        let times = found.first().map_or("-".to_owned(), |(_, _, f)| format!("{f:.1}x"));
        table.add_row([
            t.engine.clone(),
            t.batch.to_string(),
            t.steps.to_string(),
            t.nfe.to_string(),
            ms(t.p50_ms),
            ms(t.ms_per_image),
            times,
        ]);
    }
    say!("{table}");
}
