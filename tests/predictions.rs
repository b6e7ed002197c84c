//! Every prediction on every schedule that it goes with, at the noise level where the family starts by default: the student's
//! file agrees in all engines, on a network at random and on one that is nearly trained. Where `x0 = skip x + out F` is a
//! small difference of large terms, the agreement is f32's of these terms; what is wrong by more is found.
#![cfg(all(feature = "train", feature = "ort", feature = "tract"))]

use disback::diffusion::schedule::{Betas, Direction, ScheduleSpec};
use disback::diffusion::{Conversion, Prediction, TeacherCard, TimeUnit};
use disback::export::{self, ShipOptions, StudentOptions};
use disback::graph::{Model, save, tensors};
use disback::noise::image_noise;
use disback::onnx::tensor_shape_proto::{Dimension, dimension};
use disback::onnx::type_proto::{self, Tensor as TensorType};
use disback::onnx::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorShapeProto, TypeProto, ValueInfoProto,
};
use disback::runtime::student::StudentInfo;
use disback::tensor::HostTensor;
use disback::torch::{Forward, ImportOptions, Network};
use disback::verify::{Verification, VerifyOptions, verify};

const HIDDEN: usize = 8;
const SHAPE: [usize; 3] = [3, 8, 8];

fn node(op: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto {
        op_type: Some(op.into()),
        name: Some(output.into()),
        input: inputs.iter().map(|s| s.to_string()).collect(),
        output: vec![output.into()],
        ..NodeProto::default()
    }
}

