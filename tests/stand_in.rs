//! The CUDA half on a stand-in device (tests/stand_in_cuda): `disback` as it is built runs there, every mistake of placement is an
//! error, and what it asked of the device is counted. It shows nothing of numbers, speed or races on a real device.
#![cfg(all(feature = "train", feature = "ort", target_os = "linux", target_arch = "x86_64"))]

#[path = "stand_in/providers.rs"]
mod providers;
#[path = "support/recorded_ort.rs"]
mod recorded_ort;
#[path = "support/stand_in.rs"]
mod stand_in;
mod support;

use std::path::{Path, PathBuf};

use stand_in::Report;
use support::root;

const BINARY: &str = env!("CARGO_BIN_EXE_disback");
/// Few steps of both stages, silent but for the last row of each.
const FEW: &str = "--threads 1 --batch 3 --set degrade.nodes=1 --set degrade.lr=1e-4 --set backtrack.lr_generator=1e-4 --set backtrack.lr_fake=1e-4 --set log.samples=0 --set log.every=1000 --quiet";

/// Runs `disback` in `dir` on stand-in devices. Output, and what was asked of them.
fn device(dir: &Path, name: &str, args: &str, vars: &[(&str, &str)]) -> (String, Report) {
    let report = dir.join(format!("{name}.json"));
    let mut command = stand_in::under(Path::new(BINARY), &report);
    let out = command.args(args.split_whitespace()).envs(vars.iter().copied()).current_dir(dir).output().unwrap();
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{args}: {}\n{errors}", out.status);
    (String::from_utf8_lossy(&out.stdout).into_owned(), Report::read(&report))
}

fn example(name: &str) -> String {
    root().join("examples").join(name).display().to_string()
}

/// The last row of each stage: losses, by stage and name.
fn losses(run: &Path) -> Vec<(String, f64)> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let rows: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let names =
        ["loss_fake", "loss_generator", "loss_discriminator", "loss_gan", "grad_norm_fake", "grad_norm_generator"];
    let of = |r: &serde_json::Value| -> Vec<(String, f64)> {
        let stage = r["stage"].as_str().unwrap().to_owned();
        names.iter().filter_map(|n| Some((format!("{stage} {n}"), r[*n].as_f64()?))).collect()
    };
    rows.iter().flat_map(of).collect()
}

fn near(what: &str, got: &[(String, f64)], want: &[(String, f64)], tolerance: f64) {
    assert!(!want.is_empty() && got.len() == want.len(), "{what}: {got:?} {want:?}");
    // What is next to nothing is a difference of rounded numbers, which other processors round otherwise.
    const NOTHING: f64 = 1e-5;
    for ((name, a), (_, b)) in got.iter().zip(want) {
        assert!(
            (a - b).abs() <= tolerance * b.abs().max(NOTHING),
            "{what}, {name}: {a:e} on the device, {b:e} on the CPU"
        );
    }
}

/// A run on the CPU and one on the device with as many steps end with the same losses; one with more steps has the host wait no
/// more often, sends nothing large from pageable memory, and leaves no memory behind. The two reports of the device.
fn both(dir: &Path, name: &str, args: &str, tolerance: f64) -> [Report; 2] {
    let few = if args.contains("--batch") { FEW.replace("--batch 3", "") } else { FEW.to_owned() };
    let steps = |n: u32| format!("{few} --degrade-steps {n} --updates {n}");
    support::ok(dir, &format!("distill {args} --device cpu -o {name}-cpu {}", steps(5)));
    let [(_, few), (_, more)] = [5, 8].map(|n| {
        let run = format!("{name}-{n}");
        device(dir, &run, &format!("distill {args} --device cuda -o {run} {}", steps(n)), &[])
    });
    near(name, &losses(&dir.join(format!("{name}-5"))), &losses(&dir.join(format!("{name}-cpu"))), tolerance);
    steady(name, &few, &more);
    [few, more]
}

/// What may not grow with the number of steps.
fn steady(name: &str, few: &Report, more: &Report) {
    assert!(more.count("launches") > few.count("launches") + 100, "{name}: the steps ran elsewhere");
    assert_eq!(few.growth(more, "waits"), [], "{name}: the host waits in every step");
    assert_eq!(few.count("pageable"), more.count("pageable"), "{name}: large copies from pageable memory");
    assert_eq!((few.count("live_bytes"), more.count("live_bytes")), (0, 0), "{name}: device memory that nobody frees");
}

fn bytes(run: PathBuf) -> Vec<u8> {
    std::fs::read(run.join("student.safetensors")).unwrap()
}

#[test]
fn doctor_sees_the_devices() {
    let dir = support::folder("stand-in-doctor");
    let (text, _) = device(&dir, "doctor", "doctor", &[("STAND_IN_CUDA_DEVICES", "2")]);
    let library = stand_in::library().join("libtorch_cuda.so");
    // Without the link to libtorch's CUDA half none of these tests tests anything.
    assert!(text.contains(&format!("linked and loaded: {}", library.display())), "{text}");
    assert!(text.contains("2 (Stand-in device, Stand-in device), driver 600.00, without cuDNN"), "{text}");
    let (text, _) = device(&dir, "none", "doctor --json", &[("STAND_IN_CUDA_DEVICES", "0")]);
    assert!(text.contains("none: no NVIDIA driver is loaded"), "{text}");
}

