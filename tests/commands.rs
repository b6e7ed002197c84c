//! `sample`, `evaluate`, `bench` and `report` as a user meets them: files, exit codes, one clear error.

use std::path::Path;
use std::process::{Command, Output};

use disback::{onnx, tensor};

#[path = "../src/runtime/testing.rs"]
mod testing;

fn disback(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_disback")).args(args).current_dir(dir).output().unwrap()
}

fn ok(dir: &Path, args: &[&str]) -> String {
    let out = disback(dir, args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// Exit code and the first line of standard error.
fn fails(dir: &Path, args: &[&str]) -> (i32, String) {
    let out = disback(dir, args);
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!text.contains("panicked"), "{args:?}: {text}");
    (out.status.code().unwrap(), text.lines().next().unwrap_or_default().to_string())
}

fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("student.onnx"), testing::student("batch")).unwrap();
    let weight: Vec<f32> = (0..12).map(|k| ((k * 5) % 7) as f32 - 3.0).collect();
    std::fs::write(dir.path().join("features.onnx"), testing::features(&weight)).unwrap();
    dir
}

#[test]
fn samples_are_the_same_in_every_form() {
    let dir = folder();
    let dir = dir.path();
    ok(dir, &["sample", "student.onnx", "-n", "10", "-o", "a.npy", "--seed", "3"]);
    ok(dir, &["sample", "student.onnx", "-n", "10", "-o", "b.npz", "--seed", "3", "--batch", "3", "--engine", "tract"]);
    ok(dir, &["sample", "student.onnx", "-n", "10", "-o", "sheet.png", "--seed", "3"]);
    ok(dir, &["sample", "student.onnx", "-n", "10", "-o", "images", "--seed", "3"]);
    let a = disback::io::npy::read(&dir.join("a.npy")).unwrap();
    let b = disback::io::npy::read_npz(&dir.join("b.npz")).unwrap();
    assert_eq!((b[0].0.as_str(), b[1].0.as_str()), ("images", "labels"));
    assert_eq!(a.shape(), [10, 1, 2, 2]);
    let difference = a.to_f64().iter().zip(b[0].1.to_f64()).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
    assert!(difference < 1e-6, "{difference}");
    let range = [-1.0, 1.0];
    let array = disback::io::ImageSet::open(&dir.join("a.npy"), range).unwrap();
    let files = disback::io::ImageSet::open(&dir.join("images"), range).unwrap();
    assert_eq!(array.batch_u8(0, 10).unwrap(), files.batch_u8(0, 10).unwrap());
    assert!(std::fs::read(dir.join("sheet.png")).unwrap().starts_with(b"\x89PNG"));
}

#[test]
fn a_student_is_at_no_distance_from_its_own_samples() {
    let dir = folder();
    let dir = dir.path();
    ok(dir, &["sample", "student.onnx", "-n", "200", "-o", "a.npy"]);
    let score = |args: &[&str]| -> serde_json::Value {
        let mut all = vec!["evaluate"];
        all.extend(args);
        all.extend(["--features", "features.onnx", "--feature-range", "-1,1", "--json"]);
        serde_json::from_str(&ok(dir, &all)).unwrap()
    };
    let same = score(&["student.onnx", "a.npy", "--save-statistics", "reference.npz"]);
    assert!(same["frechet"].as_f64().unwrap() < 1e-9, "{same}");
    assert_eq!((same["precision"].as_f64(), same["recall"].as_f64()), (Some(1.0), Some(1.0)));
    let other = score(&["student.onnx", "a.npy", "--seed", "9"]);
    let shifted = score(&["a.npy", "reference.npz"]);
    assert!(shifted["frechet"].as_f64().unwrap() < 1e-9, "{shifted}");
    assert!(other["frechet"].as_f64().unwrap() > 1e-3, "{other}");
    ok(dir, &["sample", "student.onnx", "-n", "200", "-o", "one.npy", "--classes", "2"]);
    let one = score(&["one.npy", "a.npy"]);
    assert!(one["frechet"].as_f64() > other["frechet"].as_f64() && one["recall"].as_f64() < Some(1.0), "{one}");
}

#[test]
fn timings_come_for_every_engine() {
    let dir = folder();
    let out =
        ok(dir.path(), &["bench", "student.onnx", "--batch", "1,2", "--seconds", "0", "--engine", "tract", "--json"]);
    let out: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(out["timings"].as_array().unwrap().len(), 2);
    assert!(out["timings"][1]["p99_ms"].as_f64() >= out["timings"][1]["p50_ms"].as_f64());
}

#[test]
fn bad_input_is_one_clear_error() {
    let dir = folder();
    let dir = dir.path();
    std::fs::write(dir.join("text.onnx"), "no model").unwrap();
    std::fs::write(dir.join("grey.npy"), [0u8; 4]).unwrap();
    let cases: &[(&[&str], i32, &str)] = &[
        (&["sample", "none.onnx", "-o", "x.png"], 1, "none.onnx"),
        (&["sample", "text.onnx", "-o", "x.png"], 1, "not an ONNX model"),
        (&["sample", "features.onnx", "-o", "x.png"], 1, "not a student"),
        (&["sample", "student.onnx", "-o", "x.png", "-n", "0"], 2, "nothing to sample"),
        (&["sample", "student.onnx", "-o", "x.png", "--classes", "7"], 2, "classes 0 to 2"),
        (
            &["sample", "student.onnx", "-o", "x.png", "--engine", "tract", "--provider", "cuda"],
            2,
            "tract has no provider",
        ),
        (&["sample", "student.onnx", "-o", "none/x.png"], 1, "none/x.png"),
        (&["evaluate", "student.onnx", "none", "--features", "features.onnx"], 1, "none: no such file"),
        (&["evaluate", "student.onnx", "grey.npy", "--features", "features.onnx"], 1, "grey.npy: not a .npy array"),
        (
            &["evaluate", "student.onnx", "student.onnx", "--features", "student.onnx"],
            1,
            "a feature network has one input",
        ),
        (&["evaluate", "student.onnx", "student.onnx", "--features", "features.onnx", "--range", "1"], 2, "LOW,HIGH"),
        (&["bench", "student.onnx", "--batch", "0"], 2, "a batch of 0"),
        (&["report", "none"], 1, "none: no such folder"),
        (&["report", "."], 2, "not a run directory"),
    ];
    for (args, code, want) in cases {
        let (got, error) = fails(dir, args);
        assert!(got == *code && error.contains(want), "{args:?}: exit {got}, {error}");
    }
    assert!(!dir.join("x.png").exists());
    assert!(
        std::fs::read_dir(dir).unwrap().flatten().all(|e| !e.file_name().to_string_lossy().starts_with(".disback"))
    );
}
