//! Arrays and images on disk.

pub mod images;
pub mod npy;

pub use images::ImageSet;
