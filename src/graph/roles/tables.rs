//! Constants that look like weights by where they are read, but whose numbers say that nobody trained them.

use crate::tensor::HostTensor;

/// All elements equal, bit for bit.
pub fn uniform(t: &HostTensor) -> bool {
    let size = t.dtype().size();
    let bytes = t.bytes();
    bytes.len() >= size && bytes.chunks_exact(size).all(|c| c == &bytes[..size])
}

/// Uniform with this value.
pub fn all(t: &HostTensor, value: f64) -> bool {
    uniform(t) && first(t, 1).first() == Some(&value)
}

/// The first few elements.
fn first(t: &HostTensor, count: usize) -> Vec<f64> {
    let flat = t.reshaped(&[t.len()]).and_then(|f| f.rows(0, count.min(t.len())));
    flat.map_or_else(|_| Vec::new(), |f| f.to_f64())
}

/// Larger tables than this are embeddings, not angles.
const LARGEST: usize = 1 << 23;

/// How far from 1 a squared sine and cosine may be: rounding of the element type.
fn slack(t: &HostTensor) -> f64 {
    match t.dtype().size() {
        2 => 2e-2,
        _ => 1e-4,
    }
}

/// A table of sines and cosines along one of its axes: whatever their order, each has its partner of the same angle. No
/// training leaves every pair on the unit circle. Rows of zeros (tokens without a place) and columns of zeros (padding to a
/// width) do not count; a few rows tell.
pub fn sinusoidal(t: &HostTensor) -> bool {
    const ROWS: usize = 12;
    if t.rank() < 2 || !(8..=LARGEST).contains(&t.len()) || !t.dtype().is_float() || uniform(t) {
        return false;
    }
    let slack = slack(t);
    let outside = |v: &f64| !(v.abs() <= 1.0 + slack);
    if first(t, 64).iter().any(outside) {
        return false;
    }
    let Ok(flat) = t.reshaped(&[t.len()]) else { return false };
    (0..t.rank()).any(|axis| {
        let n = t.shape()[axis];
        let inner: usize = t.shape()[axis + 1..].iter().product();
        let count = t.len() / n.max(1);
        if n < 2 || n == t.len() || n > 1 << 14 {
            return false;
        }
        let row = |k: usize| -> Option<Vec<f64>> {
            let start = k / inner * n * inner + k % inner;
            if inner == 1 {
                return Some(flat.rows(start, n).ok()?.to_f64());
            }
            (0..n).map(|i| flat.rows(start + i * inner, 1).ok()?.to_f64().first().copied()).collect()
        };
        // Spread over the table; more are looked at than taken, for those that are zero.
        let mut rows: Vec<Vec<f64>> = Vec::new();
        let step = (count / (4 * ROWS)).max(1);
        for k in (0..count).step_by(step).take(8 * ROWS) {
            match row(k) {
                Some(r) if r.iter().any(|v| *v != 0.0) => rows.push(r),
                Some(_) => {}
                None => return false,
            }
        }
        let taken = (rows.len() / ROWS).max(1);
        let rows: Vec<Vec<f64>> = rows.into_iter().step_by(taken).collect();
        rows.len() >= 2 && !rows.iter().flatten().any(outside) && every_column_has_a_partner(&rows, slack)
    })
}

/// Whether each column has another one with which it lies on the unit circle, in every row.
fn every_column_has_a_partner(rows: &[Vec<f64>], slack: f64) -> bool {
    let columns: Vec<usize> = (0..rows[0].len()).filter(|&j| rows.iter().any(|r| r[j] != 0.0)).collect();
    let square = |r: &[f64], j: usize| r[j] * r[j];
    // By the squares of the row that tells most: candidates lie side by side.
    let middle = &rows[rows.len() - 1];
    let mut order = columns.clone();
    order.sort_by(|&a, &b| square(middle, a).total_cmp(&square(middle, b)));
    columns.len() >= 2
        && columns.iter().all(|&j| {
            let wanted = 1.0 - square(middle, j);
            let from = order.partition_point(|&k| square(middle, k) < wanted - slack);
            order[from..]
                .iter()
                .take_while(|&&k| square(middle, k) <= wanted + slack)
                .any(|&k| k != j && rows.iter().all(|r| (square(r, j) + square(r, k) - 1.0).abs() <= slack))
        })
}

