//! Students that are not the teacher's copy: an ONNX generator of its own architecture, a network with a card of its own,
//! weights at random.
#![cfg(all(feature = "train", feature = "ort"))]

mod support;

use std::path::{Path, PathBuf};

use disback::runtime::student::{SampleRequest, Student};
use disback::runtime::{self, EngineOptions};
use disback::tensor::HostTensor;
use disback::torch::params::load_tensors;
use support::ok;

const TEACHER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/digits/teacher.onnx");
const FEW: &str = "--device cpu --threads 1 --batch 4 --nodes 2 --degrade-steps 4 --updates 6 --lr 1e-2 \
                   --set backtrack.switch_every=2 --set log.samples=3 --set log.sample_steps=2 --set ema.half_life=4 \
                   --set optimizer.warmup=0";

fn networks(name: &str) -> PathBuf {
    let folder = support::folder(name);
    support::run_python("tests/python/student_networks.py", &[folder.to_str().unwrap()]);
    folder
}

fn refused(dir: &Path, args: &str, says: &str) {
    assert_eq!(support::refused(dir, args, says), 2, "{args}");
}

/// Weights of a safetensors file or of an ONNX file's initializers, f32 by name.
fn weights(path: &Path) -> Vec<(String, Vec<f32>)> {
    let read = load_tensors(path).unwrap();
    read.into_iter().map(|(n, t)| (n, Vec::<f32>::try_from(t.view(-1)).unwrap())).collect()
}

#[test]
fn a_generator_of_its_own_is_trained_and_leaves_under_the_students_contract() {
    let dir = networks("generators");
    ok(&dir, &format!("distill {TEACHER} -o run --student mlp.onnx {FEW}"));
    let path = dir.join("run/student.onnx");
    let trained = weights(&dir.join("run/student.safetensors"));
    let of = |name: &str| trained.iter().find(|(n, _)| n == name).unwrap().1.clone();
    let names: Vec<&str> = trained.iter().map(|(n, _)| n.as_str()).collect();
    assert_eq!(names.len(), 5, "{names:?}");

    // Every weight has moved from where the file has it.
    let given = ok(&dir, "inspect mlp.onnx --parameters");
    assert!(given.contains("5 tensors"), "{given}");
    let first = disback::graph::Model::load(&dir.join("mlp.onnx")).unwrap();
    for t in &first.proto.graph.as_ref().unwrap().initializer {
        let Some((_, now)) = trained.iter().find(|(n, _)| n == t.name()) else { continue };
        let bytes = t.raw_data.as_ref().unwrap();
        let before: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        assert!(before.iter().zip(now).any(|(a, b)| (a - b).abs() > 1e-4), "{} was not trained", t.name());
    }

    // What the file makes in ONNX Runtime is what these weights say, computed by hand.
    let mut student = Student::open(&path, &EngineOptions::default()).unwrap();
    assert_eq!(student.info().noise_shape, [16, 1, 1]);
    assert_eq!((student.info().shape.clone(), student.info().range), (vec![1, 8, 8], Some([-1.0, 1.0])));
    assert_eq!((student.info().classes(), student.info().method.as_str()), (Some(10), "disback"));
    let request = SampleRequest { seed: 4, classes: vec![3, 8], batch: 8, ..SampleRequest::default() };
    let made = student.sample(&request, 0, 2).unwrap().to_f32();
    let noise = disback::noise::batch_noise(4, 0, 2, 16);
    let (table, w1, b1, w2, b2) = (of("table"), of("w1"), of("b1"), of("w2"), of("b2"));
    for (image, class) in [3usize, 8].into_iter().enumerate() {
        let x: Vec<f32> = (0..16).map(|k| noise[image * 16 + k] + table[class * 16 + k]).collect();
        let layer = |w: &[f32], b: &[f32], x: &[f32]| -> Vec<f32> {
            let row = |o: usize| x.iter().zip(&w[o * x.len()..]).map(|(a, b)| a * b).sum::<f32>() + b[o];
            (0..b.len()).map(row).collect()
        };
        let hidden: Vec<f32> = layer(&w1, &b1, &x).into_iter().map(|v| v.max(0.0)).collect();
        for (k, o) in layer(&w2, &b2, &hidden).into_iter().enumerate() {
            assert!((made[image * 64 + k] - o.tanh()).abs() < 1e-5, "image {image}, pixel {k}");
        }
    }
    // The run's book-keeping, and the same file from the run's weights.
    let summary: serde_json::Value =
        serde_json::from_slice(&std::fs::read(dir.join("run/summary.json")).unwrap()).unwrap();
    assert_eq!(summary["run"]["student"], dir.join("mlp.onnx").to_str().unwrap());
    assert_eq!(summary["run"]["student_parameters"], 160 + 64 * 17 + 64 * 65);
    ok(&dir, &format!("export {TEACHER} --run run -o again.onnx"));
    assert!(std::fs::read(dir.join("again.onnx")).unwrap() == std::fs::read(&path).unwrap());
    ok(&dir, "verify run/student.onnx");
    // A student is a generator too: it goes on from what it has learnt.
    ok(&dir, &format!("distill {TEACHER} -o further --student run/student.onnx {FEW}"));
    let mut further = Student::open(&dir.join("further/student.onnx"), &EngineOptions::default()).unwrap();
    assert_ne!(further.sample(&request, 0, 2).unwrap().to_f32(), made);
}

