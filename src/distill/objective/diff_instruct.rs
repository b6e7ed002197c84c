//! Diff-Instruct (Luo et al. 2023), the variational score distillation gradient.

use tch::Tensor;

use crate::distill::objective::{Objective, Terms, surrogate};
use crate::error::Result;

/// `g = D_fake - D_target`: the gradient of the KL divergence at x_t, weighted by sigma^2.
#[derive(Debug, Clone, Copy)]
pub struct DiffInstruct;

impl Objective for DiffInstruct {
    fn name(&self) -> &str {
        "diff-instruct"
    }

    fn loss(&self, t: &Terms) -> Result<Tensor> {
        surrogate(t.x0, &t.fake()?.detach().f_sub(&t.target.detach())?)
    }
}
