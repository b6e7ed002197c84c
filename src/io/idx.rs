//! IDX, the form in which MNIST and its kin are published: one array a file, big-endian, as it is or within gzip. Memory grows only
//! with data that is really there, whatever a header says.
//!
//! A file is two zero bytes, the code of the element type, the number of dimensions, one u32 a dimension, and the values in
//! row-major order (Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits").

use std::io::Read;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use flate2::read::MultiGzDecoder;

use crate::error::{Context, Error, Result};
use crate::memory;
use crate::tensor::{DType, HostTensor, checked_len};

/// More dimensions than any published file has.
const MOST_DIMENSIONS: usize = 8;
/// Most bytes that one byte of a deflate stream can become.
const MOST_UNPACKED: u64 = 1032;
/// Bytes of an array's data up to which nobody asks whether there is room.
const LARGE: usize = 256 << 20;
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// Whether a file is called as IDX files are: `train-images-idx3-ubyte`, `train-images.idx3-ubyte`, `a.idx`, each with or without
/// `.gz`. Every other `.gz` is taken for one too: nothing else is read from gzip.
pub fn named(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    name.ends_with(".gz") || name.ends_with(".idx") || name.ends_with("-ubyte") || name.ends_with(".ubyte")
}

/// Reads one array. Values of one byte that are not packed stay in mapped memory; the others are brought to this machine's order.
///
/// Errors, without the path: no IDX file, an element type that is unknown, and more or fewer bytes than the header's sizes need.
pub fn read(path: &Path) -> Result<HostTensor> {
    let bytes = crate::files::map(path)?;
    if bytes.starts_with(&GZIP) { packed(&bytes) } else { plain(&bytes) }
}

/// What stands before the values.
struct Header {
    dtype: DType,
    shape: Vec<usize>,
    /// Bytes of the values.
    data: usize,
}

impl Header {
    fn read(mut reader: impl Read) -> Result<(Self, usize)> {
        let mut start = [0u8; 4];
        let cut = |e: std::io::Error| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => Error::io("not an IDX file (too short for its header)"),
            _ => unpacking(&e),
        };
        reader.read_exact(&mut start).map_err(cut)?;
        let [a, b, code, rank] = start;
        if [a, b] != [0, 0] {
            return Err(Error::io(format!(
                "not an IDX file: it begins with {a:#04x} {b:#04x}, expected two zero bytes"
            )));
        }
        let dtype = match code {
            0x08 => DType::U8,
            0x09 => DType::I8,
            0x0b => DType::I16,
            0x0c => DType::I32,
            0x0d => DType::F32,
            0x0e => DType::F64,
            _ => {
                return Err(Error::io(format!(
                    "an IDX file of element type {code:#04x}, expected 0x08 (u8), 0x09, 0x0b, 0x0c (integers), 0x0d or 0x0e (floats)"
                )));
            }
        };
        let rank = usize::from(rank);
        if rank == 0 || rank > MOST_DIMENSIONS {
            return Err(Error::io(format!("an IDX file of {rank} dimensions, expected 1 to {MOST_DIMENSIONS}")));
        }
        let mut sizes = [0u8; 4 * MOST_DIMENSIONS];
        reader.read_exact(&mut sizes[..4 * rank]).map_err(cut)?;
        let size = |s: &[u8]| s.iter().fold(0, |n, b| n << 8 | usize::from(*b));
        let shape: Vec<usize> = sizes[..4 * rank].chunks_exact(4).map(size).collect();
        let data = checked_len(&shape)?.checked_mul(dtype.size());
        let data = data.ok_or_else(|| Error::io(format!("an array of shape {shape:?} is larger than memory")))?;
        Ok((Self { dtype, shape, data }, 4 + 4 * rank))
    }

    fn tensor(self, mut data: Bytes) -> Result<HostTensor> {
        let size = self.dtype.size();
        if size > 1 {
            let mut own = data.to_vec();
            own.chunks_exact_mut(size).for_each(<[u8]>::reverse);
            data = own.into();
        }
        HostTensor::from_bytes(self.dtype, self.shape, data)
    }

    fn other_size(&self, found: &str) -> Error {
        Error::io(format!("{found} of data where the header's sizes {:?} need {} bytes", self.shape, self.data))
            .hint("the file is cut short or damaged: get it anew")
    }

    /// Refuses what has to be held in memory as a whole where there is no room for it.
    fn room(&self) -> Result<()> {
        match memory::free().filter(|free| self.data > LARGE && self.data as u64 > free.bytes) {
            None => Ok(()),
            Some(free) => Err(Error::io(format!(
                "an array of shape {:?} takes {}, {} are free {}",
                self.shape,
                memory::shown(self.data as u64),
                memory::shown(free.bytes),
                free.place
            ))
            .hint("unpack the file (gzip -d): bytes are then read where they lie")),
        }
    }
}

