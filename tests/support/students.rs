//! Students of the corpus: each network with a card that fits it, in every form that `export` writes of it, in ONNX Runtime
//! and tract.

use std::path::Path;

use disback::export;
use disback::export::{Precision, ShipOptions, StudentOptions};
use disback::graph::save;
use disback::passes::evaluate;
use disback::passes::fuse::Fuse;
use disback::run::{Teacher, TeacherOptions};
use disback::runtime::{self, EngineKind, EngineOptions};
use disback::tensor::{DType, HostTensor};
use disback::torch::Forward;
use tch::Device;

use crate::exporter::Exporter;

/// A card for the case's network, as `--card` takes it; `None` for what is no teacher: autoencoders, text encoders, `traps`,
/// `branches` and Kandinsky's prior.
pub fn card(case: &str) -> Option<Vec<String>> {
    let vp = "schedule={ kind = \"vp\", betas = \"linear\", beta_start = 0.0001, beta_end = 0.02, steps = 1000 }";
    let edm = "schedule={ kind = \"edm\" }";
    let step = ["time=timestep", "time_unit=step", "prediction=epsilon", vp];
    let rows = |name: &str, shape: &str| format!("conditions.{name}={{ kind = \"embedding\", shape = {shape} }}");
    let (common, own): (&[&str], Vec<String>) = match case.split('-').next()? {
        "unet2d" => (&step, vec!["sample=sample".into(), "shape=[3, 8, 8]".into(), classes("class_labels", 5)]),
        "ncsnpp" => (
            &["time=timestep", "time_unit=sigma", "prediction=denoised", edm],
            vec!["sample=sample".into(), "shape=[3, 8, 8]".into()],
        ),
        "sd" => {
            (&step, vec!["sample=sample".into(), "shape=[4, 8, 8]".into(), rows("encoder_hidden_states", "[5, 12]")])
        }
        "sdxl" => (
            &step,
            vec![
                "sample=sample".into(),
                "shape=[4, 8, 8]".into(),
                rows("encoder_hidden_states", "[5, 12]"),
                rows("text_embeds", "[10]"),
                rows("time_ids", "[6]"),
                "constants.encoder_attention_mask=1".into(),
            ],
        ),
        "dit" => (&step, vec!["sample=hidden_states".into(), "shape=[4, 8, 8]".into(), classes("class_labels", 10)]),
        "sd3" => (
            &["time=timestep", "time_unit=thousand", "prediction=flow", "schedule={ kind = \"flow\" }"],
            vec![
                "sample=hidden_states".into(),
                "shape=[4, 8, 8]".into(),
                rows("encoder_hidden_states", "[5, 12]"),
                rows("pooled_projections", "[10]"),
            ],
        ),
        "pixart" => (
            &step,
            vec![
                "sample=hidden_states".into(),
                "shape=[4, 8, 8]".into(),
                rows("encoder_hidden_states", "[6, 12]"),
                "constants.encoder_attention_mask=1".into(),
            ],
        ),
        "edm" => (
            &["time=sigma", "time_unit=sigma", "prediction=denoised", edm],
            vec![
                "sample=x".into(),
                "output=denoised".into(),
                "shape=[3, 8, 8]".into(),
                "conditions.class_labels={ kind = \"one-hot\", classes = 4 }".into(),
            ],
        ),
        "u_vit" => (
            &["time=t", "time_unit=step", "prediction=epsilon", vp],
            vec!["sample=x".into(), "shape=[3, 8, 8]".into(), classes("y", 5)],
        ),
        "consistency" => (
            &["time=sigma", "time_unit=sigma", "prediction=denoised", edm],
            vec!["sample=x".into(), "shape=[3, 8, 8]".into(), classes("y", 4)],
        ),
        "convnext" | "standardised" => {
            (&["time=t", "time_unit=step", "prediction=epsilon", vp], vec!["sample=x".into(), "shape=[3, 8, 8]".into()])
        }
        "rope_dit" => (
            &["time=t", "time_unit=step", "prediction=epsilon", vp],
            vec!["sample=x".into(), "shape=[4, 8, 8]".into(), rows("text", "[5, 12]"), "constants.mask=1".into()],
        ),
        "windows" => (
            &["time=t", "time_unit=step", "prediction=epsilon", vp],
            vec!["sample=x".into(), "shape=[4, 8, 8]".into(), rows("text", "[5, 12]")],
        ),
        "edm2" => (
            &["time=sigma", "time_unit=sigma", "prediction=denoised", edm],
            vec![
                "sample=x".into(),
                "shape=[3, 8, 8]".into(),
                "conditions.y={ kind = \"one-hot\", classes = 4 }".into(),
            ],
        ),
        "aura" => (
            &step,
            vec!["sample=hidden_states".into(), "shape=[4, 8, 8]".into(), rows("encoder_hidden_states", "[5, 12]")],
        ),
        // The exporter's optimiser takes the 1e-15 under its linear attention for a zero and drops it: 0 / 0 where no query is
        // positive. `inspect` and `parity` name these divisions.
        "sana" if case.contains("dynamo") => return None,
        "sana" => (
            &step,
            vec!["sample=hidden_states".into(), "shape=[4, 8, 8]".into(), rows("encoder_hidden_states", "[5, 12]")],
        ),
        "hunyuan" => (
            &step,
            vec![
                "sample=hidden_states".into(),
                "shape=[4, 8, 8]".into(),
                rows("encoder_hidden_states", "[4, 12]"),
                rows("encoder_hidden_states_t5", "[3, 16]"),
            ],
        ),
        "kandinsky" => (&step, vec!["sample=sample".into(), "shape=[4, 8, 8]".into(), rows("image_embeds", "[10]")]),
        "cascade" => (
            &[
                "time=timestep_ratio",
                "time_unit=unit",
                "prediction=epsilon",
                "schedule={ kind = \"vp\", betas = \"cosine\", steps = 1000 }",
            ],
            vec!["sample=sample".into(), "shape=[4, 8, 8]".into(), rows("clip_text_pooled", "[1, 10]")],
        ),
        // Latents as rows of tokens, whose places are inputs without a batch.
        "flux" => (
            &["time=timestep", "time_unit=unit", "prediction=flow", "schedule={ kind = \"flow\" }"],
            vec![
                "sample=hidden_states".into(),
                "shape=[16, 4]".into(),
                "layout=channels-last".into(),
                rows("encoder_hidden_states", "[5, 12]"),
                rows("pooled_projections", "[10]"),
                "constants.guidance=0.05".into(),
                "conditions.img_ids={ kind = \"constant\", file = \"inputs.npz\" }".into(),
                "conditions.txt_ids={ kind = \"constant\", file = \"inputs.npz\" }".into(),
            ],
        ),
        "cog" => (
            &step,
            vec![
                "sample=hidden_states".into(),
                "shape=[3, 4, 4, 4]".into(),
                "layout=frames-first".into(),
                rows("encoder_hidden_states", "[5, 12]"),
            ],
        ),
        "wan" => (
            &step,
            vec![
                "sample=hidden_states".into(),
                "shape=[4, 2, 4, 4]".into(),
                "modality=video".into(),
                rows("encoder_hidden_states", "[5, 12]"),
            ],
        ),
        "unet1d" => (
            &["time=timestep", "time_unit=unit", "prediction=epsilon", vp],
            vec!["sample=sample".into(), "shape=[3, 32]".into()],
        ),
        "edm_ncsnpp" => (
            &["time=sigma", "time_unit=sigma", "prediction=denoised", edm],
            vec!["sample=x".into(), "output=denoised".into(), "shape=[3, 8, 8]".into()],
        ),
        _ => return None,
    };
    let mut all: Vec<String> = common.iter().map(|s| (*s).to_owned()).collect();
    if !own.iter().any(|e| e.starts_with("output=")) {
        all.push("output=out_sample".into());
    }
    all.extend(own);
    Some(all)
}

