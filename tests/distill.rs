//! `distill`, `degrade` and `backtrack` on the digits teacher as a user meets them: files, exit codes, Ctrl-C, --resume.
#![cfg(feature = "train")]

#[path = "distill/library.rs"]
mod library;

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const TEACHER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/digits/teacher.onnx");

/// The teacher as the network that guides it.
const SAME_GUIDE: &str = concat!("guidance_by=", env!("CARGO_MANIFEST_DIR"), "/examples/digits/teacher.onnx");

/// Few steps, few images: seconds on one core.
const SMALL: &[&str] = &[
    "--device",
    "cpu",
    "--threads",
    "1",
    "--batch",
    "4",
    "--nodes",
    "2",
    "--degrade-steps",
    "4",
    "--updates",
    "5",
    "--lr",
    "1e-4",
    "--set",
    "backtrack.switch_every=2",
    "--set",
    "log.every=1",
    "--set",
    "log.samples=2",
    "--set",
    "log.sample_steps=2",
    "--set",
    "degrade.lr=1e-3",
];

fn command(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_disback"));
    command.args(args).current_dir(dir);
    command
}

fn disback(dir: &Path, args: &[&str]) -> Output {
    command(dir, args).output().unwrap()
}

fn ok(dir: &Path, args: &[&str]) -> String {
    let out = disback(dir, args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

fn fails(dir: &Path, args: &[&str]) -> (i32, String) {
    let out = disback(dir, args);
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!text.contains("panicked"), "{args:?}: {text}");
    (out.status.code().unwrap(), text)
}

fn with<'a>(front: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    front.iter().chain(more).copied().collect()
}

fn weights(run: &Path) -> Vec<u8> {
    std::fs::read(run.join("student.safetensors")).unwrap()
}

fn rows(run: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    text.lines().filter_map(|l| serde_json::from_str(l).ok()).collect()
}

