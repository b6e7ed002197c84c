//! What the training network makes of fixed inputs, and how far a built file is from it.

use tch::{Device, Kind, Tensor};

use crate::diffusion::sample_axes::{into_graph, out_of_graph};
use crate::diffusion::{Coefficients, StudentStart, TeacherCard};
use crate::error::{Context, Error, Result};
use crate::graph::Model;
use crate::graph::ir::Port;
use crate::onnx::ModelProto;
use crate::tensor::DType;
use crate::torch::{Forward, ImportOptions, Network};

/// Largest difference between the exported file and the training network, relative to the largest term of the sum that makes
/// the sample.
const TOLERANCE: f64 = 1e-5;

pub(super) fn port<'a>(net: &'a Network, name: &str) -> Result<&'a Port> {
    net.inputs().iter().find(|p| p.name == name).ok_or_else(|| Error::usage(format!("the graph has no input `{name}`")))
}

/// A built file as it will be read, for [`compare`].
pub(super) fn read_back(built: &ModelProto) -> Result<Network> {
    let options = ImportOptions { fuse: false, ..ImportOptions::default() };
    Network::import(Model::from_proto(built.clone()), &options, Device::Cpu)
}

/// What the training network makes of fixed inputs.
pub(super) struct Expected {
    pub batch: usize,
    pub inputs: Vec<(String, Tensor)>,
    pub sample: Tensor,
    /// The largest term of the sum that makes the sample.
    pub scale: f64,
}

/// The largest absolute value.
pub(super) fn largest(t: &Tensor) -> Result<f64> {
    Ok(t.f_abs()?.f_max()?.f_double_value(&[])?)
}

/// How far a built file is from the training network, where it is farthest for its tolerance.
pub(super) struct Apart {
    batch: usize,
    /// Largest difference of a value.
    error: f64,
    /// Largest value of the sample, and largest term of the sum that makes it.
    size: f64,
    scale: f64,
}

impl Apart {
    /// The difference over what it is relative to. NaN counts as infinite.
    pub(super) fn relative(&self) -> f64 {
        let relative = self.error / self.scale.max(1.0);
        if relative.is_nan() { f64::INFINITY } else { relative }
    }

    pub(super) fn within(&self) -> bool {
        self.relative() <= TOLERANCE
    }

    pub(super) fn error(&self) -> Error {
        let Self { batch, error, size, scale } = self;
        Error::mismatch(format!(
            "max abs error {error:.2e} at batch {batch} where values reach {size:.2} and are sums of terms of up to {scale:.1}"
        ))
    }
}

/// A built file against what the training network made of the same inputs.
///
/// Errors: a file that cannot be read back or run, or whose sample has another shape.
pub(super) fn compare(built: &ModelProto, expected: &[Expected]) -> Result<Apart> {
    let exported = read_back(built)?;
    let mut worst = Apart { batch: 0, error: 0.0, size: 0.0, scale: 1.0 };
    for Expected { batch, inputs, sample, scale } in expected {
        let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let (_, ours) =
            tch::no_grad(|| exported.forward(&inputs)).with_context(|| format!("at batch {batch}"))?.remove(0);
        if ours.size() != sample.size() {
            let (found, expected) = (ours.size(), sample.size());
            return Err(Error::mismatch(format!("shape {found:?} at batch {batch}, expected {expected:?}")));
        }
        let error = largest(&ours.f_sub(sample)?)?;
        let found = Apart { batch: *batch, error, size: largest(sample)?, scale: *scale };
        if worst.batch == 0 || found.relative() > worst.relative() {
            worst = found;
        }
    }
    Ok(worst)
}

/// The student as it was trained.
pub(super) struct Reference<'a> {
    pub net: &'a Network,
    pub card: &'a TeacherCard,
    pub start: &'a StudentStart,
}

