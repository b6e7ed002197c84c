//! Gathering and scattering.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::graph::Node;
use crate::torch::exec::kernel::{Kernel, one};
use crate::torch::exec::registry::Registry;
use crate::torch::ops::util;

pub fn register(r: &mut Registry) {
    r.add("Gather", 1, (2, 2), gather);
    r.add("GatherElements", 11, (2, 2), |n| {
        let axis = n.attributes.int_or("axis", 0)?;
        Ok(Kernel::new(move |a| {
            let x = a.t(0)?;
            let axis = util::axis(axis, x.dim())?;
            one(x.f_gather(axis, &wrapped(a.t(1)?, x.size()[axis as usize])?, false)?)
        }))
    });
    r.add("GatherND", 11, (2, 2), gather_nd);
    r.add("ScatterElements", 11, (3, 3), scatter_elements);
    r.add("Scatter", 9, (3, 3), scatter_elements);
    r.add("ScatterND", 11, (3, 3), scatter_nd);
    r.add("TensorScatter", 24, (2, 3), tensor_scatter);
    r.add("OneHot", 9, (3, 3), one_hot);
    r.add("Trilu", 14, (1, 2), |n| {
        let upper = n.attributes.flag("upper", true)?;
        Ok(Kernel::new(move |a| {
            let k = if a.has(1) { a.ints(1)?.first().copied().unwrap_or(0) } else { 0 };
            one(if upper { a.t(0)?.f_triu(k)? } else { a.t(0)?.f_tril(k)? })
        })
        .host(&[1]))
    });
}

/// Negative indices count from the end, on the device.
pub fn wrapped(index: &Tensor, size: i64) -> Result<Tensor> {
    let index = index.f_to_kind(Kind::Int64)?;
    Ok(index.f_where_self(&index.f_ge(0)?, &index.f_add_scalar(size)?)?)
}

fn gather(node: &Node) -> Result<Kernel> {
    let axis = node.attributes.int_or("axis", 0)?;
    Ok(Kernel::new(move |a| {
        let (x, index) = (a.t(0)?, a.t(1)?);
        let axis = util::axis(axis, x.dim())?;
        let mut shape = x.size();
        shape.splice(axis as usize..=axis as usize, index.size());
        let flat = wrapped(index, x.size()[axis as usize])?.f_reshape([-1])?;
        // `embedding` has the faster gradient for the common case of a table.
        let rows = if axis == 0 && x.dim() == 2 && crate::torch::convert::is_float(x.kind()) {
            Tensor::f_embedding(x, &flat, -1, false, false)?
        } else {
            x.f_index_select(axis, &flat)?
        };
        one(rows.f_reshape(&shape[..])?)
    }))
}

/// What happens where several updates meet.
#[derive(Debug, Clone, Copy)]
enum Reduction {
    None,
    Add,
    Other(&'static str),
}

impl Reduction {
    fn parse(node: &Node) -> Result<Self> {
        Ok(match node.attributes.string_or("reduction", "none")?.as_str() {
            "none" => Self::None,
            "add" => Self::Add,
            "mul" => Self::Other("prod"),
            "max" => Self::Other("amax"),
            "min" => Self::Other("amin"),
            other => return Err(Error::invalid(format!("attribute `reduction` is `{other}`"))),
        })
    }

    fn scatter(self, x: &Tensor, axis: i64, index: &Tensor, updates: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::None => x.f_scatter(axis, index, updates)?,
            Self::Add => x.f_scatter_add(axis, index, updates)?,
            Self::Other(how) => x.f_internal_scatter_reduce(axis, index, updates, how, true)?,
        })
    }
}

fn scatter_elements(node: &Node) -> Result<Kernel> {
    let axis = node.attributes.int_or("axis", 0)?;
    let reduction = Reduction::parse(node)?;
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let axis = util::axis(axis, x.dim())?;
        let index = wrapped(a.t(1)?, x.size()[axis as usize])?;
        one(reduction.scatter(x, axis, &index, a.t(2)?)?)
    }))
}

/// Rows of `index` (its last dimension counts through `dims`) as positions in the flattened `dims`.
fn flat_index(index: &Tensor, dims: &[i64]) -> Result<Tensor> {
    let index = index.f_to_kind(Kind::Int64)?;
    let sizes = util::vector(dims, &index)?;
    let wrapped = index.f_where_self(&index.f_ge(0)?, &index.f_add(&sizes)?)?;
    let mut strides = vec![1i64; dims.len()];
    for i in (1..dims.len()).rev() {
        strides[i - 1] = strides[i] * dims[i];
    }
    Ok(wrapped.f_mul(&util::vector(&strides, &index)?)?.f_sum_dim_intlist([-1i64].as_slice(), false, Kind::Int64)?)
}

