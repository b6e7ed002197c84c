//! What ships: students of a DDPM++-like and a DiT network and of the digits teacher, in every form that `export` writes,
//! in every engine that is here.
#![cfg(all(feature = "train", feature = "ort", feature = "tract"))]

mod support;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use disback::export::{self, Precision, ShipOptions, ShipReport, StudentOptions};
use disback::graph::edit;
use disback::graph::save;
use disback::io::images::quantise;
use disback::onnx::ModelProto;
use disback::passes::evaluate;
use disback::passes::fuse::Fuse;
use disback::run::Teacher;
use disback::runtime::student::{SampleRequest, Student, StudentInfo};
use disback::runtime::{self, EngineKind, EngineOptions};
use disback::tensor::DType;
use disback::torch::Forward;
use disback::verify::{self, Target, Verification, VerifyOptions};
use tch::Device;

/// Teachers with random weights, made once.
fn networks() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let out = support::folder("ship-networks");
        support::run_python("tests/python/ship_networks.py", &[out.to_str().unwrap()]);
        out
    })
}

struct Case {
    teacher: Teacher,
    student: ModelProto,
    sigma: Option<f64>,
}

fn case(path: &Path, sigma: Option<f64>) -> Case {
    let teacher = Teacher::load(path, &Default::default(), Device::Cpu).unwrap();
    let options = StudentOptions { method: "test".into(), sigma_init: sigma, ..StudentOptions::default() };
    let student = export::student(&teacher.network, teacher.network.params(), &teacher.card.card, &options).unwrap();
    Case { teacher, student, sigma }
}

fn network(name: &str) -> Case {
    // A low noise level keeps the skip path from hiding the network; a flow starts at t = 1.
    case(&networks().join(name).join("teacher.onnx"), if name.starts_with("dit") { None } else { Some(2.0) })
}

fn digits() -> Case {
    case(&support::root().join("examples/digits/teacher.onnx"), Some(2.5))
}

fn ship(case: &Case, options: &ShipOptions, name: &str) -> (PathBuf, ModelProto, ShipReport) {
    let (model, report) = export::ship(case.student.clone(), options).unwrap_or_else(|e| panic!("{name}: {e}"));
    let path = support::folder(&format!("ship-{name}")).join("student.onnx");
    save::write(&model, &path).unwrap();
    (path, model, report)
}

fn checked(case: &Case, path: &Path, name: &str) -> Verification {
    let found = verified(case, path, name);
    assert!(found.ok, "{name}: {:#?}", found.engines);
    found
}

/// What every engine makes of a file, beside the student's own weights.
fn verified(case: &Case, path: &Path, name: &str) -> Verification {
    let options = VerifyOptions { images: 3, python: Some(support::python()), ..VerifyOptions::default() };
    let make = |request: &SampleRequest, count: usize| {
        verify::reference::of_weights(&case.teacher, case.teacher.network.params(), case.sigma, request, count)
    };
    let found = verify::verify(path, &options, &[], Some(&make)).unwrap();
    let table: Vec<String> = found
        .engines
        .iter()
        .map(|e| format!("{} {}: {:?} {}", e.name, e.version, e.max_abs, e.error.as_deref().unwrap_or("")))
        .collect();
    println!("{name} (tolerance {:.0e}, checker {}):\n  {}", found.tolerance, found.checker.by, table.join("\n  "));
    assert!(found.checker.ok && found.checker.by.contains("full_check"), "{name}: {:?}", found.checker);
    found
}

fn nodes(model: &ModelProto, op: &str) -> usize {
    model.graph.as_ref().unwrap().node.iter().filter(|n| n.op_type() == op).count()
}

/// Whether a value is a weight stored in 8 bits, with the Reshape that keeps ONNX Runtime from computing in them.
fn i8_behind_reshape(model: &ModelProto, value: &str) -> bool {
    let nodes = &model.graph.as_ref().unwrap().node;
    let maker = |v: &str| nodes.iter().find(|n| n.output.iter().any(|o| o == v));
    maker(value).is_some_and(|n| {
        n.op_type() == "Reshape" && maker(&n.input[0]).is_some_and(|d| d.op_type() == "DequantizeLinear")
    })
}

