//! A teacher on ONNX Runtime or tract: denoising and sampling without libtorch, image `k` of a seed always the same.

use std::path::Path;
use std::sync::Arc;

use prost::Message;

use crate::error::{Context, Error, Result};
use crate::graph::{Model, save, sizes};
use crate::noise::{batch_noise, image_class};
use crate::onnx::ModelProto;
use crate::runtime::foresight::Foresight;
use crate::runtime::student::SampleRequest;
use crate::runtime::{self, Dim, Engine, EngineOptions};
use crate::tensor::{DType, HostTensor};

use super::card::{InputSpec, TeacherCard};
use super::card_source::{CardSource, ResolvedCard};
use super::condition::Condition;
use super::conditions::{HostConditions, check_guidance};
use super::conversion::Conversion;
use super::guidance::{Guidance, check_weaker};
use super::sampler::Sampler;

/// What to sample from a teacher.
#[derive(Debug, Clone)]
pub struct TeacherRequest {
    /// Seed, classes, embeddings and batch size, as for a student.
    pub images: SampleRequest,
    /// The solver.
    pub sampler: Sampler,
    /// Steps of the solver.
    pub steps: usize,
    /// Time shift of the steps of a flow, see [`super::Schedule::with_shift`]; 0: the card's.
    pub shift: f64,
    /// Guidance: classifier-free, or by the teacher's weaker network ([`TeacherOnEngine::guided_by`]).
    pub guidance: Guidance,
}

/// Samples of a teacher.
#[derive(Debug, Clone)]
pub struct TeacherSamples {
    /// f32 `[count, ...shape]`, clipped to the card's range where it has one.
    pub images: HostTensor,
    /// Network evaluations an image (guidance takes two a step).
    pub nfe: usize,
}

/// A teacher's card and the engine that runs its graph.
pub struct TeacherOnEngine {
    engine: Box<dyn Engine>,
    card: Arc<TeacherCard>,
    conversion: Conversion,
    sample: InputSpec,
    time: InputSpec,
    conditions: Vec<(Condition, InputSpec)>,
    constants: Vec<(InputSpec, f64)>,
    foresight: Foresight,
    /// The weaker network that guides this one.
    weaker: Option<Box<Self>>,
}

/// Reads the card of a model file: its metadata, the files beside it and `--card key=value` entries.
pub fn card_of(path: &Path, overrides: &[String]) -> Result<ResolvedCard> {
    let bytes = crate::files::map(path).with_context(|| path.display().to_string())?;
    let model =
        ModelProto::decode(bytes).map_err(|e| Error::invalid(format!("{}: not an ONNX model: {e}", path.display())))?;
    CardSource::new().model(path).proto(&model).overrides(overrides.iter().cloned()).resolve()
}

fn declared(value: &runtime::ValueInfo) -> sizes::Declared {
    let dim = |d: &Dim| match d {
        Dim::Fixed(n) => Ok(*n),
        Dim::Symbol(symbol) => Err(symbol.clone()),
    };
    (value.name.clone(), value.shape.iter().map(dim).collect())
}

impl TeacherOnEngine {
    /// Opens a teacher file with its card.
    pub fn open(path: &Path, overrides: &[String], options: &EngineOptions) -> Result<Self> {
        let resolved = card_of(path, overrides)?;
        let shown = || path.display().to_string();
        let engine = if !resolved.changes_graph() {
            runtime::open(path, options)?
        } else {
            let mut proto = (*Model::load(path)?.proto).clone();
            resolved.put_into(&mut proto).with_context(shown)?;
            save::internalise(&mut proto);
            runtime::open_bytes(&proto.encode_to_vec(), path.parent(), options)?
        };
        Self::new(engine, Arc::new(resolved.card)).with_context(shown)
    }

