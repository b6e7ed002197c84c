//! The options by which several commands choose an engine.

use std::path::PathBuf;

use clap::Args;

use crate::error::{Error, Result};
use crate::runtime::{Accelerator, EngineKind, EngineOptions};

/// What runs a network, and how.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Engine")]
pub struct EngineArgs {
    /// What runs the network; `auto` is ONNX Runtime where its library is found, else tract.
    #[arg(long, value_enum, default_value = "auto")]
    pub engine: EngineKind,
    /// ONNX Runtime's provider: cpu, cuda, tensorrt, or another that the library was built with. One that cannot be used
    /// is an error. `bench` takes several by commas.
    #[arg(long, default_value = "cpu")]
    pub provider: String,
    /// Threads of ONNX Runtime; as many as there are cores where absent.
    #[arg(long)]
    pub threads: Option<usize>,
    /// Device number of the provider.
    #[arg(long, default_value_t = 0)]
    pub gpu: u32,
    /// Fail where any node would run on the CPU instead of the provider.
    #[arg(long, default_value_t = true, default_missing_value = "true", num_args = 0..=1, require_equals = true,
        action = clap::ArgAction::Set)]
    pub strict: bool,
    /// TensorRT: folder that keeps built engines and timings.
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// TensorRT: smallest, usual and largest batch; by the command's own batches where absent.
    #[arg(long, value_name = "MIN,USUAL,MAX", value_delimiter = ',', num_args = 1)]
    pub profile: Vec<usize>,
    /// TensorRT: allow f16 (layer norms stay f32).
    #[arg(long)]
    pub trt_fp16: bool,
    /// TensorRT: allow bf16.
    #[arg(long)]
    pub trt_bf16: bool,
    /// CUDA and TensorRT: record the call as a CUDA graph; shapes must not change.
    #[arg(long)]
    pub cuda_graph: bool,
    /// TensorRT: also write a model that carries the built engine.
    #[arg(long, value_name = "FILE.onnx")]
    pub ep_context: Option<PathBuf>,
}

impl EngineArgs {
    /// As the library wants them, for calls of at most these batches.
    ///
    /// Errors, of kind [`crate::Kind::Usage`]: options of a provider that is not the one asked for.
    pub fn options(&self, batches: &[usize]) -> Result<EngineOptions> {
        let largest = batches.iter().max().copied().filter(|&b| b > 0);
        let profile = match self.profile.as_slice() {
            [] => None,
            [a, b, c] => Some([*a, *b, *c]),
            _ => return Err(Error::usage("--profile: expected three batch sizes, smallest, usual and largest")),
        };
        let provider = self.provider.to_ascii_lowercase();
        let tensorrt = [
            ("--cache", self.cache.is_some()),
            ("--profile", profile.is_some()),
            ("--trt-fp16", self.trt_fp16),
            ("--trt-bf16", self.trt_bf16),
            ("--ep-context", self.ep_context.is_some()),
        ];
        if let Some((name, _)) = tensorrt.iter().find(|(_, set)| *set && !provider.contains("tensorrt")) {
            return Err(Error::usage(format!("{name} is an option of --provider tensorrt, not of {}", self.provider)));
        }
        if self.cuda_graph && !provider.contains("tensorrt") && !provider.contains("cuda") {
            return Err(Error::usage(format!("--cuda-graph needs --provider cuda or tensorrt, not {}", self.provider)));
        }
        if self.threads.is_some() && self.engine == EngineKind::Tract {
            return Err(Error::usage("--threads is an option of --engine ort: tract computes in one thread"));
        }
        if self.gpu > 0 && provider == "cpu" {
            return Err(Error::usage(format!(
                "--gpu {}: the provider is cpu; --provider cuda takes a device",
                self.gpu
            )));
        }
        Ok(EngineOptions {
            engine: self.engine,
            provider: self.provider.clone(),
            threads: self.threads,
            device: self.gpu,
            strict: self.strict,
            accelerator: Accelerator {
                cache: self.cache.clone(),
                profile,
                calls: largest.map(|b| [1, b, b]),
                fp16: self.trt_fp16,
                bf16: self.trt_bf16,
                cuda_graph: self.cuda_graph,
                ep_context: self.ep_context.clone(),
            },
        })
    }
}
