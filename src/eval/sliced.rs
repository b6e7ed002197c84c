//! Sliced Wasserstein distance without any network (Karras et al. 2018, section 5): patches of every level of a Laplacian
//! pyramid, made white channel by channel, projected on random directions and sorted.

use rayon::prelude::*;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::error::{Context, Error, Result};
use crate::noise::image_noise;

/// Side of a patch.
const PATCH: usize = 7;
/// The coarsest level of the pyramid is the last whose sides are at least this.
const COARSEST: usize = 16;
/// Patches of each image and level.
const PATCHES: usize = 32;
/// Most images of a set that patches are taken of.
pub const IMAGES: usize = 4096;
/// Groups of directions, for the error; the directions of all groups make the mean.
const GROUPS: usize = 4;
/// Directions of a group.
pub(crate) const DIRECTIONS: usize = 64;
/// Directions of all groups.
pub(crate) const ALL_DIRECTIONS: usize = GROUPS * DIRECTIONS;

/// Distances times 1000, as the field quotes them: one a level, finest first, and their mean.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sliced {
    /// Mean distance over the levels of the pyramid, times 1000.
    pub mean: f64,
    /// Standard error over groups of random directions.
    pub standard_error: f64,
    /// Side lengths of the levels with their distances.
    pub levels: Vec<(usize, f64)>,
    /// Images used of each set.
    pub images: usize,
}

/// Patches of a set, level by level.
#[derive(Debug, Clone)]
pub struct Patches {
    shape: [usize; 3],
    levels: Vec<Vec<f32>>,
    images: usize,
}

/// Heights and widths of the pyramid's levels.
fn sizes([_, h, w]: [usize; 3]) -> Vec<[usize; 2]> {
    let mut out = vec![[h, w]];
    while let Some(&[h, w]) = out.last()
        && h.min(w) >= 2 * COARSEST
    {
        out.push([h.div_ceil(2), w.div_ceil(2)]);
    }
    out
}

impl Patches {
    /// For images of this shape (channels, height, width).
    pub fn new(shape: [usize; 3]) -> Self {
        Self { shape, levels: vec![Vec::new(); sizes(shape).len()], images: 0 }
    }

    /// Images added.
    pub fn images(&self) -> usize {
        self.images
    }

    /// Hash of the patches: equal sets of images have equal ones.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        self.levels.iter().flatten().for_each(|v| hash.update(v.to_le_bytes()));
        hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
    }

    /// Adds one 8-bit image [C,H,W]; image `index` always gives the same patches. More than [`IMAGES`] are passed over.
    pub fn push(&mut self, pixels: &[u8], index: u64) {
        if self.images >= IMAGES {
            return;
        }
        let c = self.shape[0];
        let values: Vec<f32> = pixels.iter().map(|&v| f32::from(v)).collect();
        let sizes = sizes(self.shape);
        for (level, band) in pyramid(&values, c, &sizes).into_iter().enumerate() {
            let [h, w] = sizes[level];
            let (ph, pw) = (PATCH.min(h), PATCH.min(w));
            // Positions by the image's own stream of uniform draws.
            let draw = |k: usize, room: usize| {
                let word = crate::noise::image_class(index, (level * PATCHES * 2 + k) as u64, room + 1);
                word.min(room)
            };
            for p in 0..PATCHES {
                let (top, left) = (draw(2 * p, h - ph), draw(2 * p + 1, w - pw));
                for channel in 0..c {
                    for y in 0..ph {
                        let at = (channel * h + top + y) * w + left;
                        self.levels[level].extend_from_slice(&band[at..at + pw]);
                    }
                }
            }
        }
        self.images += 1;
    }
}

/// The binomial filter `[1 4 6 4 1] / 16` in both directions, mirrored at the borders.
fn blur(image: &[f32], c: usize, [h, w]: [usize; 2], gain: f32) -> Vec<f32> {
    const TAPS: [f32; 5] = [1.0 / 16.0, 4.0 / 16.0, 6.0 / 16.0, 4.0 / 16.0, 1.0 / 16.0];
    // Mirrored about the edge pixel's centre: -1 is 1.
    let mirror = |i: isize, n: usize| -> usize {
        if n == 1 {
            return 0;
        }
        let period = 2 * (n as isize - 1);
        let i = i.rem_euclid(period);
        (if i >= n as isize { period - i } else { i }) as usize
    };
    let mut rows = vec![0f32; image.len()];
    for plane in 0..c {
        for y in 0..h {
            for x in 0..w {
                let line = (plane * h + y) * w;
                rows[line + x] = (0..5).map(|t| TAPS[t] * image[line + mirror(x as isize + t as isize - 2, w)]).sum();
            }
        }
    }
    let mut out = vec![0f32; image.len()];
    for plane in 0..c {
        for y in 0..h {
            let from: [usize; 5] = std::array::from_fn(|t| (plane * h + mirror(y as isize + t as isize - 2, h)) * w);
            for x in 0..w {
                let sum: f32 = (0..5).map(|t| TAPS[t] * rows[from[t] + x]).sum();
                out[(plane * h + y) * w + x] = gain * sum;
            }
        }
    }
    out
}

