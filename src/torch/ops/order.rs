//! What depends on the order of elements: sorting, running sums, selection, uniqueness.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::graph::Node;
use crate::torch::exec::kernel::{Kernel, Value, one};
use crate::torch::exec::registry::Registry;
use crate::torch::ops::util;

pub fn register(r: &mut Registry) {
    r.add("TopK", 1, (1, 2), top_k);
    r.add("CumSum", 11, (2, 2), |n| running(n, 0, |x, axis| x.f_cumsum(axis, x.kind())));
    r.add("CumProd", 26, (2, 2), |n| running(n, 1, |x, axis| x.f_cumprod(axis, x.kind())));
    r.add("NonZero", 9, (1, 1), |_| Ok(Kernel::new(|a| one(a.t(0)?.f_nonzero()?.f_transpose(0, 1)?)).dynamic()));
    r.add("Compress", 9, (2, 2), compress);
    r.add("Unique", 11, (1, 1), unique);
    r.add("ReverseSequence", 10, (2, 2), reverse_sequence);
}

/// Equal elements keep their order, which libtorch's own top-k does not promise.
fn top_k(node: &Node) -> Result<Kernel> {
    let axis = node.attributes.int_or("axis", -1)?;
    let largest = node.attributes.flag("largest", true)?;
    // Sorted output is one of the orders that `sorted = 0` leaves open.
    node.attributes.get("sorted");
    let fixed = node.attributes.int("k")?;
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let axis = util::axis(axis, x.dim())?;
        let k = match fixed {
            Some(k) => k,
            None => a.ints(1)?.first().copied().ok_or_else(|| Error::invalid("k is empty"))?,
        };
        let n = x.size().get(axis as usize).copied().unwrap_or(1);
        if k < 0 || k > n {
            return Err(Error::invalid(format!("the top {k} of {n}")));
        }
        let (values, index) = x.f_sort_stable(true, axis, largest)?;
        Ok(vec![Value::device(values.f_narrow(axis, 0, k)?), Value::device(index.f_narrow(axis, 0, k)?)])
    })
    .host(&[1]))
}

fn running(node: &Node, start: i64, f: fn(&Tensor, i64) -> Result<Tensor, tch::TchError>) -> Result<Kernel> {
    let exclusive = node.attributes.flag("exclusive", false)?;
    let reverse = node.attributes.flag("reverse", false)?;
    Ok(Kernel::new(move |a| {
        let axis = a.ints(1)?.first().copied().ok_or_else(|| Error::invalid("the axis is empty"))?;
        let axis = util::axis(axis, a.t(0)?.dim())?;
        let mut x = a.t(0)?.shallow_clone();
        if reverse {
            x = x.f_flip([axis])?;
        }
        let n = x.size().get(axis as usize).copied().unwrap_or(0);
        if exclusive && n > 0 {
            let first = x.f_narrow(axis, 0, 1)?.f_full_like(start)?;
            x = Tensor::f_cat(&[first, x.f_narrow(axis, 0, n - 1)?], axis)?;
        }
        let mut y = f(&x, axis)?;
        if reverse {
            y = y.f_flip([axis])?;
        }
        one(y)
    })
    .host(&[1]))
}

fn compress(node: &Node) -> Result<Kernel> {
    let axis = node.attributes.int("axis")?;
    Ok(Kernel::new(move |a| {
        let (x, condition) = (a.t(0)?, a.t(1)?);
        let (x, axis) = match axis {
            Some(axis) => (x.shallow_clone(), util::axis(axis, x.dim())?),
            None => (x.f_reshape([-1])?, 0),
        };
        let index = condition.f_nonzero()?.f_reshape([-1])?;
        one(x.f_index_select(axis, &index)?)
    })
    .dynamic())
}

fn unique(node: &Node) -> Result<Kernel> {
    let axis = node.attributes.int("axis")?;
    let sorted = node.attributes.flag("sorted", true)?;
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let (x, axis) = match axis {
            Some(axis) => (x.shallow_clone(), util::axis(axis, x.dim())?),
            None => (x.f_reshape([-1])?, 0),
        };
        let (values, mut inverse, mut counts) = x.detach().f_unique_dim(axis, true, true, true)?;
        let (n, groups) = (x.size()[axis as usize], values.size()[axis as usize]);
        let at = Tensor::f_arange(n, (Kind::Int64, x.device()))?;
        let mut first = Tensor::f_full([groups], n, (Kind::Int64, x.device()))?
            .f_internal_scatter_reduce(0, &inverse, &at, "amin", true)?;
        if !sorted {
            let order = first.f_argsort(0, false)?;
            inverse = order.f_argsort(0, false)?.f_index_select(0, &inverse)?;
            counts = counts.f_index_select(0, &order)?;
            first = first.f_index_select(0, &order)?;
        }
        // Taken from the input, so that gradients flow to the first of each.
        let y = x.f_index_select(axis, &first)?;
        Ok([y, first, inverse, counts].map(Value::device).to_vec())
    })
    .dynamic())
}

fn reverse_sequence(node: &Node) -> Result<Kernel> {
    let batch = node.attributes.int_or("batch_axis", 1)?;
    let time = node.attributes.int_or("time_axis", 0)?;
    Ok(Kernel::new(move |a| {
        let (x, lengths) = (a.t(0)?, a.t(1)?);
        let (batch, time) = (util::axis(batch, x.dim())?, util::axis(time, x.dim())?);
        if batch == time || x.dim() < 2 {
            return Err(Error::invalid("batch_axis and time_axis are the same"));
        }
        let steps = Tensor::f_arange(x.size()[time as usize], (Kind::Int64, x.device()))?;
        let steps = util::along(&steps, time, x.dim())?;
        let lengths = util::along(&lengths.f_to_kind(Kind::Int64)?, batch, x.dim())?;
        let mirrored = lengths.f_sub(&steps)?.f_sub_scalar(1)?;
        let index = mirrored.f_where_self(&steps.f_lt_tensor(&lengths)?, &steps)?;
        one(x.f_gather(time, &index.f_expand(&x.size()[..], false)?, false)?)
    }))
}
