//! The whole way with an operator and an objective that disback does not know.

use std::path::{Path, PathBuf};

use disback::distill::objective::{Objective, Terms};
use disback::graph::Model;
use disback::run::{Finished, Request, Session, Teacher, TeacherOptions};
use disback::runtime::student::{SampleRequest, Student};
use disback::runtime::{EngineKind, EngineOptions};
use disback::torch::exec::kernel::{Kernel, one};
use disback::torch::{Forward, Operators};
use extend::{UnitGradient, operators, snake};
use tch::{Device, Kind, Tensor};

fn teacher() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("teacher.onnx")
}

/// A run of a few steps with the operator and the objective of this crate.
fn request(out: &Path) -> Request {
    let sets = ["device=cpu", "batch=8", "degrade.steps=4", "degrade.nodes=2", "backtrack.updates=4", "log.samples=4"];
    let request = Request::new(teacher(), out).operators(operators()).objective(UnitGradient { eps: 1e-3 });
    sets.into_iter().fold(request, Request::set)
}

#[test]
fn a_teacher_with_an_operator_of_its_own_becomes_a_plain_student() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let Finished::Distilled(made) = Session::open(request(&out)).unwrap().distill().unwrap() else {
        panic!("no student")
    };
    let student = Model::load(made.student()).unwrap();
    let graph = student.proto.graph.as_ref().unwrap();
    assert!(graph.node.iter().all(|n| n.domain() != "com.example"));
    let metadata = student.metadata();
    let objective = metadata.iter().find(|(k, _)| k == "disback.student.objective").map(|(_, v)| v.as_str());
    assert_eq!(objective, Some("com.example.unit-gradient"));
    let images = SampleRequest { seed: 3, classes: vec![1, 7], batch: 2, ..SampleRequest::default() };
    let sampled = |engine| {
        let options = EngineOptions { engine, ..EngineOptions::default() };
        Student::open(made.student(), &options).unwrap().sample(&images, 0, 2).unwrap().to_f32()
    };
    let (ours, theirs) = (sampled(EngineKind::Ort), sampled(EngineKind::Tract));
    let apart = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(apart < 1e-4 && ours.iter().any(|v| v.abs() > 1e-2), "{apart}");

    // The run knows what it was trained with; without it there is nothing to go on with.
    let without = Request { objective: None, resume: disback::run::Resume::Always, ..request(&out) };
    let e = Session::open(without).map(|_| ()).unwrap_err().to_string();
    assert!(e.contains("no objective `com.example.unit-gradient`"), "{e}");
}

#[test]
fn the_kernel_is_what_trains_and_its_weight_is_trained() {
    let options = TeacherOptions { operators: operators().into(), ..TeacherOptions::default() };
    let network = Teacher::load(&teacher(), &options, Device::Cpu).unwrap().network;
    let kernels = network.shared().graph.nodes.iter().filter(|n| n.domain == "com.example").count();
    assert_eq!(kernels, 3);
    let alphas = network.params().names().iter().filter(|n| n.ends_with("alpha")).count();
    assert_eq!(alphas, 3, "{:?}", network.params().names());
    // Without a kernel the same numbers come from the body.
    let options = TeacherOptions { operators: Operators::new().define(snake()).into(), ..TeacherOptions::default() };
    let plain = Teacher::load(&teacher(), &options, Device::Cpu).unwrap().network;
    assert!(plain.shared().graph.nodes.iter().all(|n| n.domain != "com.example"));
    let x = Tensor::randn([4, 1, 8, 8], (Kind::Float, Device::Cpu));
    let inputs = [
        ("x", &x),
        ("sigma", &Tensor::from_slice(&[0.1f32, 0.5, 2.0, 40.0])),
        ("labels", &Tensor::from_slice(&[0i64, 3, 9, 10])),
    ];
    let [ours, body] = [&network, &plain].map(|net| net.forward(&inputs).unwrap().remove(0).1);
    let apart = (ours - &body).abs().max().double_value(&[]) / body.std(true).double_value(&[]);
    assert!(apart < 1e-5, "{apart}");
}

#[test]
fn a_kernel_that_computes_something_else_is_found_before_the_first_step() {
    let dir = tempfile::tempdir().unwrap();
    let wrong = Operators::new()
        .define_with(snake(), |_| Ok(Kernel::new(|inputs| one(inputs.t(0)?.f_add(&inputs.t(0)?.f_sin()?)?))));
    let e = Session::open(request(&dir.path().join("run")).operators(wrong)).map(|_| ()).unwrap_err().to_string();
    assert!(e.contains("ONNX Runtime"), "{e}");
    assert!(!dir.path().join("run").exists());
}

#[test]
fn without_the_operator_the_file_is_refused_with_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let without = request(&dir.path().join("run")).operators(Operators::new());
    let e = Session::open(without).map(|_| ()).unwrap_err();
    assert!(e.to_string().contains("operator Snake of domain `com.example`"), "{e}");
    assert!(e.hint_text().is_some_and(|h| h.contains("adding-an-operator.md")), "{e}");
}

#[test]
fn the_objective_pushes_every_sample_as_far() {
    let x0 = Tensor::randn([5, 1, 2, 2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let sigma = Tensor::ones([5, 1, 1, 1], (Kind::Float, Device::Cpu));
    let [noise, target, fake] = [0, 1, 2].map(|_| Tensor::randn([5, 1, 2, 2], (Kind::Float, Device::Cpu)));
    let terms = Terms {
        x0: &x0,
        x_t: &(&x0 + &noise),
        noise: &noise,
        sigma: &sigma,
        target: &target,
        fake: Some(&fake),
        log_ratio: None,
    };
    UnitGradient { eps: 0.0 }.loss(&terms).unwrap().backward();
    // The loss is a mean over 20 numbers: each sample's gradient is g / (20 |g|), with |g| the root of its mean square.
    let g = &fake - &target;
    let dims: &[i64] = &[1, 2, 3];
    let expected = &g / g.square().mean_dim(dims, true, Kind::Float).sqrt() / 20.0;
    let apart = (x0.grad() - &expected).abs().max().double_value(&[]);
    assert!(apart < 1e-6, "{apart}");
}
