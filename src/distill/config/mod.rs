//! The configuration of a distillation: TOML, every key with a default and overridable as `key=value`, unknown keys
//! refused with the nearest known name, values checked before the first step.

mod check;
mod gan;
mod keys;
mod node_count;
#[cfg(test)]
mod reference;
mod sections;

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::diffusion::Guidance;
use crate::distill::objective::{Choice, Objective, ObjectiveKind, Settings};
use crate::error::{Context, Error, Kind, Result};
use crate::torch::Compute;
use crate::torch::train::lora::LoraOptions;
use crate::torch::train::optim::AdamWConfig;

pub use gan::{DataConfig, GanConfig, HeadKind};
pub use node_count::NodeCount;
pub use sections::{
    BacktrackConfig, ConditionsConfig, CooldownShape, DegradeConfig, DistributedConfig, Distribution, EmaConfig,
    EvaluateConfig, FakeDistribution, Init, LogConfig, LoraConfig, MemoryConfig, MemoryFormat, NoiseConfig,
    OptimizerConfig, Precision, Shard, Spacing, StudentConfig, Switch,
};

/// Everything that decides a run. Field order is the order of `config.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Seeds every random draw; each draw depends on (seed, stage, iteration, micro-batch) alone.
    pub seed: u64,
    /// `auto`, `cpu`, `cuda` or `cuda:<index>`.
    pub device: String,
    /// CPU threads of libtorch; 0: its own choice.
    pub threads: usize,
    /// TF32 for f32 matrix products and convolutions on CUDA.
    pub tf32: bool,
    /// Records the steps as CUDA graphs, launched with one call each: for networks so small that the host launches kernels
    /// more slowly than the device computes them. Costs the memory of a further step.
    pub cuda_graphs: bool,
    /// What convolutions and matrix products of all networks are computed in.
    pub precision: Precision,
    /// Images a forward pass.
    pub batch: usize,
    /// Forward passes an optimiser step; a step sees `batch * accumulate` images.
    pub accumulate: usize,
    /// What the generator minimises.
    pub objective: Choice,
    /// Guidance scale of the targets, `D_u + scale (D - D_u)`; 1: none. `D_u` is the target without its conditions (classifier-free
    /// guidance, Ho & Salimans 2022) or the network of `guidance_by`.
    pub guidance: f64,
    /// A weaker network (ONNX) that guides the teacher in the place of the teacher without conditions: autoguidance (Karras et al. 2024,
    /// arXiv 2406.02507), a smaller or less trained network of the same data; without conditions too it may be. Its card is in its
    /// metadata or in `<file>.card.toml` beside it. It guides the teacher alone, as the last target: what a trajectory's node is
    /// extrapolated from would be the node's own weaker self, which there is not, so nodes are targets without guidance. Empty: none.
    pub guidance_by: String,
    /// Share of the rescaling of guided outputs to the standard deviation that they have without guidance, 0 to 1 (Lin et al. 2023, arXiv
    /// 2305.08891; diffusers' `guidance_rescale`): against the bright and saturated samples of high scales. 0: none.
    pub guidance_rescale: f64,
    /// Noise levels between which (above the first, up to the second) the targets are guided.
    pub guidance_interval: [f64; 2],
    /// Trains a teacher whose output for one row depends on the other rows of the batch, which is refused otherwise.
    pub allow_batch_mixing: bool,
    /// Stops a run that diverges or whose student collapses; otherwise it is warned of alone.
    pub stop_on_divergence: bool,
    /// A run is said to diverge whose loss, or norm of its gradients, is this many times what it had been.
    pub divergence_factor: f64,
    /// A student is said to collapse whose samples have had more of the teacher's spread, and have fallen below this share of it.
    pub collapse_spread: f64,
    /// Values of the teacher card as `key=value`, as `--card` gives them; they win over the card's other sources.
    pub card: Vec<String>,
    /// Where the conditions of training come from.
    pub conditions: ConditionsConfig,
    /// The student's network, its first weights, and its steps.
    pub student: StudentConfig,
    /// Low-rank adaptation.
    pub lora: LoraConfig,
    /// Stage 1.
    pub degrade: DegradeConfig,
    /// Stage 2.
    pub backtrack: BacktrackConfig,
    /// Noise levels of training.
    pub noise: NoiseConfig,
    /// AdamW, for all networks.
    pub optimizer: OptimizerConfig,
    /// Averages of the student's weights.
    pub ema: EmaConfig,
    /// What the run writes while it goes on.
    pub log: LogConfig,
    /// What memory is spent on.
    pub memory: MemoryConfig,
    /// Several processes that share the run.
    pub distributed: DistributedConfig,
    /// Measurements while training.
    pub evaluate: EvaluateConfig,
    /// The objectives' own sections.
    #[serde(flatten)]
    pub settings: Settings,
    /// The diffusion GAN; there is none where `gan.data` is empty.
    pub gan: GanConfig,
    /// Data sets of real images.
    pub data: DataConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            seed: 0,
            device: "auto".into(),
            threads: 0,
            tf32: false,
            cuda_graphs: false,
            precision: Precision::F32,
            batch: 128,
            accumulate: 1,
            objective: ObjectiveKind::Dmd.into(),
            guidance: 1.0,
            guidance_by: String::new(),
            guidance_rescale: 0.0,
            guidance_interval: [0.0, f64::INFINITY],
            allow_batch_mixing: false,
            stop_on_divergence: false,
            divergence_factor: 100.0,
            collapse_spread: 0.1,
            card: Vec::new(),
            conditions: ConditionsConfig::default(),
            student: StudentConfig::default(),
            lora: LoraConfig::default(),
            degrade: DegradeConfig::default(),
            backtrack: BacktrackConfig::default(),
            noise: NoiseConfig::default(),
            optimizer: OptimizerConfig::default(),
            ema: EmaConfig::default(),
            log: LogConfig::default(),
            memory: MemoryConfig::default(),
            distributed: DistributedConfig::default(),
            evaluate: EvaluateConfig::default(),
            settings: Settings::default(),
            gan: GanConfig::default(),
            data: DataConfig::default(),
        }
    }
}

