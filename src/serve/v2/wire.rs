//! The protocol's requests and answers as they are sent: JSON, and tensors as bytes after it.

use std::fmt::Write;

use axum::body::Bytes;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::super::body::Array;
use crate::error::{Context, Error, Result};
use crate::tensor::{DType, HostTensor, checked_len};

/// Characters of a number in an answer's JSON, with its comma, at most.
pub(super) const CHARS: u64 = 18;
/// Inputs of a request at most: students have a few.
const TENSORS: usize = 64;

const DATATYPES: [(&str, DType); 13] = [
    ("BOOL", DType::Bool),
    ("UINT8", DType::U8),
    ("UINT16", DType::U16),
    ("UINT32", DType::U32),
    ("UINT64", DType::U64),
    ("INT8", DType::I8),
    ("INT16", DType::I16),
    ("INT32", DType::I32),
    ("INT64", DType::I64),
    ("FP16", DType::F16),
    ("FP32", DType::F32),
    ("FP64", DType::F64),
    ("BF16", DType::BF16),
];

/// The protocol's name of an element type.
pub(super) fn datatype(dtype: DType) -> &'static str {
    DATATYPES.iter().find(|(_, d)| *d == dtype).map_or("", |(name, _)| name)
}

/// A request, read.
#[derive(Debug)]
pub(super) struct Wanted {
    /// Given back in the answer.
    pub id: Option<String>,
    /// Tensors by input name.
    pub tensors: Vec<(String, HostTensor)>,
    /// Names of the outputs that are asked for; empty: all.
    pub outputs: Vec<String>,
    /// Whether the answer's tensor comes as bytes.
    pub binary: bool,
    /// Seed of what is drawn.
    pub seed: u64,
    /// Number of the first sample of the seed.
    pub index: u64,
    /// Samples, where no tensor says how many.
    pub n: usize,
}

#[derive(Deserialize)]
struct Head {
    id: Option<String>,
    #[serde(default)]
    parameters: Map<String, Value>,
    #[serde(default)]
    inputs: Vec<Input>,
    #[serde(default)]
    outputs: Vec<Output>,
}

#[derive(Deserialize)]
struct Input {
    name: String,
    shape: Vec<usize>,
    datatype: String,
    #[serde(default)]
    parameters: Map<String, Value>,
    data: Option<Array>,
}

#[derive(Deserialize)]
struct Output {
    name: String,
    #[serde(default)]
    parameters: Map<String, Value>,
}

impl Wanted {
    /// Reads a body whose first `head` bytes are JSON; all of it where absent.
    ///
    /// Errors, of kinds Usage and Mismatch: no such JSON; tensors that are not what they are said to be.
    pub fn read(body: &Bytes, head: Option<usize>) -> Result<Self> {
        let length = head.unwrap_or(body.len());
        if length > body.len() {
            let text = format!("Inference-Header-Content-Length is {length}, the body has {} bytes", body.len());
            return Err(Error::mismatch(text));
        }
        let mut bytes = body.slice(length..);
        let parsed: Head = serde_json::from_slice(&body[..length])
            .map_err(|e| Error::mismatch(format!("the body is no inference request: {e}")))?;
        if parsed.inputs.len() > TENSORS {
            return Err(Error::usage(format!("{} inputs, expected {TENSORS} at most", parsed.inputs.len())));
        }
        let mut tensors = Vec::new();
        for input in parsed.inputs {
            let name = input.name.clone();
            tensors.push((name.clone(), tensor(input, &mut bytes).with_context(|| format!("input `{name}`"))?));
        }
        if !bytes.is_empty() {
            return Err(Error::mismatch(format!("{} bytes after the last tensor", bytes.len())));
        }
        let number = |key: &str, default: u64| match parsed.parameters.get(key) {
            None => Ok(default),
            Some(v) => v
                .as_u64()
                .ok_or_else(|| Error::usage(format!("parameter {key} is {v}: expected a whole number, 0 or more"))),
        };
        let all = parsed.parameters.get("binary_data_output").is_some_and(|v| *v == json!(true));
        let one = parsed.outputs.first().and_then(|o| o.parameters.get("binary_data"));
        Ok(Self {
            id: parsed.id,
            binary: one.map_or(all, |v| *v == json!(true)),
            outputs: parsed.outputs.into_iter().map(|o| o.name).collect(),
            seed: number("seed", 0)?,
            index: number("index", 0)?,
            n: usize::try_from(number("n", 1)?).unwrap_or(usize::MAX),
            tensors,
        })
    }
}

