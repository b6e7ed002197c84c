//! `sample`, `evaluate`, `bench` and `report` as a user meets them: files, exit codes, one clear error.

use std::path::Path;
use std::process::{Command, Output};

use disback::{onnx, tensor};

#[path = "../src/runtime/testing.rs"]
mod testing;

fn disback(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_disback")).args(args).current_dir(dir).output().unwrap()
}

fn ok(dir: &Path, args: &[&str]) -> String {
    let out = disback(dir, args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// Exit code and the first line of standard error.
fn fails(dir: &Path, args: &[&str]) -> (i32, String) {
    let out = disback(dir, args);
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!text.contains("panicked"), "{args:?}: {text}");
    (out.status.code().unwrap(), text.lines().next().unwrap_or_default().to_string())
}

fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("student.onnx"), testing::student("batch")).unwrap();
    let weight: Vec<f32> = (0..12).map(|k| ((k * 5) % 7) as f32 - 3.0).collect();
    std::fs::write(dir.path().join("features.onnx"), testing::features(&weight)).unwrap();
    dir
}

#[test]
fn samples_are_the_same_in_every_form() {
    let dir = folder();
    let dir = dir.path();
    ok(dir, &["sample", "student.onnx", "-n", "10", "-o", "a.npy", "--seed", "3"]);
    ok(dir, &["sample", "student.onnx", "-n", "10", "-o", "b.npz", "--seed", "3", "--batch", "3", "--engine", "tract"]);
    ok(dir, &["sample", "student.onnx", "-n", "10", "-o", "sheet.png", "--seed", "3"]);
    ok(dir, &["sample", "student.onnx", "-n", "10", "-o", "images", "--seed", "3"]);
    let a = disback::io::npy::read(&dir.join("a.npy")).unwrap();
    let b = disback::io::npy::read_npz(&dir.join("b.npz")).unwrap();
    assert_eq!((b[0].0.as_str(), b[1].0.as_str()), ("images", "labels"));
    assert_eq!(a.shape(), [10, 1, 2, 2]);
    let difference = a.to_f64().iter().zip(b[0].1.to_f64()).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
    assert!(difference < 1e-6, "{difference}");
    let range = [-1.0, 1.0];
    let array = disback::io::ImageSet::open(&dir.join("a.npy"), range).unwrap();
    let files = disback::io::ImageSet::open(&dir.join("images"), range).unwrap();
    assert_eq!(array.batch_u8(0, 10).unwrap(), files.batch_u8(0, 10).unwrap());
    assert!(std::fs::read(dir.join("sheet.png")).unwrap().starts_with(b"\x89PNG"));
    // The sets of the field's tools: EDM's zip, ADM's batch, classes with both.
    ok(dir, &["sample", "student.onnx", "-n", "10", "-o", "edm.zip", "--seed", "3", "--batch", "4"]);
    ok(dir, &["sample", "student.onnx", "-n", "10", "-o", "adm.npz", "--seed", "3", "--uint8"]);
    let classes: Vec<usize> = b[1].1.to_i64().into_iter().map(|k| k as usize).collect();
    for name in ["images", "edm.zip", "adm.npz"] {
        let set = disback::io::ImageSet::open(&dir.join(name), [-1.0, 1.0]).unwrap();
        assert_eq!(set.batch_u8(0, 10).unwrap(), files.batch_u8(0, 10).unwrap(), "{name}");
        assert_eq!(set.labels(), Some(&classes[..]), "{name}");
    }
    let adm = disback::io::npy::read_npz(&dir.join("adm.npz")).unwrap();
    assert_eq!((adm[0].0.as_str(), adm[0].1.shape(), adm[1].0.as_str()), ("arr_0", &[10, 2, 2, 1][..], "arr_1"));
    let (code, error) = fails(dir, &["sample", "student.onnx", "-o", "x.png", "--uint8"]);
    assert!(code == 2 && error.contains("--uint8 is for .npy and .npz"), "{error}");
}

