//! Reductions over axes.

use tch::{Kind, Tensor};

use crate::error::Result;
use crate::graph::Node;
use crate::torch::exec::kernel::{Kernel, Value, one};
use crate::torch::exec::registry::Registry;
use crate::torch::ops::util;

type Reduce = fn(&Tensor, &[i64], bool) -> Result<Tensor, tch::TchError>;

pub fn register(r: &mut Registry) {
    r.add("ReduceSum", 1, (1, 2), |n| reduce(n, |x, d, k| x.f_sum_dim_intlist(d, k, x.kind())));
    r.add("ReduceMean", 1, (1, 2), |n| reduce(n, mean));
    r.add("ReduceMax", 1, (1, 2), |n| reduce(n, |x, d, k| extreme(x, d, k, true)));
    r.add("ReduceMin", 1, (1, 2), |n| reduce(n, |x, d, k| extreme(x, d, k, false)));
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
    r.add("ReduceLogSum", 1, (1, 2), |n| {
        reduce(n, |x, d, k| x.f_sum_dim_intlist(d, k, x.kind())?.f_log()?.f_to_kind(x.kind()))
    });
    r.add("ReduceLogSumExp", 1, (1, 2), |n| reduce(n, |x, d, k| x.f_logsumexp(d, k)?.f_to_kind(x.kind())));
    r.add("ArgMax", 1, (1, 1), |n| arg(n, false));
    r.add("ArgMin", 1, (1, 1), |n| arg(n, true));
}

/// libtorch has no mean of integers; ONNX's is truncated.
fn mean(x: &Tensor, dims: &[i64], keep: bool) -> Result<Tensor, tch::TchError> {
    if util::is_integer(x.kind()) {
        return x.f_mean_dim(dims, keep, Kind::Double)?.f_to_kind(x.kind());
    }
    x.f_mean_dim(dims, keep, x.kind())
}

/// Largest or smallest element; of none, the identity of that operation.
fn extreme(x: &Tensor, dims: &[i64], keep: bool, max: bool) -> Result<Tensor, tch::TchError> {
    let size = x.size();
    if dims.iter().any(|&d| size[d as usize] == 0) {
        let shape: Vec<i64> = (0..size.len() as i64)
            .filter_map(|i| if dims.contains(&i) { keep.then_some(1) } else { Some(size[i as usize]) })
            .collect();
        let value = util::limit(x.kind(), !max);
        return if util::is_integer(x.kind()) || x.kind() == Kind::Bool {
            Tensor::f_full(&shape[..], value as i64, (x.kind(), x.device()))
        } else {
            Tensor::f_full(&shape[..], value, (x.kind(), x.device()))
        };
    }
    if max { x.f_amax(dims, keep) } else { x.f_amin(dims, keep) }
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
        one(util::extreme_index(x, axis, min, last, keep)?)
    }))
}
