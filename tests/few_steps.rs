//! Students of several steps: one unrolled graph, one graph a step, and that they are the same student.
#![cfg(all(feature = "train", any(feature = "ort", feature = "tract")))]

use std::path::Path;
use std::process::Command;

use disback::runtime::{self, EngineOptions};
use disback::tensor::HostTensor;

const TEACHER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/digits/teacher.onnx");

fn distill(dir: &Path, name: &str, more: &[&str]) -> std::process::Output {
    let few = "--device cpu --threads 1 --batch 4 --nodes 1 --degrade-steps 2 --updates 3 --lr 1e-4 --per-step -o";
    let mut args: Vec<&str> = vec!["distill", TEACHER];
    args.extend(few.split(' '));
    args.push(name);
    args.extend(["--set", "log.samples=2", "--set", "log.sample_steps=2", "--set", "student.sigma_init=20"]);
    args.extend(more);
    Command::new(env!("CARGO_BIN_EXE_disback")).args(args).current_dir(dir).output().unwrap()
}

fn run(path: &Path, noise: &HostTensor) -> Vec<f32> {
    let mut engine = runtime::open(path, &EngineOptions::default()).unwrap();
    let labels = HostTensor::vec(&[3i64, 8]);
    engine.run(&[("noise", noise), ("labels", &labels)]).unwrap().remove(0).1.to_f32()
}

#[test]
fn the_unrolled_graph_is_its_steps_in_turn() {
    let dir = tempfile::tempdir().unwrap();
    let levels = [4.0f32, 0.7];
    for stochastic in [true, false] {
        let name = if stochastic { "fresh" } else { "kept" };
        let kind = format!("student.stochastic={stochastic}");
        let out = distill(dir.path(), name, &["--set", "student.sigmas=[4.0, 0.7]", "--set", &kind]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let path = |file: &str| dir.path().join(name).join(file);
        let pixels = 64;
        let channels = if stochastic { 3 } else { 1 };
        let all = disback::noise::batch_noise(5, 0, 2, channels * pixels);
        let whole = run(&path("student.onnx"), &HostTensor::new(&[2, channels, 8, 8], &all).unwrap());
        // MetricsRow by row: image k's noise of step s.
        let part = |step: usize| -> Vec<f32> {
            (0..2)
                .flat_map(|k| all[(k * channels + step) * pixels..(k * channels + step + 1) * pixels].to_vec())
                .collect()
        };
        let image = |z: Vec<f32>, step: usize| {
            run(&path(&format!("student-step-{step}.onnx")), &HostTensor::new(&[2, 1, 8, 8], &z).unwrap())
        };
        let mut x0 = image(part(0), 0);
        let mut found: Vec<f32> = part(0).iter().zip(&x0).map(|(z, x)| (20.0 * z - x) / 20.0).collect();
        for (step, sigma) in levels.iter().enumerate() {
            let e = if stochastic { part(step + 1) } else { found.clone() };
            let x_t: Vec<f32> = x0.iter().zip(&e).map(|(x, e)| x + sigma * e).collect();
            x0 = image(x_t.iter().map(|x| x / sigma).collect(), step + 1);
            found = x_t.iter().zip(&x0).map(|(t, x)| (t - x) / sigma).collect();
        }
        let error = whole.iter().zip(&x0).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(error < 2e-5, "{name}: {error:e}");
        let spread = whole.iter().fold(0f32, |m, v| m.max(v.abs()));
        assert!(spread > 0.5);
        // The weights are in the file once.
        let size = |file: &str| std::fs::metadata(path(file)).unwrap().len();
        assert!(size("student.onnx") < size("student-step-0.onnx") * 3 / 2);
        let out = Command::new(env!("CARGO_BIN_EXE_disback"))
            .args(["sample", "student.onnx", "-n", "5", "-o", "x.npy"])
            .current_dir(dir.path().join(name))
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        assert_eq!(disback::io::npy::read(&path("x.npy")).unwrap().shape(), [5, 1, 8, 8]);
    }
}

#[test]
fn impossible_levels_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (levels, says) in [
        ("[25.0]", "25 is not below the first step's level, 20"),
        ("[4.0, 4.0]", "does not lie below"),
        ("[4.0, 0.0]", "0 is no noise level"),
        ("[inf]", "no noise level"),
    ] {
        let out = distill(dir.path(), "out", &["--set", &format!("student.sigmas={levels}")]);
        let text = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.code() == Some(2) && text.contains(says), "{levels}: {text}");
        assert!(!dir.path().join("out").exists());
    }
}
