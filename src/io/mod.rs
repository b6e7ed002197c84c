//! Arrays and images on disk.

pub mod images;
mod labels;
pub mod npy;
pub mod rows;

pub use images::{ImageSet, Rounding};
pub use rows::RowFile;
