//! Single PNG files: on disk, in archives, in memory.

use std::path::{Path, PathBuf};

use bytes::Bytes;

use crate::error::{Context, Error, Result};

fn ends_with(name: &str, extensions: &[&str]) -> bool {
    let extension = Path::new(name).extension().and_then(|e| e.to_str()).unwrap_or("");
    extensions.iter().any(|e| extension.eq_ignore_ascii_case(e))
}
pub(super) fn is_png(name: &str) -> bool {
    ends_with(name, &["png"])
}
pub(super) fn is_lossy(name: &str) -> bool {
    ends_with(name, &["jpg", "jpeg", "webp"])
}

/// Every PNG file below `folder`, sorted, and the number of files of other image formats. Links to folders are not followed;
/// at most 16 folders deep.
pub(super) fn find(folder: &Path) -> Result<(Vec<PathBuf>, usize)> {
    let (mut files, mut others) = (Vec::new(), 0);
    walk(folder, 0, &mut |file| match is_png(&file.to_string_lossy()) {
        true => files.push(file),
        false => others += usize::from(is_lossy(&file.to_string_lossy())),
    })?;
    files.sort();
    Ok((files, others))
}

/// Every file below `folder`, links to folders not followed, at most 16 folders deep.
fn walk(folder: &Path, depth: usize, found: &mut impl FnMut(PathBuf)) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        match entry.file_type()? {
            t if t.is_dir() && depth < 16 => walk(&entry.path(), depth + 1, found)?,
            t if t.is_dir() => {}
            _ => found(entry.path()),
        }
    }
    Ok(())
}

pub(super) fn read_file(path: &Path) -> Result<([usize; 3], Vec<u8>)> {
    let run = || decode(std::io::BufReader::new(std::fs::File::open(path)?));
    run().with_context(|| path.display().to_string())
}

pub(super) fn read_zipped(
    zip: &mut zip::ZipArchive<std::io::Cursor<Bytes>>,
    name: &str,
) -> Result<([usize; 3], Vec<u8>)> {
    let mut file = zip.by_name(name).map_err(|e| Error::io(format!("{name}: {e}")))?;
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut file, &mut bytes).with_context(|| name.to_string())?;
    decode(std::io::Cursor::new(bytes)).with_context(|| name.to_string())
}

/// Shape (channels, height, width) and pixels with the channels last. An opaque alpha channel is dropped, another refused.
fn decode(reader: impl std::io::BufRead + std::io::Seek) -> Result<([usize; 3], Vec<u8>)> {
    let image = image::ImageReader::with_format(reader, image::ImageFormat::Png)
        .decode()
        .map_err(|e| Error::io(format!("not a PNG file: {e}")))?;
    let size = |c| [c, image.height() as usize, image.width() as usize];
    let color = image.color();
    if color.has_alpha() && image.to_rgba8().pixels().any(|p| p[3] != 255) {
        return Err(Error::io("the image is partly transparent"));
    }
    Ok(if color.has_color() { (size(3), image.to_rgb8().into_raw()) } else { (size(1), image.to_luma8().into_raw()) })
}

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
