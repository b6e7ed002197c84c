//! Latent models are measured in pixels: a decoder behind `evaluate`, behind the measures of a run, and behind `compare`.
#![cfg(all(feature = "train", feature = "ort"))]

mod support;

use serde_json::Value;
use support::{ok, refused};

const DIGITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/digits");
const FEW: &str = "--device cpu --threads 1 --batch 4 --nodes 1 --degrade-steps 2 --updates 4 --lr 1e-2 \
                   --set log.samples=2 --set log.sample_steps=2 --set log.every=1";

#[test]
fn latents_are_measured_as_the_images_of_their_decoder() {
    let dir = support::folder("latent");
    support::run_python("tests/python/latent_networks.py", &[&format!("{DIGITS}/teacher.onnx"), dir.to_str().unwrap()]);
    let measure = format!("{DIGITS}/digits.npz --features {DIGITS}/classifier.onnx --steps 3 -n 64");
    let frechet = |args: &str| -> Vec<f64> {
        let found: Value = serde_json::from_str(&ok(&dir, &format!("evaluate --json {args}"))).unwrap();
        found["rows"].as_array().unwrap().iter().map(|r| r["frechet"].as_f64().unwrap()).collect()
    };
    // The decoder undoes the latents' scale: the same images, the same distance, for the teacher and its students.
    ok(&dir, &format!("distill latent.onnx -o plain {FEW}"));
    let student = std::fs::metadata(dir.join("plain/student.onnx")).unwrap().len();
    assert!(student > 1_000_000);
    ok(&dir, &format!("distill {DIGITS}/teacher.onnx -o pixels {FEW}"));
    let pixels = frechet(&format!("{DIGITS}/teacher.onnx pixels/student.onnx {measure}"));
    let latents = frechet(&format!("latent.onnx plain/student.onnx {measure} --decoder decoder.onnx"));
    assert_eq!(pixels.len(), 2);
    for (a, b) in pixels.iter().zip(&latents) {
        assert!((a / b - 1.0).abs() < 1e-6, "{pixels:?} {latents:?}");
    }
    refused(&dir, &format!("evaluate latent.onnx {measure}"), "--decoder FILE.onnx");
    refused(&dir, &format!("evaluate latent.onnx {measure} --decoder wide.onnx"), "the decoder wants");
    refused(&dir, &format!("evaluate latent.onnx {measure} --decoder twice.onnx --sliced"), "16x16");

    // While it is trained, too: the same curve as in pixels.
    let looks = format!(
        "--set evaluate.reference={DIGITS}/digits.npz --set evaluate.features={DIGITS}/classifier.onnx \
         --set evaluate.every=8 --set evaluate.images=48"
    );
    refused(&dir, &format!("distill latent.onnx -o x {FEW} {looks}"), "log.decoder");
    refused(&dir, &format!("distill latent.onnx -o y {FEW} {looks} --set log.decoder=twice.onnx"), "16x16");
    ok(&dir, &format!("distill latent.onnx -o a {FEW} {looks} --set log.decoder=decoder.onnx"));
    ok(&dir, &format!("distill {DIGITS}/teacher.onnx -o b {FEW} {looks}"));
    let curve = |run: &str| -> Vec<f64> {
        let text = std::fs::read_to_string(dir.join(run).join("evaluations.jsonl")).unwrap();
        text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["frechet"].as_f64().unwrap()).collect()
    };
    let (a, b) = (curve("a"), curve("b"));
    assert_eq!(a.len(), 2);
    for (a, b) in a.iter().zip(&b) {
        assert!((a / b - 1.0).abs() < 1e-6, "{a} {b}");
    }
    assert!(dir.join("a/best.onnx").is_file());
    // And in a comparison.
    let compare = format!(
        "--reference {DIGITS}/digits.npz --features {DIGITS}/classifier.onnx --seeds 0 --every 2 --samples 48 --json \
         --set batch=4 --set degrade.nodes=1 --set degrade.steps=2 --set backtrack.updates=2 --set threads=1"
    );
    refused(&dir, &format!("compare latent.onnx -o z {compare}"), "log.decoder");
    let last = |text: String| -> f64 {
        let found: Value = serde_json::from_str(&text).unwrap();
        found["base"][0]["points"][0]["distance"].as_f64().unwrap()
    };
    let a = last(ok(&dir, &format!("compare latent.onnx -o c {compare} --set log.decoder=decoder.onnx")));
    let b = last(ok(&dir, &format!("compare {DIGITS}/teacher.onnx -o d {compare}")));
    assert!((a / b - 1.0).abs() < 1e-6, "{a} {b}");
}
