//! Shapes: queries, reshaping, joining, cutting, padding, making tensors from shapes.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::graph::Node;
use crate::tensor::HostTensor;
use crate::torch::convert;
use crate::torch::exec::kernel::{Args, Kernel, Value, one};
use crate::torch::exec::registry::{MANY, Registry};
use crate::torch::ops::util;

pub fn register(r: &mut Registry) {
    r.add("Shape", 1, (1, 1), shape);
    r.add("Size", 1, (1, 1), |_| Ok(Kernel::new(|a| one(Tensor::from(a.shape(0)?.iter().product::<i64>()))).shapes()));
    r.add("Reshape", 1, (1, 2), reshape);
    r.add("Flatten", 1, (1, 1), |n| {
        let axis = n.attributes.int_or("axis", 1)?;
        Ok(Kernel::new(move |a| {
            let size = a.shape(0)?;
            let at = if axis == size.len() as i64 { axis } else { util::axis(axis, size.len())? } as usize;
            one(a.t(0)?.f_reshape([size[..at].iter().product::<i64>(), size[at..].iter().product()])?)
        }))
    });
    r.add("Squeeze", 1, (1, 2), squeeze);
    r.add("Unsqueeze", 1, (1, 2), unsqueeze);
    r.add("Transpose", 1, (1, 1), |n| {
        let perm = n.attributes.ints("perm")?;
        Ok(Kernel::new(move |a| {
            let x = a.t(0)?;
            let perm = match &perm {
                Some(p) if p.len() == x.dim() => util::axes(p, x.dim())?,
                Some(p) => return Err(Error::invalid(format!("attribute `perm` is {p:?} for rank {}", x.dim()))),
                None => (0..x.dim() as i64).rev().collect(),
            };
            one(x.f_permute(&perm[..])?)
        }))
    });
    r.add("Expand", 8, (2, 2), |_| {
        Ok(Kernel::new(|a| {
            let x = a.t(0)?;
            // ONNX broadcasts both ways: a 1 in the wanted shape keeps the input's size.
            let wanted = broadcast(&x.size(), &a.ints(1)?)?;
            util::affordable(&wanted)?;
            one(x.f_expand(&wanted[..], false)?)
        })
        .host(&[1]))
    });
    r.add("Tile", 6, (2, 2), |_| {
        Ok(Kernel::new(|a| {
            let (x, repeats) = (a.t(0)?, a.ints(1)?);
            let sizes: Vec<i64> = x.size().iter().zip(&repeats).map(|(d, r)| d.saturating_mul(*r)).collect();
            util::affordable(&sizes)?;
            one(x.f_repeat(&repeats[..])?)
        })
        .host(&[1]))
    });
    r.add("Concat", 1, (1, MANY), |n| {
        let axis = n.attributes.int("axis")?;
        let axis = match axis {
            Some(a) => a,
            None if n.opset < 4 => 1,
            None => return Err(Error::invalid("attribute `axis` is missing")),
        };
        Ok(Kernel::new(move |a| {
            let parts = (0..a.len()).map(|i| a.t(i)).collect::<Result<Vec<_>>>()?;
            parts[1..].iter().try_for_each(|p| util::alike(parts[0], p))?;
            one(Tensor::f_cat(&parts, util::axis(axis, parts[0].dim())?)?)
        }))
    });
    r.add("Split", 1, (1, 2), split);
    r.add("Slice", 1, (1, 5), slice);
    r.add("Pad", 1, (1, 4), pad);
    r.add("ConstantOfShape", 9, (1, 1), |n| {
        let value = n.attributes.tensor("value")?.unwrap_or_else(|| HostTensor::scalar(0f32));
        if value.len() != 1 {
            return Err(Error::invalid("attribute `value` must hold one element"));
        }
        let value = convert::to_torch(&value)?.f_reshape([0i64; 0])?;
        Ok(Kernel::new(move |a| {
            let shape = a.ints(0)?;
            util::affordable(&shape)?;
            one(value.f_to_device(a.device())?.f_expand(&shape[..], false)?.f_contiguous()?)
        })
        .host(&[0]))
    });
    r.add("Range", 11, (3, 3), range);
    r.add("EyeLike", 9, (1, 1), eye_like);
}