/// Bands of the Laplacian pyramid, finest first; the last is what remains.
pub(crate) fn pyramid(image: &[f32], c: usize, sizes: &[[usize; 2]]) -> Vec<Vec<f32>> {
    let mut bands = Vec::with_capacity(sizes.len());
    let mut here = image.to_vec();
    for pair in sizes.windows(2) {
        let ([h, w], [sh, sw]) = (pair[0], pair[1]);
        let smooth = blur(&here, c, [h, w], 1.0);
        let mut small = vec![0f32; c * sh * sw];
        let mut spread = vec![0f32; c * h * w];
        for plane in 0..c {
            for y in 0..sh {
                for x in 0..sw {
                    let v = smooth[(plane * h + 2 * y) * w + 2 * x];
                    small[(plane * sh + y) * sw + x] = v;
                    spread[(plane * h + 2 * y) * w + 2 * x] = v;
                }
            }
        }
        // Three of four pixels are zeros: the filter's gain makes up for them.
        let back = blur(&spread, c, [h, w], 4.0);
        bands.push(here.iter().zip(&back).map(|(a, b)| a - b).collect());
        here = small;
    }
    bands.push(here);
    bands
}

/// Subtracts mean and divides by deviation, channel by channel over all patches of a level.
fn whiten(patches: &[f32], c: usize, size: usize) -> Result<Vec<f32>> {
    let mut out = patches.to_vec();
    for channel in 0..c {
        let places = || {
            (0..patches.len() / (c * size)).flat_map(|p| {
                let start = (p * c + channel) * size;
                start..start + size
            })
        };
        let n = (patches.len() / c) as f64;
        let mean = places().map(|k| f64::from(patches[k])).sum::<f64>() / n;
        let variance = places().map(|k| (f64::from(patches[k]) - mean).powi(2)).sum::<f64>() / n;
        if variance <= 0.0 {
            return Err(Error::mismatch("all pixels of a channel are equal: the sliced distance is not defined"));
        }
        places().for_each(|k| out[k] = ((f64::from(patches[k]) - mean) / variance.sqrt()) as f32);
    }
    Ok(out)
}

/// Mean over directions of the mean distance between sorted projections; one value a direction.
pub(crate) fn by_direction(a: &[f32], b: &[f32], directions: &[Vec<f32>]) -> Vec<f64> {
    let project = |rows: &[f32], d: &[f32]| -> Vec<f32> {
        let mut out: Vec<f32> =
            rows.chunks_exact(d.len()).map(|r| r.iter().zip(d).map(|(x, y)| x * y).sum::<f32>()).collect();
        out.sort_unstable_by(f32::total_cmp);
        out
    };
    directions
        .par_iter()
        .map(|d| {
            let (x, y) = (project(a, d), project(b, d));
            let n = x.len().min(y.len()).max(1) as f64;
            x.iter().zip(&y).map(|(p, q)| f64::from((p - q).abs())).sum::<f64>() / n
        })
        .collect()
}

/// Random unit vectors, always the same for a size.
pub(crate) fn directions(len: usize, count: usize) -> Vec<Vec<f32>> {
    (0..count as u64)
        .map(|k| {
            let v = image_noise(0x51ce, k, len);
            let norm = v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt() as f32;
            v.into_iter().map(|x| x / norm).collect()
        })
        .collect()
}

/// Distance between two sets of patches of the same image size; the same number of images is used of both.
pub fn distance(a: &Patches, b: &Patches) -> Result<Sliced> {
    if a.shape != b.shape {
        return Err(Error::mismatch("the sliced distance compares images of one size and number of channels"));
    }
    let images = a.images.min(b.images);
    if images < 2 {
        return Err(Error::mismatch("the sliced distance needs at least two images in each set"));
    }
    let c = a.shape[0];
    let mut levels = Vec::new();
    let mut groups = [0.0; GROUPS];
    let sizes = sizes(a.shape);
    for (level, &[h, w]) in sizes.iter().enumerate() {
        let size = PATCH.min(h) * PATCH.min(w);
        let take = images * PATCHES * c * size;
        let x = whiten(&a.levels[level][..take], c, size).context("the first set")?;
        let y = whiten(&b.levels[level][..take], c, size).context("the second set")?;
        let values = by_direction(&x, &y, &directions(c * size, ALL_DIRECTIONS));
        for (g, part) in values.chunks_exact(DIRECTIONS).enumerate() {
            groups[g] += 1e3 * part.iter().sum::<f64>() / DIRECTIONS as f64 / sizes.len() as f64;
        }
        levels.push((h, 1e3 * values.iter().sum::<f64>() / values.len() as f64));
    }
    let mean = groups.iter().sum::<f64>() / GROUPS as f64;
    let spread = groups.iter().map(|g| (g - mean) * (g - mean)).sum::<f64>() / (GROUPS - 1) as f64;
    Ok(Sliced { mean, standard_error: (spread / GROUPS as f64).sqrt(), levels, images })
}
