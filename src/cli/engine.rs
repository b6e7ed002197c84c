//! The options by which several commands choose an engine.

use clap::Args;

use crate::runtime::{EngineKind, EngineOptions};

/// `--engine`, `--provider`, `--threads`, `--gpu`, `--strict`.
#[derive(Debug, Clone, Args)]
pub struct EngineArgs {
    /// What runs the network; `auto` is ONNX Runtime where its library is found, else tract.
    #[arg(long, value_enum, default_value = "auto")]
    pub engine: EngineKind,
    /// ONNX Runtime's provider: cpu, cuda, tensorrt, or another that the library was built with. One that cannot be used
    /// is an error.
    #[arg(long, default_value = "cpu")]
    pub provider: String,
    /// Threads of ONNX Runtime.
    #[arg(long)]
    pub threads: Option<usize>,
    /// Device number of the provider.
    #[arg(long, default_value_t = 0)]
    pub gpu: u32,
    /// Fail where any node would run on the CPU instead of the provider.
    #[arg(long)]
    pub strict: bool,
}

impl EngineArgs {
    /// As the library wants them.
    pub fn options(&self) -> EngineOptions {
        EngineOptions {
            engine: self.engine,
            provider: self.provider.clone(),
            threads: self.threads,
            device: self.gpu,
            strict: self.strict,
        }
    }
}
