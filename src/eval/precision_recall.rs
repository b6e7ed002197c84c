//! Improved precision and recall (Kynkaanniemi et al. 2019): a set's manifold is the union of balls around its images, each
//! as large as the distance to the image's k-th neighbour within the set.

use faer::{Mat, MatRef};

use super::{FeatureMatrix, same_dims, shuffled};
use crate::error::{Error, Result};

/// Neighbour that gives a ball its radius, as in the paper.
pub const NEIGHBOUR: usize = 3;
/// More images than this are sampled down: the work grows with the square.
const MOST: usize = 10_000;
/// Rows of a distance matrix held at a time.
const STRIP: usize = 256;

/// Shares in [0, 1].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PrecisionRecall {
    /// Share of the generated images within the reference's manifold.
    pub precision: f64,
    /// Share of the reference images within the generated manifold.
    pub recall: f64,
    /// Images used of both sets.
    pub used: [usize; 2],
}

/// Precision and recall of the generated set `a` against the reference `b`.
pub fn measure(a: &FeatureMatrix, b: &FeatureMatrix, k: usize) -> Result<PrecisionRecall> {
    same_dims(a.dims(), b.dims())?;
    if a.len().min(b.len()) <= k {
        return Err(Error::mismatch(format!("precision and recall need more than {k} images in each set")));
    }
    let take = |set: &FeatureMatrix, salt| {
        let mut order = shuffled(set.len(), salt);
        order.truncate(MOST);
        set.select(&order)
    };
    let (mut a, mut b) = (take(a, 3), take(b, 4));
    centre(&mut a, &mut b);
    let (norms_a, norms_b) = (norms(&a), norms(&b));
    let radii_a = radii(&a, &norms_a, k);
    let radii_b = radii(&b, &norms_b, k);
    Ok(PrecisionRecall {
        precision: covered(&a, &norms_a, &b, &norms_b, &radii_b),
        recall: covered(&b, &norms_b, &a, &norms_a, &radii_a),
        used: [a.nrows(), b.nrows()],
    })
}

/// Moves the origin to the mean of `b`: distances by `|x|^2 + |y|^2 - 2 x.y` then lose least.
fn centre(a: &mut Mat<f64>, b: &mut Mat<f64>) {
    for j in 0..b.ncols() {
        let mean = (0..b.nrows()).map(|i| b[(i, j)]).sum::<f64>() / b.nrows() as f64;
        (0..a.nrows()).for_each(|i| a[(i, j)] -= mean);
        (0..b.nrows()).for_each(|i| b[(i, j)] -= mean);
    }
}

fn norms(x: &Mat<f64>) -> Vec<f64> {
    (0..x.nrows()).map(|i| (0..x.ncols()).map(|j| x[(i, j)] * x[(i, j)]).sum()).collect()
}

/// Calls `visit(i, squared distances of row i of x to all rows of y)`.
fn strips(x: &Mat<f64>, nx: &[f64], y: &Mat<f64>, ny: &[f64], mut visit: impl FnMut(usize, &mut [f64])) {
    let mut row = vec![0.0; y.nrows()];
    for start in (0..x.nrows()).step_by(STRIP) {
        let count = STRIP.min(x.nrows() - start);
        let part: MatRef<'_, f64> = x.as_ref().subrows(start, count);
        let gram = part * y.transpose();
        for i in 0..count {
            for (j, out) in row.iter_mut().enumerate() {
                *out = (nx[start + i] + ny[j] - 2.0 * gram[(i, j)]).max(0.0);
            }
            visit(start + i, &mut row);
        }
    }
}

/// Squared distance of each row to its k-th neighbour among the others.
fn radii(x: &Mat<f64>, norms: &[f64], k: usize) -> Vec<f64> {
    let mut out = vec![0.0; x.nrows()];
    strips(x, norms, x, norms, |i, row| {
        row[i] = f64::INFINITY;
        let (_, kth, _) = row.select_nth_unstable_by(k - 1, f64::total_cmp);
        out[i] = *kth;
    });
    out
}

/// Share of the rows of `x` that lie in a ball of `y`. The tolerance lets equal images be found at distance 0.
fn covered(x: &Mat<f64>, nx: &[f64], y: &Mat<f64>, ny: &[f64], radii: &[f64]) -> f64 {
    let mut inside = 0usize;
    strips(x, nx, y, ny, |i, row| {
        let hit = row.iter().enumerate().any(|(j, &d)| d <= radii[j] + 1e-12 * (nx[i] + ny[j]));
        inside += usize::from(hit);
    });
    inside as f64 / x.nrows() as f64
}
