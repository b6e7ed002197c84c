//! Reading an `.onnx` file: memory-mapped, decoded without copying the weights, external data resolved and guarded.

use std::collections::{HashMap, HashSet};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use prost::Message;
use sha2::{Digest, Sha256};

use crate::error::{Context, Error, Result};
use crate::graph::definition::{Call, Definition};
use crate::graph::inline::inline;
use crate::graph::sizes::Sizes;
use crate::onnx::{GraphProto, ModelProto, TensorProto, tensor_proto::DataLocation};

/// An ONNX model as it came: the decoded file, with every external tensor resolved to a slice of its memory-mapped file.
#[derive(Debug, Clone)]
pub struct Model {
    /// Where it was read from; empty for a model made in memory.
    pub path: PathBuf,
    /// The decoded file, its functions inlined. `raw_data` of external tensors is filled in; `external_data` still says where it came from.
    pub proto: Arc<ModelProto>,
    /// Sizes of dimensions that the file leaves free; they are put in where the graph is read.
    pub sizes: Arc<Sizes>,
    /// Calls of a caller's own operators that stand in `proto` as their bodies.
    pub calls: Arc<Vec<Call>>,
}

impl Model {
    /// Reads a model. The file and its external data are memory-mapped; nothing is copied.
    ///
    /// Errors: not an ONNX file, truncated, external data missing, too short or outside the model's folder.
    pub fn load(path: &Path) -> Result<Self> {
        Self::load_with(path, &[])
    }

    /// [`Model::load`] of a file with operators that ONNX does not define.
    ///
    /// Errors: besides, a definition for other operator sets than the file's.
    pub fn load_with(path: &Path, definitions: &[Definition]) -> Result<Self> {
        let shown = path.display();
        if path.is_dir() {
            return Err(Error::io(format!("{shown} is a folder, expected an .onnx file"))
                .hint("`disback-convert diffusers FOLDER` makes teacher.onnx of a diffusers model; `disback-convert --help` lists other frameworks"));
        }
        let bytes = crate::files::map(path).with_context(|| format!("cannot read {shown}"))?;
        let mut proto = decode(&bytes).map_err(|e| by_extension(e, path)).with_context(|| shown.to_string())?;
        let calls = inline(&mut proto, definitions).with_context(|| shown.to_string())?;
        drop_weight_inputs(&mut proto);
        let dir = match path.parent() {
            Some(p) if !p.as_os_str().is_empty() => p.to_path_buf(),
            _ => PathBuf::from("."),
        };
        let mut files = ExternalFiles { dir, open: HashMap::new() };
        if let Some(graph) = proto.graph.as_mut() {
            resolve_graph(graph, &mut files).with_context(|| shown.to_string())?;
        }
        Ok(Self { path: path.to_path_buf(), calls: Arc::new(calls), ..Self::from_proto(proto) })
    }

    /// Takes a model from memory (an exporter of ours, a test); external data is refused.
    pub fn from_bytes(bytes: Bytes) -> Result<Self> {
        Self::from_bytes_with(bytes, &[])
    }

    /// [`Model::from_bytes`] of a model with operators that ONNX does not define.
    pub fn from_bytes_with(bytes: Bytes, definitions: &[Definition]) -> Result<Self> {
        let mut proto = decode(&bytes)?;
        let calls = inline(&mut proto, definitions)?;
        drop_weight_inputs(&mut proto);
        if let Some(graph) = proto.graph.as_mut() {
            let mut none = ExternalFiles { dir: PathBuf::new(), open: HashMap::new() };
            resolve_graph(graph, &mut none)?;
        }
        Ok(Self { calls: Arc::new(calls), ..Self::from_proto(proto) })
    }

    /// Takes a decoded model.
    pub fn from_proto(proto: ModelProto) -> Self {
        Self { path: PathBuf::new(), proto: Arc::new(proto), sizes: Arc::default(), calls: Arc::default() }
    }

    /// `metadata_props` as pairs, in file order.
    pub fn metadata(&self) -> Vec<(String, String)> {
        self.proto.metadata_props.iter().map(|p| (p.key().to_owned(), p.value().to_owned())).collect()
    }

    /// SHA-256 of the file's bytes and of its external data: names this teacher in run directories.
    pub fn hash(&self) -> String {
        hash((*self.proto).clone())
    }

    /// [`Model::hash`] of graph and weights alone, whatever the metadata says and whoever wrote the file.
    pub fn graph_hash(&self) -> String {
        let graph = self.proto.graph.clone();
        let (opset_import, functions) = (self.proto.opset_import.clone(), self.proto.functions.clone());
        hash(ModelProto { graph, opset_import, functions, ..ModelProto::default() })
    }
}

/// Says what makes an ONNX file of a framework's own weights.
fn by_extension(error: Error, path: &Path) -> Error {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    let route = match extension.as_str() {
        "safetensors" | "pt" | "pth" | "ckpt" | "bin" => "torch MODULE:FUNCTION --state-dict FILE",
        "pkl" => "edm FILE --code CHECKOUT",
        "keras" | "h5" => "keras FILE",
        "msgpack" => "jax MODULE:FUNCTION --weights FILE",
        "pdparams" | "pdmodel" => "paddle MODULE:FUNCTION --weights FILE",
        _ => return error,
    };
    Error::invalid("weights of a framework, expected an .onnx file")
        .hint(format!("`disback-convert {route}` makes teacher.onnx of the weights and their network"))
}

