//! Weights that a session reads where they lie: a model above a few hundred megabytes is opened several times while it is
//! exported, and neither a file on the way nor a copy for each session is needed for that.

use std::ffi::CString;

use bytes::Bytes;
use ort::AsPointer;
use ort::ortsys;
use ort::session::SessionInputValue;
use ort::session::builder::SessionBuilder;

use super::values;
use crate::error::{Error, Result};
use crate::graph::tensors;
use crate::onnx::tensor_proto::DataLocation;
use crate::onnx::{ModelProto, StringStringEntryProto};
use crate::tensor::{DType, HostTensor};

/// Smaller tensors stay in the model: shapes are inferred from some of them.
const SMALLEST: usize = 1024;

/// The model without its larger weights, which are said to be in a file, and these.
pub fn split(model: &ModelProto) -> Result<(ModelProto, Vec<(String, HostTensor)>)> {
    let mut bare = model.clone();
    let mut weights = Vec::new();
    for t in bare.graph.iter_mut().flat_map(|g| &mut g.initializer) {
        let large = t.raw_data.as_ref().is_some_and(|b| b.len() >= SMALLEST);
        if !large || !DType::from_onnx(t.data_type()).is_ok_and(DType::is_float) {
            continue;
        }
        let tensor = aligned(tensors::from_proto(t)?)?;
        let entry = |k: &str, v: String| StringStringEntryProto { key: Some(k.to_owned()), value: Some(v) };
        t.external_data = vec![
            entry("location", "weights".into()),
            entry("offset", "0".into()),
            entry("length", tensor.bytes().len().to_string()),
        ];
        t.data_location = Some(DataLocation::External as i32);
        t.raw_data = None;
        weights.push((t.name().to_owned(), tensor));
    }
    Ok((bare, weights))
}

/// What lies at an odd place in a file is copied to an even one.
fn aligned(tensor: HostTensor) -> Result<HostTensor> {
    if (tensor.bytes().as_ptr() as usize).is_multiple_of(tensor.dtype().size()) {
        return Ok(tensor);
    }
    let shape = tensor.shape().to_vec();
    HostTensor::from_bytes(tensor.dtype(), shape, Bytes::from(tensor.bytes().to_vec()))
}

/// Says where the weights lie. The session that is built refers to them from then on: they must outlive it, the views need
/// not.
pub fn give<'a>(
    builder: &mut SessionBuilder,
    weights: &'a [(String, HostTensor)],
) -> Result<Vec<SessionInputValue<'a>>> {
    let views = weights.iter().map(|(_, t)| values::input(t)).collect::<Result<Vec<_>>>()?;
    if views.iter().any(|v| matches!(v, SessionInputValue::Owned(_))) {
        return Err(Error::unsupported("weights that the engine would have to copy"));
    }
    let names = weights.iter().map(|(n, _)| CString::new(n.as_str())).collect::<Result<Vec<_>, _>>();
    let names = names.map_err(|_| Error::invalid("a weight with a zero in its name"))?;
    if views.is_empty() {
        return Ok(views);
    }
    let name_pointers: Vec<_> = names.iter().map(|n| n.as_ptr()).collect();
    let values: Vec<_> = views.iter().map(|v| (**v).ptr()).collect();
    let options = builder.ptr_mut();
    let call = || -> ort::Result<()> {
        ortsys![unsafe AddExternalInitializers(options, name_pointers.as_ptr(), values.as_ptr(), values.len())?];
        Ok(())
    };
    call()?;
    Ok(views)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::ort::OrtEngine;
    use crate::runtime::student::decode;
    use crate::runtime::testing::{model, node, value};
    use crate::runtime::{Engine, EngineOptions, Source};

    #[test]
    fn weights_in_place_give_what_weights_in_the_file_do() {
        let numbers: Vec<f32> = (0..1024).map(|k| (k % 37) as f32 / 7.0).collect();
        // One byte off, as in the middle of a file.
        let mut odd = vec![0u8];
        odd.extend(numbers.iter().flat_map(|v| v.to_le_bytes()));
        let odd = HostTensor::from_bytes(DType::F32, vec![32, 32], Bytes::from(odd).slice(1..)).unwrap();
        let even = HostTensor::new(&[32, 32], &numbers).unwrap();
        let graph = crate::onnx::GraphProto {
            node: vec![node("MatMul", &["x", "odd"], "h"), node("MatMul", &["h", "even"], "z")],
            initializer: vec![tensors::to_proto("odd", &odd), tensors::to_proto("even", &even)],
            input: vec![value("x", DType::F32, &["batch", "32"])],
            output: vec![value("z", DType::F32, &["batch", "32"])],
            ..crate::onnx::GraphProto::default()
        };
        let bytes = model(graph, &[]);
        let model = decode(&bytes).unwrap();
        let x = HostTensor::new(&[3, 32], &numbers[..96]).unwrap();
        let options = EngineOptions::default();
        let mut plain = OrtEngine::open(Source::Bytes { bytes: &bytes, folder: None }, &options).unwrap();
        let mut in_place = OrtEngine::open_in_place(&model, &options).unwrap();
        assert_eq!(split(&model).unwrap().1.len(), 2);
        let (a, b) = (plain.run(&[("x", &x)]).unwrap(), in_place.run(&[("x", &x)]).unwrap());
        let apart = crate::passes::evaluate::max_abs(&a[0].1, &b[0].1);
        assert!(apart < 1e-2, "{apart} where values reach 1e4");
    }
}
