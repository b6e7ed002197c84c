//! A full disk: one clear error, whole files only. Needs the right to mount a small tmpfs; says so where it has none.
#![cfg(all(feature = "train", target_os = "linux"))]

mod support;

use std::process::Command;

#[test]
fn a_full_disk_leaves_whole_files_only() {
    let dir = support::folder("full-disk");
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=9m", "disback-test"]).arg(&dir).status();
    if !mounted.is_ok_and(|s| s.success()) {
        println!("not run: no right to mount a tmpfs here");
        return;
    }
    let run = dir.join("run");
    let done = support::disback()
        .args(["distill", "examples/digits/teacher.onnx", "-o", run.to_str().unwrap(), "--device", "cpu"])
        .args(["--batch", "8", "--nodes", "3", "--degrade-steps", "3", "--updates", "3", "--set", "log.samples=0"])
        .current_dir(support::root())
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&done.stderr).into_owned();
    let mut torn = Vec::new();
    let mut left = Vec::new();
    for entry in walk(&run) {
        let name = entry.file_name().unwrap().to_string_lossy().into_owned();
        if name.starts_with(".disback-") {
            torn.push(name.clone());
        }
        if name.ends_with(".safetensors") && disback::torch::params::load_tensors(&entry).is_err() {
            torn.push(name.clone());
        }
        left.push(name);
    }
    let unmounted = Command::new("umount").arg(&dir).status();
    assert!(unmounted.is_ok_and(|s| s.success()));
    assert_eq!(done.status.code(), Some(1), "{error}");
    assert!(error.contains("no space left"), "{error}");
    assert!(torn.is_empty(), "half-written: {torn:?} of {left:?}");
    assert!(left.iter().any(|n| n == "config.toml"), "{left:?}");
}

fn walk(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    entries.flatten().flat_map(|e| if e.path().is_dir() { walk(&e.path()) } else { vec![e.path()] }).collect()
}