#[test]
fn a_student_is_at_no_distance_from_its_own_samples() {
    let dir = folder();
    let dir = dir.path();
    ok(dir, &["sample", "student.onnx", "-n", "200", "-o", "a.npy"]);
    let score = |args: &[&str]| -> serde_json::Value {
        let mut all = vec!["evaluate"];
        all.extend(args);
        all.extend(["--features", "features.onnx", "--feature-range", "-1,1", "--json"]);
        serde_json::from_str(&ok(dir, &all)).unwrap()
    };
    let same = score(&["student.onnx", "a.npy", "--save-statistics", "reference.npz"]);
    assert!(same["frechet"].as_f64().unwrap() < 1e-9, "{same}");
    assert_eq!((same["precision"].as_f64(), same["recall"].as_f64()), (Some(1.0), Some(1.0)));
    let other = score(&["student.onnx", "a.npy", "--seed", "9"]);
    let shifted = score(&["a.npy", "reference.npz"]);
    assert!(shifted["frechet"].as_f64().unwrap() < 1e-9, "{shifted}");
    assert!(other["frechet"].as_f64().unwrap() > 1e-3, "{other}");
    ok(dir, &["sample", "student.onnx", "-n", "200", "-o", "one.npy", "--classes", "2"]);
    let one = score(&["one.npy", "a.npy"]);
    assert!(one["frechet"].as_f64() > other["frechet"].as_f64() && one["recall"].as_f64() < Some(1.0), "{one}");
}

fn evaluate(dir: &Path, args: &[&str]) -> serde_json::Value {
    let mut all = vec!["evaluate"];
    all.extend(args);
    all.push("--json");
    serde_json::from_str(&ok(dir, &all)).unwrap()
}

const DIGITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/digits");

#[test]
fn a_teacher_stands_beside_images_in_one_table() {
    let dir = tempfile::tempdir().unwrap();
    let (teacher, digits, net) =
        (format!("{DIGITS}/teacher.onnx"), format!("{DIGITS}/digits.npz"), format!("{DIGITS}/classifier.onnx"));
    let args = [&teacher, &digits, &digits, "--features", &net, "--steps", "2,9", "-n", "128", "--by-class"];
    let out = evaluate(dir.path(), &args);
    let rows = out["rows"].as_array().unwrap();
    let of = |k: usize, key: &str| rows[k][key].as_f64().unwrap_or_else(|| panic!("{key} of row {k}: {out}"));
    assert_eq!((rows.len(), of(0, "nfe"), of(1, "nfe")), (3, 3.0, 17.0));
    assert_eq!((rows[0]["kind"].as_str(), rows[2]["kind"].as_str()), (Some("teacher"), Some("images")));
    // More steps are better; real digits lie where real digits lie.
    assert!(of(0, "frechet") > of(1, "frechet") && of(0, "kernel") > of(1, "kernel"), "{out}");
    assert!(of(2, "precision") == 1.0 && of(2, "density") > 0.9 && of(2, "coverage") < 1.0, "{out}");
    // Ten classes, told apart by a good classifier.
    assert!((5.0..10.0).contains(&of(2, "inception_score")), "{out}");
    assert_eq!(rows[2]["classes"].as_array().unwrap().len(), 10);
    assert!(rows[1]["ms_per_image"].as_f64() > Some(0.0) && rows[2]["nfe"].is_null());
    // The figure does not depend on the batch; blocks of seeds give a spread and a least.
    let one =
        evaluate(dir.path(), &[&teacher, &digits, "--features", &net, "--steps", "9", "-n", "128", "--batch", "37"]);
    assert!((one["frechet"].as_f64().unwrap() / of(1, "frechet") - 1.0).abs() < 1e-5, "{one}");
    let args = [&teacher, &digits, "--features", &net, "--steps", "2", "-n", "96", "--repeats", "2", "--sliced"];
    let two = evaluate(dir.path(), &args);
    assert!(two["frechet_deviation"].as_f64() > Some(0.0) && two["frechet_least"].as_f64() < two["frechet"].as_f64());
    assert!(two["sliced"].as_f64() > Some(0.0) && two["blocks"].as_u64() == Some(2), "{two}");
}

