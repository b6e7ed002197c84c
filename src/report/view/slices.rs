//! Volumes as sheets of slices, videos as strips of frames and as they move.

use ndarray::{ArrayD, Axis, IxDyn, Slice};

use crate::error::{Error, Result};
use crate::io::images::encode_animation;
use crate::report::grid;
use crate::tensor::HostTensor;

/// Samples of a sheet, and slices or frames of each; of more, a choice of equal steps.
const ROWS: usize = 8;
const ACROSS: usize = 8;
/// Most videos and frames of an animation, and its frames a second.
const VIDEOS: usize = 16;
const FRAMES: usize = 96;
const RATE: u16 = 8;

/// `count` of `0..n` in equal steps, the first and the last among them.
fn chosen(n: usize, count: usize) -> Vec<usize> {
    let count = count.clamp(1, n);
    (0..count).map(|k| if count == 1 { n / 2 } else { (k * (n - 1) + (count - 1) / 2) / (count - 1) }).collect()
}

/// The first `count` samples.
fn first(values: &ArrayD<f32>, count: usize) -> ArrayD<f32> {
    values.slice_axis(Axis(0), Slice::from(0..count.min(values.shape()[0]))).to_owned()
}

/// Samples [N,C,T,H,W] as a PNG: a row a sample, in it slices or frames in their order.
pub(super) fn sheet(values: &ArrayD<f32>, range: Option<[f64; 2]>, columns: Option<usize>) -> Result<Vec<u8>> {
    let picked = chosen(values.shape()[2], columns.unwrap_or(ACROSS));
    // [N, T, C, H, W], then one image a slice.
    let tiles = first(values, ROWS).select(Axis(2), &picked).permuted_axes(IxDyn(&[0, 2, 1, 3, 4]));
    let &[n, t, c, h, w] = tiles.shape() else {
        return Err(Error::mismatch(format!("{:?} of samples, expected [N, C, T, H, W]", values.shape())));
    };
    let images = HostTensor::from(tiles).reshaped(&[n * t, c, h, w])?;
    grid::png(&images, range, Some(t))
}

/// Videos [N,C,T,H,W] side by side as an animated PNG.
pub(super) fn animation(values: &ArrayD<f32>, range: Option<[f64; 2]>) -> Result<Vec<u8>> {
    let shown = first(values, VIDEOS);
    let all = HostTensor::from(shown.clone());
    let range = range.unwrap_or_else(|| grid::range_of(&all));
    let broken = !all.is_finite();
    let (mut frames, mut size) = (Vec::new(), [0; 3]);
    for t in chosen(shown.shape()[2], FRAMES) {
        let images = HostTensor::from(shown.index_axis(Axis(2), t).to_owned());
        let (pixels, shape) = grid::pixels(&images, range, None, broken)?;
        frames.push(pixels);
        size = shape;
    }
    encode_animation(&frames, size, RATE)
}
