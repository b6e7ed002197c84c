//! What a person looks at: sample grids, plots, the HTML report, TensorBoard events.

pub mod grid;
pub mod html;
pub mod plot;
mod run;
pub mod tfevents;

pub use html::write;
