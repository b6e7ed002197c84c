//! Normalisation. Statistics in f32 at least.

use tch::Tensor;

use crate::error::{Error, Result};
use crate::graph::Node;
use crate::torch::exec::kernel::{Kernel, Value, one};
use crate::torch::exec::registry::Registry;
use crate::torch::ops::util;

pub fn register(r: &mut Registry) {
    r.add("InstanceNormalization", 1, (3, 3), instance_norm);
    r.add("GroupNormalization", 18, (3, 3), group_norm);
    r.add("LayerNormalization", 17, (2, 3), layer_norm);
    r.add("RMSNormalization", 23, (2, 2), rms_norm);
    r.add("BatchNormalization", 1, (5, 5), batch_norm);
    r.add("LRN", 1, (1, 1), local_response_norm);
    r.add("MeanVarianceNormalization", 9, (1, 1), mean_variance_norm);
    r.add("LpNormalization", 1, (1, 1), lp_norm);
}

fn instance_norm(node: &Node) -> Result<Kernel> {
    let eps = node.attributes.float_or("epsilon", 1e-5)?;
    node.attributes.get("consumed_inputs");
    Ok(Kernel::new(move |a| {
        let (x, scale, bias) = (a.t(0)?, a.t(1)?, a.t(2)?);
        let channels = *x.size().get(1).ok_or_else(|| Error::invalid("input of rank below 2"))?;
        // Instance norm is group norm with one channel a group; libtorch's group norm is the faster of its two. It computes
        // x * a + b, which loses digits where a channel of an image lies far from zero: its mean is taken off first, which
        // changes neither value nor gradient.
        if x.dim() > 3 {
            let sides: Vec<i64> = (2..x.dim() as i64).collect();
            let mean = tch::no_grad(|| x.f_mean_dim(&sides[..], true, x.kind()))?;
            return one(x.f_sub(&mean)?.f_group_norm(channels, Some(scale), Some(bias), eps, true)?);
        }
        one(x.f_group_norm(channels, Some(scale), Some(bias), eps, true)?)
    }))
}

/// Scale and bias a channel since opset 21; a group at opset 18 (a mistake of the specification, since withdrawn).
fn group_norm(node: &Node) -> Result<Kernel> {
    let eps = node.attributes.float_or("epsilon", 1e-5)?;
    let groups =
        node.attributes.int("num_groups")?.ok_or_else(|| Error::invalid("attribute `num_groups` is missing"))?;
    node.attributes.get("stash_type");
    let per_group = node.opset < 21;
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let channels = *x.size().get(1).ok_or_else(|| Error::invalid("input of rank below 2"))?;
        if groups < 1 || channels % groups != 0 {
            return Err(Error::invalid(format!("{channels} channels in {groups} groups")));
        }
        let spread = |v: &Tensor| -> Result<Tensor> {
            if per_group && v.size() == [groups] && groups != channels {
                Ok(v.f_repeat_interleave_self_int(channels / groups, 0, channels)?)
            } else {
                Ok(v.shallow_clone())
            }
        };
        let (scale, bias) = (spread(a.t(1)?)?, spread(a.t(2)?)?);
        one(x.f_group_norm(groups, Some(&scale), Some(&bias), eps, true)?)
    }))
}

fn layer_norm(node: &Node) -> Result<Kernel> {
    let eps = node.attributes.float_or("epsilon", 1e-5)?;
    let axis = node.attributes.int_or("axis", -1)?;
    node.attributes.get("stash_type");
    let statistics = node.outputs.iter().skip(1).any(Option::is_some);
    Ok(Kernel::new(move |a| {
        let (x, scale) = (a.t(0)?, a.t(1)?);
        let axis = util::axis(axis, x.dim())? as usize;
        let shape = x.size()[axis..].to_vec();
        let bias = a.opt(2)?;
        let fits = |t: &Tensor| t.size() == shape;
        let fused = fits(scale) && bias.is_none_or(fits);
        let y = if fused {
            x.f_layer_norm(&shape[..], Some(scale), bias, eps, true)?
        } else {
            // Scale and bias may be any shape that broadcasts.
            let y = x.f_layer_norm(&shape[..], None::<&Tensor>, None, eps, true)?.f_mul(scale)?;
            bias.map_or(Ok(y.shallow_clone()), |b| y.f_add(b))?
        };
        if !statistics {
            return one(y);
        }
        let (wide, _) = util::widened(x)?;
        let axes: Vec<i64> = (axis as i64..x.dim() as i64).collect();
        let mean = wide.f_mean_dim(&axes[..], true, None)?;
        let var = wide.f_sub(&mean)?.f_square()?.f_mean_dim(&axes[..], true, None)?;
        Ok(vec![Value::device(y), Value::device(mean), Value::device(var.f_add_scalar(eps)?.f_rsqrt()?)])
    }))
}

pub fn rms_norm(node: &Node) -> Result<Kernel> {
    let eps = node.attributes.float_or("epsilon", 1e-5)?;
    let axis = node.attributes.int_or("axis", -1)?;
    node.attributes.get("stash_type");
    Ok(Kernel::new(move |a| {
        let (x, scale) = (a.t(0)?, a.t(1)?);
        let axis = util::axis(axis, x.dim())?;
        let shape = &x.size()[axis as usize..];
        if scale.size() == shape && scale.kind() == x.kind() {
            return one(x.f_rms_norm(shape, Some(scale), eps)?);
        }
        let (wide, kind) = util::widened(x)?;
        let axes: Vec<i64> = (axis..x.dim() as i64).collect();
        let inverse = wide.f_square()?.f_mean_dim(&axes[..], true, None)?.f_add_scalar(eps)?.f_rsqrt()?;
        one(wide.f_mul(&inverse)?.f_to_kind(kind)?.f_mul(scale)?)
    }))
}

