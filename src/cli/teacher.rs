//! The teacher on the command line: its file, its card, which of its tensors are trained.

use std::path::PathBuf;

use clap::Args;
use tch::Device;

use crate::error::Result;
use crate::graph::TrainableChoice;
use crate::teacher::Teacher;

/// The teacher and what its file does not say about itself.
#[derive(Debug, Args)]
pub struct TeacherArgs {
    /// The teacher, an ONNX diffusion model.
    pub teacher: PathBuf,
    /// A value of the teacher card, as in prediction=epsilon; wins over the side file and the model's metadata.
    #[arg(long = "card", value_name = "KEY=VALUE")]
    pub card: Vec<String>,
    /// Tensors that stay fixed although they act as weights, by name (glob).
    #[arg(long, value_name = "GLOB")]
    pub freeze: Vec<String>,
    /// Tensors that are trained whatever they act as, by name (glob).
    #[arg(long, value_name = "GLOB")]
    pub train: Vec<String>,
}

impl TeacherArgs {
    /// Imports the model, resolves its card and checks one against the other.
    pub fn load(&self, device: Device) -> Result<Teacher> {
        let trainable = TrainableChoice { declared: None, freeze: self.freeze.clone(), train: self.train.clone() };
        Teacher::load(&self.teacher, &self.card, trainable, device)
    }
}
