//! Noise and classes keyed by (seed, image index): image `k` is the same whatever the batch size, engine or process.
//!
//! The convention, written into every student's metadata as [`SEED_CONVENTION`]: a ChaCha8 stream whose 32-byte key is
//! `seed (u64 LE) | index (u64 LE) | tag (16 bytes, zero padded)`; two 32-bit words `a, b` give two normals by Box-Muller,
//! `r cos(2 pi b / 2^32)` and `r sin(2 pi b / 2^32)` with `r = sqrt(-2 ln((a + 1) / 2^32))`, in f64, rounded to f32.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Name of this module's convention; students carry it as `seed_convention` in their metadata entry `disback.consumer`.
pub const SEED_CONVENTION: &str = "chacha8-box-muller-v1";

fn stream(seed: u64, index: u64, tag: &[u8]) -> ChaCha8Rng {
    let mut key = [0u8; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&index.to_le_bytes());
    key[16..16 + tag.len()].copy_from_slice(tag);
    ChaCha8Rng::from_seed(key)
}

/// `len` standard normal values for image `index` of the run `seed`. A longer request starts with the shorter one's values.
pub fn image_noise(seed: u64, index: u64, len: usize) -> Vec<f32> {
    let mut rng = stream(seed, index, b"noise");
    let mut out = Vec::with_capacity(len + 1);
    const SCALE: f64 = 1.0 / 4_294_967_296.0;
    while out.len() < len {
        let (a, b) = (f64::from(rng.next_u32()), f64::from(rng.next_u32()));
        let radius = (-2.0 * ((a + 1.0) * SCALE).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * b * SCALE).sin_cos();
        out.push((radius * cos) as f32);
        out.push((radius * sin) as f32);
    }
    out.truncate(len);
    out
}

/// Class of image `index` of the run `seed`, uniform over `0..classes`; 0 where there are no classes.
pub fn image_class(seed: u64, index: u64, classes: usize) -> usize {
    let word = stream(seed, index, b"class").next_u64();
    ((u128::from(word) * classes as u128) >> 64) as usize
}

/// [`image_noise`] for images `start..start+count`, one after the other: the rows of a `[count, ...]` tensor.
pub fn batch_noise(seed: u64, start: u64, count: usize, len: usize) -> Vec<f32> {
    (0..count as u64).flat_map(|k| image_noise(seed, start.wrapping_add(k), len)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_made_of_images() {
        let batch = batch_noise(7, 3, 4, 5);
        for k in 0..4 {
            assert_eq!(batch[k * 5..k * 5 + 5], image_noise(7, 3 + k as u64, 5));
        }
        assert_eq!(image_noise(7, 3, 5), image_noise(7, 3, 64)[..5]);
        assert_ne!(image_noise(7, 3, 5), image_noise(8, 3, 5));
        assert_ne!(image_noise(7, 3, 5), image_noise(7, 4, 5));
    }

    #[test]
    fn values_are_the_convention() {
        // ChaCha8 keystream computed independently (key = seed 42, index 7, tag "noise").
        let expected = [-0.448621, -0.794242, 0.370676, -0.28842, -0.291899, -1.357797];
        for (got, want) in image_noise(42, 7, 6).iter().zip(expected) {
            assert!((got - want).abs() < 1e-6, "{got} {want}");
        }
    }

    #[test]
    fn moments_are_those_of_a_standard_normal() {
        let x: Vec<f64> = (0..400).flat_map(|i| image_noise(0, i, 500)).map(f64::from).collect();
        let n = x.len() as f64;
        let moment = |p: i32| x.iter().map(|v| v.powi(p)).sum::<f64>() / n;
        // 5 standard errors: sd of x^p is 1, sqrt(2), sqrt(15), sqrt(96).
        for (p, want, sd) in [(1, 0.0, 1.0), (2, 1.0, 2f64.sqrt()), (3, 0.0, 15f64.sqrt()), (4, 3.0, 96f64.sqrt())] {
            assert!((moment(p) - want).abs() < 5.0 * sd / n.sqrt(), "moment {p}: {}", moment(p));
        }
    }

    #[test]
    fn classes_are_uniform() {
        let mut counts = [0usize; 10];
        (0..20_000).for_each(|i| counts[image_class(1, i, 10)] += 1);
        let chi2: f64 = counts.iter().map(|&c| (c as f64 - 2000.0).powi(2) / 2000.0).sum();
        assert!(chi2 < 33.7, "{counts:?}"); // 9 degrees of freedom, p = 1e-4
        assert_eq!(image_class(1, 5, 0), 0);
    }
}
