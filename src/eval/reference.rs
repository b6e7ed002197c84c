//! Reference statistics on disk: a `.npz` with `mu` [D] and `sigma` [D, D], as EDM, pytorch-fid and clean-fid keep them. Ours
//! hold two more arrays, which those readers pass over: `count`, and `network`, the fingerprint of the feature network.

use std::path::Path;

use ndarray::{Array1, Array2};

use super::Statistics;
use crate::error::{Context, Error, Result};
use crate::io::npy;
use crate::tensor::{DType, HostTensor};

/// Share of the largest entry by which a covariance read from a file may be uneven.
const UNEVEN: f64 = 1e-5;

impl Statistics {
    /// Reads `mu` and `sigma`.
    pub fn read(path: &Path) -> Result<Self> {
        Self::from_arrays(&npy::read_npz(path)?).with_context(|| path.display().to_string())
    }

    pub(crate) fn from_arrays(arrays: &[(String, HostTensor)]) -> Result<Self> {
        let get = |name: &str| arrays.iter().find(|(n, _)| n == name).map(|(_, t)| t);
        let find = |name: &str| get(name).ok_or_else(|| Error::io(format!("no array `{name}`")));
        let (mu, sigma) = (find("mu")?, find("sigma")?);
        let d = mu.len();
        if d == 0 || mu.rank() != 1 || sigma.shape() != [d, d] {
            let shapes = format!("mu {:?} and sigma {:?}, expected [D] and [D, D]", mu.shape(), sigma.shape());
            return Err(Error::mismatch(shapes));
        }
        let (mean, sigma) = (mu.to_f64(), sigma.to_f64());
        if mean.iter().chain(&sigma).any(|v| !v.is_finite()) {
            return Err(Error::mismatch("the statistics hold NaN or infinities"));
        }
        let largest = sigma.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        if largest == 0.0 {
            return Err(super::moments::constant());
        }
        for i in 0..d {
            if sigma[i * d + i] < 0.0 {
                return Err(Error::mismatch(format!("sigma is no covariance: variance {i} is {}", sigma[i * d + i])));
            }
            if let Some(j) = (0..i).find(|&j| (sigma[i * d + j] - sigma[j * d + i]).abs() > UNEVEN * largest) {
                return Err(Error::mismatch(format!("sigma is no covariance: [{i}, {j}] differs from [{j}, {i}]")));
            }
        }
        let count = get("count").and_then(|t| t.to_i64().first().copied()).and_then(|n| usize::try_from(n).ok());
        let network = get("network").filter(|t| t.dtype() == DType::U8);
        let covariance = Array2::from_shape_fn((d, d), |(i, j)| 0.5 * (sigma[i * d + j] + sigma[j * d + i]));
        // What has no square root is found here, where the file is known.
        super::frechet::factor(&covariance)?;
        let mean = Array1::from(mean);
        Ok(Self { mean, covariance, count, network: network.and_then(|t| String::from_utf8(t.bytes().to_vec()).ok()) })
    }

    /// Writes what [`Statistics::read`] reads.
    pub fn write(&self, path: &Path) -> Result<()> {
        let (mu, sigma) = (HostTensor::from(self.mean.clone()), HostTensor::from(self.covariance.clone()));
        let count = self.count.map(|n| HostTensor::scalar(n as i64));
        let network = self.network.as_ref().map(|n| HostTensor::vec(n.as_bytes()));
        let mut arrays = vec![("mu", &mu), ("sigma", &sigma)];
        arrays.extend(count.as_ref().map(|t| ("count", t)));
        arrays.extend(network.as_ref().map(|t| ("network", t)));
        npy::write_npz(path, &arrays)
    }

    /// Refuses statistics that were made with another feature network, another output or another preprocessing.
    pub fn check_network(&self, fingerprint: &str, dims: usize) -> Result<()> {
        if let Some(theirs) = self.network.as_deref().filter(|n| *n != fingerprint) {
            let short = |t: &str| t.chars().take(12).collect::<String>();
            return Err(Error::mismatch(format!(
                "the statistics were made with another feature network or preprocessing ({}, this one is {})",
                short(theirs),
                short(fingerprint)
            ))
            .hint("use the network and options they were made with, or make them anew with --save-statistics"));
        }
        match self.dims() == dims {
            true => Ok(()),
            false => Err(Error::mismatch(format!(
                "the statistics have {} features, the network gives {dims}: they are of another network",
                self.dims()
            ))),
        }
    }
}