#[test]
fn references_come_in_every_form_and_of_one_network_only() {
    use std::io::Write;
    let dir = folder();
    let dir = dir.path();
    ok(dir, &["sample", "student.onnx", "-n", "60", "-o", "a.npy"]);
    ok(dir, &["sample", "student.onnx", "-n", "60", "-o", "b.npz", "--seed", "1"]);
    ok(dir, &["sample", "student.onnx", "-n", "60", "-o", "images", "--seed", "1"]);
    let mut zip = zip::ZipWriter::new(std::fs::File::create(dir.join("images.zip")).unwrap());
    for k in 0..60 {
        zip.start_file(format!("{k:06}.png"), Default::default()).unwrap();
        zip.write_all(&std::fs::read(dir.join(format!("images/{k:06}.png"))).unwrap()).unwrap();
    }
    zip.finish().unwrap();
    let net = ["--features", "features.onnx", "--feature-range", "-1,1"];
    let with = |sets: &[&'static str], more: &[&'static str]| -> Vec<&'static str> {
        sets.iter().chain(&net).chain(more).copied().collect()
    };
    ok(dir, &[&["evaluate"][..], &with(&["images"], &["--save-statistics", "s.npz", "--quiet"])].concat());
    let first = evaluate(dir, &with(&["a.npy", "images"], &["--neighbours", "near.png"]));
    for reference in ["images.zip", "b.npz", "s.npz"] {
        let other = evaluate(dir, &with(&["a.npy", reference], &[]));
        let apart = other["frechet"].as_f64().unwrap() / first["frechet"].as_f64().unwrap() - 1.0;
        assert!(apart.abs() < 1e-9, "{reference}: {other}");
        assert_eq!(other["network_fingerprint"], first["network_fingerprint"]);
    }
    assert!(std::fs::read(dir.join("near.png")).unwrap().starts_with(b"\x89PNG"));
    // Without a network.
    let plain = evaluate(dir, &["a.npy", "b.npz"]);
    assert!(plain["sliced"].as_f64() > Some(0.0) && plain["frechet"].is_null(), "{plain}");
    // Another range is another feature space.
    let args = ["evaluate", "a.npy", "s.npz", "--features", "features.onnx", "--feature-range", "0,1"];
    let (code, error) = fails(dir, &args);
    assert!(code == 1 && error.contains("another feature network or preprocessing"), "{error}");
    for (args, code, want) in [
        (&["evaluate", "a.npy"][..], 2, "one set alone"),
        (&["evaluate", "s.npz", "a.npy", "--features", "features.onnx"], 2, "statistics: it can only be the reference"),
        (&["evaluate", "a.npy", "s.npz"], 2, "holds statistics of features"),
        (&["evaluate", "a.npy", "b.npz", "--features", "features.onnx", "--by-class"], 2, "this set has none"),
        (&["evaluate", "a.npy", "b.npz", "-n", "61"], 2, "holds 60 images: too few"),
        (&["evaluate", "features.onnx", "b.npz"], 2, "neither a student nor a teacher"),
        (
            &["evaluate", "a.npy", "b.npz", "--feature-card", "resize=box", "--features", "features.onnx"],
            2,
            "belong together",
        ),
    ] {
        let (got, error) = fails(dir, args);
        assert!(got == code && error.contains(want), "{args:?}: exit {got}, {error}");
    }
    // Floats of another range than the one they are read in.
    for (name, scale, offset) in [("unit.npy", 0.5, 0.5), ("bytes.npy", 127.5, 127.5)] {
        let a = disback::io::npy::read(&dir.join("a.npy")).unwrap();
        let values: Vec<f32> = a.to_f32().iter().map(|v| scale * v.clamp(-1.0, 1.0) + offset).collect();
        disback::io::npy::write(&dir.join(name), &tensor::HostTensor::new(a.shape(), &values).unwrap()).unwrap();
        let range = if scale < 1.0 { "0,1" } else { "0,255" };
        for sets in [[name, "images"], ["images", name]] {
            let (code, error) = fails(dir, &["evaluate", sets[0], sets[1]]);
            assert!(code == 2 && error.contains(name) && error.contains("the values go from 0 to"), "{error}");
            let same = evaluate(
                dir,
                &["images", name, "--range", range, "--features", "features.onnx", "--feature-range", "-1,1"],
            );
            let apart = same["frechet"].as_f64().unwrap() / first["frechet"].as_f64().unwrap() - 1.0;
            assert!(apart.abs() < 1e-2, "{same}");
        }
    }
    let full = evaluate(dir, &with(&["a.npy", "images"], &[]));
    let subsets = evaluate(dir, &with(&["a.npy", "images"], &["--kernel", "torch-fidelity"]));
    assert!(full["kernel_standard_error"].as_f64() > Some(0.0) && full["kernel_deviation"].is_null(), "{full}");
    assert!(subsets["kernel_standard_error"].is_null() && subsets["kernel_deviation"].is_number(), "{subsets}");
    let table = ok(dir, &["evaluate", "a.npy", "b.npz", "--values"]);
    assert!(table.contains("samples") && !table.contains("images"), "{table}");
    let colour = tensor::HostTensor::new(&[8, 2, 2, 3], &(0..96).map(|v| v as u8).collect::<Vec<_>>()).unwrap();
    disback::io::npy::write(&dir.join("colour.npy"), &colour).unwrap();
    let (code, error) = fails(dir, &["evaluate", "a.npy", "colour.npy"]);
    assert!(code == 1 && error.contains("2x2, grey") && error.contains("2x2, colour"), "{error}");
}

