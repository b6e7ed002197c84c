//! Kernel distance: squared maximum mean discrepancy under the polynomial kernel `k(x, y) = (x.y / D + 1)^3`
//! (Binkowski et al. 2018), unbiased.

use faer::{Mat, MatRef};
use serde::{Deserialize, Serialize};

use super::{FeatureMatrix, same_dims, shuffled};
use crate::error::Result;

/// Rows of a Gram matrix held at a time.
const STRIP: usize = 256;
/// Subsets and images of each, as clean-fid and torch-fidelity have them.
const SUBSETS: usize = 100;
const SUBSET: usize = 1000;

/// Which pairs of images the distance is a mean over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Estimator {
    /// All pairs of all images: the least noisy unbiased figure.
    #[default]
    Full,
    /// The mean over 100 random subsets of at most 1000 images of each set, for comparison with published figures.
    #[value(alias = "clean-fid", alias = "torch-fidelity")]
    Subsets,
}

/// A kernel distance and how far it can be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct KernelDistance {
    /// Squared MMD; may be slightly negative.
    pub mean: f64,
    /// Standard error of [`Estimator::Full`], from the variance of the U-statistic; absent for fewer than five images.
    pub standard_error: Option<f64>,
    /// Standard deviation over the subsets of [`Estimator::Subsets`], as torch-fidelity quotes it. The subsets share images: it
    /// is no error of the mean.
    pub deviation: Option<f64>,
}

/// The distance of two sets. Memory beside the features: strips of a Gram matrix, 2 kB an image. Errors: features of different
/// networks.
pub fn distance(a: &FeatureMatrix, b: &FeatureMatrix, estimator: Estimator) -> Result<KernelDistance> {
    same_dims(a.dims(), b.dims())?;
    match estimator {
        Estimator::Full => Ok(full(a.mat().as_ref(), b.mat().as_ref())),
        Estimator::Subsets => Ok(subsets(a, b)),
    }
}

fn subsets(a: &FeatureMatrix, b: &FeatureMatrix) -> KernelDistance {
    let size = a.len().min(b.len()).min(SUBSET);
    let values: Vec<f64> = (0..SUBSETS as u64)
        .map(|k| {
            let take = |set: &FeatureMatrix, salt| set.select(&shuffled(set.len(), salt)[..size]);
            full(take(a, 1000 + 2 * k).as_ref(), take(b, 1001 + 2 * k).as_ref()).mean
        })
        .collect();
    let mean = values.iter().sum::<f64>() / SUBSETS as f64;
    let spread = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / SUBSETS as f64;
    KernelDistance { mean, standard_error: None, deviation: Some(spread.sqrt()) }
}

/// Sums of `k` over pairs.
struct Pairs {
    /// For each row of `x`, over the rows of `y`; pairs of a row with itself left out where both are one set.
    rows: Vec<f64>,
    /// For each row of `y`.
    columns: Vec<f64>,
    /// Of `k^2` over all pairs.
    squares: f64,
    /// Number of pairs.
    count: f64,
}

