//! Random draws of training. Each is a function of (seed, stage, iteration, micro-batch, what for) alone: nothing is
//! carried from one step to the next, so a resumed run draws what the uninterrupted one would have, and neither the
//! number of trajectory nodes nor the update ratio shifts a draw.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use tch::{Device, Tensor};

use crate::diffusion::{ConditionSource, HostConditions, TeacherCard};
use crate::distill::config::{Distribution, NoiseConfig};
use crate::error::Result;
use crate::torch::shim;

/// The part of a run that draws.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Phase {
    /// Stage 1.
    Degrade = 1,
    /// Stage 2.
    Backtrack = 2,
    /// Outside of training: fixed batches on which a loss is measured.
    Probe = 3,
}

/// What a draw is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// The student's input noise.
    Latent = 1,
    /// The conditions of the samples.
    Condition = 2,
    /// Noise levels at which target and fake score are compared.
    GeneratorSigma = 3,
    /// Noise of the samples on which target and fake score are compared.
    GeneratorNoise = 4,
    /// Noise levels of the fake score's training; in stage 1 those of the degrading copy's.
    FakeSigma = 5,
    /// Noise of the fake score's training; in stage 1 that of the degrading copy's.
    FakeNoise = 6,
    /// Noise levels of the generator's loss against the discriminator.
    GanSigma = 7,
    /// Noise of the generator's loss against the discriminator.
    GanNoise = 8,
    /// Which real images the discriminator sees.
    RealImage = 9,
    /// Noise levels of the discriminator's training, the same for generated and real images.
    DiscriminatorSigma = 10,
    /// Noise of the generated images in the discriminator's training.
    DiscriminatorNoise = 11,
    /// Noise of the real images in the discriminator's training.
    RealNoise = 12,
    /// Which step of a student of several steps is trained.
    Step = 13,
    /// Fresh noise between the steps of a student of several steps.
    StepNoise = 14,
}

/// The draws of one micro-batch.
#[derive(Debug, Clone, Copy)]
pub struct Draws {
    seed: u64,
    phase: Phase,
    iteration: u64,
    micro: u32,
}

impl Draws {
    /// The draws of micro-batch `micro` of an iteration, both counted from 0.
    pub fn new(seed: u64, phase: Phase, iteration: u64, micro: usize) -> Self {
        Self { seed, phase, iteration, micro: micro as u32 }
    }

    /// Random numbers for one use.
    pub fn stream(&self, what: Purpose) -> ChaCha8Rng {
        let mut key = [0u8; 32];
        key[..8].copy_from_slice(&self.seed.to_le_bytes());
        key[8..16].copy_from_slice(&self.iteration.to_le_bytes());
        key[16..20].copy_from_slice(&self.micro.to_le_bytes());
        key[20..24].copy_from_slice(&(self.phase as u32).to_le_bytes());
        key[24..28].copy_from_slice(&(what as u32).to_le_bytes());
        ChaCha8Rng::from_seed(key)
    }

    /// Standard normal f32 made on `device`.
    pub fn noise(&self, what: Purpose, shape: &[i64], device: Device) -> Result<Tensor> {
        shim::randn(self.stream(what).next_u64(), shape, device)
    }

    /// Conditions of `rows` samples.
    pub fn conditions(&self, source: &ConditionSource, card: &TeacherCard, rows: usize) -> Result<HostConditions> {
        source.draw(card, &mut self.stream(Purpose::Condition), rows)
    }

    /// Uniform over `0..n`; 0 without a draw where there is no choice.
    pub fn below(&self, what: Purpose, n: usize) -> usize {
        if n < 2 { 0 } else { below(&mut self.stream(what), n) }
    }

    /// Standard normal noise before step `step` of a student.
    pub fn step_noise(&self, step: usize, shape: &[i64], device: Device) -> Result<Tensor> {
        let mut stream = self.stream(Purpose::StepNoise);
        let mut seed = 0;
        for _ in 0..step {
            seed = stream.next_u64();
        }
        shim::randn(seed, shape, device)
    }

