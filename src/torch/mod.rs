//! ONNX operators on libtorch: a shared immutable plan, parameter sets, networks, the optimiser and devices.

pub mod network;
pub mod params;

pub use network::{Forward, Network};
pub use params::ParamSet;
