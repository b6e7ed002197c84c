//! A caller's own operators: of another domain than ONNX's, defined by a body of ONNX's operators, computed by a kernel of their
//! own where there is one.

use crate::graph::Definition;
use crate::torch::exec::registry::{Build, Registry};
use crate::torch::ops;

/// Operators beside those of this crate. Every engine runs an operator by its definition, and students are written with it; training
/// runs it by its kernel where there is one. Parity before a run compares the two.
#[derive(Debug, Clone, Default)]
pub struct Operators {
    definitions: Vec<Definition>,
    /// The kernels with those of this crate; absent while there are none.
    registry: Option<Registry>,
}

impl Operators {
    /// None beside those of this crate.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an operator that is trained as its body.
    #[must_use]
    pub fn define(mut self, definition: Definition) -> Self {
        self.definitions.push(definition);
        self
    }

    /// Adds an operator that is trained by a kernel of its own. `build` reads the attributes of a call, refuses what it cannot
    /// compute exactly, and gives the kernel. Calls inside the bodies of If, Loop, Scan and of functions, and calls in a file of
    /// half precision, are trained as their bodies all the same.
    #[must_use]
    pub fn define_with(mut self, definition: Definition, build: Build) -> Self {
        let registry = self.registry.get_or_insert_with(|| ops::registry().clone());
        registry.add_own(definition.domain(), definition.op(), build);
        self.define(definition)
    }

    /// What the operators compute, in ONNX's own.
    pub fn definitions(&self) -> &[Definition] {
        &self.definitions
    }

    /// Whether there is a kernel for this operator.
    pub(crate) fn has_kernel(&self, domain: &str, op: &str) -> bool {
        self.registry.as_ref().is_some_and(|r| r.has_own(domain, op))
    }

    /// The kernels that there are, this crate's among them.
    pub(crate) fn registry(&self) -> &Registry {
        self.registry.as_ref().unwrap_or_else(|| ops::registry())
    }
}