/// Values and gradients of every network of the repository.
#[test]
fn networks_agree_with_the_cpu() {
    let dir = support::folder("stand-in-parity");
    let mut networks: Vec<PathBuf> = Vec::new();
    for folder in ["examples", "converters/teachers", "tests/fixtures"] {
        for entry in std::fs::read_dir(root().join(folder)).unwrap().flatten().filter(|e| e.path().is_dir()) {
            let files = std::fs::read_dir(entry.path()).unwrap().flatten().map(|e| e.path());
            networks.extend(files.filter(|p| p.extension().is_some_and(|e| e == "onnx")));
        }
    }
    assert!(networks.len() >= 14, "{networks:?}");
    for (k, path) in networks.iter().enumerate() {
        // (extend's network has operators of its own.)
        if path.starts_with(root().join("examples/extend")) {
            continue;
        }
        let (text, report) = device(&dir, &k.to_string(), &format!("parity {} --device cuda", path.display()), &[]);
        assert!(text.contains("cuda:0 against the CPU: outputs ") && report.count("launches") > 3, "{text}");
    }
}

#[test]
fn objectives_run_there_as_on_the_cpu() {
    let dir = support::folder("stand-in-objectives");
    let digits = example("digits/teacher.onnx");
    let gan = format!("--set gan.data={} --set gan.taps=[\"conv2d_5\"]", example("digits/digits.npz"));
    for (name, more) in [
        ("dmd", "--set guidance=2.5 --accumulate 2"),
        // (Of fewer images nothing need be recomputed.)
        ("diff-instruct", "--set memory.activations_mib=1 --batch 12"),
        ("sid", "--set lora.rank=2"),
        ("sim", "--set student.sigmas=[4.0] --set student.sigma_init=20"),
        ("sds", "--set student.init=random --set memory.format=channels-last"),
        ("dmd2", &gan),
        ("f-distill", &gan),
        ("uni-instruct", &gan),
    ] {
        both(&dir, name, &format!("{digits} --objective {name} {more}"), 5e-3);
    }
}

#[test]
fn products_are_in_bf16_where_it_was_asked_for() {
    let dir = support::folder("stand-in-bf16");
    let digits = example("digits/teacher.onnx");
    let kinds = |[few, more]: [Report; 2]| -> Vec<String> {
        // (Attention is decomposed here, which computes its products in f32; on a device it is one kernel.)
        let grown = few.growth(&more, "kinds").into_iter().filter(|(k, _)| !k.starts_with("aten::bmm"));
        let mut all: Vec<String> = grown.map(|(k, _)| k.rsplit(' ').next().unwrap().to_owned()).collect();
        all.sort();
        all.dedup();
        all
    };
    let narrow = both(&dir, "whole", &format!("{digits} --set precision=bf16"), 0.4);
    assert_eq!(kinds(narrow), ["BFloat16"], "a product of a step in another precision");
    let target = both(&dir, "target", &format!("{digits} --set memory.target=bf16 --set memory.nodes=bf16"), 0.4);
    assert_eq!(kinds(target), ["BFloat16", "Float"]);
    let plain = both(&dir, "plain", &example("table/teacher.onnx"), 5e-3);
    assert_eq!(kinds(plain), ["Float"]);
}

/// Data of a discriminator, and nodes of a trajectory, come from pinned memory without a wait.
#[test]
fn large_copies_are_pinned() {
    let dir = support::folder("stand-in-pinned");
    let args = format!(
        "{} --objective dmd2 --set gan.data={} --set gan.taps=[\"conv2d_5\"] {}",
        example("digits/teacher.onnx"),
        example("digits/digits.npz"),
        FEW.replace("--batch 3", "--batch 300").replace("nodes=1", "nodes=0")
    );
    let run = |n: u32| {
        let name = format!("run-{n}");
        device(&dir, &name, &format!("distill {args} --device cuda -o {name} --degrade-steps 0 --updates {n}"), &[]).1
    };
    let (few, more) = (run(3), run(4));
    assert_eq!(few.count("pageable"), more.count("pageable"));
    assert!(more.count("pinned") > few.count("pinned"), "images of 75 kB each step");
    assert_eq!(few.growth(&more, "waits"), []);
}

#[test]
fn recorded_steps_leave_the_bytes_of_plain_ones() {
    let dir = support::folder("stand-in-graphs");
    for (name, teacher) in [("table", example("table/teacher.onnx")), ("digits", example("digits/teacher.onnx"))] {
        let run = |what: &str, n: u32, more: &str| {
            let args =
                format!("distill {teacher} {FEW} --device cuda -o {what} --degrade-steps {n} --updates {n} {more}");
            device(&dir, what, &args, &[]).1
        };
        let (plain, recorded) = (format!("{name}-plain"), format!("{name}-recorded"));
        run(&plain, 9, "");
        let few = run(&recorded, 9, "--set cuda_graphs=true");
        assert!(bytes(dir.join(plain)) == bytes(dir.join(recorded)), "{name}");
        let more = run(&format!("{name}-more"), 14, "--set cuda_graphs=true");
        assert!(more.count("replays") >= few.count("replays") + 10, "{name}: recordings are not replayed");
        assert_eq!(few.growth(&more, "waits"), [], "{name}");
    }
}

