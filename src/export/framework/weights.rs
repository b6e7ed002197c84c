//! The student's weights in the teacher's safetensors files: those that were trained are replaced, the others stay byte by byte.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use safetensors::{SafeTensors, tensor::Metadata};

use crate::error::{Context, Error, Result};
use crate::files;
use crate::torch::{ParamSet, convert};

/// Where a tensor's elements come from.
enum Source<'a> {
    /// The student's weight of this name and place.
    Trained(&'a str, usize),
    /// Bytes of a teacher's file.
    Kept(Bytes),
}

/// A tensor of the file to be written.
struct Entry<'a> {
    dtype: String,
    shape: Vec<usize>,
    bytes: usize,
    source: Source<'a>,
}

/// Writes the student's weights under the names of the teacher's files into one file.
///
/// `tied`: groups of names of one tensor, the first of which the student's weights have.
///
/// Errors: a weight of the student that the teacher's files do not have, or have in another shape.
pub(super) fn write(teacher: &[PathBuf], params: &ParamSet, tied: &[Vec<String>], to: &Path) -> Result<()> {
    let mut entries: BTreeMap<String, Entry> = BTreeMap::new();
    for path in teacher {
        read(path, &mut entries).with_context(|| path.display().to_string())?;
    }
    let first_of: HashMap<&str, &[String]> =
        tied.iter().filter_map(|group| Some((group.first()?.as_str(), group.as_slice()))).collect();
    for (k, (name, t)) in params.iter().enumerate() {
        let shape: Vec<usize> = params.for_file(name, t)?.size().into_iter().map(|d| d as usize).collect();
        let own = [name.to_owned()];
        let names = first_of.get(name).copied().unwrap_or(&own);
        let mut found = false;
        for alias in names {
            let Some(entry) = entries.get_mut(alias) else { continue };
            if entry.shape != shape {
                return Err(differs(
                    teacher,
                    &format!("`{alias}` is {:?} there and {shape:?} in the student", entry.shape),
                ));
            }
            found = true;
            let bytes = shape.iter().product::<usize>() * size_of::<f32>();
            *entry = Entry { dtype: "F32".into(), shape: shape.clone(), bytes, source: Source::Trained(name, k) };
        }
        if !found {
            return Err(differs(teacher, &format!("the student's weight `{name}` is not there")));
        }
    }
    put(&entries, params, to)
}

fn differs(teacher: &[PathBuf], what: &str) -> Error {
    let folder = teacher.first().and_then(|p| p.parent()).unwrap_or(Path::new(""));
    Error::mismatch(format!("{}: not the network that the teacher was converted from: {what}", folder.display()))
        .hint("give by --pipeline the folder that disback-convert made the teacher of")
}

/// Adds the tensors of a file.
fn read(path: &Path, entries: &mut BTreeMap<String, Entry>) -> Result<()> {
    let map = files::map(path)?;
    let bad = |e: safetensors::SafeTensorError| Error::io(format!("not a safetensors file ({e})"));
    let (header, metadata): (usize, Metadata) = SafeTensors::read_metadata(&map).map_err(bad)?;
    for (name, info) in metadata.tensors() {
        let data = |offset: usize| header + size_of::<u64>() + offset;
        let (from, to) = (data(info.data_offsets.0), data(info.data_offsets.1));
        let dtype = serde_json::to_value(info.dtype).map_err(|e| Error::invalid(e.to_string()))?;
        let entry = Entry {
            dtype: dtype.as_str().unwrap_or_default().to_owned(),
            shape: info.shape.clone(),
            bytes: to - from,
            source: Source::Kept(map.slice(from..to)),
        };
        entries.insert(name, entry);
    }
    Ok(())
}

/// Writes the file whole or not at all, with one tensor in memory at a time.
fn put(entries: &BTreeMap<String, Entry>, params: &ParamSet, to: &Path) -> Result<()> {
    // Wide elements first: each tensor then begins at a multiple of its element's size.
    let mut order: Vec<(&String, &Entry)> = entries.iter().collect();
    let width = |e: &Entry| e.bytes / e.shape.iter().product::<usize>().max(1);
    order.sort_by_key(|(_, e)| std::cmp::Reverse(width(e)));
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), serde_json::json!({ "format": "pt" }));
    let mut at = 0usize;
    for (name, e) in &order {
        let range = [at, at + e.bytes];
        at += e.bytes;
        let entry = serde_json::json!({ "dtype": e.dtype, "shape": e.shape, "data_offsets": range });
        header.insert((*name).clone(), entry);
    }
    let mut header = serde_json::to_vec(&header).map_err(|e| Error::io(e.to_string()))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    files::write_atomic_with(to, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for (_, e) in &order {
            match &e.source {
                Source::Kept(bytes) => out.write_all(bytes)?,
                Source::Trained(name, k) => {
                    let laid = params.for_file(name, &params.tensors()[*k]).and_then(|t| f32_bytes(&t));
                    out.write_all(&laid.map_err(|e| std::io::Error::other(e.to_string()))?)?;
                }
            }
        }
        Ok(())
    })
}

fn f32_bytes(t: &tch::Tensor) -> Result<Bytes> {
    Ok(convert::to_host(&t.detach().f_to_kind(tch::Kind::Float)?)?.bytes().clone())
}
