//! Norms over some axes, between two reshapes where it is a norm of groups. See `graph::fuse::norm` for the attributes.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::graph::Node;
use crate::torch::cpu::group_norm::group_norm;
use crate::torch::exec::kernel::{Args, Kernel, Value, one};
use crate::torch::ops::util;

struct Normalize {
    /// `None`: all from the third on.
    axes: Option<Vec<i64>>,
    epsilon: f64,
    rms: bool,
    /// Scale and bias meet the inner shape.
    inside: bool,
    /// The order of axes in which all this sees x, and in which the result is turned back.
    view: Option<Vec<i64>>,
}

pub(super) fn build(node: &Node) -> Result<Kernel> {
    let a = &node.attributes;
    let epsilon = a.tensor("epsilon")?.ok_or_else(|| Error::invalid("attribute `epsilon` is missing"))?;
    let spec = Normalize {
        axes: a.ints("axes")?,
        epsilon: epsilon.to_f64().first().copied().unwrap_or(0.0),
        rms: a.flag("rms", false)?,
        inside: a.flag("inside", false)?,
        view: a.ints("view")?,
    };
    Ok(Kernel::new(move |a| spec.run(a)).host(&[3, 4]))
}

impl Normalize {
    fn run(&self, a: &Args) -> Result<Vec<Value>> {
        let (given, scale, bias) = (a.t(0)?, a.opt(1)?, a.opt(2)?);
        let x = &match &self.view {
            Some(p) => given.f_permute(&p[..])?,
            None => given.shallow_clone(),
        };
        let back = |y: Tensor| match &self.view {
            Some(p) => one(y.f_permute(&inverse(p)[..])?),
            None => one(y),
        };
        if !a.has(3) {
            return back(self.over_axes(x, scale, bias)?);
        }
        let size = x.size();
        let inner = resolve(&a.ints(3)?, &size)?;
        let outer = resolve(&a.ints(4)?, &inner)?;
        if let Some(y) = self.groups(given, x, [&inner, &outer], scale, bias)? {
            return one(y);
        }
        let split = x.f_reshape(&inner[..])?;
        back(if self.inside {
            self.over_axes(&split, scale, bias)?.f_reshape(&outer[..])?
        } else {
            let y = self.over_axes(&split, None, None)?.f_reshape(&outer[..])?;
            affine(y, scale, bias)?
        })
    }

    fn axes(&self, rank: usize) -> Result<Vec<i64>> {
        let mut axes = match &self.axes {
            Some(list) => util::axes(list, rank)?,
            None => (2..rank as i64).collect(),
        };
        axes.sort_unstable();
        Ok(axes)
    }

    /// As libtorch's group norm, where the reshapes split the channels, second or last in `x`, into groups. The result has
    /// the axes of `given`.
    fn groups(
        &self,
        given: &Tensor,
        x: &Tensor,
        [inner, outer]: [&[i64]; 2],
        scale: Option<&Tensor>,
        bias: Option<&Tensor>,
    ) -> Result<Option<Tensor>> {
        let (size, rank) = (x.size(), inner.len());
        let axes = self.axes(rank)?;
        if self.rms || outer != size || size.len() < 3 || rank < 3 || inner[0] != size[0] || !x.is_floating_point() {
            return Ok(None);
        }
        let last = size.len() - 1;
        let every = |skipped: i64| (1..rank as i64).filter(|&i| i != skipped).collect::<Vec<_>>();
        // [N, C, ...] as [N, G, ...], or [N, ..., C] as [N, ..., G, C / G].
        let (channel, group) = if axes == every(1) && size[1] % inner[1].max(1) == 0 {
            (1, 1)
        } else if axes == every(rank as i64 - 2) && inner[rank - 2] * inner[rank - 1] == size[last] {
            (last, rank - 2)
        } else {
            return Ok(None);
        };
        let channels = size[channel];
        let split = [(group, inner[group]), (group + 1, inner[group + 1])];
        let whole = split[0].1 * split[1].1 == channels;
        let fits = |t: &Tensor| {
            let per_channel = if self.inside {
                whole && varies_along(t, rank, &split)
            } else {
                varies_along(t, size.len(), &[(channel, channels)])
            };
            per_channel && goes_with(t, x)
        };
        if !scale.is_none_or(fits) || !bias.is_none_or(fits) {
            return Ok(None);
        }
        let flat = |t: Option<&Tensor>| t.map(|t| t.f_reshape([-1])).transpose();
        let (scale, bias) = (flat(scale)?, flat(bias)?);
        // [N, C, ...] is what the kernel wants: a view of what is given, in memory perhaps with the channels last.
        let seen = |i: usize| self.view.as_ref().map_or(i as i64, |v| v[i]);
        let spatial = (1..size.len()).filter(|&i| i != channel);
        let order: Vec<i64> = [0, channel].into_iter().chain(spatial).map(seen).collect();
        let norm = |x: &Tensor| group_norm(x, inner[group], scale.as_ref(), bias.as_ref(), self.epsilon);
        Ok(Some(if order.is_sorted() {
            norm(given)?
        } else {
            norm(&given.f_permute(&order[..])?)?.f_permute(&inverse(&order)[..])?
        }))
    }

