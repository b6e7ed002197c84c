//! The sections of the configuration, with their defaults.

use serde::{Deserialize, Serialize};

use super::NodeCount;

/// Where on stage 1's course the nodes of the trajectory lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Spacing {
    /// At equal distances in iterations.
    Iteration,
    /// At equal ratios of iterations: most nodes early, where the copy changes fastest.
    LogIteration,
    /// At equal distances in the loss on the initial student's samples (chosen afterwards from four times as many).
    Loss,
}

/// When stage 2 goes on to the next target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Switch {
    /// After `switch_every` generator updates each.
    Count,
    /// When the score mismatch to the target has stopped falling.
    Mismatch,
}

/// How a learning rate falls at the end of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CooldownShape {
    /// In proportion to the updates that are left.
    Linear,
    /// Along half a cosine.
    Cosine,
}

/// What convolutions and matrix products are computed in. Weights, their averages and the optimiser's states are f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floats.
    #[default]
    F32,
    /// bfloat16.
    Bf16,
}

/// The order of filters and images in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryFormat {
    /// Channels last on the CPU, and on CUDA where `precision` is `bf16`.
    #[default]
    Auto,
    /// Channels last (NHWC) everywhere.
    ChannelsLast,
    /// Channels first (NCHW), as in ONNX.
    Contiguous,
}

/// What memory is spent on, and how it is laid out.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryConfig {
    /// MiB of intermediate values that the forward pass of one network may keep for its backward pass; what goes beyond
    /// is computed again there. 0: everything is kept.
    pub activations_mib: u64,
    /// Precision of the target's forward pass, which most objectives do not differentiate through; `bf16` also where
    /// `precision` is `f32`.
    pub target: Precision,
    /// Precision of the trajectory's nodes. `bf16`: on disk as differences from the teacher in bf16, and where the
    /// target computes in bf16 (`target` or `precision`), its convolutions' and matrix products' weights are bf16 in
    /// memory too, the teacher's among them, which changes nothing of what is computed.
    pub nodes: Precision,
    /// Order of filters and images in memory.
    pub format: MemoryFormat,
}

/// What each of several processes keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shard {
    /// Everything.
    #[default]
    None,
    /// A share of the optimisers' moments and of the student's averages.
    Optimizer,
}

/// Several processes that share a run.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DistributedConfig {
    /// What each process keeps: `none` (everything), or `optimizer`: a share of the moments of AdamW and of the student's averages, by
    /// whole tensors (the first stage of ZeRO, Rajbhandari et al. 2020). The same bytes come out; a step costs somewhat more time.
    pub shard: Shard,
}

impl DistributedConfig {
    /// Whether each process keeps a share of moments and averages.
    pub fn shares_states(&self) -> bool {
        self.shard == Shard::Optimizer
    }
}

/// How noise levels are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Distribution {
    /// Uniform over entries of the schedule's table of noise levels.
    Table,
    /// `ln sigma ~ N(log_mean, log_std^2)`, within the schedule's range.
    Lognormal,
}

/// How the noise levels of the fake score's training are drawn in stage 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FakeDistribution {
    /// As `noise.distribution` says.
    Same,
    /// Uniform over entries of the table, whatever `noise.distribution` is.
    Table,
    /// Log-normal with `noise.log_mean` and `noise.log_std`, whatever `noise.distribution` is.
    Lognormal,
}

/// Where the conditions of training come from.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ConditionsConfig {
    /// A .safetensors or .npz file with one array a condition, rows drawn at random; empty: classes are drawn.
    pub file: String,
    /// How often each class is drawn, one number a class in any scale; empty: all alike.
    pub weights: Vec<f64>,
}

/// The student's weights at the beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Init {
    /// The weights of its file: the teacher's, or those of `student.file`.
    #[default]
    Given,
    /// Fresh weights drawn from `seed`, layer by layer.
    Random,
}

/// The student's network, its first weights, and its steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StudentConfig {
    /// ONNX file of the student's network; empty: the teacher's own. A network with a card is evaluated at `sigma_init` and
    /// `sigmas` as the teacher's copy would be; any other takes noise and the teacher's conditions.
    pub file: String,
    /// Where its first weights come from.
    pub init: Init,
    /// Input of `file` that takes the noise; empty: found by name and shape.
    pub noise: String,
    /// Output of `file` that is the sample; empty: found by name and shape.
    pub output: String,
    /// Inputs of `file` for the teacher's conditions, each `condition=input`; those left out are found by name and shape.
    pub conditions: Vec<String>,
    /// Noise level at which the network becomes the generator; 0: where the schedule starts (EDM sigma_max, the
    /// last step of a VP table, t = 1 of a flow).
    pub sigma_init: f64,
    /// Noise levels of the steps after the first, falling; empty: a one-step student, or `steps`.
    pub sigmas: Vec<f64>,
    /// Steps of the student on a grid, in the place of `sigmas`: of a flow even times, shifted by `shift`; entries of a VP table at equal
    /// distances from its end; of EDM the first of so many Karras levels and `sigma_min`. The
    /// first step is at `sigma_init` where that is given, and the others must lie below it. 0: what `sigmas` says.
    pub steps: usize,
    /// Time shift of the grid of a flow, `t' = shift t / (1 + (shift - 1) t)` (Esser et al. 2024, arXiv 2403.03206, equation 23): above 1
    /// more of the steps are noisy ones. 0: the card's.
    pub shift: f64,
    /// Whether fresh noise is added before each of these steps (as in DMD2); otherwise the noise that the step before
    /// has found in its sample is added again (as in DDIM).
    pub stochastic: bool,
}

