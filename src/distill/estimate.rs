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
use crate::torch::dist::{BUCKET, largest_share};
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
    /// The same of the weaker network that guides (`guidance_by`), while the teacher is the target.
    pub guide_passes: f64,
}

/// Memory and arithmetic of a run, both stages, of each of its processes.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Estimate {
    /// Processes that share the run.
    pub world: usize,
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
    /// Highest during forward and backward beside whole gradients that were there before.
    beside: f64,
    /// Highest during a forward without a graph.
    forward: f64,
}

/// Bytes of the target's weights: the teacher's trained ones, some of them in bf16 where `memory.nodes` says so.
fn target_bytes(teacher: &Denoiser, config: &Config) -> u64 {
    let params = teacher.params();
    let whole = 4 * params.elements() as u64;
    if !config.narrow_target() {
        return whole;
    }
    let kernels = params.tensors().iter().zip(teacher.network().kernels()).filter(|(_, kernel)| *kernel);
    whole - kernels.map(|(t, _)| 2 * t.numel() as u64).sum::<u64>()
}

/// How one network's gradients and states are spread over the processes of a run, in bytes.
#[derive(Debug, Clone, Copy)]
struct Spread {
    /// Gradients of the network.
    whole: f64,
    /// Share of the moments and averages that a process keeps.
    kept: f64,
    /// What is sent and received of a round while the next micro-batch is computed.
    in_flight: f64,
    /// The sum over rounds, of what this process sums.
    sum: f64,
    /// The most that a round's exchange takes by itself, the gradients among it; and the end of an update.
    round: f64,
    finish: f64,
}

impl Spread {
    /// `sizes`: elements of each trained tensor. `exchanged`: the gradients of each micro-batch are taken from the network and sent.
    fn new(sizes: &[usize], world: usize, exchanged: bool, config: &Config) -> Self {
        let elements: usize = sizes.iter().sum();
        let whole = 4.0 * elements as f64;
        let shared = world > 1 && config.distributed.shares_states();
        let kept = if shared { largest_share(sizes, world) as f64 / elements.max(1) as f64 } else { 1.0 };
        if !exchanged {
            return Self { whole, kept, in_flight: 0.0, sum: 0.0, round: 0.0, finish: 0.0 };
        }
        match shared {
            // Two buckets at a time; each is sent and received.
            true => {
                let passing = whole.min(2.0 * BUCKET as f64);
                let sum = kept * whole;
                Self { whole, kept, in_flight: 0.0, sum, round: whole + passing, finish: sum.max(passing) }
            }
            // (gloo gathers into memory of its own first.)
            false => {
                let sum = whole / world as f64;
                Self { whole, kept, in_flight: 2.0 * whole, sum, round: 2.0 * whole, finish: sum + 2.0 * whole }
            }
        }
    }

    /// The most of an exchange, beside the sum of the rounds before it.
    fn exchange(&self, rounds: usize) -> f64 {
        self.round + if rounds > 1 { self.sum } else { 0.0 }
    }

    /// Held beside a micro-batch of the last of `rounds`, of the rounds before it.
    fn behind(&self, rounds: usize) -> f64 {
        let settled = if self.in_flight > 0.0 { rounds > 2 } else { rounds > 1 };
        let under_way = if rounds > 1 { self.in_flight } else { 0.0 };
        under_way + if settled { self.sum } else { 0.0 }
    }
}

/// Estimates a run of this configuration that `world` processes share: what each of them takes. `teacher` must be on the CPU and
/// `student`, where it is not the teacher's copy, too; neither is changed. (Where moments and averages are shared out, rank 0 holds whole
/// averages as long as it looks at them.)
pub fn estimate(teacher: &Denoiser, student: Option<&Student>, config: &Config, world: usize) -> Result<Estimate> {
    let rounds = config.accumulate.div_ceil(world.max(1));
    // (On the CPU several processes take the gradients of each micro-batch from the networks; on CUDA devices they add up there.)
    let exchanged = world > 1 && !config.device.starts_with("cuda");
    let own_rounds = if exchanged { 1 } else { rounds };
    let measured_with = Config { accumulate: own_rounds, ..config.clone() };
    estimate_of(teacher, student, &measured_with, (world.max(1), rounds, exchanged))
}

