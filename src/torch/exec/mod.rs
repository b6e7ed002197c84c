//! How a graph is computed: kernels by operator, the plan over them, its specialisation to shapes, segments that are computed
//! again in the backward pass.

pub mod host_dependence;
pub mod kernel;
pub mod plan;
pub mod registry;
pub(crate) mod segments;
pub(crate) mod step;
pub(crate) mod straight_through;