#[test]
fn a_run_leaves_everything_and_its_parts_make_the_same_student() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let text = ok(dir, &with(&["distill", TEACHER, "-o", "whole", "--json", "--same-graph"], SMALL));
    let result: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&result["ok"], &result["outcome"]), (&true.into(), &"finished".into()));
    let whole = dir.join("whole");
    for file in [
        "config.toml",
        "metrics.jsonl",
        "student.onnx",
        "student-same-graph.onnx",
        "summary.json",
        "report.html",
        "trajectory/trajectory.json",
        "trajectory/node-002.safetensors",
        "samples/teacher.png",
        "samples/degraded-node-002.png",
        "samples/student-node-001.png",
        "samples/student-final.png",
        "samples/inside-node-001-update-000000.png",
        "samples/inside-node-000-update-000004.png",
        "levels.jsonl",
    ] {
        assert!(whole.join(file).is_file(), "{file} is missing");
    }
    // What tells whether the loss is right, for each node, in the events and in the report too.
    let has = |bytes: &[u8], text: &str| bytes.windows(text.len()).any(|w| w == text.as_bytes());
    let mut events = Vec::new();
    for entry in std::fs::read_dir(&whole).unwrap().flatten() {
        if entry.file_name().to_string_lossy().contains("tfevents") {
            events.extend(std::fs::read(entry.path()).unwrap());
        }
    }
    for tag in [
        "backtrack/mismatch",
        "inside-node-001-update-000000",
        "inside-node-000-update-000002",
        "levels/target/sigma-",
        "levels/fake/sigma-",
    ] {
        assert!(has(&events, tag), "no event {tag}");
    }
    let levels = std::fs::read_to_string(whole.join("levels.jsonl")).unwrap();
    let nodes: Vec<u64> = levels
        .lines()
        .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["node"].as_u64().unwrap())
        .collect();
    assert_eq!(nodes, [1, 0, 0], "a look at each node as it is entered, and one at the end");
    let report = std::fs::read_to_string(whole.join("report.html")).unwrap();
    for text in
        ["Inside the loss, node by node", "towards node 1, update 0", "Target&#39;s loss above", "Mismatch per node"]
    {
        assert!(report.contains(text) || report.contains(&text.replace("&#39;", "'")), "no {text} in the report");
    }
    let seen: Vec<(String, u64, u64)> = rows(&whole)
        .iter()
        .map(|r| (r["stage"].as_str().unwrap().into(), r["iteration"].as_u64().unwrap(), r["node"].as_u64().unwrap()))
        .collect();
    let degrade = [0, 1, 1, 2].iter().enumerate().map(|(k, &n)| ("degrade".to_owned(), k as u64 + 1, n));
    let backtrack = [1, 1, 0, 0, 0].iter().enumerate().map(|(k, &n)| ("backtrack".to_owned(), k as u64 + 1, n));
    assert_eq!(seen, degrade.chain(backtrack).collect::<Vec<_>>());

    // Stage by stage, and from a trajectory recorded elsewhere: the same student.
    let common = with(&SMALL[..6], &SMALL[14..]);
    let stage_two = with(&common, &SMALL[10..14]);
    let stage_one = with(&common, &SMALL[6..10]);
    ok(dir, &with(&["degrade", TEACHER, "-o", "parts"], &stage_one));
    ok(dir, &with(&["backtrack", TEACHER, "-o", "parts"], &stage_two[stage_two.len() - 4..]));
    assert!(weights(&dir.join("parts")) == weights(&whole), "parts");
    // The folder of a run stands for the trajectory in it. No stage 1 has made the teacher's sheet there.
    ok(dir, &with(&["backtrack", TEACHER, "-o", "else", "--trajectory", "whole"], &stage_two));
    assert!(weights(&dir.join("else")) == weights(&whole), "else");
    let sheet = |run: &Path| std::fs::read(run.join("samples/teacher.png")).unwrap();
    assert!(sheet(&dir.join("else")) == sheet(&whole), "the teacher's samples from the same noise");
    let other = ["backtrack", TEACHER, "-o", "new", "--trajectory", "whole/trajectory", "--sigma-init", "3"];
    let (code, text) = fails(dir, &with(&other, &stage_two));
    assert!(code == 2 && text.contains("recorded with student.sigma_init = 0.0, now it is 3"), "{text}");
    assert!(!dir.join("new").exists());
    let (code, text) = fails(dir, &["backtrack", TEACHER, "-o", "parts"]);
    assert!(code == 2 && text.contains("--resume"), "{text}");

    // The student against the run's own weights, in libtorch; other weights of the same run are noticed.
    let verify = ["verify", "whole/student.onnx", "--teacher", TEACHER, "--no-python", "--images", "3", "--json"];
    let found: serde_json::Value = serde_json::from_str(&ok(dir, &verify)).unwrap();
    assert_eq!((&found["ok"], &found["reference"]), (&true.into(), &"the run's weights in libtorch".into()), "{found}");
    assert!(found["engines"].as_array().unwrap().iter().all(|e| e["max_abs"].as_f64().unwrap() < 1e-4), "{found}");
    ok(dir, &["export", TEACHER, "--run", "whole", "--ema", "live", "--precision", "fp16", "-o", "live.onnx"]);
    let (code, text) = fails(dir, &["export", TEACHER, "--run", "whole", "--ema", "7", "-o", "x.onnx"]);
    assert!(code == 2 && text.contains("no average of this half-life") && text.contains("ema.more: none"), "{text}");
    let shapes = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/shapes/teacher.onnx");
    let (code, text) = fails(dir, &["export", shapes, "--weights", "whole/student.safetensors", "-o", "x.onnx"]);
    assert!(code == 1 && text.contains("do not fit the network: missing") && text.len() < 500, "{text}");
    std::fs::copy(whole.join("trajectory/node-002.safetensors"), whole.join("student.safetensors")).unwrap();
    let other = disback(dir, &verify);
    assert_eq!(other.status.code(), Some(1), "{}", String::from_utf8_lossy(&other.stdout));

    // The exported graph is a teacher of its own: not the one that the run began with.
    ok(
        dir,
        &["export", TEACHER, "--weights", "whole/trajectory/node-002.safetensors", "--same-graph", "-o", "other.onnx"],
    );
    let (code, text) = fails(dir, &with(&["distill", "other.onnx", "-o", "whole", "--resume"], &[]));
    assert!(code == 2 && text.contains("another teacher"), "{text}");
    let (code, text) = fails(dir, &["backtrack", "other.onnx", "-o", "new", "--trajectory", "whole/trajectory"]);
    assert!(code == 2 && text.contains("another teacher") && !dir.join("new").exists(), "{text}");
}