fn sample(path: &Path, engine: EngineKind, count: usize) -> Vec<f32> {
    let options = EngineOptions { engine, ..EngineOptions::default() };
    let request = SampleRequest { seed: 3, batch: count, ..SampleRequest::default() };
    Student::open(path, &options).unwrap().sample(&request, 0, count).unwrap().to_f32()
}

#[test]
fn networks_of_two_families_agree_everywhere_in_f32_and_fp16() {
    for name in ["ddpmpp-dynamic", "ddpmpp-static", "dit-dynamic"] {
        let case = network(name);
        for precision in [Precision::F32, Precision::Fp16] {
            let label = format!("{name}-{}", precision.name());
            let (path, model, report) = ship(&case, &ShipOptions { precision, ..ShipOptions::default() }, &label);
            assert!(report.not_portable.is_empty(), "{label}: {:?}", report.not_portable);
            let simple = report.simplified.unwrap();
            assert!(simple.nodes_after < simple.nodes_before && nodes(&model, "Shape") == 0, "{label}: {simple:?}");
            let found = checked(&case, &path, &label);
            for engine in ["onnxruntime", "tract", "libtorch", "openvino"] {
                let e =
                    found.engines.iter().find(|e| e.name == engine).unwrap_or_else(|| panic!("{label}: no {engine}"));
                assert!(e.ok, "{label}: {e:?}");
            }
            if let Some(half) = &report.half {
                assert!(half.nodes > 20 && half.max_abs > 0.0 && half.max_abs < 2e-2, "{label}: {half:?}");
                assert!(half.kept.iter().all(|k| !k.reason.is_empty()));
                let all = std::fs::metadata(&path).unwrap().len();
                assert!(all < 6 * std::fs::metadata(networks().join(name).join("teacher.onnx")).unwrap().len() / 10);
            }
        }
    }
}

#[test]
fn fused_operators_agree_everywhere() {
    for (name, expected) in [
        ("ddpmpp-dynamic", vec!["GroupNormalization"]),
        ("dit-dynamic", vec!["Attention", "Gelu", "LayerNormalization"]),
    ] {
        let case = network(name);
        let options = ShipOptions { opset: Some(23), fuse: Fuse::All, ..ShipOptions::default() };
        let label = format!("{name}-fused");
        let (path, model, report) = ship(&case, &options, &label);
        let written = report.fused.unwrap();
        println!("{label}: {:?}, kept {:?}", written.operators, written.kept);
        assert!(report.max_abs.unwrap() < 1e-4);
        for op in expected {
            let n = written.operators.get(op).copied().unwrap_or_default() + before(&case, op);
            assert!(n > 0 && nodes(&model, op) == n, "{label}: {op} {written:?}");
        }
        let found = verified(&case, &path, &label);
        for engine in ["onnxruntime", "tract", "libtorch", "openvino"] {
            let e = found.engines.iter().find(|e| e.name == engine).unwrap_or_else(|| panic!("{label}: no {engine}"));
            assert!(e.ok, "{label}: {e:?}");
        }
        // OpenCV takes the approximate Gelu for the exact one, and nothing else amiss.
        let opencv = found.engines.iter().find(|e| e.name == "opencv");
        assert!(opencv.is_none_or(|e| e.max_abs.is_some_and(|d| d < 1e-2)), "{label}: {opencv:?}");
    }
}

/// Nodes of an operator that the student has before anything is fused.
fn before(case: &Case, op: &str) -> usize {
    nodes(&case.student, op)
}

