//! Element by element: arithmetic, comparison, logic, mathematics, casts, selection.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::graph::Node;
use crate::tensor::DType;
use crate::torch::convert;
use crate::torch::convert::is_float;
use crate::torch::exec::kernel::{Args, Kernel, Value, one};
use crate::torch::exec::registry::{MANY, Registry};
use crate::torch::ops::util;

type Unary = fn(&Tensor) -> Result<Tensor, tch::TchError>;
type Binary = fn(&Tensor, &Tensor) -> Result<Tensor, tch::TchError>;

fn unary(f: Unary) -> Kernel {
    Kernel::new(move |a| one(f(a.t(0)?)?))
}

fn binary(f: Binary) -> Kernel {
    Kernel::new(move |a| {
        let (x, y) = (a.t(0)?, a.t(1)?);
        util::alike(x, y)?;
        one(f(x, y)?)
    })
}

/// Before opset 7 broadcasting was asked for by attribute, with an axis where the second operand starts.
fn legacy_broadcast(node: &Node, f: Binary) -> Result<Kernel> {
    if node.opset >= 7 {
        return Ok(binary(f));
    }
    let broadcast = node.attributes.flag("broadcast", false)?;
    let axis = node.attributes.int("axis")?;
    node.attributes.get("consumed_inputs");
    Ok(Kernel::new(move |a| {
        let (x, y) = (a.t(0)?, a.t(1)?);
        util::alike(x, y)?;
        match (broadcast, axis) {
            (true, Some(axis)) => {
                let axis = util::axis(axis, x.dim())? as usize;
                let mut shape = y.size();
                let tail = x.dim().saturating_sub(axis + shape.len());
                shape.extend(std::iter::repeat_n(1, tail));
                one(f(x, &y.f_reshape(&shape[..])?)?)
            }
            _ => one(f(x, y)?),
        }
    }))
}