#[test]
fn a_plan_by_measurement_goes_with_its_trajectory() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let few = ["--device", "cpu", "--threads", "1", "--batch", "4", "--set", "log.samples=0"];
    let steps = ["--degrade-steps", "4"];
    ok(dir, &with(&with(&["degrade", TEACHER, "-o", "auto", "--nodes", "auto", "--updates", "99"], &few), &steps));
    ok(dir, &with(&with(&["degrade", TEACHER, "-o", "two", "--nodes", "2"], &few), &steps));
    let planned = "note: the trajectory was planned by measurement";
    let unplanned = "note: degrade.nodes is `auto`, but the trajectory was recorded without a plan";
    for (k, (from, more, said, nodes)) in [
        ("auto", &[][..], planned, "\"auto\""),
        ("auto", &["--set", "degrade.nodes=auto"], "", "\"auto\""),
        // As many as the trajectory has: in so few steps this one has none.
        ("auto", &["--set", "degrade.nodes=2"], "", "0"),
        ("two", &[], "", "2"),
        ("two", &["--set", "degrade.nodes=auto"], unplanned, "2"),
    ]
    .into_iter()
    .enumerate()
    {
        let out = k.to_string();
        let line = with(&with(&["backtrack", TEACHER, "-o", &out, "--trajectory", from, "--updates", "2"], &few), more);
        let done = disback(dir, &line);
        let errors = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{from} {more:?}: {errors}");
        let notes: Vec<&str> = [planned, unplanned].into_iter().filter(|note| errors.contains(note)).collect();
        assert_eq!(notes.join(""), said, "{from} {more:?}: {errors}");
        let config = std::fs::read_to_string(dir.join(&out).join("config.toml")).unwrap();
        let section = config.split("[degrade]").nth(1).unwrap();
        assert!(section.contains(&format!("nodes = {nodes}\n")), "{from} {more:?}: {section}");
        // The warning of a run that is too short knows the trajectory.
        assert_eq!(errors.contains("end before the teacher itself"), from == "two", "{from} {more:?}: {errors}");
    }
}

#[test]
fn every_objective_distils_the_digits_teacher() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let objectives = ["dmd", "diff-instruct", "sds", "sid", "sim", "dmd2", "f-distill", "uni-instruct"];
    let data = format!("gan.data={}", concat!(env!("CARGO_MANIFEST_DIR"), "/examples/digits/digits.npz"));
    // A layer and the end of a block in the digits U-Net.
    let gan = ["--set", data.as_str(), "--set", "gan.taps=[\"conv2d_5\", \"add_408\"]"];
    let mut students = Vec::new();
    for objective in objectives {
        for nodes in ["0", "2"] {
            let run = format!("{objective}-{nodes}");
            let small = with(&SMALL[..6], &SMALL[8..]);
            let adversarial = matches!(objective, "dmd2" | "f-distill" | "uni-instruct");
            let small = if adversarial { with(&small, &gan) } else { small };
            ok(dir, &with(&["distill", TEACHER, "-o", &run, "--objective", objective, "--nodes", nodes], &small));
            let rows = rows(&dir.join(&run));
            let first = rows.iter().find(|r| r["stage"] == "backtrack").unwrap();
            let loss = first["loss_generator"].as_f64().unwrap();
            // Without a trajectory the fake score starts as the teacher: where scores are compared they are equal.
            assert_eq!(loss == 0.0, nodes == "0" && objective != "sds", "{run}: {loss}");
            assert_eq!(first["loss_fake"].is_null(), objective == "sds", "{run}");
            if adversarial {
                // An undecided discriminator: 2 ln 2 for itself, ln 2 for the generator, times their weights.
                let [d, g] = ["loss_discriminator", "loss_gan"].map(|k| first[k].as_f64().unwrap());
                assert!((d - 0.02 * 2f64.ln()).abs() < 1e-6 && (g - 0.003 * 2f64.ln()).abs() < 1e-6, "{run}: {d} {g}");
            }
            assert!(first["grad_norm_generator"].as_f64().unwrap().is_finite(), "{run}");
            students.push(weights(&dir.join(&run)));
        }
    }
    students.sort();
    students.dedup();
    assert_eq!(students.len(), 2 * objectives.len(), "every objective and trajectory makes a student of its own");
}

