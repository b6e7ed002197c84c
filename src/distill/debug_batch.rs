//! The tensors of one batch of stage 2, for a person to judge.

use tch::Tensor;

/// The tensors of one micro-batch of stage 2, `[B, C, H, W]` without a graph.
#[derive(Debug)]
pub struct DebugBatch {
    /// Noise level of each sample.
    pub sigmas: Vec<f64>,
    pub x_t: Tensor,
    /// x0 by the target and by the fake score.
    pub target: Tensor,
    pub fake: Option<Tensor>,
    /// Of the generator's whole loss with respect to its images.
    pub gradient: Tensor,
}
