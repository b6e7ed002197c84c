//! Samples that are no images: every kind comes through to a student that agrees in all engines, by every objective.

use std::path::Path;

use crate::support::{self, ok, refused};
use crate::{FEW, dims, verified};
use disback::io::npy;

/// A kind of sample: its folder, what the run sets, and the shape of one sample.
const KINDS: [(&str, &str, &[usize]); 8] = [
    ("table", "objective=sid", &[9]),
    ("wave", "objective=sim student.init=random degrade.steps=1", &[64]),
    ("policy", "objective=dmd2 gan.taps=[\"TAP\"] conditions.file=policy/rows.npz", &[16, 7]),
    ("mel", "objective=f-distill gan.taps=[\"TAP\"] memory.activations_mib=1", &[8, 20]),
    ("points", "objective=diff-instruct student.sigmas=[2.0] student.stochastic=true", &[24, 3]),
    ("volume", "objective=dmd lora.rank=2", &[1, 4, 8, 8]),
    ("video", "objective=dmd2 gan.taps=[\"TAP\"] precision=bf16", &[4, 3, 8, 8]),
    ("tokens", "objective=sds", &[6, 8]),
];

/// The output of the network's first convolution.
fn tap(file: &Path) -> String {
    let model = disback::graph::Model::load(file).unwrap();
    let graph = model.proto.graph.as_ref().unwrap();
    graph.node.iter().find(|n| n.op_type() == "Conv").unwrap().output[0].clone()
}

#[test]
fn samples_of_every_rank_become_students() {
    let dir = support::folder("ranks");
    support::run_python("tests/python/ranks.py", &[dir.to_str().unwrap()]);
    for (name, sets, shape) in KINDS {
        let teacher = format!("{name}/teacher.onnx");
        let tap = if sets.contains("TAP") { tap(&dir.join(&teacher)) } else { String::new() };
        let mut sets = sets.replace("TAP", &tap);
        if !tap.is_empty() {
            sets.push_str(&format!(" gan.data={name}/real.npz"));
        }
        let sets: Vec<String> = sets.split(' ').map(|s| format!("--set {s}")).collect();
        ok(&dir, &format!("distill {teacher} -o {name}/run {FEW} {}", sets.join(" ")));
        let student = format!("{name}/run/student.onnx");
        let rows = if name == "policy" { "--condition observation=policy/observation.npy" } else { "" };
        let sized: Vec<String> =
            std::iter::once("batch".to_owned()).chain(shape.iter().map(ToString::to_string)).collect();
        // A stochastic student of two steps takes the noise of both along the channels' axis.
        let mut noise = sized.clone();
        if name == "points" {
            noise[2] = "6".into();
        }
        assert_eq!(dims(&dir.join(&student), "noise"), noise, "{name}");
        let found = verified(&dir, &student);
        // [`verified`] has seen that each that ran agrees.
        let ran = |e: &serde_json::Value| e["max_abs"].as_f64().filter(|v| *v <= found["tolerance"].as_f64().unwrap());
        let names: Vec<&str> = found["engines"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|e| ran(e).is_some())
            .map(|e| e["name"].as_str().unwrap())
            .collect();
        assert_eq!(names, ["onnxruntime", "tract", "libtorch"], "{name}: {found}");
        ok(&dir, &format!("sample {student} -n 5 --batch 2 -o {name}/five.npy {rows}"));
        let five = npy::read(&dir.join(name).join("five.npy")).unwrap();
        assert_eq!((five.shape()[0], &five.shape()[1..]), (5, shape), "{name}");
        assert!(five.is_finite() && five.to_f32().iter().any(|v| *v != 0.0), "{name}");
        assert!(dir.join(name).join("run/report.html").is_file(), "{name}");
        // A look inside the loss, of whatever kind.
        let inside = std::fs::read_dir(dir.join(name).join("run/samples")).unwrap().flatten();
        assert!(inside.map(|e| e.file_name()).any(|n| n.to_string_lossy().starts_with("inside-node-")), "{name}");
    }
    other_forms(&dir);
    cards(&dir);
    a_network_of_its_own(&dir);
}

