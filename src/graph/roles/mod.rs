//! Which constants are weights. An ONNX file does not say: weights and frequency tables, filters, masks and shape constants
//! are all initializers or Constant nodes. The role follows from who reads a tensor and in which slot.

mod classifier;
mod declared;
pub mod layers;
mod merged;
mod tables;

use std::collections::HashSet;
use std::fmt;

use classifier::Classifier;
pub use declared::{Declared, StoredLayout};
use globset::Glob;
pub use merged::{Derived, Provenance, Twin, untangle};

use crate::error::{Error, Result};
use crate::graph::ir::{Graph, Origin, ValueId};
use crate::graph::subgraphs;
use crate::tensor::{DType, HostTensor};

/// What a floating constant is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Weight of Conv or ConvTranspose.
    ConvWeight,
    /// Operand of MatMul, Gemm, Einsum or a recurrent layer.
    LinearWeight,
    /// Added to features: bias of a convolution, a linear layer, a norm, or a position embedding.
    Bias,
    /// Multiplies features: scale of a norm, layer scale, slope of PRelu.
    Scale,
    /// Table that Gather reads rows of.
    Embedding,
    /// Not trained: frequencies, filters, masks, statistics, plain numbers.
    Buffer,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ConvWeight => "conv weight",
            Self::LinearWeight => "linear weight",
            Self::Bias => "bias",
            Self::Scale => "scale",
            Self::Embedding => "embedding",
            Self::Buffer => "buffer",
        })
    }
}

/// A trainable tensor of the graph.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// The value that the parameter has in the graph.
    pub value: ValueId,
    /// The initializer's name; parted copies of one initializer get `#2`, `#3`...
    pub name: String,
    /// How the network uses it; never [`Role::Buffer`].
    pub role: Role,
    /// Its dimensions as they are in the graph.
    pub shape: Vec<usize>,
    /// Element type in the file; the trained weights are f32 whatever it is.
    pub dtype: DType,
    /// Where the bytes came from, for writing back.
    pub origin: Origin,
    /// Node (index in the file) and slot that must be rewired to this parameter, for parted copies.
    pub rewire: Vec<(usize, usize)>,
    /// Other tensors of the file that were folded from the same weight.
    pub twins: Vec<Twin>,
}

/// A floating constant with more than one element that is not trained.
#[derive(Debug, Clone)]
pub struct Buffer {
    /// The name of its value in the graph: that of the initializer, with `#2`, `#3`... for parted copies.
    pub name: String,
    /// Its dimensions as they are in the graph.
    pub shape: Vec<usize>,
    /// Element type in the file.
    pub dtype: DType,
    /// Why it is not a parameter.
    pub reason: &'static str,
    /// Where it was merged with other tensors: its value, and the nodes (index in the file) and slots that read it.
    pub parted: Option<(HostTensor, Vec<(usize, usize)>)>,
}

/// What the user, or a converter through the model's metadata, says about trainable tensors.
#[derive(Debug, Clone, Default)]
pub struct TrainableChoice {
    /// The framework's own list of parameters; where given, it replaces the roles.
    pub declared: Option<Vec<String>>,
    /// Globs over names that are never trained.
    pub freeze: Vec<String>,
    /// Globs over names that are trained whatever their role.
    pub train: Vec<String>,
}

/// The outcome of [`classify`].
#[derive(Debug, Clone, Default)]
pub struct Roles {
    /// The tensors that are trained, in the order of their values.
    pub parameters: Vec<Parameter>,
    /// The floating constants that are not trained, without those of one element, in the order of their values.
    pub buffers: Vec<Buffer>,
}

