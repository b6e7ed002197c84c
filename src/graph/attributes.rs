//! Attributes of a node, read once, by name and type. An attribute that no one reads is an attribute we would ignore:
//! [`Attributes::finish`] refuses it.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use crate::error::{Error, Result};
use crate::graph::ir::Graph;
use crate::tensor::HostTensor;

/// One attribute value.
#[derive(Debug, Clone)]
pub enum Attribute {
    /// One integer (`INT`). Flags and element types are integers too.
    Int(i64),
    /// One number in f32 (`FLOAT`).
    Float(f32),
    /// A text (`STRING`); ONNX stores it as UTF-8 bytes.
    String(String),
    /// A list of integers (`INTS`), such as axes or padding.
    Ints(Vec<i64>),
    /// A list of numbers in f32 (`FLOATS`).
    Floats(Vec<f32>),
    /// A list of texts (`STRINGS`).
    Strings(Vec<String>),
    /// A tensor with its data (`TENSOR`), such as the value of a Constant node.
    Tensor(HostTensor),
    /// A subgraph (`GRAPH`): a branch of If, or the body of Loop or Scan.
    Graph(Rc<Graph>),
    /// A kind that nothing here uses (types, sparse tensors, lists of graphs); named in the error if an operator has it.
    Other(&'static str),
}

impl Attribute {
    fn kind(&self) -> &'static str {
        match self {
            Self::Int(_) => "an integer",
            Self::Float(_) => "a float",
            Self::String(_) => "a string",
            Self::Ints(_) => "a list of integers",
            Self::Floats(_) => "a list of floats",
            Self::Strings(_) => "a list of strings",
            Self::Tensor(_) => "a tensor",
            Self::Graph(_) => "a graph",
            Self::Other(kind) => kind,
        }
    }
}

/// The attributes of one node.
#[derive(Debug, Clone, Default)]
pub struct Attributes {
    values: BTreeMap<String, Attribute>,
    /// Names that were asked for and are there.
    read: RefCell<BTreeSet<String>>,
}

macro_rules! getter {
    ($name:ident, $variant:ident, $t:ty, $expected:literal) => {
        #[doc = concat!("The attribute as ", $expected, "; `None` where absent, an error where it is of another kind.")]
        pub fn $name(&self, name: &str) -> Result<Option<$t>> {
            match self.get(name) {
                None => Ok(None),
                Some(Attribute::$variant(v)) => Ok(Some(v.clone())),
                Some(other) => {
                    Err(Error::invalid(format!("attribute `{name}` is {}, expected {}", other.kind(), $expected))
                        .hint("the operator's specification fixes the kind: export again, or set the attribute with its right type"))
                }
            }
        }
    };
}

impl Attributes {
    /// Attributes by name; none of them counts as read yet.
    pub fn new(values: BTreeMap<String, Attribute>) -> Self {
        Self { values, read: RefCell::default() }
    }

    /// The attribute of this name, if the node has it. It counts as read from now on: see [`Attributes::finish`].
    pub fn get(&self, name: &str) -> Option<&Attribute> {
        let found = self.values.get(name)?;
        if !self.read.borrow().contains(name) {
            self.read.borrow_mut().insert(name.to_owned());
        }
        Some(found)
    }

    /// Adds an attribute, or replaces the one of this name.
    pub fn set(&mut self, name: &str, value: Attribute) {
        self.values.insert(name.to_owned(), value);
    }

    /// All attributes with their names, in the order of the names. None of them counts as read by this.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Attribute)> {
        self.values.iter().map(|(k, v)| (k.as_str(), v))
    }

    getter!(int, Int, i64, "an integer");
    getter!(float, Float, f32, "a float");
    getter!(string, String, String, "a string");
    getter!(ints, Ints, Vec<i64>, "a list of integers");
    getter!(floats, Floats, Vec<f32>, "a list of floats");
    getter!(strings, Strings, Vec<String>, "a list of strings");
    getter!(tensor, Tensor, HostTensor, "a tensor");
    getter!(graph, Graph, Rc<Graph>, "a graph");

    /// [`Attributes::int`] with a default.
    pub fn int_or(&self, name: &str, default: i64) -> Result<i64> {
        Ok(self.int(name)?.unwrap_or(default))
    }
    /// [`Attributes::int`] as a flag with a default.
    pub fn flag(&self, name: &str, default: bool) -> Result<bool> {
        Ok(self.int(name)?.map_or(default, |v| v != 0))
    }
    /// [`Attributes::float`] with a default, as f64.
    pub fn float_or(&self, name: &str, default: f64) -> Result<f64> {
        Ok(self.float(name)?.map_or(default, f64::from))
    }
    /// [`Attributes::string`] with a default.
    pub fn string_or(&self, name: &str, default: &str) -> Result<String> {
        Ok(self.string(name)?.unwrap_or_else(|| default.to_owned()))
    }

    /// Refuses attributes that nobody asked for: they would change the meaning without our noticing.
    pub fn finish(&self) -> Result<()> {
        let read = self.read.borrow();
        match self.values.keys().find(|k| !read.contains(*k)) {
            None => Ok(()),
            Some(name) => Err(Error::unsupported(format!("attribute `{name}` is not known for this operator"))
                .hint("it may change the meaning: export for the operator set that the file declares, or remove it")),
        }
    }
}