/// With the statistics of inference. Training mode (batch statistics, running ones as outputs) only where the graph asks
/// for it, which `model.eval()` exports never do.
fn batch_norm(node: &Node) -> Result<Kernel> {
    let eps = node.attributes.float_or("epsilon", 1e-5)?;
    let momentum = node.attributes.float_or("momentum", 0.9)?;
    node.attributes.get("consumed_inputs");
    let spatial = node.attributes.flag("spatial", true)?;
    let training = node.attributes.flag("training_mode", false)?;
    // Until opset 6 `is_test` = 0 meant training.
    let is_test = node.opset >= 7 || node.attributes.flag("is_test", false)?;
    if !is_test || (!training && node.outputs.iter().skip(1).any(Option::is_some)) {
        return Err(Error::unsupported("BatchNormalization in training mode before opset 14")
            .hint("export the network in evaluation mode (model.eval())"));
    }
    if !spatial {
        return Err(Error::unsupported("BatchNormalization with spatial = 0"));
    }
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let learnt = a.t(3)?.requires_grad() || a.t(4)?.requires_grad();
        if !training && learnt {
            // libtorch's kernel has no gradient for the statistics.
            let inverse = a.t(4)?.f_add_scalar(eps)?.f_rsqrt()?.f_mul(a.t(1)?)?;
            let centred = x.f_sub(&util::per_channel(a.t(3)?, x.dim())?)?;
            let y = centred.f_mul(&util::per_channel(&inverse, x.dim())?)?;
            return one(y.f_add(&util::per_channel(a.t(2)?, x.dim())?)?);
        }
        if !training {
            return one(x.f_batch_norm(a.opt(1)?, a.opt(2)?, a.opt(3)?, a.opt(4)?, false, 0.0, eps, true)?);
        }
        let axes: Vec<i64> = (0..x.dim() as i64).filter(|&i| i != 1).collect();
        let mean = x.f_mean_dim(&axes[..], false, None)?;
        let centred = x.f_sub(&util::per_channel(&mean, x.dim())?)?;
        let var = centred.f_square()?.f_mean_dim(&axes[..], false, None)?;
        let inverse = var.f_add_scalar(eps)?.f_rsqrt()?.f_mul(a.t(1)?)?;
        let y = centred.f_mul(&util::per_channel(&inverse, x.dim())?)?.f_add(&util::per_channel(a.t(2)?, x.dim())?)?;
        let running = |old: &Tensor, new: &Tensor| {
            old.f_mul_scalar(momentum)?.f_add(&new.f_to_kind(old.kind())?.f_mul_scalar(1.0 - momentum)?)
        };
        let (mean, var) = (running(a.t(3)?, &mean)?, running(a.t(4)?, &var)?);
        Ok([y, mean, var].map(Value::device).to_vec())
    }))
}

/// x / (bias + alpha / size * sum of squares over `size` neighbouring channels)^beta
fn local_response_norm(node: &Node) -> Result<Kernel> {
    let alpha = node.attributes.float_or("alpha", 1e-4)?;
    let beta = node.attributes.float_or("beta", 0.75)?;
    let bias = node.attributes.float_or("bias", 1.0)?;
    let size = node.attributes.int("size")?.filter(|&n| n > 0);
    let size = size.ok_or_else(|| Error::invalid("attribute `size` is missing or not positive"))?;
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let rank = x.dim();
        if rank < 2 {
            return Err(Error::invalid("input of rank below 2"));
        }
        let mut pads = vec![0i64; 2 * rank];
        let channel = 2 * (rank - 2);
        (pads[channel], pads[channel + 1]) = ((size - 1) / 2, size / 2);
        let windows = x.f_square()?.f_pad(&pads[..], "constant", 0.0)?.f_unfold(1, size, 1)?;
        let sum = windows.f_sum_dim_intlist([-1i64].as_slice(), false, x.kind())?;
        one(x.f_div(&sum.f_mul_scalar(alpha / size as f64)?.f_add_scalar(bias)?.f_pow_tensor_scalar(beta)?)?)
    }))
}

/// (x - mean) / (standard deviation + 1e-9)
fn mean_variance_norm(node: &Node) -> Result<Kernel> {
    let axes = node.attributes.ints("axes")?.unwrap_or_else(|| vec![0, 2, 3]);
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let axes = util::axes(&axes, x.dim())?;
        let centred = x.f_sub(&x.f_mean_dim(&axes[..], true, None)?)?;
        let deviation = centred.f_square()?.f_mean_dim(&axes[..], true, None)?.f_sqrt()?.f_add_scalar(1e-9)?;
        one(centred.f_div(&deviation)?)
    }))
}

/// x / norm, and zero where the norm is.
fn lp_norm(node: &Node) -> Result<Kernel> {
    let axis = node.attributes.int_or("axis", -1)?;
    let p = node.attributes.int_or("p", 2)?;
    if p != 1 && p != 2 {
        return Err(Error::invalid(format!("attribute `p` is {p}, expected 1 or 2")));
    }
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let axis = [util::axis(axis, x.dim())?];
        let norm = if p == 1 {
            x.f_abs()?.f_sum_dim_intlist(axis.as_slice(), true, x.kind())?
        } else {
            x.f_square()?.f_sum_dim_intlist(axis.as_slice(), true, x.kind())?.f_sqrt()?
        };
        one(x.f_div(&norm.f_masked_fill(&norm.f_eq(0.0)?, 1.0)?)?)
    }))
}
