//! Sets of 8-bit images from a folder or zip of image files, a `.npy` or a `.npz`. Only what is asked for is held in memory.
//!
//! Values are rounded as the reference implementations do before they compute features, see [`Rounding`]. Float arrays are
//! quantised on the way in, so that a set scores the same whether it is read as floats or from the PNG files made of it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

pub use super::png::{encode_animation, encode_png};
pub use super::rounding::{Rounding, quantise};
use super::{labels, npy, picture, ranges};
use crate::error::{Context, Error, Result};
use crate::tensor::{DType, HostTensor};

/// A set of images of one size, read as they are asked for.
#[derive(Debug, Clone)]
pub struct ImageSet {
    source: Source,
    /// Channels, height, width.
    shape: [usize; 3],
    len: usize,
    labels: Option<Arc<Vec<usize>>>,
    rounding: Rounding,
    /// What is worth knowing of a folder or archive.
    notes: Arc<Vec<String>>,
}

#[derive(Debug, Clone)]
enum Source {
    Files(Vec<PathBuf>),
    /// Names in a zip archive that lies in mapped memory.
    Zip {
        bytes: Bytes,
        names: Vec<String>,
    },
    /// Rows of images, converted as they are read. `last`: channels come last.
    Array {
        tensor: HostTensor,
        last: bool,
        range: [f64; 2],
    },
}

impl ImageSet {
    /// Opens a folder (with its sub-folders, and those that links lead to) or `.zip` of image files sorted by name, a `.npy` or a
    /// `.npz`. Float arrays hold values in `range`. PNG is always read; JPEG, WebP, BMP and TIFF with the cargo feature `formats`.
    /// Images are turned as their EXIF entry says; hidden files and what operating systems leave behind are passed over.
    pub fn open(path: &Path, range: [f64; 2]) -> Result<Self> {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
        let run = || {
            if path.is_dir() {
                Self::from_folder(path)
            } else if !path.is_file() {
                Err(Error::io("no such file or folder"))
            } else if extension == "npy" {
                Self::from_tensor(npy::read(path)?, range)
            } else if extension == "npz" {
                Self::from_arrays(npy::read_npz(path)?, range)
            } else if extension == "zip" {
                Self::from_zip(path)
            } else {
                Err(Error::usage("images are read from a folder or .zip of image files, a .npy or a .npz"))
            }
        };
        run().map_err(|e| {
            if e.to_string().contains(&path.display().to_string()) { e } else { e.context(path.display().to_string()) }
        })
    }

    fn new(source: Source, shape: [usize; 3], len: usize) -> Self {
        Self { source, shape, len, labels: None, rounding: Rounding::default(), notes: Arc::default() }
    }

    fn from_folder(path: &Path) -> Result<Self> {
        let (files, seen) = picture::find(path)?;
        let first = files.first().ok_or_else(|| seen.none("the folder"))?;
        let (shape, _) = picture::read_file(first)?;
        let names: Vec<String> =
            files.iter().map(|f| f.strip_prefix(path).unwrap_or(f).to_string_lossy().replace('\\', "/")).collect();
        let list = path.join("dataset.json");
        let list = if list.is_file() { Some(crate::files::read(&list, labels::most(files.len()))?) } else { None };
        let len = files.len();
        let mut set = Self::new(Source::Files(files), shape, len);
        set.labels = labels::of_names(&names, list.as_deref())?.map(Arc::new);
        set.notes = Arc::new(seen.notes());
        Ok(set)
    }

    fn from_zip(path: &Path) -> Result<Self> {
        let bytes = crate::files::map(path)?;
        let mut zip = npy::archive(&bytes)?;
        let mut seen = picture::Seen::default();
        let mut names: Vec<String> = zip.file_names().filter(|n| seen.file(n)).map(str::to_string).collect();
        names.sort();
        let first = names.first().ok_or_else(|| seen.none("the archive"))?;
        let (shape, _) = picture::read_zipped(&mut zip, first)?;
        let list = match zip.by_name("dataset.json") {
            Ok(mut file) => {
                // (By what the archive says of it, which it may have wrong, and by what it can be for.)
                let most = file.size().min(labels::most(names.len()));
                Some(crate::files::read_to_end(&mut file, most).context("dataset.json")?)
            }
            Err(_) => None,
        };
        let labels = labels::of_names(&names, list.as_deref())?.map(Arc::new);
        let len = names.len();
        Ok(Self { labels, notes: Arc::new(seen.notes()), ..Self::new(Source::Zip { bytes, names }, shape, len) })
    }

