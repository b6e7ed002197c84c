//! What rewriting makes of graphs that have the forms in question, against the graphs as they were, in ONNX Runtime and tract.

use super::*;
use crate::onnx::{GraphProto, ModelProto};
use crate::runtime::student::{Request, Student, decode};
use crate::runtime::testing::{initializer, model, node, value};
use crate::runtime::{EngineKind, EngineOptions};
use crate::tensor::{DType, HostTensor};

const METADATA: &[(&str, &str)] = &[("disback.student.method", "test"), ("disback.range", "[-100.0, 100.0]")];

fn weights(shape: &[usize], seed: u64) -> HostTensor {
    let len = shape.iter().product();
    HostTensor::new(shape, &crate::noise::image_noise(seed, 0, len)).unwrap()
}

/// The graph's samples in an engine.
fn sample(model: &ModelProto, engine: EngineKind) -> Vec<f32> {
    let bytes = prost::Message::encode_to_vec(model);
    let options = EngineOptions { engine, ..EngineOptions::default() };
    let request = Request { seed: 4, batch: 3, ..Request::default() };
    Student::from_bytes(&bytes, &options).unwrap().sample(&request, 0, 3).unwrap().to_f32()
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

fn count(model: &ModelProto, op: &str) -> usize {
    model.graph.as_ref().unwrap().node.iter().filter(|n| n.op_type() == op).count()
}

/// Everything that the portable form does not have, on images of 2x6x6.
fn awkward(batch: &str) -> ModelProto {
    let ints = |name: &str, v: &[i64]| initializer(name, &HostTensor::vec(v));
    let with = |mut n: crate::onnx::NodeProto, attributes: Vec<crate::onnx::AttributeProto>| {
        n.attribute = attributes;
        n
    };
    let graph = GraphProto {
        node: vec![
            node("Slice", &["noise", "starts", "ends", "axes", "steps"], "turned"),
            with(node("SplitToSequence", &["turned", "one"], "pieces"), vec![edit::int_attribute("axis", 1)]),
            node("SequenceAt", &["pieces", "one"], "second"),
            node("SequenceAt", &["pieces", "minus_two"], "first"),
            with(node("Concat", &["second", "first"], "joined"), vec![edit::int_attribute("axis", 1)]),
            with(
                node("Conv", &["joined", "w"], "down"),
                vec![
                    edit::text_attribute("auto_pad", "SAME_LOWER"),
                    edit::ints_attribute("kernel_shape", &[4, 3]),
                    edit::ints_attribute("strides", &[2, 2]),
                ],
            ),
            node("Shape", &["noise"], "shape"),
            node("Gather", &["shape", "zero"], "rows"),
            with(node("Concat", &["rows", "rest"], "target"), vec![edit::int_attribute("axis", 0)]),
            node("Reshape", &["down", "target"], "small"),
            with(
                node("ConvTranspose", &["small", "v"], "up"),
                vec![
                    edit::text_attribute("auto_pad", "SAME_UPPER"),
                    edit::ints_attribute("kernel_shape", &[3, 3]),
                    edit::ints_attribute("strides", &[2, 2]),
                ],
            ),
            node("Identity", &["up"], "same"),
            node("Identity", &["same"], "sample"),
        ],
        initializer: vec![
            ints("starts", &[-1, 1]),
            ints("ends", &[i64::MIN, 100]),
            ints("axes", &[3, 2]),
            ints("steps", &[-1, 1]),
            initializer("one", &HostTensor::scalar(1i64)),
            initializer("minus_two", &HostTensor::scalar(-2i64)),
            ints("zero", &[0]),
            ints("rest", &[2, 3, 3]),
            initializer("w", &weights(&[2, 2, 4, 3], 1)),
            initializer("v", &weights(&[2, 2, 3, 3], 2)),
        ],
        input: vec![value("noise", DType::F32, &[batch, "2", "6", "6"])],
        output: vec![value("sample", DType::F32, &[batch, "2", "6", "6"])],
        ..GraphProto::default()
    };
    decode(&model(graph, METADATA)).unwrap()
}

#[test]
fn awkward_forms_become_plain_ones_of_the_same_values() {
    for batch in ["batch", "3"] {
        let before = awkward(batch);
        let expected = sample(&before, EngineKind::Ort);
        assert_eq!(portable::left_over(before.graph.as_ref().unwrap()).len(), 6);
        let (after, report) = ship(before, &ShipOptions::default()).unwrap();
        assert!(report.not_portable.is_empty(), "{:?}", report.not_portable);
        assert_eq!(report.portable.len(), 4, "{:?}", report.portable);
        for gone in ["Shape", "SplitToSequence", "SequenceAt", "Constant"] {
            assert_eq!(count(&after, gone), 0, "{gone} at batch {batch}");
        }
        let simplified = report.simplified.unwrap();
        assert_eq!(simplified.reshapes, usize::from(batch == "batch"), "{simplified:?}");
        for engine in [EngineKind::Ort, EngineKind::Tract] {
            let error = worst(&sample(&after, engine), &expected);
            assert!(error < 1e-5, "{engine:?} at batch {batch}: {error}");
        }
        let (kept, _) =
            ship(awkward(batch), &ShipOptions { optimise: false, portable: false, ..Default::default() }).unwrap();
        assert!(count(&kept, "SplitToSequence") == 1 && count(&kept, "Shape") == 1);
    }
}

#[test]
fn what_breaks_in_sixteen_bits_is_kept_with_what_led_there() {
    // 1 / ((0 x + 1.0002) - 1): the sum is 1 in f16, and the quotient infinite, though no value comes near 65504.
    let numbers = [("nothing", 0f32), ("shift", 1.0002), ("unit", 1.0), ("scale", 2e-4)];
    let graph = GraphProto {
        node: vec![
            node("Mul", &["noise", "nothing"], "zeros"),
            node("Add", &["zeros", "shift"], "nearly"),
            node("Sub", &["nearly", "unit"], "little"),
            node("Div", &["unit", "little"], "large"),
            node("Mul", &["large", "scale"], "about_one"),
            node("Mul", &["about_one", "noise"], "result"),
            node("Identity", &["result"], "sample"),
        ],
        initializer: numbers.iter().map(|(n, v)| initializer(n, &HostTensor::scalar(*v))).collect(),
        input: vec![value("noise", DType::F32, &["batch", "1", "4", "4"])],
        output: vec![value("sample", DType::F32, &["batch", "1", "4", "4"])],
        ..GraphProto::default()
    };
    let before = decode(&model(graph, METADATA)).unwrap();
    let expected = sample(&before, EngineKind::Ort);
    let options = ShipOptions { precision: Precision::Fp16, ..ShipOptions::default() };
    let (after, report) = ship(before.clone(), &options).unwrap();
    let half = report.half.unwrap();
    let kept: Vec<&str> =
        half.kept.iter().filter(|k| k.reason.contains("not finite")).map(|k| k.node.as_str()).collect();
    assert!(kept.contains(&"Div node `Div-large`") && kept.contains(&"Add node `Add-nearly`"), "{:?}", half.kept);
    assert!(half.nodes >= 1 && worst(&sample(&after, EngineKind::Ort), &expected) < 2e-2, "{half:?}");
    // Told beforehand, nothing has to be found out.
    let told = ShipOptions { keep_f32: vec!["*-nearly".into(), "*-little".into(), "*-large".into()], ..options };
    let (_, report) = ship(before, &told).unwrap();
    assert_eq!(report.half.unwrap().kept.iter().filter(|k| k.reason == "asked for").count(), 3);
}

#[test]
fn weights_that_eight_bits_do_not_hold_stay() {
    let w = weights(&[32, 36], 3).to_f32();
    let graph = GraphProto {
        node: vec![
            node("Flatten", &["noise"], "flat"),
            node("MatMul", &["flat", "good"], "a"),
            node("MatMul", &["a", "other"], "b"),
            node("Reshape", &["b", "target"], "sample"),
        ],
        initializer: vec![
            initializer("good", &weights(&[36, 32], 5)),
            initializer("other", &HostTensor::new(&[32, 36], &w).unwrap()),
            initializer("target", &HostTensor::vec(&[-1i64, 1, 6, 6])),
        ],
        input: vec![value("noise", DType::F32, &["batch", "1", "6", "6"])],
        output: vec![value("sample", DType::F32, &["batch", "1", "6", "6"])],
        ..GraphProto::default()
    };
    let before = decode(&model(graph, METADATA)).unwrap();
    let options = ShipOptions { precision: Precision::Int8, int8_limit: 1e6, ..ShipOptions::default() };
    let (after, report) = ship(before.clone(), &options).unwrap();
    let all = report.int8.unwrap();
    assert_eq!((all.tensors, count(&after, "DequantizeLinear")), (2, 2), "{all:?}");
    // A limit between what one and what both cost: the worse of the two stays, and is named.
    let options = ShipOptions { int8_limit: all.max_abs * 0.999, ..options };
    let (after, report) = ship(before, &options).unwrap();
    let q = report.int8.unwrap();
    assert!(q.tensors == 1 && q.max_abs < all.max_abs && count(&after, "DequantizeLinear") == 1, "{q:?} {all:?}");
    assert!(q.kept.iter().any(|(_, why)| why.contains("would be off by more than")), "{q:?}");
}
