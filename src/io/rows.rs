//! Named arrays whose rows are read where they are needed: a safetensors file or a `.npz`, mapped into memory. Nothing but
//! the rows that are asked for is copied, so a file may be larger than memory. (Members of a compressed `.npz` cannot be
//! mapped and are unpacked when it is opened, large ones into a temporary file.)

use std::ops::Range;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::npy;
use crate::error::{Context, Error, Result};
use crate::tensor::{DType, HostTensor, checked_len};

/// A file of named arrays, mapped into memory, whose rows are copied where they are asked for.
#[derive(Debug, Clone)]
pub struct RowFile {
    path: PathBuf,
    map: Bytes,
    arrays: Vec<Array>,
}

#[derive(Debug, Clone)]
struct Array {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    data: Data,
}

#[derive(Debug, Clone)]
enum Data {
    /// Bytes of the file, little-endian and row-major.
    Mapped(Range<usize>),
    Held(HostTensor),
}

impl RowFile {
    /// Opens a `.safetensors`, `.npz` or `.npy` file (whose one array has no name).
    pub fn open(path: &Path) -> Result<Self> {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
        let run = || {
            if path.is_dir() {
                return Err(Error::usage("is a folder, expected a .safetensors, .npz or .npy file"));
            }
            let map = crate::files::map(path)?;
            let arrays = match extension.as_str() {
                "safetensors" => safetensors(&map)?,
                "npz" => npy::read_npz(path)?.into_iter().map(|(name, tensor)| held(name, tensor)).collect(),
                "npy" => vec![array(String::new(), &map, 0)?],
                _ => return Err(Error::usage("expected a .safetensors, .npz or .npy file")),
            };
            Ok(Self { path: path.to_owned(), map, arrays })
        };
        run().with_context(|| path.display().to_string())
    }

    /// The file as it was given to [`RowFile::open`].
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Name, element type and shape of every array.
    pub fn arrays(&self) -> impl Iterator<Item = (&str, DType, &[usize])> {
        self.arrays.iter().map(|a| (a.name.as_str(), a.dtype, a.shape.as_slice()))
    }

    /// Rows `index` of an array, in that order.
    pub fn rows(&self, name: &str, index: &[usize]) -> Result<HostTensor> {
        let found = self.arrays.iter().find(|a| a.name == name);
        let array = found.ok_or_else(|| Error::usage(format!("{}: no array `{name}`", self.path.display())))?;
        let count = array.shape.first().copied().unwrap_or(0);
        if let Some(wrong) = index.iter().find(|i| **i >= count) {
            return Err(Error::mismatch(format!("row {wrong} of array `{name}` with {count} rows")));
        }
        let bytes = match &array.data {
            Data::Mapped(range) => &self.map[range.clone()],
            Data::Held(tensor) => tensor.bytes(),
        };
        let width = bytes.len() / count.max(1);
        let mut out = Vec::with_capacity(width * index.len());
        for &i in index {
            out.extend_from_slice(&bytes[i * width..(i + 1) * width]);
        }
        let mut shape = array.shape.clone();
        shape[0] = index.len();
        HostTensor::from_bytes(array.dtype, shape, out.into())
    }
}

fn safetensors(map: &[u8]) -> Result<Vec<Array>> {
    use safetensors::Dtype;
    let (header, metadata) =
        safetensors::SafeTensors::read_metadata(map).map_err(|e| Error::io(format!("not a safetensors file ({e})")))?;
    let mut arrays = Vec::new();
    for (name, info) in metadata.tensors() {
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F64 => DType::F64,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            Dtype::I8 => DType::I8,
            Dtype::I16 => DType::I16,
            Dtype::I32 => DType::I32,
            Dtype::I64 => DType::I64,
            Dtype::U8 => DType::U8,
            Dtype::U16 => DType::U16,
            Dtype::U32 => DType::U32,
            Dtype::U64 => DType::U64,
            Dtype::BOOL => DType::Bool,
            other => return Err(Error::unsupported(format!("array `{name}` of {other:?}"))),
        };
        let (from, to) = info.data_offsets;
        let start = header + 8;
        let range = start + from..start + to;
        if range.end > map.len() || checked_len(&info.shape)? * dtype.size() != to - from {
            return Err(Error::io(format!("array `{name}` runs past the end of the file, which was cut short")));
        }
        arrays.push(Array { name, dtype, shape: info.shape.clone(), data: Data::Mapped(range) });
    }
    arrays.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(arrays)
}