fn value(name: &str, rest: &[usize]) -> ValueInfoProto {
    let dim = |value| Dimension { value: Some(value), ..Dimension::default() };
    let mut dims = vec![dim(dimension::Value::DimParam("batch".into()))];
    dims.extend(rest.iter().map(|d| dim(dimension::Value::DimValue(*d as i64))));
    let tensor = TensorType { elem_type: Some(1), shape: Some(TensorShapeProto { dim: dims }) };
    let r#type = TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..TypeProto::default() };
    ValueInfoProto { name: Some(name.into()), r#type: Some(r#type), ..ValueInfoProto::default() }
}

/// `F(x, t) = keep x + part conv(tanh(conv(x) + w sin(t / 100)))`.
fn network(keep: f32, part: f32) -> ModelProto {
    let c = SHAPE[0];
    let weights = |k: u64, shape: &[usize], scale: f32| {
        let values: Vec<f32> = image_noise(5, k, shape.iter().product()).into_iter().map(|v| v * scale).collect();
        HostTensor::new(shape, &values).unwrap()
    };
    let tensors = [
        ("w1", weights(0, &[HIDDEN, c, 3, 3], 0.2)),
        ("b1", weights(1, &[HIDDEN], 0.1)),
        ("wt", weights(2, &[1, HIDDEN], 1.0)),
        ("w2", weights(3, &[c, HIDDEN, 3, 3], 0.1)),
        ("hundredth", HostTensor::scalar(0.01f32)),
        ("keep", HostTensor::scalar(keep)),
        ("part", HostTensor::scalar(part)),
        ("column", HostTensor::vec(&[-1i64, 1])),
        ("channels", HostTensor::vec(&[-1i64, HIDDEN as i64, 1, 1])),
    ];
    let conv = |inputs: &[&str], output: &str| NodeProto {
        attribute: vec![AttributeProto {
            name: Some("pads".into()),
            r#type: Some(7),
            ints: vec![1; 4],
            ..AttributeProto::default()
        }],
        ..node("Conv", inputs, output)
    };
    let graph = GraphProto {
        name: Some("network".into()),
        node: vec![
            node("Mul", &["t", "hundredth"], "angle"),
            node("Sin", &["angle"], "wave"),
            node("Reshape", &["wave", "column"], "waves"),
            node("MatMul", &["waves", "wt"], "embedding"),
            node("Reshape", &["embedding", "channels"], "shift"),
            conv(&["x", "w1", "b1"], "first"),
            node("Add", &["first", "shift"], "moved"),
            node("Tanh", &["moved"], "bent"),
            conv(&["bent", "w2"], "second"),
            node("Mul", &["second", "part"], "learned"),
            node("Mul", &["x", "keep"], "kept"),
            node("Add", &["kept", "learned"], "y"),
        ],
        initializer: tensors.iter().map(|(name, t)| tensors::to_proto(name, t)).collect(),
        input: vec![value("x", &SHAPE), value("t", &[])],
        output: vec![value("y", &SHAPE)],
        ..GraphProto::default()
    };
    ModelProto {
        ir_version: Some(8),
        opset_import: vec![OperatorSetIdProto { domain: None, version: Some(17) }],
        graph: Some(graph),
        ..ModelProto::default()
    }
}

fn edm() -> ScheduleSpec {
    ScheduleSpec::Edm { sigma_min: 0.002, sigma_max: 80.0, rho: 7.0 }
}
fn ve() -> ScheduleSpec {
    ScheduleSpec::Edm { sigma_min: 0.02, sigma_max: 100.0, rho: 7.0 }
}
fn vp(betas: Betas) -> ScheduleSpec {
    ScheduleSpec::Vp { betas, beta_start: None, beta_end: None, steps: None, table: vec![] }
}
fn flow(shift: f64) -> ScheduleSpec {
    ScheduleSpec::Flow { shift, direction: Direction::DataToNoise }
}
fn trigflow() -> ScheduleSpec {
    ScheduleSpec::TrigFlow { sigma_min: 0.002, sigma_max: 80.0, scale: 0.5 }
}

fn cases() -> Vec<(&'static str, Prediction, ScheduleSpec)> {
    use Prediction::*;
    vec![
        ("denoised, EDM", Denoised, edm()),
        ("edm-raw, EDM", EdmRaw, edm()),
        ("consistency, EDM", Consistency, edm()),
        ("epsilon, EDM", Epsilon, edm()),
        ("v, EDM", V, edm()),
        ("scaled score, VE", ScaledScore, ve()),
        ("denoised, VP linear", Denoised, vp(Betas::Linear)),
        ("epsilon, VP linear", Epsilon, vp(Betas::Linear)),
        ("v, VP linear", V, vp(Betas::Linear)),
        ("scaled score, VP linear", ScaledScore, vp(Betas::Linear)),
        ("epsilon, VP scaled linear", Epsilon, vp(Betas::ScaledLinear)),
        ("v, VP scaled linear", V, vp(Betas::ScaledLinear)),
        // a = 5e-5 at the end: the terms are 20 000 times the sample.
        ("epsilon, VP cosine", Epsilon, vp(Betas::Cosine)),
        ("v, VP cosine", V, vp(Betas::Cosine)),
        ("flow", Flow, flow(1.0)),
        ("flow, shifted", Flow, flow(3.0)),
        ("flow from noise at time 0", Flow, ScheduleSpec::Flow { shift: 1.0, direction: Direction::NoiseToData }),
        ("denoised, flow", Denoised, flow(1.0)),
        ("trigflow", TrigFlow, trigflow()),
        ("denoised, trigflow", Denoised, trigflow()),
        ("epsilon, trigflow", Epsilon, trigflow()),
    ]
}

fn card(prediction: Prediction, schedule: ScheduleSpec) -> TeacherCard {
    let time_unit = match schedule {
        ScheduleSpec::Edm { .. } => TimeUnit::LnSigma4,
        ScheduleSpec::Vp { .. } => TimeUnit::Step,
        ScheduleSpec::Flow { .. } => TimeUnit::Thousand,
        ScheduleSpec::TrigFlow { .. } => TimeUnit::Radians,
    };
    TeacherCard {
        sample: "x".into(),
        time: "t".into(),
        output: "y".into(),
        prediction,
        time_unit,
        shape: SHAPE.to_vec(),
        modality: None,
        sample_rate: None,
        layout: Default::default(),
        // As latents have it: no range that would cut what differs.
        range: None,
        sigma_data: 0.5,
        latent_scale: 1.0,
        dataset: None,
        schedule,
        conditions: Default::default(),
        constants: Default::default(),
        concat: Vec::new(),
        dims: Default::default(),
    }
}

/// The student's file of a network, in every engine of this build.
fn verified(proto: ModelProto, card: &TeacherCard, python: bool) -> (ModelProto, Verification) {
    let network = Network::import(Model::from_proto(proto), &ImportOptions::default(), tch::Device::Cpu).unwrap();
    let options = StudentOptions { method: "test".into(), ..StudentOptions::default() };
    let made = export::student(&network, network.params(), card, &options).unwrap();
    let (made, _) = export::ship(made, &ShipOptions::default()).unwrap();
    let found = verification(&made, python);
    (made, found)
}

fn verification(model: &ModelProto, python: bool) -> Verification {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("student.onnx");
    save::write(model, &path).unwrap();
    let interpreter = concat!(env!("CARGO_MANIFEST_DIR"), "/.venv/bin/python");
    let options = VerifyOptions { python: python.then(|| interpreter.into()), ..VerifyOptions::default() };
    verify(&path, &options, &[], None).unwrap()
}

#[test]
fn students_agree_in_all_engines_whatever_the_network_predicts() {
    for (name, prediction, schedule) in cases() {
        let card = card(prediction, schedule);
        let start = Conversion::new(&card).unwrap().at_start(None).unwrap();
        let (skip, out) = (start.coefficients.skip, start.coefficients.out);
        // At the highest noise level a trained network all but undoes skip x: its sample is of order 1.
        for (kind, keep, part) in [("random", 0.0, 1.0), ("nearly trained", -skip / out, 0.005)] {
            let others = kind == "nearly trained" && matches!(name, "epsilon, VP linear" | "flow");
            let (made, found) = verified(network(keep as f32, part), &card, others);
            let scale = StudentInfo::from_model(&made).unwrap().rounding_scale;
            // The noise reaches about 4; the terms are skip x and out F.
            let terms = 4.0 * start.init_scale * skip.abs();
            assert!(scale >= 0.6 * terms && scale.is_finite(), "{name}, {kind}: {scale} for terms of {terms}");
            for engine in &found.engines {
                let apart = engine.max_abs.unwrap_or_else(|| panic!("{name}, {kind}: {engine:?}"));
                assert!(
                    apart <= 2e-6 * scale,
                    "{name}, {kind}: {} is {apart:.1e} away, scale {scale:.1e}",
                    engine.name
                );
            }
            assert!(found.ok && found.engines.len() >= 3, "{name}, {kind}: {found:?}");
        }
    }
}

#[test]
fn what_is_wrong_by_more_than_rounding_is_found() {
    let card = card(Prediction::Epsilon, vp(Betas::Linear));
    let (right, found) = verified(network(1.0, 0.005), &card, false);
    assert!(found.ok, "{found:?}");
    let reference = disback::passes::evaluate::student_inputs(&right, 0, 16).unwrap();
    let expected = disback::passes::evaluate::samples(&right, std::slice::from_ref(&reference)).unwrap().remove(0);
    // One weight of the network by a thousandth of its size.
    let mut wrong = right.clone();
    let weights = &mut wrong.graph.as_mut().unwrap().initializer;
    let keep = weights.iter_mut().find(|t| t.name() == "keep").unwrap();
    *keep = tensors::to_proto("keep", &HostTensor::scalar(1.001f32));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("student.onnx");
    save::write(&wrong, &path).unwrap();
    let reproduce = |_: &disback::runtime::student::SampleRequest, _: usize| {
        Ok(disback::verify::Reference {
            name: "the right one".into(),
            samples: expected.clone(),
            original_weights: false,
        })
    };
    let found = verify(&path, &VerifyOptions::default(), &[], Some(&reproduce)).unwrap();
    assert!(!found.ok && found.engines.iter().all(|e| !e.ok), "{found:?}");
}