/// Sorts every floating constant into parameters and buffers.
///
/// Errors: a `--train`/`--freeze` glob that is not one or matches nothing; a declared parameter that the graph lacks.
pub fn classify(graph: &Graph, choice: &TrainableChoice, provenance: &Provenance) -> Result<Roles> {
    let flat = subgraphs::flatten(graph);
    let roles = Classifier::new(flat.as_ref().unwrap_or(graph)).run();
    let names = |v: &ValueId| graph.names[*v].clone();
    let floats: Vec<ValueId> =
        graph.constants.iter().filter(|(_, c)| c.tensor.dtype().is_float()).map(|(v, _)| *v).collect();
    let base = |name: &str| name.split('#').next().unwrap_or(name).to_owned();
    let declared: Option<HashSet<&str>> = choice.declared.as_ref().map(|d| d.iter().map(String::as_str).collect());
    if let Some(declared) = &choice.declared {
        let known: HashSet<String> = floats.iter().map(|v| base(&graph.names[*v])).collect();
        let missing: Vec<_> = declared.iter().filter(|d| !known.contains(*d)).cloned().collect();
        if !missing.is_empty() {
            return Err(Error::invalid(format!(
                "the model's metadata declares parameters that the graph does not have: {}",
                missing.join(", ")
            )));
        }
    }
    let freeze = Globs::new("--freeze", &choice.freeze)?;
    let train = Globs::new("--train", &choice.train)?;
    let mut out = Roles::default();
    for v in &floats {
        let constant = &graph.constants[v];
        let name = names(v);
        let (mut role, reason) = roles.get(v).copied().unwrap_or((Role::Buffer, "no weight slot reads it"));
        if let Some(declared) = &declared {
            let listed = declared.contains(base(&name).as_str());
            if listed && role == Role::Buffer {
                role = Role::LinearWeight;
            } else if !listed {
                role = Role::Buffer;
            }
        }
        let forced = train.matches(&name);
        if forced && role == Role::Buffer {
            role = Role::LinearWeight;
        }
        let frozen = freeze.matches(&name) && !forced;
        if role != Role::Buffer && !frozen {
            out.parameters.push(Parameter {
                value: *v,
                role,
                shape: constant.tensor.shape().to_vec(),
                dtype: constant.tensor.dtype(),
                origin: constant.origin.clone(),
                rewire: provenance.rewired.get(v).cloned().unwrap_or_default(),
                twins: provenance.twins.get(v).cloned().unwrap_or_default(),
                name,
            });
        } else if constant.tensor.len() > 1 {
            let reason = if frozen { "frozen on request" } else { reason };
            out.buffers.push(Buffer {
                name,
                shape: constant.tensor.shape().to_vec(),
                dtype: constant.tensor.dtype(),
                reason,
                parted: provenance.rewired.get(v).map(|slots| (constant.tensor.clone(), slots.clone())),
            });
        }
    }
    freeze.all_used()?;
    train.all_used()?;
    Ok(out)
}

struct Globs {
    option: &'static str,
    globs: Vec<(globset::GlobMatcher, String, std::cell::Cell<bool>)>,
}

impl Globs {
    fn new(option: &'static str, patterns: &[String]) -> Result<Self> {
        let globs = patterns
            .iter()
            .map(|p| {
                let glob = Glob::new(p).map_err(|e| Error::usage(format!("{option} {p}: {e}")))?;
                Ok((glob.compile_matcher(), p.clone(), std::cell::Cell::new(false)))
            })
            .collect::<Result<_>>()?;
        Ok(Self { option, globs })
    }
    fn matches(&self, name: &str) -> bool {
        let mut any = false;
        for (glob, _, used) in &self.globs {
            if glob.is_match(name) {
                used.set(true);
                any = true;
            }
        }
        any
    }
    fn all_used(&self) -> Result<()> {
        match self.globs.iter().find(|(_, _, used)| !used.get()) {
            None => Ok(()),
            Some((_, p, _)) => Err(Error::usage(format!("{} `{p}` matches no tensor of the graph", self.option))
                .hint("`disback inspect --parameters` lists the names")),
        }
    }
}

#[cfg(test)]
mod tests;
