//! The reference images nearest to generated ones in feature space: whether a generator copies is seen, not computed.

use super::FeatureMatrix;
use super::same_dims;
use crate::error::Result;

/// For each of the first `queries` rows of `a`, the `k` nearest rows of `b` with their distances, nearest first.
pub fn nearest(a: &FeatureMatrix, b: &FeatureMatrix, queries: usize, k: usize) -> Result<Vec<Vec<(usize, f64)>>> {
    same_dims(a.dims(), b.dims())?;
    let (x, y) = (a.mat(), b.mat());
    let of = |i: usize| {
        let mut squares = vec![0.0; b.len()];
        for j in 0..b.dims() {
            let here = x[(i, j)];
            for (sum, v) in squares.iter_mut().zip(y.col_as_slice(j)) {
                *sum += (here - v) * (here - v);
            }
        }
        let mut order: Vec<usize> = (0..b.len()).collect();
        order.sort_by(|&p, &q| squares[p].total_cmp(&squares[q]));
        order.into_iter().take(k).map(|j| (j, squares[j].sqrt())).collect()
    };
    Ok((0..queries.min(a.len())).map(of).collect())
}