    /// Checks the card against the engine's graph.
    pub fn new(engine: Box<dyn Engine>, card: Arc<TeacherCard>) -> Result<Self> {
        let sizes = card.sizes(&engine.inputs().iter().map(declared).collect::<Vec<_>>())?;
        let sized = |value: &runtime::ValueInfo| {
            let mut spec = InputSpec::from(value);
            for (axis, dim) in value.shape.iter().enumerate() {
                if let Dim::Symbol(symbol) = dim {
                    spec.shape[axis] = sizes.get(&value.name, axis, symbol);
                }
            }
            spec
        };
        let inputs: Vec<InputSpec> = engine.inputs().iter().map(sized).collect();
        let outputs: Vec<InputSpec> = engine.outputs().iter().map(InputSpec::from).collect();
        card.check_against(&inputs, &outputs)?;
        let find = |name: &str| {
            let found = inputs.iter().find(|i| i.name == name).cloned();
            found.ok_or_else(|| Error::usage(format!("the graph has no input `{name}`")))
        };
        Ok(Self {
            foresight: Foresight::default(),
            weaker: None,
            conversion: Conversion::new(&card)?,
            sample: find(&card.sample)?,
            time: find(&card.time)?,
            conditions: card.conditions.iter().map(|(n, c)| Ok((c.clone(), find(n)?))).collect::<Result<_>>()?,
            constants: card.constants.iter().map(|(n, v)| Ok((find(n)?, *v))).collect::<Result<_>>()?,
            engine,
            card,
        })
    }

    /// The same teacher, guided by a weaker network from now on: autoguidance (Karras et al. 2024), `D_weak + scale (D - D_weak)`, in
    /// the place of classifier-free guidance.
    ///
    /// Errors: a network of other samples, or with conditions that this one does not have.
    pub fn guided_by(self, weaker: Self) -> Result<Self> {
        check_weaker(&self.card, &weaker.card)?;
        Ok(Self { weaker: Some(Box::new(weaker)), ..self })
    }

    /// The teacher's card.
    pub fn card(&self) -> &Arc<TeacherCard> {
        &self.card
    }
    /// How the card's terms become coefficients, times and noise levels.
    pub fn conversion(&self) -> &Conversion {
        &self.conversion
    }
    /// Name of the engine and of the provider that run the file.
    pub fn engine_name(&self) -> String {
        self.engine.name()
    }

    /// `D(x; sigma, c)` with guidance `D_u + scale (D_c - D_u)`: `x_edm` are `cond.len()` samples one after the other.
    pub fn denoise(
        &mut self,
        x_edm: &[f32],
        sigma: f64,
        cond: &HostConditions,
        guidance: impl Into<Guidance>,
    ) -> Result<Vec<f32>> {
        let guidance = guidance.into();
        let scale = guidance.at(sigma);
        if scale != 1.0 {
            guidance.check_rescale(&self.card)?;
        }
        let k = self.conversion.at(sigma)?;
        let (x_net, mut f) = match self.weaker.take_if(|_| scale != 1.0) {
            // (Taken and put back: it is called as this one is.)
            Some(mut weaker) => {
                let without = weaker.denoise(x_edm, sigma, cond, 1.0).context("the weaker network that guides");
                self.weaker = Some(weaker);
                let (x_net, with) = self.evaluate(x_edm, sigma, cond, false)?;
                // F_g = F + (D_g - D) / out, and D_g - D = (scale - 1) (D - D_weak).
                let (skip, out, extra) = (k.skip as f32, k.out as f32, scale as f32 - 1.0);
                let of = |((x, f), weak): ((&f32, &f32), &f32)| f + extra * (skip * x + out * f - weak) / out;
                let f: Vec<f32> = x_net.iter().zip(&with).zip(&without?).map(of).collect();
                (x_net, rescaled(f, &with, self.card.sample_len(), guidance.rescale))
            }
            None if scale != 1.0 => {
                check_guidance(&self.card)?;
                let (x_net, f) = self.evaluate(x_edm, sigma, cond, true)?;
                // The conversion is affine with the same coefficients for both halves, so F may be extrapolated.
                let (with, without) = f.split_at(x_net.len());
                let f = with.iter().zip(without).map(|(c, u)| u + scale as f32 * (c - u)).collect();
                (x_net, rescaled(f, with, self.card.sample_len(), guidance.rescale))
            }
            None => self.evaluate(x_edm, sigma, cond, false)?,
        };
        x_net.iter().zip(&mut f).for_each(|(x, f)| *f = k.skip as f32 * x + k.out as f32 * *f);
        Ok(f)
    }

