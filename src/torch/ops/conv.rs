//! Convolution and transposed convolution in one to three dimensions.

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::graph::Node;
use crate::torch::cpu::group_norm::is_channels_last;
use crate::torch::cpu::linear;
use crate::torch::cpu::winograd;
use crate::torch::exec::kernel::{Args, Kernel, one};
use crate::torch::exec::registry::Registry;
use crate::torch::training::{Convolution, convolution, hollow_product, lowered};

pub fn register(r: &mut Registry) {
    r.add("Conv", 1, (2, 3), conv);
    r.add("ConvTranspose", 1, (2, 3), conv_transpose);
}

/// How the borders are padded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AutoPad {
    NotSet,
    SameUpper,
    SameLower,
    Valid,
}

/// Attributes that convolutions and poolings share.
#[derive(Debug, Clone)]
pub struct Window {
    pub auto_pad: AutoPad,
    pub kernel: Option<Vec<i64>>,
    pub strides: Option<Vec<i64>>,
    pub dilations: Option<Vec<i64>>,
    /// All begins, then all ends.
    pub pads: Option<Vec<i64>>,
}

/// Sizes whose products and sums stay within 64 bits: a damaged file may say 2^60.
fn bounded(name: &str, v: Option<Vec<i64>>) -> Result<Option<Vec<i64>>> {
    const MOST: u64 = 1 << 24;
    match v {
        Some(v) if v.iter().any(|n| n.unsigned_abs() > MOST) => {
            Err(Error::invalid(format!("attribute `{name}` is {v:?}, expected at most {MOST}"))
                .hint("no layer is that large: the file is damaged, export again"))
        }
        v => Ok(v),
    }
}

impl Window {
    pub fn parse(node: &Node) -> Result<Self> {
        let a = &node.attributes;
        let auto_pad = match a.string_or("auto_pad", "NOTSET")?.as_str() {
            "NOTSET" | "" => AutoPad::NotSet,
            "SAME_UPPER" => AutoPad::SameUpper,
            "SAME_LOWER" => AutoPad::SameLower,
            "VALID" => AutoPad::Valid,
            other => return Err(Error::invalid(format!("attribute `auto_pad` is `{other}`"))),
        };
        let positive = |name: &str, v: Option<Vec<i64>>| match v {
            Some(v) if v.iter().any(|&n| n < 1) => {
                Err(Error::invalid(format!("attribute `{name}` is {v:?}, expected positive numbers")))
            }
            v => bounded(name, v),
        };
        Ok(Self {
            auto_pad,
            kernel: positive("kernel_shape", a.ints("kernel_shape")?)?,
            strides: positive("strides", a.ints("strides")?)?,
            dilations: positive("dilations", a.ints("dilations")?)?,
            pads: bounded("pads", a.ints("pads")?)?,
        })
    }