    /// As libtorch's layer norm or RMS norm over the axes, brought to the end where they are not there.
    fn over_axes(&self, x: &Tensor, scale: Option<&Tensor>, bias: Option<&Tensor>) -> Result<Tensor> {
        let rank = x.dim();
        let axes = self.axes(rank)?;
        let kept: Vec<i64> = (0..rank as i64).filter(|i| !axes.contains(i)).collect();
        let order: Vec<i64> = kept.iter().chain(&axes).copied().collect();
        let trailing = order.is_sorted();
        let y = if trailing { x.shallow_clone() } else { x.f_permute(&order[..])? };
        let size = x.size();
        let shape: Vec<i64> = axes.iter().map(|&i| size[i as usize]).collect();
        let lengths: Vec<(usize, i64)> = axes.iter().map(|&i| (i as usize, size[i as usize])).collect();
        // Scale and bias of exactly the normalised shape go into the kernel.
        let own = |t: &Tensor| goes_with(t, x) && varies_along(t, rank, &lengths);
        let into = scale.is_none_or(own) && bias.is_none_or(own);
        let flat = |t: Option<&Tensor>| t.filter(|_| into).map(|t| t.f_reshape(&shape[..])).transpose();
        let (w, b) = (flat(scale)?, flat(bias)?);
        let y = if self.rms {
            let y = y.f_rms_norm(&shape[..], w, self.epsilon)?;
            b.map_or(Ok(y.shallow_clone()), |b| y.f_add(&b))?
        } else {
            y.f_layer_norm(&shape[..], w, b, self.epsilon, true)?
        };
        let y = if trailing { y } else { y.f_permute(&inverse(&order)[..])? };
        if into { Ok(y) } else { affine(y, scale, bias) }
    }
}

fn affine(y: Tensor, scale: Option<&Tensor>, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = scale.map_or(Ok(y.shallow_clone()), |s| y.f_mul(s))?;
    Ok(bias.map_or(Ok(y.shallow_clone()), |b| y.f_add(b))?)
}

/// Whether the kernels take a scale or bias of this type: x's own, or f32 where autocast made x narrower.
fn goes_with(t: &Tensor, x: &Tensor) -> bool {
    t.kind() == x.kind() || (t.kind() == Kind::Float && matches!(x.kind(), Kind::BFloat16 | Kind::Half))
}

/// Whether `t`, broadcast to this rank, has these lengths along these axes (in order) and 1 along all others.
fn varies_along(t: &Tensor, rank: usize, axes: &[(usize, i64)]) -> bool {
    let own = t.size();
    let Some(missing) = rank.checked_sub(own.len()) else { return false };
    (0..rank).all(|i| {
        let wanted = axes.iter().find(|(axis, _)| *axis == i).map_or(1, |(_, n)| *n);
        i.checked_sub(missing).map_or(1, |i| own[i]) == wanted
    })
}

fn inverse(order: &[i64]) -> Vec<i64> {
    let mut back = vec![0; order.len()];
    for (i, &o) in order.iter().enumerate() {
        back[o as usize] = i as i64;
    }
    back
}

/// ONNX's reshape rules (0 copies, -1 is what remains) on the host.
pub(super) fn resolve(wanted: &[i64], size: &[i64]) -> Result<Vec<i64>> {
    let bad = || Error::invalid(format!("cannot reshape {size:?} to {wanted:?}"));
    let mut out: Vec<i64> = wanted
        .iter()
        .enumerate()
        .map(|(i, &d)| if d == 0 { size.get(i).copied().ok_or_else(bad) } else { Ok(d) })
        .collect::<Result<_>>()?;
    let product = |dims: &[i64]| dims.iter().try_fold(1i64, |n, &d| n.checked_mul(d)).ok_or_else(bad);
    let total = product(size)?;
    if let Some(free) = out.iter().position(|&d| d == -1) {
        let rest = product(&out.iter().copied().filter(|&d| d != -1).collect::<Vec<_>>())?;
        if rest == 0 || total % rest != 0 {
            return Err(bad());
        }
        out[free] = total / rest;
    }
    if product(&out)? == total { Ok(out) } else { Err(bad()) }
}
