//! Writing weights back: the original file with its initializers replaced, and nothing else touched.

use std::path::Path;

use bytes::Bytes;
use prost::Message;

use crate::error::{Error, Result};
use crate::files;
use crate::graph::ir::Origin;
use crate::graph::roles::{Buffer, Parameter};
use crate::onnx::attribute_proto::AttributeType;
use crate::onnx::tensor_proto::DataLocation;
use crate::onnx::{AttributeProto, GraphProto, ModelProto, StringStringEntryProto, TensorProto};
use crate::tensor::HostTensor;

/// Models with more bytes of weights than this get them in a file of their own: protobuf ends at 2 GiB.
pub const EXTERNAL_ABOVE: usize = 1_900_000_000;

/// Returns the model with the parameters' new values (f32 masters, in the order of `parameters`), cast to the element type
/// of the file. Parted copies become initializers of their own, also those that are not trained: what they were merged with
/// is. `wide`: weights that the file has in half precision stay in f32, for a graph that is widened too.
pub fn with_parameters(
    original: &ModelProto,
    parameters: &[Parameter],
    buffers: &[Buffer],
    values: &[HostTensor],
    wide: bool,
) -> Result<ModelProto> {
    if parameters.len() != values.len() {
        return Err(Error::mismatch(format!("{} values for {} parameters", values.len(), parameters.len())));
    }
    let mut model = original.clone();
    let graph = model.graph.as_mut().ok_or_else(|| Error::invalid("the model holds no graph"))?;
    for (p, value) in parameters.iter().zip(values) {
        if value.shape() != p.shape {
            return Err(Error::mismatch(format!(
                "parameter `{}` has shape {:?}, expected {:?}",
                p.name,
                value.shape(),
                p.shape
            )));
        }
        let value = value.cast(if wide { p.dtype.widened() } else { p.dtype });
        if !p.rewire.is_empty() {
            part(graph, &p.name, &value, &p.rewire)?;
            continue;
        }
        let lost = || Error::unsupported(format!("parameter `{}` has no tensor in the file to write to", p.name));
        for twin in &p.twins {
            let twisted = twin.how.of(&value)?;
            set_raw(tensor_at(graph, &twin.origin).ok_or_else(lost)?, &twisted);
        }
        set_raw(tensor_at(graph, &p.origin).ok_or_else(lost)?, &value);
    }
    for (name, value, slots) in buffers.iter().filter_map(|b| b.parted.as_ref().map(|(v, s)| (&b.name, v, s))) {
        part(graph, name, value, slots)?;
    }
    internalise(&mut model);
    Ok(model)
}

/// Adds an initializer and lets these slots (node, input) read it.
fn part(graph: &mut GraphProto, name: &str, value: &HostTensor, slots: &[(usize, usize)]) -> Result<()> {
    let mut t = crate::graph::tensors::to_proto(name, value);
    t.raw_data = Some(value.bytes().clone());
    graph.initializer.push(t);
    for &(node, slot) in slots {
        let input = graph.node.get_mut(node).and_then(|n| n.input.get_mut(slot));
        *input.ok_or_else(|| Error::invalid(format!("no slot for tensor `{name}`")))? = name.to_owned();
    }
    Ok(())
}

fn tensor_at<'a>(graph: &'a mut GraphProto, origin: &Origin) -> Option<&'a mut TensorProto> {
    match origin {
        Origin::Initializer(i) => graph.initializer.get_mut(*i),
        Origin::ConstantNode(i) => graph.node.get_mut(*i)?.attribute.iter_mut().find_map(constant_tensor),
        Origin::Within { node, attribute, origin } => {
            let mut attributes = graph.node.get_mut(*node)?.attribute.iter_mut();
            tensor_at(attributes.find(|a| a.name() == attribute)?.g.as_mut()?, origin)
        }
        Origin::Made => None,
    }
}

/// The tensor of a Constant's attribute; plain lists become one.
fn constant_tensor(a: &mut AttributeProto) -> Option<&mut TensorProto> {
    let plain = match a.name() {
        "value_float" => Some(HostTensor::scalar(a.f())),
        "value_floats" => Some(HostTensor::vec(&a.floats)),
        _ => None,
    };
    if let Some(t) = plain {
        *a = AttributeProto {
            name: Some("value".to_owned()),
            r#type: Some(AttributeType::Tensor as i32),
            t: Some(crate::graph::tensors::to_proto("", &t)),
            ..AttributeProto::default()
        };
    }
    a.t.as_mut()
}

