//! Images within the page, small enough that a report can be mailed.

use base64::Engine as _;
use image::imageops::FilterType;

/// A PNG of at most this many bytes goes in as it is.
const SMALL: usize = 48 << 10;
const QUALITY: u8 = 86;

/// Most bytes of an animation or of a piece of sound that goes in.
const LARGEST: usize = 3 << 20;

/// Most pixels of a sheet that is looked into.
const PIXELS: u64 = 1 << 26;

/// The picture in a PNG; none where it is none, or one of more pixels than a sheet has.
fn sheet(png: &[u8]) -> Option<image::DynamicImage> {
    let reader = || image::ImageReader::with_format(std::io::Cursor::new(png), image::ImageFormat::Png);
    let (width, height) = reader().into_dimensions().ok()?;
    (u64::from(width) * u64::from(height) <= PIXELS).then(|| reader().decode().ok()).flatten()
}

fn address(kind: &str, bytes: &[u8]) -> String {
    format!("data:{kind};base64,{}", base64::engine::general_purpose::STANDARD.encode(bytes))
}

/// A `data:` address of an animated PNG or a .wav, as it is: none where it is too large for a page.
pub fn whole(kind: &str, bytes: &[u8]) -> Option<String> {
    (bytes.len() <= LARGEST).then(|| address(kind, bytes))
}

/// A `data:` address of a sheet shown at most `width` pixels wide; large ones are scaled down and become JPEG. None where it is
/// no picture.
pub fn data(png: &[u8], width: u32) -> Option<String> {
    if png.len() <= SMALL {
        return Some(address("image/png", png));
    }
    let mut sheet = sheet(png)?;
    if sheet.width() > width {
        let height = (u64::from(sheet.height()) * u64::from(width) / u64::from(sheet.width())).max(1) as u32;
        sheet = sheet.resize_exact(width, height, FilterType::Triangle);
    }
    let mut out = Vec::new();
    let rgb = sheet.to_rgb8();
    image::codecs::jpeg::JpegEncoder::new_with_quality(&mut out, QUALITY).encode_image(&rgb).ok()?;
    Some(if out.len() < png.len() { address("image/jpeg", &out) } else { address("image/png", png) })
}

/// The first `rows` of a sheet that is about square, as PNG: enough to see what a distribution looks like.
pub fn top(png: &[u8], share: f64) -> Option<Vec<u8>> {
    let sheet = sheet(png)?;
    let height = ((f64::from(sheet.height()) * share).round() as u32).clamp(1, sheet.height());
    let mut out = std::io::Cursor::new(Vec::new());
    sheet.crop_imm(0, 0, sheet.width(), height).write_to(&mut out, image::ImageFormat::Png).ok()?;
    Some(out.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::images::encode_png;

    #[test]
    fn large_sheets_become_small_pictures() {
        let side = 700usize;
        let noisy: Vec<u8> = (0..3 * side * side).map(|k| (k.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let png = encode_png(&noisy, [3, side, side]).unwrap();
        assert!(png.len() > 1 << 20);
        let found = data(&png, 350).unwrap();
        assert!(found.starts_with("data:image/jpeg;base64,") && found.len() < 160 << 10, "{}", found.len());
        let small = encode_png(&[7; 64], [1, 8, 8]).unwrap();
        assert!(data(&small, 4).unwrap().starts_with("data:image/png;base64,"));
        assert!(data(&vec![0; SMALL + 1], 100).is_none());
        let half = image::load_from_memory(&top(&png, 0.5).unwrap()).unwrap();
        assert_eq!((half.width(), half.height()), (700, 350));
    }
}