#[test]
fn digits_in_every_form() {
    let case = &digits();
    let (plain, model, report) = ship(case, &ShipOptions::default(), "digits");
    assert!(report.max_abs.unwrap() < 1e-5 && nodes(&model, "Identity") == 0, "{report:?}");
    let found = checked(case, &plain, "digits");
    assert!(found.engines.iter().all(|e| e.ok), "{:?}", found.engines);
    let reference = sample(&plain, EngineKind::Ort, 4);
    // Weights in a file of their own: every engine finds them, libtorch too.
    let apart = support::folder("ship-digits-apart").join("student.onnx");
    save::write_with_limit(&model, &apart, 0).unwrap();
    assert!(apart.with_extension("onnx.data").is_file());
    let found = checked(case, &apart, "digits-apart");
    assert!(found.engines.iter().all(|e| e.ok), "{:?}", found.engines);

    let fixed = ShipOptions { batch: Some(4), opset: Some(21), ..ShipOptions::default() };
    let (path, model, report) = ship(case, &fixed, "digits-fixed");
    assert_eq!((report.opset, nodes(&model, "Shape")), (21, 0));
    checked(case, &path, "digits-fixed");
    for engine in [EngineKind::Ort, EngineKind::Tract] {
        let worst = sample(&path, engine, 4).iter().zip(&reference).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-5, "{engine:?}: {worst}");
    }

    let int8 = ShipOptions { precision: Precision::Int8, ..ShipOptions::default() };
    let (path, model, report) = ship(case, &int8, "digits-int8");
    let q = report.int8.clone().unwrap();
    assert!(
        q.tensors > 5 && q.max_abs > 0.0 && q.max_abs <= 0.1 && nodes(&model, "DequantizeLinear") == q.tensors,
        "{q:?}"
    );
    let sizes = [&path, &plain].map(|p| std::fs::metadata(p).unwrap().len());
    assert!(sizes[0] * 2 < sizes[1], "{sizes:?}");
    checked(case, &path, "digits-int8");
    // Products too: engines agree as in f32, though ONNX Runtime would round their activations to 8 bits.
    let dit = network("dit-dynamic");
    let (path, model, _) = ship(&dit, &int8, "dit-int8");
    let products = model.graph.as_ref().unwrap().node.iter().filter(|n| n.op_type() == "MatMul");
    assert!(products.flat_map(|n| &n.input).any(|i| i8_behind_reshape(&model, i)));
    let alone = verify::verify(&path, &VerifyOptions { images: 3, ..VerifyOptions::default() }, &[], None).unwrap();
    assert!(alone.ok && alone.tolerance < 1e-3 && alone.engines.len() >= 3, "{:?}", alone.engines);

    let dynamic = ShipOptions { precision: Precision::Int8Dynamic, ..ShipOptions::default() };
    let (path, model, report) = ship(case, &dynamic, "digits-int8-dynamic");
    let q = report.int8.clone().unwrap();
    println!("digits-int8-dynamic: {q:?}");
    assert!(q.tensors > 5 && q.max_abs > 0.0 && q.max_abs <= 0.1, "{q:?}");
    assert_eq!(nodes(&model, "ConvInteger") + nodes(&model, "MatMulInteger"), q.tensors);
    checked(case, &path, "digits-int8-dynamic");

    let bf16 = ShipOptions { precision: Precision::Bf16, ..ShipOptions::default() };
    let (path, model, report) = ship(case, &bf16, "digits-bf16");
    let half = report.half.unwrap();
    assert!(half.nodes > 5 && half.max_abs > 1e-4 && half.checked.contains("rounded to bf16"), "{half:?}");
    assert!(model.graph.unwrap().initializer.iter().any(|t| t.data_type() == DType::BF16.to_onnx()));
    let found = checked(case, &path, "digits-bf16");
    // ONNX Runtime and tract have no bf16 on the CPU and say so; OpenVINO and libtorch compute what the run's weights do.
    for e in &found.engines {
        match e.name.as_str() {
            "onnxruntime" | "tract" => {
                assert!(e.error.as_ref().is_some_and(|t| t.contains("no bf16 on the CPU")), "{e:?}")
            }
            "openvino" | "libtorch" => assert!(e.ok && e.max_abs < Some(5e-2), "{e:?}"),
            _ => {}
        }
    }
}

