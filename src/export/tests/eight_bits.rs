//! Arithmetic in 8 bits of convolutions over one and three dimensions: sequences and volumes.

use super::*;

/// A convolution over as many dimensions as `size` has, 32 channels in and out, with a bias where `bias`.
fn convolution(size: &[usize], bias: bool) -> ModelProto {
    let dims = size.len();
    let mut conv = node("Conv", if bias { &["noise", "kernel", "bias"] } else { &["noise", "kernel"] }, "sample");
    conv.attribute.push(edit::ints_attribute("pads", &vec![1; 2 * dims]));
    let mut kernel = vec![32, 32];
    kernel.resize(dims + 2, 3);
    let sizes: Vec<String> = size.iter().map(ToString::to_string).collect();
    let row: Vec<&str> = ["batch", "32"].into_iter().chain(sizes.iter().map(String::as_str)).collect();
    let graph = GraphProto {
        node: vec![conv],
        initializer: vec![
            initializer("kernel", &weights(&kernel, 1)),
            initializer("bias", &HostTensor::vec(&(0..32).map(|k| 10.0 * k as f32).collect::<Vec<_>>())),
        ],
        input: vec![value("noise", DType::F32, &row)],
        output: vec![value("sample", DType::F32, &row)],
        ..GraphProto::default()
    };
    decode(&model(graph, &[METADATA[0], ("disback.range", "[-10000.0, 10000.0]")])).unwrap()
}

#[test]
fn convolutions_over_one_and_three_dimensions_too() {
    for (size, bias) in [(&[12usize][..], true), (&[12], false), (&[3, 4, 5], true)] {
        let before = convolution(size, bias);
        let expected = sample(&before, EngineKind::Ort);
        let options = ShipOptions { precision: Precision::Int8Dynamic, int8_limit: 1e9, ..ShipOptions::default() };
        let (after, report) = ship(before, &options).unwrap();
        assert_eq!((count(&after, "ConvInteger"), count(&after, "Conv")), (1, 0), "{size:?}: {:?}", report.int8);
        let (ort, tract) = (sample(&after, EngineKind::Ort), sample(&after, EngineKind::Tract));
        let largest = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
        let error = worst(&ort, &expected) / largest;
        assert!(error > 1e-5 && error < 0.05, "{size:?}: {error}");
        assert!(worst(&ort, &tract) < 1e-3 * largest, "{size:?}: {}", worst(&ort, &tract));
    }
}
