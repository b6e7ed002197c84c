//! Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020). A set's manifold is the union of
//! balls around its images, each as large as the distance to the image's k-th neighbour within the set.

use faer::{Mat, MatRef};
use serde::Serialize;

use super::{FeatureMatrix, same_dims, shuffled};
use crate::error::{Error, Result};

/// Neighbour that gives a ball its radius for precision and recall, as in the paper.
pub const NEIGHBOUR: usize = 3;
/// The same for density and coverage, as in the paper.
pub const DENSITY_NEIGHBOUR: usize = 5;
/// More images than this are sampled down: the work grows with the square.
pub const MOST: usize = 10_000;
/// Rows of a distance matrix held at a time.
const STRIP: usize = 256;

/// How two sets cover one another.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Manifold {
    /// Share of the generated images within the reference's manifold: quality.
    pub precision: f64,
    /// Share of the reference images within the generated manifold: diversity.
    pub recall: f64,
    /// Balls of the reference (without their surface) a generated image lies in, over k; 1 for equal distributions, above it where the generated
    /// images crowd where the reference is dense.
    pub density: f64,
    /// Share of the reference's balls that hold a generated image.
    pub coverage: f64,
    /// Images used of both sets.
    pub used: [usize; 2],
}

/// All four of the generated set `a` against the reference `b`, with the papers' neighbours.
pub fn measure(a: &FeatureMatrix, b: &FeatureMatrix) -> Result<Manifold> {
    measure_with(a, b, NEIGHBOUR, DENSITY_NEIGHBOUR)
}

/// [`measure`] with balls reaching to the `k`-th neighbour (precision, recall) and the `dense`-th (density, coverage).
pub fn measure_with(a: &FeatureMatrix, b: &FeatureMatrix, k: usize, dense: usize) -> Result<Manifold> {
    same_dims(a.dims(), b.dims())?;
    let need = k.max(dense);
    if a.len().min(b.len()) <= need {
        return Err(Error::mismatch(format!("precision and recall need more than {need} images in each set")));
    }
    let take = |set: &FeatureMatrix, salt| {
        let mut order = shuffled(set.len(), salt);
        order.truncate(MOST);
        set.select(&order)
    };
    let (mut a, mut b) = (take(a, 3), take(b, 4));
    centre(&mut a, &mut b);
    let (na, nb) = (norms(&a), norms(&b));
    let radii_a = radii(&a, &na, [k, k]);
    let radii_b = radii(&b, &nb, [k, dense]);
    // Balls without their surface for density and coverage, as in their authors' program (prdc): of exact duplicates it matters.
    let (mut precise, mut inside) = (0usize, 0usize);
    let (mut recalled, mut covered) = (vec![false; b.nrows()], vec![false; b.nrows()]);
    strips(&a, &na, &b, &nb, |i, row| {
        let mut hit = false;
        for (j, &d) in row.iter().enumerate() {
            // Equal images are found although their distance, a difference of large numbers, is not exactly 0.
            let slack = 1e-12 * (na[i] + nb[j]);
            hit |= d <= radii_b[j][0] + slack;
            recalled[j] |= d <= radii_a[i][0] + slack;
            let close = d + slack < radii_b[j][1];
            inside += usize::from(close);
            covered[j] |= close;
        }
        precise += usize::from(hit);
    });
    let share = |flags: &[bool]| flags.iter().filter(|&&f| f).count() as f64 / flags.len() as f64;
    Ok(Manifold {
        precision: precise as f64 / a.nrows() as f64,
        recall: share(&recalled),
        density: inside as f64 / (dense * a.nrows()) as f64,
        coverage: share(&covered),
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
    let mut out = vec![0.0; x.nrows()];
    for j in 0..x.ncols() {
        for (i, v) in x.col_as_slice(j).iter().enumerate() {
            out[i] += v * v;
        }
    }
    out
}

/// Calls `visit(i, squared distances of row i of x to all rows of y)`.
fn strips(x: &Mat<f64>, nx: &[f64], y: &Mat<f64>, ny: &[f64], mut visit: impl FnMut(usize, &mut [f64])) {
    for start in (0..x.nrows()).step_by(STRIP) {
        let count = STRIP.min(x.nrows() - start);
        let part: MatRef<'_, f64> = x.as_ref().subrows(start, count);
        // One column a row of the strip: the distances of an image lie side by side.
        let mut gram = y * part.transpose();
        for i in 0..count {
            let row = gram.col_as_slice_mut(i);
            for (j, out) in row.iter_mut().enumerate() {
                *out = (nx[start + i] + ny[j] - 2.0 * *out).max(0.0);
            }
            visit(start + i, row);
        }
    }
}

/// Squared distances of each row to its k-th neighbours among the others, for both `k`.
fn radii(x: &Mat<f64>, norms: &[f64], k: [usize; 2]) -> Vec<[f64; 2]> {
    let mut out = vec![[0.0; 2]; x.nrows()];
    strips(x, norms, x, norms, |i, row| {
        row[i] = f64::INFINITY;
        let kth = |row: &mut [f64], k: usize| *row.select_nth_unstable_by(k - 1, f64::total_cmp).1;
        out[i] = [kth(row, k[0]), kth(row, k[1])];
    });
    out
}
