//! Resize and its forerunner Upsample. Every mode that is not exactly libtorch's is refused here.

use tch::Tensor;

use crate::error::{Error, Result};
use crate::graph::Node;
use crate::torch::kernel::{Kernel, one};
use crate::torch::registry::Registry;

pub fn register(r: &mut Registry) {
    r.add("Resize", 10, (1, 4), resize);
    r.add("Upsample", 7, (1, 2), resize);
}

fn resize(node: &Node) -> Result<Kernel> {
    let a = &node.attributes;
    let mode = a.string_or("mode", "nearest")?;
    let old = node.opset < 11 || node.op == "Upsample";
    let coordinates = a.string_or("coordinate_transformation_mode", if old { "asymmetric" } else { "half_pixel" })?;
    let rounding = a.string_or("nearest_mode", if old { "floor" } else { "round_prefer_floor" })?;
    let antialias = a.flag("antialias", false)?;
    let policy = a.string_or("keep_aspect_ratio_policy", "stretch")?;
    let axes = a.ints("axes")?;
    let fixed = a.floats("scales")?;
    a.get("cubic_coeff_a");
    a.get("exclude_outside");
    a.get("extrapolation_value");
    if antialias || policy != "stretch" {
        return Err(Error::unsupported("Resize with antialias or a keep_aspect_ratio_policy"));
    }
    let nearest = match mode.as_str() {
        "nearest" => true,
        "linear" if matches!(coordinates.as_str(), "half_pixel" | "pytorch_half_pixel" | "align_corners") => false,
        _ => return Err(Error::unsupported(format!("Resize mode `{mode}` with `{coordinates}` coordinates"))),
    };
    let (scales_at, sizes_at) = if old { (1, 3) } else { (2, 3) };
    Ok(Kernel::new(move |args| {
        let x = args.t(0)?;
        let input = x.size();
        let rank = input.len();
        let spread = |v: Vec<f64>, rest: &dyn Fn(usize) -> f64| -> Vec<f64> {
            match &axes {
                None => v,
                Some(axes) => {
                    let mut all: Vec<f64> = (0..rank).map(rest).collect();
                    for (&axis, v) in axes.iter().zip(v) {
                        let axis = if axis < 0 { axis + rank as i64 } else { axis };
                        if let Some(slot) = all.get_mut(axis as usize) {
                            *slot = v;
                        }
                    }
                    all
                }
            }
        };
        let scales = match &fixed {
            Some(s) => Some(s.iter().map(|&v| f64::from(v)).collect()),
            None => args.opt_floats(scales_at)?.filter(|s| !s.is_empty()),
        };
        let (sizes, scales) = match (scales, args.opt_floats(sizes_at)?) {
            (Some(s), _) => {
                let s = spread(s, &|_| 1.0);
                (s.iter().zip(&input).map(|(s, &n)| (s * n as f64).floor() as i64).collect::<Vec<_>>(), s)
            }
            (None, Some(sizes)) => {
                let sizes = spread(sizes, &|i| input[i] as f64);
                let scales = sizes.iter().zip(&input).map(|(s, &n)| s / n as f64).collect();
                (sizes.iter().map(|&v| v as i64).collect(), scales)
            }
            (None, None) => return Err(Error::invalid("neither scales nor sizes are given")),
        };
        if sizes.len() != rank || sizes.iter().any(|&n| n < 1) {
            return Err(Error::invalid(format!("cannot resize {input:?} to {sizes:?}")));
        }
        if nearest {
            return one(nearest_resize(x, &sizes, &scales, &coordinates, &rounding)?);
        }
        if rank != 4 || sizes[..2] != input[..2] {
            return Err(Error::unsupported(format!("linear Resize of {input:?} to {sizes:?}")));
        }
        let align = coordinates == "align_corners";
        if coordinates == "pytorch_half_pixel" && sizes[2..].contains(&1) {
            return Err(Error::unsupported("linear Resize to a size of 1 with pytorch_half_pixel"));
        }
        one(x.f_upsample_bilinear2d(&sizes[2..], align, Some(scales[2]), Some(scales[3]))?)
    })
    .host(&[scales_at, sizes_at]))
}

/// By index, exactly as the specification computes coordinates; whole-number upsampling goes to libtorch's kernel.
fn nearest_resize(x: &Tensor, sizes: &[i64], scales: &[f64], coordinates: &str, rounding: &str) -> Result<Tensor> {
    let input = x.size();
    let whole = input.len() == 4
        && sizes[..2] == input[..2]
        && (2..4).all(|i| scales[i].fract() == 0.0 && scales[i] >= 1.0)
        && ((coordinates == "asymmetric" && rounding == "floor") || coordinates == "half_pixel");
    if whole {
        return Ok(x.f_upsample_nearest2d(&sizes[2..], None, None)?);
    }
    let mut y = x.shallow_clone();
    for (axis, (&out, &scale)) in sizes.iter().zip(scales).enumerate() {
        let n = input[axis];
        if out == n && (scale - 1.0).abs() < 1e-12 {
            continue;
        }
        let index = (0..out)
            .map(|i| {
                let i = i as f64;
                let at = match coordinates {
                    "asymmetric" => i / scale,
                    "half_pixel" => (i + 0.5) / scale - 0.5,
                    "pytorch_half_pixel" => {
                        if out > 1 {
                            (i + 0.5) / scale - 0.5
                        } else {
                            0.0
                        }
                    }
                    "align_corners" => {
                        if out > 1 {
                            i * (n - 1) as f64 / (out - 1) as f64
                        } else {
                            0.0
                        }
                    }
                    "half_pixel_symmetric" => {
                        let adjustment = out as f64 / (scale * n as f64);
                        let centre = n as f64 / 2.0;
                        centre * (1.0 - adjustment) + (i + 0.5) / scale - 0.5
                    }
                    other => return Err(Error::unsupported(format!("Resize with `{other}` coordinates"))),
                };
                let at = match rounding {
                    "floor" => at.floor(),
                    "ceil" => at.ceil(),
                    "round_prefer_floor" => (at - 0.5).ceil(),
                    "round_prefer_ceil" => (at + 0.5).floor(),
                    other => return Err(Error::invalid(format!("attribute `nearest_mode` is `{other}`"))),
                };
                Ok((at as i64).clamp(0, n - 1))
            })
            .collect::<Result<Vec<_>>>()?;
        let index = Tensor::f_from_slice(&index)?.f_to_device(y.device())?;
        y = y.f_index_select(axis as i64, &index)?;
    }
    Ok(y)
}
