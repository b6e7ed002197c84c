//! What a converter wrote about the framework's parameters into a model's metadata.

use std::collections::HashMap;

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::graph::Model;

/// How the framework has a tensor that the exporter stored otherwise: `stored = own, its axes permuted, reshaped`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredLayout {
    /// The framework's own shape.
    pub shape: Vec<usize>,
    /// Which of its axes come first, second and so on in the file.
    pub perm: Vec<usize>,
}

/// What a converter wrote into the model's metadata about its parameters: the entries `disback.parameters`,
/// `disback.parameters.tied` and `disback.parameters.layout`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Declared {
    /// Initializers that the framework trains; absent where nobody says.
    pub parameters: Option<Vec<String>>,
    /// The framework's names of one tensor each; the first is the initializer's.
    pub tied: Vec<Vec<String>>,
    /// Layout of each initializer that is stored otherwise than the framework has it, by the initializer's name.
    pub layouts: HashMap<String, StoredLayout>,
}

impl Declared {
    /// Reads the three entries; those that the model lacks are empty.
    ///
    /// Errors: an entry that is not JSON of its form.
    pub fn of(model: &Model) -> Result<Self> {
        let metadata = model.metadata();
        let find = |key: &str| metadata.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str());
        let wrong = |key: &str, form: &str, e: serde_json::Error| {
            Error::invalid(format!("metadata {key} is not a JSON {form} ({e})"))
        };
        let (parameters, tied, layout) = ("disback.parameters", "disback.parameters.tied", "disback.parameters.layout");
        Ok(Self {
            parameters: find(parameters)
                .map(|v| serde_json::from_str(v).map_err(|e| wrong(parameters, "list of names", e)))
                .transpose()?,
            tied: find(tied)
                .map(|v| serde_json::from_str(v).map_err(|e| wrong(tied, "list of lists of names", e)))
                .transpose()?
                .unwrap_or_default(),
            layouts: find(layout)
                .map(|v| serde_json::from_str(v).map_err(|e| wrong(layout, "table of shapes and axes", e)))
                .transpose()?
                .unwrap_or_default(),
        })
    }
}