/// What is no image: written as a table, and measured by its values without any network.
#[test]
fn tables_are_sampled_and_measured() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("student.onnx"), testing::halved(&[3], &[])).unwrap();
    let engine = ["--engine", "tract"];
    let sample = |args: &[&str]| ok(dir, &[&["sample", "student.onnx", "-n", "300"], args, &engine].concat());
    assert!(sample(&["-o", "a.csv"]).starts_with("300 samples -> a.csv"));
    sample(&["-o", "b.npy", "--seed", "1"]);
    let measure = |args: &[&'static str]| evaluate(dir, args);
    let near = measure(&["student.onnx", "a.csv", "--seed", "2", "--engine", "tract"]);
    // The Frechet distance of two draws of 300 from one Gaussian is near 0; a shift of 1 in 3 columns adds 3.
    assert!(near["frechet"].as_f64() < Some(0.05) && near["features"] == 3 && near["kind"] == "student", "{near}");
    assert!(near["coverage"].as_f64() > Some(0.8) && near["sliced"].as_f64() > Some(0.0), "{near}");
    let text = std::fs::read_to_string(dir.join("a.csv")).unwrap();
    let shifted: Vec<String> = text
        .lines()
        .skip(1)
        .map(|l| l.split(',').map(|v| (v.parse::<f32>().unwrap() + 1.0).to_string()).collect::<Vec<_>>().join(","))
        .collect();
    std::fs::write(dir.join("shifted.csv"), shifted.join("\n")).unwrap();
    let far = measure(&["shifted.csv", "a.csv"]);
    assert!((far["frechet"].as_f64().unwrap() - 3.0).abs() < 1e-3 && far["kind"] == "values", "{far}");
    let (code, error) = fails(dir, &["evaluate", "b.npy", "a.csv", "--by-class"]);
    assert!(code == 2 && error.contains("for images with --features"), "{error}");
    let (code, error) = fails(dir, &["sample", "student.onnx", "-o", "a.wav"]);
    assert!(code == 2 && error.contains("does not call sound"), "{error}");
}

#[test]
fn a_sweep_measures_each_student_once() {
    let dir = folder();
    let dir = dir.path();
    ok(dir, &["sample", "student.onnx", "-n", "80", "-o", "a.npy", "--classes", "0,2"]);
    let run = dir.join("run");
    std::fs::create_dir_all(run.join("snapshots")).unwrap();
    std::fs::write(run.join("config.toml"), "seed = 0\n").unwrap();
    std::fs::copy(dir.join("student.onnx"), run.join("student.onnx")).unwrap();
    std::fs::write(run.join("snapshots/update-00000010-average.onnx"), testing::student("n")).unwrap();
    let args = ["a.npy", "--run", "run", "--features", "features.onnx", "--feature-range", "-1,1", "-n", "80"];
    let first = evaluate(dir, &args);
    assert_eq!(first["rows"].as_array().unwrap().len(), 2);
    let book = || -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(run.join("evaluation.json")).unwrap()).unwrap()
    };
    assert_eq!(book()["entries"].as_array().unwrap().len(), 2);
    assert_eq!(first["best"], book()["best"]);
    assert_eq!(book()["neighbours"].as_array().unwrap().len(), 8);
    // What was measured is not measured again: a changed figure stays as it is.
    let mut changed = book();
    changed["entries"][0]["row"]["frechet"] = serde_json::json!(1e-9);
    std::fs::write(run.join("evaluation.json"), changed.to_string()).unwrap();
    let second = evaluate(dir, &args);
    assert_eq!(second["rows"][0]["frechet"].as_f64(), Some(1e-9));
    assert_eq!(second["best"].as_str(), Some("snapshots/update-00000010-average.onnx"));
    // Another count is another setting, and a new file is measured.
    let other = evaluate(dir, &[&args[..7], &["-n", "70"]].concat());
    assert!(other["rows"][0]["frechet"].as_f64() > Some(1e-6), "{other}");
    ok(dir, &["report", "run"]);
    let report = std::fs::read_to_string(run.join("report.html")).unwrap();
    assert!(
        report.contains("(best)") && report.contains("reference images nearest to it"),
        "the sweep is in the report"
    );
    std::fs::write(run.join("evaluation.json"), "{").unwrap();
    let (code, error) = fails(dir, &[&["evaluate"], &args[..]].concat());
    assert!(code == 1 && error.contains("not the results of an evaluation"), "{error}");
}