/// Low-rank adaptation of student, degraded copy and fake score; trajectory nodes are then factors too.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraConfig {
    /// Rank of the change to each weight; 0: all weights are trained.
    pub rank: usize,
    /// The change is multiplied by `alpha / rank`; 0: alpha is the rank.
    pub alpha: f64,
    /// Globs over the names of Conv, Gemm and MatMul weights.
    pub include: Vec<String>,
}

/// Stage 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DegradeConfig {
    /// Nodes beside the teacher (N); 0: no trajectory, the base method. `"auto"`: how long stage 1 is, how many nodes there are, where they
    /// lie and how long each is the target is decided by what stage 1 measures (`docs/settings.md`).
    pub nodes: NodeCount,
    /// Training steps of the degrading copy (at most, where `patience` is set or `nodes` is `"auto"`).
    pub steps: u64,
    /// Learning rate of stage 1; 0: twice `backtrack.lr_generator`. At a quarter of the generator's rate the copy
    /// hardly learns the student's samples.
    pub lr: f64,
    /// AdamW's beta1 and beta2 of stage 1; empty: the optimiser's.
    pub betas: Vec<f64>,
    /// Where on the course of stage 1 the nodes lie.
    pub spacing: Spacing,
    /// Stop when the loss on the initial student's samples has not fallen by 1 % for this many steps; 0: never.
    pub patience: u64,
}

/// Stage 2.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct BacktrackConfig {
    /// Generator updates.
    pub updates: u64,
    /// Fake-score steps a generator update.
    pub ratio: u64,
    /// Learning rate of the generator.
    pub lr_generator: f64,
    /// Learning rate of the fake score; 0: twice `lr_generator`.
    pub lr_fake: f64,
    /// AdamW's beta1 and beta2 of the generator; empty: the optimiser's.
    pub betas_generator: Vec<f64>,
    /// AdamW's beta1 and beta2 of the fake score and of a discriminator's head; empty: the optimiser's.
    pub betas_fake: Vec<f64>,
    /// Share of the updates, at the end, over which the learning rates fall to 0; 0: none.
    pub cooldown: f64,
    /// `cooldown` of the fake score; below 0: the same as `cooldown`.
    pub cooldown_fake: f64,
    /// How the learning rates fall.
    pub cooldown_shape: CooldownShape,
    /// When stage 2 goes on to the next target.
    pub switch: Switch,
    /// Generator updates a target (`switch = "count"`; not read where `degrade.nodes` is `"auto"`, whose plan says it), or between two measurements of the mismatch (`"mismatch"`).
    pub switch_every: u64,
    /// Measurements without a lower mismatch before a switch (`switch = "mismatch"`).
    pub switch_patience: u64,
    /// Generator updates a target at most (`switch = "mismatch"`).
    pub switch_max: u64,
}

/// Noise levels of training. Entries of the table are counted from 0.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NoiseConfig {
    /// Entries of the schedule's table of noise levels, rising (EDM: Karras; VP: its own steps; flow: even times, shifted).
    pub levels: usize,
    /// Time shift of the table of a flow, `t' = shift t / (1 + (shift - 1) t)` (Esser et al. 2024, arXiv 2403.03206, equation 23): above 1
    /// more of the levels are noisy ones. The table is that of all networks and of the discriminator. 0: the card's.
    pub shift: f64,
    /// First and last entry drawn where target and fake score are compared.
    pub generator: [usize; 2],
    /// First and last entry drawn for the fake score's training, and for stage 1.
    pub fake: [usize; 2],
    /// How noise levels are drawn.
    pub distribution: Distribution,
    /// How the noise levels of the fake score are drawn in stage 2. Stage 1 always uses `distribution`: its nodes must
    /// know every level that is compared later.
    pub fake_distribution: FakeDistribution,
    /// Mean of `ln sigma` (`distribution = "lognormal"`).
    pub log_mean: f64,
    /// Standard deviation of `ln sigma` (`distribution = "lognormal"`).
    pub log_std: f64,
}

/// AdamW, the same for all three networks but for the learning rate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct OptimizerConfig {
    /// AdamW's beta1. 0 keeps the two-player game of stage 2 from oscillating; 0.9 is the usual value elsewhere.
    pub beta1: f64,
    /// AdamW's beta2.
    pub beta2: f64,
    /// AdamW's epsilon, added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay; each step it is multiplied by the learning rate.
    pub weight_decay: f64,
    /// Largest global gradient norm; 0: no clipping.
    pub clip: f64,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// A run stops after this many steps in a row whose gradient was not finite.
    pub max_skips: u64,
}