    /// The arrays of a `.npz`: the images, and their classes where one of them holds as many integers.
    pub fn from_arrays(arrays: Vec<(String, HostTensor)>, range: [f64; 2]) -> Result<Self> {
        let images = pick(&arrays)?;
        let labels = labels::of_arrays(&arrays, images.shape().first().copied().unwrap_or(0)).map(Arc::new);
        Ok(Self { labels, ..Self::from_tensor(images, range)? })
    }

    /// A tensor of images: [N,H,W], [N,C,H,W] or [N,H,W,C] with 1 or 3 channels, 8-bit unsigned or float in `range`. Where
    /// both layouts are possible, 8-bit arrays are taken as [N,H,W,C] and floats as [N,C,H,W].
    pub fn from_tensor(tensor: HostTensor, range: [f64; 2]) -> Result<Self> {
        if !(tensor.dtype() == DType::U8 || tensor.dtype().is_float()) {
            return Err(Error::io(format!("images of {}, expected u8 or float", tensor.dtype())));
        }
        if range[0].partial_cmp(&range[1]) != Some(std::cmp::Ordering::Less) {
            return Err(Error::usage(format!("range {range:?}: expected low < high")));
        }
        let channels = |d: usize| d == 1 || d == 3;
        let (shape, last) = match *tensor.shape() {
            [_, h, w] => ([1, h, w], false),
            [_, a, b, c] => {
                let last = channels(c) && (!channels(a) || tensor.dtype() == DType::U8);
                if !last && !channels(a) {
                    return Err(Error::io(format!(
                        "an array of shape {:?} holds no images of 1 or 3 channels",
                        tensor.shape()
                    )));
                }
                (if last { [c, a, b] } else { [a, b, c] }, last)
            }
            _ => return Err(Error::io(format!("an array of shape {:?}, expected 3 or 4 dimensions", tensor.shape()))),
        };
        let len = tensor.shape()[0];
        if len == 0 || shape.contains(&0) {
            return Err(Error::io(format!("an array of shape {:?} holds no images", tensor.shape())));
        }
        Ok(Self::new(Source::Array { tensor, last, range }, shape, len))
    }

    /// Samples [N,C,H,W] of a model, values in `range`: the layout is known, nothing is taken from the sizes.
    pub fn from_samples(samples: HostTensor, range: [f64; 2]) -> Result<Self> {
        let [len, c, h, w] = *samples.shape() else {
            return Err(Error::mismatch(format!("samples of shape {:?}, expected [N, C, H, W]", samples.shape())));
        };
        if !(c == 1 || c == 3) || samples.is_empty() {
            return Err(Error::mismatch(format!("samples of shape {:?} are no images", samples.shape())));
        }
        Ok(Self::new(Source::Array { tensor: samples, last: false, range }, [c, h, w], len))
    }

    /// The same set, floats rounded in another way.
    #[must_use]
    pub fn with_rounding(mut self, rounding: Rounding) -> Self {
        self.rounding = rounding;
        self
    }

    /// Classes of all images, where the set has any: `dataset.json`, one sub-folder a class, or an array of integers.
    pub fn labels(&self) -> Option<&[usize]> {
        self.labels.as_ref().map(|l| l.as_slice())
    }