#[test]
fn low_rank_runs_record_factors_and_export_merged_weights() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let lora = with(
        SMALL,
        &[
            "--set",
            "lora.rank=3",
            "--set",
            "lora.alpha=6",
            "--set",
            "backtrack.switch_every=1",
            "--set",
            "log.snapshot_every=5",
        ],
    );
    ok(dir, &with(&["distill", TEACHER, "-o", "run"], &lora));
    let size = |name: &str| std::fs::metadata(dir.join("run").join(name)).unwrap().len();
    assert!(4 * size("trajectory/node-002.safetensors") < size("student.safetensors"), "nodes are factors");
    // The export checks the student's file against the network that was trained; the file is a whole one.
    let student = std::fs::read(dir.join("run/student.onnx")).unwrap();
    // (Less what is folded away: the time embedding.)
    assert!(student.len() as u64 * 10 > size("student.safetensors") * 9);
    // Checkpoints and nodes hold factors: exported merged, the live weights are the snapshot's of the same update.
    let images = |file: &str| {
        ok(dir, &["sample", file, "-n", "3", "-o", "images.npy", "--engine", "tract"]);
        std::fs::read(dir.join("images.npy")).unwrap()
    };
    ok(dir, &["export", TEACHER, "--run", "run", "--ema", "live", "-o", "live.onnx"]);
    assert!(images("live.onnx") == images("run/snapshots/update-00000005-student.onnx"));
    let node = ["export", TEACHER, "--weights", "run/trajectory/node-002.safetensors", "-o", "node.onnx"];
    ok(dir, &with(&node, &["--run", "run"]));
    assert!(images("node.onnx") != images("live.onnx"));
    let (code, text) = fails(dir, &node);
    assert!(
        code == 2 && text.contains("factors of a low-rank adaptation") && text.contains("give --run too"),
        "{text}"
    );
    // Nodes kept in bf16 are differences from the teacher: what leaves is the sum.
    let narrow = with(&lora[..lora.len() - 2], &["--set", "memory.nodes=bf16"]);
    ok(dir, &with(&["distill", TEACHER, "-o", "narrow"], &narrow));
    let node = ["export", TEACHER, "--weights", "narrow/trajectory/node-002.safetensors", "--run", "narrow"];
    ok(dir, &with(&node, &["-o", "narrow.onnx"]));
    let floats = |file: &str| -> Vec<f32> {
        images(file)
            .rchunks(3 * 64 * 4)
            .next()
            .unwrap()
            .chunks(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect()
    };
    let apart = floats("narrow.onnx").iter().zip(floats("node.onnx")).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(apart > 0.0 && apart < 1e-2, "{apart}");
    // The trajectory of a low-rank run fits no run of all weights.
    let (code, text) = fails(dir, &["backtrack", TEACHER, "-o", "all", "--trajectory", "run/trajectory"]);
    assert!(code == 2 && text.contains("another teacher"), "{text}");
    ok(dir, &with(&["distill", TEACHER, "-o", "again"], &lora));
    assert!(weights(&dir.join("again")) == weights(&dir.join("run")));
}

#[test]
fn a_run_that_was_interrupted_and_resumed_ends_with_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    ok(dir, &with(&["distill", TEACHER, "-o", "whole"], SMALL));
    // Ctrl-C in stage 1 (after row 2) and in stage 2 (after row 6).
    for (name, at) in [("one", 2), ("two", 6)] {
        let run = dir.join(name);
        let mut child =
            command(dir, &with(&["distill", TEACHER, "-o", name], SMALL)).stderr(Stdio::null()).spawn().unwrap();
        let started = Instant::now();
        while rows(&run).len() < at {
            assert!(started.elapsed() < Duration::from_secs(300) && child.try_wait().unwrap().is_none());
            std::thread::sleep(Duration::from_millis(2));
        }
        assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
        let code = child.wait().unwrap().code();
        // A slow machine may let it end before the signal arrives; then there is nothing to resume.
        if code == Some(130) {
            assert!(!run.join("student.onnx").exists());
            assert!(run.join("checkpoints/latest.json").is_file());
            let (code, text) = fails(dir, &with(&["distill", TEACHER, "-o", name], SMALL));
            assert!(code == 2 && text.contains("--resume"), "{text}");
            ok(dir, &["distill", TEACHER, "-o", name, "--resume"]);
        } else {
            assert_eq!(code, Some(0));
        }
        assert!(weights(&run) == weights(&dir.join("whole")), "{name}");
        let student = |p: &Path| std::fs::read(p.join("student.onnx")).unwrap();
        assert!(student(&run) == student(&dir.join("whole")), "{name}");
        assert_eq!(rows(&run).len(), 9);
    }
}

