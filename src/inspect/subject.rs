//! The network under the probe: rows of samples and one time in, rows of its output out, whatever the graph's layout,
//! element types and fixed batch.

use std::time::Instant;

use crate::diffusion::{Condition, InputSpec, TeacherCard};
use crate::error::{Error, Result};
use crate::runtime::Engine;
use crate::tensor::{DType, HostTensor};
use crate::torch::{Forward, Network, convert};

/// Runs a graph on named inputs.
pub trait Run {
    /// The output of this name.
    fn run(&mut self, inputs: &[(&str, HostTensor)], output: &str) -> Result<HostTensor>;

    /// Whether it computes in f32 what the file has in f64.
    fn narrowed(&self) -> bool {
        false
    }
}

impl Run for Network {
    fn narrowed(&self) -> bool {
        self.shared().narrowed
    }

    fn run(&mut self, inputs: &[(&str, HostTensor)], output: &str) -> Result<HostTensor> {
        let tensors = inputs.iter().map(|(_, t)| convert::to_torch(t)).collect::<Result<Vec<_>>>()?;
        let named: Vec<_> = inputs.iter().zip(&tensors).map(|((n, _), t)| (*n, t)).collect();
        let outputs = tch::no_grad(|| self.forward(&named))?;
        let found = outputs.into_iter().find(|(n, _)| n == output);
        convert::to_host(&found.ok_or_else(|| Error::usage(format!("the graph has no output `{output}`")))?.1)
    }
}

impl Run for Box<dyn Engine> {
    fn run(&mut self, inputs: &[(&str, HostTensor)], output: &str) -> Result<HostTensor> {
        let named: Vec<_> = inputs.iter().map(|(n, t)| (*n, t)).collect();
        let found = Engine::run(self.as_mut(), &named)?.into_iter().find(|(n, _)| n == output);
        Ok(found.ok_or_else(|| Error::usage(format!("the graph has no output `{output}`")))?.1)
    }
}

/// The condition of one row of samples.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Feed {
    /// The class of this number.
    Class(usize),
    /// No class, as all zeros of a one-hot.
    Zeros,
}

/// The network under test, called with plain rows of samples in the order of the card's shape.
pub struct Subject<'a> {
    run: &'a mut dyn Run,
    card: TeacherCard,
    sample: InputSpec,
    time: InputSpec,
    others: Vec<(InputSpec, Other)>,
    /// Rows of one call; the graph's own batch where it is fixed.
    rows: usize,
    fixed: bool,
    /// Rows of samples that the network was run on so far.
    pub evaluated: usize,
    /// Seconds that the network took for them.
    pub seconds: f64,
}

#[derive(Debug, Clone)]
enum Other {
    Index,
    OneHot(usize),
    Filled(f64),
}

impl<'a> Subject<'a> {
    /// `card`: names, shape, layout, conditions and constants of the network (the rest plays no part).
    pub fn new(run: &'a mut dyn Run, card: &TeacherCard, inputs: &[InputSpec]) -> Result<Self> {
        let mut inputs = inputs.to_vec();
        for input in inputs.iter_mut().filter(|i| run.narrowed() && i.dtype == DType::F64) {
            input.dtype = DType::F32;
        }
        let find = |name: &str| {
            let found = inputs.iter().find(|i| i.name == name).cloned();
            found.ok_or_else(|| Error::usage(format!("the graph has no input `{name}`")))
        };
        let others = inputs
            .iter()
            .filter(|i| i.name != card.sample && i.name != card.time)
            .map(|i| {
                let other = match (card.conditions.get(&i.name), card.constants.get(&i.name)) {
                    (Some(Condition::ClassIndex { .. }), _) => Other::Index,
                    (Some(Condition::OneHot { classes, .. }), _) => Other::OneHot(*classes),
                    (_, Some(value)) => Other::Filled(*value),
                    _ => Other::Filled(0.0),
                };
                (i.clone(), other)
            })
            .collect();
        let sample = find(&card.sample)?;
        let fixed = sample.shape.first().copied().flatten();
        Ok(Self {
            run,
            card: card.clone(),
            time: find(&card.time)?,
            others,
            rows: fixed.unwrap_or(64).max(1),
            fixed: fixed.is_some(),
            sample,
            evaluated: 0,
            seconds: 0.0,
        })
    }

    /// Elements of one sample.
    pub fn elements(&self) -> usize {
        self.card.sample_len()
    }

