//! Out of the training network, into ONNX: the one-step student, the teacher's graph with the student's weights, and the
//! file that ships: optimised, portable, in the precision asked for.

pub mod attach;
#[cfg(feature = "train")]
pub mod base;
#[cfg(feature = "train")]
mod build;
pub mod consumer;
mod expected;
#[cfg(feature = "train")]
pub mod fold;
#[cfg(feature = "train")]
pub mod framework;
#[cfg(feature = "train")]
pub mod generator;
pub mod options;
mod pipeline;
pub mod ship;
#[cfg(feature = "train")]
pub mod student;
#[cfg(feature = "train")]
mod trained;
#[cfg(feature = "train")]
pub mod unroll;

#[cfg(all(test, feature = "ort", feature = "tract"))]
mod tests;

#[cfg(feature = "train")]
pub use generator::generator;
pub use options::{Precision, ShipOptions, ShipReport};
pub use ship::ship;
#[cfg(feature = "train")]
pub use student::{StudentOptions, same_graph, student};
#[cfg(feature = "train")]
pub use unroll::Steps;
