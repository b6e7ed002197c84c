//! Another operator set version for a graph, as far as the operators mean the same in both or can be written the other way.

use crate::error::{Error, Result};
use crate::graph::{op_schema, tensors};
use crate::onnx::{GraphProto, ModelProto, NodeProto};
use crate::tensor::HostTensor;

use crate::graph::edit;

/// Oldest and newest version that is written.
pub const RANGE: std::ops::RangeInclusive<i64> = 13..=25;

/// Converts the default domain to `target` in place.
///
/// Errors, of kind [`crate::Kind::Usage`]: a version outside [`RANGE`] or that the graph's operators do not exist in;
/// an operator whose change between the versions is not known here. The node is named.
pub fn convert(model: &mut ModelProto, target: i64) -> Result<()> {
    let from = edit::opset(model);
    if target == from {
        return Ok(());
    }
    let span = || format!("{} to {}", RANGE.start(), RANGE.end());
    if !RANGE.contains(&target) {
        return Err(Error::usage(format!("--opset {target}: expected {}", span())));
    }
    if !RANGE.contains(&from) {
        return Err(Error::usage(format!("the graph is of opset {from}; --opset converts opsets {}", span()))
            .hint("export the teacher again with a newer opset"));
    }
    let Some(graph) = model.graph.as_mut() else { return Ok(()) };
    let mut made = Vec::new();
    convert_graph(graph, from, target, &mut made)?;
    graph.initializer.extend(made);
    for o in &mut model.opset_import {
        if matches!(o.domain(), "" | "ai.onnx") {
            o.version = Some(target);
        }
    }
    // The oldest IR that knows the operator set: checkers refuse a newer set under an older IR.
    let ir = match target {
        ..=14 => 7,
        15..=18 => 8,
        19..=20 => 9,
        21..=22 => 10,
        23 => 11,
        24 => 12,
        _ => 13,
    };
    model.ir_version = Some(model.ir_version().max(ir));
    Ok(())
}

fn convert_graph(graph: &mut GraphProto, from: i64, to: i64, made: &mut Vec<crate::onnx::TensorProto>) -> Result<()> {
    let (low, high) = (from.min(to), from.max(to));
    let held: std::collections::HashMap<String, Vec<i64>> = edit::constants(graph)
        .into_iter()
        .filter(|(_, t)| t.dims.len() <= 1 && t.data_type() == 7)
        .filter_map(|(n, t)| Some((n, tensors::from_proto(t).ok()?.to_i64())))
        .collect();
    for n in &mut graph.node {
        if !matches!(n.domain(), "" | "ai.onnx") {
            continue;
        }
        for g in n.attribute.iter_mut().flat_map(|a| a.g.iter_mut().chain(&mut a.graphs)) {
            convert_graph(g, from, to, made)?;
        }
        let label = edit::label(n);
        let Some(row) = op_schema::find("", n.op_type()) else { continue };
        let since = row.since;
        if since > to {
            return Err(Error::usage(format!("--opset {to}: {label} exists since opset {since}"))
                .hint(format!(
                    "choose {since} or newer, or start from the run (`disback export TEACHER --run DIR --opset {to}`), where nothing \
                     is fused yet; else export the teacher with opset {to}"
                )));
        }
        let steps: Vec<i64> = row.changes.iter().copied().filter(|&v| v > low && v <= high).collect();
        for step in if to > from { steps.clone() } else { steps.iter().rev().copied().collect() } {
            change(n, step, to > from, &held, made)
                .map_err(|e| e.context(format!("{label} from opset {from} to {to}")))?;
        }
    }
    Ok(())
}