fn estimate_of(
    teacher: &Denoiser,
    student: Option<&Student>,
    config: &Config,
    (world, rounds, exchanged): (usize, usize, bool),
) -> Result<Estimate> {
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
    let guide = match teacher.weaker() {
        None => Measured::default(),
        Some(weaker) => {
            let found = drawn_on(config, weaker.network(), &|at| measure_guide(weaker, teacher, at))?;
            weaker.network().configure(Compute::default());
            found
        }
    };
    // (It lies there from the beginning.)
    let guide_bytes = teacher.weaker().map_or(0, |w| 4 * w.params().elements() as u64);
    let trained = 4 * teacher.params().elements() as u64;
    let target = target_bytes(teacher, config);
    let frozen = teacher.network().frozen();
    let own = match student {
        None => trained,
        Some(student) => 4 * student.params().elements() as u64,
    };
    // The weights that a student's file came with stay as they are.
    let given = if student.is_some() { own } else { 0 };
    let sizes = |params: &ParamSet| params.tensors().iter().map(Tensor::numel).collect::<Vec<_>>();
    let of_teacher = Spread::new(&sizes(teacher.params()), world, exchanged, config);
    let of_student = match student {
        None => of_teacher,
        Some(student) => Spread::new(&sizes(student.params()), world, exchanged, config),
    };
    let objective = config.built_objective()?;
    let fake = u64::from(objective.needs_fake());
    let stage =
        |weights: u64, spreads: &[Spread], highest: f64, passes: f64, student_passes: f64, guide_passes: f64| {
            let gradients = spreads.iter().map(|s| s.whole).sum::<f64>().min(highest) as u64;
            let optimizer = spreads.iter().map(|s| 2.0 * s.kept * s.whole).sum::<f64>() as u64;
            let activations = (highest - gradients as f64).max(0.0) as u64;
            let weights = weights + frozen + given + guide_bytes;
            let total = weights + gradients + optimizer + activations;
            StageCost { weights, gradients, optimizer, activations, total, passes, student_passes, guide_passes }
        };
    let ratio = config.backtrack.ratio as f64;
    let weaker = teacher.weaker().is_some();
    let guided = if config.guidance != 1.0 && !weaker { 2.0 } else { 1.0 };
    let scores = guided + fake as f64;
    let scored = if objective.through_scores() { 3.0 * scores } else { scores };
    let (passes, student_passes) = (scored / ratio + 3.0 * fake as f64, 3.0 / ratio + (ratio - 1.0) / ratio);
    let guide_passes = f64::from(u8::from(weaker)) * if objective.through_scores() { 3.0 } else { 1.0 } / ratio;
    let averages = (1 + config.ema.more.len()) as f64 * of_student.kept;
    let highest = Highest { net, made, guide, config, fake, guided, scores, exchanged, rounds };
    let spreads = if fake > 0 { vec![of_student, of_teacher] } else { vec![of_student] };
    let in_degrade = (net.training.max(net.forward).max(made.forward) + of_teacher.behind(rounds))
        .max(of_teacher.exchange(rounds))
        .max(of_teacher.finish);
    let through_scores = objective.through_scores();
    let in_backtrack = highest
        .generator(through_scores, of_teacher, of_student)
        .max(highest.fake_step(of_teacher, of_student))
        .max(highest.update(of_teacher, of_student));
    let each = rounds as f64;
    Ok(Estimate {
        world,
        batch: config.batch,
        parameters: teacher.params().elements(),
        student_parameters: own as usize / 4,
        // Teacher, the initial student and the copy that degrades.
        degrade: stage(2 * trained + own, &[of_teacher], in_degrade, 3.0 * each, each, 0.0),
        // The target, which is the teacher's own network, and the fake score; the student and its averages.
        backtrack: stage(
            fake * trained + target + own + (averages * own as f64) as u64,
            &spreads,
            in_backtrack,
            passes * each,
            student_passes * each,
            guide_passes * each,
        ),
    })
}

