//! What a converter wrote about the framework's parameters into a model's metadata.

use crate::error::{Error, Result};
use crate::graph::Model;

/// `disback.parameters` and `disback.parameters.tied`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Declared {
    /// Initializers that the framework trains; absent where nobody says.
    pub parameters: Option<Vec<String>>,
    /// The framework's names of one tensor each; the first is the initializer's.
    pub tied: Vec<Vec<String>>,
}

impl Declared {
    /// Reads them.
    ///
    /// Errors: an entry that is not JSON of its form.
    pub fn of(model: &Model) -> Result<Self> {
        let metadata = model.metadata();
        let find = |key: &str| metadata.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str());
        let wrong = |key: &str, form: &str, e: serde_json::Error| {
            Error::invalid(format!("metadata {key} is not a JSON {form} ({e})"))
        };
        let (parameters, tied) = ("disback.parameters", "disback.parameters.tied");
        Ok(Self {
            parameters: find(parameters)
                .map(|v| serde_json::from_str(v).map_err(|e| wrong(parameters, "list of names", e)))
                .transpose()?,
            tied: find(tied)
                .map(|v| serde_json::from_str(v).map_err(|e| wrong(tied, "list of lists of names", e)))
                .transpose()?
                .unwrap_or_default(),
        })
    }
}
