//! A network with its card: `D(x; sigma, c)`, the estimate of x0 that every method here computes with.

use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use crate::error::{Context, Error, Result};
use crate::torch::convert;
use crate::torch::device::send;
use crate::torch::{Forward, ParamSet};

use super::card::{Condition, InputSpec, Layout, TeacherCard};
use super::conditions::{Conditions, HostConditions, check_guidance};
use super::conversion::{Coefficients, Conversion, StudentStart};
use super::guidance::Guidance;

/// What the graph's inputs want, worked out once.
#[derive(Debug)]
struct Binding {
    sample: InputSpec,
    time: InputSpec,
    conditions: Vec<(Condition, InputSpec)>,
    constants: Vec<(InputSpec, f64)>,
}

/// A network and its card. Copies share everything but the parameters.
pub struct Denoiser {
    network: Box<dyn Forward>,
    card: Arc<TeacherCard>,
    conversion: Arc<Conversion>,
    binding: Arc<Binding>,
}

impl std::fmt::Debug for Denoiser {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Denoiser").field("card", &self.card).finish_non_exhaustive()
    }
}

impl Denoiser {
    /// `inputs`: the graph's inputs as [`TeacherCard::check_against`] saw them.
    pub fn new(network: Box<dyn Forward>, card: Arc<TeacherCard>, inputs: &[InputSpec]) -> Result<Self> {
        let find = |name: &str| {
            inputs.iter().find(|i| i.name == name).cloned().ok_or_else(|| {
                Error::usage(format!("the card names the input `{name}`, which the graph does not have"))
            })
        };
        let binding = Binding {
            sample: find(&card.sample)?,
            time: find(&card.time)?,
            conditions: card.conditions.iter().map(|(n, c)| Ok((c.clone(), find(n)?))).collect::<Result<_>>()?,
            constants: card.constants.iter().map(|(n, v)| Ok((find(n)?, *v))).collect::<Result<_>>()?,
        };
        let conversion = Arc::new(Conversion::new(&card)?);
        Ok(Self { network, card, conversion, binding: Arc::new(binding) })
    }

    pub fn params(&self) -> &ParamSet {
        self.network.params()
    }
    pub fn network(&self) -> &dyn Forward {
        &*self.network
    }
    pub fn card(&self) -> &Arc<TeacherCard> {
        &self.card
    }
    pub fn conversion(&self) -> &Conversion {
        &self.conversion
    }

    /// The same network with its own parameters of equal values.
    pub fn copy(&self) -> Result<Self> {
        Ok(self.with(self.network.copy()?))
    }

    /// [`Forward::copy_narrow`].
    pub fn copy_narrow(&self) -> Result<Self> {
        Ok(self.with(self.network.copy_narrow()?))
    }

    fn with(&self, network: Box<dyn Forward>) -> Self {
        Self { network, card: self.card.clone(), conversion: self.conversion.clone(), binding: self.binding.clone() }
    }

    /// Classes drawn uniformly for `batch` samples, on the CPU.
    pub fn sample_conditions(&self, rng: &mut impl rand_chacha::rand_core::Rng, batch: usize) -> Result<Conditions> {
        Conditions::from_host(&HostConditions::draw(&self.card, rng, batch)?, Device::Cpu)
    }

    /// `D(x; sigma, c)`: x0 estimated from `x_edm = x0 + sigma e`, `[B, C, H, W]` f32, `sigma` one finite level a row.
    /// Differentiable with respect to `x_edm` and the parameters.
    pub fn denoise(&self, x_edm: &Tensor, sigma: &[f64], cond: &Conditions) -> Result<Tensor> {
        Ok(self.denoise_tapped(x_edm, sigma, cond, &[])?.0)
    }

