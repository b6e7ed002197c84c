//! What puts a student behind the servers that people run: a model repository for Triton, TensorRT's command, images for Docker,
//! a unit for systemd, KServe's resource, the card of a model hub. Text around the file; the student's bytes stay as they are.

mod card;
mod host;
mod triton;
mod trtexec;

use std::path::{Path, PathBuf};

use prost::Message;
use sha2::{Digest, Sha256};

use crate::error::{Context, Error, Result};
use crate::files;
use crate::graph::{Model, save};
use crate::onnx::ModelProto;
use crate::runtime::student::StudentInfo;
use crate::runtime::{Dim, ValueInfo, model_values};
use crate::tensor::DType;

/// What to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `models/NAME`: a model repository of Triton.
    Triton,
    /// `trtexec.sh`: builds a TensorRT engine.
    Trtexec,
    /// `Dockerfile.serve` and `Dockerfile.train`.
    Docker,
    /// `NAME.service`: a unit of systemd.
    Systemd,
    /// `inferenceservice.yaml`: a resource of KServe.
    Kserve,
    /// `README.md`: the card of a model hub.
    ModelCard,
}

/// How to write it.
#[derive(Debug, Clone)]
pub struct PackageOptions {
    /// What to write.
    pub forms: Vec<Form>,
    /// Name of the model: letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// Samples a call of the network, at most. A file of a fixed batch keeps it.
    pub max_batch: usize,
    /// Image that KServe starts.
    pub image: String,
    /// Licence for the model card, as a hub names it.
    pub license: Option<String>,
    /// Run directory, for what the model card says of the training and the figures.
    pub run: Option<PathBuf>,
}

/// A student's file and what it says about itself.
struct Packed {
    info: StudentInfo,
    inputs: Vec<ValueInfo>,
    outputs: Vec<ValueInfo>,
    /// The batch that the graph is fixed to.
    batch: Option<usize>,
    /// SHA-256 of the file.
    sha256: String,
    bytes: u64,
    name: String,
    max_batch: usize,
}

/// Tokens that a text has where the graph leaves their number free: CLIP's.
const TOKENS: usize = 77;

impl Packed {
    /// Sizes of an input without the batch; `free` where the graph leaves one open.
    fn row(input: &ValueInfo, free: i64) -> Vec<i64> {
        input.shape.iter().skip(1).map(|d| if let Dim::Fixed(n) = d { *n as i64 } else { free }).collect()
    }

    fn f16(&self) -> bool {
        let half = |v: &&ValueInfo| matches!(v.dtype, DType::F16 | DType::BF16);
        let said = self.info.metadata.get("student.precision").is_some_and(|p| p == "fp16" || p == "bf16");
        said || self.inputs.iter().chain(&self.outputs).any(|v| half(&v))
    }
}

/// Writes the student's surroundings into `out`, which is made where it is not there, and gives the files.
///
/// Errors: a file that is no student, a name that servers do not take, a model card without a licence, a run that made another
/// student.
pub fn package(student: &Path, out: &Path, options: &PackageOptions) -> Result<Vec<PathBuf>> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if !options.name.starts_with(|c: char| c.is_ascii_alphanumeric()) || !options.name.chars().all(plain) {
        return Err(Error::usage(format!("--name {}: expected letters, digits, -, _ and .", options.name)));
    }
    if options.max_batch == 0 {
        return Err(Error::usage("--max-batch 0: expected 1 or more"));
    }
    let model = Model::load(student)?;
    let packed = read(student, &model, options).with_context(|| student.display().to_string())?;
    let has = |form| options.forms.contains(&form);
    // What can be refused, before anything is written.
    let card = match has(Form::ModelCard) {
        true => Some(card::write(&packed, options)?),
        false => None,
    };
    std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    let mut made = Vec::new();
    let mut text = |name: &str, text: String| -> Result<()> {
        let path = out.join(name);
        files::write_atomic(&path, text.as_bytes()).with_context(|| path.display().to_string())?;
        made.push(path);
        Ok(())
    };
    let file = format!("{}.onnx", packed.name);
    if has(Form::Trtexec) {
        text("trtexec.sh", trtexec::script(&packed, &file))?;
    }
    if has(Form::Docker) {
        text("Dockerfile.serve", host::docker_serve(&packed, &file))?;
        text("Dockerfile.train", host::docker_train())?;
    }
    if has(Form::Systemd) {
        text(&format!("{}.service", packed.name), host::systemd(&packed, &file))?;
    }
    if has(Form::Kserve) {
        text("inferenceservice.yaml", host::kserve(&packed, &options.image))?;
    }
    if let Some(card) = card {
        text("README.md", card)?;
    }
    if has(Form::Triton) {
        let folder = format!("models/{}", packed.name);
        std::fs::create_dir_all(out.join(&folder).join("1")).with_context(|| out.display().to_string())?;
        text(&format!("{folder}/config.pbtxt"), triton::config(&packed))?;
        let copy = out.join(&folder).join("1/model.onnx");
        put(student, &model, &copy)?;
        made.push(copy);
    }
    // (KServe has it in its image.)
    if [Form::Trtexec, Form::Docker, Form::Systemd, Form::ModelCard].into_iter().any(has) {
        put(student, &model, &out.join(&file))?;
        made.push(out.join(&file));
    }
    Ok(made)
}

fn read(student: &Path, model: &Model, options: &PackageOptions) -> Result<Packed> {
    let info = StudentInfo::from_model(&model.proto)?;
    let (inputs, outputs) = model_values(&model.proto)?;
    let batch = match info.noise.shape.first() {
        Some(Dim::Fixed(n)) => Some(*n),
        _ => None,
    };
    let bytes = files::map(student)?;
    let sha256 = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
    Ok(Packed {
        info,
        inputs,
        outputs,
        batch,
        sha256,
        bytes: bytes.len() as u64,
        name: options.name.clone(),
        max_batch: batch.unwrap_or(options.max_batch),
    })
}

/// A copy of the student: the same bytes, or, where its weights lie beside it, both files under the new name.
fn put(student: &Path, model: &Model, to: &Path) -> Result<()> {
    let bytes = files::map(student)?;
    if std::fs::canonicalize(to).ok().is_some_and(|there| std::fs::canonicalize(student).ok() == Some(there)) {
        return Ok(());
    }
    let beside = |m: &ModelProto| m.graph.iter().flat_map(|g| &g.initializer).any(|t| !t.external_data.is_empty());
    if !ModelProto::decode(bytes.as_ref()).is_ok_and(|m| beside(&m)) {
        return files::write_atomic(to, &bytes).with_context(|| to.display().to_string());
    }
    let mut whole = (*model.proto).clone();
    save::internalise(&mut whole);
    save::write_with_limit(&whole, to, 0).with_context(|| to.display().to_string())
}

#[cfg(test)]
mod tests;
