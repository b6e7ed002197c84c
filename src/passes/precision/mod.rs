//! Fewer bits: 16-bit arithmetic where it holds, 8-bit weights and products, and the way back to f32.

pub mod calibrate;
pub mod half;
pub mod half_rewrite;
pub mod int8;
pub mod int8_dynamic;
pub mod rounding_loss;
#[cfg(feature = "train")]
pub mod upcast;