/// The student of a policy in every other form and command.
fn other_forms(dir: &Path) {
    let (teacher, student) = ("policy/teacher.onnx", "policy/run/student.onnx");
    ok(dir, &format!("parity {teacher}"));
    ok(dir, &format!("estimate {teacher} --batch 4 --set conditions.file=policy/rows.npz"));
    ok(dir, &format!("bench {student} --batch 2 --seconds 0.05 --teacher {teacher} --steps 2"));
    // The teacher's card beside it says that its samples are no images; the reference alone might be grey ones.
    let measured = ok(dir, "evaluate mel/teacher.onnx mel/real.npz -n 4 --steps 2");
    assert!(measured.contains("Frechet distance") && measured.contains("4 against 40"), "{measured}");
    ok(dir, &format!("export {teacher} --run policy/run --same-graph -o policy/same.onnx"));
    for form in ["--precision fp16", "--batch 2"] {
        ok(dir, &format!("export {student} {form} -o policy/form.onnx"));
        verified(dir, "policy/form.onnx");
    }
    let no_image = "samples are [16, 7]";
    assert_eq!(refused(dir, &format!("export {student} --image -o policy/x.onnx"), no_image), 2);
    assert_eq!(refused(dir, &format!("export {student} --decoder {teacher} -o policy/x.onnx"), no_image), 2);
    let info = disback::runtime::student::Student::open(&dir.join(student), &Default::default()).unwrap();
    assert_eq!((info.info().channel_axis(), info.info().image_shape()), (Some(1), None));
    let more = format!("distill {teacher} -o policy/measured {FEW} --set conditions.file=policy/rows.npz");
    ok(dir, &format!("{more} --set evaluate.reference=policy/real.npz"));
    let figures = std::fs::read_to_string(dir.join("policy/measured/evaluations.jsonl")).unwrap();
    let last: serde_json::Value = serde_json::from_str(figures.lines().last().unwrap()).unwrap();
    assert!(last["frechet"].as_f64().is_some_and(|d| d > 0.0), "{figures}");
}

/// What `inspect` proposes where the card is withheld, and what a wrong card is told.
fn cards(dir: &Path) {
    let wrong = "distill policy/teacher.onnx -o policy/x --card shape=[7,1,16]";
    assert_eq!(refused(dir, wrong, "by the graph it is shape = [16, 7]"), 2);
    for (name, _, shape) in KINDS {
        let file = dir.join(name).join("teacher.card.toml");
        let kept = std::fs::read(&file).unwrap();
        std::fs::remove_file(&file).unwrap();
        ok(dir, &format!("inspect {name}/teacher.onnx --no-probe --write-card"));
        let text = std::fs::read_to_string(&file).unwrap();
        let says = |key: &str| text.lines().find(|l| l.starts_with(key)).unwrap_or("").to_owned();
        // A length that the graph leaves free is for a person to say.
        if name != "mel" {
            let dims: Vec<String> = shape.iter().map(ToString::to_string).collect();
            assert!(says("shape = ").starts_with(&format!("shape = [{}]", dims.join(", "))), "{name}: {text}");
        }
        let layout = match name {
            "table" | "wave" => "",
            "video" => "layout = \"frames-first\"",
            "mel" | "volume" => "layout = \"channels-first\"",
            _ => "layout = \"channels-last\"",
        };
        assert!(says("sample = ").contains("\"x\"") && says("layout").starts_with(layout), "{name}: {text}");
        std::fs::write(&file, kept).unwrap();
    }
}

/// A student with an architecture of its own for samples of rank 1 and 2.
fn a_network_of_its_own(dir: &Path) {
    for (name, shape) in [("table", &[9][..]), ("points", &[24, 3])] {
        let student = format!("--student {name}/generator.onnx");
        ok(dir, &format!("distill {name}/teacher.onnx -o {name}/own {FEW} {student} --set objective=dmd"));
        verified(dir, &format!("{name}/own/student.onnx"));
        ok(dir, &format!("sample {name}/own/student.onnx -n 3 -o {name}/three.npz"));
        let arrays = npy::read_npz(&dir.join(name).join("three.npz")).unwrap();
        assert_eq!((arrays[0].1.shape()[0], &arrays[0].1.shape()[1..]), (3, shape));
    }
}
