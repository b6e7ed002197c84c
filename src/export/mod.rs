//! Out of the training network, into ONNX: the one-step student, the teacher's graph with the student's weights, and the
//! file that ships: optimised, portable, in the precision asked for.

pub mod attach;
#[cfg(feature = "train")]
pub mod base;
pub mod consumer;
mod expected;
#[cfg(feature = "train")]
pub mod fold;
#[cfg(feature = "train")]
pub mod generator;
mod pipeline;
pub mod ship;
#[cfg(feature = "train")]
pub mod student;
#[cfg(feature = "train")]
pub mod unroll;

#[cfg(all(test, feature = "ort", feature = "tract"))]
mod tests;

#[cfg(feature = "train")]
pub use generator::generator;
pub use ship::{Precision, ShipOptions, ShipReport, ship};
#[cfg(feature = "train")]
pub use student::{StudentOptions, same_graph, student};
#[cfg(feature = "train")]
pub use unroll::Steps;
