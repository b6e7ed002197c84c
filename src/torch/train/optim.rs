//! AdamW whose state is named tensors, with warm-up, clipping and the NaN policy on the device: a step synchronises
//! nothing with the host.

use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::torch::dist::{Named, Owners, Reducer, World};
use crate::torch::params::ParamSet;
use crate::torch::shim;

/// Settings of [`AdamW`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Learning rate after warm-up.
    pub lr: f64,
    /// Decay of the mean of the gradients, 0 to 1.
    pub beta1: f64,
    /// Decay of the mean of the squared gradients, 0 to 1.
    pub beta2: f64,
    /// Added to the square root in the denominator, against division by 0.
    pub eps: f64,
    /// Decoupled: parameters shrink by `lr * weight_decay` a step.
    pub weight_decay: f64,
    /// Largest global gradient norm; longer gradients are scaled down to it. 0: no clipping.
    pub clip: f64,
    /// Steps of linear warm-up: step k (from 1) uses `lr * min(1, k / warmup)`.
    pub warmup: u64,
}

/// AdamW (Loshchilov & Hutter) over one parameter set.
///
/// A step whose gradient norm is not finite changes nothing but the counter of skipped steps.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    names: Arc<[String]>,
    params: Vec<Tensor>,
    exp_avg: Vec<Tensor>,
    exp_avg_sq: Vec<Tensor>,
    /// Steps taken, skipped ones not counted (f32, rank 0; exact up to 2^24).
    step: Tensor,
    skipped: Tensor,
    skipped_in_a_row: Tensor,
    /// Calls of [`AdamW::step`], for the warm-up: known on the host without asking the device.
    calls: u64,
    norm: Tensor,
    /// Sums the gradients of micro-batches, where autograd does not do so by itself.
    reducer: Option<Reducer>,
    /// Which process has the moments of a parameter and steps it, where not every one does.
    owners: Option<Owners>,
}

impl AdamW {
    /// Fresh state for `params`, whose tensors it shares: they are updated in place.
    ///
    /// Errors: weights in half precision, whose small steps would be lost.
    pub fn new(params: &ParamSet, config: AdamWConfig) -> Result<Self> {
        if let Some((name, t)) = params.iter().find(|(_, t)| matches!(t.kind(), Kind::BFloat16 | Kind::Half)) {
            return Err(Error::mismatch(format!("the trained weight `{name}` is {:?}, expected f32", t.kind())));
        }
        let device = params.tensors().first().map_or(Device::Cpu, Tensor::device);
        let zeros = || params.tensors().iter().map(|t| Ok(t.detach().f_zeros_like()?)).collect::<Result<Vec<_>>>();
        let scalar = || Tensor::f_zeros([0i64; 0], (Kind::Float, device));
        Ok(Self {
            config,
            names: params.names().into(),
            params: params.tensors().iter().map(Tensor::shallow_clone).collect(),
            exp_avg: zeros()?,
            exp_avg_sq: zeros()?,
            step: scalar()?,
            skipped: scalar()?,
            skipped_in_a_row: scalar()?,
            calls: 0,
            norm: scalar()?,
            reducer: None,
            owners: None,
        })
    }

    /// Takes the gradients of all processes of `world` from now on. `apart`: a micro-batch's gradients are completed before they are
    /// added to those before it, also in a world of one process: where a micro-batch has several backward passes, the sum would
    /// otherwise have other bits than that of several processes. Costs the memory of the gradients once more. `sharded`: each
    /// process keeps the moments of a share of the parameters, steps those, and hands out their new values.
    pub fn share(&mut self, world: &World, apart: bool, sharded: bool) -> Result<()> {
        if self.params.is_empty() {
            return Ok(());
        }
        if sharded && !world.is_alone() {
            let owners = Owners::new(world, &self.params);
            owners.let_go(&self.exp_avg)?;
            owners.let_go(&self.exp_avg_sq)?;
            self.owners = Some(owners);
        }
        if !world.is_alone() || apart {
            self.reducer = Some(Reducer::new(world, &self.params, self.owners.as_ref().map(Owners::ranks))?);
        }
        Ok(())
    }

    /// Who keeps what, where each process keeps a share.
    pub fn owners(&self) -> Option<&Owners> {
        self.owners.as_ref()
    }

    /// A round of micro-batches is done, one of each of the first `rows` processes.
    pub fn round(&mut self, rows: usize) -> Result<()> {
        self.reducer.as_mut().map_or(Ok(()), |reducer| reducer.round(rows))
    }

