//! Moving elements about in space: blocks to depth and back, columns to images, cropping and padding about the centre.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::graph::Node;
use crate::torch::exec::kernel::{Kernel, one};
use crate::torch::exec::registry::Registry;
use crate::torch::ops::util;

pub fn register(r: &mut Registry) {
    r.add("DepthToSpace", 1, (1, 1), depth_to_space);
    r.add("SpaceToDepth", 1, (1, 1), space_to_depth);
    r.add("Col2Im", 18, (3, 3), col_to_im);
    r.add("CenterCropPad", 18, (2, 2), center_crop_pad);
}

fn block_size(node: &Node) -> Result<i64> {
    match node.attributes.int("blocksize")? {
        Some(b @ 1..=65536) => Ok(b),
        b => Err(Error::invalid(format!("attribute `blocksize` is {b:?}"))),
    }
}

fn planes(x: &Tensor) -> Result<[i64; 4]> {
    x.size().try_into().map_err(|s| Error::invalid(format!("input of shape {s:?}, expected rank 4")))
}

fn depth_to_space(node: &Node) -> Result<Kernel> {
    let b = block_size(node)?;
    let columns = match node.attributes.string_or("mode", "DCR")?.as_str() {
        "DCR" => false,
        "CRD" => true,
        other => return Err(Error::invalid(format!("attribute `mode` is `{other}`"))),
    };
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let [n, c, h, w] = planes(x)?;
        if c % (b * b) != 0 {
            return Err(Error::invalid(format!("{c} channels in blocks of {b}x{b}")));
        }
        let d = c / (b * b);
        let y = if columns {
            x.f_reshape([n, d, b, b, h, w])?.f_permute([0, 1, 4, 2, 5, 3])?
        } else {
            x.f_reshape([n, b, b, d, h, w])?.f_permute([0, 3, 4, 1, 5, 2])?
        };
        one(y.f_reshape([n, d, h * b, w * b])?)
    }))
}

fn space_to_depth(node: &Node) -> Result<Kernel> {
    let b = block_size(node)?;
    let columns = match node.attributes.string_or("mode", "DCR")?.as_str() {
        "DCR" => false,
        "CRD" => true,
        other => return Err(Error::invalid(format!("attribute `mode` is `{other}`"))),
    };
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let [n, c, h, w] = planes(x)?;
        if h % b != 0 || w % b != 0 {
            return Err(Error::invalid(format!("{h}x{w} in blocks of {b}x{b}")));
        }
        let y = x.f_reshape([n, c, h / b, b, w / b, b])?;
        let y = if columns { y.f_permute([0, 1, 3, 5, 2, 4])? } else { y.f_permute([0, 3, 5, 1, 2, 4])? };
        one(y.f_reshape([n, c * b * b, h / b, w / b])?)
    }))
}

