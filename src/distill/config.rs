//! The configuration of a distillation: TOML, every key with a default and overridable as `key=value`, unknown keys
//! refused with the nearest known name, values checked before the first step.

use std::path::Path;

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::error::{Context, Error, Result};

/// The score-distillation objective of the generator (method: section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ObjectiveKind {
    /// `g = D_fake - D_target`: the KL gradient, weighted by sigma^2 in score units.
    DiffInstruct,
    /// The same over `mean |x - D_target|` of each sample.
    Dmd,
}

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

/// How noise levels are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Distribution {
    /// Uniform over entries of the schedule's table of noise levels.
    Table,
    /// `ln sigma ~ N(log_mean, log_std^2)`, within the schedule's range.
    Lognormal,
}

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
    /// Images a forward pass.
    pub batch: usize,
    /// Forward passes an optimiser step; a step sees `batch * accumulate` images.
    pub accumulate: usize,
    pub objective: ObjectiveKind,
    /// Classifier-free guidance scale of the targets; 1: none.
    pub guidance: f64,
    pub student: StudentConfig,
    pub degrade: DegradeConfig,
    pub backtrack: BacktrackConfig,
    pub noise: NoiseConfig,
    pub optimizer: OptimizerConfig,
    pub ema: EmaConfig,
    pub log: LogConfig,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StudentConfig {
    /// Noise level at which the teacher's copy becomes the generator; 0: where the schedule starts (EDM sigma_max, the
    /// last step of a VP table, t = 1 of a flow).
    pub sigma_init: f64,
}

/// Stage 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DegradeConfig {
    /// Nodes beside the teacher (N); 0: no trajectory, the base method.
    pub nodes: usize,
    /// Training steps of the degrading copy (at most, where `patience` is set).
    pub steps: u64,
    pub lr: f64,
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
    pub lr_generator: f64,
    pub lr_fake: f64,
    /// Share of the updates, at the end, over which both learning rates fall linearly to 0; 0: none.
    pub cooldown: f64,
    pub switch: Switch,
    /// Generator updates a target (`switch = "count"`), or between two looks at the mismatch (`"mismatch"`).
    pub switch_every: u64,
    /// Looks without a lower mismatch before a switch (`switch = "mismatch"`).
    pub switch_patience: u64,
    /// Generator updates a target at most (`switch = "mismatch"`).
    pub switch_max: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NoiseConfig {
    /// Entries of the schedule's table of noise levels, rising (EDM: Karras; VP: its own steps).
    pub levels: usize,
    /// First and last entry drawn where target and fake score are compared.
    pub generator: [usize; 2],
    /// First and last entry drawn for the fake score's training, and for stage 1.
    pub fake: [usize; 2],
    pub distribution: Distribution,
    pub log_mean: f64,
    pub log_std: f64,
}

/// AdamW, the same for all three networks but for the learning rate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct OptimizerConfig {
    /// 0 keeps the two-player game of stage 2 from oscillating; 0.9 is the usual value elsewhere.
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    /// Largest global gradient norm; 0: no clipping.
    pub clip: f64,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// A run stops after this many steps in a row whose gradient was not finite.
    pub max_skips: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EmaConfig {
    /// Half-life in images; 0: no averaging.
    pub half_life: f64,
    /// The half-life is at most this share of the images seen; 0: no ramp-up.
    pub ramp: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LogConfig {
    /// Iterations between two rows of `metrics.jsonl`.
    pub every: u64,
    /// Images of a sample grid; 0: no grids.
    pub samples: usize,
    /// Heun steps of the teacher's and its degraded copies' samples.
    pub sample_steps: usize,
    /// Iterations between two checkpoints; 0: only where the run stops.
    pub checkpoint_every: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            seed: 0,
            device: "auto".into(),
            threads: 0,
            tf32: false,
            batch: 128,
            accumulate: 1,
            objective: ObjectiveKind::Dmd,
            guidance: 1.0,
            student: StudentConfig::default(),
            degrade: DegradeConfig::default(),
            backtrack: BacktrackConfig::default(),
            noise: NoiseConfig::default(),
            optimizer: OptimizerConfig::default(),
            ema: EmaConfig::default(),
            log: LogConfig::default(),
        }
    }
}
impl Default for StudentConfig {
    fn default() -> Self {
        Self { sigma_init: 0.0 }
    }
}
impl Default for DegradeConfig {
    fn default() -> Self {
        Self { nodes: 5, steps: 400, lr: 1e-5, spacing: Spacing::Iteration, patience: 0 }
    }
}
impl Default for BacktrackConfig {
    fn default() -> Self {
        Self {
            updates: 10_000,
            ratio: 1,
            lr_generator: 1e-5,
            lr_fake: 1e-5,
            cooldown: 0.3333,
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
            generator: [20, 980],
            fake: [0, 999],
            distribution: Distribution::Table,
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
        Self { half_life: 500_000.0, ramp: 0.2 }
    }
}
impl Default for LogConfig {
    fn default() -> Self {
        Self { every: 10, samples: 64, sample_steps: 18, checkpoint_every: 500 }
    }
}

impl Config {
    /// Defaults, then the file, then `key=value` pairs in order; checked.
    pub fn resolve(file: Option<&Path>, sets: &[String]) -> Result<Self> {
        let mut table = match file {
            None => Table::new(),
            Some(path) => {
                let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
                let table: Table = toml::from_str(&text)
                    .map_err(|e| Error::usage(format!("not TOML: {}", e.to_string().trim_end())))
                    .with_context(|| path.display().to_string())?;
                check_keys(&table).with_context(|| path.display().to_string())?;
                table
            }
        };
        for set in sets {
            apply(&mut table, set).with_context(|| format!("--set {set}"))?;
        }
        let config: Self = Value::Table(table)
            .try_into()
            .map_err(|e: toml::de::Error| Error::usage(format!("configuration: {}", e.to_string().trim_end())))?;
        config.validate()?;
        Ok(config)
    }