fn shape(node: &Node) -> Result<Kernel> {
    let start = node.attributes.int_or("start", 0)?;
    let end = node.attributes.int("end")?;
    Ok(Kernel::new(move |a| {
        let size = a.shape(0)?;
        let rank = size.len() as i64;
        let at = |v: i64| (if v < 0 { v + rank } else { v }).clamp(0, rank) as usize;
        let (start, end) = (at(start), at(end.unwrap_or(rank)));
        one(Tensor::f_from_slice(if start < end { &size[start..end] } else { &[] })?)
    })
    .shapes())
}

fn reshape(node: &Node) -> Result<Kernel> {
    let allow_zero = node.attributes.flag("allowzero", false)?;
    let fixed = node.attributes.ints("shape")?;
    node.attributes.get("consumed_inputs");
    let host: &[usize] = if fixed.is_some() { &[] } else { &[1] };
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let mut wanted = match &fixed {
            Some(s) => s.clone(),
            None => a.ints(1)?,
        };
        if !allow_zero {
            let size = x.size();
            for (i, d) in wanted.iter_mut().enumerate().filter(|(_, d)| **d == 0) {
                *d = *size.get(i).ok_or_else(|| Error::invalid("a 0 in the new shape has no dimension to copy"))?;
            }
        }
        one(x.f_reshape(&wanted[..])?)
    })
    .host(host))
}

/// Axes as an attribute (before opset 13) or as an input.
fn axes_of(a: &Args, fixed: &Option<Vec<i64>>) -> Result<Option<Vec<i64>>> {
    match fixed {
        Some(axes) => Ok(Some(axes.clone())),
        None => a.opt_ints(1),
    }
}

fn squeeze(node: &Node) -> Result<Kernel> {
    let fixed = node.attributes.ints("axes")?;
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let mut size = x.size();
        match axes_of(a, &fixed)? {
            None => size.retain(|&d| d != 1),
            Some(list) => {
                let list = util::axes(&list, x.dim())?;
                if let Some(&bad) = list.iter().find(|&&i| size[i as usize] != 1) {
                    return Err(Error::invalid(format!("axis {bad} has size {}, expected 1", size[bad as usize])));
                }
                let mut i = -1;
                size.retain(|_| {
                    i += 1;
                    !list.contains(&i)
                });
            }
        }
        one(x.f_reshape(&size[..])?)
    })
    .host(&[1]))
}

fn unsqueeze(node: &Node) -> Result<Kernel> {
    let fixed = node.attributes.ints("axes")?;
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let list = axes_of(a, &fixed)?.ok_or_else(|| Error::invalid("axes are missing"))?;
        let mut list = util::axes(&list, x.dim() + list.len())?;
        list.sort_unstable();
        let mut size = x.size();
        for i in list {
            size.insert(i as usize, 1);
        }
        one(x.f_reshape(&size[..])?)
    })
    .host(&[1]))
}

/// Numpy's broadcast of two shapes.
pub fn broadcast(x: &[i64], y: &[i64]) -> Result<Vec<i64>> {
    let rank = x.len().max(y.len());
    let at = |s: &[i64], i: usize| if i + s.len() >= rank { s[i + s.len() - rank] } else { 1 };
    (0..rank)
        .map(|i| match (at(x, i), at(y, i)) {
            (a, b) if a == b => Ok(a),
            (1, b) => Ok(b),
            (a, 1) => Ok(a),
            _ => Err(Error::invalid(format!("shapes {x:?} and {y:?} do not broadcast"))),
        })
        .collect()
}

fn split(node: &Node) -> Result<Kernel> {
    let axis = node.attributes.int_or("axis", 0)?;
    let fixed = node.attributes.ints("split")?;
    let outputs = node.outputs.len() as i64;
    let count = node.attributes.int_or("num_outputs", outputs)?;
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let axis = util::axis(axis, x.dim())?;
        let total = x.size()[axis as usize];
        let sizes = match axes_of(a, &fixed)? {
            Some(s) => s,
            None => {
                // The last part is smaller where the size does not divide.
                util::table_len(count)?;
                if count < 1 {
                    return Err(Error::invalid("a split into no parts"));
                }
                let part = (total + count - 1) / count;
                (0..count).map(|i| part.min((total - i * part).max(0))).collect()
            }
        };
        Ok(x.f_split_with_sizes(&sizes[..], axis)?.into_iter().map(Value::device).collect())
    })
    .host(&[1]))
}