#[test]
fn timings_come_for_every_engine() {
    let dir = folder();
    let out = ok(
        dir.path(),
        &["bench", "student.onnx", "--batch", "1,2", "--seconds", "0", "--engine", "tract", "--json", "--run", "."],
    );
    let out: serde_json::Value = serde_json::from_str(&out).unwrap();
    let kept = std::fs::read(dir.path().join("bench.json")).unwrap();
    assert_eq!(serde_json::from_slice::<serde_json::Value>(&kept).unwrap(), out);
    assert_eq!(out["timings"].as_array().unwrap().len(), 2);
    assert!(out["timings"][1]["p99_ms"].as_f64() >= out["timings"][1]["p50_ms"].as_f64());
}

#[test]
fn a_student_is_written_in_other_forms_and_verified() {
    let dir = folder();
    let dir = dir.path();
    let json = |args: &[&str]| -> serde_json::Value { serde_json::from_str(&ok(dir, args)).unwrap() };
    let out =
        json(&["export", "student.onnx", "-o", "image.onnx", "--image", "--batch", "3", "--opset", "19", "--json"]);
    assert_eq!((out["ok"].as_bool(), out["report"]["opset"].as_i64()), (Some(true), Some(19)), "{out}");
    assert!(out["report"]["max_abs"].as_f64().unwrap() < 1e-6, "{out}");
    let consumer = disback::graph::Model::load(&dir.join("image.onnx")).unwrap().metadata();
    let (_, text) = consumer.iter().find(|(k, _)| k == "disback.consumer").unwrap();
    let consumer: serde_json::Value = serde_json::from_str(text).unwrap();
    assert_eq!(consumer["inputs"][0]["shape"], serde_json::json!([3, 1, 2, 2]));
    assert_eq!(consumer["inputs"][1]["classes"], serde_json::json!(3));
    assert_eq!(consumer["outputs"][1]["layout"], serde_json::json!("nhwc"));
    assert_eq!(consumer["seed_convention"], serde_json::json!(disback::noise::SEED_CONVENTION));

    let found = json(&["verify", "image.onnx", "--no-python", "--json"]);
    assert_eq!((found["ok"].as_bool(), found["images"].as_u64()), (Some(true), Some(3)), "{found}");
    for engine in found["engines"].as_array().unwrap() {
        let agrees = engine["max_abs"].as_f64().unwrap() < 1e-6 && engine["uint8_differing"].as_u64() == Some(0);
        assert!(agrees && engine["name"].is_string() && engine["version"].is_string(), "{engine}");
    }
    // A target that refuses a node: exit code 1, the node named.
    let out = disback(dir, &["verify", "student.onnx", "--no-python", "--target", "coreml,tensorrt", "--json"]);
    let found: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!((out.status.code(), found["ok"].as_bool()), (Some(1), Some(false)));
    assert_eq!(found["targets"][0]["refused"][0]["operator"], serde_json::json!("Gather"), "{found}");
    assert_eq!(found["targets"][1]["ok"], serde_json::json!(true));

    // All weights outside, the file next to them.
    ok(dir, &["export", "student.onnx", "-o", "out.onnx", "--external-data"]);
    assert_eq!(ok(dir, &["sample", "out.onnx", "-n", "2", "-o", "a.npy", "--quiet"]), "");
}