#[test]
fn bad_input_gets_one_clear_error_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::create_dir(dir.join("full")).unwrap();
    std::fs::write(dir.join("full/x"), "x").unwrap();
    std::fs::write(dir.join("c.toml"), "[degrade]\nstep = 3\n").unwrap();
    std::fs::write(dir.join("bad.toml"), "batch = \n").unwrap();
    let text = disback::tensor::HostTensor::vec(&[1i64, 2]);
    disback::io::npy::write_npz(&dir.join("labels.npz"), &[("text", &text)]).unwrap();
    let images = |value: f32| disback::HostTensor::new(&[2, 1, 8, 8], &[value; 128]).unwrap();
    for (name, value) in [("nan.npz", f32::NAN), ("far.npz", 255.0), ("good.npz", 0.5), ("unit.npz", 2.0)] {
        // Of values from 0 to 1 where the teacher has -1 to 1.
        let unit: Vec<f32> = (0..128).map(|k| k as f32 / 127.0).collect();
        let held = if value == 2.0 { disback::HostTensor::new(&[2, 1, 8, 8], &unit).unwrap() } else { images(value) };
        let arrays = [("images", &held), ("labels", &text)];
        disback::io::npy::write_npz(&dir.join(name), &arrays).unwrap();
    }
    let shapes = disback::HostTensor::new(&[3, 16, 16, 3], &[7u8; 3 * 16 * 16 * 3]).unwrap();
    disback::io::npy::write_npz(&dir.join("shapes.npz"), &[("images", &shapes)]).unwrap();
    let grey = |name: &str, size: usize| {
        std::fs::create_dir_all(dir.join("mixed/0")).unwrap();
        let png = disback::io::images::encode_png(&vec![7; size * size], [1, size, size]).unwrap();
        std::fs::write(dir.join("mixed/0").join(name), png).unwrap();
    };
    for (name, size) in [("a.png", 8), ("b.png", 8), ("c.png", 9)] {
        grey(name, size);
    }
    let gan = ["--objective", "dmd2", "--set", "gan.taps=[\"conv2d_5\"]"];
    for (args, code, says) in [
        (vec!["--set", "degrade.stepz=3"], 2, "degrade.steps"),
        (vec!["--config", "c.toml"], 2, "degrade.steps"),
        (vec!["--config", "bad.toml"], 2, "bad.toml"),
        (vec!["--config", "none.toml"], 2, "none.toml: no such configuration file"),
        (vec!["--batch", "0"], 2, "batch is 0"),
        (vec!["--objective", "gan"], 2, "objective"),
        (vec!["--device", "gpu"], 2, "cuda:<index>"),
        (vec!["--device", "cuda:77"], 2, "CUDA"),
        (vec!["--card", "prediktion=v"], 2, "prediction"),
        (vec!["--resume"], 2, "no run"),
        (vec!["--set", "student.sigma_init=-1"], 2, "sigma_init"),
        (vec!["--set", "guidance_interval=[1, 2]"], 2, "guidance is 1"),
        (
            vec!["--card", "conditions.labels.classes=20"],
            2,
            "goes up to 19 (classes = 20, null = 10), but the graph knows 0 to 10",
        ),
        (vec!["--card", "conditions.labels.null=11"], 2, "goes up to 11 (classes = 10, null = 11)"),
        (vec!["--student", "none.onnx"], 1, "student.file: ... none.onnx: No such file"),
        (vec!["--set", "conditions.file=labels.npz"], 2, "`text` is no condition of the teacher, which has `labels`"),
        (vec!["--objective", "dmd2"], 2, "gan.data is empty"),
        (vec!["--set", "lora.rank=2", "--set", "lora.include=[\"attn.*\"]"], 2, "`attn.*` matches no weight"),
        (vec!["--objective", "dmd2", "--set", "gan.data=labels.npz"], 2, "labels.npz"),
        (vec!["--objective", "sds", "--set", "gan.data=labels.npz"], 2, "no fake score"),
        (vec!["--set", "backtrack.ratio=-1"], 2, "expected a whole number of 0 or more"),
        (vec!["--set", "backtrac.lr=1"], 2, "backtrack.lr_"),
        (vec!["--set", "gan.taps=[\"conv2d_5\"]"], 2, "gan.data is empty"),
        (vec!["--set", "lora.include=[\"*\"]", "--set", "lora.alpha=3"], 2, "lora.rank is 0"),
        (vec!["--set", "lora.rank=100000"], 2, "no adapted weight has a rank above 128"),
        (vec!["--set", "guidance=2", "--set", "guidance_interval=[500, 900]"], 2, "none of the noise levels"),
        (vec!["--set", "student.sigma_init=500"], 2, "the teacher's noise levels are 0.0020 to 80.0000, 500 is none"),
        (vec!["--set", "student.sigmas=[2, 1e-7]"], 2, "student.sigmas: the teacher's noise levels"),
        (vec!["--set", "student.sigmas=[1, 2]"], 2, "does not lie below"),
        (with(&gan, &["--set", "gan.data=nan.npz"]), 2, "holds NaN or infinity in row 0"),
        (with(&gan, &["--set", "gan.data=mixed"]), 1, "c.png: 9x9, grey where the first image of the set is 8x8"),
        (with(&gan, &["--set", "gan.data=far.npz"]), 2, "holds 255 in row 0, the teacher's samples lie in -1 to 1"),
        (
            with(&gan, &["--set", "gan.data=unit.npz"]),
            2,
            "none in the lower half of -1 to 1, where the teacher's samples lie",
        ),
        (with(&gan, &["--set", "gan.data=unit.npz", "--set", "gan.range=[1, 0]"]), 2, "expected [low, high]"),
        (with(&gan, &["--set", "gan.data=far.npz", "--set", "gan.range=[0, 1]"]), 2, "gan.range says 0 to 1"),
        (
            with(&gan[..2], &["--set", "gan.data=good.npz", "--set", "gan.taps=[\"conv2d_55\"]"]),
            2,
            "did you mean ... what can be tapped",
        ),
        (
            with(&gan[..2], &["--set", "gan.data=good.npz", "--set", "gan.taps=[\"linear_5\"]"]),
            2,
            "`linear_5` depends on the noise level or on conditions alone, ... what can be tapped",
        ),
        (with(&gan[..2], &["--set", "gan.data=good.npz", "--set", "gan.taps=[\"abc%\"]"]), 2, "`abc%` is no share"),
        (with(&gan[..2], &["--set", "gan.data=good.npz", "--set", "gan.taps=[\"\"]"]), 2, "an empty entry"),
        (with(&gan, &["--set", "gan.data=good.npz", "--set", "gan.shared_pass=true"]), 2, "does not differentiate"),
        (vec!["--set", "gan.head=channel-mean"], 2, "gan.head is given, but gan.data is empty"),
        (vec!["--set", "student.steps=65"], 2, "expected 64 or less"),
        (vec!["--guidance", "2", "--set", SAME_GUIDE], 2, "guidance_by: ... is the teacher itself"),
        (vec!["--nodes", "-1"], 2, "`-1` is not a number of nodes"),
        (vec!["--nodes", "auto", "--degrade-steps", "1"], 2, "`auto`, which may keep 3 nodes, but degrade.steps is 1"),
        (
            with(&gan[..2], &["--set", "gan.data=good.npz"]),
            2,
            "gan.taps is empty: ... what can be tapped, from input to output: ... `group_norm_1` [B, 16, 8, 8], ... (16 of ",
        ),
        (vec!["--set", "evaluate.reference=shapes.npz"], 1, "the reference holds images of 16x16, colour"),
        (vec!["--set", "conditions.file=none.npz"], 1, "none.npz"),
        (vec!["--set", "conditions.weights=[1, 2]"], 2, "`labels` has 10 classes"),
        (vec!["--set", "log.decoder=none.onnx"], 1, "log.decoder: ... none.onnx"),
        (vec!["--set", "log.decoder=c.toml"], 1, "c.toml"),
    ] {
        let (got, text) = fails(dir, &with(&["distill", TEACHER, "-o", "out"], &args));
        assert_eq!(got, code, "{args:?}: {text}");
        // (Paths are shown whole: what stands before and after them.)
        assert!(says.split("... ").all(|part| text.contains(part)), "{args:?}: {text}");
        assert!(!dir.join("out").exists(), "{args:?} left something");
    }
    let (code, text) = fails(dir, &["distill", TEACHER, "-o", "full"]);
    assert!(code == 2 && text.contains("not empty"), "{text}");
    assert_eq!(std::fs::read_dir(dir.join("full")).unwrap().count(), 1);
    let (code, text) = fails(dir, &["backtrack", TEACHER, "-o", "out"]);
    assert!(code == 2 && text.contains("degrade"), "{text}");
    let (code, _) = fails(dir, &["distill", "c.toml", "-o", "out2"]);
    assert!(code == 1 && !dir.join("out2").exists());
}

