//! Frechet distance between Gaussians fitted to two sets of features.

use faer::{Mat, Side};
use ndarray::{Array1, Array2};

use super::{FeatureMatrix, Moments, same_dims};
use crate::error::{Error, Result};

/// Mean and covariance (divided by N-1) of a set's features.
#[derive(Debug, Clone)]
pub struct Statistics {
    /// Mean of each feature, `[D]`.
    pub mean: Array1<f64>,
    /// Covariance of the features, `[D, D]`.
    pub covariance: Array2<f64>,
    /// Number of images that they were computed from, where known.
    pub count: Option<usize>,
    /// Fingerprint of the feature network and its preprocessing, where known.
    pub network: Option<String>,
}

impl Statistics {
    /// Fits a Gaussian to a set.
    pub fn of(features: &FeatureMatrix) -> Result<Self> {
        let x = features.mat();
        let mut moments = Moments::new(features.dims());
        for i in 0..features.len() {
            moments.push((0..features.dims()).map(|j| x[(i, j)]))?;
        }
        Self::from_moments(moments)
    }

    /// Mean and covariance of the rows that were added to `moments`.
    pub fn from_moments(moments: Moments) -> Result<Self> {
        let count = Some(moments.count());
        let (mean, covariance) = moments.finish()?;
        Ok(Self { mean, covariance, count, network: None })
    }

    /// Number of features.
    pub fn dims(&self) -> usize {
        self.mean.len()
    }
}

/// Eigenvalues further below zero than this share of the largest are no rounding, also of files in f32.
const NEGATIVE: f64 = 1e-4;

/// Eigenvalues below this share of the largest are rounding noise: their square roots would add up.
fn floor(largest: f64, dims: usize) -> f64 {
    largest * dims as f64 * f64::EPSILON
}

/// `L` with `c = L L^T`: Cholesky where `c` is safely positive definite, else eigenvectors scaled by the roots of the
/// eigenvalues that are above rounding noise.
pub(super) fn factor(covariance: &Array2<f64>) -> Result<Mat<f64>> {
    let d = covariance.nrows();
    let c = Mat::from_fn(d, d, |i, j| covariance[(i, j)]);
    let largest = (0..d).map(|k| c[(k, k)]).fold(0.0, f64::max);
    if let Ok(llt) = c.llt(Side::Lower) {
        let l = llt.L();
        if (0..d).all(|k| l[(k, k)] * l[(k, k)] > floor(largest, d)) {
            return Ok(Mat::from_fn(d, d, |i, j| if i >= j { l[(i, j)] } else { 0.0 }));
        }
    }
    let failed = |_| Error::backend("the eigendecomposition of a covariance did not converge");
    let eigen = c.self_adjoint_eigen(Side::Lower).map_err(failed)?;
    let values: Vec<f64> = (0..d).map(|k| eigen.S()[k]).collect();
    let least = values.iter().copied().fold(0.0, f64::min);
    let largest = values.iter().copied().fold(0.0, f64::max);
    if least < -NEGATIVE * largest {
        return Err(Error::mismatch(format!("sigma is no covariance: it has an eigenvalue of {least:.3e}")));
    }
    let cut = floor(largest, d);
    let kept: Vec<usize> = (0..d).filter(|&k| values[k] > cut).collect();
    let u = eigen.U();
    Ok(Mat::from_fn(d, kept.len(), |i, j| u[(i, kept[j])] * values[kept[j]].sqrt()))
}

/// `|mu_a - mu_b|^2 + tr(A) + tr(B) - 2 tr((A B)^1/2)` (Dowson & Landau 1982). With `A = L L^T` and `B = M M^T` the last trace
/// is the sum of the singular values of `L^T M`: nothing is squared on the way, so that it stays real and exact to rounding
/// where a square root of the product `A B` does neither.
pub fn distance(a: &Statistics, b: &Statistics) -> Result<f64> {
    same_dims(a.dims(), b.dims())?;
    let trace = |m: &Array2<f64>| m.diag().iter().sum::<f64>();
    let shift: f64 = a.mean.iter().zip(&b.mean).map(|(x, y)| (x - y) * (x - y)).sum();
    let (l, m) = (factor(&a.covariance)?, factor(&b.covariance)?);
    let between = l.transpose() * &m;
    drop((l, m));
    let values = between.singular_values();
    let values =
        values.map_err(|_| Error::backend("the singular values of the covariances' product did not converge"))?;
    Ok((shift + trace(&a.covariance) + trace(&b.covariance) - 2.0 * values.iter().sum::<f64>()).max(0.0))
}
