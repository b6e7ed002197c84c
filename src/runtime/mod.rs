//! A network in production: ONNX Runtime and tract behind one trait. Nothing here needs libtorch.

pub mod cast_transpose;
pub mod decoder;
mod external;
pub mod foresight;
#[cfg(feature = "ort")]
pub mod ort;
pub mod student;
pub mod tolerance;
#[cfg(feature = "tract")]
pub mod tract;

pub use student::Student;

use std::fmt;
use std::path::Path;

use crate::error::{Context, Error, Result};
use crate::shown::line;
use crate::tensor::{DType, HostTensor};

/// One dimension of a graph input or output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dim {
    /// Of this size in every call.
    Fixed(usize),
    /// Free; the name is the graph's (`batch`), or empty.
    Symbol(String),
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(n) => write!(f, "{n}"),
            Self::Symbol(name) if name.is_empty() => f.write_str("?"),
            Self::Symbol(name) => f.write_str(name),
        }
    }
}

/// Name, element type and shape of a graph input or output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValueInfo {
    /// The name in the file, by which callers give or receive the tensor.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Dimensions, outermost first; empty for a scalar, or where the file says no shape.
    pub shape: Vec<Dim>,
}

impl fmt::Display for ValueInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dims: Vec<String> = self.shape.iter().map(Dim::to_string).collect();
        write!(f, "{} {}[{}]", line(&self.name), self.dtype, line(&dims.join(", ")))
    }
}

/// A loaded network.
pub trait Engine: Send {
    /// What computes, with its version and provider: `onnxruntime 1.32.0 (CPU)`, `tract 0.23.9 (CPU)`.
    fn name(&self) -> String;
    /// The inputs that a caller must give, in the graph's order.
    fn inputs(&self) -> &[ValueInfo];
    /// All outputs, in the graph's order.
    fn outputs(&self) -> &[ValueInfo];
    /// Runs the network on named inputs, all of them, in any order. The outputs come in the graph's order.
    fn run(&mut self, inputs: &[(&str, &HostTensor)]) -> Result<Vec<(String, HostTensor)>>;
    /// The call alone, to be repeated: inputs are bound once, where the provider wants them, and outputs stay there.
    /// Engines without bindings run as usual.
    fn bound<'a>(&'a mut self, inputs: &[(&str, &HostTensor)]) -> Result<Call<'a>> {
        let held: Vec<(String, HostTensor)> = inputs.iter().map(|(n, t)| ((*n).to_owned(), (*t).clone())).collect();
        Ok(Box::new(move || {
            let named: Vec<(&str, &HostTensor)> = held.iter().map(|(n, t)| (n.as_str(), t)).collect();
            self.run(&named).map(drop)
        }))
    }
}

/// A prepared call of a network.
pub type Call<'a> = Box<dyn FnMut() -> Result<()> + 'a>;

/// Options of accelerators' providers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Accelerator {
    /// Folder of TensorRT's built engines and timings; none are kept where absent.
    pub cache: Option<std::path::PathBuf>,
    /// Smallest, usual and largest batch that TensorRT builds for.
    pub profile: Option<[usize; 3]>,
    /// Smallest, usual and largest batch of the calls to come: the profile of a free batch where none is given.
    pub calls: Option<[usize; 3]>,
    /// TensorRT may compute in f16 where that is faster.
    pub fp16: bool,
    /// TensorRT may compute in bf16 where that is faster.
    pub bf16: bool,
    /// Record the call as a CUDA graph (fixed shapes).
    pub cuda_graph: bool,
    /// Where to write a model that carries the built engine, for shipping.
    pub ep_context: Option<std::path::PathBuf>,
}

/// Which engine to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum EngineKind {
    /// ONNX Runtime where its library is found, else tract.
    #[default]
    Auto,
    /// ONNX Runtime.
    Ort,
    /// tract (pure Rust, CPU).
    Tract,
}

/// How to open a network.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Which library runs the network.
    pub engine: EngineKind,
    /// ONNX Runtime's execution provider: `cpu`, `cuda`, `tensorrt` or another that the library was built with.
    /// A provider that cannot be used is an error, never a silent step down to the CPU.
    pub provider: String,
    /// Threads within an operator; the engine's own choice where absent. tract uses one thread.
    pub threads: Option<usize>,
    /// Device number for providers that have several.
    pub device: u32,
    /// Refuse to open a network of which any node would run on the CPU instead of `provider`.
    pub strict: bool,
    /// Options of NVIDIA's providers, TensorRT and CUDA.
    pub accelerator: Accelerator,
}

