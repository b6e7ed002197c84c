//! Files of named tensors (safetensors): f32, and bf16 where a tensor is bf16.

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use crate::error::{Context, Error, Result};

/// A file of tensors, of which one is read at a time.
pub struct TensorFile {
    path: PathBuf,
    map: bytes::Bytes,
    tensors: HashMap<String, Entry>,
}

struct Entry {
    kind: Kind,
    shape: Vec<i64>,
    /// First and last byte in the file, the last excluded.
    at: (usize, usize),
}

impl std::fmt::Debug for TensorFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TensorFile").field("path", &self.path).field("tensors", &self.tensors.len()).finish()
    }
}

impl TensorFile {
    /// Opens and checks the file's header.
    pub fn open(path: &Path) -> Result<Self> {
        let map = crate::files::map(path).with_context(|| path.display().to_string())?;
        let bad = |e: safetensors::SafeTensorError| {
            let hint = match path.extension().is_some_and(|e| e == "onnx") {
                true => "weights are .safetensors files: a run's student.safetensors or a node of its trajectory",
                false => "the file may have been cut short; start again from an earlier node or checkpoint",
            };
            Error::io(format!("{}: not a safetensors file ({e})", path.display())).hint(hint)
        };
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(bad)?;
        let tensors = metadata.tensors().into_iter().map(|(name, info)| {
            let kind = match info.dtype {
                Dtype::F32 => Kind::Float,
                Dtype::BF16 => Kind::BFloat16,
                other => {
                    return Err(Error::io(format!(
                        "{}: tensor `{name}` is {other:?}, expected F32 or BF16",
                        path.display()
                    )));
                }
            };
            let data = |offset: usize| header + size_of::<u64>() + offset;
            let at = (data(info.data_offsets.0), data(info.data_offsets.1));
            Ok((name, Entry { kind, shape: info.shape.iter().map(|&d| d as i64).collect(), at }))
        });
        let tensors = tensors.collect::<Result<_>>()?;
        Ok(Self { path: path.to_owned(), map, tensors })
    }

    /// The file as it was given to [`TensorFile::open`].
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// SHA-256 of the whole file, as [`save_tensors`] gives it.
    pub fn sha256(&self) -> String {
        hex(Sha256::new_with_prefix(&self.map[..]))
    }

    /// Names of the tensors, in alphabetical order.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.tensors.keys().cloned().collect();
        names.sort();
        names
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.tensors
            .get(name)
            .ok_or_else(|| Error::mismatch(format!("{} holds no tensor `{name}`", self.path.display())))
    }

    /// Dimensions of a tensor of the file. Errors: no tensor of this name.
    pub fn shape(&self, name: &str) -> Result<Vec<i64>> {
        Ok(self.entry(name)?.shape.clone())
    }

    /// Element type of a tensor of the file. Errors: no tensor of this name.
    pub fn kind(&self, name: &str) -> Result<Kind> {
        Ok(self.entry(name)?.kind)
    }

    /// The tensor in the file's precision, on the CPU.
    pub fn get(&self, name: &str) -> Result<Tensor> {
        let Entry { kind, shape, at } = self.entry(name)?;
        Ok(Tensor::f_from_data_size(&self.map[at.0..at.1], shape, *kind)?)
    }
}

/// The tensor's elements as little-endian bytes of this kind in row-major order (copied to the host).
pub(super) fn tensor_bytes(t: &Tensor, kind: Kind) -> Result<Vec<u8>> {
    crate::torch::training::note_host_read();
    let host = t.detach().f_to_device(Device::Cpu)?.f_to_kind(kind)?.f_contiguous()?;
    let mut bytes = vec![0u8; host.numel() * kind.elt_size_in_bytes()];
    host.f_copy_data_u8(&mut bytes, host.numel())?;
    Ok(bytes)
}

/// Bytes on their way into a file, and their hash.
struct Hashed<W> {
    out: W,
    sha: Sha256,
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.sha.update(&bytes[..written]);
        Ok(written)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

/// Writes named tensors as safetensors, whole or not at all: bf16 where they are bf16, anything else as f32. No more than one
/// of them is held in host memory at a time. Gives the SHA-256 of the file.
pub fn save_tensors(path: &Path, tensors: &[(String, &Tensor)]) -> Result<String> {
    save_fetched(path, tensors, &mut |k| Ok(tensors[k].1.shallow_clone()))
}

/// Places of these names in the order in which a file has the tensors: by name.
pub fn file_order(names: &[&str]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..names.len()).collect();
    order.sort_by_key(|&k| names[k]);
    order
}

/// [`save_tensors`] of tensors whose elements are somewhere else: `tensors` say names, sizes and kinds, and `fetch` gives the elements by
/// their place in it, in [`file_order`].
pub fn save_fetched(
    path: &Path,
    tensors: &[(String, &Tensor)],
    fetch: &mut dyn FnMut(usize) -> Result<Tensor>,
) -> Result<String> {
    let names: Vec<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
    let order = file_order(&names);
    let kind = |t: &Tensor| if t.kind() == Kind::BFloat16 { Kind::BFloat16 } else { Kind::Float };
    let mut header = serde_json::Map::new();
    let mut end = 0usize;
    for (name, t) in order.iter().map(|&k| &tensors[k]) {
        let start = end;
        let kind = kind(t);
        end += kind.elt_size_in_bytes() * t.numel();
        let dtype = if kind == Kind::BFloat16 { "BF16" } else { "F32" };
        let entry = serde_json::json!({ "dtype": dtype, "shape": t.size(), "data_offsets": [start, end] });
        if header.insert(name.clone(), entry).is_some() {
            return Err(Error::invalid(format!("{}: two tensors are named `{name}`", path.display())));
        }
    }
    let mut header = serde_json::to_vec(&header).map_err(|e| Error::io(e.to_string()))?;
    // The format wants the data at a multiple of 8 bytes.
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut sha = Sha256::new();
    crate::files::write_atomic_with(path, |file| {
        let mut out = Hashed { out: file, sha: Sha256::new() };
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for &k in &order {
            let bytes = fetch(k).and_then(|t| tensor_bytes(&t, kind(tensors[k].1)));
            out.write_all(&bytes.map_err(|e| std::io::Error::other(e.to_string()))?)?;
        }
        sha = out.sha;
        Ok(())
    })?;
    Ok(hex(sha))
}

fn hex(sha: Sha256) -> String {
    sha.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// Reads every tensor of a safetensors file onto the CPU.
pub fn load_tensors(path: &Path) -> Result<Vec<(String, Tensor)>> {
    let file = TensorFile::open(path)?;
    file.names().into_iter().map(|name| Ok((name.clone(), file.get(&name)?))).collect()
}