/// Exponential moving averages of the student's weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EmaConfig {
    /// Half-life in images of the average that is exported; 0: no averaging.
    pub half_life: f64,
    /// Half-lives of further averages, saved as `student-ema-<half-life>.safetensors` for `disback export --weights`.
    pub more: Vec<f64>,
    /// The half-life is at most this share of the images seen; 0: no ramp-up.
    pub ramp: f64,
}

/// What a run writes while it goes on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LogConfig {
    /// Iterations between two rows of `metrics.jsonl`.
    pub every: u64,
    /// Images of a sample grid; 0: no grids.
    pub samples: usize,
    /// Heun steps of the teacher's and its degraded copies' samples.
    pub sample_steps: usize,
    /// Time shift of these steps where the teacher is a flow; 0: the card's.
    pub sample_shift: f64,
    /// ONNX decoder of latents for the sample grids and all measures, run on latents divided by the card's `latent_scale`; empty: none.
    pub decoder: String,
    /// Iterations between two checkpoints; 0: only where the run stops.
    pub checkpoint_every: u64,
    /// Checkpoints that are kept, 2 or more: one that cannot be read falls back to the one before.
    pub keep: usize,
    /// Generator updates between two students kept in `snapshots/`, averaged and not; 0: none.
    pub snapshot_every: u64,
    /// Rows of metrics between two lines of `levels.jsonl`, the losses of target and fake score by noise level, which are also looked at where
    /// a target is new and at the end; 0: none at all.
    pub levels: u64,
}

/// Measures while training, see [`crate::eval::in_loop`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EvaluateConfig {
    /// Reference images or statistics; empty: nothing is measured.
    pub reference: String,
    /// ONNX feature network; empty: the sliced Wasserstein distance, which needs none.
    pub features: String,
    /// Images of stage 2 between two measurements.
    pub every: u64,
    /// Images of the averaged student in a measurement: few, always from the same noise.
    pub images: usize,
    /// Measurements without a new lowest distance after which stage 2 ends; 0: it never ends early.
    pub patience: u64,
}

impl StudentConfig {
    /// Steps after the first.
    pub fn further_steps(&self) -> usize {
        if self.steps > 0 { self.steps - 1 } else { self.sigmas.len() }
    }
}

impl Default for EvaluateConfig {
    fn default() -> Self {
        Self { reference: String::new(), features: String::new(), every: 100_000, images: 1000, patience: 0 }
    }
}

impl Default for StudentConfig {
    fn default() -> Self {
        Self {
            file: String::new(),
            init: Init::Given,
            noise: String::new(),
            output: String::new(),
            conditions: Vec::new(),
            sigma_init: 0.0,
            sigmas: Vec::new(),
            steps: 0,
            shift: 0.0,
            stochastic: true,
        }
    }
}
impl Default for LoraConfig {
    fn default() -> Self {
        Self { rank: 0, alpha: 0.0, include: vec!["*".into()] }
    }
}
impl Default for DegradeConfig {
    fn default() -> Self {
        Self {
            nodes: NodeCount::Count(3),
            steps: 400,
            lr: 0.0,
            betas: Vec::new(),
            spacing: Spacing::LogIteration,
            patience: 0,
        }
    }
}
impl Default for BacktrackConfig {
    fn default() -> Self {
        Self {
            updates: 10_000,
            ratio: 1,
            lr_generator: 1e-5,
            lr_fake: 1e-5,
            betas_generator: Vec::new(),
            betas_fake: Vec::new(),
            cooldown: 0.3333,
            cooldown_fake: -1.0,
            cooldown_shape: CooldownShape::Linear,
            switch: Switch::Count,
            switch_every: 100,
            switch_patience: 3,
            switch_max: 1000,
        }
    }
}
impl Default for NoiseConfig {
    fn default() -> Self {
        Self {
            levels: 1000,
            shift: 0.0,
            generator: [20, 980],
            fake: [0, 999],
            distribution: Distribution::Table,
            fake_distribution: FakeDistribution::Same,
            log_mean: -1.2,
            log_std: 1.2,
        }
    }
}
impl Default for OptimizerConfig {
    fn default() -> Self {
        Self { beta1: 0.0, beta2: 0.99, eps: 1e-8, weight_decay: 0.01, clip: 10.0, warmup: 100, max_skips: 20 }
    }
}
impl Default for EmaConfig {
    fn default() -> Self {
        Self { half_life: 500_000.0, more: Vec::new(), ramp: 0.2 }
    }
}
impl Default for LogConfig {
    fn default() -> Self {
        Self {
            every: 10,
            samples: 64,
            sample_steps: 18,
            sample_shift: 0.0,
            decoder: String::new(),
            checkpoint_every: 500,
            keep: 2,
            snapshot_every: 0,
            levels: 10,
        }
    }
}