    /// The resolved configuration as TOML text that [`Config::resolve`] reads back unchanged.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Error::usage(format!("configuration: {e}")))
    }

    /// Keys with different values, as `(key, here, there)`.
    pub fn differences(&self, other: &Self) -> Result<Vec<(String, String, String)>> {
        let mine = leaves(&as_table(self)?);
        let theirs = leaves(&as_table(other)?);
        Ok(mine
            .into_iter()
            .zip(theirs)
            .filter(|(a, b)| a.1 != b.1)
            .map(|(a, b)| (a.0, a.1.to_string(), b.1.to_string()))
            .collect())
    }

    /// Images of one optimiser step.
    pub fn images(&self) -> u64 {
        (self.batch * self.accumulate) as u64
    }

    fn validate(&self) -> Result<()> {
        let at_least_one = [
            ("batch", self.batch as u64),
            ("accumulate", self.accumulate as u64),
            ("backtrack.updates", self.backtrack.updates),
            ("backtrack.ratio", self.backtrack.ratio),
            ("backtrack.switch_every", self.backtrack.switch_every),
            ("backtrack.switch_patience", self.backtrack.switch_patience),
            ("backtrack.switch_max", self.backtrack.switch_max),
            ("optimizer.max_skips", self.optimizer.max_skips),
            ("log.every", self.log.every),
            ("log.sample_steps", self.log.sample_steps as u64),
        ];
        if let Some((key, _)) = at_least_one.iter().find(|(_, v)| *v == 0) {
            return Err(Error::usage(format!("{key} is 0, expected 1 or more")));
        }
        let limited = [("batch", self.batch), ("accumulate", self.accumulate), ("log.samples", self.log.samples)];
        if let Some((key, v)) = limited.iter().find(|(_, v)| *v > 1_000_000) {
            return Err(Error::usage(format!("{key} is {v}, expected 1000000 or less")));
        }
        let rates = [
            ("degrade.lr", self.degrade.lr),
            ("backtrack.lr_generator", self.backtrack.lr_generator),
            ("backtrack.lr_fake", self.backtrack.lr_fake),
            ("optimizer.eps", self.optimizer.eps),
            ("noise.log_std", self.noise.log_std),
        ];
        if let Some((key, v)) = rates.iter().find(|(_, v)| !(v.is_finite() && *v > 0.0)) {
            return Err(Error::usage(format!("{key} is {v}, expected a number above 0")));
        }
        let not_negative = [
            ("student.sigma_init", self.student.sigma_init),
            ("guidance", self.guidance),
            ("optimizer.weight_decay", self.optimizer.weight_decay),
            ("optimizer.clip", self.optimizer.clip),
            ("ema.half_life", self.ema.half_life),
            ("ema.ramp", self.ema.ramp),
        ];
        if let Some((key, v)) = not_negative.iter().find(|(_, v)| !(v.is_finite() && *v >= 0.0)) {
            return Err(Error::usage(format!("{key} is {v}, expected 0 or more")));
        }
        for (key, v) in [("optimizer.beta1", self.optimizer.beta1), ("optimizer.beta2", self.optimizer.beta2)] {
            if !(0.0..1.0).contains(&v) {
                return Err(Error::usage(format!("{key} is {v}, expected 0 <= value < 1")));
            }
        }
        if !(0.0..=1.0).contains(&self.backtrack.cooldown) {
            return Err(Error::usage(format!("backtrack.cooldown is {}, expected 0 to 1", self.backtrack.cooldown)));
        }
        if !self.noise.log_mean.is_finite() {
            return Err(Error::usage(format!("noise.log_mean is {}, expected a number", self.noise.log_mean)));
        }
        if !(2..=1_000_000).contains(&self.noise.levels) {
            return Err(Error::usage(format!("noise.levels is {}, expected 2 to 1000000", self.noise.levels)));
        }
        for (key, [low, high]) in [("noise.generator", self.noise.generator), ("noise.fake", self.noise.fake)] {
            if low > high || high >= self.noise.levels {
                return Err(Error::usage(format!(
                    "{key} is [{low}, {high}], expected first <= last <= {} (noise.levels - 1)",
                    self.noise.levels - 1
                )));
            }
        }
        if self.degrade.nodes as u64 > self.degrade.steps {
            return Err(Error::usage(format!(
                "degrade.nodes is {} with degrade.steps = {}: a node needs at least one step",
                self.degrade.nodes, self.degrade.steps
            )));
        }
        Ok(())
    }
}

