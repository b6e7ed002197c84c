//! ONNX operators on libtorch: a shared immutable plan, parameter sets, networks, the optimiser and devices.

pub mod activation;
pub mod convert;
pub mod deciding;
pub mod device;
pub mod ema;
pub mod file_layout;
pub mod group_norm;
pub mod init;
pub mod kernel;
pub mod linear;
pub mod lora;
pub mod narrow;
pub mod network;
pub mod ops;
pub mod optim;
pub mod params;
pub mod plan;
pub mod profile;
pub mod registry;
pub mod replay;
mod segments;
pub mod shim;
mod straight_through;
pub mod tensor_file;
pub mod training;
pub mod winograd;

pub use network::{Forward, ImportOptions, Network};
pub use params::ParamSet;
pub use training::Compute;
