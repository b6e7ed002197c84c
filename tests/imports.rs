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
    a_fixed_batch(&dir);
    rows_that_mix(&dir);
    weights_among_the_inputs(&dir);
    double_precision(&dir);
    masks_and_positions(&dir);
    more_channels_in_than_out(&dir);
    what_a_refused_start_left(&dir);
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
    for (name, rows, takes) in [("baked-1", 2, "it takes: 1)"), ("baked-2", 3, "it takes: 2)")] {
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

/// A file of three rows is trained with three unless another batch is asked for, with guidance, and with conditions in int64.
fn a_fixed_batch(dir: &Path) {
    let few = FEW.replace("--batch 4 ", "");
    let args =
        format!("distill fixed/teacher.onnx -o fixed/own {few} --set conditions.file=fixed/rows.npz --set guidance=2");
    let (code, said, errors) = support::run(dir, &args);
    assert_eq!(code, Some(0), "{said}{errors}");
    assert!(errors.contains("the teacher's file fixes the batch at 3: batch = 3"), "{errors}");
    let config = |run: &str| std::fs::read_to_string(dir.join(run).join("config.toml")).unwrap();
    assert!(config("fixed/own").contains("\nbatch = 3\n"), "{}", config("fixed/own"));
    verified(dir, "fixed/own/student.onnx");
    ok(dir, &format!("{} --batch 4", args.replace("fixed/own", "fixed/four")));
    assert!(config("fixed/four").contains("\nbatch = 4\n"));
    let student = Model::load(&dir.join("fixed/own/student.onnx")).unwrap();
    let inputs = &student.proto.graph.as_ref().unwrap().input;
    let tokens = inputs.iter().find(|i| i.name() == "tokens").unwrap();
    let Some(disback::onnx::type_proto::Value::TensorType(t)) = &tokens.r#type.as_ref().unwrap().value else {
        panic!()
    };
    assert_eq!(t.elem_type(), 7, "int64 stays");
}

