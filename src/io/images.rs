//! Sets of 8-bit images from a folder or zip of PNG files, a `.npy` or a `.npz`. Only what is asked for is held in memory.
//!
//! Values are rounded as the reference implementations do before they compute features, see [`Rounding`]. Float arrays are
//! quantised on the way in, so that a set scores the same whether it is read as floats or from the PNG files made of it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

pub use super::png::{encode_animation, encode_png};
pub use super::rounding::{Rounding, quantise};
use super::{labels, npy, png};
use crate::error::{Error, Result};
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
    /// Opens a folder (with its sub-folders) or `.zip` of PNG files sorted by name, a `.npy` or a `.npz`. Float arrays hold
    /// values in `range`.
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
                Err(Error::usage("images are read from a folder or .zip of PNG files, a .npy or a .npz"))
            }
        };
        run().map_err(|e| {
            if e.to_string().contains(&path.display().to_string()) { e } else { e.context(path.display().to_string()) }
        })
    }

    fn new(source: Source, shape: [usize; 3], len: usize) -> Self {
        Self { source, shape, len, labels: None, rounding: Rounding::default() }
    }

    fn from_folder(path: &Path) -> Result<Self> {
        let (files, others) = png::find(path)?;
        let first = files.first().ok_or_else(|| none("the folder", others))?;
        let (shape, _) = png::read_file(first)?;
        let names: Vec<String> =
            files.iter().map(|f| f.strip_prefix(path).unwrap_or(f).to_string_lossy().replace('\\', "/")).collect();
        let list = path.join("dataset.json");
        let list = if list.is_file() { Some(std::fs::read(list)?) } else { None };
        let len = files.len();
        let mut set = Self::new(Source::Files(files), shape, len);
        set.labels = labels::of_names(&names, list.as_deref())?.map(Arc::new);
        Ok(set)
    }

    fn from_zip(path: &Path) -> Result<Self> {
        let bytes = npy::map(&std::fs::File::open(path)?)?;
        let mut zip = npy::archive(&bytes)?;
        let mut names: Vec<String> = zip.file_names().filter(|n| png::is_png(n)).map(str::to_string).collect();
        names.sort();
        let others = zip.file_names().filter(|n| png::is_lossy(n)).count();
        let first = names.first().ok_or_else(|| none("the archive", others))?;
        let (shape, _) = png::read_zipped(&mut zip, first)?;
        let list = match zip.by_name("dataset.json") {
            Ok(mut file) => {
                let mut text = Vec::new();
                std::io::Read::read_to_end(&mut file, &mut text)?;
                Some(text)
            }
            Err(_) => None,
        };
        let labels = labels::of_names(&names, list.as_deref())?.map(Arc::new);
        let len = names.len();
        Ok(Self { labels, ..Self::new(Source::Zip { bytes, names }, shape, len) })
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
        if start.checked_add(count).is_none_or(|end| end > self.len) {
            return Err(Error::mismatch(format!("images {start}..{} of {}", start.saturating_add(count), self.len)));
        }
        let mut out = Vec::with_capacity(count * c * h * w);
        match &self.source {
            Source::Files(files) => {
                for file in &files[start..start + count] {
                    let (shape, pixels) = png::read_file(file)?;
                    self.same(&file.display().to_string(), shape)?;
                    push_channels_first(&mut out, &pixels, shape);
                }
            }
            Source::Zip { bytes, names } => {
                let mut zip = npy::archive(bytes)?;
                for name in &names[start..start + count] {
                    let (shape, pixels) = png::read_zipped(&mut zip, name)?;
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
        let mut out = Vec::with_capacity(index.len() * c * h * w);
        for &k in index {
            let name = names.get(k).ok_or_else(|| Error::mismatch(format!("image {k} of {}", self.len)))?;
            let (shape, pixels) = png::read_zipped(&mut zip, name)?;
            self.same(name, shape)?;
            push_channels_first(&mut out, &pixels, shape);
        }
        HostTensor::from_bytes(DType::U8, vec![index.len(), c, h, w], out.into())
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

fn none(place: &str, lossy: usize) -> Error {
    let error = Error::io(format!("{place} holds no .png files"));
    match lossy {
        0 => error,
        n => error.hint(format!(
            "it holds {n} JPEG or WebP files: decoders differ in the last bit, and so do scores; convert them to PNG once"
        )),
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
        assert!(error.contains("convert them to PNG once"), "{error}");
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
