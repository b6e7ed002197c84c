//! What disback does not have: an operator and an objective of one's own.

use disback::distill::objective::{Objective, Terms, mean_of_each, surrogate};
use disback::graph::{Definition, Node};
use disback::torch::Operators;
use disback::torch::exec::kernel::{Kernel, one};
use disback::{Error, Result};
use tch::Tensor;

/// Snake (Ziyin et al. 2020, arXiv 2006.08195, eq. 3), `x + sin(alpha x)^2 / alpha`, in operators that ONNX defines. `alpha`
/// broadcasts to `x`. Runtimes compute it this way, and the student's file has it so.
pub fn snake() -> Definition {
    Definition::new("com.example", "Snake", &["x", "alpha"], &["y"])
        .node("Mul", &["alpha", "x"], &["angle"])
        .node("Sin", &["angle"], &["sine"])
        .node("Mul", &["sine", "sine"], &["squared"])
        .node("Div", &["squared", "alpha"], &["wave"])
        .node("Add", &["x", "wave"], &["y"])
}

/// Snake for training, by `sin(a)^2 = (1 - cos(2 a)) / 2`: `x + (1 - cos(2 alpha x)) / (2 alpha)`. It shows how a kernel is handed in;
/// it was not measured against the definition.
pub fn snake_kernel(node: &Node) -> Result<Kernel> {
    if node.inputs.len() != 2 {
        return Err(Error::invalid(format!("{}: expected x and alpha", node.label())));
    }
    Ok(Kernel::new(|inputs| {
        let (x, alpha) = (inputs.t(0)?, inputs.t(1)?);
        let double = alpha.f_mul_scalar(2.0)?;
        let cosine = x.f_mul(&double)?.f_cos()?;
        one(x.f_add(&cosine.f_neg()?.f_add_scalar(1.0)?.f_div(&double)?)?)
    }))
}

/// All operators of the example's teacher.
pub fn operators() -> Operators {
    Operators::new().define_with(snake(), snake_kernel)
}

/// Diff-Instruct's gradient `g = D_fake - D_target` with the length of one in every sample: `g / sqrt(mean g^2 + eps^2)`, so that
/// all noise levels have an equal say.
#[derive(Debug, Clone, Copy)]
pub struct UnitGradient {
    /// Below this length, in the samples' scale, a gradient is left as short as it is.
    pub eps: f64,
}

impl Objective for UnitGradient {
    fn name(&self) -> &str {
        "com.example.unit-gradient"
    }

    fn loss(&self, terms: &Terms) -> Result<Tensor> {
        let g = terms.fake()?.detach().f_sub(&terms.target.detach())?;
        let length = mean_of_each(&g.f_square()?)?.f_add_scalar(self.eps * self.eps)?.f_sqrt()?;
        surrogate(terms.x0, &g.f_div(&length)?)
    }
}