/// A tensor from its JSON, or from the bytes that begin with it.
fn tensor(input: Input, bytes: &mut Bytes) -> Result<HostTensor> {
    let Some((_, dtype)) = DATATYPES.iter().find(|(name, _)| *name == input.datatype) else {
        let names: Vec<&str> = DATATYPES.iter().map(|(name, _)| *name).collect();
        return Err(Error::mismatch(format!("datatype {}: expected one of {}", input.datatype, names.join(", "))));
    };
    if input.parameters.keys().any(|k| k.starts_with("shared_memory")) {
        return Err(Error::usage("shared memory is not taken: send the tensor"));
    }
    let len = checked_len(&input.shape)?;
    let wrong = |found: String| Error::mismatch(format!("shape {:?} has {len} elements, {found}", input.shape));
    match (input.parameters.get("binary_data_size"), input.data) {
        (Some(size), None) => {
            let size = size.as_u64().and_then(|n| usize::try_from(n).ok());
            let size = size.ok_or_else(|| Error::usage("binary_data_size: expected a whole number"))?;
            if len.checked_mul(dtype.size()) != Some(size) || size > bytes.len() {
                return Err(wrong(format!("binary_data_size is {size}, {} bytes are left of the body", bytes.len())));
            }
            HostTensor::from_bytes(*dtype, input.shape, bytes.split_to(size))
        }
        (None, Some(data)) => {
            if data.values.len() != len {
                return Err(wrong(format!("the data {}", data.values.len())));
            }
            if !dtype.is_float() && !data.whole {
                return Err(Error::mismatch(format!("fractions in a tensor of {}", input.datatype)));
            }
            Ok(HostTensor::new(&input.shape, &data.values)?.cast(*dtype))
        }
        (Some(_), Some(_)) => Err(Error::usage("both data and binary_data_size are given")),
        (None, None) => Err(Error::usage("neither data nor binary_data_size is given")),
    }
}

