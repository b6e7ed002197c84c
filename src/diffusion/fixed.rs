//! Inputs that have the same value in every call (positions, rotary tables, masks): the card's conditions of kind `constant`.
//! They are put into the file as initializers before anything reads it, so that a student has them inside.

use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};
use crate::graph::edit::{self, int_attribute, node};
use crate::graph::{sizes, tensors};
use crate::io::npy;
use crate::onnx::{GraphProto, ModelProto, type_proto};
use crate::tensor::{DType, HostTensor};

use super::card::{InputSpec, TeacherCard};
use super::condition::Condition;

/// One such input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FixedInput {
    /// Name of the graph's input.
    pub name: String,
    /// `.npy`, or `.npz` with an array of the input's name or a single one.
    pub file: PathBuf,
    /// The shape that the card says, checked against the file's.
    pub shape: Option<Vec<usize>>,
}

impl FixedInput {
    /// Takes the conditions of kind `constant` out of a card. A file that does not lie in `folder` (the model's) is looked for
    /// where the program runs.
    pub(super) fn take(card: &mut TeacherCard, folder: Option<&Path>) -> Vec<Self> {
        let mut found = Vec::new();
        card.conditions.retain(|name, condition| {
            let Condition::Constant { file, shape } = condition else { return true };
            let beside = folder.map(|f| f.join(&*file)).filter(|p| p.is_file());
            let file = beside.unwrap_or_else(|| PathBuf::from(&*file));
            found.push(Self { name: name.clone(), file, shape: shape.clone() });
            false
        });
        found
    }

    /// The condition of the card that this was.
    pub(super) fn condition(&self) -> (String, Condition) {
        let file = self.file.display().to_string();
        (self.name.clone(), Condition::Constant { file, shape: self.shape.clone() })
    }

    fn read(&self) -> Result<HostTensor> {
        let shown = || self.file.display().to_string();
        let value = if self.file.extension().is_some_and(|e| e == "npz") {
            let mut arrays = npy::read_npz(&self.file)?;
            let names = arrays.iter().map(|(n, _)| format!("`{n}`")).collect::<Vec<_>>().join(", ");
            let at = arrays.iter().position(|(n, _)| *n == self.name).or(Some(0).filter(|_| arrays.len() == 1));
            let lacking = || {
                Error::usage(format!("holds {names}, but no array `{}`", self.name))
                    .hint("name an array as the input, or give a file of one array")
            };
            arrays.swap_remove(at.ok_or_else(lacking).with_context(shown)?).1
        } else {
            npy::read(&self.file)?
        };
        match &self.shape {
            Some(shape) if shape != value.shape() => Err(Error::usage(format!(
                "{}: an array of shape {:?}, the card says {shape:?}",
                shown(),
                value.shape()
            ))
            .hint(format!("correct `conditions.{}.shape`, or leave it out", self.name))),
            _ => Ok(value),
        }
    }
}

impl InputSpec {
    /// The lines of a card for this input where it has the same value in every call, to be written as they stand.
    pub(crate) fn as_constant(&self) -> Vec<String> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        let key = match !self.name.is_empty() && self.name.chars().all(plain) {
            true => self.name.clone(),
            false => toml::Value::String(self.name.clone()).to_string(),
        };
        let file: String = self.name.chars().map(|c| if plain(c) { c } else { '_' }).collect();
        let sizes: Option<Vec<usize>> = self.shape.iter().copied().collect();
        let mut lines =
            vec![format!("[conditions.{key}]"), "kind = \"constant\"".into(), format!("file = \"{file}.npy\"")];
        lines.extend(sizes.map(|sizes| format!("shape = {sizes:?}")));
        lines
    }
}

/// Puts the values into the file: the inputs become initializers. One whose first dimension is the batch is expanded to the rows of
/// the input `sample`.
///
/// Errors: an input that the graph does not have; a file that cannot be read, or whose array has not the input's shape.
pub fn put_in(proto: &mut ModelProto, sample: &str, fixed: &[FixedInput]) -> Result<()> {
    let Some(graph) = proto.graph.as_mut() else { return Ok(()) };
    fixed.iter().try_for_each(|one| put_one(graph, sample, one).with_context(|| format!("condition `{}`", one.name)))
}

