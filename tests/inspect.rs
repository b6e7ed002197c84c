//! `inspect`: the card it proposes for networks whose card is known but withheld, and what it prints and writes.

use std::path::Path;
use std::process::{Command, Output};

use disback::graph::{Model, TrainableChoice};
use disback::inspect::{self, ProbeOptions, Proposal};
use prost::Message;

#[path = "support/wrapped.rs"]
mod wrapped;
use wrapped::{Core, Disguise, PLAIN, digits, mixture, wrapped as disguised};

fn proposal(core: Core, d: Disguise) -> Proposal {
    let model = Model::from_proto(disguised(core, d));
    let (_, network, graph) = inspect::inspect(&model, &TrainableChoice::default(), true).unwrap();
    let mut network = network.expect("all operators are supported");
    // The digits teacher has 4.6 million multiply-adds.
    let options = ProbeOptions { seconds: f64::INFINITY, macs: Some(5_000_000), verify: false };
    inspect::propose(&model, &graph, &Default::default(), Some((&mut network, options)))
}

/// The proposal says what the network is, in every key that it decides, and decides prediction and time unit.
fn check(p: &Proposal, d: Disguise, may_leave_open: &[&str]) {
    let report = p.probe.as_ref().unwrap_or_else(|| panic!("{d:?}: {:?}", p.failed));
    let (kind, betas) = match d.schedule.split_once('-') {
        Some((kind, betas)) => (kind, Some(betas)),
        None => (d.schedule, None),
    };
    let layout = if d.nhwc { "nhwc" } else { "nchw" };
    let mut wanted = vec![
        (vec!["sample"], "sample"),
        (vec!["time"], "time"),
        (vec!["output"], "out"),
        (vec!["prediction"], d.prediction),
        (vec!["time_unit"], d.unit),
        (vec!["schedule", "kind"], kind),
        (vec!["layout"], layout),
    ];
    wanted.extend(betas.map(|b| (vec!["schedule", "betas"], b)));
    for (path, value) in wanted {
        let found = p.findings.get(&path).unwrap_or_else(|| panic!("{d:?}: no finding for {path:?}"));
        match &found.value {
            Some(v) => assert_eq!(v.as_str(), Some(value), "{d:?} {path:?}: {found:?}\n{:#?}", report.readings),
            None => assert!(may_leave_open.contains(&path[path.len() - 1]), "{d:?}: {found:?}\n{:#?}", report.readings),
        }
    }
    assert_eq!(p.findings.table()["shape"], toml::Value::from(vec![1i64, 8, 8]));
}

fn as_int(p: &Proposal, path: &[&str]) -> Option<i64> {
    p.findings.get(path)?.value.as_ref()?.as_integer()
}

#[test]
fn exact_denoisers_are_seen_through_in_every_prediction_and_unit() {
    let d = |prediction, unit, schedule| Disguise { prediction, unit, schedule, ..PLAIN };
    for d in [
        PLAIN,
        d("denoised", "ln-sigma-4", "edm"),
        d("edm-raw", "ln-sigma-4", "edm"),
        Disguise { sigma_data: 1.0, ..d("edm-raw", "ln-sigma-4", "edm") },
        Disguise { nhwc: true, ..d("epsilon", "sigma", "edm") },
        Disguise { integer: true, ..d("epsilon", "step", "vp-linear") },
        d("epsilon", "step", "vp-scaled-linear"),
        d("v", "step", "vp-linear"),
        Disguise { one_hot: true, ..d("v", "unit", "vp-cosine") },
        d("epsilon", "unit", "vp-linear"),
        d("flow", "unit", "flow"),
        d("flow", "thousand", "flow"),
        Disguise { integer: true, ..d("denoised", "step", "vp-cosine") },
    ] {
        let p = proposal(mixture(), d);
        // Which of two like schedules made the steps of a network that gives x0 is hard to see: it may stay open.
        check(&p, d, if d.prediction == "denoised" && d.schedule != "edm" { &["betas"] } else { &[] });
        if d.one_hot {
            let classes = &p.findings.table()["conditions"]["class_onehot"];
            assert_eq!(classes["kind"].as_str(), Some("one-hot"));
            assert_eq!((classes["classes"].as_integer(), classes["null"].as_str()), (Some(4), Some("zeros")));
        } else {
            let at = |field| as_int(&p, &["conditions", "labels", field]);
            assert_eq!((at("classes"), at("null")), (Some(4), Some(4)), "{d:?} {:#?}", p.findings);
        }
        if d.prediction == "edm-raw" {
            assert_eq!(p.findings.table()["sigma_data"].as_float(), Some(d.sigma_data));
        }
        assert!(p.card().is_ok() || !p.findings.open().is_empty());
    }
}

