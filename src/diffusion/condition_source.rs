//! Where the conditions of training come from: classes drawn by a distribution, and rows of a file.

use std::path::Path;

use rand_chacha::rand_core::Rng;

use crate::error::{Error, Result};
use crate::io::RowFile;
use crate::noise;
use crate::tensor::HostTensor;

use super::card::TeacherCard;
use super::condition::Condition;
use super::conditions::HostConditions;

/// Draws conditions for a card. One row of the file gives all the conditions that the file has (a prompt's embedding, its
/// pooled embedding, its time ids); classes that are not in the file are drawn, each condition on its own.
#[derive(Debug, Clone)]
pub struct ConditionSource {
    file: Option<(RowFile, usize)>,
    /// Class weights, summed up and ending with 1; empty: all classes alike.
    cumulative: Vec<f64>,
}

impl ConditionSource {
    /// Checks file and weights against the card. `weights`: one number a class, in any scale; empty: all alike.
    pub fn new(card: &TeacherCard, file: Option<&Path>, weights: &[f64]) -> Result<Self> {
        let file = file.map(RowFile::open).transpose()?;
        let rows = file.as_ref().map(|f| check_file(card, f)).transpose()?;
        let in_file = |name: &str| file.as_ref().is_some_and(|f| f.arrays().any(|(n, ..)| n == name));
        for (name, condition) in card.conditions.iter().filter(|(n, _)| !in_file(n)) {
            let Some(classes) = condition.classes() else {
                let shape = condition.row_shape();
                let dims: String = shape.iter().map(|n| format!(", {n}")).collect();
                return Err(Error::usage(format!(
                    "condition `{name}` is an embedding of shape {shape:?}, which cannot be drawn"
                ))
                .hint(format!(
                    "conditions.file names a .safetensors or .npz file with an array `{name}` of shape [rows{dims}]"
                )));
            };
            if !weights.is_empty() && weights.len() != classes {
                return Err(Error::usage(format!(
                    "conditions.weights has {} numbers, but `{name}` has {classes} classes",
                    weights.len()
                )));
            }
        }
        if !weights.is_empty() && !card.conditions.iter().any(|(n, c)| !in_file(n) && c.classes().is_some()) {
            return Err(Error::usage("conditions.weights is given, but no classes are drawn for this teacher"));
        }
        let total: f64 = weights.iter().sum();
        if weights.iter().any(|w| !(w.is_finite() && *w >= 0.0)) || (!weights.is_empty() && !(total > 0.0)) {
            return Err(Error::usage("conditions.weights: expected numbers of 0 or more, one at least above 0"));
        }
        let mut sum = 0.0;
        let mut cumulative: Vec<f64> = weights
            .iter()
            .map(|w| {
                sum += w / total;
                sum
            })
            .collect();
        // Rounding must not leave a gap at the end that falls to a class of weight 0.
        if let Some(last) = weights.iter().rposition(|w| *w > 0.0) {
            cumulative[last..].fill(1.0);
        }
        Ok(Self { file: file.zip(rows), cumulative })
    }

    /// All classes alike, no file. An error where the card has embeddings.
    pub fn uniform(card: &TeacherCard) -> Result<Self> {
        Self::new(card, None, &[])
    }

    /// Conditions of `rows` samples.
    pub fn draw(&self, card: &TeacherCard, rng: &mut impl Rng, rows: usize) -> Result<HostConditions> {
        let picked: Option<Vec<usize>> =
            self.file.as_ref().map(|(_, count)| (0..rows).map(|_| below(rng.next_u64(), *count)).collect());
        self.build(card, rows, picked.as_deref(), |_, classes| self.class(rng.next_u64(), classes))
    }

    /// Conditions of images `start..start + count` of a run, the same whatever the batch: classes by
    /// [`noise::image_class`], rows of the file likewise.
    pub fn of_images(&self, card: &TeacherCard, seed: u64, start: u64, count: usize) -> Result<HostConditions> {
        let index = |k: usize, n: usize| noise::image_class(seed, start.wrapping_add(k as u64), n);
        let picked: Option<Vec<usize>> =
            self.file.as_ref().map(|(_, rows)| (0..count).map(|k| index(k, *rows)).collect());
        self.build(card, count, picked.as_deref(), |k, classes| index(k, classes) as i64)
    }

    fn class(&self, word: u64, classes: usize) -> i64 {
        if self.cumulative.is_empty() {
            return below(word, classes) as i64;
        }
        let unit = (word >> 11) as f64 / (1u64 << 53) as f64;
        self.cumulative.partition_point(|c| *c <= unit).min(classes - 1) as i64
    }

