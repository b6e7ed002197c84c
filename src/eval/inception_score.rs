//! Inception Score (Salimans et al. 2016) of a classifier's outputs: `exp(mean KL(p(y|x) || p(y)))`, over blocks of images.

use serde::Serialize;

use crate::error::{Error, Result};

/// Blocks that the images are cut into, as in the paper.
pub const BLOCKS: usize = 10;

/// Mean and standard deviation over blocks, as the field quotes it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct InceptionScore {
    /// Mean of the score over the blocks; 1 or more.
    pub mean: f64,
    /// Standard deviation of the score over the blocks, divided by their number (not by one less).
    pub deviation: f64,
    /// Number of blocks that the images were cut into.
    pub blocks: usize,
}

/// Gathers class probabilities image by image.
#[derive(Debug, Clone)]
pub struct Gather {
    total: usize,
    blocks: usize,
    seen: usize,
    /// Of each block: images, sum of the probabilities, sum of `sum p ln p`.
    sums: Vec<(usize, Vec<f64>, f64)>,
}

impl Gather {
    /// For `total` images, cut into at most [`BLOCKS`] consecutive blocks.
    pub fn new(total: usize) -> Self {
        let blocks = BLOCKS.min(total).max(1);
        Self { total, blocks, seen: 0, sums: Vec::new() }
    }

    /// Adds one image's logits; their softmax is taken here, in f64.
    pub fn push(&mut self, logits: &[f32]) -> Result<()> {
        if logits.len() < 2 {
            return Err(Error::mismatch(format!("{} class scores an image: at least two are needed", logits.len())));
        }
        if let Some(k) = logits.iter().position(|v| !v.is_finite()) {
            return Err(Error::mismatch(format!("class score {k} of image {} is {}", self.seen, logits[k])));
        }
        let top = logits.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
        let weights: Vec<f64> = logits.iter().map(|&v| (f64::from(v) - f64::from(top)).exp()).collect();
        let sum: f64 = weights.iter().sum();
        // Block k holds images total*k/blocks .. total*(k+1)/blocks.
        let block = ((self.seen + 1) * self.blocks - 1) / self.total.max(1);
        if self.sums.len() <= block {
            self.sums.resize(block + 1, (0, vec![0.0; logits.len()], 0.0));
        }
        let (count, marginal, entropy) = &mut self.sums[block];
        *count += 1;
        for (m, w) in marginal.iter_mut().zip(&weights) {
            let p = w / sum;
            *m += p;
            if p > 0.0 {
                *entropy += p * p.ln();
            }
        }
        self.seen += 1;
        Ok(())
    }

    /// The score of what was added.
    pub fn finish(&self) -> Result<InceptionScore> {
        let scores: Vec<f64> = self
            .sums
            .iter()
            .filter(|(count, ..)| *count > 0)
            .map(|(count, marginal, negative)| {
                let n = *count as f64;
                // mean_x sum_y p ln p - sum_y q ln q, with q the mean of p.
                let q: f64 = marginal.iter().map(|m| m / n).filter(|q| *q > 0.0).map(|q| q * q.ln()).sum();
                (negative / n - q).exp()
            })
            .collect();
        if scores.is_empty() {
            return Err(Error::mismatch("no class scores"));
        }
        let n = scores.len() as f64;
        let mean = scores.iter().sum::<f64>() / n;
        let deviation = (scores.iter().map(|s| (s - mean) * (s - mean)).sum::<f64>() / n).sqrt();
        Ok(InceptionScore { mean, deviation, blocks: scores.len() })
    }
}
