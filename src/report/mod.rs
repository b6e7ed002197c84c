//! What a person looks at: sample grids, plots, the HTML report, TensorBoard events.

mod bars;
mod curves;
mod embed;
mod gallery;
pub mod grid;
pub mod html;
pub mod plot;
mod run;
mod tables;
pub(crate) mod text;
pub mod tfevents;

pub use html::{write, write_beside};
