//! ONNX operators on libtorch: a shared immutable plan, parameter sets, networks, the optimiser and devices.

pub mod device;
pub mod ema;
pub mod network;
pub mod optim;
pub mod params;
pub mod shim;

pub use network::{Forward, Network};
pub use params::ParamSet;