#[test]
fn channels_last_and_one_hot_rows_become_the_contracts_form() {
    let dir = networks("channels-last");
    ok(&dir, &format!("distill {TEACHER} -o run --student channels_last.onnx {FEW} --set backtrack.lr_generator=1e-9"));
    // Hardly trained: the student makes what the file makes, in other clothes.
    let mut student = runtime::open(&dir.join("run/student.onnx"), &EngineOptions::default()).unwrap();
    let mut given = runtime::open(&dir.join("channels_last.onnx"), &EngineOptions::default()).unwrap();
    let noise = HostTensor::new(&[2, 8, 8, 1], &disback::noise::batch_noise(1, 0, 2, 64)).unwrap();
    let mut hot = vec![0f32; 20];
    (hot[4], hot[19]) = (1.0, 1.0);
    let hot = HostTensor::new(&[2, 10], &hot).unwrap();
    let (_, theirs) = given.run(&[("noise", &noise), ("class", &hot)]).unwrap().remove(0);
    let (name, ours) = student.run(&[("noise", &noise), ("labels", &hot)]).unwrap().remove(0);
    assert_eq!((name.as_str(), ours.shape()), ("sample", &[2, 1, 8, 8][..]));
    // One channel: both layouts have the same order in memory.
    for (a, b) in ours.to_f32().iter().zip(theirs.to_f32()) {
        assert!((a - b.clamp(-1.0, 1.0)).abs() < 1e-5);
    }
}

#[test]
fn a_network_with_a_card_is_a_student_at_its_noise_levels() {
    let dir = networks("with-a-card");
    // The teacher's own file is one: the same student, bit for bit, as the teacher's copy.
    std::fs::copy(TEACHER, dir.join("network.onnx")).unwrap();
    let few = format!("{FEW} --set student.sigmas=[2.0,0.4] --sigma-init 20 --per-step");
    ok(&dir, &format!("distill {TEACHER} -o own --student network.onnx {few}"));
    ok(&dir, &format!("distill {TEACHER} -o copy {few}"));
    let same = |file: &str| {
        std::fs::read(dir.join("own").join(file)).unwrap() == std::fs::read(dir.join("copy").join(file)).unwrap()
    };
    for file in ["student.safetensors", "student.onnx", "student-step-2.onnx", "trajectory/node-002.safetensors"] {
        assert!(same(file), "{file}");
    }
    // Its card must speak of the teacher's samples.
    std::fs::write(dir.join("network.card.toml"), "range = [0.0, 1.0]\n").unwrap();
    refused(&dir, &format!("distill {TEACHER} -o x --student network.onnx {FEW}"), "the student's card has range");
}