    /// [`Denoiser::denoise`], and the tensors of these names inside the network, first dimension the batch.
    pub fn denoise_tapped(
        &self,
        x_edm: &Tensor,
        sigma: &[f64],
        cond: &Conditions,
        taps: &[String],
    ) -> Result<(Tensor, Vec<Tensor>)> {
        self.check_batch(x_edm, cond, sigma.len())?;
        let coefficients = self.coefficients(sigma)?;
        let conditions = self.bind(cond, x_edm.device())?;
        let (x0, features) = self.run(x_edm, &coefficients, &conditions, taps)?;
        let rows = sigma.len() as i64;
        match features.iter().zip(taps).find(|(f, _)| f.size().first() != Some(&rows)) {
            None => Ok((x0, features)),
            Some((f, tap)) => Err(Error::usage(format!(
                "the tensor `{tap}` has shape {:?}, expected a row for each of {rows} samples",
                f.size()
            ))),
        }
    }

    /// Classifier-free guidance, `D_u + scale (D_c - D_u)`, in one batch of twice the size. Conditions without a null
    /// value in the card stay as they are in `D_u`; one at least must have one. Where no row's noise level is guided it is
    /// [`Denoiser::denoise`].
    pub fn guided(
        &self,
        x_edm: &Tensor,
        sigma: &[f64],
        cond: &Conditions,
        guidance: impl Into<Guidance>,
    ) -> Result<Tensor> {
        let guidance = guidance.into();
        let scales: Vec<f64> = sigma.iter().map(|s| guidance.at(*s)).collect();
        if scales.iter().all(|s| *s == 1.0) {
            return self.denoise(x_edm, sigma, cond);
        }
        check_guidance(&self.card)?;
        self.check_batch(x_edm, cond, sigma.len())?;
        let coefficients = self.coefficients(&[sigma, sigma].concat())?;
        let mut conditions = self.bind(cond, x_edm.device())?;
        for ((condition, spec), bound) in self.binding.conditions.iter().zip(&mut conditions) {
            let null = match HostConditions::null(condition, spec, sigma.len())? {
                Some(host) => send(&convert::to_torch(&host)?, x_edm.device())?,
                None => bound.shallow_clone(),
            };
            *bound = Tensor::f_cat(&[&*bound, &null], 0)?;
        }
        let (both, _) = self.run(&Tensor::f_cat(&[x_edm, x_edm], 0)?, &coefficients, &conditions, &[])?;
        let rows = sigma.len() as i64;
        let (with, without) = (both.f_narrow(0, 0, rows)?, both.f_narrow(0, rows, rows)?);
        let difference = with.f_sub(&without)?;
        if scales.iter().all(|s| *s == guidance.scale) {
            return Ok(without.f_add(&difference.f_mul_scalar(guidance.scale)?)?);
        }
        // Rows outside the interval keep `with`, bit for bit.
        let extra: Vec<f32> = scales.iter().map(|s| (s - 1.0) as f32).collect();
        let extra = send(&Tensor::f_from_slice(&extra)?.f_view([rows, 1, 1, 1])?, x_edm.device())?;
        Ok(with.f_add(&difference.f_mul(&extra)?)?)
    }

    /// An error unless the card has a null value for guidance.
    pub fn check_guidance(&self) -> Result<()> {
        check_guidance(&self.card)
    }

    /// The one-step student: x0 from `z ~ N(0, I)`, `[B, C, H, W]`: `x_net = init_scale z`, `x0 = skip x_net + out F`.
    pub fn generate(&self, z: &Tensor, cond: &Conditions, start: &StudentStart) -> Result<Tensor> {
        let rows = z.size().first().copied().unwrap_or(0) as usize;
        self.check_batch(z, cond, rows)?;
        let conditions = self.bind(cond, z.device())?;
        let coefficients = vec![Coefficients { c_in: start.init_scale, ..start.coefficients }; rows];
        Ok(self.run(z, &coefficients, &conditions, &[])?.0)
    }

    fn coefficients(&self, sigma: &[f64]) -> Result<Vec<Coefficients>> {
        sigma.iter().map(|s| self.conversion.at(*s)).collect()
    }

