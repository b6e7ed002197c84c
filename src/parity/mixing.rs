//! Networks whose rows are not independent: a sample would depend on its neighbours in the batch.

use std::collections::BTreeMap;

use super::{forward, random_inputs};
use crate::diffusion::TeacherCard;
use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::tensor::HostTensor;
use crate::torch::Network;

/// Largest change of a row's output, in standard deviations, that rounding explains where its neighbours change.
const ROUNDING: f64 = 1e-3;

/// How far a row's output moves when the other rows are replaced.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mixing {
    /// The row, counted from 0, that moves most.
    pub row: usize,
    /// Rows of the batch.
    pub rows: usize,
    /// The largest change, in standard deviations of the output.
    pub change: f64,
}

/// The same row in two different batches of `rows`, for three of them in turn; `None` where nothing but rounding changes.
///
/// Errors: a network that does not run with so many rows.
pub fn mixing(net: &Network, card: &TeacherCard, rows: usize, seed: u64) -> Result<Option<Mixing>> {
    let draw = |seed: u64| random_inputs(net.inputs(), Some(card), rows, &BTreeMap::new(), seed);
    let (own, others) = (draw(seed)?, draw(seed.wrapping_add(1))?);
    let output = |inputs: &[(String, HostTensor)]| -> Result<HostTensor> {
        let made = forward(net, inputs)?;
        let (_, y) = made
            .into_iter()
            .find(|(name, _)| *name == card.output)
            .ok_or_else(|| Error::usage(format!("`{}` is no output of the graph", card.output)))?;
        match y.shape().first() {
            Some(&n) if n == rows => Ok(y),
            _ => Err(Error::mismatch(format!("output `{}` has shape {:?} for {rows} rows", card.output, y.shape()))),
        }
    };
    let before = output(&own)?;
    let values = before.to_f64();
    let [_, spread] = super::statistics(&values);
    let mut worst: Option<Mixing> = None;
    // First, middle and last: a half that is used twice, a part that is turned around, and statistics all show there.
    let mut tried = vec![0, rows / 2, rows.saturating_sub(1)];
    tried.dedup();
    for row in tried {
        let mixed = own.iter().zip(&others).map(|((name, a), (_, b))| {
            if a.shape().first() != Some(&rows) || card.constants.contains_key(name) {
                return Ok((name.clone(), a.clone()));
            }
            let parts: Vec<HostTensor> =
                (0..rows).map(|i| if i == row { a.rows(i, 1) } else { b.rows(i, 1) }).collect::<Result<_>>()?;
            Ok((name.clone(), HostTensor::concat_rows(&parts)?))
        });
        let after = output(&mixed.collect::<Result<Vec<_>>>()?)?.to_f64();
        let len = values.len() / rows;
        let apart = (row * len..(row + 1) * len).map(|i| (values[i] - after[i]).abs());
        // NaN on both sides says nothing; on one side it is a change.
        let apart = apart.zip(row * len..).filter(|(_, i)| !(values[*i].is_nan() && after[*i].is_nan()));
        let change =
            apart.map(|(d, _)| if d.is_nan() { f64::INFINITY } else { d }).fold(0.0, f64::max) / spread.max(1e-12);
        if change > ROUNDING && worst.is_none_or(|w| change > w.change) {
            worst = Some(Mixing { row, rows, change });
        }
    }
    Ok(worst)
}

/// The nodes of a graph that take statistics over the batch: BatchNormalization in training mode.
pub fn batch_statistics(graph: &Graph) -> Vec<String> {
    let training = |n: &&crate::graph::Node| {
        n.op == "BatchNormalization" && n.domain.is_empty() && n.attributes.int_or("training_mode", 0).unwrap_or(0) != 0
    };
    graph.nodes.iter().filter(training).map(crate::graph::Node::label).collect()
}