/// A row that depends on its neighbours is refused with the reason, unless that is asked for.
fn rows_that_mix(dir: &Path) {
    for (name, why) in
        [("bn", "BatchNormalization node"), ("means", "statistics over the batch"), ("halves", "forward_with_cfg")]
    {
        let args = format!("distill {name}/teacher.onnx -o {name}/run {FEW}");
        let (code, said, errors) = support::run(dir, &args);
        assert_eq!(code, Some(1), "{args}: {said}{errors}");
        assert!(errors.contains("rows of a batch are not independent") && errors.contains(why), "{errors}");
        assert!(errors.contains("--allow-batch-mixing") && !dir.join(name).join("run").exists(), "{errors}");
    }
    let said = ok(dir, "inspect bn/teacher.onnx");
    let warned = "warning: BatchNormalization in training mode takes the statistics of the batch";
    assert!(said.contains(warned) && said.contains("BatchNormalization node `/norm/"), "{said}");
    assert!(!ok(dir, "inspect means/teacher.onnx").contains(warned));
    ok(dir, &format!("distill means/teacher.onnx -o means/run {FEW} --allow-batch-mixing"));
    let config = std::fs::read_to_string(dir.join("means/run/config.toml")).unwrap();
    assert!(config.contains("allow_batch_mixing = true"));
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

/// A network in f64 is trained in f32, and so written that ONNX Runtime runs it.
fn double_precision(dir: &Path) {
    ok(dir, "parity f64/teacher.onnx");
    let (code, said, errors) = support::run(dir, &format!("distill f64/teacher.onnx -o f64/run {FEW} --same-graph"));
    assert_eq!(code, Some(0), "{said}{errors}");
    assert!(errors.contains("the network computes in f64; it is trained in f32"), "{errors}");
    verified(dir, "f64/run/student.onnx");
    let code = "import numpy as np, onnxruntime as ort\n\
                s = ort.InferenceSession('f64/run/student-same-graph.onnx', providers=['CPUExecutionProvider'])\n\
                y, = s.run(None, {'x': np.zeros((3, 1, 8, 8), 'f4'), 't': np.arange(3)})\n\
                assert y.dtype == 'f4' and y.shape == (3, 1, 8, 8)";
    let done = std::process::Command::new(support::python()).args(["-c", code]).current_dir(dir).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    // Where the type is the reason, it is named.
    let says = "`t i64[?]` is of type i64, which cannot hold the fractions";
    support::refused(dir, &format!("distill f64/teacher.onnx -o f64/x {FEW} --card time_unit=unit"), says);
}

/// A mask of booleans is a condition; an input without a batch dimension has its value from a file.
fn masks_and_positions(dir: &Path) {
    ok(dir, &format!("distill mask/teacher.onnx -o mask/run {FEW} --set conditions.file=mask/rows.npz"));
    verified(dir, "mask/run/student.onnx");
    ok(dir, "parity ids/teacher.onnx");
    ok(dir, &format!("distill ids/teacher.onnx -o ids/run {FEW}"));
    let student = Model::load(&dir.join("ids/run/student.onnx")).unwrap();
    let inputs: Vec<&str> = student.proto.graph.as_ref().unwrap().input.iter().map(|i| i.name()).collect();
    assert_eq!(inputs, ["noise"]);
    verified(dir, "ids/run/student.onnx");
    let text = "[conditions.ids]\n    kind = \"constant\"\n    file = \"ids.npy\"\n    shape = [64, 3]";
    // What the file shows of it.
    std::fs::create_dir_all(dir.join("bare")).unwrap();
    std::fs::copy(dir.join("ids/teacher.onnx"), dir.join("bare/teacher.onnx")).unwrap();
    let shown: serde_json::Value =
        serde_json::from_str(&ok(dir, "inspect bare/teacher.onnx --no-probe --json")).unwrap();
    let (found, open) = (&shown["proposed_card"]["conditions"]["ids"], &shown["proposal"]["undecided"]);
    assert!(found["kind"] == "constant" && found["shape"] == serde_json::json!([64, 3]), "{found}");
    assert!(open.as_array().unwrap().iter().any(|k| k == "conditions.ids.file"), "{open}");
    let nothing =
        "--card prediction=epsilon --card time_unit=step --card schedule.kind=vp --card schedule.betas=linear";
    let names = "--card sample=x --card time=t --card output=out --card shape=[1,8,8]";
    support::refused(dir, &format!("distill bare/teacher.onnx -o bare/x {FEW} {nothing} {names}"), text);
    // One number for all elements is said; as rows of a batch it is refused, with the way out.
    let number = format!("distill ids/teacher.onnx -o ids/x {FEW} --dry-run --card conditions.ids.kind=embedding");
    support::refused(dir, &format!("{number} --card conditions.ids.shape=[3]"), text);
    support::refused(dir, &format!("{number} --card conditions.ids.shape=[64,3]"), text);
    std::fs::create_dir_all(dir.join("filled")).unwrap();
    std::fs::copy(dir.join("ids/teacher.onnx"), dir.join("filled/teacher.onnx")).unwrap();
    let card = std::fs::read_to_string(dir.join("inputs/teacher.card.toml")).unwrap();
    std::fs::write(dir.join("filled/teacher.card.toml"), format!("{card}[constants]\nids = 1.0\n")).unwrap();
    let (code, _, errors) = support::run(dir, &format!("distill filled/teacher.onnx -o filled/run {FEW} --dry-run"));
    assert!(code == Some(0) && errors.contains("warning: the card's `constants.ids` = 1 fills an array"), "{errors}");
}

/// What the caller joins to the sample is a condition of its own, whatever the sample's rank; `inspect` finds it where the channels
/// are declared. And of rows of integers and booleans it knows that they are no class.
fn more_channels_in_than_out(dir: &Path) {
    ok(
        dir,
        &format!("distill joined/teacher.onnx -o joined/run {FEW} --set conditions.file=joined/rows.npz --same-graph"),
    );
    assert_eq!(dims(&dir.join("joined/run/student.onnx"), "noise"), ["batch", "6", "4"]);
    assert_eq!(dims(&dir.join("joined/run/student.onnx"), "seen"), ["batch", "6", "5"]);
    verified(dir, "joined/run/student.onnx");
    let proposed = |name: &str| -> serde_json::Value {
        std::fs::copy(dir.join(name).join("teacher.onnx"), dir.join(format!("bare/{name}.onnx"))).unwrap();
        let said = ok(dir, &format!("inspect bare/{name}.onnx --no-probe --json"));
        serde_json::from_str::<serde_json::Value>(&said).unwrap()["proposed_card"].take()
    };
    let card = proposed("joined");
    let expected = serde_json::json!({"kind": "embedding", "shape": [6, 5]});
    assert!(card["shape"] == serde_json::json!([6, 4]) && card["layout"] == "channels-last", "{card}");
    assert!(
        card["concat"] == serde_json::json!(["x", "condition"]) && card["conditions"]["condition"] == expected,
        "{card}"
    );
    assert_eq!(proposed("mask")["conditions"]["mask"], serde_json::json!({"kind": "embedding", "shape": [1, 8, 8]}));
    assert_eq!(proposed("fixed")["conditions"]["tokens"], serde_json::json!({"kind": "embedding", "shape": [5]}));
}

/// What was left of a start that came to nothing does not block the next one.
fn what_a_refused_start_left(dir: &Path) {
    let left = dir.join("left");
    for folder in ["checkpoints", "samples"] {
        std::fs::create_dir_all(left.join(folder)).unwrap();
    }
    std::fs::copy(dir.join("ids/run/config.toml"), left.join("config.toml")).unwrap();
    std::fs::copy(dir.join("ids/run/card.toml"), left.join("card.toml")).unwrap();
    ok(dir, &format!("distill inputs/teacher.onnx -o left {FEW}"));
    let again = support::refused(dir, &format!("distill inputs/teacher.onnx -o left {FEW}"), "is not empty");
    assert_eq!(again, 2);
}
