//! Small things that several families share.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::torch::convert;
use crate::torch::convert::is_float;

/// `axis` in `-rank..rank` as a non-negative index.
pub fn axis(axis: i64, rank: usize) -> Result<i64> {
    let r = rank as i64;
    if (-r..r).contains(&axis) {
        Ok(if axis < 0 { axis + r } else { axis })
    } else {
        Err(Error::invalid(format!("axis {axis} for a tensor of rank {rank}")))
    }
}

/// Size of one dimension; an error where the rank is too low.
pub fn dim(t: &Tensor, i: usize) -> Result<i64> {
    let size = t.size();
    size.get(i).copied().ok_or_else(|| Error::invalid(format!("input of shape {size:?}, expected rank above {i}")))
}

/// A number of table entries that we are willing to compute on the host: a hostile file may ask for 2^60.
pub fn table_len(n: i64) -> Result<usize> {
    const MOST: i64 = 1 << 26;
    match usize::try_from(n) {
        Ok(len) if n <= MOST => Ok(len),
        _ => Err(Error::invalid(format!("a table of {n} entries, expected 0 to {MOST}"))),
    }
}

/// Refuses operands of which one holds floats and the other integers: ONNX wants one type, libtorch would convert in silence.
pub fn alike(x: &Tensor, y: &Tensor) -> Result<()> {
    let (a, b) = (x.kind(), y.kind());
    if is_float(a) == is_float(b) {
        return Ok(());
    }
    let name = |k| convert::dtype(k).map_or_else(|_| format!("{k:?}"), |d| d.to_string());
    Err(Error::invalid(format!("operands of element types {} and {}, expected one type", name(a), name(b)))
        .hint("the file breaks the specification here: write a Cast before this node"))
}

/// Refuses results that no memory holds: a hostile or damaged file may ask for 2^60 elements.
pub fn affordable(shape: &[i64]) -> Result<()> {
    const MOST: i64 = 1 << 33;
    // An empty tensor counts by its other dimensions: their products must not overflow either.
    match shape.iter().try_fold(1i64, |n, &d| n.checked_mul(d.max(1))) {
        Some(n) if n <= MOST => Ok(()),
        _ => Err(Error::invalid(format!("a result of shape {shape:?} is larger than memory"))
            .hint("the shape is damaged, or computed from inputs of other sizes than the network is made for")),
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
    let mut shape = vec![1i64; rank.max(1)];
    shape[usize::from(rank > 1)] = -1;
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

/// Whether the kind is an integer (booleans are not).
pub fn is_integer(k: Kind) -> bool {
    matches!(k, Kind::Uint8 | Kind::Int8 | Kind::Int16 | Kind::Int | Kind::Int64)
}

/// Index of the extreme along `axis`, the first (or last) one among equals: libtorch promises no order there.
pub fn extreme_index(x: &Tensor, axis: i64, min: bool, last: bool, keep: bool) -> Result<Tensor> {
    let x = if x.kind() == Kind::Bool { x.f_to_kind(Kind::Uint8)? } else { x.detach() };
    if x.dim() == 0 {
        return Ok(x.f_zeros_like()?.f_to_kind(Kind::Int64)?);
    }
    let best = if min { x.f_amin([axis], true)? } else { x.f_amax([axis], true)? };
    let hit = x.f_eq_tensor(&best)?.f_logical_or(&x.f_isnan()?)?.f_to_kind(Kind::Int64)?;
    let n = x.size()[axis as usize];
    let weights = Tensor::f_arange(n, (Kind::Int64, x.device()))?;
    let weights = if last { weights.f_add_scalar(1)? } else { weights.f_neg()?.f_add_scalar(n)? };
    let score = hit.f_mul(&along(&weights, axis, x.dim())?)?.f_amax([axis], keep)?;
    Ok(if last { score.f_add_scalar(-1)? } else { score.f_neg()?.f_add_scalar(n)? })
}

/// A vector as a tensor of rank `rank` that varies along `axis` only.
pub fn along(v: &Tensor, axis: i64, rank: usize) -> Result<Tensor> {
    let mut shape = vec![1i64; rank];
    if let Some(slot) = shape.get_mut(axis as usize) {
        *slot = -1;
    }
    Ok(v.f_reshape(&shape[..])?)
}

/// A host vector on the device of `like`.
pub fn vector<T: tch::kind::Element>(values: &[T], like: &Tensor) -> Result<Tensor> {
    Ok(Tensor::f_from_slice(values)?.f_to_device(like.device())?)
}

/// The smallest (`-inf`) or, with `max`, the largest value of a kind: what padding must never win against.
pub fn limit(kind: Kind, max: bool) -> f64 {
    let (low, high) = match kind {
        Kind::Uint8 => (0.0, 255.0),
        Kind::Int8 => (-128.0, 127.0),
        Kind::Int16 => (-32768.0, 32767.0),
        Kind::Int => (f64::from(i32::MIN), f64::from(i32::MAX)),
        // The nearest that both f64 and i64 can hold.
        Kind::Int64 => (-9.223_372_036_854_775e18, 9.223_372_036_854_774e18),
        Kind::Bool => (0.0, 1.0),
        _ => (f64::NEG_INFINITY, f64::INFINITY),
    };
    if max { high } else { low }
}