#[test]
fn a_run_is_measured_as_it_goes_and_ends_when_nothing_improves() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let digits = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/digits");
    let (reference, features) =
        (format!("evaluate.reference={digits}/digits.npz"), format!("evaluate.features={digits}/classifier.onnx"));
    // A generator that stands still: the first look is the best, two more bring nothing.
    let sets = [
        "backtrack.updates=9",
        "backtrack.lr_generator=1e-12",
        "ema.half_life=0",
        "evaluate.every=4",
        "evaluate.images=8",
        "evaluate.patience=2",
        "log.snapshot_every=2",
        &reference,
        &features,
    ];
    let sets: Vec<&str> = sets.iter().flat_map(|s| ["--set", s]).collect();
    let args = with(&["distill", TEACHER, "-o", "run"], &with(SMALL, &sets));
    ok(dir, &args);
    let run = dir.join("run");
    let text = std::fs::read_to_string(run.join("evaluations.jsonl")).unwrap();
    let points: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let of = |key: &str| points.iter().map(|p| p[key].clone()).collect::<Vec<_>>();
    assert_eq!(of("update"), [1, 2, 3], "{text}");
    assert_eq!(of("best"), [true, false, false]);
    // Stage 1: 4 steps of 4 images, two passes each. Stage 2: student, fake score, and for the generator target and fake score.
    assert_eq!(of("passes"), [32 + 16, 32 + 32, 32 + 48]);
    assert!(points[0]["frechet"].as_f64() > Some(0.0) && points[0]["samples"] == 8);
    assert_eq!(rows(&run).last().unwrap()["iteration"], 3);
    assert!(run.join("best.onnx").is_file() && run.join("best.json").is_file());
    let snapshots = ["update-00000002-average.onnx", "update-00000002-student.onnx"];
    snapshots.iter().for_each(|s| assert!(run.join("snapshots").join(s).is_file(), "{s}"));
    let levels = std::fs::read_to_string(run.join("levels.jsonl")).unwrap();
    let level: serde_json::Value = serde_json::from_str(levels.lines().last().unwrap()).unwrap();
    assert_eq!((level["iteration"].as_u64(), level["target"].as_array().unwrap().len()), (Some(3), 12));
    // The same end after a resume, and every student in one table.
    let before = weights(&run);
    ok(dir, &with(&args, &["--resume"]));
    assert_eq!((weights(&run), rows(&run).len()), (before, 7));
    let (reference, features) = (&reference["evaluate.reference=".len()..], &features["evaluate.features=".len()..]);
    let out = ok(dir, &["evaluate", reference, "--run", "run", "--features", features, "-n", "32", "--json"]);
    let out: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(out["rows"].as_array().unwrap().len(), 4);
    assert!(std::fs::read_to_string(run.join("report.html")).unwrap().contains("Distance while training"));
    let (code, error) = fails(dir, &with(&["distill", TEACHER, "-o", "none", "--tui"], SMALL));
    assert!(code == 2 && error.contains("there is no terminal"), "{error}");
    let wrong = with(&["distill", TEACHER, "-o", "other", "--set", "evaluate.reference=none.npz"], SMALL);
    let (code, error) = fails(dir, &wrong);
    assert!(code == 1 && error.contains("none.npz"), "{error}");
    assert!(!dir.join("none").exists() && !dir.join("other").exists());
}