    fn check_batch(&self, x: &Tensor, cond: &Conditions, rows: usize) -> Result<()> {
        let [c, h, w] = self.card.shape.map(|d| d as i64);
        let expected = [rows as i64, c, h, w];
        if x.size() != expected {
            return Err(Error::mismatch(format!("samples of shape {:?}, expected {expected:?}", x.size())));
        }
        if !self.binding.conditions.is_empty() && cond.len() != rows as i64 {
            return Err(Error::mismatch(format!("conditions of {} rows for {rows} samples", cond.len())));
        }
        Ok(())
    }

    /// The conditions in the graph's form, in the order of the card.
    fn bind(&self, cond: &Conditions, device: Device) -> Result<Vec<Tensor>> {
        let one = |(condition, spec): &(Condition, InputSpec)| {
            Ok(cond.bound(&spec.name, condition, spec)?.f_to_device(device)?)
        };
        self.binding.conditions.iter().map(one).collect()
    }

    fn run(
        &self,
        x: &Tensor,
        coefficients: &[Coefficients],
        conditions: &[Tensor],
        taps: &[String],
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let Some(first) = coefficients.first() else { return Ok((x.shallow_clone(), Vec::new())) };
        let single = match self.binding.time.shape.first() {
            None => true,
            Some(d) => *d == Some(1) && self.binding.sample.shape.first() != Some(&Some(1)),
        };
        if !single || coefficients.iter().all(|c| c.time == first.time) {
            return self.run_together(x, coefficients, conditions, single, taps);
        }
        // One number for the whole batch: the rows of each time run on their own, then go back to their places.
        let mut groups: Vec<(f64, Vec<i64>)> = Vec::new();
        for (row, c) in coefficients.iter().enumerate() {
            match groups.iter_mut().find(|(time, _)| *time == c.time) {
                Some((_, rows)) => rows.push(row as i64),
                None => groups.push((c.time, vec![row as i64])),
            }
        }
        let mut outputs = Vec::with_capacity(groups.len());
        for (_, rows) in &groups {
            let index = send(&Tensor::from_slice(rows), x.device())?;
            let picked: Vec<Coefficients> = rows.iter().map(|r| coefficients[*r as usize]).collect();
            let conditions = conditions.iter().map(|c| Ok(c.f_index_select(0, &index)?)).collect::<Result<Vec<_>>>()?;
            outputs.push(self.run_together(&x.f_index_select(0, &index)?, &picked, &conditions, true, taps)?);
        }
        let order: Vec<i64> = groups.iter().flat_map(|(_, rows)| rows.iter().copied()).collect();
        let mut back = vec![0i64; order.len()];
        order.iter().enumerate().for_each(|(place, row)| back[*row as usize] = place as i64);
        let back = send(&Tensor::from_slice(&back), x.device())?;
        let join = |parts: Vec<&Tensor>| -> Result<Tensor> { Ok(Tensor::f_cat(&parts, 0)?.f_index_select(0, &back)?) };
        let features = (0..taps.len()).map(|k| join(outputs.iter().map(|(_, f)| &f[k]).collect()));
        Ok((join(outputs.iter().map(|(t, _)| t).collect())?, features.collect::<Result<_>>()?))
    }

