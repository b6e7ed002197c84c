//! The imported network against the PyTorch module it was exported from, live: values, gradients with respect to every
//! parameter, and that all and only the module's parameters are trained. Both exporters, static and dynamic batch,
//! opsets 17 to 23, with and without fusing.
#![cfg(feature = "train")]

mod support;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use disback::diffusion::{Conditions, Conversion, Denoiser, HostConditions, TeacherCard};
use disback::export::{self, StudentOptions};
use disback::graph::{Model, save};
use disback::runtime::student::{SampleRequest, Student};
use disback::runtime::{EngineKind, EngineOptions};
use disback::torch::{Forward, ImportOptions, Network, convert, params::load_tensors};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

fn npz(path: &Path) -> HashMap<String, Tensor> {
    let arrays = disback::io::npy::read_npz(path).unwrap();
    arrays.into_iter().map(|(n, t)| (n, convert::to_torch(&t).unwrap())).collect()
}

fn number(t: &Tensor) -> f64 {
    t.double_value(&[])
}

/// |ours - theirs| / |theirs| in L2.
fn relative(ours: &Tensor, theirs: &Tensor) -> f64 {
    let (a, b) = (ours.to_kind(Kind::Double).flatten(0, -1), theirs.to_kind(Kind::Double).flatten(0, -1));
    if a.size() != b.size() {
        return f64::INFINITY;
    }
    number(&(&a - &b).norm()) / number(&b.norm()).max(1e-12)
}

fn check(case: &Path, fuse: bool) -> Result<(), String> {
    let options = ImportOptions { fuse, ..ImportOptions::default() };
    let model = Model::load(&case.join("model.onnx")).map_err(|e| e.to_string())?;
    let net = Network::import(model, &options, Device::Cpu).map_err(|e| e.to_string())?;
    net.params().set_requires_grad(true).unwrap();
    let inputs = npz(&case.join("inputs.npz"));
    let named: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    // Twice: the first run specialises the plan, the second uses what it kept.
    net.forward(&named).map_err(|e| e.to_string())?;
    let (_, out) = net.forward(&named).map_err(|e| e.to_string())?.remove(0);
    let expected = npz(&case.join("expected.npz")).into_values().next().unwrap();
    let error = number(&(&out - &expected).abs().max()) / number(&expected.std(true));
    if error > 1e-5 {
        return Err(format!("output differs by {error:.1e} of its standard deviation"));
    }
    let grads: HashMap<String, Tensor> = load_tensors(&case.join("grads.safetensors")).unwrap().into_iter().collect();
    (&out * &grads["R"]).sum(Kind::Float).backward();

    let native: usize = grads.iter().filter(|(n, _)| *n != "R").map(|(_, t)| t.numel()).sum();
    if net.params().elements() != native {
        let buffers: Vec<_> = net.shared().buffers.iter().map(|b| format!("{} ({})", b.name, b.reason)).collect();
        return Err(format!(
            "{} elements are trained, the module has {native}\n    parameters {:?}\n    buffers {buffers:?}",
            net.params().elements(),
            net.params().names()
        ));
    }
    let map: Vec<Value> = serde_json::from_slice(&std::fs::read(case.join("map.json")).unwrap()).unwrap();
    // Which initializers may hold a native parameter: several where the exporter merged tensors of equal bytes.
    let mut candidates: HashMap<&str, Vec<(&str, bool)>> = HashMap::new();
    for entry in &map {
        let held = (entry["onnx"].as_str().unwrap(), entry["transposed"].as_bool().unwrap());
        for native in entry["natives"].as_array().unwrap() {
            candidates.entry(native.as_str().unwrap()).or_default().push(held);
        }
    }
    // Each native gradient must be found once, in a parameter of its own.
    let mut free: Vec<(&str, Tensor)> = net.params().iter().map(|(n, t)| (n, t.grad())).collect();
    let mut worst: f64 = 0.0;
    for (native, theirs) in grads.iter().filter(|(n, _)| *n != "R") {
        let held = candidates.get(native.as_str()).ok_or(format!("no initializer holds `{native}`"))?;
        let best = free
            .iter()
            .enumerate()
            .filter_map(|(i, (name, grad))| {
                let base = name.split('#').next();
                let (_, transposed) = held.iter().find(|(n, _)| Some(*n) == base)?;
                let grad = if !grad.defined() {
                    return None;
                } else if *transposed {
                    grad.transpose(0, 1)
                } else {
                    grad.shallow_clone()
                };
                Some((i, relative(&grad, theirs)))
            })
            .min_by(|a, b| a.1.total_cmp(&b.1));
        let (at, error) = best.ok_or(format!("no parameter with a gradient is left for `{native}`"))?;
        // A bias before a norm has a gradient of zero: what is left there is rounding.
        let vanishing = number(&theirs.norm()) < 1e-5;
        if error > 1e-4 && !vanishing {
            return Err(format!("gradient of `{native}` differs by {error:.1e}"));
        }
        worst = if vanishing { worst } else { worst.max(error) };
        drop(free.swap_remove(at));
    }
    println!(
        "{} fuse={fuse}: output {error:.1e}, gradients {worst:.1e}, fused {:?}, near misses {:?}",
        case.file_name().unwrap().to_string_lossy(),
        net.shared().fused.counts(),
        net.shared().fused.near_misses.iter().map(|m| (m.pattern, m.reason.as_str())).collect::<Vec<_>>(),
    );
    Ok(())
}