    fn sized(v: &Option<Vec<i64>>, name: &str, rank: usize, default: i64) -> Result<Vec<i64>> {
        match v {
            None => Ok(vec![default; rank]),
            Some(v) if v.len() == rank => Ok(v.clone()),
            Some(v) => Err(Error::invalid(format!("attribute `{name}` is {v:?} for {rank} spatial dimensions"))),
        }
    }
    pub fn strides(&self, rank: usize) -> Result<Vec<i64>> {
        Self::sized(&self.strides, "strides", rank, 1)
    }
    pub fn dilations(&self, rank: usize) -> Result<Vec<i64>> {
        Self::sized(&self.dilations, "dilations", rank, 1)
    }
    /// Begin and end padding of each dimension for a forward window over `input` spatial sizes.
    pub fn padding(&self, input: &[i64], kernel: &[i64]) -> Result<Vec<(i64, i64)>> {
        let rank = input.len();
        let (strides, dilations) = (self.strides(rank)?, self.dilations(rank)?);
        match self.auto_pad {
            AutoPad::Valid => Ok(vec![(0, 0); rank]),
            AutoPad::NotSet => {
                let p = Self::sized(&self.pads, "pads", 2 * rank, 0)?;
                Ok((0..rank).map(|i| (p[i], p[rank + i])).collect())
            }
            same => Ok((0..rank)
                .map(|i| {
                    let out = (input[i] + strides[i] - 1) / strides[i];
                    let total = ((out - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1 - input[i]).max(0);
                    let less = total / 2;
                    if same == AutoPad::SameUpper { (less, total - less) } else { (total - less, less) }
                })
                .collect()),
        }
    }
}

/// Pads the spatial dimensions (last ones) of `x` with a constant; negative padding crops.
pub fn pad_spatial(x: &Tensor, pads: &[(i64, i64)], value: f64) -> Result<Tensor> {
    let list: Vec<i64> = pads.iter().rev().flat_map(|&(b, e)| [b, e]).collect();
    Ok(x.f_pad(&list[..], "constant", value)?)
}

/// Symmetric padding for libtorch, after padding the rest explicitly.
pub fn split_padding(x: &Tensor, pads: &[(i64, i64)], value: f64) -> Result<(Tensor, Vec<i64>)> {
    if pads.iter().all(|(b, e)| b == e && *b >= 0) {
        return Ok((x.shallow_clone(), pads.iter().map(|p| p.0).collect()));
    }
    Ok((pad_spatial(x, pads, value)?, vec![0; pads.len()]))
}

fn operands(a: &Args) -> Result<(Tensor, Tensor, usize)> {
    let (x, w) = (a.t(0)?, a.t(1)?);
    if x.dim() < 3 || x.dim() != w.dim() {
        return Err(Error::invalid(format!("input of shape {:?} with a weight of shape {:?}", x.size(), w.size())));
    }
    Ok((lowered(x)?, lowered(w)?, x.dim() - 2))
}

/// A convolution that mixes channels only: one matrix product on channels-last images, which are not copied.
fn pointwise(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let filters = w.f_flatten(1, 3)?;
    let pixels = x.f_permute([0, 2, 3, 1])?;
    let turned = filters.f_transpose(0, 1)?;
    let y = if linear::pays(&pixels, &turned) {
        linear::linear(&pixels, &turned, bias)?
    } else if let Some(made) = hollow_product(&pixels, &turned, bias)? {
        made
    } else {
        pixels.f_linear(&filters, bias)?
    };
    Ok(y.f_permute([0, 3, 1, 2])?)
}

/// Whether the product is worth a copy into channels-last.
fn mixes_faster(x: &Tensor, w: &Tensor) -> bool {
    let small = |t: &Tensor| t.kind() == Kind::Float && t.device() == Device::Cpu;
    small(x) && small(w) && linear::has_products() && w.size()[..2].iter().all(|&n| n >= 16)
}

pub fn conv(node: &Node) -> Result<Kernel> {
    let window = Window::parse(node)?;
    let groups = node.attributes.int_or("group", 1)?;
    Ok(Kernel::new(move |a| {
        let (x, w, rank) = operands(a)?;
        let kernel = &w.size()[2..];
        if window.kernel.as_ref().is_some_and(|k| k != kernel) {
            return Err(Error::invalid(format!(
                "attribute `kernel_shape` is {:?}, the weight's is {kernel:?}",
                window.kernel
            )));
        }
        let pads = window.padding(&x.size()[2..], kernel)?;
        let (x, padding) = split_padding(&x, &pads, 0.0)?;
        let (strides, dilations) = (window.strides(rank)?, window.dilations(rank)?);
        let bias = a.opt(2)?.map(lowered).transpose()?;
        let plain = groups == 1 && [&strides, &dilations].iter().all(|v| v.iter().all(|&n| n == 1));
        if plain && padding == [1, 1] && winograd::pays(&x, &w) {
            return one(winograd::convolution(&x, &w, bias.as_ref())?);
        }
        if plain && padding == [0, 0] && kernel == [1, 1] && (is_channels_last(&x) || mixes_faster(&x, &w)) {
            return one(pointwise(&x, &w, bias.as_ref())?);
        }
        let output_padding = vec![0; rank];
        let c = Convolution { strides, padding, dilations, transposed: false, output_padding, groups };
        one(convolution(&x, &w, bias.as_ref(), c)?)
    }))
}

fn conv_transpose(node: &Node) -> Result<Kernel> {
    let window = Window::parse(node)?;
    let groups = node.attributes.int_or("group", 1)?;
    let output_padding = bounded("output_padding", node.attributes.ints("output_padding")?)?;
    let output_shape = bounded("output_shape", node.attributes.ints("output_shape")?)?;
    Ok(Kernel::new(move |a| {
        let (x, w, rank) = operands(a)?;
        let kernel = w.size()[2..].to_vec();
        let (strides, dilations) = (window.strides(rank)?, window.dilations(rank)?);
        let extra = Window::sized(&output_padding, "output_padding", rank, 0)?;
        let input = &x.size()[2..];
        let full: Vec<i64> =
            (0..rank).map(|i| strides[i] * (input[i] - 1) + extra[i] + (kernel[i] - 1) * dilations[i] + 1).collect();
        // Output sizes, where given or implied, fix the padding; without them the padding fixes the size.
        let wanted = match (&output_shape, window.auto_pad) {
            (Some(s), _) if s.len() == rank => Some(s.clone()),
            (Some(s), _) if s.len() == rank + 2 => Some(s[2..].to_vec()),
            (Some(s), _) => return Err(Error::invalid(format!("attribute `output_shape` is {s:?}"))),
            (None, AutoPad::SameUpper | AutoPad::SameLower) => Some((0..rank).map(|i| input[i] * strides[i]).collect()),
            _ => None,
        };
        let pads: Vec<(i64, i64)> = match wanted {
            None if window.auto_pad == AutoPad::Valid => vec![(0, 0); rank],
            None => {
                let p = Window::sized(&window.pads, "pads", 2 * rank, 0)?;
                (0..rank).map(|i| (p[i], p[rank + i])).collect()
            }
            Some(wanted) if output_shape.is_none() && wanted.iter().zip(&full).any(|(w, f)| w > f) => {
                return Err(Error::unsupported(format!(
                    "ConvTranspose to {wanted:?}, larger than the {full:?} that the kernel reaches: implementations disagree"
                ))
                .hint("export with explicit pads and output_padding"));
            }
            Some(wanted) => (0..rank)
                .map(|i| {
                    let total = full[i] - wanted[i];
                    // More than the kernel reaches: zeros at the end, as with output padding.
                    if total < 0 {
                        return (0, total);
                    }
                    let less = total.div_euclid(2);
                    // The specification gives the odd one to the end for SAME_UPPER only.
                    if window.auto_pad == AutoPad::SameUpper { (less, total - less) } else { (total - less, less) }
                })
                .collect(),
        };
        let symmetric = pads.iter().all(|(b, e)| b == e && *b >= 0);
        let padding: Vec<i64> = if symmetric { pads.iter().map(|p| p.0).collect() } else { vec![0; rank] };
        // libtorch wants output padding below the stride; what exceeds it is zeros that we append ourselves.
        let bias = a.opt(2)?.map(lowered).transpose()?;
        let bias = bias.as_ref();
        let (native, late): (Vec<i64>, Vec<i64>) = (0..rank)
            .map(|i| if extra[i] < strides[i].max(dilations[i]) { (extra[i], 0) } else { (0, extra[i]) })
            .unzip();
        let late_any = late.iter().any(|&n| n > 0) || pads.iter().any(|&(b, e)| b < 0 || e < 0);
        let c = Convolution { strides, padding, dilations, transposed: true, output_padding: native, groups };
        let y = convolution(&x, &w, if late_any { None } else { bias }, c)?;
        let mut y = y;
        if late_any || !symmetric {
            let crop: Vec<(i64, i64)> =
                (0..rank).map(|i| if symmetric { (0, late[i]) } else { (-pads[i].0, late[i] - pads[i].1) }).collect();
            y = pad_spatial(&y, &crop, 0.0)?;
        }
        match bias {
            Some(b) if late_any => one(y.f_add(&super::util::per_channel(b, rank + 2)?)?),
            _ => one(y),
        }
    }))
}