impl Default for EngineOptions {
    fn default() -> Self {
        let accelerator = Accelerator::default();
        Self { engine: EngineKind::Auto, provider: "cpu".into(), threads: None, device: 0, strict: true, accelerator }
    }
}

/// Opens a model file (external data is looked for beside it).
pub fn open(model: &Path, options: &EngineOptions) -> Result<Box<dyn Engine>> {
    if !model.is_file() {
        return Err(Error::io(format!("{}: no such file", model.display())));
    }
    let open = || {
        external::refuse_pipes(model)?;
        open_source(Source::File(model), options)
    };
    open().with_context(|| model.display().to_string())
}

/// Opens a serialised `ModelProto`. `folder` is where its external data lies, if it has any.
pub fn open_bytes(model: &[u8], folder: Option<&Path>, options: &EngineOptions) -> Result<Box<dyn Engine>> {
    open_source(Source::Bytes { bytes: model, folder }, options)
}

/// Where a model comes from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Source<'a> {
    File(&'a Path),
    Bytes { bytes: &'a [u8], folder: Option<&'a Path> },
}

fn open_source(source: Source<'_>, options: &EngineOptions) -> Result<Box<dyn Engine>> {
    let cpu = options.provider.eq_ignore_ascii_case("cpu");
    match options.engine {
        EngineKind::Ort => open_ort(source, options),
        EngineKind::Tract if cpu => open_tract(source),
        EngineKind::Tract => {
            Err(Error::usage(format!("tract has no provider `{}`, it runs on the CPU", options.provider))
                .hint("drop --provider, or use --engine ort"))
        }
        EngineKind::Auto => {
            #[cfg(feature = "ort")]
            match ort::library() {
                Err(e) if e.is_absent() && cpu && cfg!(feature = "tract") => {
                    tracing::info!("ONNX Runtime was not found: using tract");
                }
                _ => return open_ort(source, options),
            }
            if !cpu {
                return open_ort(source, options);
            }
            open_tract(source)
        }
    }
}

fn open_ort(source: Source<'_>, options: &EngineOptions) -> Result<Box<dyn Engine>> {
    #[cfg(feature = "ort")]
    return Ok(Box::new(ort::OrtEngine::open(source, options)?));
    #[cfg(not(feature = "ort"))]
    {
        let _ = (source, options);
        Err(Error::usage("this build has no ONNX Runtime engine (feature `ort`)").hint("use --engine tract"))
    }
}

fn open_tract(source: Source<'_>) -> Result<Box<dyn Engine>> {
    #[cfg(feature = "tract")]
    return Ok(Box::new(tract::TractEngine::open(source)?));
    #[cfg(not(feature = "tract"))]
    {
        let _ = source;
        Err(Error::usage("this build has no tract engine (feature `tract`)").hint("use --engine ort"))
    }
}

/// Inputs (without those that are initializers) and outputs as the file declares them.
pub fn model_values(model: &crate::onnx::ModelProto) -> Result<(Vec<ValueInfo>, Vec<ValueInfo>)> {
    use crate::onnx::{tensor_shape_proto::dimension, type_proto};
    let graph = model.graph.as_ref().ok_or_else(|| Error::invalid("not an ONNX model: it holds no graph"))?;
    let read = |value: &crate::onnx::ValueInfoProto| -> Result<ValueInfo> {
        let name = value.name().to_string();
        let Some(type_proto::Value::TensorType(tensor)) = value.r#type.as_ref().and_then(|t| t.value.as_ref()) else {
            return Err(Error::unsupported(format!("`{name}` is not declared as a tensor")));
        };
        let dims = tensor.shape.as_ref().map(|s| s.dim.as_slice()).unwrap_or_default().iter();
        let shape = dims.map(|d| match &d.value {
            Some(dimension::Value::DimValue(n)) if *n >= 0 => Dim::Fixed(*n as usize),
            Some(dimension::Value::DimParam(s)) => Dim::Symbol(s.clone()),
            _ => Dim::Symbol(String::new()),
        });
        Ok(ValueInfo { dtype: DType::from_onnx(tensor.elem_type()).context(&name)?, shape: shape.collect(), name })
    };
    let initialised = |name: &str| graph.initializer.iter().any(|t| t.name() == name);
    let inputs = graph.input.iter().filter(|v| !initialised(v.name())).map(&read).collect::<Result<_>>()?;
    Ok((inputs, graph.output.iter().map(&read).collect::<Result<_>>()?))
}