#[test]
fn the_trained_teacher_is_seen_through() {
    let d = |prediction, unit, schedule| Disguise { prediction, unit, schedule, ..PLAIN };
    for d in [PLAIN, Disguise { integer: true, ..d("epsilon", "step", "vp-scaled-linear") }] {
        let p = proposal(digits(), d);
        check(&p, d, &[]);
        let at = |field| as_int(&p, &["conditions", "labels", field]);
        assert_eq!((at("classes"), at("null")), (Some(10), Some(10)), "{d:?} {:#?}", p.findings);
        assert_eq!(p.findings.table()["range"], toml::Value::from(vec![-1.0, 1.0]), "{:#?}", p.findings);
        assert_eq!(p.card().unwrap().sigma_data, 0.5);
    }
}

#[test]
fn an_untrained_network_decides_nothing() {
    // The teacher's graph with shuffled roles: a network that is no denoiser under any reading.
    let mut core = mixture();
    for t in &mut core.graph.initializer {
        if t.name() == "core_mu" {
            *t = disback::graph::tensors::to_proto(
                "core_mu",
                &disback::HostTensor::new(&[40, 64], &disback::noise::image_noise(3, 9, 40 * 64)).unwrap(),
            );
        }
    }
    let p = proposal(core, Disguise { prediction: "v", unit: "unit", schedule: "vp-linear", ..PLAIN });
    for path in [&["prediction"] as &[&str], &["time_unit"], &["schedule", "kind"]] {
        assert!(p.findings.get(path).unwrap().value.is_none(), "{:#?}", p.probe);
    }
    assert!(p.card().is_err());
}

fn disback(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_disback"))
        .args(args)
        .current_dir(dir)
        .env("OMP_NUM_THREADS", "1")
        .output()
        .unwrap()
}

fn json(out: &Output) -> serde_json::Value {
    serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&out.stderr)))
}