pub fn register(r: &mut Registry) {
    r.add("Add", 1, (2, 2), |n| legacy_broadcast(n, |x, y| x.f_add(y)));
    r.add("Sub", 1, (2, 2), |n| legacy_broadcast(n, |x, y| x.f_sub(y)));
    r.add("Mul", 1, (2, 2), |n| legacy_broadcast(n, |x, y| x.f_mul(y)));
    r.add("Div", 1, (2, 2), |n| {
        // Integers divide towards zero in ONNX, as in C.
        legacy_broadcast(
            n,
            |x, y| if util::is_integer(x.kind()) { x.f_divide_tensor_mode(y, "trunc") } else { x.f_div(y) },
        )
    });
    r.add("Pow", 1, (2, 2), pow);
    r.add("Mod", 10, (2, 2), |n| {
        let c_style = n.attributes.flag("fmod", false)?;
        Ok(binary(if c_style { |x, y| x.f_fmod_tensor(y) } else { |x, y| x.f_remainder_tensor(y) }))
    });
    r.add("And", 1, (2, 2), |n| legacy_broadcast(n, |x, y| x.f_logical_and(y)));
    r.add("Or", 1, (2, 2), |n| legacy_broadcast(n, |x, y| x.f_logical_or(y)));
    r.add("Xor", 1, (2, 2), |n| legacy_broadcast(n, |x, y| x.f_logical_xor(y)));
    r.add("Not", 1, (1, 1), |_| Ok(unary(|x| x.f_logical_not())));
    r.add("Equal", 1, (2, 2), |n| legacy_broadcast(n, |x, y| x.f_eq_tensor(y)));
    r.add("Less", 1, (2, 2), |n| legacy_broadcast(n, |x, y| x.f_lt_tensor(y)));
    r.add("Greater", 1, (2, 2), |n| legacy_broadcast(n, |x, y| x.f_gt_tensor(y)));
    r.add("LessOrEqual", 12, (2, 2), |_| Ok(binary(|x, y| x.f_le_tensor(y))));
    r.add("GreaterOrEqual", 12, (2, 2), |_| Ok(binary(|x, y| x.f_ge_tensor(y))));

    r.add("Neg", 1, (1, 1), |_| Ok(unary(|x| x.f_neg())));
    r.add("Abs", 1, (1, 1), |_| Ok(unary(|x| x.f_abs())));
    r.add("Reciprocal", 1, (1, 1), |_| Ok(unary(|x| x.f_reciprocal())));
    r.add("Sqrt", 1, (1, 1), |_| Ok(unary(|x| x.f_sqrt())));
    r.add("Exp", 1, (1, 1), |_| Ok(unary(|x| x.f_exp())));
    r.add("Log", 1, (1, 1), |_| Ok(unary(|x| x.f_log())));
    r.add("Sin", 7, (1, 1), |_| Ok(unary(|x| x.f_sin())));
    r.add("Cos", 7, (1, 1), |_| Ok(unary(|x| x.f_cos())));
    r.add("Tan", 7, (1, 1), |_| Ok(unary(|x| x.f_tan())));
    r.add("Asin", 7, (1, 1), |_| Ok(unary(|x| x.f_asin())));
    r.add("Acos", 7, (1, 1), |_| Ok(unary(|x| x.f_acos())));
    r.add("Atan", 7, (1, 1), |_| Ok(unary(|x| x.f_atan())));
    r.add("Sinh", 9, (1, 1), |_| Ok(unary(|x| x.f_sinh())));
    r.add("Cosh", 9, (1, 1), |_| Ok(unary(|x| x.f_cosh())));
    r.add("Asinh", 9, (1, 1), |_| Ok(unary(|x| x.f_asinh())));
    r.add("Acosh", 9, (1, 1), |_| Ok(unary(|x| x.f_acosh())));
    r.add("Atanh", 9, (1, 1), |_| Ok(unary(|x| x.f_atanh())));
    r.add("Erf", 9, (1, 1), |_| Ok(unary(|x| x.f_erf())));
    // TensorFlow's 1 - erf, which tf2onnx leaves in the file under this name.
    r.add("Erfc", 1, (1, 1), |_| Ok(unary(|x| x.f_erfc())));
    r.add("Floor", 1, (1, 1), |_| Ok(unary(|x| x.f_floor())));
    r.add("Ceil", 1, (1, 1), |_| Ok(unary(|x| x.f_ceil())));
    // Both round halves to even.
    r.add("Round", 11, (1, 1), |_| Ok(unary(|x| x.f_round())));
    r.add("Sign", 9, (1, 1), |_| Ok(unary(|x| x.f_sign())));
    r.add("IsNaN", 9, (1, 1), |_| Ok(unary(|x| x.f_isnan())));
    r.add("IsInf", 10, (1, 1), is_inf);
    r.add("Identity", 1, (1, 1), |_| Ok(Kernel::new(|a| Ok(vec![a.value(0)?.clone()]))));

    r.add("Max", 1, (1, MANY), |n| variadic(n, |x, y| x.f_maximum(y)));
    r.add("Min", 1, (1, MANY), |n| variadic(n, |x, y| x.f_minimum(y)));
    r.add("Sum", 1, (1, MANY), |n| variadic(n, |x, y| x.f_add(y)));
    r.add("Mean", 1, (1, MANY), |n| {
        n.attributes.get("consumed_inputs");
        Ok(Kernel::new(|a| one(fold(a, |x, y| x.f_add(y))?.f_div_scalar(a.len() as f64)?)))
    });
    r.add("Where", 9, (3, 3), |_| {
        Ok(Kernel::new(|a| {
            util::alike(a.t(1)?, a.t(2)?)?;
            one(a.t(1)?.f_where_self(a.t(0)?, a.t(2)?)?)
        }))
    });
    r.add("Clip", 1, (1, 3), clip);
    r.add("Cast", 6, (1, 1), cast);
    r.add("CastLike", 15, (2, 2), |n| {
        n.attributes.get("saturate");
        n.attributes.get("round_mode");
        Ok(Kernel::new(|a| one(convert_kind(a.t(0)?, a.kind(1)?)?)))
    });
}

