//! Quantisation. Integer products are computed in f64, which holds them exactly and which every device multiplies.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::graph::Node;
use crate::tensor::DType;
use crate::torch::convert;
use crate::torch::convert::is_float;
use crate::torch::exec::kernel::{Args, Kernel, Value, one};
use crate::torch::exec::registry::{Entry, Registry};
use crate::torch::ops::conv::{Window, pad_spatial};
use crate::torch::ops::util;

pub fn register(r: &mut Registry) {
    r.add("QuantizeLinear", 10, (2, 3), quantize);
    r.add("DequantizeLinear", 10, (2, 3), dequantize);
    r.add("DynamicQuantizeLinear", 11, (1, 1), dynamic_quantize);
    r.add("MatMulInteger", 10, (2, 4), |_| {
        Ok(Kernel::new(|a| {
            // The zero point of A has one entry a row, that of B one a column.
            let x = centred(a.t(0)?, a.opt(2)?, -2)?;
            let y = centred(a.t(1)?, a.opt(3)?, -1)?;
            one(x.f_matmul(&y)?.f_to_kind(Kind::Int)?)
        }))
    });
    r.add("QLinearMatMul", 10, (8, 8), |_| {
        Ok(Kernel::new(|a| {
            let x = centred(a.t(0)?, a.opt(2)?, -2)?;
            let y = centred(a.t(3)?, a.opt(5)?, -1)?;
            let scale = column(a.t(1)?, x.dim(), -2)?.f_mul(&column(a.t(4)?, y.dim(), -1)?)?;
            requantized(&x.f_matmul(&y)?.f_mul(&scale)?, a.t(6)?, a.t(7)?, -2)
        }))
    });
    r.add("ConvInteger", 10, (2, 4), |n| {
        let conv = Conv::parse(n)?;
        Ok(Kernel::new(move |a| {
            let x = centred(a.t(0)?, a.opt(2)?, 1)?;
            let w = centred(a.t(1)?, a.opt(3)?, 0)?;
            one(conv.run(&x, &w)?.f_to_kind(Kind::Int)?)
        }))
    });
    r.add("QLinearConv", 10, (8, 9), |n| {
        let conv = Conv::parse(n)?;
        Ok(Kernel::new(move |a| {
            let x = centred(a.t(0)?, a.opt(2)?, 1)?;
            let w = centred(a.t(3)?, a.opt(5)?, 0)?;
            let mut y = conv.run(&x, &w)?;
            if let Some(bias) = a.opt(8)? {
                y = y.f_add(&util::per_channel(&bias.f_to_kind(Kind::Double)?, y.dim())?)?;
            }
            let scale = a
                .t(1)?
                .f_to_kind(Kind::Double)?
                .f_reshape([-1])?
                .f_mul(&a.t(4)?.f_to_kind(Kind::Double)?.f_reshape([-1])?)?;
            requantized(&y.f_mul(&util::per_channel(&scale, y.dim())?)?, a.t(6)?, a.t(7)?, 1)
        }))
    });
    // What `torch::straight_through` makes of a pair.
    r.add_entry(Entry {
        domain: "disback",
        op: "FakeQuantize",
        since: 1,
        until: i64::MAX,
        inputs: (2, 3),
        build: fake_quantize,
    });
}

/// Smallest and largest value of an integer type to which floats are quantised. A 64-bit kind stands for u16 here.
fn range(kind: Kind) -> Result<(f64, f64)> {
    Ok(match kind {
        Kind::Uint8 => (0.0, 255.0),
        Kind::Int8 => (-128.0, 127.0),
        Kind::Int16 => (-32768.0, 32767.0),
        Kind::Int64 => (0.0, 65535.0),
        Kind::Int => (f64::from(i32::MIN), f64::from(i32::MAX)),
        other => return Err(Error::invalid(format!("quantisation to {other:?}"))),
    })
}

/// A scalar, or a vector along `axis` (from the end where negative) of a tensor of rank `rank`.
fn column(v: &Tensor, rank: usize, axis: i64) -> Result<Tensor> {
    let v = v.f_to_kind(Kind::Double)?;
    if v.dim() != 1 || rank == 0 {
        return Ok(v);
    }
    if v.numel() == 1 {
        return Ok(v.f_reshape([0i64; 0])?);
    }
    util::along(&v, util::axis(axis, rank)?, rank)
}

/// Minus its zero point, in f64.
fn centred(x: &Tensor, zero: Option<&Tensor>, axis: i64) -> Result<Tensor> {
    let wide = x.f_to_kind(Kind::Double)?;
    Ok(match zero {
        Some(z) => wide.f_sub(&column(z, x.dim(), axis)?)?,
        None => wide,
    })
}