    /// The learning rate that the next step uses under `scale`.
    pub fn lr(&self, scale: f64) -> f64 {
        match self.config.warmup {
            0 => self.config.lr * scale,
            w => self.config.lr * scale * ((self.calls + 1) as f64 / w as f64).min(1.0),
        }
    }

    /// Updates the parameters from their gradients with `lr_scale` times the learning rate, then lets the gradients go.
    /// Parameters that no gradient has reached stay as they are.
    pub fn step(&mut self, lr_scale: f64) -> Result<()> {
        if self.params.is_empty() {
            return Ok(());
        }
        let everywhere = self.reducer.as_mut().map(Reducer::finish).transpose()?;
        let grads = shim::grads(&self.params)?;
        // Of those that this process steps.
        let reached: Vec<usize> = (0..grads.len()).filter(|&i| grads[i].is_some()).collect();
        let grads: Vec<Tensor> = grads.into_iter().flatten().collect();
        let any = everywhere.as_ref().map_or(!grads.is_empty(), |all| all.contains(&true));
        if !any {
            return Err(Error::backend("no gradient has reached any parameter"));
        }
        let norm = match (&self.owners, &everywhere, &self.reducer) {
            (Some(_), Some(all), Some(reducer)) => {
                tch::no_grad(|| shared_norm(reducer.world(), all, &reached, &grads, self.step.device()))?
            }
            _ => shim::global_norm(&grads)?,
        };
        let pick = |list: &[Tensor]| reached.iter().map(|&i| list[i].shallow_clone()).collect::<Vec<_>>();
        let c = self.config;
        tch::no_grad(|| -> Result<()> {
            self.norm = norm;
            let found_inf = self.norm.f_isfinite()?.f_logical_not()?.f_to_kind(Kind::Float)?;
            let scale = if c.clip > 0.0 {
                self.norm.f_div_scalar(c.clip)?.f_clamp_min(1.0)?
            } else {
                self.norm.f_ones_like()?
            };
            let _ = self.step.f_add_(&found_inf.f_neg()?.f_add_scalar(1.0)?)?;
            let _ = self.skipped.f_add_(&found_inf)?;
            self.skipped_in_a_row = self.skipped_in_a_row.f_add_scalar(1.0)?.f_mul(&found_inf)?;
            let numbers = shim::AdamWStep {
                lr: self.lr(lr_scale),
                beta1: c.beta1,
                beta2: c.beta2,
                weight_decay: c.weight_decay,
                eps: c.eps,
            };
            if !grads.is_empty() {
                let moments = [pick(&self.exp_avg), pick(&self.exp_avg_sq)];
                let [m, v] = &moments;
                shim::fused_adamw(&pick(&self.params), &grads, m, v, &self.step, numbers, &scale, &found_inf)?;
            }
            drop(grads);
            match &mut self.reducer {
                None => shim::drop_grads(&self.params),
                Some(reducer) => reducer.let_go(),
            }
        })?;
        if let (Some(_), Some(reducer)) = (&self.owners, &mut self.reducer) {
            reducer.hand_out()?;
        }
        self.calls += 1;
        Ok(())
    }

    /// Norm of the last step's gradient before clipping (f32, rank 0, on the device).
    pub fn grad_norm(&self) -> &Tensor {
        &self.norm
    }

    /// Steps skipped for a gradient that was not finite (f32, rank 0, on the device): in all, and in a row until now.
    pub fn skipped(&self) -> (&Tensor, &Tensor) {
        (&self.skipped, &self.skipped_in_a_row)
    }

    /// The whole state as named tensors under `prefix`.
    pub fn state(&self, prefix: &str) -> Vec<Named> {
        let mut out = Vec::with_capacity(2 * self.params.len() + 4);
        let owners = self.owners.as_ref();
        for (i, name) in self.names.iter().enumerate() {
            out.push(Named::owned(format!("{prefix}m/{name}"), &self.exp_avg[i], owners, i));
            out.push(Named::owned(format!("{prefix}v/{name}"), &self.exp_avg_sq[i], owners, i));
        }
        out.push(Named::new(format!("{prefix}step"), &self.step));
        out.push(Named::new(format!("{prefix}skipped"), &self.skipped));
        out.push(Named::new(format!("{prefix}skipped_in_a_row"), &self.skipped_in_a_row));
        out.push(Named::new(format!("{prefix}calls"), &Tensor::from(self.calls as f32)));
        out
    }