/// Counts rows and keeps notes.
#[derive(Default)]
struct Follower {
    rows: std::sync::atomic::AtomicUsize,
    notes: std::sync::Mutex<Vec<String>>,
}

impl disback::run::Monitor for Follower {
    fn row(&self, _row: &disback::distill::metrics::MetricsRow, _device_bytes: Option<u64>) {
        self.rows.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }
    fn note(&self, text: &str) {
        self.notes.lock().unwrap().push(text.to_owned());
    }
}

/// A weaker network of the digits teacher: its last layer is smaller. With a card in the file, as the teacher has.
fn weaker(path: &Path, by: f32) {
    let model = disback::graph::Model::load(Path::new(TEACHER)).unwrap();
    let mut proto = (*model.proto).clone();
    let graph = proto.graph.as_mut().unwrap();
    let last = graph.initializer.iter_mut().find(|t| t.name() == "unet.conv_out.weight").unwrap();
    let raw = last.raw_data.as_mut().unwrap().to_vec();
    let scaled = raw.chunks_exact(4).flat_map(|b| (by * f32::from_le_bytes([b[0], b[1], b[2], b[3]])).to_le_bytes());
    last.raw_data = Some(scaled.collect::<Vec<u8>>().into());
    disback::graph::save::write(&proto, path).unwrap();
}

