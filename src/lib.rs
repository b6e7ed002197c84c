//! Distil any diffusion model that exports to ONNX into a one-step ONNX generator.

pub mod cli;
#[cfg(feature = "train")]
pub mod conformance;
pub mod diffusion;
#[cfg(feature = "train")]
pub mod distill;
pub mod doctor;
pub mod error;
pub mod eval;
pub mod export;
pub mod files;
pub mod graph;
#[cfg(feature = "train")]
pub mod inspect;
pub mod io;
pub mod noise;
#[cfg(feature = "train")]
pub mod parity;
pub mod report;
#[cfg(feature = "train")]
pub mod run;
pub mod runtime;
#[cfg(feature = "serve")]
pub mod serve;
pub mod tensor;
#[cfg(feature = "train")]
pub mod torch;
pub mod verify;

/// The ONNX wire format, generated from `onnx/onnx.proto`.
#[allow(missing_docs, clippy::all)]
pub mod onnx {
    include!(concat!(env!("OUT_DIR"), "/onnx.rs"));
}

pub use error::{Context, Error, Kind, Result};
pub use tensor::{DType, Element, HostTensor};
