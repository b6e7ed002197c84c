//! ONNX's operator cases, one test each: values, and gradients against central differences. All of the pinned wheel's, and of a
//! later one those that it changed or added.
//!
//! `conformance-expected.txt` lists the cases that are refused, with the reason. It can only shrink: a listed case that
//! passes fails the test until its line is removed, and so does a case that is not listed and does not pass.

use std::collections::{BTreeMap, BTreeSet};
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[path = "support/stand_in.rs"]
mod stand_in;

use std::path::{Path, PathBuf};

use disback::conformance::{Case, Gradient, Outcome, list, run_case_on};
use libtest_mimic::{Arguments, Failed, Trial};

/// The later version, as `scripts/setup` writes its cases.
const LATER: &str = "onnx-1.23.2";

/// The suites: that of `DISBACK_ONNX_CASES` alone, or the pinned wheel's and the later one.
fn suites() -> Result<Vec<PathBuf>, String> {
    if let Some(dir) = std::env::var_os("DISBACK_ONNX_CASES") {
        return Ok(vec![dir.into()]);
    }
    let venv = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(".venv");
    let pinned = std::fs::read_dir(venv.join("lib"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path().join("site-packages/onnx/backend/test/data/node"))
        .find(|p| p.is_dir());
    let missing =
        |what: &str| format!("no {what} under {}: run `make setup`, or set DISBACK_ONNX_CASES", venv.display());
    let pinned = pinned.ok_or_else(|| missing("wheel onnx==1.22.0"))?;
    let later = venv.join(format!("{LATER}-cases"));
    if !later.join(".ready").is_file() {
        return Err(missing(&format!("{LATER}-cases")));
    }
    Ok(vec![pinned, later])
}

/// Whether two folders hold the same files with the same bytes.
fn same(a: &Path, b: &Path) -> bool {
    let names = |dir: &Path| -> Option<BTreeSet<std::ffi::OsString>> {
        std::fs::read_dir(dir).ok()?.map(|e| e.ok().map(|e| e.file_name())).collect()
    };
    let (Some(own), Some(others)) = (names(a), names(b)) else { return false };
    own == others
        && own.iter().all(|name| {
            let (a, b) = (a.join(name), b.join(name));
            if a.is_dir() {
                same(&a, &b)
            } else {
                matches!((std::fs::read(a), std::fs::read(b)), (Ok(a), Ok(b)) if a == b)
            }
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

/// The whole suite once more in a process of its own, on a stand-in device (tests/stand_in_cuda).
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn on_the_stand_in() -> Result<(), Failed> {
    let report = Path::new(env!("CARGO_TARGET_TMPDIR")).join("conformance-stand-in.json");
    let own = std::env::current_exe()?;
    let out = stand_in::under(&own, &report).env(DEVICE, "cuda").output()?;
    let text = String::from_utf8_lossy(&out.stdout);
    let failures: Vec<&str> = text.lines().skip_while(|l| !l.starts_with("failures:")).take(60).collect();
    match out.status.success() && stand_in::Report::read(&report).count("launches") > 10_000 {
        true => Ok(()),
        false => {
            Err(format!("{}: {}\n{}", out.status, failures.join("\n"), String::from_utf8_lossy(&out.stderr)).into())
        }
    }
}

/// Says on which device the cases run; the CPU where it is not set.
const DEVICE: &str = "DISBACK_CONFORMANCE_DEVICE";

fn main() {
    let arguments = Arguments::from_args();
    tch::set_num_threads(1);
    let found = suites()
        .and_then(|dirs| dirs.iter().map(|dir| list(dir).map_err(|e| e.to_string())).collect::<Result<Vec<_>, _>>());
    let suites = match found {
        Ok(suites) => suites,
        Err(e) => {
            eprintln!("{e}");
            std::process::exit(1);
        }
    };
    let device = match disback::torch::device::parse(&std::env::var(DEVICE).unwrap_or_else(|_| "cpu".into())) {
        Ok(device) => device,
        Err(e) => {
            eprintln!("{DEVICE}: {e}");
            std::process::exit(1);
        }
    };
    let mut expected = expected();
    let mut trials = Vec::new();
    let mut reasons: BTreeMap<String, String> = BTreeMap::new();
    let mut earlier: BTreeMap<String, PathBuf> = BTreeMap::new();
    for (k, dirs) in suites.into_iter().enumerate() {
        for dir in dirs {
            let name = dir.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
            if let Some(reason) = expected.remove(&name) {
                reasons.insert(name.clone(), reason);
            }
            if earlier.get(&name).is_some_and(|first| same(first, &dir)) {
                continue;
            }
            earlier.entry(name.clone()).or_insert_with(|| dir.clone());
            let reason = reasons.get(&name).cloned();
            let shown = if k == 0 { name } else { format!("{LATER}::{name}") };
            trials.push(Trial::test(shown, move || judge(&run_case_on(&dir, true, device), reason.as_deref())));
        }
    }
    for (name, _) in expected {
        trials.push(Trial::test(name, || Err("listed in conformance-expected.txt, but there is no such case".into())));
    }
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    if std::env::var_os(DEVICE).is_none() {
        trials.push(Trial::test("every_case_on_the_stand_in_device", on_the_stand_in));
    }
    libtest_mimic::run(&arguments, trials).exit();
}
