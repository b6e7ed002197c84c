//! The side file of a converted teacher: inputs, and what the framework itself made of them.

use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};
use crate::graph::Port;
use crate::io::npy;
use crate::tensor::HostTensor;

/// Inputs of a graph and the framework's own outputs for them, by name.
#[derive(Debug, Clone)]
pub struct Stored {
    /// The archive that they were read from.
    pub path: PathBuf,
    /// One tensor for each input of the graph, in the graph's order.
    pub inputs: Vec<(String, HostTensor)>,
    /// The outputs that the archive holds, at least one, in the graph's order.
    pub outputs: Vec<(String, HostTensor)>,
}

/// Reads `<model>.sample.npz` beside a model, where there is one.
///
/// Errors: an archive that does not read, lacks an input of the graph, or holds none of its outputs.
pub fn stored(model: &Path, inputs: &[Port], outputs: &[Port]) -> Result<Option<Stored>> {
    let path = model.with_extension("sample.npz");
    if !path.is_file() {
        return Ok(None);
    }
    let arrays = npy::read_npz(&path)?;
    let pick = |ports: &[Port]| -> Vec<(String, HostTensor)> {
        ports.iter().filter_map(|p| arrays.iter().find(|(n, _)| *n == p.name).cloned()).collect()
    };
    let found = Stored { inputs: pick(inputs), outputs: pick(outputs), path };
    let missing: Vec<_> =
        inputs.iter().filter(|p| !arrays.iter().any(|(n, _)| *n == p.name)).map(|p| &p.name).collect();
    let what = match missing.as_slice() {
        [] if found.outputs.is_empty() => "holds no output of the graph".to_owned(),
        [] => return Ok(Some(found)),
        [name, ..] => format!("has no array `{name}`, which the graph takes"),
    };
    Err(Error::mismatch(what).hint("the file belongs to another model: convert again, or remove it"))
        .with_context(|| found.path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DType;

    fn port(name: &str) -> Port {
        Port { name: name.into(), value: 0, dtype: Some(DType::F32), shape: None }
    }

    #[test]
    fn a_side_file_of_another_model_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("t.onnx");
        assert!(stored(&model, &[port("x")], &[port("y")]).unwrap().is_none());
        let row = HostTensor::vec(&[1f32]);
        npy::write_npz(&dir.path().join("t.sample.npz"), &[("x", &row), ("y", &row)]).unwrap();
        let found = stored(&model, &[port("x")], &[port("y")]).unwrap().unwrap();
        assert_eq!((found.inputs.len(), found.outputs[0].0.as_str()), (1, "y"));
        let text = stored(&model, &[port("sigma")], &[port("y")]).unwrap_err().to_string();
        assert!(text.contains("`sigma`") && text.contains("t.sample.npz"), "{text}");
        assert!(stored(&model, &[port("x")], &[port("z")]).is_err());
    }
}
