//! Triton's `config.pbtxt`: protobuf's text form of `ModelConfig`.

use std::fmt::Write;

use super::{Packed, TOKENS};
use crate::runtime::ValueInfo;
use crate::tensor::DType;

/// The configuration of a model of one version.
pub(super) fn config(p: &Packed) -> String {
    let mut text = format!(
        "# A student of disback: noise (standard normal) and conditions in, `sample` out, in one call.\n\
         name: {}\nbackend: \"onnxruntime\"\n",
        quoted(&p.name)
    );
    let _ = writeln!(text, "max_batch_size: {}", if p.batch.is_some() { 0 } else { p.max_batch });
    for input in &p.inputs {
        let _ = writeln!(text, "input {{\n{}}}", tensor(p, input));
    }
    for output in &p.outputs {
        let _ = writeln!(text, "output {{\n{}}}", tensor(p, output));
    }
    // What waits while an instance is busy shares its next call; nothing waits for company.
    if p.batch.is_none() {
        text.push_str("dynamic_batching {\n  max_queue_delay_microseconds: 0\n}\n");
    }
    text.push_str("instance_group {\n  kind: KIND_AUTO\n  count: 1\n}\n");
    // The first caller should not wait for what is made once: for one sample, and for the largest batch.
    let sizes = if p.batch.is_some() { vec![1] } else { vec![1, p.max_batch] };
    for (k, size) in sizes.iter().enumerate().filter(|(k, size)| *k == 0 || **size > 1) {
        let _ = write!(text, "model_warmup {{\n  name: \"{}\"\n  batch_size: {size}\n", ["one", "most"][k]);
        for input in &p.inputs {
            text.push_str(&warm(p, input));
        }
        text.push_str("}\n");
    }
    text
}

/// Protobuf's name of an element type.
fn data_type(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "TYPE_FP32",
        DType::F64 => "TYPE_FP64",
        DType::F16 => "TYPE_FP16",
        DType::BF16 => "TYPE_BF16",
        DType::I8 => "TYPE_INT8",
        DType::I16 => "TYPE_INT16",
        DType::I32 => "TYPE_INT32",
        DType::I64 => "TYPE_INT64",
        DType::U8 => "TYPE_UINT8",
        DType::U16 => "TYPE_UINT16",
        DType::U32 => "TYPE_UINT32",
        DType::U64 => "TYPE_UINT64",
        DType::Bool => "TYPE_BOOL",
    }
}

/// Sizes as the configuration has them: without the batch, but for a model of a fixed one.
fn dims(p: &Packed, value: &ValueInfo, free: i64) -> Vec<i64> {
    p.batch.map(|n| n as i64).into_iter().chain(Packed::row(value, free)).collect()
}

fn tensor(p: &Packed, value: &ValueInfo) -> String {
    let sizes = dims(p, value, -1);
    // A tensor that has a batch and nothing else, such as class numbers, is given as a column.
    let (sizes, reshape) = if sizes.is_empty() { (vec![1], "  reshape: { shape: [] }\n") } else { (sizes, "") };
    format!("  name: {}\n  data_type: {}\n  dims: {sizes:?}\n{reshape}", quoted(&value.name), data_type(value.dtype))
}

fn warm(p: &Packed, input: &ValueInfo) -> String {
    let sizes = dims(p, input, TOKENS as i64);
    let sizes = if sizes.is_empty() { vec![1] } else { sizes };
    // (A number at random is no class.)
    let data = if input.dtype.is_float() { "random_data" } else { "zero_data" };
    format!(
        "  inputs {{\n    key: {}\n    value {{ data_type: {} dims: {sizes:?} {data}: true }}\n  }}\n",
        quoted(&input.name),
        data_type(input.dtype)
    )
}

/// A string of protobuf's text form.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => c.to_string().bytes().for_each(|b| {
                let _ = write!(out, "\\{b:03o}");
            }),
            c => out.push(c),
        }
    }
    out + "\""
}
