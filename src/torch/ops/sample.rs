//! Sampling images at computed positions, and boxes.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::graph::Node;
use crate::torch::exec::kernel::{Kernel, one};
use crate::torch::exec::registry::Registry;
use crate::torch::ops::conv::Window;
use crate::torch::ops::util;

pub fn register(r: &mut Registry) {
    r.add("GridSample", 16, (2, 2), grid_sample);
    r.add("AffineGrid", 20, (2, 2), |n| {
        let align = n.attributes.flag("align_corners", false)?;
        Ok(Kernel::new(move |a| one(Tensor::f_affine_grid_generator(a.t(0)?, &a.ints(1)?[..], align)?)).host(&[1]))
    });
    r.add("RoiAlign", 10, (3, 3), roi_align);
    r.add("DeformConv", 19, (3, 5), deform_conv);
    r.add("NonMaxSuppression", 10, (2, 5), non_max_suppression);
}

fn grid_sample(node: &Node) -> Result<Kernel> {
    let mode = match node.attributes.string_or("mode", "linear")?.as_str() {
        "linear" | "bilinear" => 0,
        "nearest" => 1,
        "cubic" | "bicubic" => 2,
        other => return Err(Error::invalid(format!("attribute `mode` is `{other}`"))),
    };
    let padding = match node.attributes.string_or("padding_mode", "zeros")?.as_str() {
        "zeros" => 0,
        "border" => 1,
        "reflection" => 2,
        other => return Err(Error::invalid(format!("attribute `padding_mode` is `{other}`"))),
    };
    let align = node.attributes.flag("align_corners", false)?;
    Ok(Kernel::new(move |a| {
        let (x, grid) = (a.t(0)?, a.t(1)?);
        if !(4..=5).contains(&x.dim()) || (mode == 2 && x.dim() == 5) {
            return Err(Error::unsupported(format!(
                "GridSample of rank {}{}",
                x.dim(),
                if mode == 2 { ", cubic" } else { "" }
            )));
        }
        one(x.f_grid_sampler(&grid.f_to_kind(x.kind())?, mode, padding, align)?)
    }))
}

/// Bilinear sampling points of one region, at most four input elements each.
struct Points {
    index: [Vec<i64>; 4],
    weight: [Vec<f64>; 4],
}

impl Points {
    fn push(&mut self, mut y: f64, mut x: f64, height: i64, width: i64) {
        if y < -1.0 || y > height as f64 || x < -1.0 || x > width as f64 {
            for k in 0..4 {
                self.index[k].push(0);
                self.weight[k].push(0.0);
            }
            return;
        }
        let low = |v: &mut f64, n: i64| {
            *v = v.max(0.0);
            let at = *v as i64;
            if at >= n - 1 {
                *v = (n - 1) as f64;
                (n - 1, n - 1)
            } else {
                (at, at + 1)
            }
        };
        let (y0, y1) = low(&mut y, height);
        let (x0, x1) = low(&mut x, width);
        let (ly, lx) = (y - y0 as f64, x - x0 as f64);
        let corners = [
            (y0, x0, (1.0 - ly) * (1.0 - lx)),
            (y0, x1, (1.0 - ly) * lx),
            (y1, x0, ly * (1.0 - lx)),
            (y1, x1, ly * lx),
        ];
        for (k, (y, x, w)) in corners.into_iter().enumerate() {
            self.index[k].push(y * width + x);
            self.weight[k].push(w);
        }
    }
}

