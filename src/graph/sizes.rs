//! Sizes of dimensions that a file leaves free. Exporters name them (`sequence`, `height`); the card, a file of conditions or
//! the command line says what they are. The file itself stays as it is: the numbers are put in where the graph is read.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::graph::ir::Port;
use crate::onnx::tensor_shape_proto::{Dimension, dimension};
use crate::onnx::{GraphProto, ValueInfoProto, type_proto};

/// An input's name and its dimensions as the file declares them: `Err` holds the name of a free one, or nothing.
pub type Declared = (String, Vec<Result<usize, String>>);

/// The inputs of a file's graph.
pub fn declared_inputs(graph: &GraphProto) -> Vec<Declared> {
    graph.input.iter().filter_map(|v| Some((v.name().to_owned(), declared_dims(v)?))).collect()
}

/// The dimensions that the file declares of an input or output, where it does: `Err` holds the name of a free one, or nothing.
pub(crate) fn declared_dims(info: &ValueInfoProto) -> Option<Vec<Result<usize, String>>> {
    let Some(type_proto::Value::TensorType(t)) = info.r#type.as_ref()?.value.as_ref() else { return None };
    let size = |d: &Dimension| match &d.value {
        Some(dimension::Value::DimValue(n)) if *n >= 0 => Ok(*n as usize),
        Some(dimension::Value::DimParam(p)) => Err(p.clone()),
        _ => Err(String::new()),
    };
    Some(t.shape.as_ref()?.dim.iter().map(size).collect())
}

/// Sizes of dimensions that the file leaves free, by name, or by input and axis.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sizes {
    by_name: BTreeMap<String, usize>,
    /// Of an input's dimensions behind the batch.
    rows: BTreeMap<String, Vec<usize>>,
}

impl Sizes {
    /// `named`: sizes by the name of the dimension, for all inputs and outputs. `rows`: shapes of one row of inputs; where
    /// such a dimension has a name in the file, other inputs and outputs with that name follow it.
    ///
    /// Errors: a name that no input of the graph has.
    pub fn new(
        inputs: &[Declared],
        named: &BTreeMap<String, usize>,
        rows: impl IntoIterator<Item = (String, Vec<usize>)>,
    ) -> Result<Self> {
        let free = || inputs.iter().flat_map(|(_, dims)| dims).filter_map(|d| d.as_ref().err());
        if let Some(name) = named.keys().find(|name| !free().any(|symbol| symbol == *name)) {
            let mut known: Vec<&str> = free().map(String::as_str).filter(|s| !s.is_empty()).collect();
            known.sort_unstable();
            known.dedup();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            return Err(Error::usage(format!("no input of the graph has a free dimension `{name}`"))
                .hint(format!("its free dimensions are: {known}; --dim NAME=N and the card's `dims` name them")));
        }
        let mut sizes = Self { by_name: named.clone(), rows: rows.into_iter().collect() };
        // The batch's name says how many rows there are, whatever else has it.
        let batches: Vec<&String> = inputs.iter().filter_map(|(_, dims)| dims.first()?.as_ref().err()).collect();
        for (name, dims) in inputs {
            let Some(row) = sizes.rows.get(name).filter(|row| row.len() + 1 == dims.len()) else { continue };
            for (dim, size) in dims[1..].iter().zip(row) {
                if let Err(symbol) = dim
                    && !symbol.is_empty()
                    && !batches.contains(&symbol)
                {
                    sizes.by_name.entry(symbol.clone()).or_insert(*size);
                }
            }
        }
        Ok(sizes)
    }

    /// The size of dimension `axis` of an input or output, which the file calls `symbol`.
    pub fn get(&self, port: &str, axis: usize, symbol: &str) -> Option<usize> {
        let named = self.by_name.get(symbol).filter(|_| !symbol.is_empty());
        named.or_else(|| self.rows.get(port)?.get(axis.checked_sub(1)?)).copied()
    }

    /// Puts the known sizes into a port.
    pub fn fill(&self, port: &mut Port) {
        let name = port.name.clone();
        for (axis, dim) in port.shape.iter_mut().flatten().enumerate() {
            if let Err(symbol) = dim
                && let Some(size) = self.get(&name, axis, symbol)
            {
                *dim = Ok(size);
            }
        }
    }
}
