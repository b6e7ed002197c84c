//! Out of the training network, into ONNX: the one-step student, and the teacher's graph with the student's weights.

pub mod edit;
#[cfg(feature = "train")]
pub mod fold;
#[cfg(feature = "train")]
pub mod student;

#[cfg(feature = "train")]
pub use student::{StudentOptions, same_graph, student};
