//! External data of a model file that an engine opens by itself.

use std::path::Path;

use prost::Message;

use crate::error::{Context, Error, Result};
use crate::onnx::{GraphProto, ModelProto, TensorProto};

/// Refuses external data that is there and no regular file: an engine would wait for a pipe, and read a device, for ever. (Whether it is
/// there, and inside the model's folder, is the engine's to say.)
pub(super) fn refuse_pipes(model: &Path) -> Result<()> {
    let bytes = crate::files::map(model)?;
    let proto = ModelProto::decode(bytes).map_err(|e| Error::invalid(format!("not an ONNX model: {e}")))?;
    let folder = model.parent().unwrap_or(Path::new(""));
    proto.graph.iter().try_for_each(|g| graph(g, folder))
}

fn graph(g: &GraphProto, folder: &Path) -> Result<()> {
    g.initializer.iter().try_for_each(|t| tensor(t, folder))?;
    g.node.iter().flat_map(|n| &n.attribute).try_for_each(|a| {
        a.t.iter().chain(&a.tensors).try_for_each(|t| tensor(t, folder))?;
        a.g.iter().chain(&a.graphs).try_for_each(|g| graph(g, folder))
    })
}

fn tensor(t: &TensorProto, folder: &Path) -> Result<()> {
    let Some(entry) = t.external_data.iter().find(|e| e.key() == "location") else { return Ok(()) };
    let path = folder.join(entry.value());
    match path.metadata() {
        Ok(found) if !found.is_file() => {
            crate::files::open(&path).map(drop).with_context(|| format!("external data file `{}`", entry.value()))
        }
        _ => Ok(()),
    }
}
