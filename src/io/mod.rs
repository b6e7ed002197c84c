//! Arrays and images on disk.

pub mod idx;
pub mod image_writer;
pub mod images;
mod labels;
pub mod npy;
mod picture;
mod png;
pub(crate) mod ranges;
mod rounding;
pub mod rows;
pub mod table;
pub mod wav;

pub use images::{ImageSet, Rounding};
pub use rows::RowFile;