#[test]
fn images_and_decoders_are_appended() {
    let case = &digits();
    let (path, model, _) = ship(case, &ShipOptions { image: true, ..ShipOptions::default() }, "digits-image");
    assert!(verify::peers::checker(&support::python(), &path).unwrap().unwrap().ok);
    let inputs = evaluate::student_inputs(&model, 5, 6).unwrap();
    for engine in [EngineKind::Ort, EngineKind::Tract] {
        let mut engine = runtime::open(&path, &EngineOptions { engine, ..EngineOptions::default() }).unwrap();
        let named: Vec<_> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let out = engine.run(&named).unwrap();
        let find = |name: &str| out.iter().find(|(n, _)| n == name).unwrap().1.clone();
        let (floats, bytes) = (find("sample"), find("image"));
        assert_eq!((bytes.dtype(), bytes.shape()), (DType::U8, &[6, 8, 8, 1][..]));
        let want: Vec<u8> = floats.to_f64().iter().map(|&v| quantise(v, [-1.0, 1.0])).collect();
        assert_eq!(bytes.values::<u8>().unwrap(), want, "{}", engine.name());
    }

    let latents = network("dit-dynamic");
    let decoder = networks().join("decoder/decoder.onnx");
    let options = ShipOptions { decoder: Some((decoder.clone(), [-1.0, 1.0])), image: true, ..ShipOptions::default() };
    let (path, model, _) = ship(&latents, &options, "dit-decoded");
    let info = StudentInfo::from_model(&model).unwrap();
    assert_eq!((info.noise_shape, info.shape, info.range), (vec![4, 16, 16], vec![3, 32, 32], Some([-1.0, 1.0])));
    assert!(verify::peers::checker(&support::python(), &path).unwrap().unwrap().ok);
    // By hand: the latents over the card's scale, through the decoder alone.
    let (alone, ..) = ship(&latents, &ShipOptions::default(), "dit-latents");
    let z: Vec<f32> = sample(&alone, EngineKind::Ort, 2).iter().map(|v| v / 0.5).collect();
    let mut engine =
        runtime::open(&decoder, &EngineOptions { engine: EngineKind::Ort, ..EngineOptions::default() }).unwrap();
    let z = disback::HostTensor::new(&[2, 4, 16, 16], &z).unwrap();
    let want = engine.run(&[("latent", &z)]).unwrap().remove(0).1.to_f32();
    for kind in [EngineKind::Ort, EngineKind::Tract] {
        let got = sample(&path, kind, 2);
        let worst = got.iter().zip(&want).map(|(a, b)| (a - b.clamp(-1.0, 1.0)).abs()).fold(0.0, f32::max);
        assert!(got.len() == want.len() && worst < 1e-4, "{kind:?}: {worst}");
    }
    let e = export::ship(case.student.clone(), &options).unwrap_err();
    assert!(e.exit_code() == 2 && e.to_string().contains("makes images, not latents"), "{e}");
}

#[test]
fn values_beyond_f16_stay_in_f32_and_are_named() {
    // The class embedding of the digits network made huge and scaled back: only f32 holds it.
    let mut model = digits().student;
    let graph = model.graph.as_mut().unwrap();
    let at = graph.node.iter().position(|n| n.op_type() == "Conv").unwrap();
    let value = graph.node[at].output[0].clone();
    for (name, v) in [("up", 1e6f32), ("down", 1e-6)] {
        graph.initializer.push(disback::graph::tensors::to_proto(name, &disback::HostTensor::scalar(v)));
    }
    edit::redirect(graph, &[(value.clone(), "small".to_owned())].into());
    graph.node.insert(at + 1, edit::node("Mul", &[&value, "up"], "large"));
    graph.node.insert(at + 2, edit::node("Mul", &["large", "down"], "small"));
    let fp16 = ShipOptions { precision: Precision::Fp16, ..ShipOptions::default() };
    let (shipped, report) = export::ship(model.clone(), &fp16).unwrap();
    let half = report.half.unwrap();
    let kept: Vec<&str> =
        half.kept.iter().filter(|k| k.reason.contains("f16 ends at 65504")).map(|k| k.node.as_str()).collect();
    assert_eq!(kept, ["Mul node `disback/large`", "Mul node `disback/small`"], "{:?}", half.kept);
    let inputs = vec![evaluate::student_inputs(&shipped, 1, 4).unwrap()];
    let out = evaluate::samples(&shipped, &inputs).unwrap();
    assert!(out[0].to_f32().iter().all(|v| v.is_finite()));
    // A network that is broken in f32 already is refused, not shipped.
    let graph = model.graph.as_mut().unwrap();
    let t = graph.initializer.iter_mut().find(|t| t.name() == "down").unwrap();
    *t = disback::graph::tensors::to_proto("down", &disback::HostTensor::scalar(f32::NAN));
    let e = export::ship(model, &fp16).unwrap_err();
    assert!(e.to_string().contains("gives NaN or infinity") && e.to_string().contains("its weight `down`"), "{e}");
}