/// Exports write x^2, x^3 and x^0.5 with a constant exponent, for which libtorch has kernels of their own.
fn pow(node: &Node) -> Result<Kernel> {
    if node.opset < 7 {
        return legacy_broadcast(node, |x, y| x.f_pow(y));
    }
    Ok(Kernel::new(|a| {
        let x = a.t(0)?;
        let rank = a.shape(1)?.len();
        if is_float(x.kind()) && rank <= x.dim() && a.value(1)?.is_host() && a.shape(1)?.iter().product::<i64>() == 1 {
            return one(x.f_pow_tensor_scalar(a.scalar(1)?)?);
        }
        one(x.f_pow(a.t(1)?)?.f_to_kind(x.kind())?)
    }))
}

fn fold(a: &Args, f: Binary) -> Result<Tensor> {
    let mut acc = a.t(0)?.shallow_clone();
    for i in 1..a.len() {
        util::alike(&acc, a.t(i)?)?;
        acc = f(&acc, a.t(i)?)?;
    }
    Ok(acc)
}

fn variadic(node: &Node, f: Binary) -> Result<Kernel> {
    node.attributes.get("consumed_inputs");
    Ok(Kernel::new(move |a| one(fold(a, f)?)))
}

fn is_inf(node: &Node) -> Result<Kernel> {
    let negative = node.attributes.flag("detect_negative", true)?;
    let positive = node.attributes.flag("detect_positive", true)?;
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        one(match (negative, positive) {
            (true, true) => x.f_isinf()?,
            (true, false) => x.f_isneginf()?,
            (false, true) => x.f_isposinf()?,
            (false, false) => x.f_isinf()?.f_zeros_like()?,
        })
    }))
}

/// Bounds come as attributes before opset 11, as inputs after.
fn clip(node: &Node) -> Result<Kernel> {
    if node.opset < 11 {
        let low = node.attributes.float("min")?.map(f64::from);
        let high = node.attributes.float("max")?.map(f64::from);
        node.attributes.get("consumed_inputs");
        return Ok(Kernel::new(move |a| {
            let mut x = a.t(0)?.shallow_clone();
            if let Some(v) = low {
                x = x.f_clamp_min(v)?;
            }
            if let Some(v) = high {
                x = x.f_clamp_max(v)?;
            }
            one(x)
        }));
    }
    Ok(Kernel::new(|a| {
        let x = a.t(0)?;
        let known = |i: usize| !a.has(i) || a.value(i).is_ok_and(Value::is_host);
        if is_float(x.kind()) && known(1) && known(2) {
            let bound = |i: usize| if a.has(i) { a.scalar(i).map(Some) } else { Ok(None) };
            return one(match (bound(1)?, bound(2)?) {
                (Some(low), Some(high)) => x.f_clamp(low, high)?,
                (Some(low), None) => x.f_clamp_min(low)?,
                (None, Some(high)) => x.f_clamp_max(high)?,
                (None, None) => x.shallow_clone(),
            });
        }
        let bound = |i: usize| -> Result<Option<Tensor>> { Ok(a.opt(i)?.map(|t| t.f_to_kind(x.kind())).transpose()?) };
        one(match (bound(1)?, bound(2)?) {
            (None, None) => x.shallow_clone(),
            (low, high) => x.f_clamp_tensor(low, high)?,
        })
    }))
}

fn cast(node: &Node) -> Result<Kernel> {
    // `saturate` and `round_mode` speak of 8-bit floats only, which are refused.
    node.attributes.get("saturate");
    node.attributes.get("round_mode");
    let to = node.attributes.int("to")?.ok_or_else(|| Error::invalid("attribute `to` is missing"))?;
    let dtype = DType::from_onnx(i32::try_from(to).unwrap_or(-1))?;
    let kind = convert::kind(dtype);
    // Unsigned types wider than a byte are kept in 64-bit integers, reduced to their own width.
    let mask = match dtype {
        DType::U16 => Some(0xffff_i64),
        DType::U32 => Some(0xffff_ffff),
        _ => None,
    };
    Ok(Kernel::new(move |a| {
        let y = convert_kind(a.t(0)?, kind)?;
        one(match mask {
            Some(m) => y.f_bitwise_and(m)?,
            None => y,
        })
    }))
}

fn convert_kind(x: &Tensor, kind: Kind) -> Result<Tensor> {
    if x.kind() == kind {
        return Ok(x.shallow_clone());
    }
    Ok(x.f_to_kind(kind)?)
}
