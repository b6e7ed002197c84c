//! Single image files in folders and archives: which files of a set are images, and their pixels.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

use crate::error::{Context, Error, Result};

/// Formats that sets of images are kept in. Which of them this build reads besides PNG is the feature `formats`.
const FORMATS: [(ImageFormat, &str); 5] = [
    (ImageFormat::Png, "PNG"),
    (ImageFormat::Jpeg, "JPEG"),
    (ImageFormat::WebP, "WebP"),
    (ImageFormat::Bmp, "BMP"),
    (ImageFormat::Tiff, "TIFF"),
];

/// Most folders below one another that are looked into.
const DEEPEST: usize = 16;

/// The format that a file's name says.
fn format(name: &str) -> Option<(ImageFormat, &'static str)> {
    let format = ImageFormat::from_path(name).ok()?;
    FORMATS.into_iter().find(|(f, _)| *f == format)
}

/// What operating systems leave beside the files of a person: `._x.png`, `.DS_Store`, `__MACOSX/`, `Thumbs.db`.
fn is_clutter(name: &str) -> bool {
    name.starts_with('.') || ["__MACOSX", "Thumbs.db", "desktop.ini"].iter().any(|n| n.eq_ignore_ascii_case(name))
}

/// Counts of what a folder or archive holds.
#[derive(Debug, Default)]
pub(super) struct Seen {
    read: BTreeMap<&'static str, usize>,
    passed: BTreeMap<String, usize>,
}

impl Seen {
    /// Whether the file is an image that this build reads. `name` is its path within the set, with `/`.
    pub fn file(&mut self, name: &str) -> bool {
        if name.ends_with('/') || name.split('/').any(is_clutter) || name == "dataset.json" {
            return false;
        }
        match format(name) {
            Some((format, word)) if format.reading_enabled() => *self.read.entry(word).or_default() += 1,
            Some((_, word)) => {
                self.pass(&format!("{word} (this build reads PNG alone; cargo feature `formats`)"));
                return false;
            }
            None => {
                let extension = Path::new(name).extension().map(|e| format!(".{}", e.to_string_lossy().to_lowercase()));
                self.pass(&extension.unwrap_or_else(|| "without an extension".into()));
                return false;
            }
        }
        true
    }

    fn pass(&mut self, why: &str) {
        *self.passed.entry(why.into()).or_default() += 1;
    }

    fn list<K: std::fmt::Display>(counts: &BTreeMap<K, usize>) -> String {
        counts.iter().map(|(k, n)| format!("{n} {k}")).collect::<Vec<_>>().join(", ")
    }

    /// What is worth knowing of the set: files passed over, and pixels that depend on the decoder.
    pub fn notes(&self) -> Vec<String> {
        let (all, passed) = (self.read.values().sum::<usize>(), self.passed.values().sum::<usize>());
        let mut out = Vec::new();
        if passed > 0 {
            out.push(format!(
                "{} files, {all} of them images ({}), {passed} passed over: {}",
                all + passed,
                Self::list(&self.read),
                Self::list(&self.passed)
            ));
        }
        let lossy: usize = ["JPEG", "WebP"].iter().filter_map(|k| self.read.get(k)).sum();
        if lossy > 0 {
            out.push(format!(
                "{lossy} of {all} images are JPEG or WebP: decoders differ in the last bits of a pixel, and figures with them; convert \
                 them to PNG once where figures of several programs are compared"
            ));
        }
        out
    }

    /// The error of a set without images.
    pub fn none(&self, place: &str) -> Error {
        let error =
            Error::io(format!("{place} holds no .png files, and no images of another format that this build reads"));
        match self.passed.is_empty() {
            true => error,
            false => error.hint(format!("passed over: {}", Self::list(&self.passed))),
        }
    }
}

/// Every image below `folder`, sorted. Links are followed, to folders too, but not in a circle.
pub(super) fn find(folder: &Path) -> Result<(Vec<PathBuf>, Seen)> {
    let (mut files, mut seen) = (Vec::new(), Seen::default());
    walk(folder, folder, &mut vec![std::fs::canonicalize(folder)?], &mut files, &mut seen)?;
    files.sort();
    Ok((files, seen))
}

