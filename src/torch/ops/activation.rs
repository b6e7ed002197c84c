//! Activations and softmax.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::graph::Node;
use crate::torch::kernel::{Kernel, one};
use crate::torch::ops::util;
use crate::torch::registry::Registry;

pub fn register(r: &mut Registry) {
    r.add("Relu", 1, (1, 1), |n| {
        n.attributes.get("consumed_inputs");
        Ok(Kernel::new(|a| one(a.t(0)?.f_relu()?)))
    });
    r.add("Sigmoid", 1, (1, 1), |n| {
        n.attributes.get("consumed_inputs");
        Ok(Kernel::new(|a| one(a.t(0)?.f_sigmoid()?)))
    });
    r.add("Tanh", 1, (1, 1), |n| {
        n.attributes.get("consumed_inputs");
        Ok(Kernel::new(|a| one(a.t(0)?.f_tanh()?)))
    });
    r.add("Softplus", 1, (1, 1), |_| Ok(Kernel::new(|a| one(a.t(0)?.f_softplus()?))));
    r.add("Softsign", 1, (1, 1), |_| {
        Ok(Kernel::new(|a| {
            let x = a.t(0)?;
            one(x.f_div(&x.f_abs()?.f_add_scalar(1.0)?)?)
        }))
    });
    r.add("LeakyRelu", 1, (1, 1), |n| {
        let alpha = n.attributes.float_or("alpha", 0.01)?;
        n.attributes.get("consumed_inputs");
        Ok(Kernel::new(move |a| {
            let x = a.t(0)?;
            one(x.f_where_self(&x.f_ge(0.0)?, &x.f_mul_scalar(alpha)?)?)
        }))
    });
    r.add("Elu", 1, (1, 1), |n| {
        let alpha = n.attributes.float_or("alpha", 1.0)?;
        n.attributes.get("consumed_inputs");
        Ok(Kernel::new(move |a| {
            let x = a.t(0)?;
            let negative = x.f_clamp_max(0.0)?.f_expm1()?.f_mul_scalar(alpha)?;
            one(x.f_clamp_min(0.0)?.f_add(&negative)?)
        }))
    });
    r.add("Gelu", 20, (1, 1), |n| {
        let approximate = n.attributes.string_or("approximate", "none")?;
        if approximate != "none" && approximate != "tanh" {
            return Err(Error::invalid(format!("attribute `approximate` is `{approximate}`, expected none or tanh")));
        }
        Ok(Kernel::new(move |a| one(a.t(0)?.f_gelu(&approximate)?)))
    });
    r.add("Mish", 18, (1, 1), |_| Ok(Kernel::new(|a| one(a.t(0)?.f_mish()?))));
    r.add("Swish", 24, (1, 1), |n| {
        let alpha = n.attributes.float_or("alpha", 1.0)?;
        Ok(Kernel::new(move |a| {
            let x = a.t(0)?;
            if alpha == 1.0 { one(x.f_silu()?) } else { one(x.f_mul(&x.f_mul_scalar(alpha)?.f_sigmoid()?)?) }
        }))
    });
    r.add("HardSigmoid", 1, (1, 1), |n| {
        let alpha = n.attributes.float_or("alpha", 0.2)?;
        let beta = n.attributes.float_or("beta", 0.5)?;
        n.attributes.get("consumed_inputs");
        Ok(Kernel::new(move |a| one(a.t(0)?.f_mul_scalar(alpha)?.f_add_scalar(beta)?.f_clamp(0.0, 1.0)?)))
    });
    r.add("HardSwish", 14, (1, 1), |_| Ok(Kernel::new(|a| one(a.t(0)?.f_hardswish()?))));
    r.add("PRelu", 7, (2, 2), |_| {
        Ok(Kernel::new(|a| {
            let (x, slope) = (a.t(0)?, a.t(1)?);
            one(x.f_where_self(&x.f_ge(0.0)?, &x.f_mul(slope)?)?)
        }))
    });
    r.add("Softmax", 1, (1, 1), |n| softmax(n, |x, axis, kind| x.f_softmax(axis, kind)));
    r.add("LogSoftmax", 1, (1, 1), |n| softmax(n, |x, axis, kind| x.f_log_softmax(axis, kind)));
}

/// Until opset 12 softmax ran over all axes from `axis` on, flattened; since 13 over one axis.
fn softmax(node: &Node, f: fn(&Tensor, i64, Option<Kind>) -> Result<Tensor, tch::TchError>) -> Result<Kernel> {
    let flattened = node.opset < 13;
    let axis = node.attributes.int_or("axis", if flattened { 1 } else { -1 })?;
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let axis = util::axis(axis, x.dim())?;
        if flattened && axis != x.dim() as i64 - 1 {
            let size = x.size();
            let rows: i64 = size[..axis as usize].iter().product();
            let flat = x.f_reshape([rows, -1])?;
            return one(f(&flat, 1, None)?.f_reshape(&size[..])?);
        }
        one(f(x, axis, None)?)
    }))
}
