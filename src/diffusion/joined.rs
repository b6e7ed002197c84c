//! Networks that take more channels than they give (inpainting, an image to edit or to enlarge): their caller joins conditions to
//! the sample along the channels. The card's `concat` says in which order; the join is put into the file before anything reads it,
//! so that each part is an input of its own, for training and in the student.

use std::collections::HashMap;

use crate::axes::written;
use crate::error::{Error, Result};
use crate::graph::edit::{self, int_attribute, node};
use crate::graph::sizes;
use crate::onnx::tensor_shape_proto::{Dimension, dimension};
use crate::onnx::{GraphProto, ModelProto, TensorShapeProto, ValueInfoProto, type_proto};

use super::card::TeacherCard;
use super::condition::Condition;

impl TeacherCard {
    /// Checks `concat`: the sample once, and conditions whose rows are arrays, each once.
    pub(super) fn validate_concat(&self) -> Result<()> {
        if self.concat.is_empty() {
            return Ok(());
        }
        let bad = |what: String| Err(Error::usage(format!("card: `concat` {what}")));
        let (sample, named) = (&self.sample, |n: &String| self.concat.iter().filter(|c| *c == n).count());
        if self.graph_channel_axis().is_none() {
            return bad("joins channels, but `layout` says that no axis holds any".into());
        }
        if named(sample) != 1 || self.concat.len() < 2 {
            return bad(format!(
                "names `{sample}` once, for the sample, and at least one condition; found {:?}",
                self.concat
            ));
        }
        for name in self.concat.iter().filter(|n| *n != sample) {
            if named(name) > 1 {
                return bad(format!("names `{name}` twice"));
            }
            match self.conditions.get(name) {
                Some(Condition::Embedding { .. }) => {}
                _ => {
                    return bad(format!(
                        "names `{name}`, which is no condition of kind `embedding`: give conditions.{name}.kind and .shape"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Gives a graph the parts of this card's `concat` as inputs of their own.
    ///
    /// Errors: see [`ResolvedCard::put_into`](super::card_source::ResolvedCard::put_into).
    pub fn put_parts_into(&self, proto: &mut ModelProto) -> Result<()> {
        if self.concat.is_empty() { Ok(()) } else { put_in(proto, self, &self.concat) }
    }
}

/// Replaces the input `card.sample` by the parts that `concat` names and their join along the channels. The input keeps its name,
/// with the sample's channels only; the other parts become inputs with the names of their conditions.
///
/// Errors: parts whose shapes are not the sample's but for the channels; parts with another number of channels in all than the
/// graph takes; a condition of the name of another input.
pub(super) fn put_in(proto: &mut ModelProto, card: &TeacherCard, concat: &[String]) -> Result<()> {
    let Some(graph) = proto.graph.as_mut() else { return Ok(()) };
    let fail = |what: String| {
        Error::usage(format!("the card contradicts the graph: `concat`: {what}"))
            .hint("correct the card: --card key=value, <model>.card.toml, or the model's metadata_props")
    };
    let Some(at) = graph.input.iter().position(|i| i.name() == card.sample) else {
        return Err(fail(format!("the graph has no input `{}`", card.sample)));
    };
    let Some(axis) = card.graph_channel_axis() else { return Ok(()) };
    let row = card.graph_shape();
    let shapes: Vec<Vec<usize>> =
        concat.iter().map(|name| card.conditions.get(name).map_or_else(|| row.clone(), Condition::row_shape)).collect();
    for (name, shape) in concat.iter().zip(&shapes) {
        let same =
            shape.len() == row.len() && shape.iter().zip(&row).enumerate().all(|(k, (a, b))| k == axis || a == b);
        if !same {
            return Err(fail(format!(
                "`{name}` is {}, which does not join {} along axis {}",
                written(shape),
                written(&row),
                axis + 1
            )));
        }
        if *name != card.sample && graph.input.iter().any(|i| i.name() == name) {
            return Err(fail(format!(
                "`{name}` is an input of the graph already, so that it is not a part of another"
            )));
        }
    }
    let whole = graph.input[at].clone();
    let total: usize = shapes.iter().map(|s| s[axis]).sum();
    if let Some(dims) = sizes::declared_dims(&whole)
        && let Some(Ok(takes)) = dims.get(axis + 1)
        && *takes != total
    {
        let counts = concat.iter().zip(&shapes).map(|(n, s)| format!("{} of `{n}`", s[axis])).collect::<Vec<_>>();
        return Err(fail(format!("the graph takes {takes} channels, the parts have {total}: {}", counts.join(", "))));
    }
    let joined = edit::free_name(&edit::value_names(graph), &format!("{}/joined", card.sample));
    edit::redirect(graph, &HashMap::from([(card.sample.clone(), joined.clone())]));
    hand_on_output(graph, &card.sample, &joined);
    let parts = concat.iter().zip(&shapes).map(|(name, shape)| part(&whole, name, axis + 1, shape[axis]));
    graph.input.splice(at..=at, parts);
    let names: Vec<&str> = concat.iter().map(String::as_str).collect();
    let mut concat = node("Concat", &names, &joined);
    concat.attribute.push(int_attribute("axis", axis as i64 + 1));
    graph.node.insert(0, concat);
    Ok(())
}

/// A graph that gives its input as an output gave all channels.
fn hand_on_output(graph: &mut GraphProto, sample: &str, joined: &str) {
    for output in graph.output.iter_mut().filter(|o| o.name() == sample) {
        output.name = Some(joined.to_owned());
    }
}

/// The input with another name and number of channels.
fn part(whole: &ValueInfoProto, name: &str, axis: usize, channels: usize) -> ValueInfoProto {
    let mut info = whole.clone();
    info.name = Some(name.to_owned());
    let tensor = match info.r#type.as_mut().and_then(|t| t.value.as_mut()) {
        Some(type_proto::Value::TensorType(tensor)) => tensor,
        _ => return info,
    };
    if let Some(TensorShapeProto { dim }) = tensor.shape.as_mut()
        && let Some(d) = dim.get_mut(axis)
    {
        *d = Dimension { value: Some(dimension::Value::DimValue(channels as i64)), ..Dimension::default() };
    }
    info
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DType;

    fn graph(channels: std::result::Result<usize, &str>) -> ModelProto {
        let input = vec![edit::value_info("x", DType::F32, &[Err("batch"), channels, Err("h"), Ok(4)])];
        let output = vec![edit::value_info("y", DType::F32, &[Err("batch"), Ok(2), Err("h"), Ok(4)])];
        let graph = GraphProto { input, output, node: vec![node("Conv", &["x", "w"], "y")], ..GraphProto::default() };
        ModelProto { graph: Some(graph), ..ModelProto::default() }
    }

    fn card(concat: &[&str], mask: &[usize]) -> TeacherCard {
        let mut card = TeacherCard::plain(&[2, 8, 4]);
        card.concat = concat.iter().map(|s| (*s).to_owned()).collect();
        card.conditions.insert("mask".into(), Condition::Embedding { shape: mask.to_vec(), null: None });
        card
    }

    #[test]
    fn parts_become_inputs_and_are_joined_in_their_order() {
        let mut proto = graph(Ok(3));
        card(&["mask", "x"], &[1, 8, 4]).put_parts_into(&mut proto).unwrap();
        let made = proto.graph.unwrap();
        let dims = |i: &ValueInfoProto| sizes::declared_dims(i).unwrap();
        let free = |s: &str| Err::<usize, String>(s.into());
        assert_eq!(made.input.iter().map(|i| i.name()).collect::<Vec<_>>(), ["mask", "x"]);
        assert_eq!(dims(&made.input[0]), [free("batch"), Ok(1), free("h"), Ok(4)]);
        assert_eq!(dims(&made.input[1]), [free("batch"), Ok(2), free("h"), Ok(4)]);
        let [concat, conv] = made.node.as_slice() else { panic!("{:?}", made.node) };
        assert_eq!((concat.op_type(), concat.attribute[0].i()), ("Concat", 1));
        assert_eq!(concat.input, ["mask", "x"]);
        assert_eq!(conv.input, [concat.output[0].as_str(), "w"]);
    }

    #[test]
    fn parts_that_do_not_fit_are_refused_by_name_and_number() {
        for (concat, mask, channels, words) in [
            (
                vec!["x", "mask"],
                vec![2, 8, 4],
                Ok(3),
                "the graph takes 3 channels, the parts have 4: 2 of `x`, 2 of `mask`",
            ),
            (
                vec!["x", "mask"],
                vec![1, 8, 5],
                Err("c"),
                "`mask` is [B, 1, 8, 5], which does not join [B, 2, 8, 4] along axis 1",
            ),
        ] {
            let e = card(&concat, &mask).put_parts_into(&mut graph(channels)).unwrap_err().to_string();
            assert!(e.contains(words), "{e}");
        }
        for (concat, words) in [
            (vec!["mask"], "names `x` once, for the sample, and at least one condition"),
            (vec!["x", "image"], "`image`, which is no condition of kind `embedding`"),
            (vec!["x", "mask", "mask"], "names `mask` twice"),
        ] {
            let e = card(&concat, &[1, 8, 4]).validate().unwrap_err().to_string();
            assert!(e.contains(words), "{e}");
        }
    }
}