/// `above`: the folders on the way, without links.
fn walk(root: &Path, folder: &Path, above: &mut Vec<PathBuf>, files: &mut Vec<PathBuf>, seen: &mut Seen) -> Result<()> {
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let (path, name) = entry.map(|e| (e.path(), e.file_name()))?;
        if is_clutter(&name.to_string_lossy()) {
            continue;
        }
        // (Of what a link points at.)
        match std::fs::metadata(&path) {
            Err(_) => seen.pass("broken link"),
            Ok(m) if m.is_dir() => {
                let real = std::fs::canonicalize(&path)?;
                if above.contains(&real) {
                    seen.pass("link to a folder above it");
                } else if above.len() > DEEPEST {
                    seen.pass(&format!("folder more than {DEEPEST} deep"));
                } else {
                    above.push(real);
                    walk(root, &path, above, files, seen)?;
                    above.pop();
                }
            }
            Ok(m) if !m.is_file() => seen.pass("pipe, socket or device"),
            Ok(_) => {
                let within = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().replace('\\', "/");
                if seen.file(&within) {
                    files.push(path);
                }
            }
        }
    }
    Ok(())
}

/// Shape (channels, height, width) and pixels with the channels last.
pub(super) type Pixels = ([usize; 3], Vec<u8>);

pub(super) fn read_file(path: &Path) -> Result<Pixels> {
    let run = || decode(std::io::BufReader::new(crate::files::open(path)?), &path.to_string_lossy());
    run().with_context(|| path.display().to_string())
}

pub(super) fn read_zipped(zip: &mut zip::ZipArchive<std::io::Cursor<Bytes>>, name: &str) -> Result<Pixels> {
    let mut file = zip.by_name(name).map_err(|e| Error::io(format!("{name}: {e}")))?;
    let says = file.size();
    let mut run = || -> Result<Pixels> {
        let mut bytes = Vec::new();
        (&mut file).take(HEAD).read_to_end(&mut bytes)?;
        let (most, why) = most(&bytes, name);
        if says > most {
            return Err(Error::io(format!("{says} bytes by what the archive says; {why} has at most {most}")));
        }
        let rest = crate::files::read_to_end(&mut file, says.saturating_sub(bytes.len() as u64));
        bytes.extend(rest.map_err(|_| Error::io(format!("more bytes than the {says} that the archive says")))?);
        decode(std::io::Cursor::new(bytes), name)
    };
    run().with_context(|| name.to_string())
}

/// Bytes of a file from which its size is read.
const HEAD: u64 = 64 << 10;

/// Most bytes of a picture's file that begins like this, and what it is: twice its pixels at 16 bits a channel, and as much beside
/// them as cameras and editors write.
fn most(head: &[u8], name: &str) -> (u64, String) {
    const BESIDE: u64 = 32 << 20;
    let (format, word) = format(name).unwrap_or(FORMATS[0]);
    let reader = ImageReader::with_format(std::io::Cursor::new(head), format).with_guessed_format();
    match reader.ok().and_then(|r| r.into_dimensions().ok()) {
        Some((w, h)) => {
            let pixels = u64::from(w) * u64::from(h);
            (pixels.saturating_mul(16).saturating_add(BESIDE), format!("a {word} file of {w}x{h}"))
        }
        None => (2 * BESIDE, format!("a {word} file whose size does not stand at its beginning")),
    }
}

/// An image turned as its EXIF entry says. An opaque alpha channel is dropped, another refused. The content decides the format,
/// where it says one.
fn decode(reader: impl std::io::BufRead + std::io::Seek, name: &str) -> Result<Pixels> {
    let (format, word) = format(name).unwrap_or(FORMATS[0]);
    let open = || -> image::ImageResult<DynamicImage> {
        let mut decoder = ImageReader::with_format(reader, format).with_guessed_format()?.into_decoder()?;
        let mut limits = Limits::default();
        limits.reserve(decoder.total_bytes())?;
        decoder.set_limits(limits)?;
        let orientation = decoder.orientation()?;
        let mut image = DynamicImage::from_decoder(decoder)?;
        image.apply_orientation(orientation);
        Ok(image)
    };
    let image = open().map_err(|e| Error::io(format!("not a {word} file: {e}")))?;
    let size = |c| [c, image.height() as usize, image.width() as usize];
    let color = image.color();
    if color.has_alpha() && image.to_rgba8().pixels().any(|p| p[3] != 255) {
        return Err(Error::io("the image is partly transparent"));
    }
    Ok(if color.has_color() { (size(3), image.to_rgb8().into_raw()) } else { (size(1), image.to_luma8().into_raw()) })
}
