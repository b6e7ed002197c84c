//! Memory that a run will take, compared with what is free before its first step.

use tch::Device;

use crate::diffusion::Denoiser;
use crate::distill::config::{Precision, Shard};
use crate::distill::estimate::{Estimate, estimate};
use crate::distill::{Config, Student};
use crate::error::{Error, Result};
use crate::memory;
pub use crate::memory::{Free, shown};
use crate::run::origin;
use crate::run::request::Request;
use crate::run::teacher::{self, Teacher};
use crate::torch::training::Hollow;
use crate::torch::{Forward, device, shim};

/// Share of the free memory that `--batch auto` fills: work space of kernels is no tensor, and other processes live too.
const FILLED: f64 = 0.9;

/// Free memory of a device; of the CPU what [`memory::free`] says.
pub fn free(place: Device) -> Option<Free> {
    if place.is_cuda() {
        let bytes = shim::free_memory(place).ok()??;
        return Some(Free { bytes, place: format!("on {}", device::name(place)) });
    }
    memory::free()
}

/// A run whose memory is to be foreseen: its networks on the CPU, whose large tensors may be hollow.
struct Subject<'a> {
    config: &'a Config,
    teacher: &'a Teacher,
    student: Option<&'a Student>,
    denoiser: &'a Denoiser,
    /// Bytes that are taken already: the weights that a run begins with.
    held: u64,
    /// Processes that share the run.
    world: usize,
}

impl Subject<'_> {
    /// Bytes that a run of this configuration takes beside what is held, and the stage that takes most.
    fn takes(&self, config: &Config) -> Result<(u64, &'static str)> {
        let adapted;
        let denoiser = match config.lora == self.config.lora {
            true => self.denoiser,
            false => {
                adapted = teacher::denoiser(self.teacher, config)?;
                &adapted
            }
        };
        let Estimate { degrade, backtrack, .. } = estimate(denoiser, self.student, config, self.world)?;
        let degrade = if config.degrade.nodes.any() { degrade.total } else { 0 };
        let (most, stage) =
            if degrade > backtrack.total { (degrade, "degrade") } else { (backtrack.total, "backtrack") };
        Ok((most.saturating_sub(self.held), stage))
    }
}

/// Compares what a run takes with what is free on its device, before anything else of it is done. With `auto` the largest batch is
/// found that fits, with the images an update that the configuration has. Gives the configuration to go on with, and a remark.
///
/// Errors: it does not fit. The error says what would.
pub fn foresee(
    config: &Config,
    request: &Request,
    networks: (&Teacher, &Denoiser, Option<&Student>),
    device: Device,
    auto: bool,
) -> Result<(Config, Option<String>)> {
    let (teacher, denoiser, student) = networks;
    let nothing = |config: &Config| Ok((config.clone(), None));
    let Some(mut free) = free(device) else { return nothing(config) };
    let (world, sharing) = (request.world.size(), request.world.on_this_machine() as u64);
    if device == Device::Cpu && sharing > 1 {
        free.bytes /= sharing;
        free.place = format!("{} for each of {sharing} processes", free.place);
    }
    let guide = denoiser.weaker().map_or(0, |weaker| weaker.params().elements());
    let held = 4 * ((teacher.network.params().elements() + guide) as u64);
    if device == Device::Cpu {
        let subject = Subject { config, teacher, student, denoiser, held, world };
        return subject.decide(&free, auto);
    }
    // On another device the networks are looked at once more on the CPU, their weights hollow.
    let hollow = Hollow::new(false);
    let teacher = Teacher::load(&request.teacher, &request.teacher_options(config), Device::Cpu)?;
    let denoiser = teacher::denoiser(&teacher, config)?;
    drop(hollow);
    let file = origin::load(config, &teacher, Device::Cpu)?;
    let student = file.as_ref().map(|f| f.student(&config.student)).transpose()?;
    let (teacher, denoiser, student) = (&teacher, &denoiser, student.as_ref());
    Subject { config, teacher, student, denoiser, held, world }.decide(&free, auto)
}

