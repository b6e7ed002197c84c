//! Autograd against central differences, in f64.

use std::path::Path;

use serde::Serialize;

use crate::error::Result;

/// How the gradient check of one case ended.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Gradient {
    /// Largest error of a directional derivative, relative to its size.
    Passed {
        error: f64,
    },
    /// Not differentiable there.
    Excepted {
        reason: String,
    },
    Wrong {
        reason: String,
    },
}

pub(super) fn of_case(_name: &str, _dir: &Path) -> Result<Option<Gradient>> {
    Ok(None)
}
