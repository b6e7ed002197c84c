//! Sets of 8-bit images from a folder or zip of image files, a `.npy`, a `.npz` or an IDX file. Only what is asked for is held in
//! memory.
//!
//! Values are rounded as the reference implementations do before they compute features, see [`Rounding`]. Float arrays are
//! quantised on the way in, so that a set scores the same whether it is read as floats or from the PNG files made of it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

pub use super::png::{encode_animation, encode_png};
pub use super::rounding::{Rounding, quantise};
use super::{idx, labels, npy, picture, ranges};
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
    /// Opens a folder (with its sub-folders, and those that links lead to) or `.zip` of image files sorted by name, a `.npy`, a
    /// `.npz` or an IDX file (MNIST's form, packed by gzip or not; its labels are read from the file beside it). Float arrays hold
    /// values in `range`. PNG is always read; JPEG, WebP, BMP and TIFF with the cargo feature `formats`.
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
            } else if idx::named(path) {
                Self::from_idx(path, range)
            } else {
                Err(Error::usage(
                    "images are read from a folder or .zip of image files, a .npy, a .npz, or an IDX file (.idx, -ubyte, .gz)",
                ))
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

    fn from_idx(path: &Path, range: [f64; 2]) -> Result<Self> {
        let set = Self::from_tensor(idx::read(path)?, range)?;
        let labels = idx::labels(path, set.len)?.map(Arc::new);
        Ok(Self { labels, ..set })
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

    /// Classes of all images, where the set has any: `dataset.json`, one sub-folder a class, an array of integers, or an
    /// IDX file of labels.
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
#[path = "images_tests.rs"]
mod tests;