#[test]
fn bad_input_is_one_clear_error() {
    let dir = folder();
    let dir = dir.path();
    std::fs::write(dir.join("text.onnx"), "no model").unwrap();
    std::fs::write(dir.join("grey.npy"), [0u8; 4]).unwrap();
    let cases: &[(&[&str], i32, &str)] = &[
        (&["sample", "none.onnx", "-o", "x.png"], 1, "none.onnx"),
        (&["sample", "text.onnx", "-o", "x.png"], 1, "not an ONNX model"),
        (&["sample", "features.onnx", "-o", "x.png"], 1, "not a student"),
        (&["sample", "student.onnx", "-o", "x.png", "-n", "0"], 2, "nothing to sample"),
        (&["sample", "student.onnx", "-o", "x.png", "--classes", "7"], 2, "classes 0 to 2"),
        (
            &["sample", "student.onnx", "-o", "x.png", "--engine", "tract", "--provider", "cuda"],
            2,
            "tract has no provider",
        ),
        (&["sample", "student.onnx", "-o", "none/x.png"], 1, "none/x.png"),
        (&["evaluate", "student.onnx", "none", "--features", "features.onnx"], 1, "none: no such file"),
        (&["evaluate", "student.onnx", "grey.npy", "--features", "features.onnx"], 1, "grey.npy: not a .npy array"),
        (
            &["evaluate", "student.onnx", "student.onnx", "--features", "student.onnx"],
            1,
            "a feature network has one input",
        ),
        (&["evaluate", "student.onnx", "student.onnx", "--features", "features.onnx", "--range", "1"], 2, "LOW,HIGH"),
        (&["bench", "student.onnx", "--batch", "0"], 2, "a batch of 0"),
        (&["bench", "student.onnx", "--provider", ","], 2, "names no provider"),
        (&["bench", "student.onnx", "--cache", "c"], 2, "--cache is an option of --provider tensorrt"),
        (&["sample", "student.onnx", "-o", "x.png", "--cuda-graph"], 2, "--cuda-graph needs --provider cuda"),
        (&["sample", "student.onnx", "-o", "x.png", "--profile", "1,2"], 2, "three batch sizes"),
        (&["verify", "features.onnx", "--no-python"], 1, "not a student"),
        (&["verify", "none.onnx", "--no-python"], 1, "none.onnx"),
        (&["verify", "student.onnx", "--python", "none"], 2, "--python none: no such file"),
        (&["verify", "student.onnx", "--images", "0", "--no-python"], 2, "--images 0"),
        (&["export", "student.onnx", "-o", "x.onnx", "--batch", "two"], 2, "expected a number or `dynamic`"),
        (&["export", "student.onnx", "-o", "x.onnx", "--opset", "99"], 2, "expected 13 to 25"),
        (&["export", "student.onnx", "-o", "x.onnx", "--decoder", "features.onnx"], 2, "makes images, not latents"),
        (&["export", "student.onnx", "-o", "x.onnx", "--precision", "int8"], 2, "no weights of 1024"),
        (&["export", "features.onnx", "-o", "x.onnx"], 2, "give --run or --weights"),
        (&["report", "none"], 1, "none: no such folder"),
        (&["report", "."], 2, "not a run directory"),
    ];
    for (args, code, want) in cases {
        let (got, error) = fails(dir, args);
        assert!(got == *code && error.contains(want), "{args:?}: exit {got}, {error}");
    }
    assert!(!dir.join("x.png").exists());
    assert!(
        std::fs::read_dir(dir).unwrap().flatten().all(|e| !e.file_name().to_string_lossy().starts_with(".disback"))
    );
}

#[test]
fn options_of_every_command_stand_behind_its_own() {
    let dir = tempfile::tempdir().unwrap();
    for command in ["inspect", "export", "verify", "sample", "evaluate", "bench", "serve", "doctor"] {
        let text = ok(dir.path(), &[command, "--help"]);
        let (own, global) = text.split_once("Global options:").expect(command);
        assert!(!own.contains("--json") && !own.contains("--quiet"), "{command}: {own}");
        assert!(global.contains("--json") && global.contains("--quiet"), "{command}: {global}");
    }
}
