//! What a person sees where a network gives NaN or infinity: steps are skipped and counted, the run stops after so many in
//! a row, and the message names the network and the way out.
#![cfg(feature = "train")]

mod support;

use std::path::Path;

use disback::HostTensor;
use disback::graph::edit::{node, rename};
use disback::graph::tensors::to_proto;
use disback::onnx::ModelProto;
use prost::Message;
use support::{ok, root, run};

/// Few images of one noise level below 3, no trajectory, a row of metrics a step.
const SMALL: &str = "--device cpu --threads 1 --batch 16 --set degrade.nodes=0 --updates 8 --lr 1e-4 --set log.every=1 --set log.samples=0 \
                     --set student.sigma_init=2.5 --set optimizer.max_skips=3 --set optimizer.warmup=0";

/// The digits teacher, whose output becomes NaN above sigma 22: `D exp(4 sigma) / exp(4 sigma)`.
fn overflowing(dir: &Path) {
    let bytes = std::fs::read(root().join("examples/digits/teacher.onnx")).unwrap();
    let mut model = ModelProto::decode(bytes.as_slice()).unwrap();
    let graph = model.graph.as_mut().unwrap();
    rename(graph, "denoised", "plain");
    graph.output[0].name = Some("denoised".into());
    graph.initializer.push(to_proto("four", &HostTensor::vec(&[4.0f32])));
    graph.initializer.push(to_proto("column", &HostTensor::vec(&[-1i64, 1, 1, 1])));
    graph.node.extend([
        node("Mul", &["sigma", "four"], "large"),
        node("Exp", &["large"], "huge"),
        node("Div", &["huge", "huge"], "one"),
        node("Reshape", &["one", "column"], "factor"),
        node("Mul", &["plain", "factor"], "denoised"),
    ]);
    std::fs::write(dir.join("nan.onnx"), model.encode_to_vec()).unwrap();
}