    /// Restores what [`AdamW::state`] gave. `take` hands out a tensor by its full name; one that is missing or has
    /// another shape is an error.
    pub fn restore(&mut self, prefix: &str, take: &mut dyn FnMut(&str) -> Result<Tensor>) -> Result<()> {
        tch::no_grad(|| {
            for (i, name) in self.names.iter().enumerate() {
                let mine = self.owners.as_ref().is_none_or(|owners| owners.is_mine(i));
                copy_exact(&mut self.exp_avg[i], &format!("{prefix}m/{name}"), take, mine)?;
                copy_exact(&mut self.exp_avg_sq[i], &format!("{prefix}v/{name}"), take, mine)?;
            }
            copy_exact(&mut self.step, &format!("{prefix}step"), take, true)?;
            copy_exact(&mut self.skipped, &format!("{prefix}skipped"), take, true)?;
            copy_exact(&mut self.skipped_in_a_row, &format!("{prefix}skipped_in_a_row"), take, true)?;
            self.calls = take(&format!("{prefix}calls"))?.f_double_value(&[])? as u64;
            Ok(())
        })
    }
}

/// Norm of the gradients of all processes, each of which has those of the parameters that it steps. `everywhere`: which parameters a
/// gradient has reached; `reached`: those of `grads`. The bits are those of one process that has them all.
fn shared_norm(
    world: &World,
    everywhere: &[bool],
    reached: &[usize],
    grads: &[Tensor],
    device: Device,
) -> Result<Tensor> {
    let all: Vec<usize> = (0..everywhere.len()).filter(|&i| everywhere[i]).collect();
    let mut norms = Tensor::f_zeros([all.len() as i64], (Kind::Float, device))?;
    if !grads.is_empty() {
        let places: Vec<i64> = reached.iter().filter_map(|i| all.binary_search(i).ok()).map(|at| at as i64).collect();
        let places = Tensor::from_slice(&places).f_to_device(device)?;
        let _ = norms.f_index_copy_(0, &places, &shim::norms(grads)?)?;
    }
    // (All but one of the processes add 0.)
    let sum = world.gather(&norms)?.f_sum_dim_intlist(Some([0i64].as_slice()), false, Kind::Float)?;
    Ok(sum.f_linalg_norm(2.0, None::<&[i64]>, false, None)?)
}

