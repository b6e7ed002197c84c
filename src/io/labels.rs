//! Classes of image sets as the field's tools keep them.

use std::collections::{BTreeSet, HashMap};

use serde_json::Value;

use crate::error::{Error, Result};
use crate::tensor::HostTensor;

/// Most bytes of the `dataset.json` of so many images: names of a usual length, and a list that was made for a larger set.
pub fn most(images: usize) -> u64 {
    crate::files::JSON.saturating_add(256 * images as u64)
}

/// Classes of files by name: from a `dataset.json` (EDM, StyleGAN: `{"labels": [[name, class], ...]}`), else one sub-folder a
/// class, numbered in order of their names, where every file lies in one and there are at least two.
pub fn of_names(names: &[String], list: Option<&[u8]>) -> Result<Option<Vec<usize>>> {
    if let Some(bytes) = list {
        // (A byte order mark, as some editors write.)
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        let value: Value =
            serde_json::from_slice(bytes).map_err(|e| Error::io(format!("dataset.json: not JSON: {e}")))?;
        return listed(names, &value["labels"]);
    }
    let folder = |n: &String| n.rsplit_once('/').map(|(f, _)| f.to_string());
    let folders: Option<Vec<String>> = names.iter().map(folder).collect();
    let Some(folders) = folders else { return Ok(None) };
    let classes: Vec<&String> = folders.iter().collect::<BTreeSet<_>>().into_iter().collect();
    if classes.len() < 2 {
        return Ok(None);
    }
    Ok(Some(folders.iter().map(|f| classes.binary_search(&f).unwrap_or(0)).collect()))
}

fn listed(names: &[String], labels: &Value) -> Result<Option<Vec<usize>>> {
    if labels.is_null() {
        return Ok(None);
    }
    let pairs: HashMap<&str, &Value> = match labels {
        Value::Array(list) => list.iter().filter_map(|p| Some((p[0].as_str()?, &p[1]))).collect(),
        Value::Object(map) => map.iter().map(|(k, v)| (k.as_str(), v)).collect(),
        _ => return Err(Error::io("dataset.json: `labels` is neither a list nor an object")),
    };
    let class = |name: &String| {
        let value = pairs.get(name.as_str());
        let value = value.ok_or_else(|| Error::io(format!("dataset.json has no label for {name}")))?;
        value
            .as_u64()
            .map(|k| k as usize)
            .ok_or_else(|| Error::io(format!("dataset.json: the label of {name} is {value}, expected a class number")))
    };
    names.iter().map(class).collect::<Result<Vec<_>>>().map(Some)
}

/// The classes among the arrays of a `.npz`: `labels`, `label`, `y` or `arr_1` (ADM), one integer an image.
pub fn of_arrays(arrays: &[(String, HostTensor)], images: usize) -> Option<Vec<usize>> {
    let found = ["labels", "label", "y", "arr_1"].iter().find_map(|k| arrays.iter().find(|(n, _)| n == k));
    let tensor = &found?.1;
    let fits = tensor.len() == images && !tensor.dtype().is_float() && tensor.rank() >= 1;
    let values = if fits { tensor.to_i64() } else { return None };
    values.into_iter().map(|v| usize::try_from(v).ok()).collect()
}
