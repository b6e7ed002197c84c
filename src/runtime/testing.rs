//! Small ONNX models for tests, built from the wire types.

use prost::Message;

use crate::onnx::{
    GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto, TensorProto, TensorShapeProto,
    TypeProto, ValueInfoProto, tensor_shape_proto::Dimension, tensor_shape_proto::dimension, type_proto,
};
use crate::tensor::{DType, HostTensor};

pub fn value(name: &str, dtype: DType, dims: &[&str]) -> ValueInfoProto {
    let dim = dims.iter().map(|d| Dimension {
        value: Some(match d.parse() {
            Ok(n) => dimension::Value::DimValue(n),
            Err(_) => dimension::Value::DimParam(d.to_string()),
        }),
        ..Default::default()
    });
    let shape = Some(TensorShapeProto { dim: dim.collect() });
    let tensor = type_proto::Tensor { elem_type: Some(dtype.to_onnx()), shape };
    let r#type = Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() });
    ValueInfoProto { name: Some(name.into()), r#type, ..Default::default() }
}

pub fn initializer(name: &str, tensor: &HostTensor) -> TensorProto {
    TensorProto {
        name: Some(name.into()),
        dims: tensor.shape().iter().map(|&d| d as i64).collect(),
        data_type: Some(tensor.dtype().to_onnx()),
        raw_data: Some(tensor.bytes().clone()),
        ..Default::default()
    }
}

pub fn node(op: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto {
        op_type: Some(op.into()),
        name: Some(format!("{op}-{output}")),
        input: inputs.iter().map(|s| s.to_string()).collect(),
        output: vec![output.into()],
        ..Default::default()
    }
}

pub fn model(graph: GraphProto, metadata: &[(&str, &str)]) -> Vec<u8> {
    let entry = |(k, v): &(&str, &str)| StringStringEntryProto { key: Some(k.to_string()), value: Some(v.to_string()) };
    ModelProto {
        ir_version: Some(8),
        opset_import: vec![OperatorSetIdProto { domain: Some(String::new()), version: Some(17) }],
        graph: Some(GraphProto { name: Some("test".into()), ..graph }),
        metadata_props: metadata.iter().map(entry).collect(),
        ..Default::default()
    }
    .encode_to_vec()
}

/// `sample = clip(noise / 2 + shift[labels], -1, 1)` on 1x2x2 images of three classes, with a student's metadata.
pub fn student(batch: &str) -> Vec<u8> {
    let shift = HostTensor::new(&[3, 1, 1, 1], &[-0.5f32, 0.0, 0.5]).unwrap();
    let graph = GraphProto {
        node: vec![
            node("Mul", &["noise", "half"], "scaled"),
            node("Gather", &["shift", "labels"], "offset"),
            node("Add", &["scaled", "offset"], "sum"),
            node("Clip", &["sum", "low", "high"], "sample"),
        ],
        initializer: vec![
            initializer("half", &HostTensor::scalar(0.5f32)),
            initializer("shift", &shift),
            initializer("low", &HostTensor::scalar(-1f32)),
            initializer("high", &HostTensor::scalar(1f32)),
        ],
        input: vec![value("noise", DType::F32, &[batch, "1", "2", "2"]), value("labels", DType::I64, &[batch])],
        output: vec![value("sample", DType::F32, &[batch, "1", "2", "2"])],
        ..Default::default()
    };
    let metadata = [
        ("disback.student.method", "disback"),
        ("disback.shape", "[1, 2, 2]"),
        ("disback.range", "[-1.0, 1.0]"),
        ("disback.conditions.labels.kind", "class-index"),
        ("disback.conditions.labels.classes", "3"),
    ];
    model(graph, &metadata)
}

/// `sample = noise / 2` on samples of this shape, with a student's metadata and these entries beside it. (Not every test that
/// takes this file in needs it.)
#[allow(dead_code)]
pub fn halved(shape: &[usize], more: &[(&str, &str)]) -> Vec<u8> {
    let dims: Vec<String> = std::iter::once("n".to_string()).chain(shape.iter().map(ToString::to_string)).collect();
    let dims: Vec<&str> = dims.iter().map(String::as_str).collect();
    let graph = GraphProto {
        node: vec![node("Mul", &["noise", "half"], "sample")],
        initializer: vec![initializer("half", &HostTensor::scalar(0.5f32))],
        input: vec![value("noise", DType::F32, &dims)],
        output: vec![value("sample", DType::F32, &dims)],
        ..Default::default()
    };
    let shape = format!("{shape:?}");
    let mut metadata = vec![("disback.student.method", "disback"), ("disback.shape", shape.as_str())];
    metadata.extend(more);
    model(graph, &metadata)
}

/// `features = Flatten(image) @ weight` for 1x2x2 images.
pub fn features(weight: &[f32]) -> Vec<u8> {
    let columns = weight.len() / 4;
    let graph = GraphProto {
        node: vec![node("Flatten", &["image"], "flat"), node("MatMul", &["flat", "weight"], "features")],
        initializer: vec![initializer("weight", &HostTensor::new(&[4, columns], weight).unwrap())],
        input: vec![value("image", DType::F32, &["n", "1", "2", "2"])],
        output: vec![value("features", DType::F32, &["n", &columns.to_string()])],
        ..Default::default()
    };
    model(graph, &[])
}