impl Subject<'_> {
    fn decide(&self, free: &Free, auto: bool) -> Result<(Config, Option<String>)> {
        let config = self.config;
        if !auto {
            // What cannot be tried at a few images (a graph that fixes its batch) says so where it is run.
            let Ok((takes, stage)) = self.takes(config) else { return Ok((config.clone(), None)) };
            return match takes <= free.bytes {
                true => Ok((config.clone(), None)),
                false => Err(self.refusal(takes, stage, free)),
            };
        }
        let filled = (free.bytes as f64 * FILLED) as u64;
        let takes = |batch: usize| Ok(self.takes(&with_batch(config, batch))?.0);
        // (Each process has one forward pass of an update at least.)
        let most = (config.images() / self.world as u64).min(MOST) as usize;
        let Some(batch) = largest(&batches(config.images(), most), filled, &takes)? else {
            let (takes, stage) = self.takes(&with_batch(config, 1))?;
            return Err(self.refusal(takes, stage, free));
        };
        let found = with_batch(config, batch);
        let remark = format!(
            "--batch auto: batch {batch}, accumulate {}: about {} of the {} that are free {}",
            found.accumulate,
            shown(takes(batch)?),
            shown(free.bytes),
            free.place
        );
        Ok((found, Some(remark)))
    }

    /// What does not fit, and what would.
    fn refusal(&self, takes: u64, stage: &str, free: &Free) -> Error {
        let config = self.config;
        let fits = |changed: &Config| self.takes(changed).is_ok_and(|(takes, _)| takes <= free.bytes);
        let mut ways = Vec::new();
        let takes_with = |batch: usize| Ok(self.takes(&with_batch(config, batch))?.0);
        let smaller: Vec<usize> =
            batches(config.images(), config.batch).into_iter().filter(|b| *b < config.batch).collect();
        if let Ok(Some(batch)) = largest(&smaller, free.bytes, &takes_with) {
            let accumulate = config.images() / batch as u64;
            ways.push(format!(
                "--batch {batch} --accumulate {accumulate} (the same images an update; --batch auto finds it)"
            ));
        }
        let changed = |change: &dyn Fn(&mut Config)| {
            let mut changed = config.clone();
            change(&mut changed);
            changed
        };
        // Half of what is free for what a forward keeps, the rest for weights and passing values.
        let mib = (free.bytes / 2) >> 20;
        if mib > 0 && config.memory.activations_mib == 0 && fits(&changed(&|c| c.memory.activations_mib = mib)) {
            ways.push(format!("--set memory.activations_mib={mib} (more arithmetic)"));
        }
        if config.precision == Precision::F32 && fits(&changed(&|c| c.precision = Precision::Bf16)) {
            ways.push("--set precision=bf16".into());
        }
        if self.world > 1 && fits(&changed(&|c| c.distributed.shard = Shard::Optimizer)) {
            ways.push("--set distributed.shard=optimizer".into());
        }
        const RANK: usize = 16;
        if config.lora.rank == 0 && self.student.is_none() && fits(&changed(&|c| c.lora.rank = RANK)) {
            ways.push(format!("--set lora.rank={RANK} (fewer weights are trained)"));
        }
        let error = Error::usage(format!(
            "stage `{stage}` takes about {} more at batch {}, but {} are free {}",
            shown(takes),
            config.batch,
            shown(free.bytes),
            free.place
        ));
        match ways.is_empty() {
            true => error.hint(
                "no single one of --batch, memory.activations_mib, precision=bf16 and lora.rank is enough; `disback estimate` shows \
                 what several of them together come to",
            ),
            false => error.hint(format!("what would fit: {}", ways.join("; "))),
        }
    }
}

/// Images beyond which `--batch auto` looks for no larger batch.
const MOST: u64 = 4096;

/// Divisors of the images of an update that are no larger than `most`, falling: the batches that keep it.
fn batches(images: u64, most: usize) -> Vec<usize> {
    let mut all: Vec<usize> = (1..=(images as f64).sqrt() as u64)
        .filter(|d| images.is_multiple_of(*d))
        .flat_map(|d| [d as usize, (images / d) as usize])
        .filter(|d| *d <= most)
        .collect();
    all.sort_unstable_by(|a, b| b.cmp(a));
    all.dedup();
    all
}

/// The same images an update in forward passes of this batch.
fn with_batch(config: &Config, batch: usize) -> Config {
    Config { batch, accumulate: (config.images() / batch as u64) as usize, ..config.clone() }
}

/// The first of `batches` (falling) with which `takes` fits into `free`.
fn largest(batches: &[usize], free: u64, takes: &dyn Fn(usize) -> Result<u64>) -> Result<Option<usize>> {
    // (More images never take less.)
    let (mut low, mut high) = (0, batches.len());
    while low < high {
        let middle = (low + high) / 2;
        if takes(batches[middle])? <= free { high = middle } else { low = middle + 1 }
    }
    Ok(batches.get(low).copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_keep_the_images_of_an_update() {
        assert_eq!(batches(12, 12), [12, 6, 4, 3, 2, 1]);
        assert_eq!(batches(12, 5), [4, 3, 2, 1]);
        assert_eq!(batches(7, 100), [7, 1]);
        assert_eq!(batches(1, 1), [1]);
        let all = batches(128, 128);
        let fits = |free| largest(&all, free, &|b| Ok(100 + 10 * b as u64)).unwrap();
        assert_eq!(
            (fits(5000), fits(740), fits(739), fits(110), fits(109)),
            (Some(128), Some(64), Some(32), Some(1), None)
        );
        let two = with_batch(&Config { batch: 16, accumulate: 3, ..Config::default() }, 8);
        assert_eq!((two.batch, two.accumulate), (8, 6));
    }
}
