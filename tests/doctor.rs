//! The built binary keeps its link to libtorch's CUDA half, without which a CUDA machine would train on its CPU in silence.

use std::path::{Path, PathBuf};
use std::process::Command;

const BINARY: &str = env!("CARGO_BIN_EXE_disback");

#[cfg(all(feature = "train", target_os = "linux"))]
#[test]
fn libtorch_cuda_stays_linked() {
    let root = std::env::var_os("LIBTORCH")
        .map(PathBuf::from)
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".libtorch"));
    let needed = disback::doctor::elf_needed(&std::fs::read(BINARY).unwrap()).unwrap();
    assert!(needed.iter().any(|n| n == "libtorch_cpu.so" || n == "libtorch.so"), "{needed:?}");
    let has_cuda = root.join("lib/libtorch_cuda.so").exists();
    assert_eq!(needed.iter().any(|n| n == "libtorch_cuda.so"), has_cuda, "{needed:?}");
}

#[test]
fn doctor_speaks_to_machines() {
    let out = Command::new(BINARY).args(["doctor", "--json"]).output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(report["ok"], out.status.success());
    let names: Vec<&str> = report["checks"].as_array().unwrap().iter().filter_map(|c| c["name"].as_str()).collect();
    assert!(names.contains(&"libtorch") && names.contains(&"ONNX Runtime") && names.contains(&"tract"), "{names:?}");
}

#[cfg(feature = "ort")]
#[test]
fn a_wrong_library_path_is_an_error_and_no_panic() {
    let out =
        Command::new(BINARY).args(["doctor", "--json"]).env("ORT_DYLIB_PATH", "/nowhere/lib.so").output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(text.contains("ORT_DYLIB_PATH does not lead to a usable ONNX Runtime"), "{text}");
    assert!(!String::from_utf8_lossy(&out.stderr).contains("panicked"));
    // A library, but another one.
    let libc = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib/aarch64-linux-gnu/libc.so.6"];
    if let Some(path) = libc.iter().find(|p| Path::new(p).exists()) {
        let out = Command::new(BINARY).args(["doctor"]).env("ORT_DYLIB_PATH", path).output().unwrap();
        assert_eq!(out.status.code(), Some(1));
        assert!(!String::from_utf8_lossy(&out.stderr).contains("panicked"));
    }
}
