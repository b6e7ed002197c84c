//! What a run needs beside the teacher, and how its networks are laid out and its steps recorded.

use std::sync::atomic::{AtomicBool, Ordering};

use tch::{Device, Tensor};

use crate::diffusion::{Denoiser, Form};
use crate::distill::config::Config;
use crate::distill::inputs::Inputs;
use crate::distill::observer::Observer;
use crate::distill::rundir::RunDir;
use crate::distill::student::Student;
use crate::error::Result;
use crate::torch::ParamSet;
use crate::torch::dist::World;
use crate::torch::train::cuda_graph::Recorder;

/// What a run needs beside the teacher.
pub struct Job<'a> {
    /// The configuration as resolved.
    pub config: &'a Config,
    /// The student's network and weights, where it is not the teacher's copy.
    pub student: Option<&'a Student>,
    /// Where the run writes its files.
    pub run: &'a RunDir,
    /// Is told what happens in the run, and may ask for a checkpoint or an end.
    pub observer: &'a mut dyn Observer,
    /// Raised from outside (Ctrl-C): the run stops after the present step, with a checkpoint.
    pub stop: &'a AtomicBool,
    /// Whether no progress bar is shown.
    pub silent: bool,
    /// The processes that share the run; one that does not lead writes nothing.
    pub world: World,
}

impl Job<'_> {
    /// The student that the run begins with.
    pub(crate) fn initial(&self, teacher: &Denoiser) -> Result<Student> {
        Student::initial(self.student, teacher, &self.config.student, self.config.seed)
    }

    /// Hash of the initial student's weights, where it is not the teacher's copy.
    pub(crate) fn student_hash(&self, teacher: &Denoiser) -> Result<Option<String>> {
        Student::hash_of_initial(self.student, teacher, self.config)
    }

    pub(crate) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// What runs the pieces of a step on this device: as they are written, or as CUDA graphs where that is configured.
pub(crate) fn recorder(config: &Config, device: Device) -> Result<(Recorder<Inputs>, Form)> {
    let recorder = Recorder::new(config.cuda_graphs, device)?;
    let form = if recorder.records() { Form::Fixed } else { Form::Short };
    Ok((recorder, form))
}

/// Lays out a network's filters as configured, and with them those of all copies to come.
pub(crate) fn lay_out(config: &Config, params: &ParamSet) -> Result<()> {
    match config.channels_last(params.tensors().first().map_or(Device::Cpu, Tensor::device)) {
        true => params.channels_last(),
        false => Ok(()),
    }
}
