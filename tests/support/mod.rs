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
