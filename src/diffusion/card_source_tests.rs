use super::*;
use crate::diffusion::{Condition, Null, Prediction, ScheduleSpec, TimeUnit};

fn metadata() -> Vec<(&'static str, &'static str)> {
    vec![
        ("disback.sample", "x"),
        ("disback.time", "\"sigma\""),
        ("disback.output", "denoised"),
        ("disback.prediction", "denoised"),
        ("disback.time_unit", "sigma"),
        ("disback.shape", "[1, 8, 8]"),
        ("disback.range", "[-1, 1]"),
        ("disback.schedule.kind", "edm"),
        ("disback.schedule.sigma_max", "60"),
        ("disback.conditions.labels.kind", "class-index"),
        ("disback.conditions.labels.classes", "10"),
        ("disback.student.method", "disback"),
        ("disback.provenance", "a script"),
        ("producer", "elsewhere"),
    ]
}

#[test]
fn metadata_alone_makes_a_card_and_passes_the_rest_through() {
    let found = CardSource::new().metadata(metadata()).resolve().unwrap();
    assert_eq!(found.card.prediction, Prediction::Denoised);
    assert_eq!(found.card.schedule, ScheduleSpec::Edm { sigma_min: 0.002, sigma_max: 60.0, rho: 7.0 });
    assert_eq!(found.card.conditions["labels"], Condition::ClassIndex { classes: 10, null: None });
    assert_eq!(found.extra.len(), 2);
    assert_eq!(found.extra["student.method"], "disback");
    let rows = found.rows().unwrap();
    let row = |key: &str| rows.iter().find(|r| r.0 == key).map(|r| format!("{} = {} ({})", r.0, r.1, r.2)).unwrap();
    assert_eq!(row("prediction"), "prediction = \"denoised\" (from metadata)");
    assert_eq!(row("schedule.rho"), "schedule.rho = 7.0 (default)");
    // And back: what the card writes gives the same card.
    let again = CardSource::new().metadata(found.card.to_metadata().unwrap()).resolve().unwrap();
    assert_eq!(again.card, found.card);
}

#[test]
fn precedence_is_command_line_side_file_metadata_scheduler() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("teacher.onnx");
    let scheduler = r#"{"_class_name": "DDPMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
        "beta_end": 0.012, "prediction_type": "epsilon", "num_train_timesteps": 1000}"#;
    std::fs::write(dir.path().join("scheduler_config.json"), scheduler).unwrap();
    std::fs::write(dir.path().join("teacher.card.toml"), "output = 'side'\ndataset = 'side'\n").unwrap();
    let base = [
        ("disback.sample", "x"),
        ("disback.time", "1"),
        ("disback.output", "metadata"),
        ("disback.shape", "[3, 8, 8]"),
        ("disback.dataset", "metadata"),
    ];
    let source = CardSource::new().model(&model).metadata(base);
    let found = source.clone().overrides(["output=command", "schedule.steps=500"]).resolve().unwrap();
    assert_eq!(found.card.output, "command");
    assert_eq!(found.card.dataset.as_deref(), Some("side"));
    assert_eq!(found.card.time, "1", "a name that looks like a number stays a name");
    assert_eq!(found.card.prediction, Prediction::Epsilon);
    assert_eq!(found.card.time_unit, TimeUnit::Step);
    assert!(matches!(found.card.schedule, ScheduleSpec::Vp { steps: Some(500), beta_end: Some(0.012), .. }));
    assert_eq!(found.origins["output"], CardOrigin::CommandLine);
    assert_eq!(found.origins["dataset"].to_string(), "from teacher.card.toml");
    assert_eq!(found.origins["prediction"].to_string(), "from scheduler_config.json");
    // Another kind of schedule takes the former's values with it.
    let other = ["schedule={kind='flow', shift=3.0}", "prediction=flow", "time_unit=unit"];
    let found = source.clone().overrides(other).resolve().unwrap();
    assert_eq!(found.card.schedule, ScheduleSpec::Flow { shift: 3.0, direction: Default::default() });
    // A scheduler that cannot be expressed counts only where nothing else gives the schedule.
    std::fs::write(dir.path().join("scheduler_config.json"), r#"{"beta_schedule": "sigmoid"}"#).unwrap();
    assert!(source.clone().resolve().unwrap_err().to_string().contains("sigmoid"));
    assert!(source.clone().overrides(other).resolve().is_ok());
    std::fs::write(dir.path().join("teacher.onnx.card.toml"), "").unwrap();
    assert!(source.overrides(other).resolve().unwrap_err().to_string().contains("two cards"));
}

#[test]
fn names_with_dots_are_reached() {
    let found = CardSource::new()
        .metadata(metadata())
        .overrides([
            "conditions.onnx::y.1.kind=one-hot",
            "conditions.onnx::y.1.classes=4",
            "conditions.onnx::y.1.null=zeros",
            "conditions.\"z.2\"={kind='embedding', shape=[2], null=[0.5, 1]}",
            "constants.w.3=1.5",
        ])
        .resolve()
        .unwrap();
    let classes = Condition::OneHot { classes: 4, null: Some(Null::Zeros(super::super::condition::Zeros::Zeros)) };
    assert_eq!(found.card.conditions["onnx::y.1"], classes);
    assert_eq!(found.card.conditions["z.2"].null_row(), Some(vec![0.5, 1.0]));
    assert_eq!(found.card.constants["w.3"], 1.5);
}

