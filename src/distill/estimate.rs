//! What a run will take: memory and arithmetic, for this machine or one that is not at hand.
//!
//! Weights, gradients and optimiser states are counted. What a forward keeps for its backward pass is measured: the network
//! runs on the CPU with two small batches under a counting allocator, and the line through the two is drawn on. Its large
//! tensors are hollow ([`Hollow`]): neither memory nor much time is needed for a network that this
//! machine could not train.
//! libtorch keeps the same tensors on every device; what a device adds of its own (kernels, work space, fragmentation) is not
//! in it, nor what a discriminator (`gan`) adds.

use serde::Serialize;
use tch::{Device, Tensor};

use crate::diffusion::Denoiser;
use crate::distill::batches::Batches;
use crate::distill::config::{Config, Precision};
use crate::distill::draws::{Phase, Purpose};
use crate::distill::inputs::denoising_loss;
use crate::distill::job::lay_out;
use crate::distill::objective::surrogate;
use crate::distill::student::Student;
use crate::error::{Error, Result};
use crate::torch::training::{Compute, Hollow, counted_memory};
use crate::torch::{Forward, ParamSet, shim};

/// The larger of the two batches that are measured: at most so many images, and about so many bytes.
const MOST_IMAGES: usize = 32;
const MOST_BYTES: f64 = 1e9;

/// Memory of one stage in bytes, and its arithmetic in forward passes.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct StageCost {
    /// Copies of the networks' weights.
    pub weights: u64,
    /// Gradients of the trained weights.
    pub gradients: u64,
    /// AdamW's two moments.
    pub optimizer: u64,
    /// Intermediate values when a step needs most memory, without what `gradients` already counts.
    pub activations: u64,
    /// Sum of the above.
    pub total: u64,
    /// Forward passes of the teacher's network that one iteration costs for each image of a micro-batch (a backward
    /// pass counts as two).
    pub passes: f64,
    /// The same of the student's network.
    pub student_passes: f64,
}

/// Memory and arithmetic of a run, both stages.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Estimate {
    /// Images a forward pass.
    pub batch: usize,
    /// Trained numbers of the teacher's network; with low-rank adaptation those of the factors alone.
    pub parameters: usize,
    /// Trained numbers of the student's network.
    pub student_parameters: usize,
    /// Cost of stage 1.
    pub degrade: StageCost,
    /// Cost of stage 2.
    pub backtrack: StageCost,
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

/// Bytes of the target's weights: the teacher's trained ones, some of them in bf16 where `memory.nodes` says so.
pub fn target_bytes(teacher: &Denoiser, config: &Config) -> u64 {
    let params = teacher.params();
    let whole = 4 * params.elements() as u64;
    if !config.narrow_target() {
        return whole;
    }
    let kernels = params.tensors().iter().zip(teacher.network().kernels()).filter(|(_, kernel)| *kernel);
    whole - kernels.map(|(t, _)| 2 * t.numel() as u64).sum::<u64>()
}

/// Estimates a run of this configuration. `teacher` must be on the CPU and `student`, where it is not the teacher's copy, too;
/// neither is changed.
pub fn estimate(teacher: &Denoiser, student: Option<&Student>, config: &Config) -> Result<Estimate> {
    let networks = [Some(teacher.network()), student.map(Student::network)];
    let tensors = networks.iter().flatten().flat_map(|n| n.params().tensors());
    if tensors.into_iter().any(|t| t.device() != Device::Cpu) {
        return Err(Error::usage("an estimate is measured on the CPU"));
    }
    let _hollow = Hollow::new(config.precision == Precision::Bf16);
    let copy = teacher.copy()?;
    lay_out(config, copy.params())?;
    copy.params().set_requires_grad(true)?;
    let net = drawn_on(config, copy.network(), &|at| measure(&copy, at))?;
    teacher.network().configure(Compute::default());
    drop(copy);
    let made = match student {
        None => net,
        Some(student) => {
            let copy = student.copy()?;
            lay_out(config, copy.params())?;
            copy.params().set_requires_grad(true)?;
            let made = drawn_on(config, copy.network(), &|at| measure_student(&copy, teacher, at))?;
            student.network().configure(Compute::default());
            made
        }
    };
    let trained = 4 * teacher.params().elements() as u64;
    let target = target_bytes(teacher, config);
    let frozen = teacher.network().frozen();
    let own = match student {
        None => trained,
        Some(student) => 4 * student.params().elements() as u64,
    };
    // The weights that a student's file came with stay as they are.
    let given = if student.is_some() { own } else { 0 };
    let stage = |weights: u64, gradients: u64, highest: f64, passes: f64, student_passes: f64| {
        let activations = (highest - gradients as f64).max(0.0) as u64;
        let (weights, optimizer) = (weights + frozen + given, 2 * gradients);
        let total = weights + gradients + optimizer + activations;
        StageCost { weights, gradients, optimizer, activations, total, passes, student_passes }
    };
    let objective = config.built_objective()?;
    let fake = u64::from(objective.needs_fake());
    let guided = if config.guidance != 1.0 { 2.0 } else { 1.0 };
    let scores = guided + fake as f64;
    let (one, of_student) = (trained as f64, own as f64);
    // While the generator's graph is held, the scores are computed; then the fake score is trained.
    // Gradients of the micro-batches before this one stay; otherwise they go with the optimiser's step.
    let (others, all) =
        if config.accumulate > 1 { (fake as f64 * one, of_student + fake as f64 * one) } else { (0.0, 0.0) };
    let generator = if objective.through_scores() {
        // The scores' backward comes first, while the generator's inner values are still held.
        let inner = (net.training - net.kept - one).max(0.0);
        net.kept * scores + made.training.max(made.kept + inner) + others
    } else {
        (made.kept + guided * net.forward + all).max(made.training + others)
    };
    // The generator's gradients wait for its step.
    let fake_step = if fake > 0 { net.training + of_student } else { 0.0 };
    let accumulate = config.accumulate as f64;
    let ratio = config.backtrack.ratio as f64;
    let scored = if objective.through_scores() { 3.0 * scores } else { scores };
    let passes = scored / ratio + 3.0 * fake as f64;
    let student_passes = 3.0 / ratio + (ratio - 1.0) / ratio;
    let averages = 1 + config.ema.more.len() as u64;
    Ok(Estimate {
        batch: config.batch,
        parameters: teacher.params().elements(),
        student_parameters: own as usize / 4,
        // Teacher, the initial student and the copy that degrades.
        degrade: stage(
            2 * trained + own,
            trained,
            net.training.max(net.forward).max(made.forward),
            3.0 * accumulate,
            accumulate,
        ),
        // Teacher, target and fake score; the student and its averages.
        backtrack: stage(
            (1 + fake) * trained + target + (1 + averages) * own,
            fake * trained + own,
            generator.max(fake_step),
            passes * accumulate,
            student_passes * accumulate,
        ),
    })
}

