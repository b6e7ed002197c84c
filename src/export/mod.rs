//! Out of the training network, into ONNX: the one-step student, the teacher's graph with the student's weights, and the
//! file that ships: optimised, portable, in the precision asked for.

pub mod attach;
#[cfg(feature = "train")]
pub mod base;
mod branches;
pub mod calibrate;
pub mod edit;
pub mod evaluate;
#[cfg(feature = "train")]
pub mod fold;
#[cfg(feature = "train")]
pub mod generator;
pub mod half;
pub mod half_rewrite;
pub mod int8;
pub mod int8_dynamic;
pub mod loss;
pub mod opset;
pub mod plain;
pub mod portable;
pub mod raised;
pub mod ship;
pub mod simplify;
#[cfg(feature = "train")]
pub mod student;
#[cfg(feature = "train")]
pub mod unroll;
#[cfg(feature = "train")]
pub mod wide;

#[cfg(all(test, feature = "ort", feature = "tract"))]
mod tests;

#[cfg(feature = "train")]
pub use generator::generator;
pub use ship::{Precision, ShipOptions, ShipReport, ship};
#[cfg(feature = "train")]
pub use student::{StudentOptions, same_graph, student};
#[cfg(feature = "train")]
pub use unroll::Steps;