/// Puts the given tensors into the order of `wanted` and checks names, element types, ranks and fixed dimensions.
pub(crate) fn arrange<'a>(wanted: &[ValueInfo], given: &[(&str, &'a HostTensor)]) -> Result<Vec<&'a HostTensor>> {
    for (k, (name, _)) in given.iter().enumerate() {
        if !wanted.iter().any(|w| w.name == *name) {
            let names: Vec<&str> = wanted.iter().map(|w| w.name.as_str()).collect();
            return Err(Error::mismatch(format!("the network has no input `{name}`; it has: {}", names.join(", "))));
        }
        if given[..k].iter().any(|(other, _)| other == name) {
            return Err(Error::mismatch(format!("input `{name}` is given twice")));
        }
    }
    wanted
        .iter()
        .map(|info| {
            let tensor = given.iter().find(|(name, _)| *name == info.name).map(|(_, t)| *t);
            let tensor = tensor.ok_or_else(|| Error::mismatch(format!("input `{}` is missing ({info})", info.name)))?;
            let fits = tensor.dtype() == info.dtype
                && tensor.rank() == info.shape.len()
                && info.shape.iter().zip(tensor.shape()).all(|(want, got)| match want {
                    Dim::Fixed(n) => n == got,
                    Dim::Symbol(_) => true,
                });
            if !fits {
                let got = format!("{}{:?}", tensor.dtype(), tensor.shape());
                return Err(Error::mismatch(format!("the network wants {info}, given {got}")));
            }
            Ok(tensor)
        })
        .collect()
}

/// Runs `engine` on tensors whose first dimension may be longer than one batch: splits it into pieces of at most `batch` rows
/// and joins the outputs. Where the graph fixes the batch, pieces have that size and the last one is filled up by repeating
/// its last row. Inputs without rows of their own (rank 0, a single row, or exactly the graph's fixed shape) go whole to
/// every piece.
pub fn run_batched(
    engine: &mut dyn Engine,
    inputs: &[(&str, &HostTensor)],
    batch: usize,
) -> Result<Vec<(String, HostTensor)>> {
    let rows_of = |t: &HostTensor| t.shape().first().copied().unwrap_or(1);
    let total = inputs.iter().map(|(_, t)| rows_of(t)).max().unwrap_or(1);
    let mut piece = batch.max(1);
    let mut split = vec![false; inputs.len()];
    for (k, (name, tensor)) in inputs.iter().enumerate() {
        let Some(info) = engine.inputs().iter().find(|i| i.name == *name) else { continue };
        match info.shape.first() {
            Some(Dim::Fixed(n)) if *n > 0 && rows_of(tensor) == total && total != *n => {
                piece = *n;
                split[k] = true;
            }
            Some(Dim::Symbol(_)) if rows_of(tensor) == total && total > 1 => split[k] = true,
            Some(Dim::Symbol(_)) if rows_of(tensor) != 1 => {
                return Err(Error::mismatch(format!(
                    "input `{name}` has {} rows where others have {total}",
                    rows_of(tensor)
                )));
            }
            _ => {}
        }
    }
    let fixed = engine.inputs().iter().any(|i| matches!(i.shape.first(), Some(Dim::Fixed(n)) if *n == piece));
    if !split.contains(&true) || (total <= piece && !fixed) {
        return engine.run(inputs);
    }
    let mut names = Vec::new();
    let mut parts: Vec<Vec<HostTensor>> = Vec::new();
    for start in (0..total).step_by(piece) {
        let count = piece.min(total - start);
        let mut held = Vec::with_capacity(inputs.len());
        for ((_, tensor), &split) in inputs.iter().zip(&split) {
            if !split {
                held.push((*tensor).clone());
                continue;
            }
            let rows = tensor.rows(start, count)?;
            held.push(if fixed && count < piece {
                let last = rows.rows(count - 1, 1)?;
                let mut all = vec![rows];
                all.extend(std::iter::repeat_n(last, piece - count));
                HostTensor::concat_rows(&all)?
            } else {
                rows
            });
        }
        let named: Vec<(&str, &HostTensor)> = inputs.iter().zip(&held).map(|((n, _), t)| (*n, t)).collect();
        for (k, (name, tensor)) in engine.run(&named)?.into_iter().enumerate() {
            if parts.len() <= k {
                names.push(name);
                parts.push(Vec::new());
            }
            let ran = if fixed { piece } else { count };
            if tensor.shape().first() != Some(&ran) {
                return Err(Error::mismatch(format!(
                    "output `{}` has shape {:?} for a batch of {ran}: its first dimension is not the batch",
                    names[k],
                    tensor.shape()
                )));
            }
            parts[k].push(tensor.rows(0, count)?);
        }
    }
    names.into_iter().zip(parts).map(|(name, parts)| Ok((name, HostTensor::concat_rows(&parts)?))).collect()
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
