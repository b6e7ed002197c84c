//! Memory that a run will take, compared with what is free before its first step.

use std::path::Path;

use tch::Device;

use crate::diffusion::Denoiser;
use crate::distill::config::Precision;
use crate::distill::estimate::{Estimate, estimate};
use crate::distill::{Config, Student};
use crate::error::{Error, Result};
use crate::run::origin;
use crate::run::request::Request;
use crate::run::session;
use crate::run::teacher::Teacher;
use crate::torch::training::Hollow;
use crate::torch::{Forward, device, shim};

/// Share of the free memory that `--batch auto` fills: work space of kernels is no tensor, and other processes live too.
const FILLED: f64 = 0.9;

/// Bytes that are free where a run computes, and what bounds them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Free {
    /// Bytes that a process may still take.
    pub bytes: u64,
    /// For people: `on this machine`, `in this control group`, `on cuda:0`.
    pub place: String,
}

/// Free memory of a device; of the CPU what the machine, the process's control groups (v1 and v2) and `ulimit -v` leave. `None`: nothing
/// says.
pub fn free(place: Device) -> Option<Free> {
    if place.is_cuda() {
        let bytes = shim::free_memory(place).ok()??;
        return Some(Free { bytes, place: format!("on {}", device::name(place)) });
    }
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let bounds = [
        (available(&std::fs::read_to_string("/proc/meminfo").ok()?), "on this machine"),
        (of_groups(Path::new("/sys/fs/cgroup"), &groups), "in this process's control group (its memory limit)"),
        (of_process(), "within this process's limit (ulimit -v)"),
    ];
    let least = bounds.into_iter().filter_map(|(bytes, place)| Some((bytes?, place))).min_by_key(|(bytes, _)| *bytes);
    least.map(|(bytes, place)| Free { bytes, place: place.into() })
}

/// `MemAvailable` of /proc/meminfo.
fn available(meminfo: &str) -> Option<u64> {
    field(meminfo, "MemAvailable:")
}

/// A field of /proc's tables, in bytes.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// What the control groups of a process leave, from the text of /proc/self/cgroup. `root`: where they are mounted.
fn of_groups(root: &Path, groups: &str) -> Option<u64> {
    let mut least: Option<u64> = None;
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let (base, limit, usage, file_cache) = match controllers {
            "" => (root.to_owned(), "memory.max", "memory.current", "inactive_file "),
            c if c.split(',').any(|c| c == "memory") => {
                (root.join("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
            }
            _ => continue,
        };
        // A container sees its own group as the root of the mount; every group above bounds those below it.
        let inside = base.join(path.trim_start_matches('/'));
        let mut folder: Option<&Path> = Some(&inside);
        while let Some(at) = folder.filter(|f| f.starts_with(&base)) {
            let number = |name: &str| std::fs::read_to_string(at.join(name)).ok()?.trim().parse::<u64>().ok();
            // (`max`, or nearly 2^63, is no limit.)
            if let (Some(limit), Some(usage)) = (number(limit).filter(|l| *l < 1 << 60), number(usage)) {
                let stat = std::fs::read_to_string(at.join("memory.stat")).unwrap_or_default();
                let cache = stat.lines().find_map(|l| l.strip_prefix(file_cache)?.trim().parse::<u64>().ok());
                let free = limit.saturating_sub(usage.saturating_sub(cache.unwrap_or(0)));
                least = Some(least.map_or(free, |l| l.min(free)));
            }
            folder = at.parent();
        }
    }
    least
}

/// What `ulimit -v` leaves.
#[cfg(unix)]
fn of_process() -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: writes into the structure.
    if unsafe { libc::getrlimit(libc::RLIMIT_AS, &mut limit) } != 0 || limit.rlim_cur == libc::RLIM_INFINITY {
        return None;
    }
    let taken = field(&std::fs::read_to_string("/proc/self/status").ok()?, "VmSize:")?;
    Some((limit.rlim_cur as u64).saturating_sub(taken))
}

