//! Activations and softmax.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::graph::Node;
use crate::torch::cpu::activation::gelu;
use crate::torch::exec::kernel::{Kernel, Value, one};
use crate::torch::exec::registry::Registry;
use crate::torch::ops::util;

/// `x sigmoid(alpha x)`.
fn swish(x: &Tensor, alpha: f64) -> Result<Tensor> {
    Ok(if alpha == 1.0 { x.f_silu()? } else { x.f_mul(&x.f_mul_scalar(alpha)?.f_sigmoid()?)? })
}

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
        Ok(Kernel::new(move |a| one(gelu(a.t(0)?, &approximate)?)))
    });
    r.add("Mish", 18, (1, 1), |_| Ok(Kernel::new(|a| one(a.t(0)?.f_mish()?))));
    r.add("Swish", 24, (1, 1), |n| {
        let alpha = n.attributes.float_or("alpha", 1.0)?;
        Ok(Kernel::new(move |a| one(swish(a.t(0)?, alpha)?)))
    });
    r.add("SwiGLU", 28, (2, 2), |n| {
        let alpha = n.attributes.float_or("alpha", 1.0)?;
        Ok(Kernel::new(move |a| {
            let (gate, value) = (a.t(0)?, a.t(1)?);
            if gate.size() != value.size() {
                let shapes = format!("a gate of shape {:?} for a value of shape {:?}", gate.size(), value.size());
                return Err(Error::invalid(shapes).hint("SwiGLU does not broadcast: its inputs have one shape"));
            }
            one(swish(gate, alpha)?.f_mul(value)?)
        }))
    });
    r.add("HardSigmoid", 1, (1, 1), |n| {
        let alpha = n.attributes.float_or("alpha", 0.2)?;
        let beta = n.attributes.float_or("beta", 0.5)?;
        n.attributes.get("consumed_inputs");
        Ok(Kernel::new(move |a| one(a.t(0)?.f_mul_scalar(alpha)?.f_add_scalar(beta)?.f_clamp(0.0, 1.0)?)))
    });
    r.add("HardSwish", 14, (1, 1), |_| Ok(Kernel::new(|a| one(a.t(0)?.f_hardswish()?))));
    r.add("PRelu", 1, (2, 2), |n| {
        // Before opset 7 the slope was one number or one a channel, whatever the rank.
        let per_channel = n.opset < 7;
        n.attributes.get("consumed_inputs");
        Ok(Kernel::new(move |a| {
            let (x, slope) = (a.t(0)?, a.t(1)?);
            let slope = if per_channel { util::per_channel(slope, x.dim())? } else { slope.shallow_clone() };
            one(x.f_where_self(&x.f_ge(0.0)?, &x.f_mul(&slope)?)?)
        }))
    });
    r.add("Celu", 12, (1, 1), |n| {
        let alpha = n.attributes.float_or("alpha", 1.0)?;
        Ok(Kernel::new(move |a| {
            let x = a.t(0)?;
            let negative = x.f_clamp_max(0.0)?.f_div_scalar(alpha)?.f_expm1()?.f_mul_scalar(alpha)?;
            one(x.f_clamp_min(0.0)?.f_add(&negative)?)
        }))
    });
    r.add("Selu", 1, (1, 1), |n| {
        let alpha = n.attributes.float_or("alpha", 1.673_263_192_176_818_8)?;
        let gamma = n.attributes.float_or("gamma", 1.050_701_022_148_132_3)?;
        n.attributes.get("consumed_inputs");
        Ok(Kernel::new(move |a| {
            let x = a.t(0)?;
            let negative = x.f_clamp_max(0.0)?.f_expm1()?.f_mul_scalar(alpha)?;
            one(x.f_clamp_min(0.0)?.f_add(&negative)?.f_mul_scalar(gamma)?)
        }))
    });
    r.add("ThresholdedRelu", 1, (1, 1), |n| {
        let alpha = n.attributes.float_or("alpha", 1.0)?;
        Ok(Kernel::new(move |a| {
            let x = a.t(0)?;
            one(x.f_where_self(&x.f_gt(alpha)?, &x.f_zeros_like()?)?)
        }))
    });
    r.add("Shrink", 9, (1, 1), |n| {
        let lambd = n.attributes.float_or("lambd", 0.5)?;
        let bias = n.attributes.float_or("bias", 0.0)?;
        Ok(Kernel::new(move |a| {
            let x = a.t(0)?;
            let low = x.f_add_scalar(bias)?.f_where_self(&x.f_lt(-lambd)?, &x.f_zeros_like()?)?;
            one(x.f_sub_scalar(bias)?.f_where_self(&x.f_gt(lambd)?, &low)?.f_to_kind(x.kind())?)
        }))
    });
    r.add("Dropout", 1, (1, 3), dropout);
    r.add("Bernoulli", 15, (1, 1), |_| Err(random("Bernoulli")));
    r.add("RandomNormal", 1, (0, 0), |_| Err(random("RandomNormal")));
    r.add("RandomNormalLike", 1, (1, 1), |_| Err(random("RandomNormalLike")));
    r.add("RandomUniform", 1, (0, 0), |_| Err(random("RandomUniform")));
    r.add("RandomUniformLike", 1, (1, 1), |_| Err(random("RandomUniformLike")));
    r.add("Multinomial", 7, (1, 1), |_| Err(random("Multinomial")));
    r.add("Hardmax", 1, (1, 1), |n| {
        softmax(n, |x, axis| {
            let first = util::extreme_index(x, axis, false, false, true)?;
            Ok(x.f_zeros_like()?.f_scatter_value(axis, &first, 1)?)
        })
    });
    r.add("Softmax", 1, (1, 1), |n| softmax(n, |x, axis| Ok(x.f_softmax(axis, None)?)));
    r.add("LogSoftmax", 1, (1, 1), |n| softmax(n, |x, axis| Ok(x.f_log_softmax(axis, None)?)));
}