fn put_one(graph: &mut GraphProto, sample: &str, fixed: &FixedInput) -> Result<()> {
    let name = fixed.name.as_str();
    let Some(at) = graph.input.iter().position(|i| i.name() == name) else {
        let known = graph.input.iter().map(|i| format!("`{}`", i.name())).collect::<Vec<_>>().join(", ");
        return Err(Error::usage(format!("the graph has no such input; it has {known}")).hint("correct the card's key"));
    };
    let info = &graph.input[at];
    let dtype = match info.r#type.as_ref().and_then(|t| t.value.as_ref()) {
        Some(type_proto::Value::TensorType(t)) => DType::from_onnx(t.elem_type())?,
        _ => return Err(Error::unsupported("the input is no tensor, so that no file holds its value")),
    };
    let declared = sizes::declared_dims(info);
    let batch = graph.input.iter().find(|i| i.name() == sample).and_then(sizes::declared_dims);
    let batch = batch.and_then(|dims| dims.into_iter().next()).and_then(Result::err);
    // By its name: a free dimension of another is a length.
    let batched = matches!((declared.as_ref().and_then(|d| d.first()), &batch),
        (Some(Err(own)), Some(of_sample)) if own == of_sample && !own.is_empty());
    let mut value = fixed.read()?;
    if let Some(dims) = &declared {
        if batched && value.rank() + 1 == dims.len() {
            let shape: Vec<usize> = std::iter::once(1).chain(value.shape().iter().copied()).collect();
            value = value.reshaped(&shape)?;
        }
        let fits = value.rank() == dims.len()
            && dims.iter().zip(value.shape()).enumerate().all(|(k, (d, n))| match d {
                Ok(d) => d == n,
                Err(_) => !(batched && k == 0) || *n == 1,
            });
        if !fits {
            let shown: Vec<String> =
                dims.iter().map(|d| d.as_ref().map_or_else(|s| s.clone(), ToString::to_string)).collect();
            return Err(Error::usage(format!(
                "{}: an array of shape {:?}, the graph's input is [{}]",
                fixed.file.display(),
                value.shape(),
                shown.join(", ")
            ))
            .hint("a value for all rows has one row, or none, where the input has the batch"));
        }
    }
    let value = value.cast(dtype);
    graph.input.remove(at);
    if !batched {
        graph.initializer.push(tensors::to_proto(name, &value));
        return Ok(());
    }
    let taken = edit::value_names(graph);
    let free = |part: &str| edit::free_name(&taken, &format!("{name}/{part}"));
    let [row, zero, rest, shape, rows, target] = ["row", "zero", "rest", "shape", "rows", "target"].map(free);
    let own: Vec<i64> = value.shape()[1..].iter().map(|&n| n as i64).collect();
    graph.initializer.push(tensors::to_proto(&row, &value));
    graph.initializer.push(tensors::to_proto(&zero, &HostTensor::vec(&[0i64])));
    graph.initializer.push(tensors::to_proto(&rest, &HostTensor::vec(&own)));
    let mut concat = node("Concat", &[&rows, &rest], &target);
    concat.attribute.push(int_attribute("axis", 0));
    let made = [
        node("Shape", &[sample], &shape),
        node("Gather", &[&shape, &zero], &rows),
        concat,
        node("Expand", &[&row, &target], name),
    ];
    graph.node.splice(0..0, made);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graph(ids: &[std::result::Result<usize, &str>]) -> ModelProto {
        let input =
            vec![edit::value_info("x", DType::F32, &[Err("batch"), Ok(4)]), edit::value_info("ids", DType::F32, ids)];
        let nodes = vec![node("Add", &["x", "ids"], "y")];
        let output = vec![edit::value_info("y", DType::F32, &[Err("batch"), Ok(4)])];
        ModelProto {
            graph: Some(GraphProto { input, output, node: nodes, ..GraphProto::default() }),
            ..ModelProto::default()
        }
    }

    #[test]
    fn an_input_of_one_value_becomes_an_initializer() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ids.npy");
        npy::write(&file, &HostTensor::vec(&[1i64, 2, 3, 4])).unwrap();
        let fixed = |shape: Option<Vec<usize>>| FixedInput { name: "ids".into(), file: file.clone(), shape };
        let mut plain = graph(&[Ok(4)]);
        put_in(&mut plain, "x", &[fixed(Some(vec![4]))]).unwrap();
        let made = plain.graph.unwrap();
        assert_eq!((made.input.len(), made.node.len()), (1, 1));
        let held = tensors::from_proto(&made.initializer[0]).unwrap();
        assert_eq!(
            (made.initializer[0].name(), held.dtype(), held.to_f32()),
            ("ids", DType::F32, vec![1., 2., 3., 4.])
        );
        // With the batch in front it is expanded to the sample's rows.
        let mut batched = graph(&[Err("batch"), Ok(4)]);
        put_in(&mut batched, "x", &[fixed(None)]).unwrap();
        let made = batched.graph.unwrap();
        assert_eq!(
            made.node.iter().map(|n| n.op_type()).collect::<Vec<_>>(),
            ["Shape", "Gather", "Concat", "Expand", "Add"]
        );
        for (model, fixed, words) in [
            (graph(&[Ok(5)]), fixed(None), "shape [4], the graph's input is [5]"),
            (graph(&[Ok(4)]), fixed(Some(vec![2, 2])), "the card says [2, 2]"),
            (graph(&[Ok(4)]), FixedInput { name: "other".into(), ..fixed(None) }, "no such input"),
            (graph(&[Ok(4)]), FixedInput { file: dir.path().join("no.npy"), ..fixed(None) }, "no.npy"),
        ] {
            let mut model = model;
            let e = put_in(&mut model, "x", &[fixed]).unwrap_err();
            assert!(e.to_string().contains(words), "{e}");
        }
    }
}