/// The number of samples in a bin depends on the region, so that regions are read on the host.
fn roi_align(node: &Node) -> Result<Kernel> {
    let at = &node.attributes;
    let max = match at.string_or("mode", "avg")?.as_str() {
        "avg" => false,
        "max" => true,
        other => return Err(Error::invalid(format!("attribute `mode` is `{other}`"))),
    };
    let (out_h, out_w) = (at.int_or("output_height", 1)?, at.int_or("output_width", 1)?);
    let ratio = at.int_or("sampling_ratio", 0)?;
    let scale = at.float_or("spatial_scale", 1.0)?;
    let default = if node.opset < 16 { "output_half_pixel" } else { "half_pixel" };
    let half_pixel = at.string_or("coordinate_transformation_mode", default)? == "half_pixel";
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let [_, channels, height, width]: [i64; 4] =
            x.size().try_into().map_err(|s| Error::invalid(format!("input of shape {s:?}, expected rank 4")))?;
        let (rois, batches) = (a.floats(1)?, a.ints(2)?);
        if rois.len() != 4 * batches.len() {
            return Err(Error::invalid(format!("{} numbers for {} regions", rois.len(), batches.len())));
        }
        let mut out = Vec::new();
        for (roi, &batch) in rois.chunks_exact(4).zip(&batches) {
            let offset = if half_pixel { 0.5 } else { 0.0 };
            let [x0, y0, x1, y1] = [0, 1, 2, 3].map(|i| roi[i] * scale - offset);
            let (mut w, mut h) = (x1 - x0, y1 - y0);
            if !half_pixel {
                (w, h) = (w.max(1.0), h.max(1.0));
            }
            let (bin_h, bin_w) = (h / out_h as f64, w / out_w as f64);
            let grid = |bin: f64| if ratio > 0 { ratio } else { bin.ceil().max(0.0) as i64 };
            let (grid_h, grid_w) = (grid(bin_h), grid(bin_w));
            let samples = [out_h, out_w, grid_h, grid_w].iter().fold(1, |n: i64, &d| d.max(0).saturating_mul(n));
            util::table_len(samples)?;
            if samples == 0 {
                out.push(Tensor::f_zeros([channels, out_h, out_w], (x.kind(), x.device()))?);
                continue;
            }
            let mut points = Points { index: Default::default(), weight: Default::default() };
            for bin in 0..out_h * out_w {
                let (ph, pw) = ((bin / out_w) as f64, (bin % out_w) as f64);
                for s in 0..grid_h * grid_w {
                    let (iy, ix) = ((s / grid_w) as f64, (s % grid_w) as f64);
                    let y = y0 + ph * bin_h + (iy + 0.5) * bin_h / grid_h as f64;
                    let x = x0 + pw * bin_w + (ix + 0.5) * bin_w / grid_w as f64;
                    points.push(y, x, height, width);
                }
            }
            let plane = x.f_select(0, batch)?.f_reshape([channels, -1])?;
            let corners = (0..4)
                .map(|k| {
                    let weight = util::vector(&points.weight[k], x)?.f_to_kind(x.kind())?;
                    Ok(plane.f_index_select(1, &util::vector(&points.index[k], x)?)?.f_mul(&weight)?)
                })
                .collect::<Result<Vec<_>>>()?;
            let corners = Tensor::f_stack(&corners, 0)?.f_reshape([4, channels, out_h, out_w, grid_h * grid_w])?;
            out.push(if max {
                corners.f_amax([0i64, 4], false)?
            } else {
                corners.f_sum_dim_intlist([0i64, 4].as_slice(), false, x.kind())?.f_div_scalar(grid_h * grid_w)?
            });
        }
        if out.is_empty() {
            return one(Tensor::f_zeros([0, channels, out_h, out_w], (x.kind(), x.device()))?);
        }
        one(Tensor::f_stack(&out, 0)?)
    })
    .host(&[1, 2]))
}