/// `take` gives the values; they are another process's where `kept` is false.
fn copy_exact(mine: &mut Tensor, name: &str, take: &mut dyn FnMut(&str) -> Result<Tensor>, kept: bool) -> Result<()> {
    let theirs = take(name)?;
    if theirs.size() != mine.size() {
        return Err(Error::mismatch(format!(
            "optimiser state `{name}` has shape {:?}, expected {:?}",
            theirs.size(),
            mine.size()
        )));
    }
    if kept {
        mine.f_copy_(&theirs)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: AdamWConfig =
        AdamWConfig { lr: 0.01, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1, clip: 0.0, warmup: 0 };

    fn set(values: &[f32]) -> ParamSet {
        // Two tensors, one of them large enough for the kernel's vector loop.
        let a = Tensor::from_slice(values);
        let b = Tensor::from_slice(values).repeat([37]).reshape([37, values.len() as i64]);
        let set = ParamSet::new(vec!["a".into(), "b".into()], vec![a, b]).unwrap();
        set.set_requires_grad(true).unwrap();
        set
    }

    /// Gradient of `0.5 * c * p^2`, summed: c * p.
    fn backward(p: &ParamSet, c: f64) {
        let loss: Tensor = p.tensors().iter().map(|t| (t * t).sum(Kind::Float) * (0.5 * c)).sum();
        loss.backward();
    }

    /// The textbook step, one parameter at a time in f64.
    fn reference(
        mut p: f64,
        grads: impl Fn(u32, f64) -> f64,
        lr: impl Fn(u32) -> f64,
        steps: u32,
        c: AdamWConfig,
    ) -> f64 {
        let (mut m, mut v) = (0.0, 0.0);
        for k in 1..=steps {
            let g = grads(k, p);
            p -= lr(k) * c.weight_decay * p;
            m = c.beta1 * m + (1.0 - c.beta1) * g;
            v = c.beta2 * v + (1.0 - c.beta2) * g * g;
            let (mh, vh) = (m / (1.0 - c.beta1.powi(k as i32)), v / (1.0 - c.beta2.powi(k as i32)));
            p -= lr(k) * mh / (vh.sqrt() + c.eps);
        }
        p
    }

    #[test]
    fn matches_the_textbook_with_decay_bias_correction_and_warmup() {
        let start = [0.5f32, -1.25, 3.0, 0.001, -0.2];
        for warmup in [0, 4] {
            let config = AdamWConfig { warmup, ..CONFIG };
            let params = set(&start);
            let mut adam = AdamW::new(&params, config).unwrap();
            for _ in 0..7 {
                backward(&params, 1.7);
                adam.step(1.0).unwrap();
            }
            let lr = |k: u32| if warmup == 0 { 0.01 } else { 0.01 * (f64::from(k) / warmup as f64).min(1.0) };
            for (i, &p) in start.iter().enumerate() {
                let expected = reference(f64::from(p), |_, p| 1.7 * p, lr, 7, config);
                for got in
                    [params.tensors()[0].double_value(&[i as i64]), params.tensors()[1].double_value(&[30, i as i64])]
                {
                    assert!((got - expected).abs() < 1e-6, "{got} for {expected}");
                }
            }
        }
    }

    #[test]
    fn the_scale_is_of_the_learning_rate() {
        let params = set(&[0.7]);
        let mut adam = AdamW::new(&params, CONFIG).unwrap();
        for k in 1..4 {
            backward(&params, 1.0);
            adam.step(0.5 / f64::from(k)).unwrap();
        }
        let expected = reference(f64::from(0.7f32), |_, p| p, |k| 0.01 * 0.5 / f64::from(k), 3, CONFIG);
        assert!((params.tensors()[0].double_value(&[0]) - expected).abs() < 1e-6);
    }

    #[test]
    fn clips_by_the_global_norm() {
        let config = AdamWConfig { clip: 0.5, eps: 0.3, ..CONFIG };
        let params = ParamSet::new(vec!["a".into(), "b".into()], vec![Tensor::from(3f32), Tensor::from(4f32)]).unwrap();
        params.set_requires_grad(true).unwrap();
        let mut adam = AdamW::new(&params, config).unwrap();
        backward(&params, 2.0); // gradient (6, 8), norm 10, scaled to (0.3, 0.4)
        adam.step(1.0).unwrap();
        assert_eq!(adam.grad_norm().double_value(&[]), 10.0);
        for (t, p, g) in [(0, 3.0, 0.3), (1, 4.0, 0.4)] {
            let expected = reference(p, |_, _| g, |_| 0.01, 1, config);
            assert!((params.tensors()[t].double_value(&[]) - expected).abs() < 1e-6);
        }
    }

    #[test]
    fn skips_and_counts_a_step_that_is_not_finite() {
        let params = set(&[1.0, 2.0]);
        let mut adam = AdamW::new(&params, AdamWConfig { clip: 10.0, ..CONFIG }).unwrap();
        backward(&params, 1.0);
        adam.step(1.0).unwrap();
        let before = params.hash().unwrap();
        let (m, v) = (adam.exp_avg[0].copy(), adam.exp_avg_sq[0].copy());
        for bad in [f64::NAN, f64::INFINITY] {
            backward(&params, bad);
            adam.step(1.0).unwrap();
        }
        assert_eq!(params.hash().unwrap(), before);
        assert!(adam.exp_avg[0].equal(&m) && adam.exp_avg_sq[0].equal(&v));
        let counts = |a: &AdamW| (a.skipped().0.double_value(&[]), a.skipped().1.double_value(&[]));
        assert_eq!(counts(&adam), (2.0, 2.0));
        backward(&params, 1.0);
        adam.step(1.0).unwrap();
        assert_eq!(counts(&adam), (2.0, 0.0));
        assert_ne!(params.hash().unwrap(), before);
        assert_eq!(adam.step.double_value(&[]), 2.0, "skipped steps do not count for the bias correction");
    }

    #[test]
    fn state_survives_and_a_surplus_shape_is_refused() {
        let run = |steps: &[usize]| {
            let params = set(&[1.0, -2.0, 0.3]);
            let mut adam = AdamW::new(&params, AdamWConfig { warmup: 5, ..CONFIG }).unwrap();
            for (part, &n) in steps.iter().enumerate() {
                if part > 0 {
                    let state = adam.state("g/");
                    adam = AdamW::new(&params, AdamWConfig { warmup: 5, ..CONFIG }).unwrap();
                    let mut take = |name: &str| {
                        let found = state.iter().find(|n| n.name == name).expect("named");
                        Ok(found.tensor.copy())
                    };
                    adam.restore("g/", &mut take).unwrap();
                }
                for _ in 0..n {
                    backward(&params, 0.8);
                    adam.step(1.0).unwrap();
                }
            }
            params.hash().unwrap()
        };
        assert_eq!(run(&[9]), run(&[4, 5]));
        let params = set(&[1.0]);
        let mut adam = AdamW::new(&params, CONFIG).unwrap();
        let e = adam.restore("", &mut |_| Ok(Tensor::zeros([3], (Kind::Float, Device::Cpu)))).unwrap_err();
        assert!(e.to_string().contains("[3]"), "{e}");
    }
}
