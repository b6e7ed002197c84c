//! Sound as .wav files: 32-bit floats, so that nothing is cut off or rounded and the numbers can be read back.

use ndarray::ArrayView2;

use crate::error::{Error, Result};

/// The bytes of a .wav of one piece of sound `[C, L]` with `rate` values a second (Hz). Values in `range` become -1 to 1, which
/// is what full loudness is there; without a range they stay as they are.
///
/// Errors: more than 65535 channels, or more than 4 GiB.
pub fn encode(sound: ArrayView2<'_, f32>, range: Option<[f64; 2]>, rate: u32) -> Result<Vec<u8>> {
    let wrong = |e: hound::Error| Error::io(format!(".wav: {e}"));
    let channels = u16::try_from(sound.nrows())
        .map_err(|_| Error::mismatch(format!("sound of {} channels: a .wav has at most 65535", sound.nrows())))?;
    let spec =
        hound::WavSpec { channels, sample_rate: rate, bits_per_sample: 32, sample_format: hound::SampleFormat::Float };
    let [low, high] = range.unwrap_or([-1.0, 1.0]);
    let plain = [low, high] == [-1.0, 1.0];
    let mut out = std::io::Cursor::new(Vec::new());
    let mut writer = hound::WavWriter::new(&mut out, spec).map_err(wrong)?;
    for step in sound.columns() {
        for &v in step {
            let v = if plain { v } else { ((f64::from(v) - low) / (high - low) * 2.0 - 1.0) as f32 };
            writer.write_sample(v).map_err(wrong)?;
        }
    }
    writer.finalize().map_err(wrong)?;
    Ok(out.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Channels lie side by side, step by step, and keep their numbers.
    #[test]
    fn sound_comes_back() {
        let sound = ndarray::array![[0.25f32, -1.0, 1.5], [0.0, 0.5, -0.125]];
        let bytes = encode(sound.view(), Some([-1.0, 1.0]), 22_050).unwrap();
        let mut reader = hound::WavReader::new(bytes.as_slice()).unwrap();
        let spec = reader.spec();
        assert_eq!((spec.channels, spec.sample_rate, spec.bits_per_sample), (2, 22_050, 32));
        let values: Vec<f32> = reader.samples::<f32>().collect::<std::result::Result<_, _>>().unwrap();
        assert_eq!(values, [0.25, 0.0, -1.0, 0.5, 1.5, -0.125]);
        let bytes = encode(ndarray::array![[0.0f32, 2.0, 4.0]].view(), Some([0.0, 4.0]), 8000).unwrap();
        let mut reader = hound::WavReader::new(bytes.as_slice()).unwrap();
        assert_eq!(reader.samples::<f32>().map(|v| v.unwrap()).collect::<Vec<_>>(), [-1.0, 0.0, 1.0]);
    }
}
