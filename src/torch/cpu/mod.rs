//! Kernels of our own for the CPU, where libtorch's are slower: products, convolutions, group norm, activations.

pub mod activation;
pub mod group_norm;
pub mod linear;
pub mod winograd;