/// One step of one operator, up to `version` or down from it.
fn change(
    n: &mut NodeProto,
    version: i64,
    up: bool,
    held: &std::collections::HashMap<String, Vec<i64>>,
    made: &mut Vec<crate::onnx::TensorProto>,
) -> Result<()> {
    let refuse = |what: &str| Err(Error::usage(what.to_owned()).hint("keep the graph's opset, or choose a nearer one"));
    let op = n.op_type().to_owned();
    match (op.as_str(), version, up) {
        // Axes moved from an attribute to an input.
        (o, 18, true) if o.starts_with("Reduce") => {
            if let Some(axes) = edit::take_attribute(n, "axes") {
                let name = format!("{}/axes", n.output[0]);
                made.push(tensors::to_proto(&name, &HostTensor::vec(&axes.ints)));
                n.input.push(name);
            }
        }
        (o, 18, false) if o.starts_with("Reduce") => {
            let nothing = edit::take_attribute(n, "noop_with_empty_axes").and_then(|a| a.i).unwrap_or(0);
            if n.input.len() > 1 {
                let name = n.input.remove(1);
                match held.get(&name) {
                    Some(axes) if !axes.is_empty() => n.attribute.push(edit::ints_attribute("axes", axes)),
                    Some(_) if nothing == 0 => {}
                    _ if name.is_empty() && nothing == 0 => {}
                    _ => return refuse("its axes are not constant"),
                }
            } else if nothing != 0 {
                return refuse("reduces nothing (noop_with_empty_axes)");
            }
        }
        ("Split", 18, true) => {
            if n.input.get(1).is_none_or(String::is_empty) {
                n.attribute.push(edit::int_attribute("num_outputs", n.output.len() as i64));
            }
        }
        ("Split", 18, false) => {
            edit::take_attribute(n, "num_outputs");
        }
        // 18 added antialias, axes and keep_aspect_ratio_policy; 19 half_pixel_symmetric. Their defaults are the old meaning.
        ("Resize", _, true) => {}
        ("Resize", 18, false) => {
            let plain = edit::int(n, "antialias").unwrap_or(0) == 0
                && edit::ints(n, "axes").is_none()
                && edit::text(n, "keep_aspect_ratio_policy").is_none_or(|p| p == "stretch");
            if !plain {
                return refuse("antialias, axes and keep_aspect_ratio_policy are not in opset 17");
            }
            for name in ["antialias", "keep_aspect_ratio_policy"] {
                edit::take_attribute(n, name);
            }
            n.input.resize(n.input.len().max(3), String::new());
        }
        ("Resize", 19, false) => {
            if edit::text(n, "coordinate_transformation_mode").as_deref() == Some("half_pixel_symmetric") {
                return refuse("half_pixel_symmetric is not in opset 18");
            }
        }
        ("GridSample", 20, _) => {
            let mode = edit::take_attribute(n, "mode");
            let text = mode.and_then(|m| m.s).map(|s| String::from_utf8_lossy(&s).into_owned());
            let pairs = [("bilinear", "linear"), ("bicubic", "cubic"), ("nearest", "nearest")];
            let text = text.unwrap_or_else(|| if up { "bilinear" } else { "linear" }.to_owned());
            let found = pairs.iter().find(|(old, new)| text == if up { *old } else { *new });
            let Some((old, new)) = found else { return refuse("its mode is unknown") };
            n.attribute.push(edit::text_attribute("mode", if up { new } else { old }));
        }
        // Scale and bias are one a group before 21 and one a channel from 21.
        ("GroupNormalization", 21, _) => return refuse("GroupNormalization changed its scale and bias in opset 21"),
        ("BatchNormalization", 14 | 15, _) => {
            if n.output.len() > 1 || edit::int(n, "training_mode").unwrap_or(0) != 0 {
                return refuse("BatchNormalization in training mode");
            }
            if !up {
                edit::take_attribute(n, "training_mode");
            }
        }
        ("AveragePool", 19, false) => {
            if edit::ints(n, "dilations").is_some_and(|d| d.iter().any(|&d| d != 1)) {
                return refuse("dilations are not in opset 18");
            }
            edit::take_attribute(n, "dilations");
        }
        ("AveragePool", 19, true) | ("LpPool" | "CumSum", _, true) => {}
        _ => return refuse("the operator changed in between"),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::OperatorSetIdProto;

    fn model(nodes: Vec<NodeProto>, opset: i64) -> ModelProto {
        ModelProto {
            ir_version: Some(8),
            opset_import: vec![OperatorSetIdProto { domain: Some(String::new()), version: Some(opset) }],
            graph: Some(GraphProto { node: nodes, ..GraphProto::default() }),
            ..ModelProto::default()
        }
    }

    #[test]
    fn axes_move_to_an_input_and_back() {
        let mut mean = edit::node("ReduceMean", &["x"], "y");
        mean.attribute.push(edit::ints_attribute("axes", &[2, 3]));
        let before = model(vec![mean], 17);
        let mut there = before.clone();
        convert(&mut there, 20).unwrap();
        let graph = there.graph.as_ref().unwrap();
        assert_eq!((graph.node[0].input.len(), graph.initializer.len()), (2, 1));
        assert!(graph.node[0].attribute.is_empty() && edit::opset(&there) == 20 && there.ir_version() == 9);
        convert(&mut there, 17).unwrap();
        assert_eq!(there.graph.unwrap().node, before.graph.unwrap().node);
    }

    #[test]
    fn what_cannot_be_written_in_a_version_is_named() {
        let mut young = model(vec![edit::node("Gelu", &["x"], "y")], 20);
        let e = convert(&mut young, 17).unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains("Gelu node `disback/y` exists since opset 20"), "{e}");
        // Not only what exports of diffusion networks contain.
        let mut rare = model(vec![edit::node("Bernoulli", &["x"], "y")], 17);
        assert!(convert(&mut rare, 13).unwrap_err().to_string().contains("exists since opset 15"));
        let mut old = model(vec![], 11);
        assert!(convert(&mut old, 17).unwrap_err().to_string().contains("opset 11"));
        assert!(convert(&mut model(vec![], 17), 40).unwrap_err().to_string().contains("13 to 25"));
        let mut norm = model(vec![edit::node("GroupNormalization", &["x", "s", "b"], "y")], 18);
        assert!(convert(&mut norm, 21).unwrap_err().to_string().contains("changed its scale"));
    }
}
