//! The teacher on the command line: its file, its card, which of its tensors are trained.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use tch::Device;

use super::card_args::CardArgs;
use crate::distill::{Config, RunDir};
use crate::error::Result;
use crate::graph::TrainableChoice;
use crate::run::identity::Identity;
use crate::run::{Teacher, TeacherOptions};

/// How a teacher's file is read.
#[derive(Debug, Clone, Default, Args)]
pub struct ReadingArgs {
    #[command(flatten)]
    pub card: CardArgs,
    /// Tensors that stay fixed although they act as weights, by name (glob).
    #[arg(long, value_name = "GLOB")]
    pub freeze: Vec<String>,
    /// Tensors that are trained whatever they act as, by name (glob).
    #[arg(long, value_name = "GLOB")]
    pub train: Vec<String>,
}

impl ReadingArgs {
    /// The configuration with what the command line says about the card: a run remembers it with its other keys.
    pub fn with_card(&self, mut config: Config) -> Config {
        config.card.extend(self.card.overrides());
        config
    }

    /// The same, with the tensors that a run was begun with where nothing is said of them.
    ///
    /// Errors: a run whose `identity.json` cannot be read.
    pub fn of_run(&self, run: &RunDir) -> Result<Self> {
        let mut reading = self.clone();
        if let Some(begun) = Identity::read(run)? {
            begun.fill(&mut reading.freeze, &mut reading.train);
        }
        Ok(reading)
    }

    /// Imports the model, resolves its card (`config.card` wins over all other sources) and checks one against the other.
    pub fn load(&self, path: &Path, config: &Config, device: Device) -> Result<Teacher> {
        let options = TeacherOptions {
            card: config.card.clone(),
            conditions: config.conditions.file.clone(),
            trainable: TrainableChoice { declared: None, freeze: self.freeze.clone(), train: self.train.clone() },
            operators: Arc::default(),
        };
        Teacher::load(path, &options, device)
    }
}

/// The teacher and what its file does not say about itself.
#[derive(Debug, Args)]
pub struct TeacherArgs {
    /// The teacher, an ONNX diffusion model.
    pub teacher: PathBuf,
    #[command(flatten)]
    pub reading: ReadingArgs,
}

impl TeacherArgs {
    /// [`ReadingArgs::load`] of this file.
    pub fn load(&self, config: &Config, device: Device) -> Result<Teacher> {
        self.reading.load(&self.teacher, config, device)
    }
}
