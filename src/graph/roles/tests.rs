//! Roles in small graphs: what one exporter or another leaves of layers that lack a part.

use super::*;
use crate::graph::edit::{node, value_info};
use crate::graph::{Model, lower, quantised, tensors};
use crate::onnx::attribute_proto::AttributeType;
use crate::onnx::{AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto};

fn weight(name: &str, shape: &[usize]) -> TensorProto {
    let values = crate::noise::image_noise(3, name.len() as u64, shape.iter().product());
    tensors::to_proto(name, &HostTensor::new(shape, &values).unwrap())
}

fn constant(name: &str, t: HostTensor) -> NodeProto {
    let value = AttributeProto {
        name: Some("value".into()),
        r#type: Some(AttributeType::Tensor as i32),
        t: Some(tensors::to_proto("", &t)),
        ..AttributeProto::default()
    };
    NodeProto { attribute: vec![value], ..node("Constant", &[], name) }
}

/// `x [n, 4]` to `y`.
fn lowered(nodes: Vec<NodeProto>, initializer: Vec<TensorProto>) -> Graph {
    let graph = GraphProto {
        name: Some("g".into()),
        input: vec![value_info("x", DType::F32, &[Err("n"), Ok(4)])],
        output: vec![value_info("y", DType::F32, &[Err("n"), Ok(4)])],
        node: nodes,
        initializer,
        ..GraphProto::default()
    };
    let opset = OperatorSetIdProto { version: Some(20), ..OperatorSetIdProto::default() };
    let model =
        ModelProto { ir_version: Some(9), opset_import: vec![opset], graph: Some(graph), ..ModelProto::default() };
    lower::lower(&Model::from_proto(model)).unwrap()
}

fn trained(nodes: Vec<NodeProto>, initializer: Vec<TensorProto>) -> Vec<String> {
    let mut graph = lowered(nodes, initializer);
    let provenance = untangle(&mut graph, None);
    let roles = classify(&graph, &TrainableChoice::default(), &provenance).unwrap();
    let mut names: Vec<_> = roles.parameters.into_iter().map(|p| p.name).collect();
    names.sort();
    names
}

#[test]
fn a_layer_norm_without_a_bias_trains_no_zeros_of_the_exporter() {
    let norm = |bias: &str| {
        vec![
            node("MatMul", &["x", "m"], "h"),
            constant("/norm/Constant_output_0", HostTensor::vec(&[0f32; 4])),
            node("LayerNormalization", &["h", "norm.weight", bias], "y"),
        ]
    };
    let weights = || vec![weight("m", &[4, 4]), weight("norm.weight", &[4])];
    assert_eq!(trained(norm("/norm/Constant_output_0"), weights()), ["m", "norm.weight"]);
    // Fresh zeros that have a name are a bias.
    let mut with = weights();
    with.push(tensors::to_proto("norm.bias", &HostTensor::vec(&[0f32; 4])));
    assert_eq!(trained(norm("norm.bias"), with), ["m", "norm.bias", "norm.weight"]);
}

#[test]
fn a_single_number_with_a_place_among_the_modules_is_trained() {
    let nodes = |name: &str| vec![node("MatMul", &["x", "m"], "h"), node("Mul", &["h", name], "y")];
    let one = |name: &str| vec![weight("m", &[4, 4]), tensors::to_proto(name, &HostTensor::vec(&[0.5f32]))];
    for name in ["blocks.0.rezero", "weight_0", "up.fac"] {
        assert_eq!(trained(nodes(name), one(name)), if name < "m" { [name, "m"] } else { ["m", name] });
    }
    for name in ["val_7", "net.sigma_data", "scalar_tensor_default"] {
        assert_eq!(trained(nodes(name), one(name)), ["m"], "{name}");
    }
}

#[test]
fn quantised_weights_are_found_and_quantised_activations_are_none() {
    let whole = |name: &str| tensors::to_proto(name, &HostTensor::new(&[4, 4], &[1i8; 16]).unwrap());
    let scale = || tensors::to_proto("scale", &HostTensor::scalar(0.1f32));
    let nodes = vec![node("DequantizeLinear", &["w", "scale"], "d"), node("MatMul", &["x", "d"], "y")];
    let found = quantised::quantised(&lowered(nodes, vec![whole("w"), scale()])).unwrap();
    assert_eq!((found.tensors, found.elements, found.example.as_str()), (1, 16, "w"));
    let nodes = vec![
        node("QuantizeLinear", &["x", "scale"], "q"),
        node("DequantizeLinear", &["q", "scale"], "d"),
        node("MatMul", &["d", "m"], "y"),
    ];
    assert_eq!(quantised::quantised(&lowered(nodes, vec![weight("m", &[4, 4]), scale()])), None);
}

#[test]
fn one_kernel_of_a_stack_of_one_is_the_weight_of_both_readers() {
    // `w [1, 4, 4]` scales, and its only matrix, which the exporter folded, multiplies.
    let stack = weight("w", &[1, 4, 4]);
    let matrix = tensors::to_proto("onnx::MatMul_7", &tensors::from_proto(&weight("w", &[4, 4])).unwrap());
    let nodes = || {
        vec![
            node("MatMul", &["x", "onnx::MatMul_7"], "h"),
            node("MatMul", &["h", "m"], "k"),
            node("Mul", &["w", "k"], "s"),
            node("ReduceSum", &["s"], "y"),
        ]
    };
    assert_eq!(trained(nodes(), vec![stack.clone(), matrix, weight("m", &[4, 4])]), ["m", "w"]);
    let other = weight("onnx::MatMul_7", &[4, 4]);
    assert_eq!(trained(nodes(), vec![stack, other, weight("m", &[4, 4])]).len(), 3);
}
