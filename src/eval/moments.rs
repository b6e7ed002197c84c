//! Mean and covariance of features as they stream by: memory does not grow with the number of images.

use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, Mat};
use ndarray::{Array1, Array2};

use crate::error::{Error, Result};

/// Images joined before their products are added: large enough for the matrix product to run at full speed.
const BLOCK: usize = 512;

/// First and second moments of rows of features, in f64. Features are taken relative to the first row, so that a large
/// common mean costs no digits.
#[derive(Debug, Clone)]
pub struct Moments {
    shift: Vec<f64>,
    sum: Vec<f64>,
    /// Lower triangle of the sum of outer products.
    products: Mat<f64>,
    /// Images wait here, one a column.
    waiting: Mat<f64>,
    columns: usize,
    count: usize,
    /// Whether any row differs from the first.
    varied: bool,
}

impl Moments {
    /// For rows of `dims` features.
    pub fn new(dims: usize) -> Self {
        Self {
            shift: vec![0.0; dims],
            sum: vec![0.0; dims],
            products: Mat::zeros(dims, dims),
            waiting: Mat::zeros(dims, BLOCK),
            columns: 0,
            count: 0,
            varied: false,
        }
    }

    /// Number of features a row.
    pub fn dims(&self) -> usize {
        self.shift.len()
    }
    /// Rows seen.
    pub fn count(&self) -> usize {
        self.count
    }
    /// Whether any row differs from the first.
    pub fn varied(&self) -> bool {
        self.varied
    }

    /// Adds one row. NaN and infinities are refused.
    pub fn push(&mut self, row: impl ExactSizeIterator<Item = f64>) -> Result<()> {
        let dims = self.dims();
        if row.len() != dims {
            return Err(Error::mismatch(format!("{} features where the rows before had {dims}", row.len())));
        }
        let (first, image) = (self.count == 0, self.count);
        let column = self.waiting.col_as_slice_mut(self.columns);
        for (j, v) in row.enumerate() {
            if !v.is_finite() {
                return Err(Error::mismatch(format!("feature {j} of image {image} is {v}")));
            }
            if first {
                self.shift[j] = v;
            }
            let v = v - self.shift[j];
            self.varied |= v != 0.0;
            self.sum[j] += v;
            column[j] = v;
        }
        self.count += 1;
        self.columns += 1;
        if self.columns == BLOCK {
            self.flush();
        }
        Ok(())
    }

    fn flush(&mut self) {
        let block = self.waiting.as_ref().subcols(0, self.columns);
        triangular::matmul(
            self.products.as_mut(),
            BlockStructure::TriangularLower,
            Accum::Add,
            block,
            BlockStructure::Rectangular,
            block.transpose(),
            BlockStructure::Rectangular,
            1.0,
            faer::get_global_parallelism(),
        );
        self.columns = 0;
    }

    /// Mean `[D]`, and covariance `[D, D]` divided by `count - 1`. Needs two rows that differ.
    pub fn finish(mut self) -> Result<(Array1<f64>, Array2<f64>)> {
        if self.count < 2 {
            return Err(Error::mismatch(format!("{} images: at least two are needed", self.count)));
        }
        if !self.varied {
            return Err(constant());
        }
        if self.columns > 0 {
            self.flush();
        }
        let n = self.count as f64;
        let mean: Array1<f64> = self.sum.iter().zip(&self.shift).map(|(s, shift)| s / n + shift).collect();
        let (sum, products) = (&self.sum, &self.products);
        let dims = self.shift.len();
        let covariance = Array2::from_shape_fn((dims, dims), |(i, j)| {
            let (low, high) = (i.max(j), i.min(j));
            (products[(low, high)] - sum[i] * sum[j] / n) / (n - 1.0)
        });
        Ok((mean, covariance))
    }
}

/// A set that tells nothing.
pub(crate) fn constant() -> Error {
    Error::mismatch("all images of the set have the same features")
        .hint("the images are all equal, or the network does not look at its input")
}