#[test]
fn options_that_do_not_fit_are_refused() {
    let case = &digits();
    let refused = |options: ShipOptions| export::ship(case.student.clone(), &options).unwrap_err();
    let e = refused(ShipOptions { opset: Some(12), ..ShipOptions::default() });
    assert!(e.exit_code() == 2 && e.to_string().contains("--opset 12"), "{e}");
    let e = refused(ShipOptions { batch: Some(0), ..ShipOptions::default() });
    assert!(e.exit_code() == 2 && e.to_string().contains("--batch 0"), "{e}");
    let e = refused(ShipOptions { precision: Precision::Int8, int8_limit: 1e-9, ..ShipOptions::default() });
    assert!(e.exit_code() == 2 && e.to_string().contains("--int8-limit"), "{e}");
    let fixed =
        export::ship(case.student.clone(), &ShipOptions { batch: Some(2), ..ShipOptions::default() }).unwrap().0;
    let e = export::ship(fixed, &ShipOptions { batch: Some(3), ..ShipOptions::default() }).unwrap_err();
    assert!(e.to_string().contains("fixes the batch at 2"), "{e}");
    let half =
        export::ship(case.student.clone(), &ShipOptions { precision: Precision::Fp16, ..ShipOptions::default() })
            .unwrap()
            .0;
    let e = export::ship(half, &ShipOptions { precision: Precision::Int8, ..ShipOptions::default() }).unwrap_err();
    assert!(e.to_string().contains("stored in fp16 already"), "{e}");
    let e = export::ship(ModelProto::default(), &ShipOptions::default()).unwrap_err();
    assert!(e.to_string().contains("not a student"), "{e}");
}

#[test]
fn verify_names_what_is_wrong() {
    let case = &digits();
    let (path, model, _) = ship(case, &ShipOptions::default(), "digits-wrong");
    // Other weights than the run's.
    let mut other = model.clone();
    let t = other.graph.as_mut().unwrap().initializer.iter_mut().find(|t| t.dims.len() == 4).unwrap();
    let values: Vec<f32> = disback::graph::tensors::from_proto(t).unwrap().to_f32().iter().map(|v| v * 1.5).collect();
    let shape: Vec<usize> = t.dims.iter().map(|&d| d as usize).collect();
    *t = disback::graph::tensors::to_proto(t.name(), &disback::HostTensor::new(&shape, &values).unwrap());
    save::write(&other, &path).unwrap();
    let make = |request: &SampleRequest, count: usize| {
        verify::reference::of_weights(&case.teacher, case.teacher.network.params(), case.sigma, request, count)
    };
    let options = VerifyOptions { images: 2, ..VerifyOptions::default() };
    let found = verify::verify(&path, &options, &[Target::Tensorrt], Some(&make)).unwrap();
    assert!(!found.ok && found.engines.iter().all(|e| !e.ok && e.uint8_differing > Some(0)), "{:?}", found.engines);
    assert!(found.targets[0].1.is_empty(), "{:?}", found.targets);
    // The engines among themselves agree: without the run nothing is wrong with the file.
    assert!(verify::verify(&path, &options, &[], None).unwrap().ok);
}
