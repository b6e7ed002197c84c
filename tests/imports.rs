//! Files as people's exporters write them: they come through to a student that agrees in all engines, or are refused in one
//! sentence before the first step, and nothing is left of the run.
#![cfg(all(feature = "train", feature = "ort"))]

#[path = "imports/ranks.rs"]
mod ranks;
mod support;

use std::path::Path;

use disback::graph::Model;
use disback::graph::sizes::declared_inputs;
use support::ok;

const FEW: &str = "--device cpu --threads 1 --batch 4 --nodes 1 --degrade-steps 2 --updates 4 \
                   --set log.samples=2 --set log.sample_steps=2 --set log.every=1";

/// The dimensions of an input as the file declares them.
fn dims(file: &Path, input: &str) -> Vec<String> {
    let model = Model::load(file).unwrap();
    let found = declared_inputs(model.proto.graph.as_ref().unwrap());
    let (_, dims) = found.into_iter().find(|(name, _)| name == input).unwrap();
    dims.into_iter().map(|d| d.map_or_else(|symbol| symbol, |n| n.to_string())).collect()
}

fn verified(dir: &Path, student: &str) -> serde_json::Value {
    let found: serde_json::Value =
        serde_json::from_str(&ok(dir, &format!("verify {student} --no-python --json"))).unwrap();
    assert_eq!(found["ok"], true, "{found}");
    found
}

#[test]
fn networks_as_exporters_write_them() {
    let dir = support::folder("exported");
    support::run_python("tests/python/exported_networks.py", &[dir.to_str().unwrap()]);
    free_dimensions(&dir);
    numbers_in_the_batch(&dir);
    weights_among_the_inputs(&dir);
    double_precision(&dir);
}

/// The length of a text comes from the file of conditions, the card, or the command line; what else has its name follows.
fn free_dimensions(dir: &Path) {
    let teacher = "free/teacher.onnx";
    ok(dir, &format!("distill {teacher} -o free/distill {FEW} --set conditions.file=free/rows.npz"));
    let first = FEW.replace("--updates 4", "");
    ok(dir, &format!("degrade {teacher} -o free/parts {first} --set conditions.file=free/rows.npz"));
    ok(dir, &format!("backtrack {teacher} -o free/parts --updates 2"));
    ok(dir, &format!("distill {teacher} -o free/dry --dry-run {FEW} --set conditions.file=free/rows.npz"));
    ok(dir, &format!("estimate {teacher} --batch 4 --set conditions.file=free/rows.npz"));
    let student = dir.join("free/distill/student.onnx");
    assert_eq!(dims(&student, "text"), ["batch", "7", "6"]);
    assert_eq!(dims(&student, "noise"), ["batch", "1", "8", "8"]);
    verified(dir, "free/distill/student.onnx");
    let card = std::fs::read_to_string(dir.join("free/distill/card.toml")).unwrap();
    assert!(card.contains("shape = [7, 6]") || card.contains("7,\n    6"), "{card}");
    // Another file, another length.
    ok(dir, &format!("distill {teacher} -o free/longer {FEW} --set conditions.file=free/longer.npz"));
    assert_eq!(dims(&dir.join("free/longer/student.onnx"), "text"), ["batch", "14", "6"]);
    // The teacher's own graph keeps what it leaves free.
    ok(dir, &format!("export {teacher} --run free/distill --same-graph -o free/same.onnx"));
    assert_eq!(dims(&dir.join("free/same.onnx"), "text"), ["batch", "sequence", "6"]);

    // Without the file: named on the command line, or in the card.
    support::refused(dir, &format!("parity {teacher}"), "--dim");
    ok(dir, &format!("parity {teacher} --dim sequence=7"));
    ok(dir, &format!("parity {teacher} --card conditions.text.shape=[7,6]"));
    ok(dir, &format!("inspect {teacher} --dim sequence=7 --no-probe"));
    ok(dir, &format!("estimate {teacher} --batch 4 --dim sequence=7 --set conditions.file=free/rows.npz"));
    let says = "no input of the graph has a free dimension `nothing`";
    let code =
        support::refused(dir, &format!("distill {teacher} -o free/x {FEW} --dim sequence=7 --dim nothing=3"), says);
    assert_eq!((code, dir.join("free/x").exists()), (2, false));
    // The two must not contradict each other.
    let both = format!("distill {teacher} -o free/x {FEW} --dim sequence=5 --set conditions.file=free/rows.npz");
    assert_eq!(support::refused(dir, &both, "`text f32[?, 5, 6]` does not fit"), 2);
}

/// A batch that is declared free, with its number in the graph, is refused before the first step.
fn numbers_in_the_batch(dir: &Path) {
    for (name, rows, takes) in
        [("baked-1", 2, "it takes: 1)"), ("baked-2", 3, "it takes: 2)"), ("halves", 3, "it takes: 2, 4, 6, 8)")]
    {
        for batch in [1, 2] {
            let run = format!("{name}/run");
            let args = format!("distill {name}/teacher.onnx -o {run} {FEW} --batch {batch}");
            let args = args.replace("--batch 4 ", "");
            let (code, said, errors) = support::run(dir, &args);
            assert_eq!(code, Some(1), "{args}: {said}{errors}");
            let sentence = format!("declares a free batch, but does not run with {rows} rows");
            assert!(errors.contains(&sentence) && errors.contains(takes) && errors.contains("node"), "{errors}");
            assert!(errors.contains("export it again"), "{errors}");
            assert!(!dir.join(&run).exists(), "{run} is left");
        }
    }
}

/// As initializers, which nobody gives.
fn weights_among_the_inputs(dir: &Path) {
    let listed = std::fs::read(dir.join("inputs/teacher.onnx")).unwrap();
    let listed = disback::runtime::student::decode(&listed).unwrap();
    assert!(listed.graph.unwrap().input.iter().any(|v| v.name() == "first.weight"), "the exporter listed none");
    ok(dir, "parity inputs/teacher.onnx");
    ok(dir, &format!("distill inputs/teacher.onnx -o inputs/run {FEW} --same-graph"));
    verified(dir, "inputs/run/student.onnx");
    for file in ["student.onnx", "student-same-graph.onnx"] {
        let model = Model::load(&dir.join("inputs/run").join(file)).unwrap();
        assert!(model.proto.graph.as_ref().unwrap().input.len() <= 2, "{file}");
        support::ok(dir, &format!("inspect inputs/run/{file} --no-probe"));
    }
}

/// ONNX Runtime has no f64 convolutions on the CPU: said in these words, before the first step.
fn double_precision(dir: &Path) {
    let (code, said, errors) = support::run(dir, &format!("distill f64/teacher.onnx -o f64/run {FEW}"));
    assert_eq!(code, Some(1), "{said}{errors}");
    assert!(errors.contains("training was not begun") && errors.contains("f64"), "{errors}");
    assert!(errors.contains("export the teacher in f32"), "{errors}");
    assert!(!dir.join("f64/run").exists());
}
