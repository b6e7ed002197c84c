//! The program that trains keeps its link to libtorch's CUDA half, without which a CUDA machine would train on its CPU in silence; the
//! one that people call starts without libtorch.

use std::path::{Path, PathBuf};
use std::process::Command;

const BINARY: &str = env!("CARGO_BIN_EXE_disback");

#[cfg(all(feature = "train", target_os = "linux"))]
#[test]
fn libtorch_cuda_stays_linked() {
    let root = std::env::var_os("LIBTORCH")
        .map(PathBuf::from)
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".libtorch"));
    let needed = disback::doctor::elf_needed(&std::fs::read(env!("CARGO_BIN_EXE_disback-train")).unwrap()).unwrap();
    assert!(needed.iter().any(|n| n == "libtorch_cpu.so" || n == "libtorch.so"), "{needed:?}");
    let has_cuda = root.join("lib/libtorch_cuda.so").exists();
    assert_eq!(needed.iter().any(|n| n == "libtorch_cuda.so"), has_cuda, "{needed:?}");
}

#[cfg(all(feature = "train", target_os = "linux"))]
#[test]
fn the_program_starts_without_libtorch() {
    use std::os::unix::fs::PermissionsExt;
    let needed = disback::doctor::elf_needed(&std::fs::read(BINARY).unwrap()).unwrap();
    assert!(!needed.iter().any(|n| n.contains("torch") || n.contains("c10")), "{needed:?}");
    // Alone it samples, and says what it lacks for the rest.
    let dir = tempfile::tempdir().unwrap();
    let alone = dir.path().join("disback");
    std::fs::copy(BINARY, &alone).unwrap();
    let run = |args: &[&str]| {
        let out = Command::new(&alone).args(args).current_dir(dir.path()).output().unwrap();
        let text = [out.stdout, out.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
        (out.status.code(), text)
    };
    assert!(run(&["sample", "--help"]).0 == Some(0) && run(&["--version"]).0 == Some(0));
    let (code, text) = run(&["inspect", "teacher.onnx"]);
    assert!(code == Some(1) && text.contains("disback-train: no such file"), "{text}");
    // Beside one whose libraries are gone, `doctor` still says what there is.
    let train = dir.path().join("disback-train");
    std::fs::write(&train, "#!/bin/sh\necho 'libtorch_cpu.so: cannot open shared object file' >&2\nexit 127\n")
        .unwrap();
    std::fs::set_permissions(&train, std::fs::Permissions::from_mode(0o755)).unwrap();
    let (code, text) = run(&["doctor"]);
    let says = ["BROKEN   libtorch", "cannot be loaded: libtorch_cpu.so", "ONNX Runtime", "tract"];
    assert!(code == Some(1) && says.iter().all(|part| text.contains(part)), "{text}");
    // Otherwise it becomes the other program, whose name nobody sees, with the same arguments.
    std::fs::write(&train, "#!/bin/sh\necho \"$@\"\nexit 75\n").unwrap();
    let (code, text) = run(&["inspect", "a b.onnx"]);
    assert_eq!((code, text.trim()), (Some(75), "inspect a b.onnx"));
    let help = Command::new(BINARY).args(["inspect", "--help"]).output().unwrap();
    assert!(String::from_utf8_lossy(&help.stdout).contains("Usage: disback inspect"));
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
