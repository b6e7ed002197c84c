//! Score implicit matching (Luo et al. 2024) with the pseudo-Huber distance.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::distill::objective::{Objective, Terms};
use crate::error::Result;

/// `objective = "sim"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SimConfig {
    /// Softening of the pseudo-Huber distance `sqrt(|y|^2 + c^2) - c` between scores.
    pub c: f64,
}

impl Default for SimConfig {
    fn default() -> Self {
        Self { c: 0.01 }
    }
}

/// `L = -w d'(y) . (s_f - grad log q(x_t | x0))`, `y = s_f - s_r`, `d'(y) = y / sqrt(y.y + c^2)` over the whole image, with
/// `w = sigma^2`, which makes it `-d'(y) . (D_f - x0)`. The fake score's own dependence on the generator needs no
/// derivative: that is the method's theorem.
#[derive(Debug, Clone, Copy)]
pub struct Sim {
    /// The pseudo-Huber distance is quadratic below and linear above this distance of the scores.
    pub c: f64,
}

impl Objective for Sim {
    fn name(&self) -> &str {
        "sim"
    }

    fn through_scores(&self) -> bool {
        true
    }

    fn loss(&self, t: &Terms) -> Result<Tensor> {
        let fake = t.fake()?;
        let y = fake.f_sub(t.target)?.f_div(&t.sigma.f_square()?)?;
        let dims: Vec<i64> = (1..y.dim() as i64).collect();
        let length = y.f_square()?.f_sum_dim_intlist(dims.as_slice(), true, Kind::Float)?;
        let direction = y.f_div(&length.f_add_scalar(self.c * self.c)?.f_sqrt()?)?;
        let product = direction.f_mul(&fake.f_sub(t.x0)?)?.f_sum_dim_intlist(dims.as_slice(), false, Kind::Float)?;
        Ok(product.f_neg()?.f_mean(Kind::Float)?)
    }
}