/// Convolution whose taps lie at learnt offsets: bilinear samples, gathered into columns, times the weight.
fn deform_conv(node: &Node) -> Result<Kernel> {
    let window = Window::parse(node)?;
    let groups = node.attributes.int_or("group", 1)?;
    let offset_groups = node.attributes.int_or("offset_group", 1)?;
    Ok(Kernel::new(move |a| {
        let (x, w, offset) = (a.t(0)?, a.t(1)?, a.t(2)?);
        let four = |t: &Tensor| -> Result<[i64; 4]> {
            t.size()
                .try_into()
                .map_err(|s| Error::unsupported(format!("DeformConv of shape {s:?}: only two dimensions")))
        };
        let ([n, c, height, width], [out_c, _, kh, kw]) = (four(x)?, four(w)?);
        let [_, _, oh, ow] = four(offset)?;
        let taps = kh * kw;
        if c % offset_groups != 0 || c % groups != 0 || out_c % groups != 0 {
            return Err(Error::invalid(format!("{c} channels in {groups} groups, {offset_groups} offset groups")));
        }
        let (strides, dilations) = (window.strides(2)?, window.dilations(2)?);
        let pads = window.padding(&x.size()[2..], &[kh, kw])?;
        let range = |n: i64, by: i64, from: i64| -> Result<Tensor> {
            Ok(Tensor::f_arange(n, (x.kind(), x.device()))?.f_mul_scalar(by)?.f_add_scalar(from)?)
        };
        // Position of each tap without its offset.
        let ys = range(kh, dilations[0], 0)?.f_reshape([kh, 1, 1, 1])?;
        let ys = ys.f_add(&range(oh, strides[0], -pads[0].0)?.f_reshape([1, 1, oh, 1])?)?;
        let xs = range(kw, dilations[1], 0)?.f_reshape([1, kw, 1, 1])?;
        let xs = xs.f_add(&range(ow, strides[1], -pads[1].0)?.f_reshape([1, 1, 1, ow])?)?;
        let offset = offset.f_reshape([n, offset_groups, kh, kw, 2, oh, ow])?;
        let y = offset.f_select(4, 0)?.f_add(&ys)?.f_reshape([n * offset_groups, -1])?;
        let x_at = offset.f_select(4, 1)?.f_add(&xs)?.f_reshape([n * offset_groups, -1])?;
        let planes = x.f_reshape([n * offset_groups, c / offset_groups, height * width])?;
        let samples = bilinear(&planes, &y, &x_at, height, width)?;
        let mut columns = samples.f_reshape([n, offset_groups, c / offset_groups, taps, oh * ow])?;
        if let Some(mask) = a.opt(4)? {
            columns = columns.f_mul(&mask.f_reshape([n, offset_groups, 1, taps, oh * ow])?)?;
        }
        let columns = columns.f_reshape([n, groups, c / groups * taps, oh * ow])?;
        let weight = w.f_reshape([1, groups, out_c / groups, c / groups * taps])?;
        let y = weight.f_matmul(&columns)?.f_reshape([n, out_c, oh, ow])?;
        one(match a.opt(3)? {
            Some(b) => y.f_add(&util::per_channel(b, 4)?)?,
            None => y,
        })
    }))
}

/// `planes` [B, C, H*W] at points `y`, `x` [B, P]: [B, C, P]; zero outside.
fn bilinear(planes: &Tensor, y: &Tensor, x: &Tensor, height: i64, width: i64) -> Result<Tensor> {
    let (y0, x0) = (y.f_floor()?, x.f_floor()?);
    let (ly, lx) = (y.f_sub(&y0)?, x.f_sub(&x0)?);
    let mut sum: Option<Tensor> = None;
    for (dy, dx) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let (iy, ix) = (y0.f_add_scalar(dy)?, x0.f_add_scalar(dx)?);
        let within = |t: &Tensor, n: i64| t.f_ge(0)?.f_logical_and(&t.f_le(n - 1)?);
        let inside = within(&iy, height)?.f_logical_and(&within(&ix, width)?)?;
        let flat = iy.f_clamp(0, height - 1)?.f_mul_scalar(width)?.f_add(&ix.f_clamp(0, width - 1)?)?;
        let part = |l: &Tensor, d: i64| if d == 1 { Ok(l.shallow_clone()) } else { l.f_neg()?.f_add_scalar(1.0) };
        let weight = part(&ly, dy)?.f_mul(&part(&lx, dx)?)?.f_mul(&inside.f_to_kind(planes.kind())?)?;
        let shape = [planes.size()[0], planes.size()[1], y.size()[1]];
        let index = flat.detach().f_to_kind(Kind::Int64)?.f_unsqueeze(1)?.f_expand(shape, false)?;
        let term = planes.f_gather(2, &index, false)?.f_mul(&weight.f_unsqueeze(1)?)?;
        sum = Some(match sum {
            Some(s) => s.f_add(&term)?,
            None => term,
        });
    }
    sum.ok_or_else(|| Error::invalid("no corners"))
}

