//! Pooling. libtorch's own kernels where they mean the same, else windows as views of the padded input, so that uneven
//! padding, dilation and ceil_mode follow the specification to the letter.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::graph::Node;
use crate::torch::convert::is_float;
use crate::torch::exec::kernel::{Kernel, Value, one};
use crate::torch::exec::registry::Registry;
use crate::torch::ops::conv::{AutoPad, Window, pad_spatial};
use crate::torch::ops::util;

pub fn register(r: &mut Registry) {
    r.add("GlobalAveragePool", 1, (1, 1), |_| {
        Ok(Kernel::new(|a| {
            let x = a.t(0)?;
            one(x.f_mean_dim(&spatial(x)[..], true, None)?)
        }))
    });
    r.add("GlobalMaxPool", 1, (1, 1), |_| {
        Ok(Kernel::new(|a| {
            let x = a.t(0)?;
            one(x.f_amax(&spatial(x)[..], true)?)
        }))
    });
    r.add("GlobalLpPool", 2, (1, 1), |n| {
        let p = n.attributes.int_or("p", 2)? as f64;
        Ok(Kernel::new(move |a| {
            let x = a.t(0)?;
            one(power_mean(x, p, &spatial(x), true)?)
        }))
    });
    r.add("AveragePool", 1, (1, 1), average_pool);
    r.add("MaxPool", 1, (1, 1), max_pool);
    r.add("LpPool", 2, (1, 1), lp_pool);
    r.add("MaxUnpool", 9, (2, 3), max_unpool);
}

fn spatial(x: &Tensor) -> Vec<i64> {
    (2..x.dim() as i64).collect()
}

/// (sum |x|^p)^(1/p)
fn power_mean(x: &Tensor, p: f64, axes: &[i64], keep: bool) -> Result<Tensor> {
    let sum = |t: Tensor| t.f_sum_dim_intlist(axes, keep, t.kind());
    Ok(if p == 1.0 {
        sum(x.f_abs()?)?
    } else if p == 2.0 {
        sum(x.f_square()?)?.f_sqrt()?
    } else {
        sum(x.f_abs()?.f_pow_tensor_scalar(p)?)?.f_pow_tensor_scalar(1.0 / p)?
    })
}

struct Pool {
    window: Window,
    kernel: Vec<i64>,
    ceil: bool,
}

/// Sizes of one call.
struct Geometry {
    strides: Vec<i64>,
    dilations: Vec<i64>,
    /// As declared: what `count_include_pad` counts.
    pads: Vec<(i64, i64)>,
    output: Vec<i64>,
}

impl Pool {
    fn parse(node: &Node) -> Result<Self> {
        let window = Window::parse(node)?;
        let kernel = window.kernel.clone().ok_or_else(|| Error::invalid("attribute `kernel_shape` is missing"))?;
        Ok(Self { window, kernel, ceil: node.attributes.flag("ceil_mode", false)? })
    }

    /// Corners of automatic padding in which ONNX Runtime and the specification part.
    fn refuse_disputed(&self, input: &[i64], strides: &[i64], dilations: &[i64]) -> Result<()> {
        let axes = || (0..input.len()).map(|i| (input[i], self.kernel[i], strides[i], dilations[i]));
        let what = match self.window.auto_pad {
            AutoPad::NotSet => return Ok(()),
            AutoPad::Valid if self.ceil && axes().any(|(n, k, s, d)| (n - d * (k - 1) - 1) % s != 0) => {
                "pooling with auto_pad VALID and ceil_mode"
            }
            AutoPad::SameUpper | AutoPad::SameLower if axes().any(|(_, k, _, d)| d > 1 && k > 1) => {
                "pooling with auto_pad SAME and dilations"
            }
            // What the windows do not reach would be cut off on both sides.
            AutoPad::SameUpper | AutoPad::SameLower
                if axes().any(|(n, k, s, _)| (((n + s - 1) / s - 1) * s + k - n) < -1) =>
            {
                "pooling with auto_pad SAME and strides beyond the window"
            }
            _ => return Ok(()),
        };
        Err(Error::unsupported(format!("{what}: implementations disagree")).hint("export with explicit pads"))
    }