/// Rounded to nearest even, cut to the range of the zero point's type.
fn requantized(x: &Tensor, scale: &Tensor, zero: &Tensor, axis: i64) -> Result<Vec<Value>> {
    let kind = zero.kind();
    let (low, high) = range(kind)?;
    let y = x.f_div(&column(scale, x.dim(), axis)?)?;
    one(y.f_add(&column(zero, x.dim(), axis)?)?.f_round()?.f_clamp(low, high)?.f_to_kind(kind)?)
}

/// How a scale covers a tensor: as a whole, along an axis, or block by block along an axis.
#[derive(Debug, Clone, Copy)]
struct Granularity {
    axis: i64,
    block: i64,
}

impl Granularity {
    fn parse(node: &Node) -> Result<Self> {
        Ok(Self { axis: node.attributes.int_or("axis", 1)?, block: node.attributes.int_or("block_size", 0)? })
    }

    /// The scale or zero point in a shape that broadcasts to `x`.
    fn spread(self, v: &Tensor, x: &Tensor) -> Result<Tensor> {
        if v.numel() == 1 {
            return Ok(v.f_reshape([0i64; 0])?);
        }
        let axis = util::axis(self.axis, x.dim())?;
        if v.dim() == 1 && self.block == 0 {
            return util::along(v, axis, x.dim());
        }
        let n = x.size()[axis as usize];
        let blocks = v.size().get(axis as usize).copied().unwrap_or(0);
        if self.block < 1 || v.dim() != x.dim() || blocks * self.block < n {
            return Err(Error::invalid(format!(
                "scale of shape {:?} for {:?} in blocks of {}",
                v.size(),
                x.size(),
                self.block
            )));
        }
        Ok(v.f_repeat_interleave_self_int(self.block, axis, None)?.f_narrow(axis, 0, n)?)
    }
}

/// Type of the result: the zero point's, or as declared, or u8.
fn quantized_kind(a: &Args, declared: Option<Kind>) -> Result<Kind> {
    match (a.has(2), declared) {
        (true, _) => a.kind(2),
        (false, Some(k)) => Ok(k),
        (false, None) => Ok(Kind::Uint8),
    }
}

fn declared(node: &Node, name: &str) -> Result<Option<Kind>> {
    let code = node.attributes.int(name)?.filter(|&c| c != 0);
    code.map(|c| DType::from_onnx(i32::try_from(c).unwrap_or(-1)).map(convert::kind)).transpose()
}

fn quantize(node: &Node) -> Result<Kernel> {
    let granularity = Granularity::parse(node)?;
    let output = declared(node, "output_dtype")?;
    let precision = declared(node, "precision")?;
    // Speaks of 8-bit floats only, which are refused.
    node.attributes.get("saturate");
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let kind = quantized_kind(a, output)?;
        let (low, high) = range(kind)?;
        let compute =
            precision.filter(|&k| is_float(k)).unwrap_or(if is_float(x.kind()) { x.kind() } else { Kind::Float });
        let scale = granularity.spread(a.t(1)?, x)?.f_to_kind(compute)?;
        let mut y = x.f_to_kind(compute)?.f_div(&scale)?.f_round()?.f_to_kind(Kind::Double)?;
        if let Some(zero) = a.opt(2)? {
            y = y.f_add(&granularity.spread(zero, x)?.f_to_kind(Kind::Double)?)?;
        }
        one(y.f_clamp(low, high)?.f_to_kind(kind)?)
    }))
}

fn dequantize(node: &Node) -> Result<Kernel> {
    let granularity = Granularity::parse(node)?;
    let output = declared(node, "output_dtype")?;
    Ok(Kernel::new(move |a| {
        let (x, scale) = (a.t(0)?, a.t(1)?);
        let kind = output.unwrap_or(scale.kind());
        let wide = if scale.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let mut y = x.f_to_kind(wide)?;
        if let Some(zero) = a.opt(2)? {
            y = y.f_sub(&granularity.spread(zero, x)?.f_to_kind(wide)?)?;
        }
        one(y.f_mul(&granularity.spread(scale, x)?.f_to_kind(wide)?)?.f_to_kind(kind)?)
    }))
}

/// Scale and zero point from the extremes, zero among them; one u8 each.
fn dynamic_quantize(_: &Node) -> Result<Kernel> {
    Ok(Kernel::new(|a| {
        let x = a.t(0)?;
        let (low, high) = (x.f_min()?.f_clamp_max(0.0)?, x.f_max()?.f_clamp_min(0.0)?);
        let scale = high.f_sub(&low)?.f_div_scalar(255.0)?;
        // A tensor of zeros: any scale will do.
        let scale = scale.f_masked_fill(&scale.f_eq(0.0)?, 1.0 / 255.0)?;
        let zero = low.f_neg()?.f_div(&scale)?.f_clamp(0.0, 255.0)?.f_round()?;
        let y = x.f_div(&scale)?.f_round()?.f_add(&zero)?.f_clamp(0.0, 255.0)?.f_to_kind(Kind::Uint8)?;
        Ok([y, scale, zero.f_to_kind(Kind::Uint8)?].map(Value::device).to_vec())
    }))
}