    /// `F(x_net, time)`; `x` holds samples, one after the other, `feeds` one entry a row.
    pub fn forward(&mut self, x: &[f32], time: f64, feeds: &[Feed]) -> Result<Vec<f32>> {
        let len = self.elements();
        let total = feeds.len();
        let mut out = Vec::with_capacity(x.len());
        let piece = if self.fixed { self.rows } else { self.rows.min((1 << 21) / len.max(1)).max(1) };
        for start in (0..total).step_by(piece) {
            let count = piece.min(total - start);
            let mut part = x[start * len..(start + count) * len].to_vec();
            let mut labels = feeds[start..start + count].to_vec();
            // A fixed batch is filled up with its last row.
            while self.fixed && labels.len() < piece {
                part.extend_from_within((labels.len() - 1) * len..);
                labels.push(labels[labels.len() - 1]);
            }
            let y = self.call(&part, time, &labels)?;
            out.extend_from_slice(&y[..count * len]);
        }
        Ok(out)
    }

    /// The shape of the output for one batch of zeros, as the graph gives it.
    pub fn output_shape(&mut self) -> Result<Vec<usize>> {
        let rows = if self.fixed { self.rows } else { 1 };
        let x = vec![0.0; rows * self.elements()];
        Ok(self.output(&x, 1.0, &vec![Feed::Class(0); rows])?.shape().to_vec())
    }

    fn output(&mut self, x: &[f32], time: f64, feeds: &[Feed]) -> Result<HostTensor> {
        let rows = feeds.len();
        let (layout, shape) = (self.card.layout, self.card.shape.as_slice());
        let size: Vec<usize> = std::iter::once(rows).chain(self.card.graph_shape()).collect();
        let sample = HostTensor::new(&size, &layout.values_into_graph(x, shape))?;
        let mut inputs = vec![(self.sample.name.as_str(), sample.cast(self.sample.dtype))];
        let batch = self.sample.shape[0];
        inputs.push((&self.time.name, filled(&self.time, time, rows, batch)?));
        for (spec, other) in &self.others {
            let class = |f: &Feed| match f {
                Feed::Class(k) => *k,
                Feed::Zeros => 0,
            };
            let tensor = match other {
                Other::Index => {
                    let mut shape = shape_of(spec, rows, batch);
                    if shape.is_empty() && rows > 1 {
                        return Err(Error::unsupported(format!("`{}` takes one class a batch", spec.name)));
                    }
                    if let Some(lead) = shape.first_mut() {
                        *lead = rows;
                    }
                    HostTensor::new(&shape, &feeds.iter().map(|f| class(f) as i64).collect::<Vec<_>>())?
                }
                Other::OneHot(classes) => {
                    let hot = feeds
                        .iter()
                        .flat_map(|f| (0..*classes).map(move |k| f32::from(u8::from(*f == Feed::Class(k)))));
                    HostTensor::new(&[rows, *classes], &hot.collect::<Vec<_>>())?
                }
                Other::Filled(value) => filled(spec, *value, rows, batch)?,
            };
            inputs.push((&spec.name, tensor.cast(spec.dtype)));
        }
        let started = Instant::now();
        let y = self.run.run(&inputs, &self.card.output)?;
        self.seconds += started.elapsed().as_secs_f64();
        self.evaluated += rows;
        Ok(y)
    }

    fn call(&mut self, x: &[f32], time: f64, feeds: &[Feed]) -> Result<Vec<f32>> {
        let rows = feeds.len();
        let y = self.output(x, time, feeds)?;
        let (layout, shape) = (self.card.layout, self.card.shape.as_slice());
        let y32 = self.card.prediction_of(y.to_f32(), rows).ok_or_else(|| {
            Error::mismatch(format!(
                "output `{}` is {y:?} for {rows} samples of {shape:?}: not one value a value of the sample",
                self.card.output
            ))
            .hint(
                "a network that takes more channels than it gives has conditions among them: --card shape=... (the sample's own) and \
                 concat, as the README's card says",
            )
        })?;
        Ok(layout.values_out_of_graph(y32, shape))
    }
}

/// Free dimensions become the batch (the first) or 1.
fn shape_of(spec: &InputSpec, rows: usize, batch: Option<usize>) -> Vec<usize> {
    let size = |(place, dim): (usize, &Option<usize>)| match dim {
        None if place == 0 => rows,
        Some(d) if place == 0 && batch == Some(*d) => rows,
        None => 1,
        Some(d) => *d,
    };
    spec.shape.iter().enumerate().map(size).collect()
}

/// One number in an input's element type and shape; integers are rounded.
fn filled(spec: &InputSpec, value: f64, rows: usize, batch: Option<usize>) -> Result<HostTensor> {
    let value = if spec.dtype.is_float() { value } else { value.round() };
    let shape = shape_of(spec, rows, batch);
    let len = crate::tensor::checked_len(&shape)?;
    if len > 1 << 28 {
        return Err(Error::unsupported(format!("`{spec}` is too large for the probe")));
    }
    Ok(HostTensor::new(&shape, &vec![value; len])?.cast(spec.dtype))
}
