//! Gathering and scattering.

use tch::{Kind, Tensor};

use crate::error::Result;
use crate::graph::Node;
use crate::torch::kernel::{Kernel, one};
use crate::torch::ops::util;
use crate::torch::registry::Registry;

pub fn register(r: &mut Registry) {
    r.add("Gather", 1, (2, 2), gather);
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
        let rows = if axis == 0 && x.dim() == 2 && super::super::plan::is_float(x.kind()) {
            Tensor::f_embedding(x, &flat, -1, false, false)?
        } else {
            x.f_index_select(axis, &flat)?
        };
        one(rows.f_reshape(&shape[..])?)
    }))
}
