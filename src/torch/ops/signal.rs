//! Fourier transforms, windows, mel scale.

use std::f64::consts::PI;

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::graph::Node;
use crate::tensor::DType;
use crate::torch::convert;
use crate::torch::exec::kernel::{Kernel, one};
use crate::torch::exec::registry::Registry;
use crate::torch::ops::util;

pub fn register(r: &mut Registry) {
    r.add("DFT", 17, (1, 3), dft);
    r.add("STFT", 17, (2, 4), stft);
    r.add("HannWindow", 17, (1, 1), |n| window(n, |t| t.cos() * -0.5 + 0.5));
    r.add("HammingWindow", 17, (1, 1), |n| window(n, |t| 25.0 / 46.0 - t.cos() * 21.0 / 46.0));
    r.add("BlackmanWindow", 17, (1, 1), |n| window(n, |t| 0.42 - 0.5 * t.cos() + 0.08 * (2.0 * t).cos()));
    r.add("MelWeightMatrix", 17, (5, 5), mel_weights);
}

/// The last dimension of `x` holds one real number or a complex pair; the result lacks it and is real or complex.
fn signal(x: &Tensor) -> Result<(Tensor, bool)> {
    match x.size().last() {
        Some(1) => Ok((x.f_squeeze_dim(-1)?, false)),
        Some(2) => Ok((x.f_contiguous()?.f_view_as_complex()?, true)),
        last => Err(Error::invalid(format!("a last dimension of {last:?}, expected 1 or 2"))),
    }
}

/// The axis is an attribute (default 1) at opset 17, an input (default -2) since opset 20.
fn dft(node: &Node) -> Result<Kernel> {
    let inverse = node.attributes.flag("inverse", false)?;
    let onesided = node.attributes.flag("onesided", false)?;
    let fixed = if node.opset < 20 { Some(node.attributes.int_or("axis", 1)?) } else { None };
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let axis = match fixed {
            Some(axis) => axis,
            None if a.has(2) => a.scalar(2)? as i64,
            None => -2,
        };
        let axis = util::axis(axis, x.dim())?;
        if axis + 1 == x.dim() as i64 {
            return Err(Error::invalid("the transform's axis is the one of real and imaginary parts"));
        }
        let length = if a.has(1) { Some(a.scalar(1)? as i64) } else { None };
        let (t, complex) = signal(x)?;
        if inverse && onesided {
            return one(t.f_fft_irfft(length, axis, "backward")?.f_unsqueeze(-1)?);
        }
        let y = match (inverse, onesided) {
            (true, _) => t.f_fft_ifft(length, axis, "backward")?,
            (false, true) if !complex => t.f_fft_rfft(length, axis, "backward")?,
            (false, _) => t.f_fft_fft(length, axis, "backward")?,
        };
        let bins = y.size()[axis as usize];
        let y = if onesided && complex { y.f_narrow(axis, 0, bins / 2 + 1)? } else { y };
        one(y.f_view_as_real()?)
    })
    .host(&[1, 2]))
}

/// signal [B, L, 1 or 2], step, window [N], length of a frame: [B, frames, bins, 2].
fn stft(node: &Node) -> Result<Kernel> {
    let onesided = node.attributes.flag("onesided", true)?;
    Ok(Kernel::new(move |a| {
        let (t, complex) = signal(a.t(0)?)?;
        if t.dim() != 2 {
            return Err(Error::invalid(format!("signal of shape {:?}", a.t(0)?.size())));
        }
        let step = a.scalar(1)? as i64;
        let window = a.opt(2)?;
        let length = match (a.has(3), window) {
            (true, _) => a.scalar(3)? as i64,
            (false, Some(w)) => util::dim(w, 0)?,
            (false, None) => t.size()[1],
        };
        if step < 1 || length < 1 || window.is_some_and(|w| w.size() != [length]) {
            return Err(Error::invalid(format!("frames of {length} elements in steps of {step}")));
        }
        let mut frames = t.f_unfold(1, length, step)?;
        if let Some(w) = window {
            frames = frames.f_mul(w)?;
        }
        let y = match (onesided, complex) {
            (true, true) => frames.f_fft_fft(None, 2, "backward")?.f_narrow(2, 0, length / 2 + 1)?,
            (true, false) => frames.f_fft_rfft(None, 2, "backward")?,
            (false, _) => frames.f_fft_fft(None, 2, "backward")?,
        };
        one(y.f_view_as_real()?)
    })
    .host(&[1, 3]))
}

fn output_kind(node: &Node) -> Result<Kind> {
    let code = node.attributes.int_or("output_datatype", 1)?;
    Ok(convert::kind(DType::from_onnx(i32::try_from(code).unwrap_or(-1))?))
}

/// `f` of the angle 2 pi n / N, with N the size (periodic) or one less (symmetric).
fn window(node: &Node, f: fn(f64) -> f64) -> Result<Kernel> {
    let kind = output_kind(node)?;
    let periodic = node.attributes.flag("periodic", true)?;
    Ok(Kernel::new(move |a| {
        let size = a.scalar(0)? as i64;
        util::table_len(size)?;
        let turn = if periodic { size } else { size - 1 } as f64;
        let values: Vec<f64> = (0..size).map(|n| f(2.0 * PI * n as f64 / turn)).collect();
        one(Tensor::f_from_slice(&values)?.f_to_kind(kind)?.f_to_device(a.device())?)
    })
    .host(&[0]))
}

/// Triangles over the bins of a transform, equally spaced on the mel scale: [bins, mel bins].
fn mel_weights(node: &Node) -> Result<Kernel> {
    let kind = output_kind(node)?;
    Ok(Kernel::new(move |a| {
        let (mels, length, rate) = (util::table_len(a.scalar(0)? as i64)?, a.scalar(1)? as i64, a.scalar(2)?);
        util::table_len((length / 2).saturating_add(1).saturating_mul(mels as i64))?;
        let mel = |hertz: f64| 2595.0 * (1.0 + hertz / 700.0).log10();
        let (low, high) = (mel(a.scalar(3)?), mel(a.scalar(4)?));
        let step = (high - low) / (mels + 2) as f64;
        let bins = (length / 2 + 1) as usize;
        let edges: Vec<usize> = (0..mels + 2)
            .map(|i| {
                let hertz = 700.0 * (10f64.powf((i as f64 * step + low) / 2595.0) - 1.0);
                (((length + 1) as f64 * hertz) / rate).floor().max(0.0) as usize
            })
            .collect();
        if edges.iter().any(|&e| e > bins) {
            return Err(Error::invalid("the upper edge lies above half of the sample rate"));
        }
        let mut matrix = vec![0f64; bins * mels];
        for m in 0..mels {
            let (left, centre, right) = (edges[m], edges[m + 1], edges[m + 2]);
            let mut set = |bin: usize, v: f64| {
                if let Some(slot) = matrix.get_mut(bin * mels + m) {
                    *slot = v;
                }
            };
            if centre == left {
                set(centre, 1.0);
            } else {
                (left..=centre).for_each(|j| set(j, (j - left) as f64 / (centre - left) as f64));
            }
            (centre..right).for_each(|j| set(j, (right - j) as f64 / (right - centre) as f64));
        }
        let t = Tensor::f_from_slice(&matrix)?.f_reshape([bins as i64, mels as i64])?;
        one(t.f_to_kind(kind)?.f_to_device(a.device())?)
    })
    .host(&[0, 1, 2, 3, 4]))
}
