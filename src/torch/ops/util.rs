//! Small things that several families share.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};

/// `axis` in `-rank..rank` as a non-negative index.
pub fn axis(axis: i64, rank: usize) -> Result<i64> {
    let r = rank as i64;
    if (-r..r).contains(&axis) || (r == 0 && (axis == 0 || axis == -1)) {
        Ok(if axis < 0 { (axis + r).max(0) } else { axis })
    } else {
        Err(Error::invalid(format!("axis {axis} for a tensor of rank {rank}")))
    }
}

/// All of `axes` as non-negative indices, without repetition.
pub fn axes(list: &[i64], rank: usize) -> Result<Vec<i64>> {
    let out = list.iter().map(|&a| axis(a, rank)).collect::<Result<Vec<_>>>()?;
    let mut sorted = out.clone();
    sorted.sort_unstable();
    sorted.dedup();
    if sorted.len() == out.len() { Ok(out) } else { Err(Error::invalid(format!("axes {list:?} name one axis twice"))) }
}

/// Appends dimensions of size one until the rank is `rank`, so that a per-channel vector `[C]` broadcasts as `[C, 1, 1]`.
pub fn per_channel(v: &Tensor, rank: usize) -> Result<Tensor> {
    let mut shape = vec![1i64; rank];
    if rank > 1 {
        shape[1] = -1;
    } else {
        shape[0] = -1;
    }
    Ok(v.f_reshape(&shape[..])?)
}

/// Half precision is computed in f32 by reference implementations of reductions and norms; the result goes back.
pub fn widened(t: &Tensor) -> Result<(Tensor, Kind)> {
    let kind = t.kind();
    Ok(match kind {
        Kind::Half | Kind::BFloat16 => (t.f_to_kind(Kind::Float)?, kind),
        _ => (t.shallow_clone(), kind),
    })
}
