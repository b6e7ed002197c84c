//! The ten-line consumers in `examples/consumers`, run for real on one student and one noise. The folder `web` that is left
//! behind serves `make test-web` (the page and the JavaScript consumer).
#![cfg(all(feature = "train", feature = "ort"))]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use disback::export::{self, ShipOptions, StudentOptions};
use disback::graph::save;
use disback::run::Teacher;
use disback::torch::Forward;

/// student.onnx, noise.f32 and what `disback sample` makes of it: ten images, classes 0 to 9.
fn made() -> &'static (PathBuf, Vec<f32>) {
    static MADE: OnceLock<(PathBuf, Vec<f32>)> = OnceLock::new();
    MADE.get_or_init(|| {
        let dir = support::folder("web");
        let path = support::root().join("examples/digits/teacher.onnx");
        let teacher = Teacher::load(&path, &Default::default(), tch::Device::Cpu).unwrap();
        let options = StudentOptions { method: "test".into(), sigma_init: Some(2.5), ..StudentOptions::default() };
        let student =
            export::student(&teacher.network, teacher.network.params(), &teacher.card.card, &options).unwrap();
        let (student, _) = export::ship(student, &ShipOptions::default()).unwrap();
        save::write(&student, &dir.join("student.onnx")).unwrap();
        let noise: Vec<u8> = disback::noise::batch_noise(2, 0, 10, 64).iter().flat_map(|v| v.to_le_bytes()).collect();
        std::fs::write(dir.join("noise.f32"), noise).unwrap();
        for (name, number, seed, classes) in [("digits.npy", "10", "2", "0-9"), ("samples.npy", "6", "5", "3")] {
            let args = ["sample", "student.onnx", "-n", number, "--seed", seed, "--classes", classes, "-o", name];
            let out = support::disback().args(args).current_dir(&dir).output().unwrap();
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        }
        let expected = disback::io::npy::read(&dir.join("digits.npy")).unwrap().to_f32();
        (dir, expected)
    })
}

fn run(command: &mut Command, name: &str) {
    let (dir, expected) = made();
    let out = dir.join(format!("{name}.f32"));
    let args = [dir.join("student.onnx"), dir.join("noise.f32"), out.clone()];
    let done = command.args(&args).output().unwrap_or_else(|e| panic!("{name}: {e}"));
    assert!(done.status.success(), "{name}: {}", String::from_utf8_lossy(&done.stderr));
    let bytes = std::fs::read(&out).unwrap();
    let got: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(got.len(), expected.len(), "{name}");
    let worst = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(worst < 1e-4, "{name}: {worst}");
}

fn site_packages() -> PathBuf {
    let code = "import sysconfig; print(sysconfig.get_path('purelib'))";
    let out = Command::new(support::python()).args(["-c", code]).output().unwrap();
    PathBuf::from(String::from_utf8_lossy(&out.stdout).trim())
}

fn one(folder: &Path, start: &str) -> PathBuf {
    let files = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}; run `make setup`", folder.display()));
    let mut found: Vec<PathBuf> = files
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(start)))
        .collect();
    found.sort();
    found.pop().unwrap_or_else(|| panic!("no {start}* in {}", folder.display()))
}

#[test]
fn python() {
    run(Command::new(support::python()).arg(support::root().join("examples/consumers/sample.py")), "python");
}

#[test]
fn rust() {
    let release = if cfg!(debug_assertions) { None } else { Some("--release") };
    let built = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--example", "consumers"])
        .args(release)
        .current_dir(support::root())
        .status()
        .unwrap();
    assert!(built.success());
    let program = Path::new(env!("CARGO_BIN_EXE_disback")).with_file_name("examples").join("consumers");
    let library = one(&site_packages().join("onnxruntime/capi"), "libonnxruntime.so");
    run(Command::new(program).env("ORT_DYLIB_PATH", library), "rust");
}

#[test]
fn cpp() {
    let openvino = site_packages().join("openvino");
    let program = made().0.join("sample");
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let libraries = openvino.join("libs");
    let out = Command::new(compiler)
        .args(["-std=c++17", "-O1"])
        .arg(support::root().join("examples/consumers/sample.cpp"))
        .arg(format!("-I{}", openvino.join("include").display()))
        .arg(one(&libraries, "libopenvino.so."))
        .arg(format!("-Wl,-rpath,{}", libraries.display()))
        // What libopenvino itself needs lies beside it.
        .arg(format!("-Wl,-rpath-link,{}", libraries.display()))
        .arg("-o")
        .arg(&program)
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    run(&mut Command::new(program), "cpp");
}
