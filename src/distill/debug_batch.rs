//! The tensors of one batch of stage 2, for a person to judge.

use tch::Tensor;

/// The tensors of one micro-batch of stage 2, `[B, ...shape]` without a graph.
#[derive(Debug)]
pub struct DebugBatch {
    /// Noise level of each sample.
    pub sigmas: Vec<f64>,
    /// Noised samples `x0 + sigma e` of the student.
    pub x_t: Tensor,
    /// x0 as the target estimates it.
    pub target: Tensor,
    /// x0 as the fake score estimates it; absent where the objective has none.
    pub fake: Option<Tensor>,
    /// Gradient of the generator's whole loss with respect to its images.
    pub gradient: Tensor,
}