#[test]
fn the_command_proposes_writes_and_does_not_overwrite() {
    let dir = tempfile::tempdir().unwrap();
    let d = Disguise { prediction: "v", unit: "step", schedule: "vp-linear", integer: true, ..PLAIN };
    std::fs::write(dir.path().join("m.onnx"), disguised(mixture(), d).encode_to_vec()).unwrap();
    let out = disback(dir.path(), &["inspect", "m.onnx", "--json", "--write-card", "--batch", "3"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let seen = json(&out);
    for key in [
        "inputs",
        "outputs",
        "opset",
        "parameters",
        "buffers",
        "operators",
        "fused",
        "near_misses",
        "unsupported",
        "macs",
        "activation_bytes",
        "proposed_card",
    ] {
        assert!(seen.get(key).is_some(), "{key} is missing");
    }
    assert_eq!(seen["proposed_card"]["prediction"], "v");
    assert_eq!(seen["proposed_card"]["schedule"]["betas"], "linear");
    assert_eq!(seen["proposed_card"]["conditions"]["labels"]["null"], 4);
    assert_eq!(seen["proposal"]["undecided"], serde_json::json!([]));
    // Two matrix products of [3, 64] by [64, 40] and back.
    assert_eq!((seen["batch"].as_u64(), seen["macs"].as_u64()), (Some(3), Some(2 * 3 * 64 * 40)));
    // The card that was written is a card.
    let again = disback(dir.path(), &["inspect", "m.onnx", "--json"]);
    assert_eq!(json(&again)["card"]["prediction"], "v");
    assert!(json(&again)["proposal"].get("probe").is_none(), "a complete card needs no probe");
    let refused = disback(dir.path(), &["inspect", "m.onnx", "--write-card"]);
    assert_eq!(refused.status.code(), Some(2));
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(text.contains("is there already") && text.contains("--overwrite"), "{text}");
    let replaced =
        disback(dir.path(), &["inspect", "m.onnx", "--write-card", "--overwrite", "--card", "sigma_data=0.7"]);
    assert!(replaced.status.success());
    assert!(std::fs::read_to_string(dir.path().join("m.card.toml")).unwrap().contains("sigma_data = 0.7"));
    // A card that is wrong is contradicted.
    let wrong = disback(dir.path(), &["inspect", "m.onnx", "--json", "--probe", "--card", "prediction=epsilon"]);
    assert_eq!(json(&wrong)["proposal"]["probe"]["contradicted"], serde_json::json!(["prediction"]));
    // Without the probe the numbers' keys stay open, and the card says so.
    std::fs::remove_file(dir.path().join("m.card.toml")).unwrap();
    let blind = disback(dir.path(), &["inspect", "m.onnx", "--no-probe", "--write-card"]);
    let text = String::from_utf8_lossy(&blind.stderr).into_owned();
    assert!(text.contains("leaves out what is undecided: prediction"), "{text}");
    let written = std::fs::read_to_string(dir.path().join("m.card.toml")).unwrap();
    assert!(written.contains("# prediction = ?") && written.contains("sample = \"sample\""), "{written}");
}

#[test]
fn the_converters_list_of_parameters_and_tied_groups_count() {
    use disback::onnx::StringStringEntryProto;
    let dir = tempfile::tempdir().unwrap();
    let teacher = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("converters/teachers/edm_unet/teacher.onnx");
    let model = disback::graph::Model::load(&teacher).unwrap();
    let written = |entries: &[(&str, &str)]| {
        let mut proto = (*model.proto).clone();
        proto.metadata_props.retain(|p| !p.key().starts_with("disback.parameters"));
        proto.metadata_props.extend(
            entries
                .iter()
                .map(|(k, v)| StringStringEntryProto { key: Some(k.to_string()), value: Some(v.to_string()) }),
        );
        std::fs::write(dir.path().join("m.onnx"), proto.encode_to_vec()).unwrap();
        disback(dir.path(), &["inspect", "m.onnx", "--json", "--parameters"])
    };
    let names = |seen: &serde_json::Value| -> Vec<String> {
        seen["parameter_list"].as_array().unwrap().iter().map(|p| p["name"].as_str().unwrap().to_owned()).collect()
    };
    let all = json(&written(&[]));
    assert_eq!((all["parameters_declared"].as_bool(), all.get("tied")), (Some(false), None));
    let chosen = &names(&all)[..2];
    let list = serde_json::to_string(chosen).unwrap();
    let tied = format!("[[{:?}, \"head.weight\"]]", chosen[0]);
    let some = json(&written(&[("disback.parameters", &list), ("disback.parameters.tied", &tied)]));
    assert_eq!(names(&some), chosen);
    assert_eq!(some["parameters_declared"], true);
    assert_eq!(some["tied"][0][1], "head.weight");
    for (key, value) in [("disback.parameters", "scale, bias"), ("disback.parameters.tied", "[\"a\"]")] {
        let refused = written(&[(key, value)]);
        assert!(!refused.status.success());
        let said = String::from_utf8_lossy(&refused.stdout).into_owned() + &String::from_utf8_lossy(&refused.stderr);
        assert!(said.contains(key), "{said}");
    }
    let absent = written(&[("disback.parameters", "[\"nowhere\"]")]);
    assert!(!absent.status.success());
}