/// The exported cases, made once.
fn corpus() -> &'static (PathBuf, Vec<String>) {
    static CORPUS: OnceLock<(PathBuf, Vec<String>)> = OnceLock::new();
    CORPUS.get_or_init(|| {
        let out = support::folder("native");
        support::run_python("tests/python/native_unet.py", &[out.to_str().unwrap()]);
        let cases: Vec<String> = serde_json::from_slice(&std::fs::read(out.join("cases.json")).unwrap()).unwrap();
        assert!(cases.len() >= 18, "{} cases", cases.len());
        (out, cases)
    })
}

/// The digits networks predict the clean image, the diffusers ones are taken for epsilon networks.
fn card(case: &str) -> TeacherCard {
    let text = if case.starts_with("digits") {
        r#"sample = "x"
        time = "sigma"
        output = "denoised"
        prediction = "denoised"
        time_unit = "sigma"
        shape = [1, 8, 8]
        range = [-1.0, 1.0]
        schedule = { kind = "edm" }
        conditions.labels = { kind = "class-index", classes = 10, null = 10 }"#
    } else {
        r#"sample = "sample"
        time = "timestep"
        output = "out_sample"
        prediction = "epsilon"
        time_unit = "step"
        shape = [3, 16, 16]
        schedule = { kind = "vp", betas = "scaled-linear", beta_start = 0.00085, beta_end = 0.012 }
        conditions.class_labels = { kind = "class-index", classes = 4 }"#
    };
    toml::from_str(text).unwrap()
}

/// Writes the student of a case and returns what ONNX Runtime and tract make of it beside libtorch.
fn student_errors(folder: &Path, case: &str) -> Result<(f64, f64), String> {
    let text = |e: disback::Error| e.to_string();
    let net = Network::load(&folder.join("model.onnx"), Device::Cpu).map_err(text)?;
    // Other weights than the file's, so that a file that kept its own would be seen.
    let params = net.params().deep_copy(Device::Cpu).map_err(text)?;
    for (k, t) in params.tensors().iter().enumerate() {
        let noise = disback::noise::image_noise(7, k as u64, t.numel());
        let mut t = t.shallow_clone();
        let _ = t.g_add_(&(Tensor::from_slice(&noise).reshape(t.size()) * 0.01));
    }
    let card = card(case);
    let options = StudentOptions { method: "test".into(), sigma_init: Some(5.0), ..StudentOptions::default() };
    let model = export::student(&net, &params, &card, &options).map_err(text)?;
    let path = folder.join("student.onnx");
    save::write(&model, &path).map_err(text)?;
    save::write(&export::same_graph(&net, &params, &card, &options).map_err(text)?, &folder.join("same.onnx"))
        .map_err(text)?;
    let nodes = &model.graph.as_ref().unwrap().node;
    if let Some(n) = nodes.iter().find(|n| matches!(n.op_type(), "Sin" | "Cos")) {
        return Err(format!("the time embedding is still computed: {} `{}`", n.op_type(), n.name()));
    }

    // The student as it was trained: the teacher's network with these weights at the start of the schedule.
    let trained = net.duplicate().map_err(text)?;
    trained.params().copy_from(&params).map_err(text)?;
    let start = Conversion::new(&card).map_err(text)?.at_start(options.sigma_init).map_err(text)?;
    let specs: Vec<_> = net.inputs().iter().map(disback::run::teacher::spec).collect();
    let denoiser = Denoiser::new(Box::new(trained), Arc::new(card.clone()), &specs).map_err(text)?;
    let rows = if case.ends_with("static") { 3 } else { 5 };
    let request = SampleRequest { batch: rows, ..SampleRequest::default() };
    let conditions = HostConditions::of_images(&card, 0, 0, rows).map_err(text)?;
    let z = Tensor::from_slice(&disback::noise::batch_noise(0, 0, rows, card.sample_len()));
    let z = z.reshape(card.batch_of(rows).iter().map(|d| *d as i64).collect::<Vec<_>>());
    let expected = tch::no_grad(|| {
        let x0 = denoiser.generate(&z, &Conditions::from_host(&conditions, Device::Cpu)?, &start)?;
        convert::to_host(&card.range.map_or(x0.shallow_clone(), |[low, high]| x0.clamp(low, high)))
    })
    .map_err(text)?
    .to_f32();
    let error = |kind| -> Result<f64, String> {
        let engine = EngineOptions { engine: kind, ..EngineOptions::default() };
        let mut student = Student::open(&path, &engine).map_err(text)?;
        let images = student.sample(&request, 0, rows).map_err(text)?.to_f32();
        Ok(images.iter().zip(&expected).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max))
    };
    Ok((error(EngineKind::Ort)?, error(EngineKind::Tract)?))
}

#[test]
fn students_are_the_same_in_libtorch_onnx_runtime_and_tract() {
    let (out, cases) = corpus();
    let mut failures = Vec::new();
    for case in cases.iter().filter(|c| !c.starts_with("fresh")) {
        match student_errors(&out.join(case), case) {
            Ok((ort, tract)) if ort <= 1e-4 && tract <= 1e-4 => {
                println!("{case}: ONNX Runtime {ort:.1e}, tract {tract:.1e}")
            }
            Ok((ort, tract)) => failures.push(format!("{case}: ONNX Runtime {ort:.1e}, tract {tract:.1e}")),
            Err(e) => failures.push(format!("{case}: {e}")),
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    // A second opinion on the files themselves.
    support::run_python("tests/python/check_models.py", &[out.to_str().unwrap()]);
}

#[test]
fn values_and_gradients_are_the_native_modules() {
    let (out, cases) = corpus();
    let mut failures = Vec::new();
    for case in cases {
        for fuse in [true, false] {
            if let Err(e) = check(&out.join(case), fuse) {
                failures.push(format!("{case} fuse={fuse}: {e}"));
            }
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}
