//! PNG files in memory.

use crate::error::{Error, Result};

/// Pixels plane by plane as pixels with the channels last; refuses what is no image of 1 or 3 channels.
fn interleaved(pixels: &[u8], [c, h, w]: [usize; 3]) -> Result<Vec<u8>> {
    if !(c == 1 || c == 3) || pixels.len() != c * h * w || pixels.is_empty() {
        return Err(Error::mismatch(format!("{} values for an image of {c} channels, {w}x{h}", pixels.len())));
    }
    Ok((0..h * w).flat_map(|p| (0..c).map(move |channel| pixels[channel * h * w + p])).collect())
}

/// Writes one image, [C,H,W] 8-bit with 1 or 3 channels, as PNG bytes.
pub fn encode_png(pixels: &[u8], [c, h, w]: [usize; 3]) -> Result<Vec<u8>> {
    use image::ImageEncoder;
    let last = interleaved(pixels, [c, h, w])?;
    let color = if c == 1 { image::ExtendedColorType::L8 } else { image::ExtendedColorType::Rgb8 };
    let mut out = Vec::new();
    image::codecs::png::PngEncoder::new(&mut out)
        .write_image(&last, w as u32, h as u32, color)
        .map_err(|e| Error::io(format!("PNG: {e}")))?;
    Ok(out)
}

/// Writes frames, each [C,H,W] 8-bit with 1 or 3 channels, as one animated PNG that begins anew after the last: browsers play
/// it, and what does not know of animations shows the first frame.
pub fn encode_animation(frames: &[Vec<u8>], [c, h, w]: [usize; 3], frames_a_second: u16) -> Result<Vec<u8>> {
    let wrong = |e: png::EncodingError| Error::io(format!("animated PNG: {e}"));
    let mut out = Vec::new();
    let mut encoder = png::Encoder::new(&mut out, w as u32, h as u32);
    encoder.set_color(if c == 1 { png::ColorType::Grayscale } else { png::ColorType::Rgb });
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_animated(frames.len() as u32, 0).map_err(wrong)?;
    encoder.set_frame_delay(1, frames_a_second.max(1)).map_err(wrong)?;
    let mut writer = encoder.write_header().map_err(wrong)?;
    for frame in frames {
        writer.write_image_data(&interleaved(frame, [c, h, w])?).map_err(wrong)?;
    }
    writer.finish().map_err(wrong)?;
    Ok(out)
}
