//! Runs ONNX's operator cases through the import and reports which pass, which are refused and which are wrong.
//!
//! `cargo run --release --example conformance -- DIR [--json] [--gradients] [--device cuda]
//! [--filter TEXT]`, where DIR is
//! `onnx/backend/test/data/node` of the wheel onnx==1.22.0, or any folder of that form.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use disback::conformance::{Gradient, Outcome, Report, list, run_case_on};
use disback::torch::device;

/// ONNX operator cases through the import.
#[derive(Parser)]
struct Options {
    /// Folder of cases: one subfolder each, with model.onnx and test_data_set_0.
    dir: PathBuf,
    /// Report for machines: total, passed, refused, wrong, cases with name, outcome and reason.
    #[arg(long)]
    json: bool,
    /// Also check gradients against central differences in f64.
    #[arg(long)]
    gradients: bool,
    /// Where values are computed: cpu, cuda, cuda:<index>.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Only cases whose name contains this.
    #[arg(long)]
    filter: Option<String>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    tch::set_num_threads(1);
    // The reason is in the report; the default hook would print it a second time.
    std::panic::set_hook(Box::new(|_| {}));
    let (dirs, device) = match list(&options.dir).and_then(|d| Ok((d, device::parse(&options.device)?))) {
        Ok(found) => found,
        Err(e) => {
            eprintln!("error: {e}");
            return ExitCode::from(e.exit_code());
        }
    };
    let wanted = |d: &PathBuf| options.filter.as_ref().is_none_or(|f| d.to_string_lossy().contains(f));
    let cases = dirs.iter().filter(|d| wanted(d)).map(|d| run_case_on(d, options.gradients, device)).collect();
    let report = Report::new(cases);
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report).expect("a report is plain data"));
    } else {
        print(&report);
    }
    let gradients_hold = report.gradients.is_none_or(|g| g.wrong == 0);
    if report.wrong == 0 && gradients_hold { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn print(report: &Report) {
    for case in report.cases.iter().filter(|c| c.outcome != Outcome::Passed) {
        let reason = case.reason.as_deref().unwrap_or_default().lines().next().unwrap_or_default();
        println!("{:<8} {}: {reason}", format!("{:?}", case.outcome).to_lowercase(), case.name);
    }
    for case in &report.cases {
        if let Some(Gradient::Wrong { reason }) = &case.gradient {
            println!("gradient {}: {reason}", case.name);
        }
    }
    let p = report.plain;
    println!("plain cases: {} passed, {} refused, {} wrong of {}", p.passed, p.refused, p.wrong, p.total);
    println!(
        "all cases:   {} passed, {} refused, {} wrong of {}",
        report.passed, report.refused, report.wrong, report.total
    );
    if let Some(g) = report.gradients {
        println!("gradients:   {} passed, {} excepted, {} wrong of {}", g.passed, g.excepted, g.wrong, g.checked);
    }
}
