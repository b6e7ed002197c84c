//! Bits of integers.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::graph::Node;
use crate::tensor::DType;
use crate::torch::convert;
use crate::torch::exec::kernel::{Kernel, one};
use crate::torch::exec::registry::Registry;

pub fn register(r: &mut Registry) {
    r.add("BitwiseAnd", 18, (2, 2), |_| Ok(Kernel::new(|a| one(a.t(0)?.f_bitwise_and_tensor(a.t(1)?)?))));
    r.add("BitwiseOr", 18, (2, 2), |_| Ok(Kernel::new(|a| one(a.t(0)?.f_bitwise_or_tensor(a.t(1)?)?))));
    r.add("BitwiseXor", 18, (2, 2), |_| Ok(Kernel::new(|a| one(a.t(0)?.f_bitwise_xor_tensor(a.t(1)?)?))));
    r.add("BitwiseNot", 18, (1, 1), |_| Ok(Kernel::new(|a| one(a.t(0)?.f_bitwise_not()?))));
    r.add("BitShift", 11, (2, 2), |n| match n.attributes.string_or("direction", "")?.as_str() {
        "LEFT" => Ok(Kernel::new(|a| one(a.t(0)?.f_bitwise_left_shift(a.t(1)?)?))),
        "RIGHT" => Ok(Kernel::new(|a| one(shift_right(a.t(0)?, a.t(1)?)?))),
        other => Err(Error::invalid(format!("attribute `direction` is `{other}`, expected LEFT or RIGHT"))),
    });
    r.add("BitCast", 26, (1, 1), bit_cast);
}

/// Only unsigned types are shifted. The wide ones live in signed 64-bit integers, whose sign must not be drawn in.
fn shift_right(x: &Tensor, by: &Tensor) -> Result<Tensor> {
    let y = x.f_bitwise_right_shift(by)?;
    if x.kind() != Kind::Int64 {
        return Ok(y);
    }
    let width = by.f_neg()?.f_add_scalar(64)?;
    let mask = Tensor::f_ones_like(&width)?.f_bitwise_left_shift(&width)?.f_sub_scalar(1)?;
    // A shift by nothing keeps all bits.
    let mask = mask.f_masked_fill(&by.f_eq(0)?, -1)?;
    Ok(y.f_bitwise_and_tensor(&mask)?)
}

fn bit_cast(node: &Node) -> Result<Kernel> {
    let to = node.attributes.int("to")?.ok_or_else(|| Error::invalid("attribute `to` is missing"))?;
    let to = DType::from_onnx(i32::try_from(to).unwrap_or(-1))?;
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let from = convert::dtype(x.kind())?;
        // A 64-bit integer may stand for a narrower unsigned one.
        let x = match (from, to.size()) {
            (DType::I64, 4) => x.f_to_kind(Kind::Int)?,
            (DType::I64, 2) => x.f_to_kind(Kind::Int16)?,
            (f, n) if f.size() == n => x.f_contiguous()?,
            _ => return Err(Error::invalid(format!("{from} and {to} differ in width"))),
        };
        one(match to {
            DType::U16 => x.f_view_dtype(Kind::Int16)?.f_to_kind(Kind::Int64)?.f_bitwise_and(0xffff)?,
            DType::U32 => x.f_view_dtype(Kind::Int)?.f_to_kind(Kind::Int64)?.f_bitwise_and(0xffff_ffff)?,
            DType::U64 => x.f_view_dtype(Kind::Int64)?,
            _ => x.f_view_dtype(convert::kind(to))?,
        })
    }))
}