/// What stage 2 holds at most beside weights and moments.
struct Highest<'a> {
    net: Measured,
    made: Measured,
    /// Of the weaker network that guides; nothing where there is none.
    guide: Measured,
    config: &'a Config,
    fake: u64,
    guided: f64,
    scores: f64,
    /// Whether gradients of each micro-batch go to other processes, and how many micro-batches a process has.
    exchanged: bool,
    rounds: usize,
}

impl Highest<'_> {
    /// While the generator's graph is held, the scores are computed. Gradients of the micro-batches before this one stay; otherwise
    /// they go with the optimiser's step.
    fn generator(&self, through_scores: bool, of_fake: Spread, of_student: Spread) -> f64 {
        let Self { net, made, guide, fake, guided, scores, rounds, .. } = self;
        let (fake, one) = (*fake as f64, of_fake.whole);
        let (others, all) =
            if self.config.accumulate > 1 { (fake * one, of_student.whole + fake * one) } else { (0.0, 0.0) };
        let computed = if through_scores {
            // The scores' backward comes first, while the generator's inner values are still held.
            let inner = (net.training - net.kept - one).max(0.0);
            net.kept * scores + guide.kept + made.training.max(made.kept + inner) + others
        } else {
            (made.kept + (guided * net.forward).max(guide.forward) + all).max(made.training + others)
        };
        let behind = fake * of_fake.behind(*rounds);
        (computed + of_student.behind(*rounds)).max(of_student.exchange(*rounds)) + behind
    }

    /// Then the fake score is trained, and the generator's gradients wait for its step or are on their way.
    fn fake_step(&self, of_fake: Spread, of_student: Spread) -> f64 {
        if self.fake == 0 {
            return 0.0;
        }
        let sums = if self.rounds > 1 || of_student.in_flight == 0.0 { of_student.sum } else { 0.0 };
        let sent = if self.exchanged { of_student.in_flight + sums } else { of_student.whole };
        (self.net.training + of_fake.behind(self.rounds)).max(of_fake.exchange(self.rounds)) + sent
    }

    /// Last the sums are put together, the generator's first.
    fn update(&self, of_fake: Spread, of_student: Spread) -> f64 {
        let waits = if self.fake > 0 { of_fake.in_flight.max(of_fake.sum) } else { 0.0 };
        of_student.finish + waits
    }
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
    let beside = line(a.beside, b.beside);
    Ok(Measured {
        kept: line(a.kept, b.kept),
        // (Few images' highest may be their gradients, which say nothing of many images' inner values.)
        training: line(a.training, b.training).max(beside),
        beside,
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

/// The weaker network that guides the target, at this batch.
fn measure_guide(weaker: &Denoiser, teacher: &Denoiser, config: &Config) -> Result<Measured> {
    let batches = Batches::new(config, teacher)?;
    let draws = batches.draws(Phase::Backtrack, 0, 0);
    let conditions = batches.conditions(&draws, teacher)?;
    let x = batches.noise(&draws, Purpose::Latent)?.set_requires_grad(true);
    let sigmas = draws.sigmas(Purpose::GeneratorSigma, &batches.generator_levels, batches.batch);
    let gradient = batches.noise(&draws, Purpose::GeneratorNoise)?;
    let loss = || surrogate(&weaker.denoise(&x, &sigmas, &conditions)?, &gradient);
    counted(weaker.params(), &Config { accumulate: 1, ..config.clone() }, &loss)
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
    let pass = || -> Result<(f64, f64)> {
        let start = counted_memory(true).current;
        let value = loss()?;
        let kept = counted_memory(false).current.saturating_sub(start);
        value.f_backward()?;
        drop(value);
        Ok((kept as f64, counted_memory(false).peak.saturating_sub(start) as f64))
    };
    let (kept, beside) = pass()?;
    let sum = if config.accumulate > 1 { 4.0 * params.elements() as f64 } else { 0.0 };
    // Where the sum is kept apart, this micro-batch has gradients of its own.
    let training = if config.accumulate == 1 || config.sums_apart(Device::Cpu) {
        shim::drop_grads(params.tensors())?;
        pass()?.1 + sum
    } else {
        beside + sum
    };
    let start = counted_memory(true).current;
    drop(tch::no_grad(loss)?);
    let forward = counted_memory(false).peak.saturating_sub(start) as f64;
    Ok(Measured { kept, training, beside, forward })
}
