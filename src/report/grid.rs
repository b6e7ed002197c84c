//! A sheet of samples as one PNG.

use std::path::Path;

use crate::error::{Error, Result};
use crate::io::images::{encode_png, quantise};
use crate::tensor::HostTensor;

/// Small images are enlarged (nearest neighbour, whole factors) until a side has this many pixels.
const TILE: usize = 48;
const BACKGROUND: u8 = 255;

/// The range that stands for black to white: the samples' own smallest and largest finite value.
pub(super) fn range_of(samples: &HostTensor) -> [f64; 2] {
    let finite = samples.to_f64().into_iter().filter(|v| v.is_finite());
    let (low, high) = finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
    if low < high { [low, high] } else { [low.min(0.0), low.max(0.0) + 1.0] }
}

/// Lays samples [N,C,H,W] out in rows of `columns` (about square where absent) and gives the PNG's bytes. Values lie in
/// `range`; without one (latents) the set's own minimum and maximum stand for black and white. One channel is shown grey,
/// three or more as colour by the first three. NaN and infinities are magenta.
pub fn png(samples: &HostTensor, range: Option<[f64; 2]>, columns: Option<usize>) -> Result<Vec<u8>> {
    let range = range.unwrap_or_else(|| range_of(samples));
    let broken = !samples.is_finite();
    let (pixels, shape) = pixels(samples, range, columns, broken)?;
    encode_png(&pixels, shape)
}

/// The sheet of [`png`] as 8-bit pixels, plane by plane, with its number of planes, height and width. `broken`: in colour,
/// so that a broken image is seen even in a grey sheet.
pub(super) fn pixels(
    samples: &HostTensor,
    range: [f64; 2],
    columns: Option<usize>,
    broken: bool,
) -> Result<(Vec<u8>, [usize; 3])> {
    let [n, c, h, w] = *samples.shape() else {
        return Err(Error::mismatch(format!("samples of shape {:?}, expected [N, C, H, W]", samples.shape())));
    };
    if samples.is_empty() {
        return Err(Error::mismatch("no samples to show"));
    }
    let values = samples.to_f64();
    let planes = if c >= 3 { 3 } else { 1 };
    let out_planes = if broken { 3 } else { planes };
    let columns = columns.unwrap_or((n as f64).sqrt().ceil() as usize).clamp(1, n);
    let rows = n.div_ceil(columns);
    let scale = TILE.div_ceil(h.max(w)).max(1);
    let gap = 2;
    let (tile_h, tile_w) = (h * scale, w * scale);
    let (height, width) = (rows * (tile_h + gap) + gap, columns * (tile_w + gap) + gap);
    if height.max(width) > 32_768 {
        return Err(Error::usage(format!("a sheet of {width}x{height} pixels is too large"))
            .hint("write fewer samples, or a folder of single images"));
    }
    let mut out = vec![BACKGROUND; out_planes * height * width];
    for k in 0..n {
        let (top, left) = ((k / columns) * (tile_h + gap) + gap, (k % columns) * (tile_w + gap) + gap);
        for plane in 0..out_planes {
            for y in 0..h {
                for x in 0..w {
                    let value = values[((k * c + plane.min(planes - 1)) * h + y) * w + x];
                    let byte = match value.is_finite() {
                        true => quantise(value, range),
                        false => [255, 0, 255][plane],
                    };
                    for row in 0..scale {
                        let at = (plane * height + top + y * scale + row) * width + left + x * scale;
                        out[at..at + scale].fill(byte);
                    }
                }
            }
        }
    }
    Ok((out, [out_planes, height, width]))
}

/// [`png`] into a file, whole or not at all.
pub fn write(path: &Path, samples: &HostTensor, range: Option<[f64; 2]>, columns: Option<usize>) -> Result<()> {
    crate::files::write_atomic(path, &png(samples, range, columns)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(bytes: &[u8]) -> image::RgbImage {
        image::load_from_memory(bytes).unwrap().to_rgb8()
    }

    #[test]
    fn tiles_lie_where_they_should() {
        // Five one-pixel images: 3 columns, 2 rows, each enlarged to 48 pixels with gaps of 2.
        let samples = HostTensor::new(&[5, 1, 1, 1], &[-1.0f32, -0.5, 0.0, 0.5, 1.0]).unwrap();
        let sheet = decode(&png(&samples, Some([-1.0, 1.0]), None).unwrap());
        assert_eq!(sheet.dimensions(), (3 * 50 + 2, 2 * 50 + 2));
        let at = |col: u32, row: u32| sheet.get_pixel(2 + col * 50 + 47, 2 + row * 50 + 47).0;
        assert_eq!(at(0, 0), [0; 3]);
        assert_eq!(at(2, 0), [128; 3]);
        assert_eq!(at(0, 1), [191; 3]);
        assert_eq!(at(1, 1), [255; 3]);
        assert_eq!(sheet.get_pixel(0, 0).0, [255; 3]);
    }

    #[test]
    fn colour_latents_and_broken_values() {
        let colour = HostTensor::new(&[1, 3, 1, 1], &[1.0f32, -1.0, 0.0]).unwrap();
        assert_eq!(decode(&png(&colour, Some([-1.0, 1.0]), None).unwrap()).get_pixel(5, 5).0, [255, 0, 128]);
        let latent = HostTensor::new(&[1, 4, 1, 1], &[-7.0f32, 7.0, 0.0, 3.0]).unwrap();
        assert_eq!(decode(&png(&latent, None, None).unwrap()).get_pixel(5, 5).0, [0, 255, 128]);
        let broken = HostTensor::new(&[2, 1, 1, 1], &[0.0, f32::NAN]).unwrap();
        let sheet = decode(&png(&broken, Some([-1.0, 1.0]), Some(2)).unwrap());
        assert_eq!((sheet.get_pixel(5, 5).0, sheet.get_pixel(55, 5).0), ([128; 3], [255, 0, 255]));
        assert!(png(&HostTensor::vec(&[1f32]), None, None).is_err());
    }
}