/// The second of two devices; a student of its own; a run that is measured while it goes on; and what a stage leaves behind.
#[test]
fn other_runs_stay_on_their_device() {
    let dir = support::folder("stand-in-others");
    let two = [("STAND_IN_CUDA_DEVICES", "2")];
    let table = example("table/teacher.onnx");
    let args = |what: &str| format!("{FEW} -o {what} --degrade-steps 4 --updates 4");
    device(&dir, "first", &format!("distill {table} --device cuda:0 {}", args("first")), &two);
    device(&dir, "second", &format!("distill {table} --device cuda:1 {}", args("second")), &two);
    assert!(bytes(dir.join("first")) == bytes(dir.join("second")));

    support::run_python("tests/python/student_networks.py", &[dir.to_str().unwrap()]);
    let digits = example("digits/teacher.onnx");
    let measured = format!(
        "--set evaluate.reference={} --set evaluate.features={} --set evaluate.every=6 --set evaluate.images=8",
        example("digits/digits.npz"),
        example("digits/classifier.onnx")
    );
    for (what, device_name) in [("own-cpu", "cpu"), ("own", "cuda")] {
        let args = format!("distill {digits} --student mlp.onnx {measured} --device {device_name} {}", args(what));
        device(&dir, what, &args, &[]);
    }
    near("a student of its own", &losses(&dir.join("own")), &losses(&dir.join("own-cpu")), 5e-3);
    let curve = |run: &str| -> Vec<f64> {
        let text = std::fs::read_to_string(dir.join(run).join("evaluations.jsonl")).unwrap();
        text.lines()
            .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["frechet"].as_f64().unwrap())
            .collect()
    };
    let (a, b) = (curve("own"), curve("own-cpu"));
    assert!(
        a.len() == b.len() && a.len() > 1 && a.iter().zip(&b).all(|(a, b)| (a / b - 1.0).abs() < 1e-2),
        "{a:?} {b:?}"
    );
}

/// Each stage by itself needs as much memory as the two in one process: nothing of the first is left in the second.
#[test]
fn a_stage_gives_its_memory_back() {
    let dir = support::folder("stand-in-stages");
    let digits = example("digits/teacher.onnx");
    let peak = |name: &str, args: &str| device(&dir, name, args, &[]).1.count("peak_bytes");
    let few = format!("{FEW} --device cuda");
    let first = peak("first", &format!("degrade {digits} -o first {few} --degrade-steps 3"));
    let second = peak(
        "second",
        &format!("backtrack {digits} -o second --trajectory first/trajectory {few} --set backtrack.updates=3"),
    );
    let both = peak("both", &format!("distill {digits} -o both {few} --degrade-steps 3 --updates 3"));
    assert!(both <= first.max(second) + 65_536, "{both} bytes, the stages by themselves {first} and {second}");
    assert!(bytes(dir.join("both")) == bytes(dir.join("second")));
}

#[test]
fn a_run_that_was_cut_goes_on_to_the_same_bytes() {
    let dir = support::folder("stand-in-resume");
    let table = example("table/teacher.onnx");
    let whole = format!("distill {table} {FEW} --device cuda -o whole --degrade-steps 4 --updates 6");
    device(&dir, "whole", &whole, &[]);
    // Killed in the middle of stage 2.
    let cut = whole.replace("-o whole", "-o cut --set log.checkpoint_every=1").replace("log.every=1000", "log.every=1");
    let mut child = stand_in::under(Path::new(BINARY), &dir.join("cut.json"))
        .args(cut.split_whitespace())
        .current_dir(&dir)
        .spawn()
        .unwrap();
    let rows = || std::fs::read_to_string(dir.join("cut/metrics.jsonl")).map_or(0, |t| t.lines().count());
    while rows() < 6 && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let _ = child.kill();
    child.wait().unwrap();
    device(&dir, "resumed", &format!("distill {table} -o cut --resume --quiet"), &[]);
    assert!(bytes(dir.join("whole")) == bytes(dir.join("cut")));
}

#[test]
fn arms_are_compared_there() {
    let dir = support::folder("stand-in-compare");
    let args = format!(
        "compare {} --json --reference {} --features {} -o out --seeds 0 --every 2 --samples 16 --set degrade.nodes=1 \
         --set backtrack.switch_every=1 --set device=cuda --set threads=1 --set batch=3 --set degrade.steps=2 \
         --set backtrack.updates=2 --set log.samples=0",
        example("digits/teacher.onnx"),
        example("digits/digits.npz"),
        example("digits/classifier.onnx")
    );
    let (text, report) = device(&dir, "compare", &args, &[]);
    let result: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert!(result["base"][0]["points"][0]["distance"].as_f64() > Some(0.0), "{text}");
    assert!(report.count("launches") > 1000);
}
