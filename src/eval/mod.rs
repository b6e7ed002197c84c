//! Distances between sets of images in the feature space of an ONNX network that the user names; of samples that are no images,
//! in the space of their own values ([`values`]).
//!
//! None of these numbers can be compared across feature networks, image sizes or sample counts; within one set-up they say
//! which of two generators is nearer to the reference.

pub mod bench;
pub mod card;
pub mod collect;
pub mod evaluation;
pub mod features;
pub mod frechet;
pub mod in_loop;
pub mod inception_score;
pub mod kernel;
pub mod manifold;
pub mod moments;
pub mod neighbours;
mod reference;
pub mod resize;
pub mod room;
pub mod row;
pub mod sliced;
pub mod source;
pub mod sweep;
mod tally;
pub mod values;

use faer::Mat;
use ndarray::ArrayView2;
use serde::Serialize;

use crate::error::{Error, Result};

pub use card::FeatureCard;
pub use features::FeatureNet;
pub use frechet::Statistics;
pub use moments::Moments;
pub use source::Source;

/// Features of a set: one row an image.
#[derive(Debug, Clone)]
pub struct FeatureMatrix {
    rows: Mat<f64>,
}

impl FeatureMatrix {
    /// From an array `[N, D]`. Refuses NaN, infinities, and sets in which every image has the same features.
    pub fn new<T: Copy + Into<f64>>(features: ArrayView2<'_, T>) -> Result<Self> {
        let (n, d) = features.dim();
        let rows = Mat::from_fn(n, d, |i, j| features[(i, j)].into());
        if n < 2 || d == 0 {
            return Err(Error::mismatch(format!("{n} images with {d} features: at least two images are needed")));
        }
        let mut varied = false;
        for i in 0..n {
            for j in 0..d {
                let v = rows[(i, j)];
                if !v.is_finite() {
                    return Err(Error::mismatch(format!("feature {j} of image {i} is {v}")));
                }
                varied |= v != rows[(0, j)];
            }
        }
        match varied {
            true => Ok(Self { rows }),
            false => Err(moments::constant()),
        }
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.rows.nrows()
    }
    /// Whether there are no images.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Number of features.
    pub fn dims(&self) -> usize {
        self.rows.ncols()
    }
    pub(crate) fn mat(&self) -> &Mat<f64> {
        &self.rows
    }
    /// The rows in the given order.
    pub(crate) fn select(&self, order: &[usize]) -> Mat<f64> {
        Mat::from_fn(order.len(), self.dims(), |i, j| self.rows[(order[i], j)])
    }
}

/// What [`compare`] found. `a` is the generated set, `b` the reference.
#[derive(Debug, Clone, Serialize)]
pub struct Scores {
    /// Frechet distance of the Gaussians fitted to both sets; 0 for equal sets.
    pub frechet: f64,
    /// Kernel distance (squared MMD; Binkowski et al. 2018); may be slightly negative for equal sets.
    pub kernel: f64,
    /// Standard error of the kernel distance; absent for fewer than five images.
    pub kernel_standard_error: Option<f64>,
    /// Share of `a`, 0 to 1, that lies within the manifold of `b` (Kynkaanniemi et al. 2019): quality.
    pub precision: f64,
    /// Share of `b`, 0 to 1, that lies within the manifold of `a` (Kynkaanniemi et al. 2019): diversity.
    pub recall: f64,
    /// Density (Naeem et al. 2020): quality that outliers do not raise; 1 for equal distributions.
    pub density: f64,
    /// Coverage (Naeem et al. 2020): share of the reference images, 0 to 1, that have a generated image near them.
    pub coverage: f64,
    /// Number of generated and of reference images.
    pub images: [usize; 2],
    /// Number of features an image.
    pub features: usize,
    /// What makes the numbers less reliable, such as too few images.
    pub warnings: Vec<String>,
}

/// All measures between a generated set and a reference.
pub fn compare(a: &FeatureMatrix, b: &FeatureMatrix) -> Result<Scores> {
    let mut warnings: Vec<String> =
        [("first", a.len()), ("second", b.len())].iter().filter_map(|(s, n)| few(s, *n, a.dims())).collect();
    let frechet = frechet::distance(&Statistics::of(a)?, &Statistics::of(b)?)?;
    let kernel = kernel::distance(a, b, kernel::Estimator::Full)?;
    let cover = manifold::measure(a, b)?;
    if cover.used[0] < a.len() || cover.used[1] < b.len() {
        warnings.push(format!("precision and recall use {} and {} images", cover.used[0], cover.used[1]));
    }
    Ok(Scores {
        frechet,
        kernel: kernel.mean,
        kernel_standard_error: kernel.standard_error,
        precision: cover.precision,
        recall: cover.recall,
        density: cover.density,
        coverage: cover.coverage,
        images: [a.len(), b.len()],
        features: a.dims(),
        warnings,
    })
}

/// What it means that a set has fewer images than features.
pub(crate) fn few(set: &str, images: usize, features: usize) -> Option<String> {
    (images <= features).then(|| {
        format!(
            "the {set} set has {images} images for {features} features: its covariance is singular and the Frechet \
             distance is biased upwards; compare it only with distances of as many images, or look at the kernel distance"
        )
    })
}

pub(crate) fn same_dims(a: usize, b: usize) -> Result<()> {
    match a == b {
        true => Ok(()),
        false => Err(Error::mismatch(format!("{a} features against {b}: the sets were seen by different networks"))),
    }
}

/// A permutation of `0..n` that depends on `n` and `salt` alone.
pub(crate) fn shuffled(n: usize, salt: u64) -> Vec<usize> {
    use rand_chacha::rand_core::{Rng, SeedableRng};
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(salt);
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        let j = ((u128::from(rng.next_u64()) * (i as u128 + 1)) >> 64) as usize;
        order.swap(i, j);
    }
    order
}

#[cfg(test)]
mod numpy_tests;
#[cfg(test)]
mod tests;