impl Reference<'_> {
    /// What the training network makes of fixed noise at batch 1 and 3 (or the graph's fixed batch).
    pub(super) fn samples(&self) -> Result<Vec<Expected>> {
        let fixed = port(self.net, &self.card.sample)?.dims().and_then(|d| d.first().copied().flatten());
        let batches = fixed.map_or(vec![1, 3], |b| vec![b]);
        let one = |batch: usize| {
            let noise = self.noise(batch)?;
            let conditions = self.conditions(batch)?;
            let (sample, scale) =
                tch::no_grad(|| self.forward(&noise, &conditions)).with_context(|| format!("at batch {batch}"))?;
            let inputs = std::iter::once(("noise".to_owned(), noise)).chain(conditions).collect();
            Ok(Expected { batch, inputs, sample, scale })
        };
        batches.into_iter().map(one).collect()
    }

    /// The element type in which training feeds an input.
    fn fed(&self, p: &Port) -> Kind {
        let dtype = p.dtype.unwrap_or(DType::F32);
        crate::torch::convert::kind(if self.net.shared().widened { dtype.widened() } else { dtype })
    }

    fn noise(&self, batch: usize) -> Result<Tensor> {
        let values = crate::noise::batch_noise(0, 0, batch, self.card.sample_len());
        Ok(Tensor::f_from_slice(&values)?.f_reshape(self.card.size_of(batch))?)
    }

    /// Different class indices for the images, ones for other conditions.
    fn conditions(&self, batch: usize) -> Result<Vec<(String, Tensor)>> {
        self.card
            .conditions
            .iter()
            .map(|(name, condition)| {
                let p = port(self.net, name)?;
                let mut size: Vec<i64> =
                    p.dims().unwrap_or_default().iter().map(|d| d.map_or(1, |n| n as i64)).collect();
                if let Some(first) = size.first_mut() {
                    *first = batch as i64;
                }
                let kind = self.fed(p);
                let classes = condition.classes().unwrap_or(1).max(1) as i64;
                let t = if kind == Kind::Int64 || kind == Kind::Int {
                    let n: i64 = size.iter().product();
                    Tensor::f_arange(n, (kind, Device::Cpu))?.f_remainder(classes)?.f_reshape(&size[..])?
                } else {
                    Tensor::f_ones(&size[..], (kind, Device::Cpu))?
                };
                Ok((name.clone(), t))
            })
            .collect()
    }

    /// Whether the network gives a variance behind its prediction, which has no place in a student.
    pub(super) fn learns_variance(&self) -> Result<bool> {
        let Some(wanted) = self.card.graph_shape_with_variance() else { return Ok(false) };
        let output = self.net.outputs().iter().find(|p| p.name == self.card.output);
        let declared: Option<Vec<usize>> =
            output.and_then(|p| p.dims()).and_then(|d| d.get(1..).map(<[_]>::to_vec)?.into_iter().collect());
        let row = match declared.filter(|row| row.len() == wanted.len()) {
            Some(row) => row,
            // Exporters may leave it open.
            None => {
                let dims = port(self.net, &self.card.sample)?.dims();
                let batch = dims.and_then(|d| d.first().copied().flatten()).unwrap_or(1);
                let raw = tch::no_grad(|| self.raw(&self.noise(batch)?, &self.conditions(batch)?))?;
                let size = into_graph(self.card.layout, &raw)?.size();
                size[1..].iter().map(|d| *d as usize).collect()
            }
        };
        Ok(row == wanted)
    }

    /// The sample, and the largest term of the sum that makes it.
    fn forward(&self, noise: &Tensor, conditions: &[(String, Tensor)]) -> Result<(Tensor, f64)> {
        let x = noise.f_mul_scalar(self.start.init_scale)?;
        let f = self.card.without_variance(self.raw(noise, conditions)?)?;
        let Coefficients { skip, out, .. } = self.start.coefficients;
        let terms = [f.f_mul_scalar(out)?, x.f_mul_scalar(skip)?];
        let scale = largest(&terms[0])?.max(largest(&terms[1])?);
        let x0 = terms[0].f_add(&terms[1])?;
        let x0 = match self.card.range {
            Some([low, high]) => x0.f_clamp(low, high)?,
            None => x0,
        };
        Ok((x0, scale))
    }

    /// The network's own output on this noise, in the order of the card's shape, in f32.
    fn raw(&self, noise: &Tensor, conditions: &[(String, Tensor)]) -> Result<Tensor> {
        let batch = noise.size()[0];
        let x = noise.f_mul_scalar(self.start.init_scale)?;
        let layout = self.card.layout;
        let x_port = port(self.net, &self.card.sample)?;
        let cast = |t: &Tensor, p: &Port| -> Result<Tensor> { Ok(t.f_to_kind(self.fed(p))?) };
        let x_in = cast(&into_graph(layout, &x)?, x_port)?;
        let full = |p: &Port, v: f64| -> Result<Tensor> {
            let size: Vec<i64> = p.dims().unwrap_or_default().iter().map(|d| d.map_or(batch, |n| n as i64)).collect();
            cast(&Tensor::f_full(&size[..], v, (Kind::Double, Device::Cpu))?, p)
        };
        let time = full(port(self.net, &self.card.time)?, self.start.coefficients.time)?;
        let constants = self
            .card
            .constants
            .iter()
            .map(|(n, v)| Ok((n.clone(), full(port(self.net, n)?, *v)?)))
            .collect::<Result<Vec<_>>>()?;
        let mut inputs: Vec<(&str, &Tensor)> = vec![(&self.card.sample, &x_in), (&self.card.time, &time)];
        inputs.extend(conditions.iter().chain(&constants).map(|(n, t)| (n.as_str(), t)));
        // The training network may live on another device; the check is made on the CPU.
        let device = self.net.device();
        let moved: Vec<(&str, Tensor)> =
            inputs.iter().map(|(n, t)| Ok((*n, t.f_to_device(device)?))).collect::<Result<_>>()?;
        let refs: Vec<(&str, &Tensor)> = moved.iter().map(|(n, t)| (*n, t)).collect();
        let out = self.net.forward(&refs)?;
        let (_, f) = out
            .into_iter()
            .find(|(n, _)| *n == self.card.output)
            .ok_or_else(|| Error::usage(format!("the graph has no output `{}`", self.card.output)))?;
        let f = f.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?;
        out_of_graph(layout, f)
    }
}