    /// What is worth knowing of a folder or archive: files that were passed over, formats whose pixels depend on the decoder.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// What speaks against the floats of an array being values in the range that they are read in, by some of its images; `None`
    /// for 8 bits.
    pub fn doubt(&self) -> Result<Option<String>> {
        let Source::Array { tensor, range, .. } = &self.source else { return Ok(None) };
        if !tensor.dtype().is_float() {
            return Ok(None);
        }
        let rows = ranges::some_of(self.len).into_iter().map(|k| tensor.rows(k, 1)).collect::<Result<Vec<_>>>()?;
        let values: Vec<f64> = rows.iter().flat_map(HostTensor::to_f64).collect();
        Ok(ranges::doubt(&values, *range))
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.len
    }
    /// Whether the set holds no image.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// Channels, height, width.
    pub fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// Images `start..start+count` as 8-bit values, [count,C,H,W].
    pub fn batch_u8(&self, start: usize, count: usize) -> Result<HostTensor> {
        let [c, h, w] = self.shape;
        let room = self.room(count)?;
        if start.checked_add(count).is_none_or(|end| end > self.len) {
            return Err(Error::mismatch(format!("images {start}..{} of {}", start.saturating_add(count), self.len)));
        }
        let mut out = Vec::with_capacity(room);
        match &self.source {
            Source::Files(files) => {
                for file in &files[start..start + count] {
                    let (shape, pixels) = picture::read_file(file)?;
                    self.same(&file.display().to_string(), shape)?;
                    push_channels_first(&mut out, &pixels, shape);
                }
            }
            Source::Zip { bytes, names } => {
                let mut zip = npy::archive(bytes)?;
                for name in &names[start..start + count] {
                    let (shape, pixels) = picture::read_zipped(&mut zip, name)?;
                    self.same(name, shape)?;
                    push_channels_first(&mut out, &pixels, shape);
                }
            }
            Source::Array { tensor, last, range } => {
                let rows = tensor.rows(start, count)?;
                let values: Vec<u8> = if tensor.dtype() == DType::U8 {
                    rows.bytes().to_vec()
                } else {
                    let floats = rows.to_f64();
                    if let Some(at) = floats.iter().position(|v| !v.is_finite()) {
                        let image = start + at / (c * h * w);
                        return Err(Error::mismatch(format!("image {image} holds {}", floats[at])));
                    }
                    floats.into_iter().map(|x| self.rounding.apply(x, *range)).collect()
                };
                if *last {
                    values.chunks_exact(c * h * w).for_each(|image| push_channels_first(&mut out, image, self.shape));
                } else {
                    out = values;
                }
            }
        }
        HostTensor::from_bytes(DType::U8, vec![count, c, h, w], out.into())
    }

    /// Images `index` as 8-bit values, [index.len(),C,H,W].
    pub fn gather_u8(&self, index: &[usize]) -> Result<HostTensor> {
        let Source::Zip { bytes, names } = &self.source else {
            let parts = index.iter().map(|&k| self.batch_u8(k, 1)).collect::<Result<Vec<_>>>()?;
            return HostTensor::concat_rows(&parts);
        };
        // The archive's table is read once a batch, not once an image.
        let mut zip = npy::archive(bytes)?;
        let [c, h, w] = self.shape;
        let mut out = Vec::with_capacity(self.room(index.len())?);
        for &k in index {
            let name = names.get(k).ok_or_else(|| Error::mismatch(format!("image {k} of {}", self.len)))?;
            let (shape, pixels) = picture::read_zipped(&mut zip, name)?;
            self.same(name, shape)?;
            push_channels_first(&mut out, &pixels, shape);
        }
        HostTensor::from_bytes(DType::U8, vec![index.len(), c, h, w], out.into())
    }

    /// Bytes of so many images. Errors: more than there is memory for.
    fn room(&self, count: usize) -> Result<usize> {
        /// Below this much nobody is asked.
        const LARGE: usize = 256 << 20;
        let [c, h, w] = self.shape;
        let bytes = [c, h, w].into_iter().try_fold(count, usize::checked_mul).unwrap_or(usize::MAX);
        match crate::memory::free().filter(|free| bytes > LARGE && bytes as u64 > free.bytes) {
            None => Ok(bytes),
            Some(free) => Err(Error::io(format!(
                "{count} images of {} take {} together, {} are free {}",
                describe(self.shape),
                crate::memory::shown(bytes as u64),
                crate::memory::shown(free.bytes),
                free.place
            ))
            .hint("a smaller --batch, or smaller images")),
        }
    }

    fn same(&self, name: &str, shape: [usize; 3]) -> Result<()> {
        match shape == self.shape {
            true => Ok(()),
            false => Err(Error::mismatch(format!(
                "{name}: {} where the first image of the set is {}",
                describe(shape),
                describe(self.shape)
            ))),
        }
    }

