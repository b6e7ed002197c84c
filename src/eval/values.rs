//! Measures on the samples' own numbers, for what is no image and where no network gives features: tables, sequences, sound,
//! volumes, points. Each sample is one row of its values. Where there are too few samples for so many values, the rows are
//! reduced to the leading principal components of the reference, and the figures say so.

use std::time::Instant;

use faer::{Mat, Side};
use ndarray::{Array1, Array2, ArrayView2, Axis, s};
use sha2::{Digest, Sha256};

use super::evaluation::EvaluationRow;
use super::kernel::Estimator;
use super::source::{Draw, Source};
use super::tally::{Tally, deviation, mean};
use super::{FeatureMatrix, FeatureNet, Statistics, few, shuffled, sliced};
use crate::axes::written;
use crate::error::{Context, Error, Result};

/// Most dimensions that are compared; of more values, the leading principal components are taken.
const MOST_DIMS: usize = 1024;
/// A Gaussian of `d` dimensions is fitted to at least this many times `d` samples.
const SAMPLES_A_DIM: usize = 2;
/// Most samples that principal components are found from.
const FIT: usize = 2048;
/// Rows that are projected at a time.
const STRIP: usize = 512;

/// Where distances are measured.
#[derive(Debug, Clone)]
enum Space {
    /// The values as they are.
    Values,
    /// Principal components of the reference.
    Components { mean: Array1<f64>, basis: Mat<f64>, note: String },
    /// What a network makes of the values.
    Features,
}

/// The reference's samples, and the space in which others are compared with them.
#[derive(Debug, Clone)]
pub struct Reference {
    shape: Vec<usize>,
    values: Array2<f32>,
    space: Space,
    rows: FeatureMatrix,
    statistics: Statistics,
}

/// Samples of a set, one a row.
struct Set {
    values: Array2<f32>,
    /// What a network makes of them.
    features: Option<Array2<f32>>,
    nfe: Option<usize>,
    ms_per_sample: Option<f64>,
}

/// Samples `start..start+count` of a source. `seen` is told how many more are done.
fn collect(
    source: &mut Source,
    draw: &Draw,
    mut net: Option<&mut FeatureNet>,
    (start, count): (usize, usize),
    mut seen: impl FnMut(usize),
) -> Result<Set> {
    let batch = draw.request.batch.max(1);
    // (In one piece, so that they are in memory once.)
    let mut values = Vec::new();
    let (mut width, mut features, mut nfe, mut seconds) = (0, Vec::new(), None, 0.0);
    for first in (0..count).step_by(batch) {
        let n = batch.min(count - first);
        let began = Instant::now();
        let (samples, calls) = source.draw_values(draw, start + first, n)?;
        seconds += began.elapsed().as_secs_f64();
        nfe = calls;
        let row = samples.len().checked_div(n).unwrap_or(0);
        let part = samples.to_f32();
        if let Some(at) = part.iter().position(|v| !v.is_finite()) {
            return Err(Error::mismatch(format!("sample {} holds {}", start + first + at / row.max(1), part[at])));
        }
        if let Some(net) = net.as_deref_mut() {
            features.push(net.see_values(&samples, batch)?);
        }
        if values.is_empty() {
            width = row;
            values.reserve_exact(row.saturating_mul(count));
        }
        values.extend(part);
        seen(n);
    }
    let join = |parts: &[Array2<f32>]| {
        let parts: Vec<_> = parts.iter().map(|p| p.view()).collect();
        ndarray::concatenate(Axis(0), &parts).map_err(|_| Error::usage("no samples to look at"))
    };
    Ok(Set {
        values: match count {
            0 => return Err(Error::usage("no samples to look at")),
            _ => Array2::from_shape_vec((count, width), values).map_err(|e| Error::mismatch(e.to_string()))?,
        },
        features: net.map(|_| join(&features)).transpose()?,
        nfe,
        ms_per_sample: nfe.map(|_| seconds * 1e3 / count.max(1) as f64),
    })
}

