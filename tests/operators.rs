//! What ONNX's own suite lacks, against ONNX Runtime: operators of the `com.microsoft` domain, and older operator sets.
//! Values, and gradients against central differences.
#![cfg(feature = "train")]

use std::path::{Path, PathBuf};
use std::process::Command;

use disback::conformance::{Gradient, Outcome, list, run_case};

#[test]
fn optimised_exports_and_older_operator_sets() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = std::env::var_os("DISBACK_PYTHON").map_or_else(|| root.join(".venv/bin/python"), PathBuf::from);
    let dir = tempfile::tempdir().unwrap();
    let status = Command::new(&python)
        .arg(root.join("tests/python/operator_cases.py"))
        .arg(dir.path())
        .status()
        .unwrap_or_else(|e| panic!("{}: {e}; run `make setup`", python.display()));
    assert!(status.success(), "the cases could not be made");
    let mut failures = Vec::new();
    let dirs = list(dir.path()).unwrap();
    assert!(dirs.len() == 136, "{} cases", dirs.len());
    for dir in dirs {
        let case = run_case(&dir, true);
        match (&case.outcome, &case.gradient) {
            (Outcome::Passed, Some(Gradient::Passed { .. })) => {}
            (Outcome::Passed, gradient) => failures.push(format!("{}: gradient {gradient:?}", case.name)),
            (outcome, _) => failures.push(format!("{}: {outcome:?} {}", case.name, case.reason.unwrap_or_default())),
        }
    }
    assert!(failures.is_empty(), "{} cases fail:\n{}", failures.len(), failures.join("\n"));
}
