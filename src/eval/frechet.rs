//! Frechet distance between Gaussians fitted to two sets of features.

use std::path::Path;

use faer::{Mat, Side};

use super::{FeatureMatrix, same_dims};
use crate::error::{Context, Error, Result};
use crate::tensor::HostTensor;

/// Mean and covariance (divided by N-1) of a set's features.
#[derive(Debug, Clone)]
pub struct Statistics {
    pub mean: Vec<f64>,
    pub covariance: Mat<f64>,
}

impl Statistics {
    /// Fits a Gaussian to a set.
    pub fn of(features: &FeatureMatrix) -> Self {
        let (n, d) = (features.len(), features.dims());
        let x = features.mat();
        let mean: Vec<f64> = (0..d).map(|j| (0..n).map(|i| x[(i, j)]).sum::<f64>() / n as f64).collect();
        let centred = Mat::from_fn(n, d, |i, j| x[(i, j)] - mean[j]);
        let covariance = centred.transpose() * &centred;
        Self { mean, covariance: Mat::from_fn(d, d, |i, j| covariance[(i, j)] / (n as f64 - 1.0)) }
    }

    /// Reference statistics as other tools keep them: a `.npz` with `mu` [D] and `sigma` [D,D].
    pub fn read(path: &Path) -> Result<Self> {
        let arrays = crate::io::npy::read_npz(path)?;
        let find = |name: &str| {
            let found = arrays.iter().find(|(n, _)| n == name).map(|(_, t)| t);
            found.ok_or_else(|| Error::io(format!("no array `{name}`"))).with_context(|| path.display().to_string())
        };
        let (mu, sigma) = (find("mu")?, find("sigma")?);
        let d = mu.len();
        if d == 0 || mu.rank() != 1 || sigma.shape() != [d, d] {
            let shapes = format!("mu {:?} and sigma {:?}, expected [D] and [D, D]", mu.shape(), sigma.shape());
            return Err(Error::mismatch(shapes).context(path.display().to_string()));
        }
        let (mean, sigma) = (mu.to_f64(), sigma.to_f64());
        if mean.iter().chain(&sigma).any(|v| !v.is_finite()) {
            return Err(Error::mismatch("the statistics hold NaN").context(path.display().to_string()));
        }
        Ok(Self { mean, covariance: Mat::from_fn(d, d, |i, j| sigma[i * d + j]) })
    }

    /// Writes what [`Statistics::read`] reads.
    pub fn write(&self, path: &Path) -> Result<()> {
        let d = self.mean.len();
        let sigma: Vec<f64> = (0..d * d).map(|k| self.covariance[(k / d, k % d)]).collect();
        let (mu, sigma) = (HostTensor::vec(&self.mean), HostTensor::new(&[d, d], &sigma)?);
        crate::io::npy::write_npz(path, &[("mu", &mu), ("sigma", &sigma)])
    }
}

/// Eigenvalues below this share of the largest are rounding noise: their square roots would add up.
fn floor(values: &[f64]) -> f64 {
    let largest = values.iter().copied().fold(0.0, f64::max);
    largest * values.len() as f64 * f64::EPSILON
}

/// `|mu_a - mu_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2)` (Dowson & Landau 1982). Both roots are taken of symmetric
/// matrices by eigendecomposition, which stays real and stable where `sqrtm(A B)` does not.
pub fn distance(a: &Statistics, b: &Statistics) -> Result<f64> {
    same_dims(a.mean.len(), b.mean.len())?;
    let d = a.mean.len();
    let failed = |_| Error::backend("the eigendecomposition of a covariance did not converge");
    let eigen = a.covariance.self_adjoint_eigen(Side::Lower).map_err(failed)?;
    let values: Vec<f64> = (0..d).map(|k| eigen.S()[k]).collect();
    let cut = floor(&values);
    let roots: Vec<f64> = values.iter().map(|&v| if v > cut { v.sqrt() } else { 0.0 }).collect();
    let u = eigen.U();
    let scaled = Mat::from_fn(d, d, |i, j| u[(i, j)] * roots[j]);
    let root = &scaled * u.transpose();
    let middle = &root * &b.covariance * &root;
    let symmetric = Mat::from_fn(d, d, |i, j| 0.5 * (middle[(i, j)] + middle[(j, i)]));
    let values = symmetric.self_adjoint_eigenvalues(Side::Lower).map_err(failed)?;
    let cut = floor(&values);
    let cross: f64 = values.iter().filter(|&&v| v > cut).map(|v| v.sqrt()).sum();
    let shift: f64 = a.mean.iter().zip(&b.mean).map(|(x, y)| (x - y) * (x - y)).sum();
    let trace = |m: &Mat<f64>| (0..d).map(|k| m[(k, k)]).sum::<f64>();
    Ok((shift + trace(&a.covariance) + trace(&b.covariance) - 2.0 * cross).max(0.0))
}
