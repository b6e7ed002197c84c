//! A graph that computes the same row for every image, as it ships.

use super::*;
use crate::passes::evaluate;
use crate::runtime::student::{SampleRequest, Student, decode};
use crate::runtime::testing::{initializer, model, node, value};
use crate::runtime::{EngineKind, EngineOptions};

#[test]
fn what_is_the_same_for_every_image_is_computed_once() {
    let number = |name: &str, v: f32| initializer(name, &HostTensor::scalar(v));
    let ints = |name: &str, v: &[i64]| initializer(name, &HostTensor::vec(v));
    let mut to_float = node("Cast", &["ramp"], "floats");
    to_float.attribute.push(edit::int_attribute("to", 1));
    let graph = GraphProto {
        node: vec![
            node("Shape", &["noise"], "shape"),
            node("Gather", &["shape", "zero"], "batch"),
            // A time once an image, and its embedding.
            node("Expand", &["time", "batch"], "times"),
            node("Unsqueeze", &["times", "last"], "column"),
            node("Exp", &["powers"], "frequencies"),
            node("Mul", &["column", "frequencies"], "angles"),
            node("Sin", &["angles"], "waves"),
            node("MatMul", &["waves", "w"], "embedding"),
            node("Reshape", &["embedding", "four"], "shift"),
            node("Add", &["noise", "shift"], "moved"),
            // The number of the image is another in each: what it is multiplied with is not.
            node("Squeeze", &["batch"], "count"),
            node("Range", &["from", "count", "step"], "ramp"),
            to_float,
            node("Cos", &["small"], "factor"),
            node("Mul", &["floats", "factor"], "ramps"),
            node("Reshape", &["ramps", "ones"], "steps"),
            node("Add", &["moved", "steps"], "sample"),
        ],
        initializer: vec![
            ints("zero", &[0]),
            ints("last", &[1]),
            ints("four", &[-1, 1, 2, 2]),
            ints("ones", &[-1, 1, 1, 1]),
            initializer("from", &HostTensor::scalar(0i64)),
            initializer("step", &HostTensor::scalar(1i64)),
            initializer("time", &HostTensor::vec(&[7f32])),
            initializer("powers", &HostTensor::new(&[1, 3], &[0f32, -1.0, -2.0]).unwrap()),
            initializer("w", &HostTensor::new(&[3, 4], &[0.5f32; 12]).unwrap()),
            number("small", 1.5),
        ],
        input: vec![value("noise", DType::F32, &["batch", "1", "2", "2"])],
        output: vec![value("sample", DType::F32, &["batch", "1", "2", "2"])],
        ..GraphProto::default()
    };
    let metadata = [("disback.student.method", "test"), ("disback.range", "[-100.0, 100.0]")];
    let before = decode(&model(graph, &metadata)).unwrap();
    let (after, report) = ship(before.clone(), &ShipOptions::default()).unwrap();
    let simplified = report.simplified.unwrap();
    let left: Vec<&str> = after.graph.as_ref().unwrap().node.iter().map(|n| n.op_type()).collect();
    assert_eq!(simplified.rows, 1, "{simplified:?} {left:?}");
    for gone in ["Sin", "MatMul", "Exp", "Cos"] {
        assert!(!left.contains(&gone), "{left:?}");
    }
    assert!(left.contains(&"Range") && left.contains(&"Expand"), "{left:?}");
    let samples = |m: &ModelProto, engine| {
        let options = EngineOptions { engine, ..EngineOptions::default() };
        let request = SampleRequest { seed: 4, batch: 5, ..SampleRequest::default() };
        let bytes = prost::Message::encode_to_vec(m);
        Student::from_bytes(&bytes, &options).unwrap().sample(&request, 0, 5).unwrap()
    };
    let expected = samples(&before, EngineKind::Ort);
    for engine in [EngineKind::Ort, EngineKind::Tract] {
        let apart = evaluate::max_abs(&samples(&after, engine), &expected);
        assert!(apart < 1e-5, "{engine:?}: {apart}");
    }
}