fn hash(mut bare: ModelProto) -> String {
    let mut sha = Sha256::new();
    let mut weights = Vec::new();
    if let Some(graph) = bare.graph.as_mut() {
        for t in &mut graph.initializer {
            weights.push(t.raw_data.take().unwrap_or_default());
            t.external_data.clear();
            t.data_location = None;
        }
    }
    sha.update(bare.encode_to_vec());
    weights.iter().for_each(|w| sha.update(w));
    sha.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// Takes initializers out of the graph's inputs, where IR version 3 and `keep_initializers_as_inputs` list them: a caller who
/// gives none gets the initializer, and nobody gives weights. From IR version 4 on the file may say so.
fn drop_weight_inputs(proto: &mut ModelProto) {
    let Some(graph) = proto.graph.as_mut() else { return };
    let weights: HashSet<&str> = graph.initializer.iter().map(|t| t.name()).collect();
    let before = graph.input.len();
    // (Two inputs of one name are a fault that is told where the graph is read.)
    let mut seen = HashSet::new();
    graph.input.retain(|v| !weights.contains(v.name()) || !seen.insert(v.name().to_owned()));
    if graph.input.len() < before {
        proto.ir_version = Some(proto.ir_version().max(4));
    }
}

fn decode(bytes: &Bytes) -> Result<ModelProto> {
    if bytes.is_empty() {
        return Err(Error::invalid("the file is empty, expected an ONNX model"));
    }
    let proto = ModelProto::decode(bytes.clone()).map_err(|e| {
        Error::invalid(format!("not an ONNX model, or cut short ({e})"))
            .hint("check that the download or export finished; `python -m onnx.checker FILE` gives a second opinion")
    })?;
    if proto.graph.is_none() {
        return Err(Error::invalid("not an ONNX model: it holds no graph"));
    }
    if proto.opset_import.is_empty() && proto.ir_version() >= 3 {
        return Err(Error::invalid("not a valid ONNX model: opset_import is missing, so no operator has a meaning"));
    }
    Ok(proto)
}

/// The external files of one model, each mapped once.
struct ExternalFiles {
    dir: PathBuf,
    open: HashMap<String, Bytes>,
}

impl ExternalFiles {
    fn get(&mut self, location: &str) -> Result<Bytes> {
        if let Some(bytes) = self.open.get(location) {
            return Ok(bytes.clone());
        }
        let relative = Path::new(location);
        let plain = relative.components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir));
        if location.is_empty() || !plain {
            return Err(outside(location));
        }
        let path = self.dir.join(relative);
        let real = path.canonicalize().map_err(|e| {
            Error::io(format!("external data file `{location}` is missing ({e})"))
                .hint(format!("keep it beside the model, in {}", self.dir.display()))
        })?;
        // A link may point anywhere: what counts is where it ends.
        if !real.starts_with(self.dir.canonicalize()?) {
            return Err(outside(location));
        }
        let bytes = crate::files::map(&real).with_context(|| format!("external data file `{location}`"))?;
        self.open.insert(location.to_owned(), bytes.clone());
        Ok(bytes)
    }
}

fn outside(location: &str) -> Error {
    Error::invalid(format!("external data path `{location}` leaves the model's folder"))
        .hint("a model may only refer to files in its own folder; re-export it with a relative path")
}

fn resolve_graph(graph: &mut GraphProto, files: &mut ExternalFiles) -> Result<()> {
    for t in &mut graph.initializer {
        resolve_tensor(t, files)?;
    }
    for node in &mut graph.node {
        for a in &mut node.attribute {
            let tensors = a.t.iter_mut().chain(a.tensors.iter_mut());
            for t in tensors {
                resolve_tensor(t, files)?;
            }
            for g in a.g.iter_mut().chain(a.graphs.iter_mut()) {
                resolve_graph(g, files)?;
            }
        }
    }
    Ok(())
}

fn resolve_tensor(t: &mut TensorProto, files: &mut ExternalFiles) -> Result<()> {
    if t.data_location() != DataLocation::External {
        return Ok(());
    }
    let name = t.name().to_owned();
    let entry = |key: &str| t.external_data.iter().find(|e| e.key() == key).map(|e| e.value().to_owned());
    let number = |key: &str| -> Result<Option<usize>> {
        entry(key)
            .map(|v| v.trim().parse().map_err(|_| Error::invalid(format!("external data {key} `{v}` is not a number"))))
            .transpose()
    };
    let read = || -> Result<Bytes> {
        let location = entry("location").ok_or_else(|| Error::invalid("external data without a location"))?;
        let file = files.get(&location)?;
        let offset = number("offset")?.unwrap_or(0);
        let length = match number("length")? {
            Some(n) => n,
            None => file.len().saturating_sub(offset),
        };
        let end = offset.checked_add(length).filter(|&end| end <= file.len()).ok_or_else(|| {
            Error::io(format!(
                "external data file `{location}` has {} bytes, the tensor needs {length} from byte {offset}",
                file.len()
            ))
            .hint("the file was cut short or belongs to another export")
        })?;
        Ok(file.slice(offset..end))
    };
    let bytes = { read }().with_context(|| format!("tensor `{name}`"))?;
    t.raw_data = Some(bytes);
    Ok(())
}
