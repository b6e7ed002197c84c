//! The recipes resolve, say what they are expected to reach and where that comes from, and run dry.
#![cfg(feature = "train")]

use std::path::{Path, PathBuf};
use std::process::Command;

use disback::distill::Config;

fn recipes() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "toml"));
    files.sort();
    files
}

#[test]
fn recipes_resolve_and_name_figures_and_sources() {
    let listed = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/README.md")).unwrap();
    assert_eq!(recipes().len(), 6);
    for file in recipes() {
        let text = std::fs::read_to_string(&file).unwrap();
        for part in ["# Expected:", "# Source:", "arXiv 2408.15991"] {
            assert!(text.contains(part), "{}: no {part}", file.display());
        }
        Config::resolve(Some(&file), &[]).unwrap();
        assert!(listed.contains(file.file_name().unwrap().to_str().unwrap()));
    }
}

#[test]
fn recipes_run_dry() {
    // On the digits teacher, which is small: every switch of the recipe is taken, three steps of each stage.
    let dir = tempfile::tempdir().unwrap();
    for file in recipes() {
        let out = Command::new(env!("CARGO_BIN_EXE_disback"))
            .args([
                "distill",
                concat!(env!("CARGO_MANIFEST_DIR"), "/examples/digits/teacher.onnx"),
                "--dry-run",
                "--json",
            ])
            .args(["-o", "run", "--device", "cpu", "--threads", "1", "--batch", "2", "--accumulate", "1", "--config"])
            .arg(&file)
            .current_dir(dir.path())
            .output()
            .unwrap();
        assert!(out.status.success(), "{}: {}", file.display(), String::from_utf8_lossy(&out.stderr));
        let plan: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        let config = Config::resolve(Some(&file), &[]).unwrap();
        let [one, two] = [0, 1].map(|k| &plan["stages"][k]);
        assert_eq!(one["steps"], config.degrade.steps);
        assert_eq!(two["images"], config.backtrack.updates * config.backtrack.ratio * 2);
        // Student, fake score in training; target (twice where it is guided) and fake score for the generator.
        let (u, r, g) = (config.backtrack.updates, config.backtrack.ratio, config.guidance);
        assert_eq!(two["forward_passes"], 2 * u * (2 * r + if g == 1.0 { 2 } else { 3 }), "{}", file.display());
        assert!(two["seconds_an_image"].as_f64().unwrap() > 0.0 && plan["peak_bytes"].as_u64().unwrap() > 10_000_000);
        let weights = 4 * plan["trained_parameters"].as_u64().unwrap();
        // Teacher, whose memory the target takes over; initial student and degrading copy; student, its average and the fake score.
        assert_eq!(plan["bytes_of_all_weights"], weights * (1 + 1 + 4 + 4 + 1 + 4));
        assert!(!dir.path().join("run").exists(), "nothing is left");
    }
}
