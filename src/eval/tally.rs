//! Measures of one set over blocks of seeds, gathered into a row.

use super::inception_score::InceptionScore;
use super::kernel::{self, Estimator};
use super::manifold::{self, Manifold};
use super::row::EvaluationRow;
use super::{FeatureMatrix, Statistics, frechet};
use crate::error::Result;

pub(super) fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

pub(super) fn deviation(values: &[f64]) -> Option<f64> {
    let m = mean(values)?;
    let n = values.len();
    (n > 1).then(|| (values.iter().map(|v| (v - m) * (v - m)).sum::<f64>() / (n - 1) as f64).sqrt())
}

/// Standard error of a mean of several values that each have one, or of their spread where that is known.
fn error_of_mean(values: &[f64], errors: &[f64]) -> Option<f64> {
    match deviation(values) {
        Some(spread) => Some(spread / (values.len() as f64).sqrt()),
        None => mean(errors),
    }
}

/// What the blocks gave so far.
#[derive(Debug, Default)]
pub(super) struct Tally {
    distances: Vec<f64>,
    kernels: Vec<f64>,
    kernel_errors: Vec<f64>,
    kernel_deviations: Vec<f64>,
    slices: Vec<f64>,
    slice_errors: Vec<f64>,
    scores: Vec<f64>,
    score_deviations: Vec<f64>,
    ms: Vec<f64>,
    /// Precision, recall, density and coverage.
    pub covers: Vec<Manifold>,
}

impl Tally {
    /// Frechet distance of a block.
    pub fn frechet(&mut self, a: &Statistics, b: &Statistics) -> Result<()> {
        self.distances.push(frechet::distance(a, b)?);
        Ok(())
    }

    /// What is measured of the rows of a block `a` and of the reference `b`.
    pub fn rows(&mut self, a: &FeatureMatrix, b: &FeatureMatrix, estimator: Estimator) -> Result<()> {
        let k = kernel::distance(a, b, estimator)?;
        self.kernels.push(k.mean);
        self.kernel_errors.extend(k.standard_error);
        self.kernel_deviations.extend(k.deviation);
        if a.len().min(b.len()) > manifold::DENSITY_NEIGHBOUR {
            self.covers.push(manifold::measure(a, b)?);
        }
        Ok(())
    }

    /// Sliced Wasserstein distance of a block, with its error.
    pub fn sliced(&mut self, distance: f64, error: f64) {
        self.slices.push(distance);
        self.slice_errors.push(error);
    }

    /// Inception Score of a block.
    pub fn score(&mut self, score: &InceptionScore) {
        self.scores.push(score.mean);
        self.score_deviations.push(score.deviation);
    }

    /// Milliseconds a sample of a block took, where it was made.
    pub fn time(&mut self, ms: Option<f64>) {
        self.ms.extend(ms);
    }

    /// Writes means and spreads into a row.
    pub fn fill(self, row: &mut EvaluationRow) {
        row.frechet = mean(&self.distances);
        row.frechet_deviation = deviation(&self.distances);
        row.frechet_least = self.distances.iter().copied().reduce(f64::min).filter(|_| self.distances.len() > 1);
        row.kernel = mean(&self.kernels);
        row.kernel_standard_error =
            error_of_mean(&self.kernels, &self.kernel_errors).filter(|_| self.kernel_deviations.is_empty());
        row.kernel_deviation = mean(&self.kernel_deviations);
        let over = |f: fn(&Manifold) -> f64| mean(&self.covers.iter().map(f).collect::<Vec<_>>());
        row.precision = over(|m| m.precision);
        row.recall = over(|m| m.recall);
        row.density = over(|m| m.density);
        row.coverage = over(|m| m.coverage);
        row.sliced = mean(&self.slices);
        row.sliced_standard_error = error_of_mean(&self.slices, &self.slice_errors);
        row.inception_score = mean(&self.scores);
        row.inception_score_deviation = mean(&self.score_deviations);
        row.ms_per_image = mean(&self.ms);
    }
}