/// x, scale, zero point: clamp(round(x / scale) + zero, low, high) - zero, times scale. The gradient goes straight through
/// the rounding, and is zero where the value was cut.
fn fake_quantize(node: &Node) -> Result<Kernel> {
    let granularity = Granularity::parse(node)?;
    let output = declared(node, "output_dtype")?;
    node.attributes.get("saturate");
    node.attributes.get("precision");
    Ok(Kernel::new(move |a| {
        let (x, scale) = (a.t(0)?, a.t(1)?);
        let (low, high) = range(quantized_kind(a, output)?)?;
        let scale = granularity.spread(scale, x)?;
        let steps = x.f_div(&scale)?;
        // The rounded value forward, the unrounded one's gradient backward.
        let rounded = steps.f_add(&steps.f_round()?.f_sub(&steps)?.f_detach()?)?;
        one(match a.opt(2)? {
            Some(zero) => {
                let zero = granularity.spread(zero, x)?.f_to_kind(x.kind())?;
                rounded.f_add(&zero)?.f_clamp(low, high)?.f_sub(&zero)?.f_mul(&scale)?
            }
            None => rounded.f_clamp(low, high)?.f_mul(&scale)?,
        })
    }))
}

struct Conv {
    window: Window,
    groups: i64,
}

impl Conv {
    fn parse(node: &Node) -> Result<Self> {
        Ok(Self { window: Window::parse(node)?, groups: node.attributes.int_or("group", 1)? })
    }

    /// On operands already in f64 and minus their zero points, so that padding is zero.
    fn run(&self, x: &Tensor, w: &Tensor) -> Result<Tensor> {
        if x.dim() < 3 || x.dim() != w.dim() {
            return Err(Error::invalid(format!("input of shape {:?} with a weight of shape {:?}", x.size(), w.size())));
        }
        let rank = x.dim() - 2;
        let pads = self.window.padding(&x.size()[2..], &w.size()[2..])?;
        let x = pad_spatial(x, &pads, 0.0)?;
        let zeros = vec![0i64; rank];
        let (strides, dilations) = (self.window.strides(rank)?, self.window.dilations(rank)?);
        Ok(x.f_convolution(w, None::<&Tensor>, strides, &zeros[..], dilations, false, &zeros[..], self.groups)?)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tch::Device;

    use super::*;
    use crate::graph::Graph;
    use crate::graph::ir::{Constant, Origin};
    use crate::graph::{Attributes, Port};
    use crate::tensor::HostTensor;
    use crate::torch::exec::plan::Plan;

    #[test]
    fn a_pair_hands_the_gradient_straight_through() {
        let mut g = Graph::default();
        let [x, scale, zero, q, y] = ["x", "scale", "zero", "q", "y"].map(|n| g.add_value(n));
        let port = |name: &str, value| Port { name: name.into(), value, dtype: Some(DType::F32), shape: None };
        g.inputs.push(port("x", x));
        g.outputs.push(port("y", y));
        let mut constant = |v, tensor| g.constants.insert(v, Constant { tensor, origin: Origin::Made });
        constant(scale, HostTensor::scalar(0.5f32));
        constant(zero, HostTensor::scalar(3u8));
        let node = |op: &str, from, to| Node {
            op: op.into(),
            domain: String::new(),
            name: op.into(),
            opset: 21,
            inputs: vec![Some(from), Some(scale), Some(zero)],
            outputs: vec![Some(to)],
            attributes: Attributes::new(BTreeMap::new()),
            captures: Vec::new(),
            origin: None,
            module: None,
        };
        g.nodes = vec![node("QuantizeLinear", x, q), node("DequantizeLinear", q, y)];
        let plan = Plan::new(&g, &[], crate::torch::ops::registry()).unwrap();
        let leaf = Tensor::from_slice(&[-9.0f32, -1.3, 0.26, 126.1, 500.0]).set_requires_grad(true);
        let out = plan.run(&[("x", &leaf)], &[], Device::Cpu).unwrap().remove(0).1;
        // Steps of 0.5 from -1.5 (0) to 126 (255).
        assert_eq!(Vec::<f32>::try_from(&out).unwrap(), [-1.5, -1.5, 0.5, 126.0, 126.0]);
        out.sum(Kind::Float).backward();
        assert_eq!(Vec::<f32>::try_from(leaf.grad()).unwrap(), [0.0, 1.0, 1.0, 1.0, 0.0]);
    }
}