/// Two tables that hold the cosines and the sines of the same angles (rotary embedding).
pub fn cosines_and_sines(a: &HostTensor, b: &HostTensor) -> bool {
    if a.shape() != b.shape() || a.rank() < 2 || !(4..=LARGEST).contains(&a.len()) || uniform(a) && uniform(b) {
        return false;
    }
    let slack = slack(a).max(slack(b));
    let circle = |a: Vec<f64>, b: Vec<f64>| a.iter().zip(b).all(|(x, y)| (x * x + y * y - 1.0).abs() <= slack);
    circle(first(a, 16), first(b, 16)) && circle(a.to_f64(), b.to_f64())
}

/// A kernel that resamples rather than learns: the same window for every channel of a depthwise convolution, or a single
/// window that both flips leave unchanged.
pub fn resampling_filter(t: &HostTensor) -> bool {
    let [channels, 1, ref window @ ..] = *t.shape() else { return false };
    if window.iter().product::<usize>() < 2 || !t.dtype().is_float() {
        return false;
    }
    let bytes = t.bytes();
    if bytes.iter().all(|&b| b == 0) {
        return false;
    }
    if channels < 2 {
        let values = t.to_f64();
        // What both flips together leave unchanged is a palindrome.
        return values.iter().eq(values.iter().rev()) && values.iter().sum::<f64>().abs() > 1e-6;
    }
    let slice = bytes.len() / channels;
    bytes.chunks_exact(slice).all(|c| c == &bytes[..slice])
}

/// Holds numbers that no attention score has (-inf, or thousands below zero), or nothing but zero and one number far below.
pub fn mask(t: &HostTensor) -> bool {
    let values = t.to_f32();
    let low = values.iter().copied().fold(0f32, f32::min);
    values.iter().any(|v| !v.is_finite() || *v <= -1e3) || low <= -10.0 && values.iter().all(|v| *v == 0.0 || *v == low)
}

/// Equal steps along one axis and none along the others: coordinates, indices.
pub fn ramp(t: &HostTensor) -> bool {
    if t.len() < 3 || uniform(t) {
        return false;
    }
    let values = t.to_f64();
    let scale = values.iter().fold(0f64, |m, v| m.max(v.abs()));
    let shape = t.shape();
    let mut strides = vec![1; shape.len()];
    for k in (0..shape.len().saturating_sub(1)).rev() {
        strides[k] = strides[k + 1] * shape[k + 1];
    }
    (0..shape.len()).filter(|&k| shape[k] >= 3).any(|axis| {
        let step = values[strides[axis]] - values[0];
        (0..t.len()).all(|k| {
            let i = k / strides[axis] % shape[axis];
            (values[k] - values[0] - step * i as f64).abs() <= 1e-5 * scale
        })
    })
}

/// Numbers over two axes at least, with no order that one sees: learned places, which may meet an input as it comes.
pub fn positions(t: &HostTensor) -> bool {
    t.dtype().is_float()
        && t.shape().iter().filter(|&&n| n > 1).count() >= 2
        && !(uniform(t) || mask(t) || ramp(t) || sinusoidal(t))
}

/// Whether an exporter made the name up: `onnx::MatMul_12`, `/net/norm/Constant_output_0`, `val_45`.
pub fn made_up(name: &str) -> bool {
    let base = name.split('#').next().unwrap_or(name);
    let stem = base.trim_end_matches(|c: char| c.is_ascii_digit()).trim_end_matches('_');
    const STEMS: &[&str] = &[
        "",
        "val",
        "const",
        "Constant",
        "ones",
        "zeros",
        "full",
        "ones_like",
        "zeros_like",
        "expand",
        "unsqueeze",
        "view",
    ];
    base.contains("::") || base.starts_with('/') || base.contains("lifted_tensor") || STEMS.contains(&stem)
}