#[test]
fn weights_at_random_come_from_the_seed_and_the_path_belongs_to_them() {
    let dir = networks("random");
    let random = "--set student.init=random";
    ok(&dir, &format!("distill {TEACHER} -o a {random} {FEW}"));
    ok(&dir, &format!("distill {TEACHER} -o b {random} {FEW}"));
    ok(&dir, &format!("distill {TEACHER} -o c {random} --seed 1 {FEW}"));
    let weights = |run: &str| std::fs::read(dir.join(run).join("student.safetensors")).unwrap();
    assert!(weights("a") == weights("b") && weights("a") != weights("c"));
    // The first node is the teacher whatever the student, and the last fits this student's samples.
    ok(&dir, &format!("distill {TEACHER} -o copy {FEW}"));
    let index = |run: &str| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(dir.join(run).join("trajectory/trajectory.json")).unwrap()).unwrap()
    };
    assert_eq!(index("a")["nodes"][0]["hash"], index("copy")["nodes"][0]["hash"]);
    assert_ne!(index("a")["nodes"][2]["hash"], index("copy")["nodes"][2]["hash"]);
    assert!(index("a")["student_hash"].is_string() && index("copy")["student_hash"].is_null());
    let stage_two = FEW.replace("--nodes 2 --degrade-steps 4", "");
    refused(
        &dir,
        &format!("backtrack {TEACHER} -o d --trajectory a/trajectory {stage_two}"),
        "recorded on the samples of another initial student",
    );
    ok(&dir, &format!("backtrack {TEACHER} -o d {random} --trajectory a/trajectory {stage_two}"));
    assert!(weights("d") == weights("a"));
    // A generator's too.
    ok(&dir, &format!("distill {TEACHER} -o e {random} --student mlp.onnx {FEW}"));
    ok(&dir, &format!("distill {TEACHER} -o f --student mlp.onnx {FEW}"));
    assert!(weights("e") != weights("f"));
    refused(&dir, &format!("distill {TEACHER} -o x {random} --set lora.rank=2 {FEW}"), "student.init is `random`");
}

#[test]
fn a_student_that_does_not_fit_is_refused_before_the_first_step() {
    let dir = networks("refused");
    for (student, more, says) in [
        ("square.onnx", "", "is not [B, 1, 8, 8]"),
        ("unconditional.onnx", "", "no input takes the teacher's condition `labels`"),
        ("timed.onnx", "", "`t` is neither the noise nor a condition"),
        ("mlp.onnx", "--same-graph", "this student has a graph of its own"),
        ("mlp.onnx", "--sigma-init 3", "student.sigma_init is set"),
        ("mlp.onnx", "--set student.sigmas=[1.0]", "student.sigmas is set"),
        ("mlp.onnx", "--set student.noise=q", "`q`, which it does not have"),
        ("mlp.onnx", "--set student.conditions=[\"labels\"]", "expected condition=input"),
        ("mlp.onnx", "--set student.conditions=[\"label=y\"]", "`label`, which is no condition of the teacher"),
    ] {
        refused(&dir, &format!("distill {TEACHER} -o x --student {student} {more} {FEW}"), says);
        assert!(!dir.join("x").exists());
    }
    refused(&dir, &format!("distill {TEACHER} -o x --set student.noise=z {FEW}"), "student.file, which is empty");
    // Exchanged between the stages.
    std::fs::copy(dir.join("mlp.onnx"), dir.join("now.onnx")).unwrap();
    let stage_one = FEW.replace("--updates 6 --lr 1e-2", "");
    ok(&dir, &format!("degrade {TEACHER} -o y --student now.onnx {stage_one}"));
    std::fs::copy(dir.join("channels_last.onnx"), dir.join("now.onnx")).unwrap();
    refused(
        &dir,
        &format!("backtrack {TEACHER} -o y --updates 6"),
        "student.file: what it names is not what the run began with",
    );
}