    /// What the network is given as the samples, and what it gives, in the card's order; `twice`: then the same without conditions.
    fn evaluate(
        &mut self,
        x_edm: &[f32],
        sigma: f64,
        cond: &HostConditions,
        twice: bool,
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        let rows = cond.len();
        let (layout, shape) = (self.card.layout, self.card.shape.as_slice());
        if x_edm.len() != rows * self.card.sample_len() {
            return Err(Error::mismatch(format!("{} values for {rows} samples of {shape:?}", x_edm.len())));
        }
        let total = if twice { 2 * rows } else { rows };
        let k = self.conversion.at(sigma)?;
        let x_net: Vec<f32> = x_edm.iter().map(|v| v * k.c_in as f32).collect();
        let in_graph: Vec<usize> = std::iter::once(rows).chain(self.card.graph_shape()).collect();
        let mut given = HostTensor::new(&in_graph, &layout.values_into_graph(&x_net, shape))?;
        if twice {
            given = HostTensor::concat_rows(&[given.clone(), given])?;
        }
        let mut inputs = vec![(self.sample.name.as_str(), given.cast(self.sample.dtype))];
        inputs.push((self.time.name.as_str(), filled(&self.time, k.time, total, self.sample.shape[0])?));
        for (condition, spec) in &self.conditions {
            let mut tensor = cond.bound(&spec.name, condition, spec)?;
            if twice {
                let null = HostConditions::null(condition, spec, rows)?.unwrap_or_else(|| tensor.clone());
                tensor = HostTensor::concat_rows(&[tensor, null])?;
            }
            inputs.push((spec.name.as_str(), tensor));
        }
        for (spec, value) in &self.constants {
            inputs.push((spec.name.as_str(), filled(spec, *value, total, self.sample.shape[0])?));
        }
        let named: Vec<(&str, &HostTensor)> = inputs.iter().map(|(n, t)| (*n, t)).collect();
        let outputs = runtime::run_batched(self.engine.as_mut(), &named, total)?;
        let output = outputs.into_iter().find(|(n, _)| *n == self.card.output).map(|(_, t)| t);
        let output = output.ok_or_else(|| Error::backend(format!("no output `{}`", self.card.output)))?;
        let f = self.card.prediction_of(output.to_f32(), total);
        let f = f.ok_or_else(|| {
            Error::mismatch(format!("output {output:?} for {total} samples of {:?}", self.card.shape))
        })?;
        Ok((x_net, layout.values_out_of_graph(f, shape)))
    }

    /// Stand-ins for `count` rows of each condition that the caller would bring, as [`runtime::student::StudentInfo::random_rows`]
    /// has them: normal numbers, ones for integers.
    pub fn random_rows(&self, seed: u64, count: usize) -> Result<Vec<(String, HostTensor)>> {
        let rows = self.conditions.iter().filter(|(condition, _)| condition.classes().is_none());
        let make = |(k, (condition, input)): (usize, &(Condition, InputSpec))| {
            let row = condition.row_shape();
            let len = row.iter().product();
            let shape: Vec<usize> = std::iter::once(count).chain(row).collect();
            let rows = match input.dtype.is_float() {
                true => HostTensor::new(&shape, &batch_noise(seed ^ 0xe6bd, k as u64 * 1_000_003, count, len))?,
                false => HostTensor::new(&shape, &vec![1i64; count * len])?,
            };
            Ok((input.name.clone(), rows.cast(input.dtype)))
        };
        rows.enumerate().map(make).collect()
    }

    /// Conditions of images `start..start + count`: classes in turn or drawn from the seed, rows of embeddings in turn.
    pub fn conditions(&self, request: &SampleRequest, start: u64, count: usize) -> Result<HostConditions> {
        let mut tensors = Vec::new();
        if !request.classes.is_empty() && self.card.classes().is_none() {
            return Err(Error::usage("the teacher has no classes"));
        }
        for (name, condition) in &self.card.conditions {
            let index = |k: u64, len: usize| (start.wrapping_add(k) % len as u64) as usize;
            let tensor = match condition.classes() {
                Some(classes) => {
                    if let Some(wrong) = request.classes.iter().find(|c| **c >= classes) {
                        return Err(Error::usage(format!("class {wrong}: `{name}` has classes 0 to {}", classes - 1)));
                    }
                    let class = |k: u64| match request.classes.as_slice() {
                        [] => image_class(request.seed, start.wrapping_add(k), classes),
                        given => given[index(k, given.len())],
                    };
                    HostTensor::vec(&(0..count as u64).map(|k| class(k) as i64).collect::<Vec<_>>())
                }
                None => {
                    let given = request.embeddings.iter().find(|(n, _)| n == name).map(|(_, t)| t);
                    let rows = given.filter(|t| t.rank() > 0 && t.shape()[0] > 0).ok_or_else(|| {
                        Error::usage(format!("the teacher wants rows for its condition `{name}`"))
                            .hint(format!("--condition {name}=rows.npy"))
                    })?;
                    let pick = |k: u64| rows.rows(index(k, rows.shape()[0]), 1);
                    HostTensor::concat_rows(&(0..count as u64).map(pick).collect::<Result<Vec<_>>>()?)?
                }
            };
            tensors.push((name.clone(), tensor));
        }
        HostConditions::new(count, tensors)
    }