/// The end of a tensor's name in its framework: `weight` of `blocks.0.norm.weight`; nothing where the exporter made it up.
pub fn given_name(name: &str) -> Option<&str> {
    let base = name.split('#').next().unwrap_or(name);
    (!made_up(base)).then(|| base.rsplit('.').next().unwrap_or(base))
}

/// Named as frameworks name what they keep beside the weights.
pub fn named_like_a_buffer(name: &str) -> bool {
    const NAMES: &[&str] = &[
        "mean",
        "std",
        "var",
        "running_mean",
        "running_var",
        "latents_mean",
        "latents_std",
        "scaling_factor",
        "shift_factor",
        "scale_factor",
        "sigma_data",
        "sigma_min",
        "sigma_max",
        "eps",
        "epsilon",
        "steps",
        "sigmas",
        "betas",
        "alphas",
        "alphas_cumprod",
        "freqs",
        "freq",
        "inv_freq",
        "frequencies",
        "freqs_cis",
        "cos_cached",
        "sin_cached",
        "cos",
        "sin",
        "position_ids",
        "mask",
        "attn_mask",
        "causal_mask",
        "resample_filter",
        "filter",
        "blur_kernel",
        "fir_kernel",
    ];
    given_name(name).is_some_and(|last| NAMES.contains(&last.trim_start_matches('_')))
}

