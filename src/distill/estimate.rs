//! What a run will take: memory and arithmetic, for this machine or one that is not at hand.
//!
//! Weights, gradients and optimiser states are counted. What a forward keeps for its backward pass is measured: the network
//! runs on the CPU with two small batches under a counting allocator, and the line through the two is drawn on. libtorch
//! keeps the same tensors on every device; what a device adds of its own (kernels, work space, fragmentation) is not in it,
//! nor what a discriminator (`gan`) adds.

use serde::Serialize;
use tch::{Device, Tensor};

use crate::diffusion::Denoiser;
use crate::distill::config::Config;
use crate::distill::draws::{Phase, Use};
use crate::distill::objective::objective;
use crate::distill::trainer::{Batches, denoising_loss};
use crate::error::{Error, Result};
use crate::torch::shim;
use crate::torch::training::{Compute, count_memory, counted_memory};

/// The larger of the two batches that are measured: at most so many images, and about so many bytes.
const MOST_IMAGES: usize = 32;
const MOST_BYTES: f64 = 1e9;

/// Memory of one stage, in bytes.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Stage {
    /// Copies of the network's weights.
    pub weights: u64,
    pub gradients: u64,
    /// AdamW's two moments.
    pub optimizer: u64,
    /// Inner values at the worst moment of a step, less what gradients take only later.
    pub activations: u64,
    pub total: u64,
    /// Forward passes of one image that an iteration is worth (a backward pass counts as two).
    pub passes: f64,
}

/// See the module's text.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Estimate {
    pub batch: usize,
    pub parameters: usize,
    pub degrade: Stage,
    pub backtrack: Stage,
}

/// One measured batch, in bytes.
#[derive(Debug, Clone, Copy, Default)]
struct Measured {
    /// Held between forward and backward.
    kept: f64,
    /// Highest during forward and backward, the network's gradients among it: they grow as inner values are let go.
    training: f64,
    /// Highest during a forward without a graph.
    forward: f64,
}

/// Estimates a run of this configuration. `teacher` must be on the CPU; it is not changed.
pub fn estimate(teacher: &Denoiser, config: &Config) -> Result<Estimate> {
    if teacher.params().tensors().iter().any(|t| t.device() != Device::Cpu) {
        return Err(Error::usage("an estimate is measured on the CPU"));
    }
    count_memory();
    let copy = teacher.copy()?;
    copy.params().set_requires_grad(true)?;
    let at = |batch: usize| -> Result<Measured> {
        // Cuts follow from sizes in proportion: the budget shrinks with the batch.
        let share = batch as f64 / config.batch as f64;
        let bytes = config.compute().activation_bytes as f64 * share;
        let compute = Compute { activation_bytes: bytes.ceil() as u64, ..config.compute() };
        copy.network().configure(compute);
        measure(&copy, &Config { batch, ..config.clone() })
    };
    let two = at(2)?;
    let high = ((2.0 * MOST_BYTES / two.training.max(1.0)) as usize).clamp(4, MOST_IMAGES);
    let measured = if config.batch <= high {
        at(config.batch)?
    } else {
        let low = high / 2;
        let (a, b) = (at(low)?, at(high)?);
        let line = |a: f64, b: f64| a + (b - a) / (high - low) as f64 * (config.batch as f64 - low as f64);
        Measured {
            kept: line(a.kept, b.kept),
            training: line(a.training, b.training),
            forward: line(a.forward, b.forward),
        }
    };
    teacher.network().configure(Compute::default());
    let weights = teacher.params().elements() as u64 * 4;
    let one = weights as f64;
    let stage = |sets: u64, trained: u64, highest: f64, passes: f64| {
        let activations = (highest - trained as f64 * one).max(0.0) as u64;
        let (weights, gradients, optimizer) = (sets * weights, trained * weights, 2 * trained * weights);
        Stage {
            weights,
            gradients,
            optimizer,
            activations,
            total: weights + gradients + optimizer + activations,
            passes,
        }
    };
    let objective = objective(config);
    let fake = u64::from(objective.needs_fake());
    let guided = if config.guidance != 1.0 { 2.0 } else { 1.0 };
    let scores = guided + fake as f64;
    // While the generator's graph is held, the scores are computed; then the fake score is trained.
    // Gradients of the micro-batches before this one stay; otherwise they go with the optimiser's step.
    let (others, all) = if config.accumulate > 1 { (fake as f64 * one, (1 + fake) as f64 * one) } else { (0.0, 0.0) };
    let generator = if objective.through_scores() {
        measured.kept * scores + measured.training + others
    } else {
        (measured.kept + guided * measured.forward + all).max(measured.training + others)
    };
    // The generator's gradients wait for its step.
    let fake_step = if fake > 0 { measured.training + one } else { 0.0 };
    let accumulate = config.accumulate as f64;
    let ratio = config.backtrack.ratio as f64;
    let scored = if objective.through_scores() { 3.0 * scores } else { scores };
    let passes = (3.0 + scored) / ratio + (ratio - 1.0) / ratio + 3.0 * fake as f64;
    Ok(Estimate {
        batch: config.batch,
        parameters: teacher.params().elements(),
        // Teacher, the initial student and the copy that degrades.
        degrade: stage(3, 1, measured.training.max(measured.forward), 4.0 * accumulate),
        // Teacher, target, student, its averages and the fake score.
        backtrack: stage(
            4 + config.ema.more.len() as u64 + fake,
            1 + fake,
            generator.max(fake_step),
            passes * accumulate,
        ),
    })
}

/// One step of stage 1 at this batch.
fn measure(copy: &Denoiser, config: &Config) -> Result<Measured> {
    let batches = Batches::new(config, copy)?;
    let draws = batches.draws(Phase::Degrade, 0, 0);
    let conditions = batches.conditions(&draws, copy)?;
    let x0 = batches.noise(&draws, Use::Latent)?;
    let noise = batches.noise(&draws, Use::FakeNoise)?;
    let sigmas = draws.sigmas(Use::FakeSigma, &batches.fake_levels, batches.batch);
    let loss = || -> Result<Tensor> { denoising_loss(copy, &x0, &sigmas, &noise, &conditions) };
    // The first run of a batch size works out the plan.
    loss()?.f_backward()?;
    let gradients = if config.accumulate > 1 {
        copy.params().elements() * 4
    } else {
        shim::drop_grads(copy.params().tensors())?;
        0
    };
    let start = counted_memory(true).current;
    let value = loss()?;
    let kept = counted_memory(false).current.saturating_sub(start);
    value.f_backward()?;
    drop(value);
    let training = counted_memory(false).peak.saturating_sub(start) + gradients as u64;
    let start = counted_memory(true).current;
    drop(tch::no_grad(loss)?);
    let forward = counted_memory(false).peak.saturating_sub(start);
    Ok(Measured { kept: kept as f64, training: training as f64, forward: forward as f64 })
}
