//! `--tui` in a build without the terminal view: refused.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::error::{Error, Result};
use crate::run::Monitor;

fn refusal() -> Error {
    super::not_built::needs("--tui", "tui")
}

/// Refuses `--tui`.
pub fn check() -> Result<()> {
    Err(refusal())
}

/// Nothing is shared with a screen.
pub struct Shared;

impl Shared {
    pub fn new(_stop: Arc<AtomicBool>) -> Arc<Self> {
        Arc::new(Self)
    }
}

impl Monitor for Shared {}

/// There is no screen.
pub struct View;

impl View {
    /// Refuses `--tui`.
    pub fn start(_shared: Arc<Shared>) -> Result<Self> {
        Err(refusal())
    }
}