/// The first `dims` principal components of rows: their mean, the directions as columns, and the share of the variance in them.
fn principal(rows: ArrayView2<'_, f32>, dims: usize) -> Result<(Array1<f64>, Mat<f64>, f64)> {
    let mut order = shuffled(rows.nrows(), 5);
    order.truncate(FIT);
    let (n, d) = (order.len(), rows.ncols());
    let mut mean = Array1::<f64>::zeros(d);
    for &i in &order {
        mean.iter_mut().zip(rows.row(i)).for_each(|(m, v)| *m += f64::from(*v) / n as f64);
    }
    let x = Mat::from_fn(n, d, |i, j| f64::from(rows[(order[i], j)]) - mean[j]);
    // The smaller of both products has all that is needed.
    let tall = d <= n;
    let product = if tall { x.transpose() * &x } else { &x * x.transpose() };
    let eigen = product
        .self_adjoint_eigen(Side::Lower)
        .map_err(|_| Error::backend("the principal components of the reference did not converge"))?;
    let mut found: Vec<(usize, f64)> = (0..product.nrows()).map(|k| (k, eigen.S()[k])).collect();
    found.sort_by(|a, b| b.1.total_cmp(&a.1));
    let all: f64 = found.iter().map(|(_, v)| v.max(0.0)).sum();
    if all <= 0.0 {
        return Err(Error::mismatch("all samples of the reference are equal"));
    }
    let least = found[0].1 * d.max(n) as f64 * f64::EPSILON;
    found.truncate(dims);
    found.retain(|(_, v)| *v > least);
    let kept = found.iter().map(|(_, v)| v).sum::<f64>() / all;
    let u = eigen.U();
    let chosen = Mat::from_fn(product.nrows(), found.len(), |i, j| {
        u[(i, found[j].0)] / if tall { 1.0 } else { found[j].1.sqrt() }
    });
    Ok((mean, if tall { chosen } else { x.transpose() * &chosen }, kept))
}

impl Space {
    /// The space for `values`, of which as many as `samples` are compared with as many others.
    fn of(values: ArrayView2<'_, f32>, samples: usize) -> Result<Self> {
        let dims = values.ncols();
        let most = (samples.min(values.nrows()) / SAMPLES_A_DIM).clamp(1, MOST_DIMS);
        if dims <= most {
            return Ok(Self::Values);
        }
        let (mean, basis, kept) = principal(values, most)?;
        let note = format!(
            "Frechet and kernel distance, precision, recall, density and coverage are of the {} leading principal components of the \
             reference's {dims} values ({:.1} % of their variance): compare them only with figures of the same reference and \
             number of samples",
            basis.ncols(),
            100.0 * kept
        );
        Ok(Self::Components { mean, basis, note })
    }

    /// Rows in this space.
    fn rows(&self, set: &Set) -> Result<FeatureMatrix> {
        match (self, &set.features) {
            (Self::Components { mean, basis, .. }, _) => {
                let mut out = Array2::<f64>::zeros((set.values.nrows(), basis.ncols()));
                for start in (0..set.values.nrows()).step_by(STRIP) {
                    let part = set.values.slice(s![start..(start + STRIP).min(set.values.nrows()), ..]);
                    let x = Mat::from_fn(part.nrows(), part.ncols(), |i, j| f64::from(part[(i, j)]) - mean[j]);
                    let z = &x * basis;
                    for i in 0..z.nrows() {
                        (0..z.ncols()).for_each(|j| out[(start + i, j)] = z[(i, j)]);
                    }
                }
                FeatureMatrix::new(out.view())
            }
            (Self::Features, Some(features)) => FeatureMatrix::new(features.view()),
            _ => FeatureMatrix::new(set.values.view()),
        }
    }
}

/// Sliced Wasserstein distance of two sets of rows, times 1000, and its standard error over groups of directions: the mean over
/// random unit directions of the mean distance between the sorted projections. As many rows of both are used.
pub fn sliced_distance(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>) -> (f64, f64) {
    let n = a.nrows().min(b.nrows()).min(sliced::IMAGES);
    let take = |rows: ArrayView2<'_, f32>, salt| -> Vec<f32> {
        if rows.nrows() == n {
            return rows.iter().copied().collect();
        }
        shuffled(rows.nrows(), salt).into_iter().take(n).flat_map(|i| rows.row(i).to_vec()).collect()
    };
    let values = sliced::by_direction(&take(a, 6), &take(b, 7), &sliced::directions(a.ncols(), sliced::ALL_DIRECTIONS));
    let groups: Vec<f64> =
        values.chunks_exact(sliced::DIRECTIONS).map(|g| 1e3 * g.iter().sum::<f64>() / g.len() as f64).collect();
    let spread = deviation(&groups).unwrap_or(0.0);
    (mean(&groups).unwrap_or(0.0), spread / (groups.len() as f64).sqrt())
}