fn classes(name: &str, n: usize) -> String {
    format!("conditions.{name}={{ kind = \"class-index\", classes = {n} }}")
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// The student of a case, plain, with every fused operator that its operator set has, and in f16.
pub fn check(name: &str, card: &[String], exporter: &Exporter) -> Result<(), String> {
    let folder = exporter.case(name)?;
    let teacher = Teacher::load(
        &folder.join("model.onnx"),
        &TeacherOptions { card: card.to_vec(), ..Default::default() },
        Device::Cpu,
    )
    .map_err(text)?;
    // A low noise level keeps the skip path from hiding the network.
    let flow = ["sd3", "flux"].iter().any(|n| name.starts_with(n));
    let options =
        StudentOptions { method: "test".into(), sigma_init: (!flow).then_some(2.0), ..StudentOptions::default() };
    let student = export::student(&teacher.network, teacher.network.params(), &teacher.card.card, &options);
    let student = student.map_err(text)?;
    let seen = [evaluate::student_inputs(&student, 5, 3).map_err(text)?];
    let expected = evaluate::samples(&student, &seen).map_err(text)?.remove(0);
    let size = expected.to_f32().iter().fold(1f32, |m, v| m.max(v.abs()));
    let forms = [
        ("plain", ShipOptions { optimise: false, portable: false, ..ShipOptions::default() }, 1e-4),
        ("f32", ShipOptions::default(), 1e-4),
        ("fused", ShipOptions { fuse: Fuse::All, ..ShipOptions::default() }, 1e-4),
        ("fp16", ShipOptions { precision: Precision::Fp16, ..ShipOptions::default() }, 2e-2),
        (
            "fp16-plain",
            ShipOptions { precision: Precision::Fp16, optimise: false, portable: false, ..ShipOptions::default() },
            2e-2,
        ),
    ];
    // Whatever the teacher's file stores and whoever optimised it: its student is in f32 and in ONNX's own operators.
    let graph = student.graph.as_ref().ok_or("no graph")?;
    if let Some(t) =
        graph.initializer.iter().find(|t| [DType::F16, DType::BF16].map(DType::to_onnx).contains(&t.data_type()))
    {
        return Err(format!("`{}` is in half precision", t.name()));
    }
    let theirs: Vec<_> = graph.node.iter().filter(|n| !n.domain().is_empty()).map(|n| n.op_type()).collect();
    if !theirs.iter().all(|op| ["FusedMatMul"].contains(op)) {
        return Err(format!("{theirs:?} are left"));
    }
    for (form, options, tolerance) in forms {
        let (model, report) = export::ship(student.clone(), &options).map_err(|e| format!("{form}: {e}"))?;
        // A linear attention whose sums come near nothing, divided by, enlarges what the embedding of the time loses in f16.
        // Folded, it is computed in f32; as written, the report says how far off the student is.
        if name.starts_with("sana") && form == "fp16-plain" {
            let said = report.warnings.iter().any(|w| w.contains("--keep-f32"));
            return if said { Ok(()) } else { Err(format!("{form}: no warning, off by {:?}", report.max_abs)) };
        }
        if !report.warnings.is_empty() {
            return Err(format!("{form}: {:?}", report.warnings));
        }
        for k in report.half.iter().flat_map(|h| &h.kept).filter(|k| k.reason.contains("what it reads is in")) {
            println!("student-{name} keeps {} {}", k.node, k.reason);
        }
        let path = folder.join(format!("student-{form}.onnx"));
        save::write(&model, &path).map_err(text)?;
        // As the exporter wrote it, with sequences, negative steps and Gemm in f16, tract need not take it: that is what the
        // portable form is for. What it takes must be right.
        let as_written = form.ends_with("plain") || !theirs.is_empty();
        for engine in [EngineKind::Ort, EngineKind::Tract] {
            let found = match run(&path, engine, &seen[0]) {
                Err(e) if as_written && engine == EngineKind::Tract => {
                    println!("student-{name} {form}, not portable: {e}");
                    continue;
                }
                found => found.map_err(|e| format!("{form} in {engine:?}: {e}"))?,
            };
            // tract sums in f16 where ONNX Runtime sums in f32, and a linear attention divides by what was summed.
            let summed = name.starts_with("sana") && form == "fp16" && engine == EngineKind::Tract;
            let tolerance = if summed { 1.5 * tolerance } else { tolerance };
            let error = evaluate::max_abs(&found, &expected);
            println!("student-{name} {form} {engine:?}: {error:.1e} of {size:.1}");
            if !(error <= tolerance * f64::from(size)) {
                return Err(format!("{form} in {engine:?}: off by {error:.1e} where values reach {size:.1}"));
            }
        }
        if let Some(r) = report.fused.filter(|r| form == "fused" && !(r.operators.is_empty() && r.kept.is_empty())) {
            println!("student-{name}: fused {:?}, kept {:?}", r.operators, r.kept);
        }
    }
    Ok(())
}

fn run(path: &Path, engine: EngineKind, inputs: &[(String, HostTensor)]) -> Result<HostTensor, String> {
    let options = EngineOptions { engine, ..EngineOptions::default() };
    let mut engine = runtime::open(path, &options).map_err(text)?;
    let named: Vec<(&str, &HostTensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let outputs = engine.run(&named).map_err(text)?;
    outputs.into_iter().find(|(n, _)| n == "sample").map(|(_, t)| t).ok_or_else(|| "no output `sample`".into())
}

/// `distill` as a user calls it: both stages, the export, and images of the student in both engines.
pub fn distil(name: &str, card: &[String], exporter: &Exporter) -> Result<(), String> {
    let folder = exporter.case(name)?;
    let run = folder.join("run");
    let _ = std::fs::remove_dir_all(&run);
    let disback = |args: &[&str]| -> Result<String, String> {
        let out = std::process::Command::new(env!("CARGO_BIN_EXE_disback")).args(args).current_dir(&folder).output();
        let out = out.map_err(text)?;
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        if out.status.success() { Ok(said) } else { Err(format!("{args:?}: {said}")) }
    };
    let mut args = vec!["distill", "model.onnx", "-o", "run", "--device", "cpu", "--threads", "1", "--batch", "2"];
    args.extend(["--nodes", "2", "--degrade-steps", "3", "--updates", "3", "--set", "log.samples=2"]);
    args.extend(["--set", "log.sample_steps=2", "--lr", "1e-4"]);
    args.extend(card.iter().flat_map(|entry| ["--card", entry.as_str()]));
    let said = disback(&args)?;
    let for_gpus = name.contains("-fused");
    if for_gpus != said.contains("is not compared with ONNX Runtime") {
        return Err(format!("about the comparison: {said}"));
    }
    for engine in ["ort", "tract"] {
        disback(&["sample", "run/student.onnx", "--engine", engine, "-n", "2", "-o", &format!("{engine}.png")])?;
    }
    let halves = ["export", "model.onnx", "--run", "run", "--precision", "fp16", "-o", "half.onnx"];
    let mut halves = halves.to_vec();
    halves.extend(card.iter().flat_map(|entry| ["--card", entry.as_str()]));
    disback(&halves)?;
    disback(&["sample", "half.onnx", "-n", "2", "-o", "half.png"]).map(drop)
}