/// The names that Rust has for numbers, for people.
fn in_words(text: &str) -> String {
    ["usize", "u64"]
        .iter()
        .fold(text.to_owned(), |t, name| t.replace(&format!("expected {name}"), "expected a whole number of 0 or more"))
}

impl Config {
    /// Defaults, then the file, then `key=value` pairs in order; checked.
    pub fn resolve(file: Option<&Path>, sets: &[String]) -> Result<Self> {
        Self::resolve_with(file, sets, None)
    }

    /// [`Config::resolve`] with a caller's own objective, which wins over the file's.
    pub fn resolve_with(file: Option<&Path>, sets: &[String], objective: Option<Arc<dyn Objective>>) -> Result<Self> {
        let mut config = Self::read(file, sets)?;
        if let Some(own) = objective {
            config.objective = Choice::Given(own);
        }
        config.validate()?;
        Ok(config)
    }

    /// The configuration of a run that is there. Its objective may be one that its caller handed in, of which there is the name
    /// alone.
    pub fn of_run(file: &Path) -> Result<Self> {
        let config = Self::read(Some(file), &[])?;
        config.validate_values()?;
        Ok(config)
    }

    /// Whether the file or the settings give this key, as in `batch` or `degrade.nodes`; otherwise its default holds.
    pub fn gives(file: Option<&Path>, sets: &[String], key: &str) -> Result<bool> {
        let table = Value::Table(Self::table(file, sets)?);
        Ok(key.split('.').try_fold(&table, |inner, part| inner.get(part)).is_some())
    }

    /// A resolved configuration from [`Config::to_toml`]'s text, with the caller's own objective where there is one.
    pub fn from_toml(text: &str, objective: Option<Arc<dyn Objective>>) -> Result<Self> {
        let mut config: Self = toml::from_str(text)
            .map_err(|e| Error::usage(format!("configuration: {}", in_words(e.to_string().trim_end()))))?;
        if let Some(own) = objective {
            config.objective = Choice::Given(own);
        }
        Ok(config)
    }

    /// The settings of a configuration file as `key=value`, to be given after those of another file, which they win over.
    ///
    /// Errors: a file that is not there, no TOML, keys that there are not.
    pub fn sets_of(file: &Path) -> Result<Vec<String>> {
        Ok(keys::leaves(&Self::file(file)?).into_iter().map(|(key, value)| format!("{key}={value}")).collect())
    }

    fn file(path: &Path) -> Result<Table> {
        let shown = || path.display().to_string();
        if !path.exists() {
            return Err(Error::usage("no such configuration file").context(shown()));
        }
        let text = crate::files::read_text(path, crate::files::SETTINGS).with_context(shown)?;
        let table: Table = toml::from_str(&text)
            .map_err(|e| Error::of_text(Kind::Usage, &format!("not TOML: {e}")))
            .with_context(shown)?;
        keys::check(&table).with_context(shown)?;
        Ok(table)
    }

    fn table(file: Option<&Path>, sets: &[String]) -> Result<Table> {
        let mut table = match file {
            None => Table::new(),
            Some(path) => Self::file(path)?,
        };
        for set in sets {
            keys::apply(&mut table, set).with_context(|| format!("--set {set}"))?;
        }
        Ok(table)
    }

    fn read(file: Option<&Path>, sets: &[String]) -> Result<Self> {
        let table = Self::table(file, sets)?;
        let refused = |e: toml::de::Error| {
            Error::of_text(Kind::Usage, &format!("configuration: {}", in_words(e.to_string().trim_end())))
        };
        // (A flattened part's errors do not say which key is wrong; read by itself, they do.)
        let _: Settings = Value::Table(table.clone()).try_into().map_err(refused)?;
        Value::Table(table).try_into().map_err(refused)
    }

    /// Whether a fake score is trained beside the student.
    pub fn has_fake(&self) -> bool {
        self.built_objective().map_or(true, |objective| objective.needs_fake())
    }

