//! Reductions over axes.

use tch::{Kind, Tensor};

use crate::error::Result;
use crate::graph::Node;
use crate::torch::kernel::{Kernel, Value, one};
use crate::torch::ops::util;
use crate::torch::registry::Registry;

type Reduce = fn(&Tensor, &[i64], bool) -> Result<Tensor, tch::TchError>;

pub fn register(r: &mut Registry) {
    r.add("ReduceSum", 1, (1, 2), |n| reduce(n, |x, d, k| x.f_sum_dim_intlist(d, k, x.kind())));
    r.add("ReduceMean", 1, (1, 2), |n| reduce(n, |x, d, k| x.f_mean_dim(d, k, x.kind())));
    r.add("ReduceMax", 1, (1, 2), |n| reduce(n, |x, d, k| x.f_amax(d, k)));
    r.add("ReduceMin", 1, (1, 2), |n| reduce(n, |x, d, k| x.f_amin(d, k)));
    r.add("ReduceProd", 1, (1, 2), |n| {
        reduce(n, |x, d, k| {
            let mut dims = d.to_vec();
            dims.sort_unstable();
            dims.iter().rev().try_fold(x.shallow_clone(), |y, &i| y.f_prod_dim_int(i, k, x.kind()))
        })
    });
    r.add("ReduceL1", 1, (1, 2), |n| reduce(n, |x, d, k| x.f_abs()?.f_sum_dim_intlist(d, k, x.kind())));
    r.add("ReduceL2", 1, (1, 2), |n| {
        reduce(n, |x, d, k| x.f_square()?.f_sum_dim_intlist(d, k, x.kind())?.f_sqrt()?.f_to_kind(x.kind()))
    });
    r.add("ReduceSumSquare", 1, (1, 2), |n| reduce(n, |x, d, k| x.f_square()?.f_sum_dim_intlist(d, k, x.kind())));
    r.add("ReduceLogSum", 1, (1, 2), |n| reduce(n, |x, d, k| x.f_sum_dim_intlist(d, k, x.kind())?.f_log()));
    r.add("ReduceLogSumExp", 1, (1, 2), |n| reduce(n, |x, d, k| x.f_logsumexp(d, k)));
    r.add("ArgMax", 1, (1, 1), |n| arg(n, false));
    r.add("ArgMin", 1, (1, 1), |n| arg(n, true));
}

/// Axes as an attribute, or since opset 18 (13 for ReduceSum) as an input; none means all, or none at all where asked.
fn reduce(node: &Node, f: Reduce) -> Result<Kernel> {
    let keep = node.attributes.flag("keepdims", true)?;
    let fixed = node.attributes.ints("axes")?;
    let noop = node.attributes.flag("noop_with_empty_axes", false)?;
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let list = match &fixed {
            Some(list) => list.clone(),
            None => a.opt_ints(1)?.unwrap_or_default(),
        };
        if list.is_empty() && noop {
            return Ok(vec![Value::device(f(&x.f_unsqueeze(0)?, &[0], false)?)]);
        }
        let axes = if list.is_empty() { (0..x.dim() as i64).collect() } else { util::axes(&list, x.dim())? };
        if axes.is_empty() {
            return one(f(&x.f_unsqueeze(0)?, &[0], false)?);
        }
        one(f(x, &axes, keep)?)
    })
    .host(&[1]))
}

fn arg(node: &Node, min: bool) -> Result<Kernel> {
    let axis = node.attributes.int_or("axis", 0)?;
    let keep = node.attributes.flag("keepdims", true)?;
    let last = node.attributes.flag("select_last_index", false)?;
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let axis = util::axis(axis, x.dim())?;
        let x = if x.kind() == Kind::Bool { x.f_to_kind(Kind::Uint8)? } else { x.shallow_clone() };
        // libtorch promises no order among equals: the first extreme is where a running extreme first reaches it.
        let best = if min { x.f_amin([axis], true)? } else { x.f_amax([axis], true)? };
        let hit = x.f_eq_tensor(&best)?.f_to_kind(Kind::Int64)?;
        let n = x.size()[axis as usize];
        let weights = Tensor::f_arange(n, (Kind::Int64, x.device()))?;
        let weights = if last { weights.f_add_scalar(1)? } else { weights.f_neg()?.f_add_scalar(n)? };
        let mut shape = vec![1i64; x.dim()];
        shape[axis as usize] = n;
        let score = hit.f_mul(&weights.f_reshape(&shape[..])?)?.f_amax([axis], keep)?;
        one(if last { score.f_add_scalar(-1)? } else { score.f_neg()?.f_add_scalar(n)? })
    }))
}
