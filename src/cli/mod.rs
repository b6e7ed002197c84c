//! The command line: one file a command. A command parses, calls the library and prints; it holds no logic of its own.

#[cfg(feature = "train")]
mod backtrack;
pub mod bench;
mod card_args;
#[cfg(feature = "train")]
mod compare;
mod completions;
#[cfg(feature = "train")]
mod degrade;
#[cfg(feature = "train")]
mod distill;
pub mod doctor;
#[cfg(feature = "train")]
mod dry_run;
mod engine;
#[cfg(feature = "train")]
mod estimate;
pub mod evaluate;
mod evaluate_table;
pub mod export;
mod export_folder;
#[cfg(feature = "train")]
mod hand_over;
mod help;
#[cfg(feature = "train")]
pub mod inspect;
#[cfg(not(feature = "train"))]
#[path = "inspect_light.rs"]
pub mod inspect;
mod not_built;
pub mod package;
#[cfg(feature = "train")]
pub mod parity;
#[cfg(feature = "report")]
pub mod report;
pub mod sample;
#[cfg(feature = "serve")]
pub mod serve;
mod ship_args;
#[cfg(feature = "train")]
mod signals;
#[cfg(feature = "train")]
mod sweep;
#[cfg(feature = "train")]
mod teacher;
#[cfg(feature = "tui")]
mod tui;
#[cfg(all(feature = "train", not(feature = "tui")))]
#[path = "tui_missing.rs"]
mod tui;
pub mod verify;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::error::{Error, Result};
use crate::shown::tell;

/// Distil any diffusion model that exports to ONNX into a one-step ONNX generator.
#[derive(Debug, Parser)]
#[command(name = "disback", version, about, propagate_version = true, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Machine-readable output: one JSON document on standard output, nothing else there.
    #[arg(long, global = true, help_heading = "Global options")]
    json: bool,
    /// No progress bars and no notes; errors are still printed.
    #[arg(long, short, global = true, help_heading = "Global options")]
    quiet: bool,
}

/// What every command gets beside its own options.
#[derive(Debug, Clone, Copy)]
pub struct Globals {
    /// Whether standard output gets one JSON document and nothing else (`--json`).
    pub json: bool,
    /// Whether progress bars and notes are left out (`--quiet`).
    pub quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    Inspect(Box<inspect::InspectArgs>),
    #[cfg(feature = "train")]
    Distill(Box<distill::DistillArgs>),
    #[cfg(feature = "train")]
    Degrade(Box<degrade::DegradeArgs>),
    #[cfg(feature = "train")]
    Backtrack(Box<backtrack::BacktrackArgs>),
    #[cfg(feature = "train")]
    Estimate(Box<estimate::EstimateArgs>),
    #[cfg(feature = "train")]
    Compare(Box<compare::CompareArgs>),
    #[cfg(feature = "train")]
    Sweep(Box<sweep::SweepArgs>),
    #[cfg(feature = "train")]
    Parity(parity::ParityArgs),
    Export(Box<export::ExportArgs>),
    Package(package::PackageArgs),
    Verify(verify::VerifyArgs),
    Sample(sample::SampleArgs),
    Evaluate(Box<evaluate::EvaluateArgs>),
    #[cfg(feature = "report")]
    Report(report::ReportArgs),
    Bench(bench::BenchArgs),
    #[cfg(feature = "serve")]
    Serve(serve::ServeArgs),
    Doctor(doctor::DoctorArgs),
    Completions(completions::CompletionsArgs),
    #[command(hide = true)]
    Man(completions::ManArgs),
}

/// Runs the program, whatever it is asked. Exit code: 0 success, 1 failure, 2 usage (nothing was changed); of a run that was stopped
/// with a checkpoint 75, or 130 where a person stopped it.
pub fn main() -> ExitCode {
    start(|command, globals| {
        // Before anything asks libtorch for CUDA.
        #[cfg(feature = "train")]
        let _ = crate::torch::cuda_half::load();
        light(&command, globals).unwrap_or_else(|| with_libtorch(&command, globals))
    })
}

/// [`main`] of a program that does not load libtorch: what needs it is handed over to `disback-train`, which lies beside it.
#[cfg(feature = "train")]
pub fn main_light() -> ExitCode {
    start(|command, globals| light(&command, globals).unwrap_or_else(|| hand_over::run(&command, globals)))
}

