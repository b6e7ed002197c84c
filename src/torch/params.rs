//! Named, ordered parameters: what is trained, recorded on a trajectory and written back into ONNX.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use crate::error::{Context, Error, Result};

/// Parameters of one copy of a network: unique names in the order of the plan, one leaf tensor each (f32 master weights).
#[derive(Debug)]
pub struct ParamSet {
    names: Arc<[String]>,
    tensors: Vec<Tensor>,
    /// Hash of the weights that these are factors of; empty where they stand for themselves.
    base: Arc<str>,
}

impl ParamSet {
    /// Takes the tensors as they are; names must be unique and as many as the tensors.
    pub fn new(names: Vec<String>, tensors: Vec<Tensor>) -> Result<Self> {
        if names.len() != tensors.len() {
            return Err(Error::mismatch(format!("{} names for {} parameters", names.len(), tensors.len())));
        }
        let mut seen = std::collections::HashSet::new();
        if let Some(name) = names.iter().find(|n| !seen.insert(n.as_str())) {
            return Err(Error::invalid(format!("two parameters are named `{name}`")));
        }
        Ok(Self { names: names.into(), tensors, base: "".into() })
    }

    /// These are factors of the weights with this hash, which becomes part of their own.
    #[must_use]
    pub fn of_base(self, hash: &str) -> Self {
        Self { base: hash.into(), ..self }
    }

    pub fn names(&self) -> &[String] {
        &self.names
    }
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }
    pub fn len(&self) -> usize {
        self.tensors.len()
    }
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.names.iter().map(String::as_str).zip(&self.tensors)
    }
    /// Number of scalars in all parameters together.
    pub fn elements(&self) -> usize {
        self.tensors.iter().map(Tensor::numel).sum()
    }

    /// Another handle on the same tensors.
    pub fn alias(&self) -> Self {
        let tensors = self.tensors.iter().map(Tensor::shallow_clone).collect();
        Self { names: self.names.clone(), tensors, base: self.base.clone() }
    }

    /// A deep copy with its own storage on `device`; no gradient is tracked until [`ParamSet::set_requires_grad`].
    pub fn deep_copy(&self, device: Device) -> Result<Self> {
        let tensors = self
            .tensors
            .iter()
            .map(|t| Ok(t.detach().f_to_device_(device, t.kind(), false, true)?))
            .collect::<Result<_>>()?;
        Ok(Self { names: self.names.clone(), tensors, base: self.base.clone() })
    }

    /// Switches gradient tracking of every (leaf) tensor.
    pub fn set_requires_grad(&self, on: bool) -> Result<()> {
        for t in &self.tensors {
            let _ = t.f_set_requires_grad(on)?;
        }
        Ok(())
    }

    /// Copies values in place from a set with exactly the same keys and shapes; anything else is refused and nothing is
    /// changed.
    pub fn copy_from(&self, other: &Self) -> Result<()> {
        self.check_keys(&other.names)?;
        for ((name, mine), theirs) in self.iter().zip(&other.tensors) {
            if mine.size() != theirs.size() {
                return Err(Error::mismatch(format!(
                    "parameter `{name}` has shape {:?}, expected {:?}",
                    theirs.size(),
                    mine.size()
                )));
            }
        }
        tch::no_grad(|| {
            for (mine, theirs) in self.tensors.iter().zip(&other.tensors) {
                mine.shallow_clone().f_copy_(theirs)?;
            }
            Ok(())
        })
    }

    fn check_keys(&self, other: &[String]) -> Result<()> {
        if *other == *self.names {
            return Ok(());
        }
        let has = |set: &[String], n: &String| set.contains(n);
        let missing: Vec<_> = self.names.iter().filter(|n| !has(other, n)).cloned().collect();
        let surplus: Vec<_> = other.iter().filter(|n| !has(&self.names, n)).cloned().collect();
        Err(Error::mismatch(format!(
            "parameters do not fit the network: missing [{}], surplus [{}]",
            missing.join(", "),
            surplus.join(", ")
        )))
    }

    /// SHA-256 over names, shapes and f32 bytes, in order: equal exactly when the weights are equal bit for bit.
    pub fn hash(&self) -> Result<String> {
        let mut sha = Sha256::new();
        sha.update(self.base.as_bytes());
        for (name, t) in self.iter() {
            sha.update(name.as_bytes());
            sha.update([0]);
            for d in t.size() {
                sha.update(d.to_le_bytes());
            }
            sha.update(tensor_bytes(t)?);
        }
        Ok(sha.finalize().iter().map(|b| format!("{b:02x}")).collect())
    }

    /// Writes all parameters as f32 safetensors, whole or not at all (temporary file, fsync, rename).
    pub fn save(&self, path: &Path) -> Result<()> {
        let named: Vec<(String, &Tensor)> = self.iter().map(|(n, t)| (n.to_owned(), t)).collect();
        save_tensors(path, &named)
    }

    /// Loads values in place. Every key must be there and none beside them, in the right shape.
    pub fn load(&self, path: &Path) -> Result<()> {
        let loaded = load_tensors(path)?;
        let mut by_name: std::collections::HashMap<String, Tensor> = loaded.into_iter().collect();
        let missing: Vec<_> = self.names.iter().filter(|n| !by_name.contains_key(*n)).cloned().collect();
        let mut surplus: Vec<_> = by_name.keys().filter(|n| !self.names.contains(n)).cloned().collect();
        surplus.sort();
        if !missing.is_empty() || !surplus.is_empty() {
            return Err(Error::mismatch(format!(
                "{}: parameters do not fit the network: missing [{}], surplus [{}]",
                path.display(),
                missing.join(", "),
                surplus.join(", ")
            )));
        }
        let tensors = self.names.iter().map(|n| by_name.remove(n).expect("checked above")).collect();
        self.copy_from(&Self { names: self.names.clone(), tensors, base: self.base.clone() })
            .with_context(|| path.display().to_string())
    }
}

