//! Distil any diffusion model that exports to ONNX into a one-step ONNX generator.
//!
//! The teacher, an ONNX file from whatever framework wrote it, becomes a trainable network in libtorch, goes through both stages of
//! DisBack (Zhang et al., ICLR 2025, arXiv 2408.15991), and the student leaves as ONNX:
//!
//! ```no_run
//! # #[cfg(all(feature = "train", feature = "ort"))]
//! # fn main() -> disback::Result<()> {
//! use disback::run::{Finished, Request, Session};
//! use disback::runtime::EngineOptions;
//! use disback::runtime::student::{SampleRequest, Student};
//!
//! // The configuration's keys are those of `run/config.toml`.
//! let request = Request::new("examples/digits/teacher.onnx", "run").set("objective=sid").set("backtrack.updates=500");
//! // Loads the teacher, compares it with ONNX Runtime, and tries the export of an untrained student.
//! let session = Session::open(request)?;
//! let Finished::Distilled(made) = session.distill()? else { return Ok(()) };
//!
//! // The student takes noise and classes, and makes a sample in one call.
//! let mut student = Student::open(made.student(), &EngineOptions::default())?;
//! let wanted = SampleRequest { seed: 1, classes: vec![0, 1, 2, 3], batch: 4, ..SampleRequest::default() };
//! let samples = student.sample(&wanted, 0, 4)?;
//! // Arrays are those of `ndarray`, seen where they lie.
//! let images = samples.array::<f32>()?;
//! assert_eq!(images.shape(), [4, 1, 8, 8]);
//! # Ok(())
//! # }
//! # #[cfg(not(all(feature = "train", feature = "ort")))]
//! # fn main() {}
//! ```
//!
//! [`graph`] has the file in memory, [`torch`] the trainable network, [`diffusion`] what it means, [`distill`] the two stages,
//! [`export`] and [`passes`] the way out, [`runtime`] the student in use. `docs/architecture.md` has the whole picture.

#![warn(missing_docs)]

pub mod axes;
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
pub mod memory;
pub mod noise;
#[cfg(any(feature = "train", feature = "ort"))]
pub mod nvidia;
pub mod package;
#[cfg(feature = "train")]
pub mod parity;
pub mod passes;
pub mod report;
#[cfg(feature = "train")]
pub mod run;
pub mod runtime;
#[cfg(feature = "serve")]
pub mod serve;
pub mod shown;
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
