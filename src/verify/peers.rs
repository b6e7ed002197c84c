//! Other runtimes by way of Python: each in a process of its own, since a runtime that does not like a file may take its
//! process with it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Deserialize;

use crate::error::{Context, Error, Result};
use crate::io::npy;
use crate::tensor::HostTensor;

use super::Checked;

const SCRIPT: &str = include_str!("peers.py");

/// Runtimes that the script knows.
pub const PEERS: [&str; 2] = ["openvino", "opencv"];

/// One runtime's samples.
pub struct Peer {
    /// The runtime, one of [`PEERS`].
    pub name: String,
    /// Its version; empty where its process ended without an answer.
    pub version: String,
    /// The samples, `[B, ...shape]`, or why there are none.
    pub samples: Result<HostTensor>,
}

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    absent: bool,
    #[serde(default)]
    version: String,
    error: Option<String>,
}

/// `--python`, `DISBACK_PYTHON`, the active virtual environment, `.venv` here, that of the repository that the program was built in,
/// `python3` on the path: the first that is there.
pub fn find_python(given: Option<&Path>) -> Option<PathBuf> {
    let env = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let places = [
        given.map(Path::to_path_buf),
        env("DISBACK_PYTHON"),
        env("VIRTUAL_ENV").map(|v| v.join("bin/python")),
        Some(PathBuf::from(".venv/bin/python")),
        // (target/release/disback)
        std::env::current_exe().ok().and_then(|p| Some(p.ancestors().nth(3)?.join(".venv/bin/python"))),
    ];
    let found = places.into_iter().flatten().find(|p| p.is_file());
    found.or_else(|| {
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path).map(|d| d.join("python3")).find(|p| p.is_file())
    })
}

fn call(python: &Path, args: &[&str]) -> Result<Answer> {
    let out = Command::new(python)
        .arg("-c")
        .arg(SCRIPT)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {}", python.display()))?;
    let text = String::from_utf8_lossy(&out.stdout);
    // Runtimes print as they please; our answer is the last line.
    if let Some(answer) = text.lines().rev().find_map(|l| serde_json::from_str::<Answer>(l).ok()) {
        return Ok(answer);
    }
    let last = String::from_utf8_lossy(&out.stderr).lines().last().unwrap_or("no answer").to_owned();
    Ok(Answer {
        absent: false,
        version: String::new(),
        error: Some(format!("its process ended with {}: {last}", out.status)),
    })
}

/// ONNX's checker with full_check; `None` where the interpreter has no onnx package.
pub fn checker(python: &Path, model: &Path) -> Result<Option<Checked>> {
    let answer = call(python, &["checker", &model.display().to_string()])?;
    if answer.absent {
        return Ok(None);
    }
    let by = format!("onnx {}, full_check", answer.version);
    Ok(Some(Checked { ok: answer.error.is_none(), by, error: answer.error }))
}

/// Every runtime that the interpreter has.
pub fn run_all(python: &Path, model: &Path, inputs: &[(String, HostTensor)]) -> Result<Vec<Peer>> {
    let dir = tempfile::tempdir()?;
    let (given, made) = (dir.path().join("inputs.npz"), dir.path().join("samples.npy"));
    let arrays: Vec<(&str, &HostTensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    npy::write_npz(&given, &arrays)?;
    let mut found = Vec::new();
    for name in PEERS {
        let _ = std::fs::remove_file(&made);
        let shown = [model, &given, &made].map(|p| p.display().to_string());
        let answer = call(python, &[name, &shown[0], &shown[1], &shown[2]])?;
        if answer.absent {
            continue;
        }
        let samples = match answer.error {
            Some(e) => Err(Error::backend(e)),
            None => npy::read(&made),
        };
        found.push(Peer { name: name.to_owned(), version: answer.version, samples });
    }
    Ok(found)
}
