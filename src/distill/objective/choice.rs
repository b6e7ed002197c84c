//! Which objective a run has: one of this crate's, by its name, or one that a caller hands in.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::distill::objective::{Objective, ObjectiveKind, Settings};
use crate::error::{Error, Result};

/// The objective of a run. In a configuration it is a name.
#[derive(Clone)]
pub enum Choice {
    /// One of this crate's.
    Known(ObjectiveKind),
    /// A caller's own, handed in with [`crate::run::Request::objective`].
    Given(Arc<dyn Objective>),
    /// A name that is none of this crate's: what a configuration says whose run had a caller's own objective.
    Named(String),
}

impl Choice {
    /// The name, as `objective` in the configuration has it.
    pub fn name(&self) -> &str {
        match self {
            Self::Known(kind) => kind.name(),
            Self::Given(objective) => objective.name(),
            Self::Named(name) => name,
        }
    }

    /// The objective with its settings.
    ///
    /// Errors: there is only a name, and it is none of this crate's.
    pub fn build(&self, settings: &Settings) -> Result<Arc<dyn Objective>> {
        match self {
            Self::Known(kind) => Ok(kind.build(settings)),
            Self::Given(objective) => Ok(objective.clone()),
            Self::Named(name) => {
                let known: Vec<_> = ObjectiveKind::ALL.iter().map(|kind| kind.name()).collect();
                Err(Error::usage(format!("there is no objective `{name}`: expected one of {}", known.join(", ")))
                    .hint("an objective of your own is handed in by a library call: docs/adding-an-objective.md"))
            }
        }
    }
}

impl From<ObjectiveKind> for Choice {
    fn from(kind: ObjectiveKind) -> Self {
        Self::Known(kind)
    }
}

impl fmt::Debug for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.name())
    }
}

/// By name: a run is gone on with by the objective that it began with.
impl PartialEq for Choice {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl PartialEq<ObjectiveKind> for Choice {
    fn eq(&self, other: &ObjectiveKind) -> bool {
        self.name() == other.name()
    }
}

impl Serialize for Choice {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Choice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        Ok(ObjectiveKind::named(&name).map_or(Self::Named(name), Self::Known))
    }
}
