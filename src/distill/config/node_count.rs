//! `degrade.nodes`: a number, or `"auto"`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Nodes of the trajectory beside the teacher (N).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeCount {
    /// So many; 0: no trajectory, the base method.
    Count(usize),
    /// Chosen by what stage 1 measures, [`NodeCount::AUTO_MOST`] at most.
    Auto,
}

impl NodeCount {
    /// Nodes that a plan by measurement has at most.
    pub const AUTO_MOST: usize = 3;

    /// As many nodes as there may be.
    pub fn most(self) -> usize {
        match self {
            Self::Count(count) => count,
            Self::Auto => Self::AUTO_MOST,
        }
    }

    /// Whether there is a stage 1.
    pub fn any(self) -> bool {
        self.most() > 0
    }

    /// Whether the plan is made by measurement.
    pub fn is_auto(self) -> bool {
        self == Self::Auto
    }
}

impl From<usize> for NodeCount {
    fn from(count: usize) -> Self {
        Self::Count(count)
    }
}

impl fmt::Display for NodeCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => count.fmt(f),
            Self::Auto => f.write_str("auto"),
        }
    }
}

const EXPECTED: &str = "a number of nodes, or \"auto\"";

impl FromStr for NodeCount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            _ => text.parse().map(Self::Count).map_err(|_| format!("`{text}` is not {EXPECTED}")),
        }
    }
}

impl Serialize for NodeCount {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Count(count) => serializer.serialize_u64(*count as u64),
            Self::Auto => serializer.serialize_str("auto"),
        }
    }
}

impl<'de> Deserialize<'de> for NodeCount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;
        impl de::Visitor<'_> for Read {
            type Value = NodeCount;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(EXPECTED)
            }
            fn visit_u64<E: de::Error>(self, count: u64) -> Result<NodeCount, E> {
                usize::try_from(count).map(NodeCount::Count).map_err(E::custom)
            }
            fn visit_i64<E: de::Error>(self, count: i64) -> Result<NodeCount, E> {
                let count = u64::try_from(count).map_err(|_| E::custom(format!("{count} is not {EXPECTED}")))?;
                self.visit_u64(count)
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<NodeCount, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Read)
    }
}
