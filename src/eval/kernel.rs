//! Kernel distance: squared maximum mean discrepancy under the polynomial kernel `k(x, y) = (x.y / D + 1)^3`
//! (Binkowski et al. 2018), unbiased, averaged over disjoint blocks.

use faer::Mat;

use super::{FeatureMatrix, same_dims, shuffled};
use crate::error::Result;

/// Largest block, as in the paper.
const BLOCK: usize = 1000;

/// Mean over blocks and the standard error of that mean.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct KernelDistance {
    /// Mean of the squared MMD over the blocks; may be slightly negative.
    pub mean: f64,
    /// Standard error of that mean; 0 for one block.
    pub standard_error: f64,
    /// Number of blocks, 1 to 100.
    pub blocks: usize,
}

/// Both sets are shuffled (always in the same way) and cut into blocks of equal size: at least ten where the sets allow
/// it, of at most 1000 images, at most 100 of them.
pub fn distance(a: &FeatureMatrix, b: &FeatureMatrix) -> Result<KernelDistance> {
    same_dims(a.dims(), b.dims())?;
    let n = a.len().min(b.len());
    let size = (n / 10).clamp(2, BLOCK);
    let blocks = (n / size).clamp(1, 100);
    let (order_a, order_b) = (shuffled(a.len(), 1), shuffled(b.len(), 2));
    let values: Vec<f64> = (0..blocks)
        .map(|k| {
            let range = k * size..(k + 1) * size;
            mmd2(&a.select(&order_a[range.clone()]), &b.select(&order_b[range]))
        })
        .collect();
    let mean = values.iter().sum::<f64>() / blocks as f64;
    let spread = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / (blocks.max(2) - 1) as f64;
    Ok(KernelDistance { mean, standard_error: (spread / blocks as f64).sqrt(), blocks })
}

/// Unbiased squared MMD of two blocks with rows as samples: the means of `k` over distinct pairs within each, minus twice
/// the mean across.
pub fn mmd2(x: &Mat<f64>, y: &Mat<f64>) -> f64 {
    let d = x.ncols() as f64;
    let kernel = |p: &Mat<f64>, q: &Mat<f64>, distinct: bool| {
        let gram = p * q.transpose();
        let mut sum = 0.0;
        for j in 0..gram.ncols() {
            for i in 0..gram.nrows() {
                if !(distinct && i == j) {
                    sum += (gram[(i, j)] / d + 1.0).powi(3);
                }
            }
        }
        let (m, n) = (gram.nrows() as f64, gram.ncols() as f64);
        sum / if distinct { m * (m - 1.0) } else { m * n }
    };
    kernel(x, x, true) + kernel(y, y, true) - 2.0 * kernel(x, y, false)
}