    /// `count` noise levels.
    pub fn sigmas(&self, what: Purpose, levels: &Levels, count: usize) -> Vec<f64> {
        let mut rng = self.stream(what);
        (0..count).map(|_| levels.draw(&mut rng)).collect()
    }
}

fn below(rng: &mut ChaCha8Rng, n: usize) -> usize {
    ((u128::from(rng.next_u64()) * n as u128) >> 64) as usize
}

/// Uniform in (0, 1].
fn unit(rng: &mut ChaCha8Rng) -> f64 {
    ((rng.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64
}

/// A distribution of noise levels.
#[derive(Debug, Clone, PartialEq)]
pub enum Levels {
    /// Uniform over these entries, rising.
    Table(Vec<f64>),
    /// `ln sigma ~ N(mean, std^2)`, clamped to `[low, high]`; snapped to the table where the network knows no others.
    Lognormal {
        /// Mean of `ln sigma`.
        mean: f64,
        /// Standard deviation of `ln sigma`.
        std: f64,
        /// Lowest noise level sigma.
        low: f64,
        /// Highest noise level sigma.
        high: f64,
        /// The levels that the network knows, rising; absent where it knows every level.
        snap: Option<Vec<f64>>,
    },
}

impl Levels {
    /// Entries `range` (first and last, counted in `config.levels`) of a schedule's rising table of noise levels. A
    /// table with another number of entries, such as a VP schedule's own, is cut in the same proportion. `discrete`:
    /// the network knows no level beside the table's.
    pub fn new(
        config: &NoiseConfig,
        distribution: Distribution,
        range: [usize; 2],
        table: &[f64],
        discrete: bool,
    ) -> Self {
        let scale = |i: usize| {
            let at = i as f64 * (table.len() - 1) as f64 / (config.levels - 1) as f64;
            (at.round() as usize).min(table.len() - 1)
        };
        let part = &table[scale(range[0])..=scale(range[1])];
        match distribution {
            Distribution::Table => Self::Table(part.to_vec()),
            Distribution::Lognormal => Self::Lognormal {
                mean: config.log_mean,
                std: config.log_std,
                low: part[0],
                high: part[part.len() - 1],
                snap: discrete.then(|| part.to_vec()),
            },
        }
    }

    fn draw(&self, rng: &mut ChaCha8Rng) -> f64 {
        match self {
            Self::Table(entries) => entries[below(rng, entries.len())],
            Self::Lognormal { mean, std, low, high, snap } => {
                let normal = (-2.0 * unit(rng).ln()).sqrt() * (std::f64::consts::TAU * unit(rng)).cos();
                let sigma = (mean + std * normal).exp().clamp(*low, *high);
                match snap {
                    None => sigma,
                    Some(table) => {
                        let above = table.partition_point(|s| *s < sigma).min(table.len() - 1);
                        let below = above.saturating_sub(1);
                        if (sigma / table[below]).abs() < (table[above] / sigma).abs() {
                            table[below]
                        } else {
                            table[above]
                        }
                    }
                }
            }
        }
    }

    /// Whether some level of the distribution's range is one of these.
    pub fn any(&self, wanted: impl Fn(f64) -> bool) -> bool {
        match self {
            Self::Table(entries) | Self::Lognormal { snap: Some(entries), .. } => entries.iter().any(|s| wanted(*s)),
            Self::Lognormal { low, high, .. } => {
                let ratio = (high / low).ln();
                (0..=1000).any(|k| wanted(low * (ratio * f64::from(k) / 1000.0).exp()))
            }
        }
    }

    /// `count` levels spread evenly over the distribution's range, for probes.
    pub fn spread(&self, count: usize) -> Vec<f64> {
        let at = |i: usize| (i as f64 + 0.5) / count as f64;
        match self {
            Self::Table(entries) | Self::Lognormal { snap: Some(entries), .. } => {
                (0..count).map(|i| entries[((at(i) * entries.len() as f64) as usize).min(entries.len() - 1)]).collect()
            }
            Self::Lognormal { low, high, mean, std, .. } => (0..count)
                // Between the quantiles at -2 and +2 standard deviations.
                .map(|i| (mean + std * (4.0 * at(i) - 2.0)).exp().clamp(*low, *high))
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Vec<f64> {
        (0..1000).map(|i| (1 + i) as f64).collect()
    }

    fn classes(draws: &Draws, rows: usize) -> Vec<i64> {
        let card = crate::distill::tests::labelled_card();
        let drawn = draws.conditions(&ConditionSource::uniform(&card).unwrap(), &card, rows).unwrap();
        drawn.get("labels").unwrap().to_i64()
    }

    #[test]
    fn ranges_are_cut_from_the_table() {
        let config = NoiseConfig::default();
        let levels = Levels::new(&config, Distribution::Table, [20, 980], &table(), false);
        let drawn = Draws::new(1, Phase::Backtrack, 3, 0).sigmas(Purpose::GeneratorSigma, &levels, 50_000);
        let (low, high) = drawn.iter().fold((f64::MAX, 0.0f64), |(l, h), &s| (l.min(s), h.max(s)));
        assert_eq!((low, high), (21.0, 981.0));
        let mean = drawn.iter().sum::<f64>() / drawn.len() as f64;
        assert!((mean - 501.0).abs() < 5.0, "{mean}");
        // A table of 100 steps is cut in proportion.
        let Levels::Table(part) = Levels::new(&config, Distribution::Table, [20, 980], &table()[..100], true) else {
            panic!()
        };
        assert_eq!((part[0], part[part.len() - 1]), (3.0, 98.0));
        assert_eq!(levels.spread(4).len(), 4);
    }

    #[test]
    fn lognormal_levels_have_the_moments_and_snap_to_a_discrete_table() {
        let config = NoiseConfig { log_mean: 3.0, log_std: 0.5, ..NoiseConfig::default() };
        let draws = Draws::new(1, Phase::Degrade, 0, 0);
        let levels = Levels::new(&config, Distribution::Lognormal, [0, 999], &table(), false);
        let ln: Vec<f64> = draws.sigmas(Purpose::FakeSigma, &levels, 50_000).iter().map(|s| s.ln()).collect();
        let mean = ln.iter().sum::<f64>() / ln.len() as f64;
        let var = ln.iter().map(|l| (l - mean).powi(2)).sum::<f64>() / ln.len() as f64;
        assert!((mean - 3.0).abs() < 0.01 && (var.sqrt() - 0.5).abs() < 0.01, "{mean} {var}");
        let snapped = Levels::new(&config, Distribution::Lognormal, [0, 999], &table(), true);
        assert!(draws.sigmas(Purpose::FakeSigma, &snapped, 1000).iter().all(|s| s.fract() == 0.0));
    }

    #[test]
    fn draws_depend_on_their_key_alone() {
        let a = Draws::new(7, Phase::Backtrack, 5, 1);
        let levels = Levels::Table(table());
        assert_eq!(
            a.sigmas(Purpose::FakeSigma, &levels, 9),
            Draws::new(7, Phase::Backtrack, 5, 1).sigmas(Purpose::FakeSigma, &levels, 9)
        );
        for other in [
            Draws::new(8, Phase::Backtrack, 5, 1),
            Draws::new(7, Phase::Degrade, 5, 1),
            Draws::new(7, Phase::Backtrack, 6, 1),
            Draws::new(7, Phase::Backtrack, 5, 0),
        ] {
            assert_ne!(a.sigmas(Purpose::FakeSigma, &levels, 9), other.sigmas(Purpose::FakeSigma, &levels, 9));
            assert_ne!(classes(&a, 40), classes(&other, 40));
            let noise = |d: &Draws| Vec::<f32>::try_from(d.noise(Purpose::Latent, &[8], Device::Cpu).unwrap()).unwrap();
            assert_ne!(noise(&a), noise(&other));
        }
        assert_ne!(a.sigmas(Purpose::FakeSigma, &levels, 9), a.sigmas(Purpose::GeneratorSigma, &levels, 9));
        let classes = classes(&a, 10_000);
        for c in 0..10 {
            let n = classes.iter().filter(|&&k| k == c).count();
            assert!((850..1150).contains(&n), "class {c}: {n}");
        }
    }
}
