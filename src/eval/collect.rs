//! One pass over a set: everything the measures need, in memory that does not grow with the number of images.

use std::time::Instant;

use ndarray::ArrayView2;

use super::inception_score::{Gather, InceptionScore};
use super::manifold::MOST;
use super::sliced::Patches;
use super::source::{Draw, Source};
use super::{FeatureMatrix, FeatureNet, Moments, Statistics, shuffled};
use crate::error::{Error, Result};

/// What to gather beside the moments.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wanted {
    /// Features of at most [`MOST`] images, for kernel distance, precision, recall, density and coverage.
    pub rows: bool,
    /// Features of all images by class: the one thing whose memory grows with their number (4 bytes a feature).
    pub classes: bool,
    /// Patches for the sliced Wasserstein distance.
    pub patches: bool,
}

/// Features of all images with their classes.
#[derive(Debug, Clone)]
pub struct ByClass {
    dims: usize,
    values: Vec<f32>,
    labels: Vec<usize>,
}

/// What a pass over a set leaves.
#[derive(Debug, Clone, Default)]
pub struct Collected {
    /// Mean and covariance of the features; absent without a feature network.
    pub statistics: Option<Statistics>,
    /// Features of a fixed choice of images, at most [`MOST`]; absent where they were not asked for.
    pub rows: Option<FeatureMatrix>,
    /// Which images the rows of `rows` are: indices among the images of this pass, rising.
    pub chosen: Vec<usize>,
    /// Features of all images by class; absent where they were not asked for.
    pub classes: Option<ByClass>,
    /// Inception Score; absent where the network gives no class scores.
    pub inception: Option<InceptionScore>,
    /// Patches for the sliced Wasserstein distance; absent where they were not asked for.
    pub patches: Option<Patches>,
    /// C, H, W of an image; absent for reference statistics.
    pub shape: Option<[usize; 3]>,
    /// What is worth knowing of the set itself, such as files that were passed over.
    pub notes: Vec<String>,
    /// Number of images; for reference statistics 0 where they do not state it.
    pub count: usize,
    /// Network evaluations for one image; absent for images that were there already.
    pub nfe: Option<usize>,
    /// Milliseconds to make one image; absent for images that were there already.
    pub ms_per_image: Option<f64>,
}

impl Collected {
    /// Reference statistics: no images.
    pub fn of_statistics(statistics: Statistics) -> Self {
        Self {
            count: statistics.count.unwrap_or(0),
            statistics: Some(statistics),
            rows: None,
            chosen: Vec::new(),
            classes: None,
            inception: None,
            patches: None,
            shape: None,
            notes: Vec::new(),
            nfe: None,
            ms_per_image: None,
        }
    }
}

impl ByClass {
    /// Classes present, ascending.
    pub fn present(&self) -> Vec<usize> {
        let mut all = self.labels.clone();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Number of images of a class.
    pub fn count(&self, class: usize) -> usize {
        self.labels.iter().filter(|&&l| l == class).count()
    }

    /// Features of a class.
    pub fn matrix(&self, class: usize) -> Result<FeatureMatrix> {
        let rows = self.labels.iter().enumerate().filter(|(_, l)| **l == class);
        let values: Vec<f32> =
            rows.flat_map(|(i, _)| self.values[i * self.dims..(i + 1) * self.dims].iter().copied()).collect();
        matrix(&values, self.dims)
    }
}

fn matrix(values: &[f32], dims: usize) -> Result<FeatureMatrix> {
    let rows = ArrayView2::from_shape((values.len() / dims.max(1), dims), values);
    FeatureMatrix::new(rows.map_err(|e| Error::mismatch(e.to_string()))?)
}

/// Looks at images `start..start+count` of a source. `seen` is told how many more are done.
pub fn collect(
    source: &mut Source,
    draw: &Draw,
    mut net: Option<&mut FeatureNet>,
    (start, count): (usize, usize),
    wanted: Wanted,
    mut seen: impl FnMut(usize),
) -> Result<Collected> {
    let shape = source.shape().ok_or_else(|| match source.sample_shape() {
        None => Error::usage("statistics hold no images"),
        Some(other) => Error::usage(format!("the samples are {}, which are no images", crate::axes::written(&other)))
            .hint("--values measures their values"),
    })?;
    if count == 0 {
        return Err(Error::usage("no images to look at"));
    }
    let mut keep = vec![false; count];
    if wanted.rows && net.is_some() {
        shuffled(count, 3).into_iter().take(MOST).for_each(|k| keep[k] = true);
    }
    let batch = draw.request.batch.max(1);
    let mut moments: Option<Moments> = None;
    let (mut kept, mut all, mut labels) = (Vec::<f32>::new(), Vec::<f32>::new(), Vec::new());
    let mut scores: Option<Gather> = None;
    let mut patches = wanted.patches.then(|| Patches::new(shape));
    let (mut nfe, mut seconds) = (None, 0.0);
    for first in (0..count).step_by(batch) {
        let n = batch.min(count - first);
        let began = Instant::now();
        let drawn = source.draw(draw, start + first, n)?;
        seconds += began.elapsed().as_secs_f64();
        nfe = drawn.nfe;
        if let Some(patches) = &mut patches {
            let size: usize = shape.iter().product();
            for (k, image) in drawn.images.bytes().chunks_exact(size).enumerate() {
                patches.push(image, (first + k) as u64);
            }
        }
        if wanted.classes {
            let given = drawn.labels.as_deref().ok_or_else(|| {
                Error::usage("class-wise measures need classes, and this set has none").hint(
                    "a folder with one sub-folder a class, a dataset.json, or an array `labels` beside the images",
                )
            })?;
            labels.extend_from_slice(given);
        }
        if let Some(net) = net.as_deref_mut() {
            let out = net.see(&drawn.images, batch)?;
            let moments = moments.get_or_insert_with(|| Moments::new(out.features.ncols()));
            for (k, row) in out.features.rows().into_iter().enumerate() {
                moments.push(row.iter().map(|&v| f64::from(v)))?;
                if keep[first + k] {
                    kept.extend(row);
                }
            }
            if wanted.classes {
                all.extend(&out.features);
            }
            if let Some(logits) = out.logits {
                let gather = scores.get_or_insert_with(|| Gather::new(count));
                logits.rows().into_iter().try_for_each(|row| gather.push(&row.to_vec()))?;
            }
        }
        seen(n);
    }
    let dims = moments.as_ref().map_or(0, Moments::dims);
    let statistics = match (moments, &net) {
        (Some(moments), Some(net)) => {
            Some(Statistics { network: Some(net.fingerprint()), ..Statistics::from_moments(moments)? })
        }
        _ => None,
    };
    let rows = match statistics.is_some() && wanted.rows {
        true => Some(matrix(&kept, dims)?),
        false => None,
    };
    Ok(Collected {
        statistics,
        rows,
        chosen: (0..count).filter(|&k| keep[k]).collect(),
        classes: (wanted.classes && dims > 0).then_some(ByClass { dims, values: all, labels }),
        inception: scores.map(|s| s.finish()).transpose()?,
        patches,
        shape: Some(shape),
        notes: source.notes().to_vec(),
        count,
        nfe,
        ms_per_image: nfe.map(|_| seconds * 1e3 / count as f64),
    })
}