/// Named as frameworks name weights: decides about single numbers.
pub fn named_like_a_weight(name: &str) -> bool {
    const NAMES: &[&str] = &[
        "weight",
        "bias",
        "scale",
        "gamma",
        "beta",
        "alpha",
        "gate",
        "gain",
        "mix",
        "mix_factor",
        "logit_scale",
        "temperature",
        "lambda",
        "slope",
        "shift",
        "eps_weight",
        "res_scale",
        "layer_scale",
        "tau",
        "temp",
        "fac",
        "factor",
        "resweight",
        "g",
    ];
    let Some(last) = given_name(name) else { return false };
    // Two functions that name an argument alike are told apart by a number: `weight_0` of a lerp.
    let stem = last.trim_end_matches(|c: char| c.is_ascii_digit()).trim_end_matches('_');
    let listed = NAMES.iter().any(|n| last == *n || stem == *n || last.ends_with(&format!("_{n}")));
    // What has a place among the modules is a weight or what they keep beside the weights; numbers of the code have none.
    !named_like_a_buffer(name) && (listed || name.contains('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(shape: &[usize], f: impl Fn(usize) -> f32) -> HostTensor {
        let values: Vec<f32> = (0..shape.iter().product()).map(f).collect();
        HostTensor::new(shape, &values).unwrap()
    }

    #[test]
    fn a_depthwise_kernel_is_a_filter_only_when_all_channels_agree() {
        assert!(resampling_filter(&HostTensor::new(&[2, 1, 1, 2], &[0.25f32, 0.75, 0.25, 0.75]).unwrap()));
        assert!(!resampling_filter(&HostTensor::new(&[2, 1, 1, 2], &[0.25f32, 0.75, 0.25, 0.5]).unwrap()));
        assert!(resampling_filter(&HostTensor::new(&[1, 1, 2, 2], &[0.25f32; 4]).unwrap()));
        assert!(!resampling_filter(&HostTensor::new(&[1, 1, 1, 3], &[0.25f32, 0.5, 0.3]).unwrap()));
        assert!(!resampling_filter(&HostTensor::new(&[4, 1, 1, 2], &[0f32; 8]).unwrap()));
    }

    #[test]
    fn sinusoidal_tables_are_known_in_every_layout_and_noise_is_not() {
        let angle = |p: usize, k: usize| p as f32 * 100f32.powf(-(k as f32) / 4.0);
        let halves = tensor(&[6, 8], |i| {
            let (p, k) = (i / 8, i % 8);
            if k < 4 { angle(p, k).sin() } else { angle(p, k - 4).cos() }
        });
        let neighbours = tensor(&[1, 6, 8], |i| {
            let (p, k) = (i / 8, i % 8);
            if k % 2 == 0 { angle(p, k / 2).sin() } else { angle(p, k / 2).cos() }
        });
        let quarters = tensor(&[6, 8], |i| {
            let (p, k) = (i / 8, i % 8);
            let a = angle(if k < 4 { p / 3 } else { p % 3 }, k % 2);
            if k / 2 % 2 == 0 { a.sin() } else { a.cos() }
        });
        let channels = tensor(&[1, 8, 2, 3], |i| {
            let (k, p) = (i / 6, i % 6);
            if k < 4 { angle(p, k).cos() } else { angle(p, k - 4).sin() }
        });
        // Tokens without a place before the others, and three axes side by side, of unequal widths.
        let video = tensor(&[1, 14, 12], |i| {
            let (p, k) = (i / 12, i % 12);
            let (from, width, at) = if k < 4 {
                (0, 4, p / 6)
            } else if k < 8 {
                (4, 4, p % 3)
            } else {
                (8, 4, p % 2)
            };
            let a = angle(at, (k - from) % (width / 2) + 1);
            if p < 2 {
                0.0
            } else if k - from < width / 2 {
                a.sin()
            } else {
                a.cos()
            }
        });
        for t in [&halves, &neighbours, &quarters, &channels, &video] {
            assert!(sinusoidal(t), "{:?}", t.shape());
        }
        let almost = tensor(&[6, 8], |i| {
            let (p, k) = (i / 8, i % 8);
            let far = if k == 3 { 0.05 * (p as f32 + 1.0) } else { 0.0 };
            if k < 4 { angle(p, k).sin() - far } else { angle(p, k - 4).cos() }
        });
        assert!(!sinusoidal(&almost));
        let noise = tensor(&[6, 8], |i| ((i * 7919 + 13) % 97) as f32 / 97.0);
        assert!(!sinusoidal(&noise));
        assert!(!sinusoidal(&tensor(&[4, 4], |_| std::f32::consts::FRAC_1_SQRT_2)));
        let cos = tensor(&[5, 4], |i| angle(i / 4, i % 4).cos());
        let sin = tensor(&[5, 4], |i| angle(i / 4, i % 4).sin());
        assert!(cosines_and_sines(&cos, &sin));
        assert!(!cosines_and_sines(&cos, &cos));
    }

    #[test]
    fn coordinates_are_ramps() {
        assert!(ramp(&tensor(&[2, 5], |i| (i % 5) as f32 * 0.5 - 1.0)));
        assert!(ramp(&tensor(&[5, 2], |i| (i / 2) as f32)));
        assert!(!ramp(&tensor(&[5, 2], |i| ((i * i) % 7) as f32)));
        assert!(!ramp(&tensor(&[6], |_| 0.0)));
    }

    #[test]
    fn names_of_the_framework_are_told_from_those_that_exporters_make_up() {
        assert_eq!(given_name("net.blocks.0.norm.weight#3"), Some("weight"));
        assert_eq!(given_name("logit_scale"), Some("logit_scale"));
        for made_up in ["onnx::MatMul_12", "val_45", "/net/norm/Constant_output_0", "model.lifted_tensor_0", "12"] {
            assert_eq!(given_name(made_up), None, "{made_up}");
        }
        assert!(named_like_a_weight("a.logit_scale") && !named_like_a_weight("a.scale_factor"));
        assert!(named_like_a_weight("weight_0") && named_like_a_weight("blocks.0.blend"));
        assert!(
            !named_like_a_weight("val_0")
                && !named_like_a_weight("/blocks.0/Constant")
                && !named_like_a_weight("blend")
        );
        assert!(named_like_a_buffer("vae.latents_mean") && !named_like_a_buffer("a.weight"));
    }
}
