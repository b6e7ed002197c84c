//! A network with its card: `D(x; sigma, c)`, the estimate of x0 that every method here computes with.

use std::rc::Rc;
use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use crate::error::{Context, Error, Result};
use crate::torch::convert;
use crate::torch::{Forward, ParamSet};

use super::card::{InputSpec, TeacherCard};
use super::condition::Condition;
use super::conditions::{Conditions, HostConditions, check_guidance};
use super::conversion::{Coefficients, Conversion, StudentStart};
use super::guidance::{Guidance, check_weaker};
use super::prepared::{By, Calls, Form, Part, PreparedLevels, Strength, Wanted, nulls};
use super::sample_axes::{into_graph, out_of_graph};

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
    /// The weaker network that guides this one, see [`Denoiser::guided_by`].
    weaker: Option<Rc<Self>>,
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
        Ok(Self { network, card, conversion, binding: Arc::new(binding), weaker: None })
    }

    /// The same denoiser, guided by a weaker one from now on: autoguidance (Karras et al. 2024, arXiv 2406.02507),
    /// `D_weak + scale (D - D_weak)`, in the place of classifier-free guidance. Its copies are guided by the same network.
    ///
    /// Errors: a network of other samples, or with conditions that this one does not have.
    pub fn guided_by(self, weaker: Self) -> Result<Self> {
        check_weaker(&self.card, &weaker.card)?;
        Ok(Self { weaker: Some(Rc::new(weaker)), ..self })
    }

    /// The weaker network that guides this one, where there is one.
    pub fn weaker(&self) -> Option<&Self> {
        self.weaker.as_deref()
    }

    /// The network's trained weights.
    pub fn params(&self) -> &ParamSet {
        self.network.params()
    }
    /// The network.
    pub fn network(&self) -> &dyn Forward {
        &*self.network
    }
    /// The card that says how the network is read.
    pub fn card(&self) -> &Arc<TeacherCard> {
        &self.card
    }
    /// How the card's terms become coefficients, times and noise levels.
    pub fn conversion(&self) -> &Conversion {
        &self.conversion
    }

    /// The same network with its own parameters of equal values.
    pub fn copy(&self) -> Result<Self> {
        Ok(self.with(self.network.copy()?))
    }

    /// [`Forward::alias`].
    pub fn alias(&self) -> Option<Self> {
        self.network.alias().map(|network| self.with(network))
    }

    /// [`Forward::copy_narrow`].
    pub fn copy_narrow(&self) -> Result<Self> {
        Ok(self.with(self.network.copy_narrow()?))
    }

    fn with(&self, network: Box<dyn Forward>) -> Self {
        Self {
            network,
            card: self.card.clone(),
            conversion: self.conversion.clone(),
            binding: self.binding.clone(),
            weaker: self.weaker.clone(),
        }
    }

    /// Classes drawn uniformly for `batch` samples, on the CPU.
    pub fn sample_conditions(&self, rng: &mut impl rand_chacha::rand_core::Rng, batch: usize) -> Result<Conditions> {
        Conditions::from_host(&HostConditions::draw(&self.card, rng, batch)?, Device::Cpu)
    }

    /// `D(x; sigma, c)`: x0 estimated from `x_edm = x0 + sigma e`, `[B, ...shape]` f32, `sigma` one finite level a row.
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
        let prepared = self.prepare(sigma, Form::Short, x_edm.device())?;
        self.denoise_prepared(x_edm, &prepared, cond, taps)
    }

    /// Guidance, `D_u + scale (D_c - D_u)`. Classifier-free it is one batch of twice the size: conditions without a null
    /// value in the card stay as they are in `D_u`, and one at least must have one. Where there is a weaker network
    /// ([`Denoiser::guided_by`]), `D_u` is that, with its conditions. Where no row's noise level is guided it is
    /// [`Denoiser::denoise`].
    pub fn guided(
        &self,
        x_edm: &Tensor,
        sigma: &[f64],
        cond: &Conditions,
        guidance: impl Into<Guidance>,
    ) -> Result<Tensor> {
        let prepared = self.prepare_guided(sigma, guidance.into(), Form::Short, x_edm.device())?;
        Ok(self.denoise_prepared(x_edm, &prepared, cond, &[])?.0)
    }

    /// What an evaluation at these noise levels takes beside samples and conditions, on `device`.
    pub fn prepare(&self, sigma: &[f64], form: Form, device: Device) -> Result<PreparedLevels> {
        PreparedLevels::new(&self.coefficients(sigma)?, self.calls(), form, device)
    }

    /// [`Denoiser::prepare`] for an evaluation under guidance.
    pub fn prepare_guided(
        &self,
        sigma: &[f64],
        guidance: Guidance,
        form: Form,
        device: Device,
    ) -> Result<PreparedLevels> {
        let none = match form {
            Form::Short => sigma.iter().all(|s| guidance.at(*s) == 1.0),
            Form::Fixed => guidance.is_none(),
        };
        if none {
            return self.prepare(sigma, form, device);
        }
        self.check_guidance()?;
        guidance.check_rescale(&self.card)?;
        let coefficients = self.coefficients(sigma)?;
        let wanted = Wanted { rank: self.card.rank(), form, device, coefficients: &coefficients };
        let (mut prepared, by) = match &self.weaker {
            Some(weaker) => {
                let levels = weaker.prepare(sigma, form, device).context("the weaker network that guides")?;
                (self.prepare(sigma, form, device)?, By::Weaker(weaker.clone(), Box::new(levels)))
            }
            None => {
                let twice = self.prepare(&[sigma, sigma].concat(), form, device)?;
                (twice, By::Nulls(nulls(&self.binding.conditions, sigma.len(), device)?))
            }
        };
        prepared.guide(guidance, sigma, by, &wanted)?;
        Ok(prepared)
    }

    /// What [`Denoiser::generate`] takes beside noise and conditions.
    pub fn prepare_start(&self, rows: usize, start: &StudentStart, device: Device) -> Result<PreparedLevels> {
        let coefficients = vec![Coefficients { c_in: start.init_scale, ..start.coefficients }; rows];
        PreparedLevels::new(&coefficients, self.calls(), Form::Short, device)
    }

    /// The evaluation that was prepared, of `x_edm` `[B, ...shape]`; and the tensors of these names inside the network, first
    /// dimension the batch (none under guidance).
    pub fn denoise_prepared(
        &self,
        x_edm: &Tensor,
        prepared: &PreparedLevels,
        cond: &Conditions,
        taps: &[String],
    ) -> Result<(Tensor, Vec<Tensor>)> {
        self.check_batch(x_edm, cond, prepared.samples)?;
        let mut conditions = self.bind(cond, x_edm.device())?;
        let Some(guided) = &prepared.guided else {
            let (x0, features) = self.run(x_edm, prepared, &conditions, taps)?;
            let rows = prepared.samples as i64;
            return match features.iter().zip(taps).find(|(f, _)| f.size().first() != Some(&rows)) {
                None => Ok((x0, features)),
                Some((f, tap)) => Err(Error::usage(format!(
                    "the tensor `{tap}` has shape {:?}, expected a row for each of {rows} samples",
                    f.size()
                ))),
            };
        };
        let rows = prepared.samples as i64;
        let (with, without) = match &guided.by {
            By::Nulls(nulls) => {
                for (bound, null) in conditions.iter_mut().zip(nulls) {
                    let null = null.as_ref().unwrap_or(bound);
                    *bound = Tensor::f_cat(&[&*bound, null], 0)?;
                }
                let (both, _) = self.run(&Tensor::f_cat(&[x_edm, x_edm], 0)?, prepared, &conditions, &[])?;
                (both.f_narrow(0, 0, rows)?, both.f_narrow(0, rows, rows)?)
            }
            By::Weaker(weaker, levels) => {
                let (with, _) = self.run(x_edm, prepared, &conditions, &[])?;
                let without = weaker.denoise_prepared(x_edm, levels, cond, &[]);
                (with, without.context("the weaker network that guides")?.0)
            }
        };
        let difference = with.f_sub(&without)?;
        let made = match &guided.strength {
            Strength::Everywhere(scale) => without.f_add(&difference.f_mul_scalar(*scale)?)?,
            Strength::Extra(extra) => with.f_add(&difference.f_mul(extra)?)?,
        };
        let made = match &guided.rescale {
            None => made,
            Some(rescale) => rescale.apply(x_edm, &with, made)?,
        };
        Ok((made, Vec::new()))
    }

    /// An error unless there is something to guide by: a weaker network, or a null value in the card.
    pub fn check_guidance(&self) -> Result<()> {
        if self.weaker.is_some() { Ok(()) } else { check_guidance(&self.card) }
    }

    /// The one-step student: x0 from `z ~ N(0, I)`, `[B, ...shape]`: `x_net = init_scale z`, `x0 = skip x_net + out F`.
    pub fn generate(&self, z: &Tensor, cond: &Conditions, start: &StudentStart) -> Result<Tensor> {
        let rows = z.size().first().copied().unwrap_or(0) as usize;
        Ok(self.denoise_prepared(z, &self.prepare_start(rows, start, z.device())?, cond, &[])?.0)
    }

    /// The only number of rows that the network takes, where its file fixes one. Other numbers are evaluated in several calls.
    pub fn fixed_batch(&self) -> Option<usize> {
        self.binding.sample.shape.first().copied().flatten()
    }

    fn calls(&self) -> Calls<'_> {
        let rows = self.fixed_batch();
        Calls { rank: self.card.rank(), time: &self.binding.time, single: self.single(), rows }
    }

    /// Whether the network takes one time for the whole batch.
    fn single(&self) -> bool {
        match self.binding.time.shape.first() {
            None => true,
            Some(d) => *d == Some(1) && self.binding.sample.shape.first() != Some(&Some(1)),
        }
    }

    fn coefficients(&self, sigma: &[f64]) -> Result<Vec<Coefficients>> {
        sigma.iter().map(|s| self.conversion.at(*s)).collect()
    }

    fn check_batch(&self, x: &Tensor, cond: &Conditions, rows: usize) -> Result<()> {
        let expected = self.card.size_of(rows);
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
        prepared: &PreparedLevels,
        conditions: &[Tensor],
        taps: &[String],
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let Some(back) = &prepared.back else {
            let Some(part) = prepared.parts.first() else { return Ok((x.shallow_clone(), Vec::new())) };
            return self.run_together(x, part, conditions, taps);
        };
        let mut outputs = Vec::with_capacity(prepared.parts.len());
        for part in &prepared.parts {
            let of = |t: &Tensor| -> Result<Tensor> {
                Ok(match &part.rows {
                    Some(rows) => t.f_index_select(0, rows)?,
                    None => t.shallow_clone(),
                })
            };
            let conditions = conditions.iter().map(of).collect::<Result<Vec<_>>>()?;
            outputs.push(self.run_together(&of(x)?, part, &conditions, taps)?);
        }
        let join = |parts: Vec<&Tensor>| -> Result<Tensor> { Ok(Tensor::f_cat(&parts, 0)?.f_index_select(0, back)?) };
        let features = (0..taps.len()).map(|k| join(outputs.iter().map(|(_, f)| &f[k]).collect()));
        Ok((join(outputs.iter().map(|(t, _)| t).collect())?, features.collect::<Result<_>>()?))
    }

    fn run_together(
        &self,
        x: &Tensor,
        part: &Part,
        conditions: &[Tensor],
        taps: &[String],
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let device = x.device();
        let x_net = part.c_in.times(x)?;
        let wanted = into_graph(self.card.layout, &x_net)?;
        let sample = wanted.f_to_kind(convert::kind(self.binding.sample.dtype))?;
        let constants = self
            .binding
            .constants
            .iter()
            .map(|(spec, value)| {
                let shape: Vec<i64> = spec.shape.iter().map(|d| d.map_or(part.count, |d| d) as i64).collect();
                Ok(Tensor::f_full(&shape[..], *value, (convert::kind(spec.dtype), device))?)
            })
            .collect::<Result<Vec<_>>>()?;
        let mut inputs = vec![(self.card.sample.as_str(), &sample), (self.card.time.as_str(), &part.time)];
        inputs.extend(self.binding.conditions.iter().map(|(_, s)| s.name.as_str()).zip(conditions));
        inputs.extend(self.binding.constants.iter().map(|(s, _)| s.name.as_str()).zip(&constants));
        let (outputs, features) = self.network.forward_tapped(&inputs, taps)?;
        let (_, output) = outputs.into_iter().find(|(name, _)| *name == self.card.output).ok_or_else(|| {
            Error::usage(format!("the card names the output `{}`, which the graph does not have", self.card.output))
        })?;
        let output = self.card.without_variance(out_of_graph(self.card.layout, output)?)?.f_to_kind(Kind::Float)?;
        if output.size() != x.size() {
            return Err(Error::mismatch(format!(
                "output `{}` has shape {:?}, expected {:?} (in the order of the card's shape)",
                self.card.output,
                output.size(),
                x.size()
            )));
        }
        let fresh = part.out.times(&output)?;
        if part.skip.is_zero() {
            return Ok((fresh, features));
        }
        Ok((part.skip.times(&x_net)?.f_add(&fresh)?, features))
    }
}

#[cfg(test)]
#[path = "denoiser_tests.rs"]
mod tests;
