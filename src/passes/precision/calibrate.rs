//! How large the values inside a network become on calibration inputs, and whether any of them is not finite.

use std::collections::HashMap;

use crate::error::Result;
use crate::graph::tensors;
use crate::onnx::ModelProto;
use crate::tensor::DType;

use crate::graph::edit;
use crate::graph::edit::int_attribute;
use crate::passes::evaluate;
use crate::passes::evaluate::Inputs;

/// One value over all calibration inputs.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Range {
    /// Largest absolute value.
    pub max_abs: f64,
    /// NaN or infinity occurred.
    pub broken: bool,
}

/// Ranges of the floating values that nodes make (`types` as from [`evaluate::dtypes`]) and of floating initializers.
/// The reductions are part of the network that is run, so that no intermediate value has to be kept.
pub fn ranges(model: &ModelProto, types: &HashMap<String, DType>, inputs: &[Inputs]) -> Result<HashMap<String, Range>> {
    let mut found = HashMap::new();
    let Some(graph) = &model.graph else { return Ok(found) };
    for t in &graph.initializer {
        if let Ok(tensor) = tensors::from_proto(t)
            && tensor.dtype().is_float()
        {
            let values = tensor.to_f32();
            let max_abs = values.iter().fold(0f64, |m, v| m.max(f64::from(v.abs())));
            found.insert(t.name().to_owned(), Range { max_abs, broken: values.iter().any(|v| !v.is_finite()) });
        }
    }
    let made: Vec<String> = graph
        .node
        .iter()
        .flat_map(|n| &n.output)
        .filter(|o| types.get(*o).is_some_and(|d| d.is_float()))
        .cloned()
        .collect();
    let mut watched = model.clone();
    let Some(graph) = watched.graph.as_mut() else { return Ok(found) };
    let mut names = Vec::new();
    for (k, value) in made.iter().enumerate() {
        let at = |what: &str| format!("disback/{what}/{k}");
        // bf16 and f16 are watched as f32: reductions of theirs are not everywhere.
        let mut cast = edit::node("Cast", &[value], &at("f32"));
        cast.attribute.push(int_attribute("to", i64::from(DType::F32.to_onnx())));
        let mut largest = edit::node("ReduceMax", &[&at("abs")], &at("max"));
        let mut finite = edit::node("ReduceSum", &[&at("zero")], &at("bad"));
        for n in [&mut largest, &mut finite] {
            n.attribute.push(int_attribute("keepdims", 0));
        }
        // x - x is 0 for a number and NaN for NaN and infinity.
        graph.node.extend([
            cast,
            edit::node("Abs", &[&at("f32")], &at("abs")),
            largest,
            edit::node("Sub", &[&at("f32"), &at("f32")], &at("zero")),
            finite,
        ]);
        names.extend([at("max"), at("bad")]);
    }
    for run in evaluate::values(&watched, &names, inputs)? {
        for (k, value) in made.iter().enumerate() {
            let read = |what: &str| run.get(&format!("disback/{what}/{k}")).and_then(|t| t.to_f64().first().copied());
            let range: &mut Range = found.entry(value.clone()).or_default();
            range.max_abs = range.max_abs.max(read("max").unwrap_or(0.0));
            range.broken |= read("bad").is_some_and(|v| v != 0.0);
        }
    }
    Ok(found)
}
