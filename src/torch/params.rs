//! Named, ordered parameters: what is trained, recorded on a trajectory and written back into ONNX.

use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::torch::file_layout::FileLayouts;
use crate::torch::tensor_file::tensor_bytes;
pub use crate::torch::tensor_file::{TensorFile, file_order, load_tensors, save_fetched, save_tensors};

/// Parameters of one copy of a network: unique names in the order of the plan, one leaf tensor each (f32 master weights).
#[derive(Debug)]
pub struct ParamSet {
    names: Arc<[String]>,
    tensors: Vec<Tensor>,
    /// Hash of the weights that these are factors of; empty where they stand for themselves.
    base: Arc<str>,
    /// How they lie in files, where not as in the graph.
    layouts: Arc<FileLayouts>,
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
        Ok(Self { names: names.into(), tensors, base: "".into(), layouts: Arc::default() })
    }

    /// Other tensors under the same names, of the same layout in files.
    ///
    /// Errors: another number of tensors.
    pub fn with_tensors(&self, tensors: Vec<Tensor>) -> Result<Self> {
        Ok(Self { layouts: self.layouts.clone(), ..Self::new(self.names.to_vec(), tensors)? })
    }

    /// Says how parameters lie in files, where not as in the graph.
    #[must_use]
    pub fn in_files(self, layouts: FileLayouts) -> Self {
        Self { layouts: layouts.into(), ..self }
    }

    /// A tensor of one of these parameters as it lies in files: in the framework's own layout.
    pub fn for_file(&self, name: &str, t: &Tensor) -> Result<Tensor> {
        match self.layouts.get(name) {
            Some(layout) => layout.for_file(t),
            None => Ok(t.shallow_clone()),
        }
    }

    /// The tensor of a file as the graph has it.
    fn read(&self, file: &TensorFile, name: &str, mine: &Tensor) -> Result<Tensor> {
        match self.layouts.get(name) {
            Some(layout) => layout.for_graph(&file.get(name)?, &mine.size()),
            None => file.get(name),
        }
    }

    /// These are factors of the weights with this hash, which becomes part of their own.
    #[must_use]
    pub fn of_base(self, hash: &str) -> Self {
        Self { base: hash.into(), ..self }
    }

    /// The names, in the order of the tensors.
    pub fn names(&self) -> &[String] {
        &self.names
    }
    /// The tensors themselves, not copies: what changes them changes the parameters.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }
    /// Number of parameters, that is of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }
    /// Whether there is no parameter.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }
    /// Names and tensors together, in their order.
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
        Self { names: self.names.clone(), tensors, base: self.base.clone(), layouts: self.layouts.clone() }
    }

    /// A deep copy with its own storage on `device`; no gradient is tracked until [`ParamSet::set_requires_grad`].
    pub fn deep_copy(&self, device: Device) -> Result<Self> {
        let tensors = self
            .tensors
            .iter()
            .map(|t| Ok(t.detach().f_to_device_(device, t.kind(), false, true)?))
            .collect::<Result<_>>()?;
        Ok(Self { names: self.names.clone(), tensors, base: self.base.clone(), layouts: self.layouts.clone() })
    }

    /// Switches gradient tracking of every (leaf) tensor.
    pub fn set_requires_grad(&self, on: bool) -> Result<()> {
        for t in &self.tensors {
            let _ = t.f_set_requires_grad(on)?;
        }
        Ok(())
    }

    /// Lays filters (tensors of four dimensions) out with their channels last, in place, as every copy will have them: libtorch
    /// then convolves images with their channels last, and hands them on so.
    pub fn channels_last(&self) -> Result<()> {
        tch::no_grad(|| {
            for t in self.tensors.iter().filter(|t| t.dim() == 4) {
                let laid = t.f_permute([0, 2, 3, 1])?.f_contiguous()?.f_permute([0, 3, 1, 2])?;
                t.shallow_clone().f_set_data(&laid.detach())?;
            }
            Ok(())
        })
    }

    /// Copies values in place from a set with exactly the same keys and shapes; anything else is refused and nothing is
    /// changed.
    pub fn copy_from(&self, other: &Self) -> Result<()> {
        self.check_keys(&other.names)?;
        for ((name, mine), theirs) in self.iter().zip(&other.tensors) {
            same_shape(name, &mine.size(), &theirs.size())?;
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
        let some = |names: Vec<&String>| match (names.len(), names.first()) {
            (0, _) | (_, None) => "none".to_owned(),
            (1, Some(one)) => format!("`{one}`"),
            (n, Some(first)) => format!("{n} (`{first}`, ...)"),
        };
        let missing = some(self.names.iter().filter(|n| !has(other, n)).collect());
        let surplus = some(other.iter().filter(|n| !has(&self.names, n)).collect());
        Err(Error::mismatch(format!("parameters do not fit the network: missing {missing}, surplus {surplus}"))
            .hint("weights fit the network that they were saved from, with the same --train and --freeze"))
    }

    /// SHA-256 over names, shapes and f32 bytes, in order: equal exactly when the weights are equal bit for bit.
    pub fn hash(&self) -> Result<String> {
        let mut hash = Hash::new(&self.base);
        for (name, t) in self.iter() {
            hash.add(name, t)?;
        }
        Ok(hash.finish())
    }

    /// Writes all parameters as f32 safetensors, each in the framework's own layout, whole or not at all (temporary file, fsync,
    /// rename).
    pub fn save(&self, path: &Path) -> Result<()> {
        let laid = self.iter().map(|(name, t)| self.for_file(name, &t.detach())).collect::<Result<Vec<_>>>()?;
        let named: Vec<(String, &Tensor)> = self.names.iter().cloned().zip(&laid).collect();
        save_tensors(path, &named).map(drop)
    }

    /// Loads values in place. Every key must be there and none beside them, in the right shape; otherwise nothing is changed.
    pub fn load(&self, path: &Path) -> Result<()> {
        let file = TensorFile::open(path)?;
        self.check_file(&file)?;
        tch::no_grad(|| {
            self.iter().try_for_each(|(name, t)| Ok(t.shallow_clone().f_copy_(&self.read(&file, name, t)?)?))
        })
    }

    /// Refuses a file whose keys or shapes are not these.
    pub fn check_file(&self, file: &TensorFile) -> Result<()> {
        let refused = |e: Error| e.context(file.path().display().to_string());
        let mut mine = self.names.to_vec();
        mine.sort();
        let found = file.names();
        if found != mine {
            return self.check_keys(&found).map_err(refused);
        }
        let expected = |name: &str, t: &Tensor| match self.layouts.get(name) {
            Some(layout) => layout.shape().to_vec(),
            None => t.size(),
        };
        self.iter().try_for_each(|(name, t)| same_shape(name, &expected(name, t), &file.shape(name)?)).map_err(refused)
    }

    /// The f32 values of the first file, plus those of the second where there is one, one at a time on the CPU and in this
    /// set's order: `each` gets the place and the value. Gives the hash that a set of these values has.
    ///
    /// Errors: files with other keys or shapes than this set.
    pub fn visit(
        &self,
        first: &TensorFile,
        second: Option<&TensorFile>,
        each: &mut dyn FnMut(usize, &Tensor) -> Result<()>,
    ) -> Result<String> {
        self.check_file(first)?;
        second.map_or(Ok(()), |file| self.check_file(file))?;
        let mut hash = Hash::new(&self.base);
        for (k, (name, mine)) in self.iter().enumerate() {
            let mut value = self.read(first, name, mine)?.f_to_kind(Kind::Float)?;
            if let Some(second) = second {
                value = value.f_add(&self.read(second, name, mine)?.f_to_kind(Kind::Float)?)?;
            }
            hash.add(name, &value)?;
            each(k, &value)?;
        }
        Ok(hash.finish())
    }
}

/// [`ParamSet::hash`] as it grows.
struct Hash(Sha256);

impl Hash {
    fn new(base: &str) -> Self {
        let mut sha = Sha256::new();
        sha.update(base.as_bytes());
        Self(sha)
    }

    fn add(&mut self, name: &str, t: &Tensor) -> Result<()> {
        self.0.update(name.as_bytes());
        self.0.update([0]);
        for d in t.size() {
            self.0.update(d.to_le_bytes());
        }
        self.0.update(tensor_bytes(t, Kind::Float)?);
        Ok(())
    }

    fn finish(self) -> String {
        self.0.finalize().iter().map(|b| format!("{b:02x}")).collect()
    }
}

fn same_shape(name: &str, expected: &[i64], found: &[i64]) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::mismatch(format!("parameter `{name}` has shape {found:?}, expected {expected:?}")))
}
