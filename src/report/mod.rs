//! What a person looks at: sample grids, plots, the HTML report, TensorBoard events.

#[cfg(feature = "report")]
mod bars;
#[cfg(feature = "report")]
mod curves;
#[cfg(feature = "report")]
mod embed;
#[cfg(feature = "report")]
mod gallery;
pub mod grid;
#[cfg(feature = "report")]
pub mod html;
#[cfg(feature = "report")]
pub mod plot;
#[cfg(feature = "report")]
mod run;
#[cfg(feature = "report")]
mod tables;
#[cfg(feature = "report")]
pub(crate) mod text;
#[cfg(feature = "train")]
pub mod tfevents;
pub mod view;

#[cfg(feature = "report")]
pub use html::{write, write_beside};
