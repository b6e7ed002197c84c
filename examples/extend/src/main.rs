//! `cargo run --release -p extend -- [RUN]`: distils the teacher beside this crate, whose activation ONNX does not define, by an
//! objective that disback does not have.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use disback::run::{Finished, Request, Session};
use extend::{UnitGradient, operators};

fn main() -> ExitCode {
    let out = std::env::args_os().nth(1).map_or_else(|| PathBuf::from("runs/extend"), PathBuf::from);
    match distil(&out) {
        Ok(student) => {
            println!("{}", student.display());
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::from(e.exit_code())
        }
    }
}

fn distil(out: &Path) -> disback::Result<PathBuf> {
    let teacher = Path::new(env!("CARGO_MANIFEST_DIR")).join("teacher.onnx");
    let request = Request::new(teacher, out)
        .operators(operators())
        .objective(UnitGradient { eps: 1e-3 })
        .set("batch=64")
        .set("degrade.steps=300")
        .set("backtrack.updates=600");
    match Session::open(Request { progress: true, ..request })?.distill()? {
        Finished::Distilled(made) => Ok(made.student().to_owned()),
        Finished::Recorded(_) | Finished::Stopped(_) | Finished::Followed => {
            Err(disback::Error::mismatch("the run ended without a student"))
        }
    }
}