/// The tensor's elements as little-endian f32 bytes in row-major order (copied to the host).
fn tensor_bytes(t: &Tensor) -> Result<Vec<u8>> {
    crate::torch::training::note_host_read();
    let host = t.detach().f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_contiguous()?;
    let mut bytes = vec![0u8; host.numel() * 4];
    host.f_copy_data_u8(&mut bytes, host.numel())?;
    Ok(bytes)
}

/// Writes named tensors as f32 safetensors, whole or not at all. No more than one of them is held in host memory at a time.
pub fn save_tensors(path: &Path, tensors: &[(String, &Tensor)]) -> Result<()> {
    let mut order: Vec<&(String, &Tensor)> = tensors.iter().collect();
    order.sort_by(|a, b| a.0.cmp(&b.0));
    let mut header = serde_json::Map::new();
    let mut end = 0usize;
    for (name, t) in &order {
        let start = end;
        end += 4 * t.numel();
        let entry = serde_json::json!({ "dtype": "F32", "shape": t.size(), "data_offsets": [start, end] });
        if header.insert(name.clone(), entry).is_some() {
            return Err(Error::invalid(format!("{}: two tensors are named `{name}`", path.display())));
        }
    }
    let mut header = serde_json::to_vec(&header).map_err(|e| Error::io(e.to_string()))?;
    // The format wants the data at a multiple of 8 bytes.
    header.resize(header.len().next_multiple_of(8), b' ');
    crate::files::write_atomic_with(path, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for (_, t) in &order {
            out.write_all(&tensor_bytes(t).map_err(|e| std::io::Error::other(e.to_string()))?)?;
        }
        Ok(())
    })
}

/// Reads every tensor of a safetensors file onto the CPU.
pub fn load_tensors(path: &Path) -> Result<Vec<(String, Tensor)>> {
    let open = || -> std::io::Result<memmap2::Mmap> {
        let file = std::fs::File::open(path)?;
        // SAFETY: files of a run are replaced as a whole (renamed), never changed in place.
        unsafe { memmap2::Mmap::map(&file) }
    };
    let file = open().with_context(|| path.display().to_string())?;
    let bad = |e: safetensors::SafeTensorError| {
        Error::io(format!("{}: not a safetensors file ({e})", path.display()))
            .hint("the file may have been cut short; start again from an earlier node or checkpoint")
    };
    let parsed = safetensors::SafeTensors::deserialize(&file).map_err(bad)?;
    parsed
        .iter()
        .map(|(name, view)| {
            if view.dtype() != safetensors::Dtype::F32 {
                return Err(Error::io(format!(
                    "{}: tensor `{name}` is {:?}, expected F32",
                    path.display(),
                    view.dtype()
                )));
            }
            let shape: Vec<i64> = view.shape().iter().map(|&d| d as i64).collect();
            Ok((name.to_owned(), Tensor::f_from_data_size(view.data(), &shape, Kind::Float)?))
        })
        .collect()
}
