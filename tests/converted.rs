//! The committed teachers of every converter: imported, compared with ONNX Runtime and with the framework's own outputs,
//! through both stages, and out again.
#![cfg(feature = "train")]

mod support;

use std::path::PathBuf;

const FRAMEWORKS: [(&str, &str, u64); 5] = [
    ("edm_unet", "torch", 132_969),
    ("diffusers_unet", "diffusers", 128_641),
    ("flax_unet", "jax", 132_841),
    ("keras_unet", "keras", 132_841),
    ("paddle_unet", "paddlepaddle", 132_841),
];

fn teacher(folder: &str) -> PathBuf {
    support::root().join("converters/teachers").join(folder).join("teacher.onnx")
}

fn json(args: &[&str]) -> serde_json::Value {
    let out = support::disback().args(args).arg("--json").output().unwrap();
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

#[test]
fn every_framework_agrees_with_its_own_outputs_and_trains_all_its_parameters() {
    for (folder, framework, elements) in FRAMEWORKS {
        let path = teacher(folder);
        let path = path.to_str().unwrap();
        let parity = json(&["parity", path, "--batch", "3"]);
        assert_eq!(parity["ok"], true, "{folder}: {parity}");
        assert_eq!(
            parity["expected"].as_array().map(Vec::len),
            Some(1),
            "{folder}: the framework's outputs are compared"
        );
        let found = json(&["inspect", path]);
        assert_eq!(found["parameters"]["elements"], elements, "{folder}: {}", found["parameters"]);
        let model = disback::graph::Model::load(&teacher(folder)).unwrap();
        let origin = model.metadata().into_iter().find(|(k, _)| k == "disback.converter").unwrap().1;
        assert!(origin.contains(framework), "{folder}: {origin}");
    }
}

#[test]
fn every_framework_goes_through_both_stages_and_out() {
    for (folder, ..) in FRAMEWORKS {
        let dir = support::folder(&format!("converted-{folder}"));
        let (path, run) = (teacher(folder), dir.join("run"));
        let (path, run) = (path.to_str().unwrap(), run.to_str().unwrap());
        #[rustfmt::skip]
        let result = json(&[
            "distill", path, "-o", run, "--device", "cpu", "--threads", "1", "--batch", "4", "--nodes", "2",
            "--degrade-steps", "2", "--updates", "3", "--set", "backtrack.switch_every=1", "--set", "log.samples=2",
            "--set", "log.sample_steps=2",
        ]);
        assert_eq!(result["outcome"], "finished", "{folder}: {result}");
        for engine in ["ort", "tract"] {
            let student = format!("{run}/student.onnx");
            let out = format!("{run}/{engine}.npy");
            json(&["sample", &student, "-n", "3", "-o", &out, "--engine", engine]);
            let images = disback::io::npy::read(out.as_ref()).unwrap();
            assert_eq!(images.shape(), [3, 1, 8, 8], "{folder}");
            assert!(images.to_f64().iter().all(|v| v.is_finite()), "{folder}");
        }
    }
}