impl Reference {
    /// Looks at the first `count` samples of the reference, of which as many as `samples` are compared with others.
    ///
    /// Errors: samples that hold NaN or are all equal; a network that does not take them.
    pub fn collect(
        source: &mut Source,
        draw: &Draw,
        mut net: Option<&mut FeatureNet>,
        count: usize,
        samples: usize,
        seen: impl FnMut(usize),
    ) -> Result<Self> {
        let shape = source.sample_shape().ok_or_else(|| {
            Error::usage("statistics hold no samples")
                .hint("measures on values need the reference's samples themselves")
        })?;
        let set = collect(source, draw, net.as_deref_mut(), (0, count), seen)?;
        let space = match net {
            Some(_) => Space::Features,
            None => Space::of(set.values.view(), samples)?,
        };
        let rows = space.rows(&set)?;
        let statistics = Statistics::of(&rows)?;
        Ok(Self { shape, values: set.values, space, rows, statistics })
    }

    /// Number of samples.
    pub fn count(&self) -> usize {
        self.values.nrows()
    }

    /// One sample, without the batch.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Hash of the values: equal references have equal ones.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        self.values.iter().for_each(|v| hash.update(v.to_le_bytes()));
        hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
    }

    /// Refuses samples of another shape; one that differs in axes of size 1 alone is the same.
    pub fn check(&self, name: &str, shape: &[usize]) -> Result<()> {
        let plain = |s: &[usize]| s.iter().copied().filter(|d| *d != 1).collect::<Vec<_>>();
        match plain(shape) == plain(&self.shape) {
            true => Ok(()),
            false => Err(Error::mismatch(format!(
                "{name} has samples {}, the reference {}",
                written(shape),
                written(&self.shape)
            ))
            .hint("bring the reference into the shape of the network's samples")),
        }
    }

    /// Measures blocks of `images` samples of a source. `seen` is told how many more are done.
    ///
    /// Errors: samples of another shape, too few of them, NaN among them.
    #[allow(clippy::too_many_arguments, reason = "what is measured, how, and who hears of it")]
    pub fn measure(
        &self,
        name: &str,
        source: &mut Source,
        draw: &Draw,
        mut net: Option<&mut FeatureNet>,
        (images, blocks): (usize, usize),
        kernel: Estimator,
        mut seen: impl FnMut(usize),
    ) -> Result<EvaluationRow> {
        self.check(name, &source.sample_shape().unwrap_or_default())?;
        if let Some(len) = source.len().filter(|len| *len < blocks * images) {
            return Err(Error::usage(format!("{name} holds {len} samples: too few for {blocks} block(s) of {images}")));
        }
        let mut row = EvaluationRow {
            name: name.to_string(),
            kind: source.kind().to_string(),
            images: [images, self.count()],
            blocks,
            features: Some(self.rows.dims()),
            by_values: true,
            ..EvaluationRow::default()
        };
        let mut tally = Tally::default();
        for block in 0..blocks {
            let span = (block * images, images);
            let set = collect(source, draw, net.as_deref_mut(), span, &mut seen).with_context(|| name.to_string())?;
            let rows = self.space.rows(&set).with_context(|| name.to_string())?;
            tally.frechet(&Statistics::of(&rows)?, &self.statistics)?;
            tally.rows(&rows, &self.rows, kernel)?;
            let (distance, error) = sliced_distance(set.values.view(), self.values.view());
            tally.sliced(distance, error);
            tally.time(set.ms_per_sample);
            row.nfe = set.nfe;
        }
        tally.fill(&mut row);
        if let Space::Components { note, .. } = &self.space {
            row.warnings.push(note.clone());
        }
        row.warnings.extend(few("generated", images, self.rows.dims()));
        row.warnings.extend(few("reference", self.count(), self.rows.dims()));
        Ok(row)
    }
}