#[test]
fn a_weaker_network_guides_a_run_its_plan_and_the_teachers_sampler() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    weaker(&dir.join("weak.onnx"), 0.9);
    let guided = ["--guidance", "2", "--set", "guidance_by=weak.onnx", "--set", "guidance_rescale=0.5"];
    let small = with(SMALL, &guided);
    ok(dir, &with(&["distill", TEACHER, "-o", "guided", "-q"], &small));
    ok(dir, &with(&["distill", TEACHER, "-o", "plain", "-q"], SMALL));
    assert_ne!(weights(&dir.join("guided")), weights(&dir.join("plain")));
    let summary = std::fs::read_to_string(dir.join("guided/summary.json")).unwrap();
    assert!(summary.contains("weak.onnx"), "{summary}");
    // The same run goes on from anywhere, and not with another network or another reading of it.
    let resume = with(&["distill", TEACHER, "-o", "guided", "--resume", "-q"], &[]);
    ok(dir, &resume);
    let refused = |what: &str| {
        let (code, text) = fails(dir, &resume);
        assert!(
            code == 2 && text.contains("guidance_by: what it names is not what the run began with"),
            "{what}: {text}"
        );
    };
    std::fs::write(dir.join("weak.card.toml"), "sigma_data = 0.4\n").unwrap();
    refused("the card");
    std::fs::remove_file(dir.join("weak.card.toml")).unwrap();
    weaker(&dir.join("weak.onnx"), 0.8);
    refused("the weights");
    // Plans tell it.
    let text = ok(dir, &with(&["distill", TEACHER, "-o", "dry", "--dry-run"], &small));
    assert!(text.contains("guidance 2 by ") && text.contains("rescaled by 0.5"), "{text}");
    assert!(text.contains("the weaker network that guides it"), "{text}");
    let sets = ["--set", "guidance=2", "--set", "guidance_by=weak.onnx"];
    let json = |more: &[&str]| -> serde_json::Value {
        serde_json::from_str(&ok(dir, &with(&["estimate", TEACHER, "--batch", "4", "--json"], more))).unwrap()
    };
    let (with_it, without) = (json(&sets), json(&[]));
    let stage = |v: &serde_json::Value, key: &str| v["backtrack"][key].as_f64().unwrap();
    assert_eq!(stage(&with_it, "guide_passes"), 1.0);
    let bytes = 4.0 * with_it["parameters"].as_f64().unwrap();
    assert_eq!(stage(&with_it, "weights") - stage(&without, "weights"), bytes);
    let flops = stage(&with_it, "flops") / stage(&without, "flops");
    assert!(
        (flops - 9.0 / 8.0).abs() < 0.02,
        "one pass more beside target, fake score (1 + 3) and student (3): {flops}"
    );
    // The sampler of `evaluate`: twice the evaluations, other samples.
    let data = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/digits/digits.npz");
    let measure = |more: &[&str]| -> serde_json::Value {
        let line = with(&["evaluate", "--json", "-n", "16", "--steps", "2", TEACHER, data], more);
        serde_json::from_str(&ok(dir, &line)).unwrap()
    };
    let text = [&["--guidance", "2"][..], &["--guidance-by", "weak.onnx", "--guidance-rescale", "0.7"]].concat();
    assert_ne!(measure(&text), measure(&[]));
    for (more, says) in [
        (&["--guidance-by", "weak.onnx"][..], "--guidance-by without --guidance"),
        (&["--shift", "3"], "only a flow's times are shifted"),
        (&["--shift", "-1"], "--shift -1: expected a number above 0"),
        (&["--guidance", "2", "--guidance-by", "none.onnx"], "--guidance-by: none.onnx"),
        (&["--guidance", "2", "--guidance-by", TEACHER], "is the teacher itself"),
        (&["--guidance", "2", "--guidance-rescale", "7"], "--guidance-rescale: "),
    ] {
        let (code, text) = fails(dir, &with(&["evaluate", "-n", "16", "--steps", "2", TEACHER, data], more));
        assert!(code != 0 && text.contains(says), "{text}");
    }
    for more in [&["--shift", "3"][..], &["--guidance", "2"], &["--guidance-by", "weak.onnx"]] {
        let (code, text) = fails(dir, &with(&["evaluate", data, data], more));
        let says = format!("{} says how teachers sample, but none of the sets is a teacher", more[0]);
        assert!(code == 2 && text.contains(&says), "{text}");
    }
    let (code, text) = fails(dir, &with(&["distill", TEACHER, "-o", "x", "--set", "guidance_by=weak.onnx"], SMALL));
    assert!(code == 2 && text.contains("guidance_by is given, but guidance is 1"), "{text}");
}

#[test]
fn taps_by_share_and_a_grid_of_steps_are_told_and_run() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let text = ok(dir, &["inspect", TEACHER, "--taps", "50%,75%,99%"]);
    for tap in ["50% = `add_408`", "75% = `add_571`", "99% = `add_666`"] {
        assert!(text.contains(tap), "{text}");
    }
    for (taps, says) in [
        ("conv2d_55", "did you mean `conv2d_"),
        ("linear_5", "says nothing about a sample"),
        ("50", "the graph has no tensor `50`"),
        ("50%,,75%", "gan.taps holds an empty entry"),
        ("abc%", "`abc%` is no share of the depth"),
    ] {
        let (code, text) = fails(dir, &["inspect", TEACHER, "--taps", taps]);
        assert!(code == 2 && text.contains(says), "{taps}: {text}");
    }
    let data = format!("gan.data={}", concat!(env!("CARGO_MANIFEST_DIR"), "/examples/digits/digits.npz"));
    let more = ["--objective", "dmd2", "--set", &data, "--set", "student.steps=2"];
    let taps = |taps: &'static str| with(&with(SMALL, &more), &["--set", taps]);
    let shares = taps("gan.taps=[\"50%\", \"conv2d_5\", \"99%\"]");
    let text = ok(dir, &with(&["distill", TEACHER, "-o", "dry", "--dry-run"], &shares));
    assert!(text.contains("the discriminator reads 50% = `add_408`"), "{text}");
    assert!(text.contains("steps after the first are at noise levels 2.5152"), "{text}");
    ok(dir, &with(&["distill", TEACHER, "-o", "shares", "-q"], &shares));
    ok(
        dir,
        &with(&["distill", TEACHER, "-o", "names", "-q"], &taps("gan.taps=[\"add_408\", \"conv2d_5\", \"add_666\"]")),
    );
    assert_eq!(weights(&dir.join("shares")), weights(&dir.join("names")));
    ok(dir, &["distill", TEACHER, "-o", "shares", "--resume", "-q"]);
}