    /// Images `start..start+count` as floats in [-1, 1], [count,C,H,W]: 8-bit `v` becomes `v / 127.5 - 1`.
    pub fn batch(&self, start: usize, count: usize) -> Result<HostTensor> {
        let bytes = self.batch_u8(start, count)?;
        let values: Vec<f32> = bytes.bytes().iter().map(|&v| f32::from(v) / 127.5 - 1.0).collect();
        HostTensor::new(bytes.shape(), &values)
    }
}

/// `8x8, grey`, `32x32, colour`.
pub fn describe([c, h, w]: [usize; 3]) -> String {
    format!("{w}x{h}, {}", if c == 1 { "grey" } else { "colour" })
}

/// The array of a `.npz` that holds the images: `images`, `samples`, `x`, `arr_0` (ADM's batches), or the only one.
fn pick(arrays: &[(String, HostTensor)]) -> Result<HostTensor> {
    let names: Vec<&str> = arrays.iter().map(|(n, _)| n.as_str()).collect();
    let known = ["images", "samples", "x", "arr_0"].iter().find_map(|k| names.iter().position(|n| n == k));
    match known.or((names.len() == 1).then_some(0)) {
        Some(k) => Ok(arrays[k].1.clone()),
        None => Err(Error::io(format!("which of these arrays are the images? {}", names.join(", ")))
            .hint("call the array `images`, or save it alone as .npy")),
    }
}