/// Boxes by falling score, leaving out those that overlap a better one; on the host.
fn non_max_suppression(node: &Node) -> Result<Kernel> {
    let centered = node.attributes.flag("center_point_box", false)?;
    Ok(Kernel::new(move |a| {
        let (boxes, scores) = (a.floats(0)?, a.floats(1)?);
        let (box_shape, score_shape) = (a.shape(0)?, a.shape(1)?);
        let (&[batches, count, 4], &[_, classes, _]) = (box_shape.as_slice(), score_shape.as_slice()) else {
            return Err(Error::invalid(format!("boxes of shape {box_shape:?}, scores of shape {score_shape:?}")));
        };
        if score_shape[0] != batches || score_shape[2] != count {
            return Err(Error::invalid(format!("boxes of shape {box_shape:?}, scores of shape {score_shape:?}")));
        }
        let number = |i: usize| if a.has(i) { a.scalar(i).map(Some) } else { Ok(None) };
        let most = number(2)?.unwrap_or(0.0).max(0.0) as usize;
        let overlap = number(3)?.unwrap_or(0.0);
        let threshold = number(4)?;
        let mut chosen: Vec<i64> = Vec::new();
        for batch in 0..batches {
            let corner = |i: i64| {
                let b = &boxes[((batch * count + i) * 4) as usize..][..4];
                if centered {
                    [b[1] - b[3] / 2.0, b[0] - b[2] / 2.0, b[1] + b[3] / 2.0, b[0] + b[2] / 2.0]
                } else {
                    [b[0].min(b[2]), b[1].min(b[3]), b[0].max(b[2]), b[1].max(b[3])]
                }
            };
            for class in 0..classes {
                let score = |i: i64| scores[((batch * classes + class) * count + i) as usize];
                let mut order: Vec<i64> = (0..count).filter(|&i| threshold.is_none_or(|t| score(i) > t)).collect();
                order.sort_by(|&i, &j| score(j).total_cmp(&score(i)).then(i.cmp(&j)));
                let mut kept: Vec<i64> = Vec::new();
                for i in order {
                    if kept.len() >= most {
                        break;
                    }
                    if kept.iter().all(|&k| intersection_over_union(corner(i), corner(k)) <= overlap) {
                        kept.push(i);
                    }
                }
                chosen.extend(kept.into_iter().flat_map(|i| [batch, class, i]));
            }
        }
        let rows = chosen.len() as i64 / 3;
        one(Tensor::f_from_slice(&chosen)?.f_reshape([rows, 3])?)
    })
    .host(&[0, 1, 2, 3, 4]))
}

/// Boxes as (y0, x0, y1, x1).
fn intersection_over_union(a: [f64; 4], b: [f64; 4]) -> f64 {
    let area = |b: [f64; 4]| (b[2] - b[0]).max(0.0) * (b[3] - b[1]).max(0.0);
    let common = area([a[0].max(b[0]), a[1].max(b[1]), a[2].min(b[2]), a[3].min(b[3])]);
    let union = area(a) + area(b) - common;
    if common <= 0.0 || union <= 0.0 { 0.0 } else { common / union }
}
