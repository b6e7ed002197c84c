//! The stand-in for libtorch's CUDA half (tests/stand_in_cuda), built once for each of its contents, and runs of `disback` under it.
#![allow(dead_code, reason = "each test target uses its own part")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use serde_json::Value;
use sha2::{Digest, Sha256};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// libtorch: `LIBTORCH`, else the wheel of `make setup`.
fn libtorch() -> PathBuf {
    let root = std::env::var_os("LIBTORCH").map_or_else(|| root().join(".libtorch"), PathBuf::from);
    root.canonicalize().unwrap_or_else(|e| panic!("{}: {e} (make setup)", root.display()))
}

fn run(command: &mut Command) {
    let out = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(out.status.success(), "{command:?}:\n{}", String::from_utf8_lossy(&out.stderr));
}

/// Builds both libraries into `to`.
fn build(to: &Path, libtorch: &Path) {
    let sources = root().join("tests/stand_in_cuda");
    let python = std::env::var_os("DISBACK_PYTHON").map_or_else(|| root().join(".venv/bin/python"), PathBuf::from);
    run(Command::new(python).arg(sources.join("ops.py")).arg("--check"));
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let compile = || {
        let mut command = Command::new(&compiler);
        command.args(["-shared", "-fPIC"]);
        command
    };
    let mut main = compile();
    main.args(["-std=c++20", "-O1"]).arg(sources.join("stand_in_cuda.cpp"));
    // (The headers of CUDA's runtime: of the wheels beside PyTorch's, or of a toolkit.)
    let site = libtorch.parent().expect("libtorch lies in a folder");
    let headers =
        ["torch/include", "torch/include/torch/csrc/api/include", "nvidia/cu13/include", "nvidia/cuda_runtime/include"];
    let beside = headers.iter().chain(&["triton/backends/nvidia/include"]).map(|h| site.join(h));
    let own = ["include", "include/torch/csrc/api/include"].map(|h| libtorch.join(h));
    for folder in own.into_iter().chain(beside).chain([PathBuf::from("/usr/local/cuda/include")]).filter(|d| d.is_dir())
    {
        main.arg("-isystem").arg(folder);
    }
    let lib = libtorch.join("lib");
    main.arg("-o").arg(to.join("libtorch_cuda.so")).args(["-Wl,-soname,libtorch_cuda.so", "-ltorch_cpu", "-lc10"]);
    run(main.arg("-L").arg(&lib).arg(format!("-Wl,-rpath,{}", lib.display())));
    let empty = to.join("empty.cpp");
    std::fs::write(&empty, "").expect("a file in target/");
    run(compile().arg(empty).arg("-o").arg(to.join("libc10_cuda.so")).arg("-Wl,-soname,libc10_cuda.so"));
    // A driver's library as WSL2 has it, for `doctor`.
    run(compile().arg(sources.join("nvml.cpp")).arg("-o").arg(to.join("libnvidia-ml.so.1")));
}

/// The folder with the libraries, for `LD_LIBRARY_PATH`. What is built is kept under target/ by the hash of its sources.
pub fn library() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let libtorch = libtorch();
        let sources = root().join("tests/stand_in_cuda");
        let mut files: Vec<PathBuf> =
            std::fs::read_dir(&sources).expect("tests/stand_in_cuda").flatten().map(|e| e.path()).collect();
        files.extend([file!().into(), libtorch.join("version.py")]);
        files.sort();
        let mut hash = Sha256::new();
        for file in files {
            hash.update(std::fs::read(&file).unwrap_or_default());
        }
        let hash: String = hash.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect();
        let place = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let folder = place.join(format!("stand-in-cuda-{hash}"));
        if !folder.join("libnvidia-ml.so.1").is_file() {
            let fresh = place.join(format!("stand-in-cuda-{}", std::process::id()));
            std::fs::create_dir_all(&fresh).expect("target/tmp is writable");
            build(&fresh, &libtorch);
            // Whole, or not at all; another process may have been first.
            if std::fs::rename(&fresh, &folder).is_err() {
                let _ = std::fs::remove_dir_all(&fresh);
            }
        }
        folder
    })
}

/// A command that sees stand-in devices; what it asks of them is written to `report`.
pub fn under(program: &Path, report: &Path) -> Command {
    let mut command = Command::new(program);
    let mut path = std::ffi::OsString::from(library());
    if let Some(old) = std::env::var_os("LD_LIBRARY_PATH") {
        path.push(":");
        path.push(old);
    }
    command.env("LD_LIBRARY_PATH", path).env("STAND_IN_CUDA_REPORT", report).env("OMP_NUM_THREADS", "1");
    command
}

/// What a process asked of its device.
pub struct Report(pub Value);

impl Report {
    /// Reads a report.
    pub fn read(path: &Path) -> Self {
        let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Self(serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
    }

    /// A number.
    pub fn count(&self, name: &str) -> i64 {
        self.0[name].as_i64().unwrap_or_else(|| panic!("{name} in {}", self.0))
    }

    /// Entries of `waits`, `kinds` or `ops` that are not as often in `other`: name and how much more often there.
    pub fn growth(&self, other: &Self, list: &str) -> Vec<(String, i64)> {
        let (a, b) = (self.0[list].as_object().expect("a list"), other.0[list].as_object().expect("a list"));
        let of = |m: &serde_json::Map<String, Value>, k: &str| m.get(k).and_then(Value::as_i64).unwrap_or(0);
        let mut names: Vec<&String> = a.keys().chain(b.keys()).collect();
        names.sort();
        names.dedup();
        names.into_iter().map(|k| (k.clone(), of(b, k) - of(a, k))).filter(|(_, d)| *d != 0).collect()
    }
}