fn set_raw(t: &mut TensorProto, value: &HostTensor) {
    t.data_type = Some(value.dtype().to_onnx());
    t.float_data.clear();
    t.double_data.clear();
    t.int32_data.clear();
    t.int64_data.clear();
    t.uint64_data.clear();
    t.raw_data = Some(value.bytes().clone());
}

/// Forgets where external data came from: its bytes are in `raw_data` since loading.
pub fn internalise(model: &mut ModelProto) {
    model.graph.iter_mut().for_each(internalise_graph);
}

fn internalise_graph(graph: &mut GraphProto) {
    let inside = |t: &mut TensorProto| {
        t.external_data.clear();
        t.data_location = None;
    };
    graph.initializer.iter_mut().for_each(inside);
    for a in graph.node.iter_mut().flat_map(|n| n.attribute.iter_mut()) {
        a.t.iter_mut().chain(a.tensors.iter_mut()).for_each(inside);
        a.g.iter_mut().chain(a.graphs.iter_mut()).for_each(internalise_graph);
    }
}

/// Sets a metadata entry, replacing one of the same key.
pub fn set_metadata(model: &mut ModelProto, key: &str, value: &str) {
    model.metadata_props.retain(|p| p.key() != key);
    model.metadata_props.push(StringStringEntryProto { key: Some(key.to_owned()), value: Some(value.to_owned()) });
}

/// Writes the model whole or not at all; weights above [`EXTERNAL_ABOVE`] bytes go to `<file>.data` beside it.
pub fn write(model: &ModelProto, path: &Path) -> Result<()> {
    write_with_limit(model, path, EXTERNAL_ABOVE)
}

/// [`write`] with another limit: with 0 every tensor of a kilobyte or more is external.
pub fn write_with_limit(model: &ModelProto, path: &Path, limit: usize) -> Result<()> {
    let total: usize =
        model.graph.iter().flat_map(|g| &g.initializer).map(|t| t.raw_data.as_ref().map_or(0, |b| b.len())).sum();
    if total <= limit {
        return files::write_atomic(path, &model.encode_to_vec());
    }
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let location = format!("{name}.data");
    let mut model = model.clone();
    let mut chunks: Vec<(usize, Bytes)> = Vec::new();
    let mut at = 0usize;
    for t in model.graph.iter_mut().flat_map(|g| g.initializer.iter_mut()) {
        // Small tensors stay inside: shape constants must be readable without the data file.
        let Some(bytes) = t.raw_data.take_if(|b| b.len() >= 1024) else { continue };
        at = at.next_multiple_of(4096);
        let entry = |k: &str, v: String| StringStringEntryProto { key: Some(k.to_owned()), value: Some(v) };
        t.external_data = vec![
            entry("location", location.clone()),
            entry("offset", at.to_string()),
            entry("length", bytes.len().to_string()),
        ];
        t.data_location = Some(DataLocation::External as i32);
        let length = bytes.len();
        chunks.push((at, bytes));
        at += length;
    }
    files::write_atomic_with(&path.with_file_name(&location), |out| {
        use std::io::Write;
        let mut position = 0;
        for (offset, bytes) in &chunks {
            out.write_all(&vec![0; offset - position])?;
            out.write_all(bytes)?;
            position = offset + bytes.len();
        }
        Ok(())
    })?;
    files::write_atomic(path, &model.encode_to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{Model, tensors};
    use crate::onnx::OperatorSetIdProto;

    #[test]
    fn large_weights_leave_for_a_file_of_their_own_and_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let large: Vec<f32> = (0..1500).map(|i| i as f32).collect();
        let weights = [
            ("a", HostTensor::new(&[30, 50], &large).unwrap()),
            ("small", HostTensor::vec(&[7i64, 9])),
            ("b", HostTensor::new(&[1000], &large[..1000]).unwrap()),
        ];
        let graph = GraphProto {
            initializer: weights.iter().map(|(n, t)| tensors::to_proto(n, t)).collect(),
            ..GraphProto::default()
        };
        let model = ModelProto {
            ir_version: Some(8),
            opset_import: vec![OperatorSetIdProto { domain: None, version: Some(18) }],
            graph: Some(graph),
            ..ModelProto::default()
        };
        let path = dir.path().join("m.onnx");
        write_with_limit(&model, &path, 100).unwrap();
        assert!(std::fs::metadata(&path).unwrap().len() < 1000);
        assert_eq!(std::fs::metadata(dir.path().join("m.onnx.data")).unwrap().len(), 8192 + 4000);
        let back = Model::load(&path).unwrap();
        for (proto, (name, tensor)) in back.proto.graph.as_ref().unwrap().initializer.iter().zip(&weights) {
            assert_eq!(proto.name(), *name);
            assert_eq!(&tensors::from_proto(proto).unwrap(), tensor);
        }
    }
}