fn unpacking(e: &std::io::Error) -> Error {
    Error::io(format!("the gzip stream is cut short or damaged: {e}")).hint("get the file anew")
}

fn plain(bytes: &Bytes) -> Result<HostTensor> {
    let (header, start) = Header::read(&bytes[..])?;
    let found = bytes.len() - start;
    if found != header.data {
        return Err(header.other_size(&format!("{found} bytes")));
    }
    if header.dtype.size() > 1 {
        header.room()?;
    }
    header.tensor(bytes.slice(start..))
}

fn packed(bytes: &Bytes) -> Result<HostTensor> {
    let mut reader = MultiGzDecoder::new(&bytes[..]);
    let (header, _) = Header::read(&mut reader)?;
    // (Before memory is taken: what the header says and these bytes cannot hold.)
    let most = bytes.len() as u64 * MOST_UNPACKED;
    if header.data as u64 > most {
        return Err(header.other_size(&format!("{} packed bytes, which hold at most {most} bytes", bytes.len())));
    }
    header.room()?;
    let mut data = Vec::new();
    // (One byte more than there may be: a file that goes on is another one.)
    reader.take(header.data as u64 + 1).read_to_end(&mut data).map_err(|e| unpacking(&e))?;
    match data.len().cmp(&header.data) {
        std::cmp::Ordering::Equal => header.tensor(data.into()),
        std::cmp::Ordering::Less => Err(header.other_size(&format!("{} bytes", data.len()))),
        std::cmp::Ordering::Greater => Err(header.other_size(&format!("more than {} bytes", header.data))),
    }
}

/// The file of the classes that belongs to one of images, where it lies beside it: `images` in the name is `labels`, `idx3` is
/// `idx1`, packed or not.
fn labels_beside(images: &Path) -> Option<PathBuf> {
    let name = images.file_name()?.to_str()?;
    let name = name.strip_suffix(".gz").unwrap_or(name);
    let other = name.replace("images", "labels").replace("idx3", "idx1").replace("idx4", "idx1");
    let candidates = [other.clone(), format!("{other}.gz")].map(|n| images.with_file_name(n));
    candidates.into_iter().find(|p| name.contains("images") && p.is_file())
}

/// Classes of the `count` images of a file, where a file of them lies beside it (`train-labels-idx1-ubyte` for
/// `train-images-idx3-ubyte`).
///
/// Errors: that file cannot be read, holds no whole numbers from 0, or another number of them.
pub(super) fn labels(images: &Path, count: usize) -> Result<Option<Vec<usize>>> {
    let Some(path) = labels_beside(images) else { return Ok(None) };
    let run = || {
        let tensor = read(&path)?;
        if tensor.dtype().is_float() || tensor.shape() != [count] {
            return Err(Error::io(format!(
                "{} {:?}, expected {count} integers, one for each image of {}",
                tensor.dtype(),
                tensor.shape(),
                images.file_name().unwrap_or_default().to_string_lossy()
            )));
        }
        let class =
            |v: i64| usize::try_from(v).map_err(|_| Error::io(format!("the label {v}, expected a class number")));
        tensor.to_i64().into_iter().map(class).collect::<Result<Vec<_>>>().map(Some)
    };
    run().with_context(|| path.display().to_string())
}

#[cfg(test)]
#[path = "idx_tests.rs"]
mod tests;