/// Both sets, or one set's pairs where `y` is absent: each is computed once and counts twice.
fn pairs(x: MatRef<'_, f64>, y: Option<MatRef<'_, f64>>) -> Pairs {
    let (same, other) = (y.is_none(), y.unwrap_or(x));
    let (m, n, d) = (x.nrows(), other.nrows(), x.ncols() as f64);
    let mut out = Pairs { rows: vec![0.0; m], columns: vec![0.0; n], squares: 0.0, count: (m * n) as f64 };
    for start in (0..m).step_by(STRIP) {
        let count = STRIP.min(m - start);
        let from = if same { start } else { 0 };
        // One column a row of the strip.
        let gram: Mat<f64> = other.subrows(from, n - from) * x.subrows(start, count).transpose();
        for i in 0..count {
            let skip = if same { i + 1 } else { 0 };
            let mut sum = 0.0;
            for (v, column) in gram.col_as_slice(i)[skip..].iter().zip(&mut out.columns[from + skip..]) {
                let k = v / d + 1.0;
                let k = k * k * k;
                sum += k;
                *column += k;
                out.squares += k * k;
            }
            out.rows[start + i] = sum;
        }
    }
    if same {
        let (rows, columns) = (&mut out.rows, &mut out.columns);
        rows.iter_mut().zip(columns.iter()).for_each(|(r, c)| *r += c);
        out.squares *= 2.0;
        out.count -= m as f64;
    }
    out
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Unbiased sample variance.
fn variance(values: &[f64]) -> f64 {
    let m = mean(values);
    values.iter().map(|v| (v - m) * (v - m)).sum::<f64>() / (values.len() as f64 - 1.0)
}

/// All pairs of `x` [M, D] and `y` [N, D], samples as rows: the means of `k` over distinct pairs within each, minus twice the mean
/// across.
///
/// The variance is that of Hoeffding's decomposition. With `a`, `b` the parts of `k` within the sets that depend on one sample,
/// `c`, `d` those across, and `A`, `B`, `C` what depends on pairs alone, all uncorrelated:
/// `4 Var(a - c) / M + 4 Var(b - d) / N + 2 Var(A) / M(M - 1) + 2 Var(B) / N(N - 1) + 4 Var(C) / MN`. Each is estimated from the
/// spread of row means and of single pairs, as in an analysis of variance.
pub fn full(x: MatRef<'_, f64>, y: MatRef<'_, f64>) -> KernelDistance {
    let (m, n) = (x.nrows() as f64, y.nrows() as f64);
    let (within_x, within_y, across) = (pairs(x, None), pairs(y, None), pairs(x, Some(y)));
    let over = |sums: &[f64], count: f64| -> Vec<f64> { sums.iter().map(|s| s / count).collect() };
    let (px, py) = (over(&within_x.rows, m - 1.0), over(&within_y.rows, n - 1.0));
    let (qx, qy) = (over(&across.rows, n), over(&across.columns, m));
    let (theta_x, theta_y, theta) = (mean(&px), mean(&py), mean(&qx));
    let distance = theta_x + theta_y - 2.0 * theta;
    if m.min(n) < 5.0 {
        return KernelDistance { mean: distance, standard_error: None, deviation: None };
    }
    // The part of pairs within a set of `s`: their variance is 2 Var(a) + Var(A), that of row means nearly Var(a) + Var(A) / s.
    let within = |pairs: &Pairs, p: &[f64], theta: f64, s: f64| {
        let (spread, f) = (variance(p), ((s - 2.0) / (s - 1.0)).powi(2));
        let single = pairs.squares / pairs.count - theta * theta + 4.0 * spread / s;
        ((single - 2.0 * spread / f) / (1.0 - 2.0 / (s - 2.0))).max(0.0)
    };
    let (pair_x, pair_y) = (within(&within_x, &px, theta_x, m), within(&within_y, &py, theta_y, n));
    // Var(c) + Var(d) + Var(C) of single pairs, Var(c) + Var(C) / N and Var(d) + Var(C) / M of row and column means.
    let (vx, vy) = (variance(&qx), variance(&qy));
    let single = across.squares / across.count - theta * theta + vx / m + vy / n;
    let pair = ((single - vx - vy) / (1.0 - 1.0 / m - 1.0 / n)).max(0.0);
    let first = |p: &[f64], q: &[f64], within: f64, s: f64, other: f64| {
        let r: Vec<f64> = p.iter().zip(q).map(|(p, q)| p - q).collect();
        variance(&r) - within * (s - 2.0) / (s - 1.0).powi(2) - pair / other
    };
    let ones = 4.0 * first(&px, &qx, pair_x, m, n) / m + 4.0 * first(&py, &qy, pair_y, n, m) / n;
    let twos = 2.0 * pair_x / (m * (m - 1.0)) + 2.0 * pair_y / (n * (n - 1.0)) + 4.0 * pair / (m * n);
    KernelDistance { mean: distance, standard_error: Some((ones.max(0.0) + twos).sqrt()), deviation: None }
}
