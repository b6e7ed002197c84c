//! ONNX operators on libtorch: a shared immutable plan, parameter sets, networks, the optimiser, devices, and several processes.

pub mod convert;
pub mod cpu;
pub mod cuda_half;
pub mod device;
pub mod dist;
pub mod exec;
pub mod file_layout;
pub mod network;
pub mod operators;
pub mod ops;
pub mod params;
pub mod profile;
pub mod shim;
pub mod tensor_file;
pub mod train;
pub mod training;

pub use network::{Forward, ImportOptions, Network};
pub use operators::Operators;
pub use params::ParamSet;
pub use training::Compute;