fn start(run: impl FnOnce(Command, Globals) -> Result<ExitCode>) -> ExitCode {
    let matches = not_built::with_missing(help::with_help(Cli::command())).get_matches();
    if let Some(e) = not_built::refusal(&matches) {
        // Its arguments were not parsed.
        return failed(&e, std::env::args_os().any(|a| a == "--json"));
    }
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|e| e.exit());
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("DISBACK_LOG")
                .unwrap_or_else(|_| "warn,tract_onnx=error".into()),
        )
        .with_writer(std::io::stderr)
        .without_time()
        .init();
    let globals = Globals { json: cli.json, quiet: cli.quiet };
    match run(cli.command, globals) {
        Ok(code) => code,
        Err(e) => failed(&e, globals.json),
    }
}

/// Says why, and gives the exit code.
fn failed(e: &Error, json: bool) -> ExitCode {
    if json {
        println!("{}", serde_json::json!({ "ok": false, "error": e.to_string() }));
    }
    tell!("error: {e}");
    ExitCode::from(e.exit_code())
}

/// Runs a command that has no use for libtorch; none of any other.
fn light(command: &Command, globals: Globals) -> Option<Result<ExitCode>> {
    Some(match command {
        Command::Package(args) => package::run(args, globals),
        Command::Sample(args) => sample::run(args, globals),
        Command::Evaluate(args) => evaluate::run(args, globals),
        #[cfg(feature = "report")]
        Command::Report(args) => report::run(args, globals),
        Command::Bench(args) => bench::run(args, globals),
        #[cfg(feature = "serve")]
        Command::Serve(args) => serve::run(args, globals),
        Command::Completions(args) => completions::run(args, help::with_help(Cli::command())),
        Command::Man(args) => completions::man(args, help::with_help(Cli::command())),
        _ => return None,
    })
}

/// The commands that train, or look at a teacher's network.
fn with_libtorch(command: &Command, globals: Globals) -> Result<ExitCode> {
    match command {
        Command::Inspect(args) => inspect::run(args, globals),
        #[cfg(feature = "train")]
        Command::Distill(args) => distill::run(args, globals),
        #[cfg(feature = "train")]
        Command::Degrade(args) => degrade::run(args, globals),
        #[cfg(feature = "train")]
        Command::Backtrack(args) => backtrack::run(args, globals),
        #[cfg(feature = "train")]
        Command::Estimate(args) => estimate::run(args, globals),
        #[cfg(feature = "train")]
        Command::Compare(args) => compare::run(args, globals),
        #[cfg(feature = "train")]
        Command::Sweep(args) => sweep::run(args, globals),
        #[cfg(feature = "train")]
        Command::Parity(args) => parity::run(args, globals),
        Command::Export(args) => export::run(args, globals),
        Command::Verify(args) => verify::run(args, globals),
        Command::Doctor(args) => doctor::run(args, globals),
        other => light(other, globals).unwrap_or(Ok(ExitCode::FAILURE)),
    }
}

/// A bar on standard error for `total` things of a kind; hidden where nobody looks (`--quiet`, `--json`, no terminal).
pub(crate) fn progress(globals: Globals, total: u64, unit: &str) -> indicatif::ProgressBar {
    if globals.json || globals.quiet {
        return indicatif::ProgressBar::hidden();
    }
    let style =
        indicatif::ProgressStyle::with_template(&format!("{{bar:30}} {{pos}}/{{len}} {unit} ({{per_sec}}, {{eta}})"));
    let bar = indicatif::ProgressBar::new(total);
    style.map(|s| bar.clone().with_style(s)).unwrap_or(bar)
}

/// The command as it was typed, quoted where a shell needs it.
pub(crate) fn command_line() -> String {
    let word = |w: String| {
        let plain = w.chars().all(|c| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c));
        if plain && !w.is_empty() { w } else { format!("'{}'", w.replace('\'', "'\\''")) }
    };
    let words: Vec<String> = std::env::args().skip(1).map(word).collect();
    format!("disback {}", words.join(" "))
}

/// A table for people.
pub(crate) fn table<const N: usize>(header: [&str; N]) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::UTF8_FULL_CONDENSED).set_header(header);
    table
}