#[cfg(not(unix))]
fn of_process() -> Option<u64> {
    None
}

/// `1.5 GiB`.
pub fn shown(bytes: u64) -> String {
    let (mut value, mut unit) = (bytes as f64, "B");
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    format!("{value:.1} {unit}")
}

/// A run whose memory is to be foreseen: its networks on the CPU, whose large tensors may be hollow.
struct Subject<'a> {
    config: &'a Config,
    teacher: &'a Teacher,
    student: Option<&'a Student>,
    denoiser: &'a Denoiser,
    /// Bytes that are taken already: the weights that a run begins with.
    held: u64,
}

impl Subject<'_> {
    /// Bytes that a run of this configuration takes beside what is held, and the stage that takes most.
    fn takes(&self, config: &Config) -> Result<(u64, &'static str)> {
        let adapted;
        let denoiser = match config.lora == self.config.lora {
            true => self.denoiser,
            false => {
                adapted = session::denoiser(self.teacher, config)?;
                &adapted
            }
        };
        let Estimate { degrade, backtrack, .. } = estimate(denoiser, self.student, config)?;
        let degrade = if config.degrade.nodes > 0 { degrade.total } else { 0 };
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
    let Some(free) = free(device) else { return nothing(config) };
    let held = 4 * (teacher.network.params().elements() as u64);
    if device == Device::Cpu {
        let subject = Subject { config, teacher, student, denoiser, held };
        return subject.decide(&free, auto);
    }
    // On another device the networks are looked at once more on the CPU, their weights hollow.
    let hollow = Hollow::new(false);
    let teacher = Teacher::load(&request.teacher, &request.teacher_options(config), Device::Cpu)?;
    let denoiser = session::denoiser(&teacher, config)?;
    drop(hollow);
    let file = origin::load(config, &teacher, Device::Cpu)?;
    let student = file.as_ref().map(|f| f.student(&config.student)).transpose()?;
    Subject { config, teacher: &teacher, student: student.as_ref(), denoiser: &denoiser, held }.decide(&free, auto)
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
        let most = config.images().min(MOST) as usize;
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
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn control_groups_of_both_versions_bound_what_is_free() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path: PathBuf = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let of = |groups: &str| of_groups(dir.path(), groups);
        assert_eq!(of("0::/user/job\n"), None);
        write("user/job/memory.max", "max\n");
        write("user/job/memory.current", "700\n");
        assert_eq!(of("0::/user/job\n"), None);
        // A limit further up holds for all below it, and cached files do not count.
        write("user/memory.max", "1000\n");
        write("user/memory.current", "900\n");
        write("user/memory.stat", "anon 600\ninactive_file 250\n");
        assert_eq!(of("0::/user/job\n"), Some(350));
        write("user/job/memory.max", "800\n");
        assert_eq!(of("0::/user/job\n"), Some(100));
        write("memory/slurm/memory.limit_in_bytes", "5000\n");
        write("memory/slurm/memory.usage_in_bytes", "4000\n");
        write("memory/slurm/memory.stat", "inactive_file 1\ntotal_inactive_file 90\n");
        assert_eq!(of("4:memory:/slurm\n1:cpu:/\n"), Some(1090));
        write("memory/slurm/memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(of("4:memory:/slurm\n1:cpu:/\n"), None);
        // In a container the path is that of the host, and the mount's root is the group.
        write("memory/memory.limit_in_bytes", "300\n");
        write("memory/memory.usage_in_bytes", "100\n");
        assert_eq!(of("4:cpuset,memory:/docker/abc\n"), Some(200));
        assert_eq!(available("MemTotal: 9 kB\nMemAvailable:   3 kB\n"), Some(3072));
        assert!(free(Device::Cpu).is_none_or(|f| f.bytes > 0));
    }

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