    /// What the generator minimises.
    ///
    /// Errors: a name that is none of this crate's objectives.
    pub fn built_objective(&self) -> Result<Arc<dyn Objective>> {
        self.objective.build(&self.settings)
    }

    /// The resolved configuration as TOML text that [`Config::resolve`] reads back unchanged.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Error::usage(format!("configuration: {e}")))
    }

    /// Keys with different values, as `(key, here, there)`.
    pub fn differences(&self, other: &Self) -> Result<Vec<(String, String, String)>> {
        let mine = keys::leaves(&keys::as_table(self)?);
        let theirs = keys::leaves(&keys::as_table(other)?);
        Ok(mine
            .into_iter()
            .zip(theirs)
            .filter(|(a, b)| a.1 != b.1)
            .map(|(a, b)| (a.0, a.1.to_string(), b.1.to_string()))
            .collect())
    }

    /// The configured guidance of the targets.
    pub fn target_guidance(&self) -> Result<Guidance> {
        Guidance::new(self.guidance, self.guidance_interval)?.rescaled(self.guidance_rescale)
    }

    /// The network that guides the teacher, where there is one.
    pub fn weaker(&self) -> Option<&Path> {
        Some(Path::new(&self.guidance_by)).filter(|path| !path.as_os_str().is_empty())
    }

    /// AdamW settings with this learning rate, and these betas where they are given.
    pub fn adamw(&self, lr: f64, betas: &[f64]) -> AdamWConfig {
        let o = &self.optimizer;
        AdamWConfig {
            lr,
            beta1: betas.first().copied().unwrap_or(o.beta1),
            beta2: betas.get(1).copied().unwrap_or(o.beta2),
            eps: o.eps,
            weight_decay: o.weight_decay,
            clip: o.clip,
            warmup: o.warmup,
        }
    }

    /// How the trained networks compute.
    pub fn compute(&self) -> Compute {
        let activation_bytes = self.memory.activations_mib << 20;
        Compute { bf16: self.precision == Precision::Bf16, activation_bytes }
    }

    /// How the target computes.
    pub fn target_compute(&self) -> Compute {
        Compute { bf16: self.precision == Precision::Bf16 || self.memory.target == Precision::Bf16, ..self.compute() }
    }

    /// Whether the target's weights of convolutions and matrix products are bf16 in memory.
    pub fn narrow_target(&self) -> bool {
        self.memory.nodes == Precision::Bf16 && self.target_compute().bf16
    }

    /// Whether filters, and so images, have their channels last in memory on this device.
    pub fn channels_last(&self, device: tch::Device) -> bool {
        match self.memory.format {
            MemoryFormat::ChannelsLast => true,
            MemoryFormat::Contiguous => false,
            // The kernels for the CPU give images in that order, and tensor cores read it.
            MemoryFormat::Auto => device == tch::Device::Cpu || self.precision == Precision::Bf16,
        }
    }

    /// What to be told before a run that ends before the teacher itself is the target.
    pub fn too_short(&self) -> Option<String> {
        let NodeCount::Count(nodes) = self.degrade.nodes else { return None };
        let (nodes, b) = (nodes as u64, &self.backtrack);
        let spent = nodes.saturating_sub(1).saturating_mul(b.switch_every);
        (b.switch == Switch::Count && nodes > 0 && spent >= b.updates).then(|| {
            format!(
                "{} generator updates end before the teacher itself is the target: {} nodes of {} updates each come first \
                 (backtrack.switch_every)",
                b.updates,
                nodes - 1,
                b.switch_every
            )
        })
    }

    /// Whether a micro-batch's gradients are completed before they are added to those before it: on the CPU, where a micro-batch may
    /// have several backward passes through one network (the discriminator's, recomputed segments).
    pub fn sums_apart(&self, device: tch::Device) -> bool {
        let several = !self.gan.data.is_empty() || self.memory.activations_mib > 0;
        device == tch::Device::Cpu && self.accumulate > 1 && several
    }

    /// Learning rate of the fake score.
    pub fn fake_lr(&self) -> f64 {
        let b = &self.backtrack;
        if b.lr_fake > 0.0 { b.lr_fake } else { 2.0 * b.lr_generator }
    }

    /// Learning rate of stage 1.
    pub fn degrade_lr(&self) -> f64 {
        if self.degrade.lr > 0.0 { self.degrade.lr } else { 2.0 * self.backtrack.lr_generator }
    }

    /// Low-rank adaptation, where it is asked for.
    pub fn lora(&self) -> Option<LoraOptions> {
        let LoraConfig { rank, alpha, include } = self.lora.clone();
        let alpha = if alpha == 0.0 { rank as f64 } else { alpha };
        (rank > 0).then_some(LoraOptions { rank, alpha, include, seed: self.seed })
    }

    /// Images of one optimiser step.
    pub fn images(&self) -> u64 {
        (self.batch * self.accumulate) as u64
    }
}

#[cfg(test)]
mod tests;