/// The identity, and a mask of ones: dropout in a network that is not being trained.
fn dropout(node: &Node) -> Result<Kernel> {
    node.attributes.get("seed");
    node.attributes.get("consumed_inputs");
    node.attributes.get("ratio");
    if node.opset < 7 && !node.attributes.flag("is_test", false)? {
        return Err(random("Dropout in training mode"));
    }
    let float_mask = node.opset < 10;
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let training = a.has(2) && a.scalar(2)? != 0.0;
        if training && (!a.has(1) || a.scalar(1)? != 0.0) {
            return Err(random("Dropout in training mode"));
        }
        let kind = if float_mask { x.kind() } else { Kind::Bool };
        let mask = Tensor::f_ones(&x.size()[..], (kind, a.device()))?;
        Ok(vec![a.value(0)?.clone(), Value::device(mask)])
    })
    .host(&[1, 2]))
}

/// What draws random numbers inside a graph has no value that could be compared or distilled.
pub fn random(what: &str) -> Error {
    Error::unsupported(format!("{what} draws random numbers inside the graph"))
        .hint("export the network in evaluation mode (model.eval()), with noise as a graph input")
}

/// Until opset 12 softmax ran over all axes from `axis` on, flattened; since 13 over one axis.
fn softmax(node: &Node, f: fn(&Tensor, i64) -> Result<Tensor>) -> Result<Kernel> {
    let flattened = node.opset < 13;
    let axis = node.attributes.int_or("axis", if flattened { 1 } else { -1 })?;
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let axis = util::axis(axis, x.dim())?;
        if flattened && axis != x.dim() as i64 - 1 {
            let size = x.size();
            let rows: i64 = size[..axis as usize].iter().product();
            let flat = x.f_reshape([rows, -1])?;
            return one(f(&flat, 1)?.f_reshape(&size[..])?);
        }
        one(f(x, axis)?)
    }))
}