    /// Samples images `start..start + count`: image `k` starts from [`crate::noise::image_noise`] of (seed, k).
    pub fn sample(&mut self, request: &TeacherRequest, start: u64, count: usize) -> Result<TeacherSamples> {
        let schedule = self.conversion.schedule().clone().with_shift(request.shift, "the sampler's time shift")?;
        let (sampler, steps) = request.sampler.fitting(self.card.prediction, request.steps);
        let sigmas = sampler.sigmas(&schedule, steps);
        let len = self.card.sample_len();
        let batch = request.images.batch.max(1);
        let own = (4 * len * if request.guidance.is_none() { 1 } else { 2 }) as u64;
        let mut foresight = self.foresight;
        foresight.check_calls(batch.min(count), own, |rows| {
            let cond = self.conditions(&request.images, start, rows)?;
            let z = batch_noise(request.images.seed, start, rows, len);
            self.denoise(&z, sigmas[0], &cond, request.guidance).map(drop)
        })?;
        self.foresight = foresight;
        let (mut images, mut nfe) = (Vec::with_capacity(count * len), 0);
        for first in (0..count).step_by(batch) {
            let rows = batch.min(count - first);
            let from = start.wrapping_add(first as u64);
            let cond = self.conditions(&request.images, from, rows)?;
            let z = batch_noise(request.images.seed, from, rows, len);
            let sampled = sampler
                .run(&schedule, &z, &sigmas, |x: &Vec<f32>, sigma| self.denoise(x, sigma, &cond, request.guidance))?;
            images.extend(sampled.value);
            nfe = sampled.nfe;
        }
        if let Some([low, high]) = self.card.range {
            images.iter_mut().for_each(|v| *v = v.clamp(low as f32, high as f32));
        }
        if !request.guidance.is_none() {
            nfe *= 2;
        }
        Ok(TeacherSamples { images: HostTensor::new(&self.card.batch_of(count), &images)?, nfe })
    }
}

/// `(share std(with) / std(f) + 1 - share) f` of each sample's `len` values, see [`Guidance::rescale`]; bit for bit `f` where that is
/// `with`.
fn rescaled(mut f: Vec<f32>, with: &[f32], len: usize, share: f64) -> Vec<f32> {
    // Keeps 0/0 out where a network gives one number for all values of a sample.
    const SMALLEST: f64 = 1e-12;
    let deviation = |row: &[f32]| {
        let mean = row.iter().map(|v| f64::from(*v)).sum::<f64>() / row.len() as f64;
        let square = row.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>();
        (square / (row.len().max(2) - 1) as f64).sqrt().max(SMALLEST)
    };
    if share > 0.0 {
        for (row, with) in f.chunks_exact_mut(len.max(1)).zip(with.chunks_exact(len.max(1))) {
            let factor = 1.0 + share * (deviation(with) / deviation(row) - 1.0);
            row.iter_mut().for_each(|v| *v *= factor as f32);
        }
    }
    f
}

/// One number in an input's element type and shape; integers are rounded. `batch` is the sample's first dimension.
fn filled(spec: &InputSpec, value: f64, rows: usize, batch: Option<usize>) -> Result<HostTensor> {
    let value = if spec.dtype.is_float() { value } else { value.round() };
    // A first dimension that is free, or fixed to the graph's batch, has a row a sample.
    let size = |(place, dim): (usize, &Option<usize>)| match dim {
        None if place == 0 => rows,
        Some(d) if place == 0 && batch == Some(*d) => rows,
        None => 1,
        Some(d) => *d,
    };
    let shape: Vec<usize> = spec.shape.iter().enumerate().map(size).collect();
    let len = crate::tensor::checked_len(&shape)?;
    Ok(HostTensor::new(&shape, &vec![value; len])?.cast(match spec.dtype {
        DType::Bool => DType::U8,
        other => other,
    }))
}

#[cfg(test)]
#[path = "teacher_engine_tests.rs"]
mod tests;