fn slice(node: &Node) -> Result<Kernel> {
    let attribute = node.attributes.ints("starts")?.zip(node.attributes.ints("ends")?);
    let attribute_axes = node.attributes.ints("axes")?;
    if node.opset < 10 && attribute.is_none() {
        return Err(Error::invalid("attributes `starts` and `ends` are missing"));
    }
    Ok(Kernel::new(move |a| {
        let mut x = a.t(0)?.shallow_clone();
        let (starts, ends, axes, steps) = match &attribute {
            Some((s, e)) => (s.clone(), e.clone(), attribute_axes.clone(), None),
            None => (a.ints(1)?, a.ints(2)?, a.opt_ints(3)?, a.opt_ints(4)?),
        };
        let axes = axes.unwrap_or_else(|| (0..starts.len() as i64).collect());
        let steps = steps.unwrap_or_else(|| vec![1; starts.len()]);
        if ends.len() != starts.len() || axes.len() != starts.len() || steps.len() != starts.len() {
            return Err(Error::invalid("starts, ends, axes and steps differ in length"));
        }
        let axes = util::axes(&axes, x.dim())?;
        for (((&start, &end), axis), &step) in starts.iter().zip(&ends).zip(axes).zip(&steps) {
            x = slice_axis(&x, axis, start, end, step)?;
        }
        one(x)
    })
    .host(&[1, 2, 3, 4]))
}

/// ONNX clamps like numpy; libtorch has no negative step, so that the range is flipped instead.
fn slice_axis(x: &Tensor, axis: i64, start: i64, end: i64, step: i64) -> Result<Tensor> {
    let n = x.size()[axis as usize];
    let wrap = |v: i64| if v < 0 { v.saturating_add(n) } else { v };
    match step {
        0 => Err(Error::invalid("a step of 0")),
        1.. => {
            let (start, end) = (wrap(start).clamp(0, n), wrap(end).clamp(0, n));
            Ok(x.f_slice(axis, start, end.max(start), step)?)
        }
        _ if end == i64::from(i32::MAX) || end == i64::MAX => Err(Error::unsupported(
            "a negative step towards the largest integer: nothing by the specification, down to the first element in \
             ONNX Runtime",
        )
        .hint("end at the smallest integer to slice down to the first element")),
        _ => {
            if n == 0 {
                return Ok(x.shallow_clone());
            }
            // Unlike numpy's, a start before the first element is the first element.
            let start = wrap(start).clamp(0, n - 1);
            let end = if end < -n { -1 } else { wrap(end).clamp(-1, n - 1) };
            if start <= end {
                return Ok(x.f_slice(axis, 0, 0, 1)?);
            }
            let flipped = x.f_slice(axis, end + 1, start + 1, 1)?.f_flip([axis])?;
            Ok(if step == -1 { flipped } else { flipped.f_slice(axis, None, None, step.saturating_neg())? })
        }
    }
}