/// An answer's body, and how many of its bytes are JSON.
pub(super) fn write(
    model: &str,
    version: &str,
    id: Option<&str>,
    samples: &HostTensor,
    binary: bool,
) -> (usize, Vec<u8>) {
    let mut head = json!({ "model_name": model, "model_version": version });
    if let Some(id) = id {
        head["id"] = json!(id);
    }
    let mut output = json!({ "name": super::OUTPUT, "datatype": "FP32", "shape": samples.shape() });
    if binary {
        output["parameters"] = json!({ "binary_data_size": samples.bytes().len() });
        head["outputs"] = json!([output]);
        let mut bytes = head.to_string().into_bytes();
        let length = bytes.len();
        bytes.extend_from_slice(samples.bytes());
        return (length, bytes);
    }
    head["outputs"] = json!([output]);
    // The numbers go in front of the last brackets: as values of JSON they would take many times the memory.
    let mut text = head.to_string();
    text.truncate(text.len() - "}]}".len());
    text.push_str(",\"data\":[");
    for (k, value) in samples.to_f32().into_iter().enumerate() {
        let comma = if k == 0 { "" } else { "," };
        // (JSON knows no NaN.)
        let _ = if value.is_finite() { write!(text, "{comma}{value:?}") } else { write!(text, "{comma}null") };
    }
    text.push_str("]}]}");
    (text.len(), text.into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, after: &[u8]) -> std::result::Result<Wanted, String> {
        let body: Vec<u8> = [text.as_bytes(), after].concat();
        Wanted::read(&Bytes::from(body), Some(text.len())).map_err(|e| e.to_string())
    }

    #[test]
    fn tensors_are_read_from_json_and_from_bytes() {
        let text = r#"{"id": "a", "parameters": {"seed": 3}, "outputs": [{"name": "sample", "parameters": {"binary_data": true}}], "inputs": [
            {"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [[1, 2.5], [3, 4]]},
            {"name": "y", "shape": [2], "datatype": "INT64", "parameters": {"binary_data_size": 16}},
            {"name": "z", "shape": [1, 2], "datatype": "FP16", "parameters": {"binary_data_size": 4}}]}"#;
        let after = [&7i64.to_le_bytes()[..], &(-1i64).to_le_bytes(), &[0, 0x3c, 0, 0xc0]].concat();
        let wanted = read(text, &after).unwrap();
        assert_eq!((wanted.id.as_deref(), wanted.seed, wanted.binary), (Some("a"), 3, true));
        let found: Vec<(Vec<usize>, Vec<f64>)> =
            wanted.tensors.iter().map(|(_, t)| (t.shape().to_vec(), t.to_f64())).collect();
        let want = [(vec![2, 2], vec![1., 2.5, 3., 4.]), (vec![2], vec![7., -1.]), (vec![1, 2], vec![1., -2.])];
        assert_eq!(found, want);
    }

    #[test]
    fn what_is_not_as_it_says_is_refused() {
        let one = |rest: &str| read(&format!(r#"{{"inputs": [{{"name": "x", {rest}}}]}}"#), &[0; 8]).unwrap_err();
        for (rest, says) in [
            (r#""shape": [3], "datatype": "FP32", "data": [1, 2]"#, "3 elements, the data 2"),
            (r#""shape": [3], "datatype": "FP32", "parameters": {"binary_data_size": 8}"#, "binary_data_size is 8"),
            (r#""shape": [4], "datatype": "FP32", "parameters": {"binary_data_size": 16}"#, "8 bytes are left"),
            (r#""shape": [1], "datatype": "FP32", "parameters": {"binary_data_size": 4}"#, "4 bytes after the last"),
            (r#""shape": [2], "datatype": "INT32", "data": [1, 2.5]"#, "fractions"),
            (r#""shape": [2], "datatype": "BYTES", "data": [1, 2]"#, "datatype BYTES"),
            (r#""shape": [2], "datatype": "FP32""#, "neither data"),
            (r#""shape": [2], "datatype": "FP32", "parameters": {"shared_memory_region": "a"}"#, "shared memory"),
            (r#""shape": [9223372036854775807, 8], "datatype": "FP32", "data": []"#, "x"),
        ] {
            assert!(one(rest).contains(says), "{rest}: {}", one(rest));
        }
        assert!(read("[]", &[]).unwrap_err().contains("no inference request"));
        assert!(read(r#"{"parameters": {"seed": -1}}"#, &[]).unwrap_err().contains("parameter seed is -1"));
        assert!(Wanted::read(&Bytes::from_static(b"{}"), Some(3)).unwrap_err().to_string().contains("has 2 bytes"));
    }

    #[test]
    fn answers_are_json_whatever_the_numbers() {
        let values = [0.1f32, -3.4e38, 1e-40, f32::NAN];
        let samples = HostTensor::new(&[2, 2], &values).unwrap();
        let (length, text) = write("m", "1", Some("i\"d"), &samples, false);
        let read: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!((length, &read["id"], &read["outputs"][0]["shape"]), (text.len(), &json!("i\"d"), &json!([2, 2])));
        let data = read["outputs"][0]["data"].as_array().unwrap();
        assert!(data[..3].iter().zip(values).all(|(a, b)| a.as_f64().unwrap() as f32 == b) && data[3].is_null());
        assert!(text.len() as u64 <= 100 + CHARS * 4 + 50);
        let (length, bytes) = write("m", "1", None, &samples, true);
        let read: Value = serde_json::from_slice(&bytes[..length]).unwrap();
        assert_eq!(read["outputs"][0]["parameters"]["binary_data_size"], 16);
        assert_eq!(bytes[length..], samples.bytes()[..]);
    }
}
