//! `disback verify`: a student file against everything that will run it.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::Globals;
use super::card_args::CardArgs;
use crate::error::{Error, Result};
use crate::shown::say;
use crate::verify::{self, Target, Verification, VerifyOptions, peers};

/// Check a student: ONNX's checker, every engine found, the run's own weights; name what a target will not take.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// student.onnx.
    student: PathBuf,
    /// Images compared.
    #[arg(long, default_value_t = 16)]
    images: usize,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Largest difference that counts as agreement. It is scaled: multiplied by the sample's largest value where that is above
    /// 1 (in f32 by the largest term of the sum that makes the sample); the output states the product. By precision where
    /// absent (f32 1e-4, fp16 2e-2, bf16 2e-1).
    #[arg(long)]
    tolerance: Option<f64>,
    /// List the nodes that this runtime will not take; several by commas.
    #[arg(long, value_enum, value_delimiter = ',')]
    target: Vec<Target>,
    /// The teacher that the run distilled: compares with the run's own weights in libtorch.
    #[arg(long)]
    teacher: Option<PathBuf>,
    /// Run directory; the student's folder where absent.
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
    #[command(flatten)]
    card: CardArgs,
    /// Python interpreter with onnx, openvino or cv2; found by itself where absent.
    #[arg(long)]
    python: Option<PathBuf>,
    /// Neither the checker nor runtimes from Python.
    #[arg(long, conflicts_with = "python")]
    no_python: bool,
}

/// Runs the command. Exit code 1 where something that ran does not agree, or a target refuses a node.
pub fn run(args: &VerifyArgs, globals: Globals) -> Result<ExitCode> {
    if let Some(p) = args.python.as_ref().filter(|p| !p.is_file()) {
        return Err(Error::usage(format!("--python {}: no such file", p.display())));
    }
    let options = VerifyOptions {
        images: args.images,
        seed: args.seed,
        tolerance: args.tolerance,
        python: if args.no_python { None } else { peers::find_python(args.python.as_deref()) },
    };
    let found = verified(args, &options)?;
    let ok = found.ok && found.targets.iter().all(|(_, r)| r.is_empty());
    if globals.json {
        let targets: Vec<_> = found
            .targets
            .iter()
            .zip(&found.target_warnings)
            .map(|((t, r), (_, w))| {
                json!({ "target": t, "version": t.to_string(), "ok": r.is_empty(), "refused": r, "warned": w })
            })
            .collect();
        let out = json!({ "ok": ok, "student": args.student, "checker": found.checker, "reference": found.reference,
            "precision": found.precision, "tolerance": found.tolerance, "images": found.images, "values": found.values,
            "engines": found.engines, "targets": targets });
        println!("{out}");
    } else {
        show(&found);
    }
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[cfg(not(feature = "train"))]
fn verified(args: &VerifyArgs, options: &VerifyOptions) -> Result<Verification> {
    if args.teacher.is_some() || args.run.is_some() || !args.card.is_empty() {
        return Err(Error::usage("this build has no libtorch: --teacher, --run and --card need it")
            .hint("leave them out, or use a build with the default features"));
    }
    verify::verify(&args.student, options, &args.target, None)
}

#[cfg(feature = "train")]
fn verified(args: &VerifyArgs, options: &VerifyOptions) -> Result<Verification> {
    use crate::cli::teacher::ReadingArgs;
    use crate::distill::RunDir;
    use crate::runtime::student::{SampleRequest, StudentInfo, decode, parse_value};
    use crate::torch::Forward;

    let Some(path) = &args.teacher else {
        if args.run.is_some() {
            return Err(Error::usage("--run goes with --teacher: the run keeps weights, not the teacher's graph"));
        }
        return verify::verify(&args.student, options, &args.target, None);
    };
    let beside = args.student.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(std::path::Path::new("."));
    let (run, config) = RunDir::open(args.run.as_deref().unwrap_or(beside))?;
    let reading = ReadingArgs { card: args.card.clone(), ..ReadingArgs::default() }.of_run(&run)?;
    let teacher = reading.load(path, &reading.with_card(config.clone()), tch::Device::Cpu)?;
    run.check_card(&teacher.card.card, &teacher.card.origins)?;
    let weights = run.student_weights();
    if !weights.is_file() {
        return Err(Error::io(format!("{}: no such file", weights.display())).hint("the run has not finished"));
    }
    let params = teacher.network.params().alias();
    params.load(&weights)?;
    let info =
        crate::files::map(&args.student).map_err(Error::from).and_then(|b| StudentInfo::from_model(&decode(&b)?));
    let info = info.map_err(|e| e.context(args.student.display().to_string()))?;
    if info.metadata.get("student.teacher_hash").is_some_and(|h| *h != teacher.hash) {
        return Err(Error::usage(format!(
            "{} was distilled from another teacher than {}",
            args.student.display(),
            path.display()
        )));
    }
    if info.metadata.contains_key("student.decoder") {
        return Err(Error::usage("a decoder is part of this student: its images are not what the run's weights make")
            .hint("verify without --teacher"));
    }
    let stored = info
        .metadata
        .get("student.sigma_init")
        .map(|t| parse_value(t))
        .and_then(|v| v.as_float().or(v.as_integer().map(|i| i as f64)));
    let sigma = stored.or(Some(config.student.sigma_init).filter(|&s| s > 0.0));
    let make =
        |request: &SampleRequest, count: usize| verify::reference::of_weights(&teacher, &params, sigma, request, count);
    verify::verify(&args.student, options, &args.target, Some(&make))
}

fn show(found: &Verification) {
    let mark = |ok: bool| if ok { "ok" } else { "FAILED" };
    let note = found.checker.error.as_deref().unwrap_or_default();
    say!("file       {}  ({}) {note}", mark(found.checker.ok), found.checker.by);
    say!(
        "reference  {}, {} samples, precision {}; values may differ by {:.1e}",
        found.reference,
        found.images,
        found.precision,
        found.tolerance
    );
    let mut table = super::table(["engine", "version", "max abs error", "8-bit values that differ", ""]);
    for e in &found.engines {
        let number = e.max_abs.map_or("-".to_owned(), |v| format!("{v:.1e}"));
        let differ = e.uint8_differing.map_or("-".to_owned(), |n| format!("{n} of {}", found.values));
        let verdict = match (&e.error, e.ok) {
            (Some(error), _) => error.clone(),
            (None, true) => "ok".into(),
            (None, false) if e.max_abs.is_some_and(f64::is_infinite) => "NaN, infinity or another shape".into(),
            (None, false) => format!("more than {:.1e}", found.tolerance),
        };
        table.add_row([&e.name, &e.version, &number, &differ, &verdict]);
    }
    say!("{table}");
    for ((target, refused), (_, warned)) in found.targets.iter().zip(&found.target_warnings) {
        if refused.is_empty() {
            say!("{target}: takes every node, by its table");
        } else {
            say!("{target}: {} nodes are not taken", refused.len());
        }
        for r in refused {
            say!("  {}: {}", r.node, r.reason);
        }
        for w in warned {
            say!("  warning: {}: {}", w.node, w.reason);
        }
    }
}