/// What `measure` finds at the configured batch: measured there, or on the line through two small batches.
fn drawn_on(config: &Config, network: &dyn Forward, measure: &dyn Fn(&Config) -> Result<Measured>) -> Result<Measured> {
    let at = |batch: usize| -> Result<Measured> {
        // Cuts follow from sizes in proportion: the budget shrinks with the batch.
        let share = batch as f64 / config.batch as f64;
        let bytes = config.compute().activation_bytes as f64 * share;
        network.configure(Compute { activation_bytes: bytes.ceil() as u64, ..config.compute() });
        measure(&Config { batch, ..config.clone() })
    };
    if config.batch <= 2 {
        return at(config.batch);
    }
    let two = at(2)?;
    let high = ((2.0 * MOST_BYTES / two.training.max(1.0)) as usize).clamp(4, MOST_IMAGES);
    if config.batch <= high {
        return at(config.batch);
    }
    let low = high / 2;
    let (a, b) = (if low == 2 { two } else { at(low)? }, at(high)?);
    let line = |a: f64, b: f64| a + (b - a) / (high - low) as f64 * (config.batch as f64 - low as f64);
    Ok(Measured {
        kept: line(a.kept, b.kept),
        training: line(a.training, b.training),
        forward: line(a.forward, b.forward),
    })
}

/// One step of stage 1 at this batch.
fn measure(copy: &Denoiser, config: &Config) -> Result<Measured> {
    let batches = Batches::new(config, copy)?;
    let draws = batches.draws(Phase::Degrade, 0, 0);
    let conditions = batches.conditions(&draws, copy)?;
    let x0 = batches.noise(&draws, Purpose::Latent)?;
    let noise = batches.noise(&draws, Purpose::FakeNoise)?;
    let sigmas = draws.sigmas(Purpose::FakeSigma, &batches.fake_levels, batches.batch);
    let loss = || -> Result<Tensor> { denoising_loss(copy, &x0, &sigmas, &noise, &conditions) };
    counted(copy.params(), config, &loss)
}

/// One step of the student at this batch, on a gradient of its images.
fn measure_student(copy: &Student, teacher: &Denoiser, config: &Config) -> Result<Measured> {
    let batches = Batches::new(config, teacher)?;
    let draws = batches.draws(Phase::Backtrack, 0, 0);
    let conditions = batches.conditions(&draws, teacher)?;
    let z = batches.latent(&draws, copy)?;
    let gradient = batches.noise(&draws, Purpose::GeneratorNoise)?;
    let loss = || surrogate(&copy.training_images(&draws, &z, &conditions)?, &gradient);
    counted(copy.params(), config, &loss)
}

/// What the forward and backward of `loss` take.
fn counted(params: &ParamSet, config: &Config, loss: &dyn Fn() -> Result<Tensor>) -> Result<Measured> {
    // The first run of a batch size works out the plan.
    loss()?.f_backward()?;
    let gradients = if config.accumulate > 1 { params.elements() * 4 } else { 0 };
    // Where the sum is kept apart, this micro-batch has gradients of its own.
    if config.accumulate == 1 || config.sums_apart(Device::Cpu) {
        shim::drop_grads(params.tensors())?;
    }
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