fn push_channels_first(out: &mut Vec<u8>, pixels: &[u8], [c, h, w]: [usize; 3]) {
    for channel in 0..c {
        out.extend((0..h * w).map(|p| pixels[p * c + channel]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zips_and_sub_folders_hold_labelled_images() {
        use std::io::Write;
        let dir = tempfile::tempdir().unwrap();
        let image = |v: u8| encode_png(&[v; 4], [1, 2, 2]).unwrap();
        let folder = dir.path().join("folder");
        for (class, k) in [("cat", 0), ("cat", 1), ("dog", 2)] {
            std::fs::create_dir_all(folder.join(class)).unwrap();
            std::fs::write(folder.join(format!("{class}/{k}.png")), image(k)).unwrap();
        }
        let set = ImageSet::open(&folder, [-1.0, 1.0]).unwrap();
        assert_eq!((set.len(), set.labels()), (3, Some(&[0, 0, 1][..])));
        // EDM's dataset format.
        let path = dir.path().join("edm.zip");
        let mut zip = zip::ZipWriter::new(std::fs::File::create(&path).unwrap());
        for k in 0..3u8 {
            zip.start_file(format!("00000/img{k}.png"), Default::default()).unwrap();
            zip.write_all(&image(k)).unwrap();
        }
        zip.start_file("dataset.json", Default::default()).unwrap();
        zip.write_all(br#"{"labels": [["00000/img2.png", 7], ["00000/img0.png", 3], ["00000/img1.png", 0]]}"#).unwrap();
        zip.finish().unwrap();
        let zipped = ImageSet::open(&path, [-1.0, 1.0]).unwrap();
        assert_eq!(zipped.labels(), Some(&[3, 0, 7][..]));
        assert_eq!(zipped.batch_u8(1, 2).unwrap(), set.batch_u8(1, 2).unwrap());
        assert_eq!(zipped.gather_u8(&[2, 0]).unwrap(), set.gather_u8(&[2, 0]).unwrap());
        // ADM's batches: arr_0 and arr_1, the second integers.
        let path = dir.path().join("adm.npz");
        let images = HostTensor::new(&[2, 2, 2, 3], &[9u8; 24]).unwrap();
        npy::write_npz(&path, &[("arr_0", &images), ("arr_1", &HostTensor::vec(&[5i64, 6]))]).unwrap();
        let set = ImageSet::open(&path, [-1.0, 1.0]).unwrap();
        assert_eq!((set.shape(), set.labels()), ([3, 2, 2], Some(&[5, 6][..])));
        std::fs::write(&path, b"no zip").unwrap();
        assert!(ImageSet::open(&path, [-1.0, 1.0]).unwrap_err().to_string().contains("adm.npz: not a"));
        std::fs::create_dir_all(dir.path().join("jpeg")).unwrap();
        std::fs::write(dir.path().join("jpeg/a.JPG"), b"x").unwrap();
        let error = ImageSet::open(&dir.path().join("jpeg"), [-1.0, 1.0]).unwrap_err().to_string();
        assert!(error.contains("a.JPG: not a JPEG file") || error.contains("1 JPEG (this build"), "{error}");
    }

    #[test]
    fn folder_and_arrays_hold_the_same_images() {
        let dir = tempfile::tempdir().unwrap();
        let pixels: Vec<u8> = (0..2 * 3 * 4 * 5).map(|v| v as u8).collect();
        for k in 0..2 {
            let png = encode_png(&pixels[k * 60..k * 60 + 60], [3, 4, 5]).unwrap();
            std::fs::write(dir.path().join(format!("{k}.png")), png).unwrap();
        }
        let folder = ImageSet::open(dir.path(), [-1.0, 1.0]).unwrap();
        assert_eq!((folder.len(), folder.shape()), (2, [3, 4, 5]));
        let first = HostTensor::new(&[2, 3, 4, 5], &pixels).unwrap();
        assert_eq!(folder.batch_u8(0, 2).unwrap(), first);
        // The float form of an 8-bit image comes back as the same image.
        let floats: Vec<f32> = pixels.iter().map(|&v| (f32::from(v) - 127.5) / 127.5).collect();
        let set = ImageSet::from_tensor(HostTensor::new(&[2, 3, 4, 5], &floats).unwrap(), [-1.0, 1.0]).unwrap();
        assert_eq!(set.batch_u8(0, 2).unwrap(), first);
        // Channels last.
        let mut last = vec![];
        for k in 0..2 {
            for p in 0..20 {
                last.extend((0..3).map(|c| pixels[k * 60 + c * 20 + p]));
            }
        }
        let set = ImageSet::from_tensor(HostTensor::new(&[2, 4, 5, 3], &last).unwrap(), [-1.0, 1.0]).unwrap();
        assert_eq!(set.batch_u8(1, 1).unwrap(), first.rows(1, 1).unwrap());
        assert_eq!(set.batch(0, 1).unwrap().to_f32()[3], 3.0 / 127.5 - 1.0);
    }

    /// What macOS, Windows and people leave in folders and archives.
    #[test]
    fn clutter_is_passed_over_and_other_files_are_counted() {
        use std::io::Write;
        let dir = tempfile::tempdir().unwrap();
        let image = |v: u8| encode_png(&[v; 4], [1, 2, 2]).unwrap();
        let folder = dir.path().join("set");
        for place in ["", "__MACOSX", ".ipynb_checkpoints"] {
            std::fs::create_dir_all(folder.join(place)).unwrap();
        }
        let clutter =
            ["._a.png", "Thumbs.db", ".DS_Store", "__MACOSX/._a.png", "__MACOSX/z.png", ".ipynb_checkpoints/a.png"];
        for name in clutter {
            std::fs::write(folder.join(name), b"no image").unwrap();
        }
        std::fs::write(folder.join("a.png"), image(1)).unwrap();
        std::fs::write(folder.join("b.png"), image(2)).unwrap();
        let read = |path: &Path| ImageSet::open(path, [-1.0, 1.0]).unwrap();
        assert!(read(&folder).notes().is_empty(), "{:?}", read(&folder).notes());
        std::fs::write(folder.join("c.gif"), b"GIF").unwrap();
        std::fs::write(folder.join("notes.TXT"), b"x").unwrap();
        std::fs::write(folder.join("dataset.json"), b"\xef\xbb\xbf{\"labels\": [[\"b.png\", 1], [\"a.png\", 4]]}")
            .unwrap();
        let set = read(&folder);
        assert_eq!((set.len(), set.labels()), (2, Some(&[4, 1][..])));
        assert_eq!(set.notes(), ["4 files, 2 of them images (2 PNG), 2 passed over: 1 .gif, 1 .txt"]);
        let path = dir.path().join("mac.zip");
        let mut zip = zip::ZipWriter::new(std::fs::File::create(&path).unwrap());
        for (name, bytes) in
            [("a.png", image(1)), ("__MACOSX/._a.png", vec![0]), ("b.png", image(2)), ("readme", vec![0])]
        {
            zip.start_file(name, Default::default()).unwrap();
            zip.write_all(&bytes).unwrap();
        }
        zip.finish().unwrap();
        assert_eq!(read(&path).batch_u8(0, 2).unwrap(), set.batch_u8(0, 2).unwrap());
        assert!(read(&path).notes()[0].contains("1 passed over: 1 without an extension"));
        #[cfg(unix)]
        {
            let linked = dir.path().join("linked");
            std::fs::create_dir_all(linked.join("y")).unwrap();
            std::os::unix::fs::symlink(&folder, linked.join("x")).unwrap();
            std::os::unix::fs::symlink(&linked, linked.join("round")).unwrap();
            std::os::unix::fs::symlink("nowhere", linked.join("gone.png")).unwrap();
            std::fs::write(linked.join("y/c.png"), image(3)).unwrap();
            let set = read(&linked);
            assert_eq!((set.len(), set.labels()), (3, Some(&[0, 0, 1][..])));
            let notes = set.notes().join("; ");
            assert!(notes.contains("1 broken link") && notes.contains("1 link to a folder above it"), "{notes}");
        }
    }

    /// An archive of one member of many zeros behind `head`, that says of itself that it unpacks to `says` bytes.
    fn bomb(path: &Path, name: &str, head: &[u8], says: Option<u32>) {
        use std::io::Write;
        let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
        zip.start_file(name, zip::write::FileOptions::default()).unwrap();
        zip.write_all(head).unwrap();
        let zeros = vec![0; 1 << 20];
        (0..80).for_each(|_| zip.write_all(&zeros).unwrap());
        let mut bytes = zip.finish().unwrap().into_inner();
        for (mark, at) in [(b"PK\x03\x04", 22), (b"PK\x01\x02", 24)] {
            let start = bytes.windows(4).position(|w| w == mark).unwrap() + at;
            if let Some(says) = says {
                bytes[start..start + 4].copy_from_slice(&says.to_le_bytes());
            }
        }
        std::fs::write(path, bytes).unwrap();
    }

    #[test]
    fn archives_unpack_no_further_than_what_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("b.zip");
        let error = |path: &Path| ImageSet::open(path, [-1.0, 1.0]).unwrap_err().to_string();
        let png = encode_png(&[1; 64], [1, 8, 8]).unwrap();
        bomb(&path, "a.png", &png, None);
        let e = error(&path);
        assert!(e.contains("by what the archive says; a PNG file of 8x8 has at most"), "{e}");
        bomb(&path, "a.png", &png, Some(1 << 17));
        let e = error(&path);
        assert!(e.contains("a.png: more bytes than the 131072 that the archive says"), "{e}");
        bomb(&path, "a.png", b"", None);
        assert!(error(&path).contains("whose size does not stand at its beginning"));
        // Header and archive must agree on an array's size.
        let path = dir.path().join("b.npz");
        let mut head = Vec::new();
        npy::write_to(&mut head, &HostTensor::new(&[0, 1, 8, 8], &[0u8; 0]).unwrap()).unwrap();
        let text = String::from_utf8_lossy(&head[10..])
            .replace("(0, 1, 8, 8,)", "(1280000,1,8,8,)")
            .replacen("   \n", "\n", 1);
        head.truncate(10);
        head.extend(text.as_bytes());
        assert_eq!(head.len() % 64, 0);
        bomb(&path, "images.npy", &head, Some(100));
        let e = error(&path);
        assert!(e.contains("bytes of data where the shape [1280000, 1, 8, 8] needs 81920000"), "{e}");
        bomb(&path, "images.npy", &head, None);
        assert_eq!(ImageSet::open(&path, [-1.0, 1.0]).unwrap().len(), 1_280_000);
    }

    #[cfg(unix)]
    #[test]
    fn pipes_among_the_images_are_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = std::ffi::CString::new(dir.path().join("0.png").to_str().unwrap()).unwrap();
        // SAFETY: a C string that lives as long as the call.
        assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
        std::fs::write(dir.path().join("1.png"), encode_png(&[1; 4], [1, 2, 2]).unwrap()).unwrap();
        let set = ImageSet::open(dir.path(), [-1.0, 1.0]).unwrap();
        assert!(set.len() == 1 && set.notes()[0].contains("1 pipe, socket or device"), "{:?}", set.notes());
    }

    #[cfg(feature = "formats")]
    #[test]
    fn other_formats_are_read_and_turned_as_they_say() {
        let dir = tempfile::tempdir().unwrap();
        // 6 x 4, smooth, so that JPEG keeps it.
        let pixels: Vec<u8> = (0..24).flat_map(|k| [(k * 9) as u8, 100, (200 - k * 5) as u8]).collect();
        let buffer = image::RgbImage::from_raw(6, 4, pixels.clone()).unwrap();
        for name in ["a.png", "b.BMP", "c.tif", "d.webp"] {
            let format = image::ImageFormat::from_path(name).unwrap();
            buffer.save_with_format(dir.path().join(name), format).unwrap();
        }
        let jpeg = dir.path().join("e.jpeg");
        let mut bytes = Vec::new();
        image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, 100)
            .encode(&pixels, 6, 4, image::ExtendedColorType::Rgb8)
            .unwrap();
        std::fs::write(&jpeg, &bytes).unwrap();
        let set = ImageSet::open(dir.path(), [-1.0, 1.0]).unwrap();
        assert_eq!((set.len(), set.shape()), (5, [3, 4, 6]));
        let first = set.batch_u8(0, 1).unwrap();
        for k in 1..4 {
            assert_eq!(set.batch_u8(k, 1).unwrap(), first, "{k}");
        }
        let lossy = set.batch_u8(4, 1).unwrap();
        let worst = lossy.bytes().iter().zip(first.bytes()).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!((1..12).contains(&worst), "{worst}");
        assert!(set.notes()[0].starts_with("2 of 5 images are JPEG or WebP"), "{:?}", set.notes());
        // EXIF orientation 6: a quarter turn to the right.
        let exif = b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0";
        let mut turned = bytes[..2].to_vec();
        turned.extend([0xff, 0xe1, 0, exif.len() as u8 + 2]);
        turned.extend(exif);
        turned.extend(&bytes[2..]);
        std::fs::create_dir(dir.path().join("turned")).unwrap();
        std::fs::write(dir.path().join("turned/a.jpg"), turned).unwrap();
        let set = ImageSet::open(&dir.path().join("turned"), [-1.0, 1.0]).unwrap();
        assert_eq!(set.shape(), [3, 6, 4]);
        let got = set.batch_u8(0, 1).unwrap();
        for (y, x) in (0..6).flat_map(|y| (0..4).map(move |x| (y, x))) {
            assert_eq!(got.bytes()[y * 4 + x], lossy.bytes()[(3 - x) * 6 + y], "{y} {x}");
        }
    }

    #[test]
    fn bad_sets_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = |path: &Path| ImageSet::open(path, [-1.0, 1.0]).unwrap_err().to_string();
        assert!(error(dir.path()).contains("no .png files"));
        assert!(error(Path::new("/nowhere")).contains("/nowhere: no such"));
        std::fs::write(dir.path().join("a.png"), b"no picture").unwrap();
        assert!(error(dir.path()).contains("a.png: not a PNG file"));
        std::fs::write(dir.path().join("a.png"), encode_png(&[0; 12], [3, 2, 2]).unwrap()).unwrap();
        std::fs::write(dir.path().join("b.png"), encode_png(&[0; 4], [1, 2, 2]).unwrap()).unwrap();
        let set = ImageSet::open(dir.path(), [-1.0, 1.0]).unwrap();
        let mixed = set.batch_u8(0, 2).unwrap_err().to_string();
        assert!(mixed.contains("b.png: 2x2, grey where the first image of the set is 2x2, colour"), "{mixed}");
        let nan = HostTensor::new(&[2, 1, 1], &[0.0, f32::NAN]).unwrap();
        let set = ImageSet::from_tensor(nan, [-1.0, 1.0]).unwrap();
        assert!(set.batch(0, 2).unwrap_err().to_string().contains("image 1 holds NaN"));
        let labels = HostTensor::vec(&[1i64, 2]);
        assert!(ImageSet::from_tensor(labels, [-1.0, 1.0]).is_err());
    }
}
