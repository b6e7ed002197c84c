//! Matrix products.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::graph::Node;
use crate::torch::cpu::linear;
use crate::torch::exec::kernel::{Kernel, one};
use crate::torch::exec::registry::{MANY, Registry};

pub fn register(r: &mut Registry) {
    r.add("MatMul", 1, (2, 2), |_| Ok(Kernel::new(|a| one(linear::matmul(a.t(0)?, a.t(1)?)?))));
    r.add("Gemm", 1, (2, 3), gemm);
    r.add("Det", 11, (1, 1), |_| Ok(Kernel::new(|a| one(a.t(0)?.f_det()?))));
    r.add("Einsum", 12, (1, MANY), einsum);
}

/// `alpha op(A) op(B) + beta C`; as `linear` where that is what it is, so that libtorch fuses the bias.
pub fn gemm(node: &Node) -> Result<Kernel> {
    let alpha = node.attributes.float_or("alpha", 1.0)?;
    let beta = node.attributes.float_or("beta", 1.0)?;
    let ta = node.attributes.flag("transA", false)?;
    let tb = node.attributes.flag("transB", false)?;
    node.attributes.get("broadcast");
    Ok(Kernel::new(move |args| {
        let (a, b) = (args.t(0)?, args.t(1)?);
        if a.dim() != 2 || b.dim() != 2 {
            return Err(Error::invalid(format!("operands of rank {} and {}, expected 2", a.dim(), b.dim())));
        }
        let integer = !matches!(a.kind(), Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16);
        let a = if ta { a.f_transpose(0, 1)? } else { a.shallow_clone() };
        let b = if tb { b.f_transpose(0, 1)? } else { b.shallow_clone() };
        let c = args.opt(2)?;
        let plain = alpha == 1.0 && beta == 1.0 && !integer;
        one(match c {
            Some(c) if plain && c.size() == [b.size()[1]] && linear::pays(&a, &b) => linear::linear(&a, &b, Some(c))?,
            Some(c) if plain && c.dim() <= 1 => linear::addmm(c, &a, &b)?,
            Some(c) => {
                let ab = scaled(&linear::matmul(&a, &b)?, alpha, integer)?;
                ab.f_add(&scaled(c, beta, integer)?)?
            }
            None => scaled(&linear::matmul(&a, &b)?, alpha, integer)?,
        })
    }))
}

fn scaled(t: &Tensor, by: f64, integer: bool) -> Result<Tensor> {
    if by == 1.0 {
        Ok(t.shallow_clone())
    } else if integer {
        Ok(t.f_mul_scalar(by as i64)?)
    } else {
        Ok(t.f_mul_scalar(by)?)
    }
}

fn einsum(node: &Node) -> Result<Kernel> {
    let equation =
        node.attributes.string("equation")?.ok_or_else(|| Error::invalid("attribute `equation` is missing"))?;
    let equation: String = equation.chars().filter(|c| !c.is_whitespace()).collect();
    Ok(Kernel::new(move |a| {
        let operands = (0..a.len()).map(|i| a.t(i)).collect::<Result<Vec<_>>>()?;
        one(Tensor::f_einsum(&equation, &operands, None::<i64>)?)
    }))
}
