//! `disback doctor`: what this build and this machine have.

use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::Globals;
use crate::doctor::{Check, State, examine};
use crate::error::Result;
use crate::shown::say;

/// Show which libtorch, CUDA devices, ONNX Runtime and providers were found; say what to do about each that is missing.
#[derive(Debug, Args)]
pub struct DoctorArgs {}

/// Exit code 1 where something is broken; a thing that is merely absent is no failure.
pub fn run(_: &DoctorArgs, globals: Globals) -> Result<ExitCode> {
    show(&examine(), globals)
}

/// Shows what was found.
pub(super) fn show(checks: &[Check], globals: Globals) -> Result<ExitCode> {
    let ok = checks.iter().all(|c| c.state != State::Broken);
    if globals.json {
        println!("{}", json!({ "ok": ok, "checks": checks }));
    } else {
        for check in checks {
            let mark = match check.state {
                State::Ok => "ok     ",
                State::Missing => "missing",
                State::Broken => "BROKEN ",
            };
            say!("{mark}  {:<18} {}", check.name, check.detail);
            if let Some(advice) = &check.advice {
                say!("         {:<18} -> {advice}", "");
            }
        }
    }
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
