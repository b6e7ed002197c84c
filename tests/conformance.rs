//! ONNX's operator cases from the pinned wheel, one test each: values, and gradients against central differences.
//!
//! `conformance-expected.txt` lists the cases that are refused, with the reason. It can only shrink: a listed case that
//! passes fails the test until its line is removed, and so does a case that is not listed and does not pass.

use std::collections::BTreeMap;
use std::path::PathBuf;

use disback::conformance::{Case, Gradient, Outcome, list, run_case};
use libtest_mimic::{Arguments, Failed, Trial};

fn suite() -> Result<PathBuf, String> {
    if let Some(dir) = std::env::var_os("DISBACK_ONNX_CASES") {
        return Ok(dir.into());
    }
    let libs = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(".venv/lib");
    let found = std::fs::read_dir(&libs)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path().join("site-packages/onnx/backend/test/data/node"))
        .find(|p| p.is_dir());
    found.ok_or_else(|| {
        format!("no wheel onnx==1.22.0 under {}: run `make setup`, or set DISBACK_ONNX_CASES", libs.display())
    })
}

/// `name: reason` a line.
fn expected() -> BTreeMap<String, String> {
    include_str!("conformance-expected.txt")
        .lines()
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
        .filter_map(|l| l.split_once(": "))
        .map(|(name, reason)| (name.to_owned(), reason.to_owned()))
        .collect()
}

/// The reason without the help line.
fn first_line(case: &Case) -> &str {
    case.reason.as_deref().unwrap_or_default().lines().next().unwrap_or_default()
}

fn judge(case: &Case, expected: Option<&str>) -> Result<(), Failed> {
    if let Some(Gradient::Wrong { reason }) = &case.gradient {
        return Err(format!("gradient: {reason}").into());
    }
    match (case.outcome, expected) {
        (Outcome::Passed, None) => Ok(()),
        (Outcome::Refused, Some(reason)) if reason == first_line(case) => Ok(()),
        (Outcome::Passed, Some(_)) => Err("passes now: remove its line from tests/conformance-expected.txt".into()),
        (Outcome::Refused, Some(reason)) => {
            Err(format!("refused for another reason than `{reason}`: {}", first_line(case)).into())
        }
        (outcome, _) => Err(format!("{outcome:?}: {}", first_line(case)).into()),
    }
}

fn main() {
    let arguments = Arguments::from_args();
    tch::set_num_threads(1);
    let dirs = match suite().and_then(|dir| list(&dir).map_err(|e| e.to_string())) {
        Ok(dirs) => dirs,
        Err(e) => {
            eprintln!("{e}");
            std::process::exit(1);
        }
    };
    let mut expected = expected();
    let mut trials = Vec::new();
    for dir in dirs {
        let name = dir.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        let reason = expected.remove(&name);
        trials.push(Trial::test(name, move || judge(&run_case(&dir, true), reason.as_deref())));
    }
    for (name, _) in expected {
        trials.push(Trial::test(name, || Err("listed in conformance-expected.txt, but there is no such case".into())));
    }
    libtest_mimic::run(&arguments, trials).exit();
}
