//! A teacher as a user brings it: an ONNX file, what its card says, and the network it becomes.

use std::path::Path;

use tch::Device;

use crate::diffusion::{CardSource, InputSpec, ResolvedCard};
use crate::error::{Context, Result};
use crate::graph::ir::Port;
use crate::graph::{Model, TrainableChoice};
use crate::tensor::DType;
use crate::torch::{ImportOptions, Network};

/// An imported teacher.
#[derive(Debug)]
pub struct Teacher {
    pub network: Network,
    pub card: ResolvedCard,
    /// SHA-256 of the file, which run directories remember.
    pub hash: String,
}

/// A port as the card checks it: unknown types count as f32, an unknown shape as rank 0 to be refused by the check.
pub fn spec(p: &Port) -> InputSpec {
    InputSpec { name: p.name.clone(), dtype: p.dtype.unwrap_or(DType::F32), shape: p.dims().unwrap_or_default() }
}

/// All sources of a model file's card.
pub fn card_source(model: &Model, overrides: &[String]) -> CardSource {
    CardSource::new().model(&model.path).metadata(model.metadata()).overrides(overrides.iter().cloned())
}

/// The card of a model file from all its sources.
pub fn card(model: &Model, overrides: &[String]) -> Result<ResolvedCard> {
    card_source(model, overrides).resolve()
}

impl Teacher {
    /// Loads the file, resolves its card (command line first) and checks one against the other.
    pub fn load(path: &Path, overrides: &[String], trainable: TrainableChoice, device: Device) -> Result<Self> {
        let model = Model::load(path)?;
        let card = card(&model, overrides).with_context(|| path.display().to_string())?;
        let hash = model.hash();
        let options = ImportOptions { trainable, ..ImportOptions::default() };
        let network = Network::import(model, &options, device)?;
        let inputs: Vec<InputSpec> = network.fed_inputs().iter().map(spec).collect();
        let outputs: Vec<InputSpec> = network.outputs().iter().map(spec).collect();
        card.card.check_against(&inputs, &outputs).with_context(|| path.display().to_string())?;
        Ok(Self { network, card, hash })
    }

    /// Inputs of the graph as specs, for the denoiser.
    pub fn inputs(&self) -> Vec<InputSpec> {
        self.network.fed_inputs().iter().map(spec).collect()
    }
}