    fn geometry(&self, x: &Tensor) -> Result<Geometry> {
        let rank = self.kernel.len();
        if x.dim() != rank + 2 {
            return Err(Error::invalid(format!("input of rank {} for {rank} spatial dimensions", x.dim())));
        }
        let input = &x.size()[2..];
        let (strides, dilations) = (self.window.strides(rank)?, self.window.dilations(rank)?);
        let pads = self.window.padding(input, &self.kernel)?;
        self.refuse_disputed(input, &strides, &dilations)?;
        let ceil = self.ceil && self.window.auto_pad == AutoPad::NotSet;
        let output = (0..rank)
            .map(|i| {
                let (begin, end) = pads[i];
                let room = input[i] + begin + end - (dilations[i] * (self.kernel[i] - 1) + 1);
                if room < 0 {
                    return Err(Error::unsupported(format!("a window larger than the padded input {:?}", x.size()))
                        .hint("feed larger inputs, or export with pads"));
                }
                let mut n = if ceil { (room + strides[i] - 1) / strides[i] } else { room / strides[i] } + 1;
                // No window may start in the padding behind the input.
                if ceil && (n - 1) * strides[i] >= input[i] + begin {
                    n -= 1;
                }
                Ok(n)
            })
            .collect::<Result<_>>()?;
        Ok(Geometry { strides, dilations, pads, output })
    }
}

impl Geometry {
    /// Whether libtorch's kernels can do it: as much padding before as behind, at most half a window.
    fn native(&self, kernel: &[i64]) -> Option<Vec<i64>> {
        let fits = self.pads.iter().zip(kernel).all(|(&(b, e), &k)| b == e && b >= 0 && 2 * b <= k);
        (fits && (1..=3).contains(&kernel.len())).then(|| self.pads.iter().map(|p| p.0).collect())
    }

    /// `[N, C, out..., kernel...]`: every window of `x`, padded with `value`.
    fn windows(&self, x: &Tensor, kernel: &[i64], value: f64) -> Result<Tensor> {
        let input = x.size()[2..].to_vec();
        let spans: Vec<i64> = kernel.iter().zip(&self.dilations).map(|(k, d)| d * (k - 1) + 1).collect();
        // Behind, as much as the last window needs: more than declared under ceil_mode, or less.
        let pads: Vec<(i64, i64)> = (0..kernel.len())
            .map(|i| {
                let begin = self.pads[i].0;
                (begin, (self.output[i] - 1) * self.strides[i] + spans[i] - input[i] - begin)
            })
            .collect();
        let mut y = if pads.iter().all(|&p| p == (0, 0)) { x.shallow_clone() } else { pad_spatial(x, &pads, value)? };
        for i in 0..kernel.len() {
            y = y.f_unfold(2 + i as i64, spans[i], self.strides[i])?;
            if self.dilations[i] > 1 {
                y = y.f_slice(-1, None, None, self.dilations[i])?;
            }
        }
        Ok(y)
    }

    /// For each output position of dimension `i`, how many of its window's elements count.
    fn counts(&self, i: usize, kernel: i64, input: i64, include: bool) -> Vec<f64> {
        let (begin, end) = if include { self.pads[i] } else { (0, 0) };
        (0..self.output[i])
            .map(|o| {
                let start = o * self.strides[i] - self.pads[i].0;
                let inside = |k: &i64| (-begin..input + end).contains(&(start + k * self.dilations[i]));
                (0..kernel).filter(inside).count() as f64
            })
            .collect()
    }
}

fn window_axes(rank: usize) -> Vec<i64> {
    (-(rank as i64)..0).collect()
}

fn average_pool(node: &Node) -> Result<Kernel> {
    let pool = Pool::parse(node)?;
    let include = node.attributes.flag("count_include_pad", false)?;
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let g = pool.geometry(x)?;
        let k = &pool.kernel[..];
        let rank = k.len();
        if let Some(p) = g.native(k).filter(|_| g.dilations.iter().all(|&d| d == 1)) {
            let s = &g.strides[..];
            return one(match rank {
                1 => x.f_avg_pool1d(k, s, &p[..], pool.ceil, include)?,
                2 => x.f_avg_pool2d(k, s, &p[..], pool.ceil, include, None)?,
                _ => x.f_avg_pool3d(k, s, &p[..], pool.ceil, include, None)?,
            });
        }
        let mut y = g.windows(x, k, 0.0)?.f_sum_dim_intlist(&window_axes(rank)[..], false, x.kind())?;
        for i in 0..rank {
            let counts = util::vector(&g.counts(i, k[i], x.size()[2 + i], include), x)?.f_to_kind(x.kind())?;
            y = y.f_div(&util::along(&counts, 2 + i as i64, rank + 2)?)?;
        }
        one(y)
    }))
}

fn lp_pool(node: &Node) -> Result<Kernel> {
    let pool = Pool::parse(node)?;
    let p = node.attributes.int_or("p", 2)? as f64;
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let windows = pool.geometry(x)?.windows(x, &pool.kernel, 0.0)?;
        one(power_mean(&windows, p, &window_axes(pool.kernel.len()), false)?)
    }))
}