fn as_table(config: &Config) -> Result<Table> {
    Table::try_from(config).map_err(|e| Error::usage(format!("configuration: {e}")))
}

/// `(dotted key, value)` of every leaf, in order.
fn leaves(table: &Table) -> Vec<(String, Value)> {
    let mut out = Vec::new();
    for (key, value) in table {
        match value {
            Value::Table(inner) => out.extend(leaves(inner).into_iter().map(|(k, v)| (format!("{key}.{k}"), v))),
            other => out.push((key.clone(), other.clone())),
        }
    }
    out
}

/// Refuses keys that the configuration does not have.
fn check_keys(table: &Table) -> Result<()> {
    let known: Vec<String> = leaves(&as_table(&Config::default())?).into_iter().map(|(k, _)| k).collect();
    let sections: Vec<&str> = known.iter().filter_map(|k| k.split_once('.').map(|(s, _)| s)).collect();
    for (key, value) in table {
        if sections.contains(&key.as_str()) && !value.is_table() {
            return Err(
                Error::usage(format!("`{key}` is a section, not a value")).hint(format!("write [{key}] and its keys"))
            );
        }
    }
    match leaves(table).into_iter().find(|(k, _)| !known.contains(k)) {
        None => Ok(()),
        Some((key, _)) => Err(unknown_key(&key, &known)),
    }
}

fn unknown_key(key: &str, known: &[String]) -> Error {
    // `lr_fake` alone, `fake_lr` or `backtrak.lr_fake`: the whole key or its last part may be what was meant.
    let last = |k: &str| k.rsplit('.').next().unwrap_or(k).to_owned();
    let likeness = |k: &String| {
        let whole = strsim::normalized_damerau_levenshtein(key, k);
        whole.max(0.95 * strsim::normalized_damerau_levenshtein(&last(key), &last(k)))
    };
    let nearest = known.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    let error = Error::usage(format!("unknown key `{key}`"));
    match nearest {
        Some(k) => error.hint(format!("the nearest known key is `{k}`")),
        None => error,
    }
}

/// Puts one `a.b=value` into the table. The value is TOML; a bare word is taken as a string.
fn apply(table: &mut Table, set: &str) -> Result<()> {
    let (key, text) = set.split_once('=').ok_or_else(|| Error::usage("expected key=value"))?;
    let (key, text) = (key.trim(), text.trim());
    let value = match toml::from_str::<Table>(&format!("value = {text}")) {
        Ok(mut parsed) if parsed.len() == 1 => parsed.remove("value").expect("the one key"),
        _ => Value::String(text.to_owned()),
    };
    let mut nested = Table::new();
    let mut parts = key.rsplit('.');
    nested.insert(parts.next().unwrap_or_default().to_owned(), value);
    for part in parts {
        nested = Table::from_iter([(part.to_owned(), Value::Table(nested))]);
    }
    check_keys(&nested)?;
    merge(table, nested);
    Ok(())
}

fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(old)), Value::Table(new)) => merge(old, new),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