/// An array whose `.npy` bytes begin at `offset` of the file.
fn array(name: String, bytes: &[u8], offset: usize) -> Result<Array> {
    match npy::plain_layout(bytes)? {
        Some((dtype, shape, data)) => {
            let range = offset + data..offset + data + checked_len(&shape)? * dtype.size();
            Ok(Array { name, dtype, shape, data: Data::Mapped(range) })
        }
        None => Ok(held(name, npy::read_from(bytes)?)),
    }
}

fn held(name: String, tensor: HostTensor) -> Array {
    Array { name, dtype: tensor.dtype(), shape: tensor.shape().to_vec(), data: Data::Held(tensor) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors() -> (HostTensor, HostTensor) {
        let a: Vec<f32> = (0..24).map(|v| v as f32 * 0.5).collect();
        (HostTensor::new(&[4, 3, 2], &a).unwrap(), HostTensor::vec(&[7i64, 8, 9, 10]))
    }

    #[test]
    fn rows_of_every_container_are_those_of_the_array() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = tensors();
        let npz = dir.path().join("c.npz");
        npy::write_npz(&npz, &[("text", &a), ("labels", &b)]).unwrap();
        // Stored, as np.savez writes it, where the one above is deflated.
        let stored = dir.path().join("s.npz");
        let mut zip = zip::ZipWriter::new(std::fs::File::create(&stored).unwrap());
        let options = zip::write::FileOptions::default().compression_method(zip::CompressionMethod::Stored);
        for (name, t) in [("text", &a), ("labels", &b)] {
            zip.start_file(format!("{name}.npy"), options).unwrap();
            npy::write_to(&mut zip, t).unwrap();
        }
        zip.finish().unwrap();
        let safe = dir.path().join("c.safetensors");
        let view = |t: &HostTensor, d| {
            safetensors::tensor::TensorView::new(d, t.shape().to_vec(), t.bytes()).unwrap().data().to_vec()
        };
        let data = [("text", safetensors::Dtype::F32, &a), ("labels", safetensors::Dtype::I64, &b)]
            .map(|(n, d, t)| (n, d, t.shape().to_vec(), view(t, d)));
        let views = data
            .iter()
            .map(|(n, d, s, bytes)| (*n, safetensors::tensor::TensorView::new(*d, s.clone(), bytes).unwrap()));
        std::fs::write(&safe, safetensors::serialize(views, None).unwrap()).unwrap();
        for path in [&npz, &stored, &safe] {
            let file = RowFile::open(path).unwrap();
            assert_eq!(file.arrays().count(), 2);
            let picked = file.rows("text", &[2, 0, 2]).unwrap();
            assert_eq!(picked.shape(), [3, 3, 2]);
            assert_eq!(picked.to_f32()[..6], a.to_f32()[12..18]);
            assert_eq!(file.rows("labels", &[3]).unwrap().to_i64(), [10]);
            assert!(file.rows("labels", &[4]).unwrap_err().to_string().contains("row 4"));
            assert!(file.rows("x", &[0]).is_err());
        }
        let plain = dir.path().join("a.npy");
        npy::write(&plain, &a).unwrap();
        assert_eq!(RowFile::open(&plain).unwrap().rows("", &[1]).unwrap().to_f32(), a.to_f32()[6..12]);
    }

    #[test]
    fn damaged_files_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.npy");
        npy::write(&path, &tensors().0).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let e = RowFile::open(&path).unwrap_err().to_string();
        assert!(e.contains("a.npy") && e.contains("bytes of data"), "{e}");
        for name in ["b.safetensors", "b.npz", "b.npy", "b.txt", "c/b.npz"] {
            let path = dir.path().join(name);
            let _ = std::fs::write(&path, b"PK nonsense, long enough to be read as a header");
            let e = RowFile::open(&path).unwrap_err();
            assert!(e.to_string().contains(name), "{e}");
        }
    }
}