    fn build(
        &self,
        card: &TeacherCard,
        rows: usize,
        picked: Option<&[usize]>,
        mut class: impl FnMut(usize, usize) -> i64,
    ) -> Result<HostConditions> {
        let mut tensors = Vec::new();
        for (name, condition) in &card.conditions {
            let tensor = match (&self.file, picked) {
                (Some((file, _)), Some(picked)) if file.arrays().any(|(n, ..)| n == name) => {
                    let read = file.rows(name, picked)?;
                    // A column of classes is as good as a list of them.
                    let column = !read.dtype().is_float() && read.shape() == [rows, 1];
                    if column && condition.classes().is_some() { read.reshaped(&[rows])? } else { read }
                }
                _ => {
                    let classes = condition.classes().ok_or_else(|| {
                        Error::usage(format!("condition `{name}` is an embedding, which cannot be drawn"))
                    })?;
                    HostTensor::vec(&(0..rows).map(|k| class(k, classes)).collect::<Vec<_>>())
                }
            };
            tensors.push((name.clone(), tensor));
        }
        HostConditions::new(rows, tensors)
    }
}

fn below(word: u64, n: usize) -> usize {
    ((u128::from(word) * n as u128) >> 64) as usize
}

/// Rows of embeddings that are looked at before a run begins.
const LOOKED_AT: usize = 64;

/// Every array of the file must be a condition of the card in the right shape, all with the same number of rows, which
/// is given back.
fn check_file(card: &TeacherCard, file: &RowFile) -> Result<usize> {
    let fail = |what: String| Err(Error::usage(format!("{}: {what}", file.path().display())));
    let mut rows: Option<(String, usize)> = None;
    for (name, dtype, shape) in file.arrays() {
        let Some(condition) = card.conditions.get(name) else {
            let known: Vec<_> = card.conditions.keys().map(|k| format!("`{k}`")).collect();
            return fail(format!(
                "array `{name}` is no condition of the teacher, which has {}",
                match known.len() {
                    0 => "none".into(),
                    _ => known.join(", "),
                }
            ));
        };
        let row = condition.row_shape();
        let class = !dtype.is_float() && condition.classes().is_some() && matches!(shape, [_] | [_, 1]);
        let fits = shape.len() == row.len() + 1 && shape[1..] == row[..];
        if !(class || (fits && !matches!(condition, Condition::ClassIndex { .. }))) {
            let wanted = match condition {
                Condition::ClassIndex { .. } => "integers [rows]".to_owned(),
                Condition::OneHot { classes, .. } => format!("[rows, {classes}], or integers [rows]"),
                Condition::Embedding { .. } | Condition::Constant { .. } => {
                    format!("[rows, {}]", row.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))
                }
            };
            return fail(format!("array `{name}` is {dtype} {shape:?}, but the graph's condition wants {wanted}"));
        }
        match &rows {
            Some((other, n)) if *n != shape[0] => {
                return fail(format!("array `{name}` has {} rows and `{other}` has {n}", shape[0]));
            }
            _ => rows = Some((name.to_owned(), shape[0])),
        }
        if !class && shape[0] > 0 {
            // Some of the rows, spread over the file: it may be larger than memory.
            let some: Vec<usize> =
                (0..shape[0].min(LOOKED_AT)).map(|k| k * shape[0] / shape[0].min(LOOKED_AT)).collect();
            let values = file.rows(name, &some)?.to_f64();
            if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                let row = some[at * some.len() / values.len()];
                return fail(format!("array `{name}` holds NaN or infinity in row {row}"));
            }
        }
        if class {
            let all: Vec<usize> = (0..shape[0]).collect();
            let classes = condition.classes().unwrap_or(0) as i64;
            let values = file.rows(name, &all)?.to_i64();
            if let Some((at, wrong)) = values.iter().enumerate().find(|(_, v)| !(0..classes).contains(*v)) {
                return fail(format!("array `{name}`: class {wrong} in row {at}, expected 0 to {}", classes - 1));
            }
        }
    }
    match rows {
        Some((_, n)) if n > 0 => Ok(n),
        Some((name, _)) => fail(format!("array `{name}` has no rows")),
        None => {
            let known: Vec<_> = card.conditions.keys().map(|k| format!("`{k}`")).collect();
            fail(format!("no arrays in it; the teacher's conditions are {}", known.join(", ")))
        }
    }
}

#[cfg(test)]
#[path = "condition_source_tests.rs"]
mod tests;
