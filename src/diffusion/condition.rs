//! Condition inputs of a graph, as the card describes them.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The null value of a one-hot or embedding condition.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Null {
    /// One-hot at this index.
    Index(usize),
    /// The values of one row.
    Values(Vec<f64>),
    /// All zeros.
    Zeros(Zeros),
}

/// The word `"zeros"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Zeros {
    /// Every value of the row is 0.
    Zeros,
}

/// One condition input of the graph.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Condition {
    /// An integer per sample, 0 to classes-1; `null` is the extra index that means "no class".
    ClassIndex {
        /// Number of classes.
        classes: usize,
        /// Index that means "no class"; absent where the network knows none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        null: Option<i64>,
    },
    /// `[B, classes]` of zeros with a single one.
    OneHot {
        /// Number of classes.
        classes: usize,
        /// Row that means "no class"; absent where the network knows none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        null: Option<Null>,
    },
    /// `[B, ...shape]` of numbers, e.g. text embeddings.
    Embedding {
        /// Shape of one row, without the batch.
        shape: Vec<usize>,
        /// Row that means "no condition"; absent where the network knows none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        null: Option<Null>,
    },
    /// The same value in every call, with or without a batch dimension, e.g. positions. It is put into the graph where the file is
    /// read (see [`super::fixed`]): no card that is in use has such a condition.
    Constant {
        /// `.npy`, or `.npz` with an array of the input's name or a single one; beside the model, or where the program runs.
        file: String,
        /// Shape of the array, to be checked.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        shape: Option<Vec<usize>>,
    },
}

impl Condition {
    /// Number of classes, where it is a class condition.
    pub fn classes(&self) -> Option<usize> {
        match self {
            Self::ClassIndex { classes, .. } | Self::OneHot { classes, .. } => Some(*classes),
            Self::Embedding { .. } | Self::Constant { .. } => None,
        }
    }

    /// Whether the card has a null value, which guidance needs.
    pub fn has_null(&self) -> bool {
        match self {
            Self::ClassIndex { null, .. } => null.is_some(),
            Self::OneHot { null, .. } | Self::Embedding { null, .. } => null.is_some(),
            Self::Constant { .. } => false,
        }
    }

    /// Shape of one row.
    pub fn row_shape(&self) -> Vec<usize> {
        match self {
            Self::ClassIndex { .. } => vec![],
            Self::OneHot { classes, .. } => vec![*classes],
            Self::Embedding { shape, .. } => shape.clone(),
            Self::Constant { shape, .. } => shape.clone().unwrap_or_default(),
        }
    }

    /// One null row as numbers (a class index is one number), where the card has a null value.
    pub fn null_row(&self) -> Option<Vec<f64>> {
        let width = self.row_shape().iter().product();
        match self {
            Self::ClassIndex { null, .. } => null.map(|n| vec![n as f64]),
            Self::OneHot { null, .. } | Self::Embedding { null, .. } => null.as_ref().map(|n| match n {
                Null::Zeros(_) => vec![0.0; width],
                Null::Values(v) => v.clone(),
                Null::Index(index) => (0..width).map(|i| f64::from(u8::from(i == *index))).collect(),
            }),
            Self::Constant { .. } => None,
        }
    }

    pub(super) fn validate(&self) -> Result<()> {
        let width: usize = self.row_shape().iter().product();
        match self {
            Self::ClassIndex { classes: 0, .. } | Self::OneHot { classes: 0, .. } => {
                Err(Error::usage("classes is 0, expected 1 or more"))
            }
            Self::ClassIndex { null: Some(n), .. } if *n < 0 => Err(Error::usage(format!("null is {n}, below 0"))),
            Self::OneHot { null: Some(Null::Index(i)), .. } if *i >= width => {
                Err(Error::usage(format!("null is index {i}, expected 0 to {} or \"zeros\"", width - 1)))
            }
            Self::OneHot { null: Some(Null::Values(v)), .. } | Self::Embedding { null: Some(Null::Values(v)), .. }
                if v.len() != width =>
            {
                Err(Error::usage(format!("null has {} values, expected {width}", v.len())))
            }
            Self::Embedding { null: Some(Null::Index(_)), .. } => {
                Err(Error::usage("null of an embedding is \"zeros\" or the list of its values"))
            }
            _ => Ok(()),
        }
    }
}
