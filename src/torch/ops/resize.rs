//! Resize and its forerunner Upsample, in all modes. Interpolation is separable: along each axis it is a matrix of
//! coefficients, computed on the host as the specification says. Where libtorch's kernels mean the same they are used.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::graph::Node;
use crate::torch::convert::is_float;
use crate::torch::exec::kernel::{Args, Kernel, one};
use crate::torch::exec::registry::Registry;
use crate::torch::ops::util;

pub fn register(r: &mut Registry) {
    r.add("Resize", 10, (1, 4), resize);
    r.add("Upsample", 7, (1, 2), resize);
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Nearest,
    Linear,
    Cubic,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Coordinates {
    HalfPixel,
    HalfPixelSymmetric,
    PytorchHalfPixel,
    AlignCorners,
    Asymmetric,
    TfCropAndResize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rounding {
    PreferFloor,
    PreferCeil,
    Floor,
    Ceil,
    /// Before opset 11 the specification said nothing; ONNX Runtime rounds up where it shrinks, down where it grows.
    Old,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Policy {
    Stretch,
    NotLarger,
    NotSmaller,
}

#[derive(Debug, Clone)]
struct Options {
    mode: Mode,
    coordinates: Coordinates,
    rounding: Rounding,
    antialias: bool,
    policy: Policy,
    axes: Option<Vec<i64>>,
    cubic_a: f64,
    exclude_outside: bool,
    extrapolation: f64,
}

/// What happens along one axis.
#[derive(Debug, Clone, Copy)]
struct Axis {
    input: i64,
    output: i64,
    scale: f64,
    roi: (f64, f64),
}

fn resize(node: &Node) -> Result<Kernel> {
    let a = &node.attributes;
    let old = node.opset < 11 || node.op == "Upsample";
    let wrong = |name: &str, value: &str| Error::invalid(format!("attribute `{name}` is `{value}`"));
    let mode = a.string_or("mode", "nearest")?;
    let coordinates = a.string_or("coordinate_transformation_mode", if old { "asymmetric" } else { "half_pixel" })?;
    let rounding = a.string_or("nearest_mode", if old { "old" } else { "round_prefer_floor" })?;
    let policy = a.string_or("keep_aspect_ratio_policy", "stretch")?;
    let options = Options {
        mode: match mode.as_str() {
            "nearest" => Mode::Nearest,
            "linear" | "bilinear" => Mode::Linear,
            "cubic" => Mode::Cubic,
            other => return Err(wrong("mode", other)),
        },
        coordinates: match coordinates.as_str() {
            "half_pixel" => Coordinates::HalfPixel,
            "half_pixel_symmetric" => Coordinates::HalfPixelSymmetric,
            "pytorch_half_pixel" => Coordinates::PytorchHalfPixel,
            "align_corners" => Coordinates::AlignCorners,
            "asymmetric" => Coordinates::Asymmetric,
            "tf_crop_and_resize" => Coordinates::TfCropAndResize,
            "tf_half_pixel_for_nn" => {
                return Err(Error::unsupported("Resize with tf_half_pixel_for_nn coordinates, withdrawn in opset 13")
                    .hint("export with opset 13 or newer"));
            }
            other => return Err(wrong("coordinate_transformation_mode", other)),
        },
        rounding: match rounding.as_str() {
            "round_prefer_floor" => Rounding::PreferFloor,
            "round_prefer_ceil" => Rounding::PreferCeil,
            "floor" => Rounding::Floor,
            "ceil" => Rounding::Ceil,
            "old" if old => Rounding::Old,
            other => return Err(wrong("nearest_mode", other)),
        },
        antialias: a.flag("antialias", false)?,
        policy: match policy.as_str() {
            "stretch" => Policy::Stretch,
            "not_larger" => Policy::NotLarger,
            "not_smaller" => Policy::NotSmaller,
            other => return Err(wrong("keep_aspect_ratio_policy", other)),
        },
        axes: a.ints("axes")?,
        cubic_a: a.float_or("cubic_coeff_a", -0.75)?,
        exclude_outside: a.flag("exclude_outside", false)?,
        extrapolation: a.float_or("extrapolation_value", 0.0)?,
    };
    if options.antialias && options.mode == Mode::Nearest {
        return Err(Error::invalid("nearest Resize with antialias"));
    }
    let fixed: Option<Vec<f64>> = a.floats("scales")?.map(|s| s.into_iter().map(f64::from).collect());
    let host: &[usize] = if old { &[1] } else { &[1, 2, 3] };
    Ok(Kernel::new(move |args| {
        let x = args.t(0)?;
        let axes = options.geometry(args, &x.size(), old, &fixed)?;
        options.refuse_disputed(&axes)?;
        one(options.run(x, &axes)?)
    })
    .host(host))
}

impl Options {
    /// Sizes, scales and regions from whichever of the inputs are given.
    fn geometry(&self, args: &Args, input: &[i64], old: bool, fixed: &Option<Vec<f64>>) -> Result<Vec<Axis>> {
        let rank = input.len();
        let listed = match &self.axes {
            Some(list) => util::axes(list, rank)?,
            None => (0..rank as i64).collect(),
        };
        let given = |v: Option<Vec<f64>>, what: &str| match v {
            Some(v) if v.is_empty() => Ok(None),
            Some(v) if v.len() != listed.len() => {
                Err(Error::invalid(format!("{} {what} for {} axes", v.len(), listed.len())))
            }
            v => Ok(v),
        };
        let (scales, sizes) = if old {
            let scales = if fixed.is_some() { fixed.clone() } else { args.opt_floats(1)? };
            (given(scales, "scales")?, None)
        } else {
            (given(args.opt_floats(2)?, "scales")?, given(args.opt_floats(3)?, "sizes")?)
        };
        let region = if self.coordinates == Coordinates::TfCropAndResize {
            let roi = args.opt_floats(1)?.unwrap_or_default();
            if roi.len() != 2 * listed.len() {
                return Err(Error::invalid(format!("a region of {} numbers for {} axes", roi.len(), listed.len())));
            }
            roi
        } else {
            Vec::new()
        };
        let mut axes: Vec<Axis> =
            input.iter().map(|&n| Axis { input: n, output: n, scale: 1.0, roi: (0.0, 1.0) }).collect();
        let ratio = |k: usize, size: f64| size / axes[listed[k] as usize].input as f64;
        let common = match (&sizes, self.policy) {
            (None, _) | (_, Policy::Stretch) => None,
            (Some(s), Policy::NotLarger) => s.iter().enumerate().map(|(k, &s)| ratio(k, s)).reduce(f64::min),
            (Some(s), Policy::NotSmaller) => s.iter().enumerate().map(|(k, &s)| ratio(k, s)).reduce(f64::max),
        };
        for (k, &axis) in listed.iter().enumerate() {
            let a = &mut axes[axis as usize];
            let n = a.input as f64;
            match (&scales, &sizes, common) {
                // In f32, as ONNX Runtime: 3 elements by 5/3 are 5, although 5/3 in f32 is a little less.
                (Some(s), _, _) => (a.scale, a.output) = (s[k], (s[k] as f32 * n as f32).floor() as i64),
                (None, Some(_), Some(scale)) => (a.scale, a.output) = (scale, (scale * n + 0.5).floor() as i64),
                (None, Some(s), None) => (a.scale, a.output) = (s[k] / n, s[k] as i64),
                (None, None, _) => return Err(Error::invalid("neither scales nor sizes are given")),
            }
            if !region.is_empty() {
                a.roi = (region[k], region[listed.len() + k]);
            }
            if !(a.scale > 0.0 && a.scale.is_finite()) || a.output < 0 || a.input == 0 && a.output > 0 {
                return Err(Error::invalid(format!("cannot resize {n} elements by {} to {}", a.scale, a.output)));
            }
        }
        util::affordable(&axes.iter().map(|a| a.output).collect::<Vec<_>>())?;
        Ok(axes)
    }

    /// Corners in which ONNX Runtime, the reference evaluator and the frameworks compute different things.
    fn refuse_disputed(&self, axes: &[Axis]) -> Result<()> {
        let disputed = |what: &str, way_out: &str| {
            Err(Error::unsupported(format!("{what}: implementations disagree")).hint(way_out.to_owned()))
        };
        let fractional = |a: &Axis| (a.scale * a.input as f64 - a.output as f64).abs() > 1e-3;
        let rescaled = |a: &Axis| a.input == a.output && a.scale != 1.0;
        let crops = self.coordinates == Coordinates::TfCropAndResize;
        if (crops || self.coordinates == Coordinates::AlignCorners) && axes.iter().any(fractional) {
            return disputed(
                "Resize with align_corners or tf_crop_and_resize to a scale that leaves a fraction of an element",
                "export with output sizes instead of scales",
            );
        }
        if crops && axes.iter().any(|a| a.input == a.output && a.roi != (0.0, 1.0)) {
            return disputed(
                "Resize with tf_crop_and_resize that crops an axis without resizing it",
                "crop this axis with Slice before",
            );
        }
        if axes.iter().any(rescaled) && (self.antialias || axes.iter().all(|a| a.input == a.output)) {
            return disputed(
                "Resize by a scale that leaves the size as it is",
                "export with output sizes instead of scales, or without this node",
            );
        }
        let close = |v: f64| (v - v.round()).abs() < 1e-5;
        let on_edge = |a: &Axis| {
            a.input != a.output
                && (0..a.output.min(1 << 16)).any(|i| {
                    let at = self.coordinate(a, i as f64);
                    close(at) && matches!(self.rounding, Rounding::Floor | Rounding::Ceil) || close(at + 0.5)
                })
        };
        if self.mode == Mode::Nearest && self.coordinates == Coordinates::HalfPixelSymmetric && axes.iter().any(on_edge)
        {
            return disputed(
                "nearest Resize with half_pixel_symmetric coordinates that fall between two elements",
                "export with half_pixel or asymmetric coordinates",
            );
        }
        Ok(())
    }

    fn run(&self, x: &Tensor, axes: &[Axis]) -> Result<Tensor> {
        if let Some(y) = self.native(x, axes)? {
            return Ok(y);
        }
        if self.mode != Mode::Nearest && !is_float(x.kind()) {
            return Err(Error::unsupported(format!("interpolating Resize of {:?}", x.kind())));
        }
        let mut y = x.shallow_clone();
        for (i, axis) in axes.iter().enumerate() {
            let whole = axis.roi == (0.0, 1.0) || self.coordinates != Coordinates::TfCropAndResize;
            if axis.input == axis.output && (axis.scale - 1.0).abs() < 1e-9 && whole {
                continue;
            }
            y = self.along(&y, i as i64, axis)?;
        }
        Ok(y)
    }

    /// libtorch's kernels, where they compute the same.
    fn native(&self, x: &Tensor, axes: &[Axis]) -> Result<Option<Tensor>> {
        let rank = axes.len();
        let kept = |a: &Axis| a.input == a.output && a.scale == 1.0;
        if !(3..=5).contains(&rank) || !axes[..2].iter().all(kept) || !is_float(x.kind()) || self.antialias {
            return Ok(None);
        }
        let spatial = &axes[2..];
        let sizes: Vec<i64> = spatial.iter().map(|a| a.output).collect();
        if sizes.contains(&0) {
            return Ok(None);
        }
        if self.mode == Mode::Nearest {
            let rounds = matches!(self.rounding, Rounding::PreferFloor | Rounding::PreferCeil);
            let same = match self.coordinates {
                Coordinates::Asymmetric => matches!(self.rounding, Rounding::Floor | Rounding::Old),
                Coordinates::HalfPixel => rounds,
                _ => false,
            };
            let whole = spatial.iter().all(|a| a.scale.fract() == 0.0 && a.scale * a.input as f64 == a.output as f64);
            return Ok(match (same && whole, rank) {
                (false, _) => None,
                (_, 3) => Some(x.f_upsample_nearest1d(&sizes[..], None)?),
                (_, 4) => Some(x.f_upsample_nearest2d(&sizes[..], None, None)?),
                _ => Some(x.f_upsample_nearest3d(&sizes[..], None, None, None)?),
            });
        }
        let align = self.coordinates == Coordinates::AlignCorners;
        let same = match self.coordinates {
            Coordinates::HalfPixel | Coordinates::AlignCorners => true,
            Coordinates::PytorchHalfPixel => !sizes.contains(&1),
            _ => false,
        };
        // libtorch copies an axis whose size stays, whatever the scale.
        let copied = spatial.iter().any(|a| a.input == a.output && a.scale != 1.0);
        if !same || copied || self.exclude_outside {
            return Ok(None);
        }
        let s: Vec<f64> = spatial.iter().map(|a| a.scale).collect();
        Ok(match (self.mode, rank) {
            (Mode::Linear, 3) => Some(x.f_upsample_linear1d(&sizes[..], align, s[0])?),
            (Mode::Linear, 4) => Some(x.f_upsample_bilinear2d(&sizes[..], align, s[0], s[1])?),
            (Mode::Linear, 5) => Some(x.f_upsample_trilinear3d(&sizes[..], align, s[0], s[1], s[2])?),
            (Mode::Cubic, 4) if self.cubic_a == -0.75 => Some(x.f_upsample_bicubic2d(&sizes[..], align, s[0], s[1])?),
            _ => None,
        })
    }

    fn along(&self, x: &Tensor, dim: i64, axis: &Axis) -> Result<Tensor> {
        let matrix = if self.mode == Mode::Nearest { 1 } else { axis.input };
        util::table_len(axis.output.saturating_mul(matrix))?;
        // Antialias widens the kernel to the input's size at most; more is a scale that makes no sense.
        if self.antialias && 1.0 / axis.scale > 4.0 * axis.input as f64 + 4.0 {
            return Err(Error::invalid(format!(
                "antialias with a scale of {} for {} elements",
                axis.scale, axis.input
            )));
        }
        let rows: Vec<Row> = (0..axis.output).map(|i| self.row(axis, i as f64)).collect();
        let y = if self.mode == Mode::Nearest {
            let index: Vec<i64> = rows.iter().map(|r| r.first.clamp(0, axis.input - 1)).collect();
            x.f_index_select(dim, &util::vector(&index, x)?)?
        } else {
            let (n, m) = (axis.input as usize, axis.output as usize);
            let mut matrix = vec![0f64; n * m];
            for (i, row) in rows.iter().enumerate() {
                for (k, c) in row.coefficients.iter().enumerate() {
                    let at = (row.first + k as i64).clamp(0, axis.input - 1) as usize;
                    matrix[i * n + at] += c;
                }
            }
            // f16 and bf16 products accumulate in f32 on every device.
            let kind = if x.kind() == Kind::Double { Kind::Double } else { Kind::Float };
            let matrix = util::vector(&matrix, x)?.f_to_kind(kind)?.f_reshape([axis.output, axis.input])?;
            let last = x.f_to_kind(kind)?.f_transpose(dim, -1)?;
            last.f_matmul(&matrix.f_transpose(0, 1)?)?.f_transpose(dim, -1)?.f_to_kind(x.kind())?
        };
        if rows.iter().all(|r| !r.outside) {
            return Ok(y);
        }
        let outside: Vec<bool> = rows.iter().map(|r| r.outside).collect();
        let mask = util::along(&util::vector(&outside, x)?, dim, x.dim())?;
        Ok(y.f_masked_fill(&mask, self.extrapolation)?)
    }

    /// Where output element `i` lies in the input. In f32, as ONNX Runtime computes it: a scale of 2.3 is no ratio of whole
    /// numbers, and in more precision what were halves would round the other way.
    fn coordinate(&self, a: &Axis, i: f64) -> f64 {
        if self.coordinates == Coordinates::HalfPixelSymmetric {
            let n = a.input as f64;
            let adjustment = a.output as f64 / (a.scale * n);
            return n / 2.0 * (1.0 - adjustment) + (i + 0.5) / a.scale - 0.5;
        }
        let (i, n, scale) = (i as f32, a.input as f32, a.scale as f32);
        f64::from(self.coordinate_f32(a, i, n, scale))
    }

    fn coordinate_f32(&self, a: &Axis, i: f32, n: f32, scale: f32) -> f32 {
        let width = a.output as f32;
        match self.coordinates {
            Coordinates::Asymmetric => i / scale,
            Coordinates::HalfPixel | Coordinates::HalfPixelSymmetric => (i + 0.5) / scale - 0.5,
            Coordinates::PytorchHalfPixel if width == 1.0 => 0.0,
            Coordinates::PytorchHalfPixel => (i + 0.5) / scale - 0.5,
            Coordinates::AlignCorners if width == 1.0 => 0.0,
            Coordinates::AlignCorners => i * (n - 1.0) / (width - 1.0),
            Coordinates::TfCropAndResize => {
                let (start, end) = (a.roi.0 as f32, a.roi.1 as f32);
                let inner = if width == 1.0 {
                    (end - start) * (n - 1.0) / 2.0
                } else {
                    i * (end - start) * (n - 1.0) / (width - 1.0)
                };
                inner + start * (n - 1.0)
            }
        }
    }

    fn row(&self, a: &Axis, i: f64) -> Row {
        let at = self.coordinate(a, i);
        let outside = self.coordinates == Coordinates::TfCropAndResize && (at < 0.0 || at > (a.input - 1) as f64);
        if self.mode == Mode::Nearest {
            let index = match self.rounding {
                Rounding::Floor => at.floor(),
                Rounding::Ceil => at.ceil(),
                Rounding::Old => {
                    if a.scale < 1.0 {
                        at.ceil()
                    } else {
                        at.floor()
                    }
                }
                Rounding::PreferFloor => (at - 0.5).ceil(),
                Rounding::PreferCeil => (at + 0.5).floor(),
            };
            return Row { first: index as i64, coefficients: Vec::new(), outside };
        }
        let floor = at.floor();
        let t = at - floor;
        let reach = if self.mode == Mode::Linear { 1.0 } else { 2.0 };
        // Shrinking with antialias widens the kernel.
        let shrink = if self.antialias { a.scale.min(1.0) } else { 1.0 };
        let start = (-reach / shrink).floor() as i64 + 1;
        let count = 2 - 2 * start;
        let mut c: Vec<f64> = (start..start + count)
            .map(|k| {
                let d = ((k as f64 - t) * shrink).abs();
                if self.mode == Mode::Linear { (1.0 - d).max(0.0) } else { cubic(d, self.cubic_a) }
            })
            .collect();
        let first = floor as i64 + start;
        if self.exclude_outside {
            for (k, v) in c.iter_mut().enumerate() {
                if !(0..a.input).contains(&(first + k as i64)) {
                    *v = 0.0;
                }
            }
        }
        if self.antialias || self.exclude_outside {
            let sum: f64 = c.iter().sum();
            if sum != 0.0 {
                c.iter_mut().for_each(|v| *v /= sum);
            }
        }
        Row { first, coefficients: c, outside }
    }
}

/// One output element: consecutive input elements from `first` on, with their coefficients.
struct Row {
    first: i64,
    coefficients: Vec<f64>,
    outside: bool,
}

/// Keys' convolution kernel at distance `d`.
fn cubic(d: f64, a: f64) -> f64 {
    if d <= 1.0 {
        ((a + 2.0) * d - (a + 3.0)) * d * d + 1.0
    } else if d < 2.0 {
        ((a * d - 5.0 * a) * d + 8.0 * a) * d - 4.0 * a
    } else {
        0.0
    }
}