fn pad(node: &Node) -> Result<Kernel> {
    let mode = node.attributes.string_or("mode", "constant")?;
    let fixed = match node.attributes.ints("pads")? {
        None => node.attributes.ints("paddings")?,
        some => some,
    };
    let fixed_value = node.attributes.float_or("value", 0.0)?;
    if !matches!(mode.as_str(), "constant" | "reflect" | "edge" | "wrap") {
        return Err(Error::invalid(format!("attribute `mode` is `{mode}`")));
    }
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let rank = x.dim();
        let pads = match &fixed {
            Some(p) => p.clone(),
            None => a.ints(1)?,
        };
        let axes = match a.opt_ints(3)? {
            Some(list) => util::axes(&list, rank)?,
            None => (0..rank as i64).collect(),
        };
        if pads.len() != 2 * axes.len() {
            return Err(Error::invalid(format!("{} pads for {} axes", pads.len(), axes.len())));
        }
        // Far from where sums overflow; what is left over is too large, or crops more than there is.
        if pads.iter().any(|p| p.unsigned_abs() > 1 << 40) {
            return Err(Error::invalid(format!(
                "pads {pads:?}: the result is larger than memory, or less than nothing"
            ))
            .hint("the amounts are damaged, or computed from inputs of other sizes than the network is made for"));
        }
        let mut padded = x.size();
        for (i, &axis) in axes.iter().enumerate() {
            let d = &mut padded[axis as usize];
            *d = d.saturating_add(pads[i]).saturating_add(pads[axes.len() + i]).max(0);
        }
        util::affordable(&padded)?;
        let amounts: Vec<(i64, i64, i64)> =
            axes.iter().enumerate().map(|(i, &axis)| (axis, pads[i], pads[axes.len() + i])).collect();
        if mode == "constant" {
            let value = if a.has(2) { a.scalar(2)? } else { fixed_value };
            let mut list = vec![0i64; 2 * rank];
            for (axis, begin, end) in amounts {
                let at = 2 * (rank - 1 - axis as usize);
                (list[at], list[at + 1]) = (begin, end);
            }
            let y = if x.kind() == Kind::Bool { x.f_to_kind(Kind::Uint8)? } else { x.shallow_clone() };
            // Where more is cut off than there is, it comes off the padding of the other end.
            let deep = |pair: (usize, &[i64])| {
                let cut = -pair.1.iter().map(|&p| p.min(0)).sum::<i64>();
                cut > x.size().get(rank - 1 - pair.0).copied().unwrap_or(0)
            };
            let y = if list.chunks_exact(2).enumerate().any(deep) {
                let part = |f: fn(i64) -> i64| list.iter().map(|&p| f(p)).collect::<Vec<i64>>();
                y.f_pad(&part(|p| p.max(0))[..], "constant", value)?.f_pad(
                    &part(|p| p.min(0))[..],
                    "constant",
                    value,
                )?
            } else {
                y.f_pad(&list[..], "constant", value)?
            };
            return one(y.f_to_kind(x.kind())?);
        }
        let mut y = x.shallow_clone();
        if mode == "wrap" && amounts.iter().any(|&(_, b, e)| b < 0 || e < 0) {
            return Err(Error::unsupported("Pad in mode wrap with negative amounts: implementations disagree")
                .hint("crop with Slice before"));
        }
        for (axis, begin, end) in amounts.into_iter().filter(|&(_, b, e)| b != 0 || e != 0) {
            let n = y.size()[axis as usize];
            util::table_len(n.saturating_add(begin).saturating_add(end))?;
            if n == 0 {
                return Err(Error::invalid(format!("padding of an empty axis in mode `{mode}`")));
            }
            let index: Vec<i64> = (-begin..n + end)
                .map(|i| match mode.as_str() {
                    "edge" => i.clamp(0, n - 1),
                    "wrap" => i.rem_euclid(n),
                    _ => {
                        let period = (2 * (n - 1)).max(1);
                        let k = i.rem_euclid(period);
                        if k < n { k } else { period - k }
                    }
                })
                .collect();
            let index = Tensor::f_from_slice(&index)?.f_to_device(y.device())?;
            y = y.f_index_select(axis, &index)?;
        }
        one(y)
    })
    .host(&[1, 2, 3]))
}

fn range(_: &Node) -> Result<Kernel> {
    Ok(Kernel::new(|a| {
        let kind = a.kind(0)?;
        let (start, limit, step) = (a.scalar(0)?, a.scalar(1)?, a.scalar(2)?);
        if step == 0.0 {
            return Err(Error::invalid("a step of 0"));
        }
        let n = ((limit - start) / step).ceil().max(0.0) as i64;
        util::affordable(&[n])?;
        let steps = Tensor::f_arange(n, (Kind::Double, a.device()))?;
        one(steps.f_mul_scalar(step)?.f_add_scalar(start)?.f_to_kind(kind)?)
    })
    .host(&[0, 1, 2]))
}

fn eye_like(node: &Node) -> Result<Kernel> {
    let k = node.attributes.int_or("k", 0)?;
    let to = node.attributes.int("dtype")?;
    let kind = to.map(|c| crate::tensor::DType::from_onnx(c as i32).map(convert::kind)).transpose()?;
    Ok(Kernel::new(move |a| {
        let size = a.shape(0)?;
        if size.len() != 2 {
            return Err(Error::invalid(format!("input of rank {}, expected 2", size.len())));
        }
        let kind = kind.map_or_else(|| a.kind(0), Ok)?;
        let ones = Tensor::f_ones(&size[..], (Kind::Float, a.device()))?;
        one(ones.f_triu(k)?.f_tril(k)?.f_to_kind(kind)?)
    })
    .shapes())
}