/// Overlapping blocks are added up; what falls into the padding is dropped.
fn col_to_im(node: &Node) -> Result<Kernel> {
    let dilations = node.attributes.ints("dilations")?;
    let pads = node.attributes.ints("pads")?;
    let strides = node.attributes.ints("strides")?;
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let (image, block) = (a.ints(1)?, a.ints(2)?);
        let rank = image.len();
        let dilations = dilations.clone().unwrap_or_else(|| vec![1; rank]);
        let strides = strides.clone().unwrap_or_else(|| vec![1; rank]);
        let pads = pads.clone().unwrap_or_else(|| vec![0; 2 * rank]);
        let lengths = [block.len(), dilations.len(), strides.len(), pads.len() / 2];
        if rank == 0 || lengths.iter().any(|&n| n != rank) || strides.iter().any(|&s| s < 1) {
            return Err(Error::invalid("image, block, dilations, pads and strides differ in length"));
        }
        let [n, columns, positions]: [i64; 3] =
            x.size().try_into().map_err(|s| Error::invalid(format!("input of shape {s:?}, expected rank 3")))?;
        if image.iter().chain(&block).any(|&d| d < 1) || dilations.iter().chain(&pads).any(|&d| d < 0) {
            return Err(Error::invalid(format!("blocks {block:?} of an image {image:?} with pads {pads:?}")));
        }
        let elements: i64 = block.iter().fold(1, |n, &d| d.saturating_mul(n));
        let steps: Vec<i64> = (0..rank)
            .map(|i| {
                let padded = image[i].saturating_add(pads[i]).saturating_add(pads[rank + i]);
                let span = dilations[i].saturating_mul(block[i].saturating_sub(1)).saturating_add(1);
                padded.saturating_sub(span) / strides[i] + 1
            })
            .collect();
        util::table_len(image.iter().fold(1, |n, &d| d.saturating_mul(n)))?;
        if elements < 1
            || columns % elements != 0
            || steps.iter().fold(1, |n: i64, &d| d.saturating_mul(n)) != positions
        {
            return Err(Error::invalid(format!("columns of shape {:?} for an image {image:?}", x.size())));
        }
        let area: i64 = image.iter().product();
        let digits = |mut v: i64, base: &[i64]| -> Vec<i64> {
            let mut d = vec![0; base.len()];
            for i in (0..base.len()).rev() {
                d[i] = v % base[i];
                v /= base[i];
            }
            d
        };
        let mut index = Vec::with_capacity((elements * positions) as usize);
        for e in 0..elements {
            let k = digits(e, &block);
            for p in 0..positions {
                let o = digits(p, &steps);
                let mut at = 0i64;
                let mut inside = true;
                for i in 0..rank {
                    let v = o[i]
                        .saturating_mul(strides[i])
                        .saturating_add(k[i].saturating_mul(dilations[i]))
                        .saturating_sub(pads[i]);
                    inside &= (0..image[i]).contains(&v);
                    at = at.wrapping_mul(image[i]).wrapping_add(v);
                }
                // One place behind the image takes what is dropped.
                index.push(if inside { at } else { area });
            }
        }
        let channels = columns / elements;
        let source = x.f_reshape([n * channels, elements * positions])?;
        let y = Tensor::f_zeros([n * channels, area + 1], (x.kind(), x.device()))?
            .f_index_add(1, &util::vector(&index, x)?, &source)?
            .f_narrow(1, 0, area)?;
        let mut shape = vec![n, channels];
        shape.extend(image);
        one(y.f_reshape(&shape[..])?)
    })
    .host(&[1, 2]))
}

/// Where the difference is odd, the odd element is cut (or added) at the end.
fn center_crop_pad(node: &Node) -> Result<Kernel> {
    let axes = node.attributes.ints("axes")?;
    Ok(Kernel::new(move |a| {
        let mut x = a.t(0)?.shallow_clone();
        let wanted = a.ints(1)?;
        let axes = match &axes {
            Some(list) => util::axes(list, x.dim())?,
            None => (0..x.dim() as i64).collect(),
        };
        if axes.len() != wanted.len() || wanted.iter().any(|&n| n < 0) {
            return Err(Error::invalid(format!("sizes {wanted:?} for {} axes", axes.len())));
        }
        let mut grow = vec![0i64; 2 * x.dim()];
        for (&axis, &n) in axes.iter().zip(&wanted) {
            let have = x.size()[axis as usize];
            if n < have {
                x = x.f_narrow(axis, (have - n) / 2, n)?;
            } else {
                let at = 2 * (x.dim() - 1 - axis as usize);
                let before = (n - have) / 2;
                (grow[at], grow[at + 1]) = (before, n - have - before);
            }
        }
        let kind = x.kind();
        let x = if kind == Kind::Bool { x.f_to_kind(Kind::Uint8)? } else { x };
        one(x.f_pad(&grow[..], "constant", 0.0)?.f_to_kind(kind)?)
    })
    .host(&[1]))
}