#[test]
fn mistakes_are_named_with_the_way_out() {
    let cases = [
        ("predicton=v", "unknown card key `predicton`", "`prediction`"),
        ("schedule.sigma_maxx=3", "unknown card key `schedule.sigma_maxx`", "`sigma_max`"),
        ("conditions.labels.clases=3", "unknown card key `conditions.labels.clases`", "`classes`"),
        ("prediction=nose", "card key `prediction` (from --card)", "epsilon"),
        ("shape=[1, -8]", "card key `shape` (from --card)", ""),
        ("shape=[]", "`shape` is []", ""),
        ("schedule.kind=edn", "`schedule.kind` is `edn`", "`edm`, `vp`, `flow`"),
        ("schedule.shift=2", "`schedule.shift` does not belong to kind `edm`", ""),
        ("schedule.kind=vp", "`schedule.betas` is missing", ""),
        ("schedule=edm", "`schedule` is a table", ""),
        ("sigma_data=-1", "`sigma_data` is -1", ""),
        ("justakey", "expected key=value", ""),
        ("time=x", "graph input `x` is named by both", ""),
    ];
    for (item, expected, hint) in cases {
        let error = CardSource::new().metadata(metadata()).overrides([item]).resolve().unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let text = error.to_string();
        assert!(text.contains(expected) && text.contains(hint), "{item}: {text}");
    }
    let error = CardSource::new().metadata([("disback.sampel", "x")]).resolve().unwrap_err().to_string();
    assert!(error.contains("unknown card key `sampel`") && error.contains("`sample`"), "{error}");
}

#[test]
fn a_missing_card_says_which_keys_and_the_ways_to_give_them() {
    let error = CardSource::new().model(Path::new("nowhere/teacher.onnx")).resolve().unwrap_err();
    let text = error.to_string();
    // The file is named once, whoever names it again.
    let again = CardSource::new().model(Path::new("nowhere/teacher.onnx")).resolve().unwrap_err();
    let again = again.context("nowhere/teacher.onnx").to_string();
    assert!(again == text && text.starts_with("nowhere/teacher.onnx: no teacher card"), "{again}");
    for part in [
        "no teacher card",
        "`sample`",
        "`schedule.kind`",
        "--card",
        "teacher.card.toml",
        "metadata_props",
        "inspect nowhere/",
    ] {
        assert!(text.contains(part), "{text}");
    }
    let text = CardSource::new().metadata(metadata().split_off(1)).resolve().unwrap_err().to_string();
    assert!(text.contains("incomplete: missing `sample`"), "{text}");
}

#[test]
fn the_only_output_need_not_be_named() {
    let rest: Vec<_> = metadata().into_iter().filter(|(k, _)| !k.ends_with("output")).collect();
    let source = CardSource::new().metadata(rest);
    let found = source.clone().outputs(["y"]).resolve().unwrap();
    assert_eq!((found.card.output.as_str(), &found.origins["output"]), ("y", &CardOrigin::OnlyOne));
    for several in [vec!["y", "z"], vec![]] {
        let error = source.clone().outputs(several).resolve().unwrap_err().to_string();
        assert!(error.contains("missing `output`"), "{error}");
    }
    // One that is named stays, and no card at all is none.
    assert_ne!(CardSource::new().metadata(metadata()).outputs(["y"]).resolve().unwrap().card.output, "y");
    assert!(CardSource::new().outputs(["y"]).resolve().unwrap_err().to_string().contains("no teacher card"));
}

#[test]
fn a_broken_side_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("t.card.toml"), "sample = \n").unwrap();
    let error = CardSource::new().model(&dir.path().join("t.onnx")).resolve().unwrap_err().to_string();
    assert!(error.contains("t.card.toml") && error.contains("not TOML"), "{error}");
}

#[test]
fn a_mask_is_as_large_as_the_sample_whose_dimensions_it_has() {
    let free = |name: &str, dims: &[&str]| -> sizes::Declared {
        (name.into(), dims.iter().map(|d| d.parse().map_err(|_| (*d).to_owned())).collect())
    };
    let mut source = CardSource::new().metadata(metadata());
    source.inputs = vec![free("x", &["batch", "1", "h", "w"]), free("mask", &["batch", "2", "h", "w"])];
    let found = source.overrides(["conditions.mask.kind=embedding", "shape=[1, 6, 5]"]).resolve().unwrap();
    assert_eq!(found.card.conditions["mask"].row_shape(), [2, 6, 5]);
    assert_eq!(found.origins["conditions.mask.shape"], CardOrigin::Graph);
}

#[test]
fn cards_larger_than_a_person_writes_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("teacher.onnx");
    let side = dir.path().join("teacher.card.toml");
    // (Sparse: nothing of it is read.)
    std::fs::File::create(&side).unwrap().set_len(100 << 20).unwrap();
    let e = CardSource::new().model(&model).resolve().unwrap_err().to_string();
    assert!(e.contains("teacher.card.toml") && e.contains("has 104857600 bytes"), "{e}");
    let long = " ".repeat(5 << 20);
    let e = CardSource::new().metadata([("disback.schedule.betas", long.as_str())]).resolve().unwrap_err().to_string();
    assert!(e.contains("`disback.schedule.betas` has 5242880 bytes"), "{e}");
}