fn depth(index: &Tensor, available: usize) -> Result<usize> {
    match index.size().last() {
        Some(&k) if k >= 0 && k as usize <= available => Ok(k as usize),
        k => Err(Error::invalid(format!("index rows of length {k:?} into {available} dimensions"))),
    }
}

fn gather_nd(node: &Node) -> Result<Kernel> {
    let batch = node.attributes.int_or("batch_dims", 0)?;
    Ok(Kernel::new(move |a| {
        let (x, index) = (a.t(0)?, a.t(1)?);
        let b = usize::try_from(batch).ok().filter(|&b| b < x.dim() && b < index.dim().max(1));
        let b = b.ok_or_else(|| Error::invalid(format!("attribute `batch_dims` is {batch}")))?;
        let k = depth(index, x.dim() - b)?;
        let (size, index_size) = (x.size(), index.size());
        let batches: i64 = size[..b].iter().product();
        let dims = &size[b..b + k];
        let inner: i64 = dims.iter().product();
        let flat = flat_index(index, dims)?.f_reshape([batches, -1])?;
        let offsets = Tensor::f_arange(batches, (Kind::Int64, x.device()))?.f_mul_scalar(inner)?.f_unsqueeze(1)?;
        let flat = flat.f_add(&offsets)?.f_reshape([-1])?;
        let rest = &size[b + k..];
        let mut rows = vec![batches * inner];
        rows.extend(rest);
        let mut shape = index_size[..index_size.len() - 1].to_vec();
        shape.extend(rest);
        one(x.f_reshape(&rows[..])?.f_index_select(0, &flat)?.f_reshape(&shape[..])?)
    }))
}

fn scatter_nd(node: &Node) -> Result<Kernel> {
    let reduction = Reduction::parse(node)?;
    Ok(Kernel::new(move |a| {
        let (x, index, updates) = (a.t(0)?, a.t(1)?, a.t(2)?);
        let size = x.size();
        let k = depth(index, size.len())?;
        let outer: i64 = size[..k].iter().product();
        let inner: i64 = size[k..].iter().product();
        let flat = flat_index(index, &size[..k])?.f_reshape([-1, 1])?;
        let rows = flat.size()[0];
        let y = reduction.scatter(
            &x.f_reshape([outer, inner])?,
            0,
            &flat.f_expand([rows, inner], false)?,
            &updates.f_reshape([rows, inner])?,
        )?;
        one(y.f_reshape(&size[..])?)
    }))
}

fn tensor_scatter(node: &Node) -> Result<Kernel> {
    let axis = node.attributes.int_or("axis", -2)?;
    let circular = match node.attributes.string_or("mode", "linear")?.as_str() {
        "linear" => false,
        "circular" => true,
        other => return Err(Error::invalid(format!("attribute `mode` is `{other}`"))),
    };
    Ok(Kernel::new(move |a| {
        let (cache, update) = (a.t(0)?, a.t(1)?);
        let axis = util::axis(axis, cache.dim())?;
        let (capacity, length) = (cache.size()[axis as usize], util::dim(update, axis as usize)?);
        let steps = Tensor::f_arange(length, (Kind::Int64, cache.device()))?;
        let mut index = util::along(&steps, axis, cache.dim())?;
        if let Some(start) = a.opt(2)? {
            index = index.f_add(&util::along(&start.f_to_kind(Kind::Int64)?, 0, cache.dim())?)?;
        }
        if circular {
            index = index.f_remainder(capacity)?;
        }
        one(cache.f_scatter(axis, &index.f_expand(&update.size()[..], false)?, update)?)
    }))
}

/// Indices outside of the range, counted from the end where negative, give a row of off values.
fn one_hot(node: &Node) -> Result<Kernel> {
    let axis = node.attributes.int_or("axis", -1)?;
    Ok(Kernel::new(move |a| {
        let (index, values) = (a.t(0)?, a.t(2)?);
        let depth = a.scalar(1)? as i64;
        let axis = util::axis(axis, index.dim() + 1)?;
        util::affordable(&[depth, index.numel() as i64])?;
        let classes = Tensor::f_arange(depth, (Kind::Int64, index.device()))?;
        let hit =
            wrapped(index, depth)?.f_unsqueeze(axis)?.f_eq_tensor(&util::along(&classes, axis, index.dim() + 1)?)?;
        one(values.f_select(0, 1)?.f_where_self(&hit, &values.f_select(0, 0)?)?)
    })
    .host(&[1]))
}