fn rows(dir: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn gan() -> String {
    let images = root().join("examples/digits/digits.npz");
    format!("--set gan.data={} --set gan.taps=[\"conv2d_5\"]", images.display())
}

#[test]
fn a_teacher_that_overflows_at_some_levels_stops_every_objective_and_is_named() {
    let dir = support::folder("nan-teacher");
    overflowing(&dir);
    for objective in ["dmd", "sid", "sim", "dmd2", "f-distill", "uni-instruct"] {
        let gan = if matches!(objective, "dmd2" | "f-distill" | "uni-instruct") { gan() } else { String::new() };
        let (code, _, errors) =
            run(&dir, &format!("distill nan.onnx -o {objective} --objective {objective} {SMALL} {gan}"));
        let first = errors.lines().find(|l| l.contains("error")).unwrap_or_default();
        assert_eq!(code, Some(1), "{objective}: {errors}");
        for says in [
            "the gradient of the generator has not been finite for 3 steps in a row",
            "the teacher gives NaN or infinity at noise levels from 2",
        ] {
            assert!(first.contains(says), "{objective}: {errors}");
        }
        assert!(errors.contains("noise.generator") && errors.contains("disback parity"), "{objective}: {errors}");
        let run = dir.join(objective);
        assert!(!run.join("student.onnx").exists() && !run.join("student.safetensors").exists(), "{objective}");
        let rows = rows(&run);
        let last = rows.last().unwrap();
        let skipped = last["skipped"].as_u64().unwrap();
        assert!(rows.len() < 8 && skipped >= 3, "{objective}: {last}");
    }
    // In stage 1 too.
    let (code, _, errors) =
        run(&dir, &format!("distill nan.onnx -o both {SMALL} --set degrade.nodes=2 --degrade-steps 6"));
    assert!(
        code == Some(1)
            && errors.contains("the gradient of the degraded copy")
            && errors.contains("the teacher gives NaN"),
        "{errors}"
    );
}

#[test]
fn steps_are_skipped_and_counted_and_levels_that_are_known_do_without() {
    let dir = support::folder("nan-some");
    overflowing(&dir);
    // One image a step: a part of the steps goes wrong, never so many in a row.
    let some = SMALL.replace("--batch 16", "--batch 1").replace("max_skips=3", "max_skips=50");
    let some = some.replace("--updates 8", "--updates 60");
    let (code, _, errors) = run(&dir, &format!("distill nan.onnx -o some {some}"));
    assert_eq!(code, Some(0), "{errors}");
    let summary: serde_json::Value =
        serde_json::from_slice(&std::fs::read(dir.join("some/summary.json")).unwrap()).unwrap();
    let skipped = summary["run"]["skipped_steps"].as_u64().unwrap();
    assert!(skipped > 5 && skipped < 110, "{skipped}");
    assert!(errors.contains(&format!("warning: {skipped} optimiser steps were skipped")), "{errors}");
    assert_eq!(rows(&dir.join("some")).last().unwrap()["skipped"], skipped);
    ok(&dir, "sample some/student.onnx -n 2 -o images.npy");
    // A run shorter than what may be skipped in a row, in which nothing was done, does not end well.
    let short = SMALL.replace("max_skips=3", "max_skips=500").replace("--updates 8", "--updates 2");
    let high = "--set noise.generator=[900,999] --set noise.fake=[900,999]";
    let (code, _, errors) = run(&dir, &format!("distill nan.onnx -o short {short} {high}"));
    assert!(code == Some(1) && errors.contains("not been finite for 2 steps in a row"), "{errors}");
    // As the message says: without those levels all goes well.
    let (code, _, errors) =
        run(&dir, &format!("distill nan.onnx -o none {SMALL} --set noise.generator=[0,700] --set noise.fake=[0,700]"));
    assert!(code == Some(0) && !errors.contains("skipped"), "{errors}");
}

#[test]
fn a_network_that_diverges_is_named_with_its_rate() {
    let dir = support::folder("nan-diverged");
    let teacher = root().join("examples/digits/teacher.onnx");
    let gan = gan();
    for (objective, more, network, hint) in [
        (
            "dmd",
            "--set backtrack.lr_fake=1e30",
            "the fake score gives NaN or infinity at every noise level",
            "backtrack.lr_fake",
        ),
        (
            "sid",
            "--set backtrack.lr_fake=1e30",
            "the fake score gives NaN or infinity at every noise level",
            "backtrack.lr_fake",
        ),
        (
            "sim",
            "--set backtrack.lr_fake=1e30",
            "the fake score gives NaN or infinity at every noise level",
            "backtrack.lr_fake",
        ),
        (
            "dmd2",
            "--set backtrack.lr_fake=1e30",
            "the fake score gives NaN or infinity at every noise level",
            "backtrack.lr_fake",
        ),
        ("dmd2", "--set gan.lr=1e38", "the discriminator's head", "gan.lr"),
        ("f-distill", "--set gan.lr=1e38", "the discriminator's head", "gan.lr"),
        ("dmd", "--set backtrack.lr_generator=1e30", "the student", "backtrack.lr_generator"),
        (
            "dmd",
            "--set degrade.nodes=2 --degrade-steps 9 --set degrade.lr=1e30",
            "the degraded copy gives NaN",
            "degrade.lr",
        ),
    ] {
        let name = format!("{objective}-{}", hint.replace('.', "-"));
        let gan = if matches!(objective, "dmd2" | "f-distill") { &gan } else { "" };
        let args = format!("distill {} -o {name} --objective {objective} {SMALL} {gan} {more}", teacher.display());
        let (code, _, errors) = run(&dir, &args);
        assert_eq!(code, Some(1), "{args}: {errors}");
        assert!(errors.contains("3 steps in a row") && errors.contains(network), "{args}: {errors}");
        assert!(errors.contains(&format!("lower {hint}")), "{args}: {errors}");
        assert!(!dir.join(&name).join("student.onnx").exists(), "{args}");
    }
}