    fn run_together(
        &self,
        x: &Tensor,
        coefficients: &[Coefficients],
        conditions: &[Tensor],
        single: bool,
        taps: &[String],
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let device = x.device();
        let x_net = scaled(x, coefficients, |c| c.c_in)?;
        let wanted = match self.card.layout {
            Layout::Nchw => x_net.shallow_clone(),
            Layout::Nhwc => x_net.f_permute([0, 2, 3, 1])?.f_contiguous()?,
        };
        let sample = wanted.f_to_kind(convert::kind(self.binding.sample.dtype))?;
        let time = send(&self.time(coefficients, single)?, device)?;
        let constants = self
            .binding
            .constants
            .iter()
            .map(|(spec, value)| {
                let shape: Vec<i64> = spec.shape.iter().map(|d| d.map_or(coefficients.len(), |d| d) as i64).collect();
                Ok(Tensor::f_full(&shape[..], *value, (convert::kind(spec.dtype), device))?)
            })
            .collect::<Result<Vec<_>>>()?;
        let mut inputs = vec![(self.card.sample.as_str(), &sample), (self.card.time.as_str(), &time)];
        inputs.extend(self.binding.conditions.iter().map(|(_, s)| s.name.as_str()).zip(conditions));
        inputs.extend(self.binding.constants.iter().map(|(s, _)| s.name.as_str()).zip(&constants));
        let (outputs, features) = self.network.forward_tapped(&inputs, taps)?;
        let (_, output) = outputs.into_iter().find(|(name, _)| *name == self.card.output).ok_or_else(|| {
            Error::usage(format!("the card names the output `{}`, which the graph does not have", self.card.output))
        })?;
        let output = match self.card.layout {
            Layout::Nchw => output,
            Layout::Nhwc => output.f_permute([0, 3, 1, 2])?,
        };
        let output = without_variance(output, self.card.shape[0])?.f_to_kind(Kind::Float)?;
        if output.size() != x.size() {
            return Err(Error::mismatch(format!(
                "output `{}` has shape {:?}, expected {:?} (in the order B, C, H, W)",
                self.card.output,
                output.size(),
                x.size()
            )));
        }
        let fresh = scaled(&output, coefficients, |c| c.out)?;
        if coefficients.iter().all(|c| c.skip == 0.0) {
            return Ok((fresh, features));
        }
        Ok((scaled(&x_net, coefficients, |c| c.skip)?.f_add(&fresh)?, features))
    }

    /// The time input in the graph's element type and rank.
    fn time(&self, coefficients: &[Coefficients], single: bool) -> Result<Tensor> {
        let spec = &self.binding.time;
        let count = if single { 1 } else { coefficients.len() };
        let times: Vec<f64> = coefficients[..count].iter().map(|c| c.time).collect();
        let tensor = Tensor::from_slice(&times);
        // Integer steps are rounded, not cut off.
        let tensor = if spec.dtype.is_float() { tensor } else { tensor.f_round()? };
        let mut shape = vec![1i64; spec.shape.len()];
        if let Some(lead) = shape.first_mut() {
            *lead = count as i64;
        }
        Ok(tensor.f_to_kind(convert::kind(spec.dtype))?.f_reshape(&shape)?)
    }
}

/// The prediction of `[B, C, H, W]`, or of `[B, 2 C, H, W]` with a learned variance behind it.
pub(crate) fn without_variance(output: Tensor, channels: usize) -> Result<Tensor> {
    match output.size().get(1) {
        Some(&n) if n == 2 * channels as i64 => Ok(output.f_narrow(1, 0, channels as i64)?),
        _ => Ok(output),
    }
}

/// `t` times one coefficient a row; where all are 1 it is `t` itself, bit for bit.
fn scaled(t: &Tensor, coefficients: &[Coefficients], pick: impl Fn(&Coefficients) -> f64) -> Result<Tensor> {
    let values: Vec<f64> = coefficients.iter().map(pick).collect();
    if values.iter().all(|v| *v == 1.0) {
        return Ok(t.shallow_clone());
    }
    if values.iter().all(|v| *v == values[0]) {
        return Ok(t.f_mul_scalar(values[0])?);
    }
    let values: Vec<f32> = values.iter().map(|v| *v as f32).collect();
    let column = send(&Tensor::from_slice(&values).f_view([values.len() as i64, 1, 1, 1])?, t.device())?;
    t.f_mul(&column).context("applying the conversion's coefficients")
}

#[cfg(test)]
#[path = "denoiser_tests.rs"]
mod tests;
