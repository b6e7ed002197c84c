//! What a person looks at: sample grids, plots, the HTML report, TensorBoard events.

pub mod grid;