/// The second output counts through the whole input, in row-major or (`storage_order`) column-major order of its planes.
fn max_pool(node: &Node) -> Result<Kernel> {
    let pool = Pool::parse(node)?;
    let column_major = node.attributes.flag("storage_order", false)?;
    let want_index = node.output(1).is_some();
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let g = pool.geometry(x)?;
        let k = &pool.kernel[..];
        let rank = k.len();
        if let Some(p) = g.native(k).filter(|_| !want_index && is_float(x.kind())) {
            let (s, d) = (&g.strides[..], &g.dilations[..]);
            return one(match rank {
                1 => x.f_max_pool1d(k, s, &p[..], d, pool.ceil)?,
                2 => x.f_max_pool2d(k, s, &p[..], d, pool.ceil)?,
                _ => x.f_max_pool3d(k, s, &p[..], d, pool.ceil)?,
            });
        }
        let windows = g.windows(x, k, util::limit(x.kind(), false))?;
        if !want_index {
            return one(windows.f_amax(&window_axes(rank)[..], false)?);
        }
        let size = x.size();
        let planes = &size[2..];
        let area: i64 = planes.iter().product();
        let mut flat = vec![size[0], size[1]];
        flat.extend(&g.output);
        flat.push(-1);
        let windows = windows.f_reshape(&flat[..])?;
        let axis = rank as i64 + 2;
        let best = util::extreme_index(&windows, axis, false, false, true)?;
        let ids = Tensor::f_arange(area, (Kind::Int64, x.device()))?;
        let mut shape = vec![1, 1];
        let ids = if column_major {
            shape.extend(planes.iter().rev());
            let back: Vec<i64> = [0, 1].into_iter().chain((2..2 + rank as i64).rev()).collect();
            ids.f_reshape(&shape[..])?.f_permute(&back[..])?
        } else {
            shape.extend(planes);
            ids.f_reshape(&shape[..])?
        };
        let mut every = windows.size();
        (every[0], every[1]) = (1, 1);
        let ids = g.windows(&ids, k, 0.0)?.f_reshape(&every[..])?.f_expand(&windows.size()[..], false)?;
        let offsets = Tensor::f_arange(size[0] * size[1], (Kind::Int64, x.device()))?.f_mul_scalar(area)?;
        let mut per_plane = vec![1i64; rank + 2];
        (per_plane[0], per_plane[1]) = (size[0], size[1]);
        let index =
            ids.f_gather(axis, &best, false)?.f_squeeze_dim(axis)?.f_add(&offsets.f_reshape(&per_plane[..])?)?;
        let values = windows.f_gather(axis, &best, false)?.f_squeeze_dim(axis)?;
        Ok(vec![Value::device(values), Value::device(index)])
    }))
}

fn max_unpool(node: &Node) -> Result<Kernel> {
    let window = Window::parse(node)?;
    let kernel = window.kernel.clone().ok_or_else(|| Error::invalid("attribute `kernel_shape` is missing"))?;
    Ok(Kernel::new(move |a| {
        let (x, index) = (a.t(0)?, a.t(1)?);
        let rank = kernel.len();
        if x.dim() != rank + 2 {
            return Err(Error::invalid(format!("input of rank {} for {rank} spatial dimensions", x.dim())));
        }
        let strides = window.strides(rank)?;
        let pads = window.padding(&x.size()[2..], &kernel)?;
        let mut inferred = x.size()[..2].to_vec();
        inferred.extend((0..rank).map(|i| (x.size()[2 + i] - 1) * strides[i] - pads[i].0 - pads[i].1 + kernel[i]));
        let total: i64 = inferred.iter().product();
        let y = Tensor::f_zeros([total], (x.kind(), x.device()))?
            .f_scatter(0, &index.f_reshape([-1])?, &x.f_reshape([-1])?)?
            .f_reshape(&inferred[..])?;
        let Some(shape) = a.opt_ints(2)? else { return one(y) };
        if shape.len() != inferred.len() || shape.iter().zip(&inferred).any(|(s, i)| s < i) {
            return Err(Error::unsupported(format!("output_shape {shape:?} below the inferred {inferred:?}")));
        }
        let grow: Vec<i64> = shape.iter().zip(&inferred).rev().flat_map(|(s, i)| [0, s - i]).collect();
        one(y.f_pad(&grow[..], "constant", 0.0)?)
    })
    .host(&[2]))
}
