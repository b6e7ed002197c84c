//! Arrays and images on disk.

pub mod images;
pub mod npy;
pub mod rows;

pub use images::ImageSet;
pub use rows::RowFile;
