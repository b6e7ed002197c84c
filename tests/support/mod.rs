//! What several test targets need: the project's Python, and folders that one run fills once.
#![allow(dead_code, reason = "each test target uses its own part")]

use std::path::{Path, PathBuf};
use std::process::Command;

/// The root of the repository.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// `DISBACK_PYTHON`, else the interpreter that `make setup` prepared.
pub fn python() -> PathBuf {
    std::env::var_os("DISBACK_PYTHON").map_or_else(|| root().join(".venv/bin/python"), PathBuf::from)
}

/// Runs one of the repository's Python scripts; its standard error is shown where it fails.
pub fn run_python(script: &str, args: &[&str]) -> String {
    let out = Command::new(python())
        .arg(root().join(script))
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("{} does not start ({e}); run `make setup` first", python().display()));
    assert!(out.status.success(), "{script} failed:\n{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// A fresh folder under cargo's own temporary folder.
pub fn folder(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir_all(&path).expect("cargo's temporary folder is writable");
    path
}

/// The built binary.
pub fn disback() -> Command {
    Command::new(env!("CARGO_BIN_EXE_disback"))
}

/// Runs `disback` in a folder with words by spaces: exit code, standard output, standard error.
pub fn run(dir: &Path, args: &str) -> (Option<i32>, String, String) {
    let out = disback().args(args.split_whitespace()).current_dir(dir).output().expect("disback starts");
    let [said, errors] = [out.stdout, out.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(!said.contains("panicked") && !errors.contains("panicked"), "{args}: {said}{errors}");
    (out.status.code(), said, errors)
}

/// [`run`], which must succeed: its standard output.
pub fn ok(dir: &Path, args: &str) -> String {
    let (code, said, errors) = run(dir, args);
    assert_eq!(code, Some(0), "{args}: {said}{errors}");
    said
}

/// [`run`], which must fail and say so: the exit code.
pub fn refused(dir: &Path, args: &str, says: &str) -> i32 {
    let (code, said, errors) = run(dir, args);
    let code = code.unwrap_or_else(|| panic!("{args}: ended by a signal"));
    assert!(code > 0 && errors.contains(says), "{args}: {code}: {said}{errors}");
    code
}
