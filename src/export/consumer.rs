//! What a program that has never heard of us needs to feed a student: one JSON document in its metadata.

use serde_json::json;

use crate::axes::{Layout, Modality};
use crate::error::Result;
use crate::export::attach;
use crate::graph::save;
use crate::onnx::ModelProto;
use crate::runtime::student::{ConditionKind, StudentInfo};
use crate::runtime::{Dim, model_values};

/// What a program that has never heard of us needs to feed the file: one JSON document under `disback.consumer`.
pub fn consumer_metadata(model: &mut ModelProto, precision: &str) -> Result<()> {
    let info = StudentInfo::from_model(model)?;
    let (_, outputs) = model_values(model)?;
    let dims = |shape: &[Dim]| {
        shape
            .iter()
            .map(|d| match d {
                Dim::Fixed(n) => json!(n),
                Dim::Symbol(_) => json!("batch"),
            })
            .collect::<Vec<_>>()
    };
    // What lies outside the graph: images are [B, C, H, W] there.
    let layout = match (info.shape.len(), info.layout) {
        (3, Layout::ChannelsFirst) | (_, Layout::Nhwc) => json!("nchw"),
        (_, other) => json!(other),
    };
    let mut inputs = vec![json!({
        "name": "noise", "dtype": info.noise.dtype.to_string(), "shape": dims(&info.noise.shape),
        "layout": layout, "distribution": "standard normal",
    })];
    for c in &info.conditions {
        let mut entry =
            json!({ "name": c.input.name, "dtype": c.input.dtype.to_string(), "shape": dims(&c.input.shape) });
        match c.kind {
            ConditionKind::ClassIndex { classes } => {
                entry["distribution"] = json!(format!("class index, 0 to {}", classes.saturating_sub(1)));
                entry["classes"] = json!(classes);
            }
            ConditionKind::OneHot { classes } => {
                entry["distribution"] = json!("one-hot class");
                entry["classes"] = json!(classes);
            }
            ConditionKind::Embedding => entry["distribution"] = json!("embedding rows of the teacher's encoder"),
        }
        inputs.push(entry);
    }
    let mut outputs: Vec<_> = outputs
        .iter()
        .map(|o| match o.name.as_str() {
            attach::IMAGE => {
                json!({ "name": o.name, "dtype": "u8", "shape": dims(&o.shape), "layout": "nhwc", "range": [0, 255] })
            }
            _ => json!({ "name": o.name, "dtype": o.dtype.to_string(), "shape": dims(&o.shape), "layout": layout,
                "range": info.range }),
        })
        .collect();
    if info.modality != Modality::Image
        && let Some(sample) = outputs.iter_mut().find(|o| o["name"] == "sample")
    {
        sample["modality"] = json!(info.modality);
        sample["sample_rate"] = json!(info.sample_rate);
    }
    let text = json!({ "inputs": inputs, "outputs": outputs, "precision": precision,
        "seed_convention": crate::noise::SEED_CONVENTION })
    .to_string();
    save::set_metadata(model, "disback.consumer", &text);
    save::set_metadata(model, "disback.student.precision", precision);
    Ok(())
}
