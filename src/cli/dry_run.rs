//! `--dry-run`: what a run will do, what memory it takes, and how long an image takes after three steps of each stage.

use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde_json::json;
use tch::Device;

use super::{Globals, table};
use crate::distill::checkpoint::StageKind;
use crate::distill::config::{Config, Precision, Switch};
use crate::distill::gan::taps;
use crate::distill::metrics::MetricsRow;
use crate::distill::student::levels;
use crate::distill::{Job, Observer, RunDir, Stages, cost, distill, plan};
use crate::error::{Context, Error, Result};
use crate::run::PreparedRun;
use crate::run::memory::shown as bytes;
use crate::run::origin::describe;
use crate::shown::{counted, say};
use crate::torch::dist::World;
use crate::torch::{Forward, device, shim};

/// Steps of each stage that are really made; of stage 2 one more where not every iteration updates the generator.
const STEPS: u64 = 3;

#[derive(Default)]
struct Clock {
    rows: Vec<MetricsRow>,
}

impl Observer for Clock {
    fn metrics(&mut self, row: &MetricsRow) -> Result<()> {
        self.rows.push(row.clone());
        Ok(())
    }
}

impl Clock {
    /// Seconds an image of a stage: of its last step, the first one's preparations left out. In stage 2 the generator is updated
    /// in one of `ratio` iterations; here it was in every second one.
    fn seconds_an_image(&self, stage: StageKind, ratio: u64) -> Option<f64> {
        let mut last = self.rows.iter().rev().filter(|r| r.stage == stage && r.images_per_s > 0.0);
        let with = 1.0 / last.next()?.images_per_s;
        if stage == StageKind::Degrade || ratio == 1 {
            return Some(with);
        }
        let without = 1.0 / last.next()?.images_per_s;
        Some((with + (ratio - 1) as f64 * without) / ratio as f64)
    }
}

/// Weights of the networks, in bytes.
struct Sizes {
    /// What is trained of the degrading copy and the fake score: all of the teacher's weights, or the low-rank factors.
    trained: u64,
    /// The teacher's weights beside these factors, frozen and shared.
    shared: u64,
    student: u64,
    /// The network of `guidance_by`.
    guide: u64,
}

/// What a stage holds of weights, gradients and optimiser states: name and bytes.
fn sets(config: &Config, sizes: &Sizes) -> Vec<(String, u64)> {
    // Weights, gradient, and two moments.
    const TRAINED: u64 = 4;
    let Sizes { trained, shared, student, guide } = *sizes;
    let fake = if config.has_fake() { TRAINED * trained } else { 0 };
    let averages = 1 + config.ema.more.len() as u64;
    let mut all = vec![("teacher".to_owned(), trained + shared)];
    if guide > 0 {
        all.push(("the weaker network that guides it".to_owned(), guide));
    }
    if config.degrade.nodes.any() {
        all.push(("stage 1: initial student, degrading copy".to_owned(), student + TRAINED * trained));
    }
    // (The target lies in the teacher's own memory.)
    let stage_two = (TRAINED + averages) * student + fake;
    all.push(("stage 2: student, averages, fake score".to_owned(), stage_two));
    all
}

/// The targets of stage 2, in words.
fn switches(config: &Config) -> String {
    let b = &config.backtrack;
    let targets = |nodes: usize| counted(nodes as u64 - 1, "target");
    match (config.degrade.nodes.most(), config.backtrack.switch) {
        (0, _) => "none: the base method".to_owned(),
        (n, Switch::Count) if config.degrade.nodes.is_auto() => {
            format!(
                "{n} nodes at most, chosen by what stage 1 measures (its steps and images here are the most that it may take: {})",
                plan::limit(config)
            )
        }
        (1, _) => "1 node: the teacher is the target from the first update on".to_owned(),
        // (The last node is where stage 1 ends: the first target is the one before it.)
        (n, Switch::Count) => {
            format!("{n} nodes; {} before the teacher, each for {}", targets(n), counted(b.switch_every, "update"))
        }
        (n, Switch::Mismatch) => format!(
            "{n} nodes; {} before the teacher, each until the mismatch says so, for {} at most",
            targets(n),
            counted(b.switch_max, "update")
        ),
    }
}

/// Prints the plan after a few steps in a folder that is removed again. Nothing of a run is left.
pub fn run(prepared: &PreparedRun, globals: Globals) -> Result<ExitCode> {
    let PreparedRun { config, denoiser: teacher, student, device: place, .. } = prepared;
    let (place, student) = (*place, student.as_ref());
    // All weights of the teacher; what is trained of them may be less.
    let whole = prepared.teacher.network.params().elements() as u64;
    let folder = tempfile::tempdir().context("a folder for the steps of --dry-run")?;
    let mut short = config.clone();
    short.degrade.nodes = config.degrade.nodes.most().min(1).into();
    (short.degrade.steps, short.degrade.patience) = (STEPS, 0);
    short.backtrack.ratio = config.backtrack.ratio.min(2);
    short.backtrack.updates = STEPS.div_ceil(short.backtrack.ratio);
    (short.log.every, short.log.samples, short.log.checkpoint_every) = (1, 0, 0);
    let run = RunDir::create(&folder.path().join("run"), &short)?;
    let mut clock = Clock::default();
    let stop = AtomicBool::new(false);
    let job = Job {
        config: &short,
        student,
        run: &run,
        observer: &mut clock,
        stop: &stop,
        silent: true,
        world: World::alone(),
    };
    distill(job, teacher, Stages::Both)?;

    let parameters = teacher.params().elements() as u64;
    let of_student = student.map_or(parameters, |s| s.params().elements() as u64);
    let shared = if parameters < whole { whole } else { 0 };
    let trained = 4 * parameters;
    let guide = teacher.weaker().map_or(0, |w| 4 * w.params().elements() as u64);
    let sizes = Sizes { trained, shared: 4 * shared, student: 4 * of_student, guide };
    let images = config.images();
    let passes = cost::passes(config);
    let degrade_steps = plan::steps(config);
    let iterations = config.backtrack.updates * config.backtrack.ratio;
    let stages = [
        ("degrade", StageKind::Degrade, degrade_steps, degrade_steps * passes.degrade),
        (
            "backtrack",
            StageKind::Backtrack,
            iterations,
            iterations * passes.iteration + config.backtrack.updates * passes.update,
        ),
    ];
    let plan: Vec<serde_json::Value> = stages
        .iter()
        .map(|(name, stage, steps, forwards)| {
            let an_image = clock.seconds_an_image(*stage, config.backtrack.ratio).filter(|_| *steps > 0);
            json!({
                "stage": name, "steps": steps, "images": steps * images, "forward_passes": forwards,
                "seconds_an_image": an_image, "seconds": an_image.map(|s| s * (steps * images) as f64),
            })
        })
        .collect();
    let held = sets(config, &sizes);
    let peak = shim::memory(place)?.map(|m| m.peak).or_else(crate::memory::peak);
    // Node files, the teacher's among them, and the largest checkpoint.
    let nodes = if config.degrade.nodes.any() { config.degrade.nodes.most() as u64 + 1 } else { 1 };
    // (A checkpoint holds all but gradients and the target.)
    let fake = if config.has_fake() { 3 * sizes.trained } else { 0 };
    let checkpoint = (4 + config.ema.more.len() as u64) * sizes.student + fake;
    let nodes = match config.memory.nodes {
        Precision::F32 => nodes * trained,
        // The teacher's stays f32.
        Precision::Bf16 => trained + (nodes - 1) * trained / 2,
    };
    let disk = nodes + (config.log.keep as u64 + 1) * checkpoint + 2 * (sizes.student + shared * 4);
    let switches = switches(config);
    let taps = taps::configured(config, teacher)?;
    let further = match student {
        // (One of a file with a card of its own is evaluated where that card says.)
        Some(_) => Vec::new(),
        None => levels(teacher.conversion(), &config.student)?,
    };
    if globals.json {
        let weights: serde_json::Map<_, _> = held.iter().map(|(k, n)| (k.clone(), json!(n))).collect();
        println!(
            "{}",
            json!({
                "ok": true, "dry_run": true, "device": device::name(place), "trained_parameters": parameters,
                "student": describe(config), "student_parameters": of_student,
                "stages": plan, "bytes_of_weights": weights, "bytes_of_all_weights": held.iter().map(|(_, n)| n).sum::<u64>(), "peak_bytes": peak,
                "bytes_on_disk": disk, "switches": switches, "guidance": config.guidance, "guidance_by": config.weaker(),
                "guidance_rescale": config.guidance_rescale, "student_sigmas": further,
                "gan_taps": taps.iter().map(|t| json!({ "said": t.said, "tensor": t.name })).collect::<Vec<_>>(),
            })
        );
        return Ok(ExitCode::SUCCESS);
    }
    say!(
        "objective {}, guidance {}{}{}, batch {} x {}, on {}",
        config.objective.name(),
        config.guidance,
        config.weaker().map_or(String::new(), |path| format!(" by {}", path.display())),
        if config.guidance_rescale > 0.0 { format!(" rescaled by {}", config.guidance_rescale) } else { String::new() },
        config.batch,
        config.accumulate,
        device::name(place)
    );
    say!("student: {}, {of_student} trained parameters", describe(config));
    if !further.is_empty() {
        let shown: Vec<String> = further.iter().map(|s| format!("{s:.4}")).collect();
        say!("its steps after the first are at noise levels {}", shown.join(", "));
    }
    for tap in &taps {
        say!("the discriminator reads {tap}");
    }
    say!("fake score and degrading copy: {parameters} trained parameters of {whole}");
    say!("trajectory: {switches}\n");
    let mut lines = table(["stage", "steps", "images", "forward passes", "ms an image", "time"]);
    for (row, (name, _, steps, forwards)) in plan.iter().zip(&stages) {
        let number = |key: &str| row[key].as_f64();
        lines.add_row([
            (*name).to_owned(),
            steps.to_string(),
            (steps * images).to_string(),
            forwards.to_string(),
            number("seconds_an_image").map_or("-".into(), |s| format!("{:.3}", 1e3 * s)),
            number("seconds").map_or("-".into(), |s| human(Duration::from_secs_f64(s))),
        ]);
    }
    say!("{lines}\n");
    let mut lines = table(["memory", "bytes"]);
    for (name, n) in held {
        lines.add_row([name, bytes(n)]);
    }
    let what = if place == Device::Cpu { "peak of the process" } else { "peak of the device" };
    lines.add_row([format!("{what} in these {STEPS} steps, activations included"), peak.map_or("-".into(), bytes)]);
    lines.add_row(["disk, at most".into(), bytes(disk)]);
    say!("{lines}");
    Ok(ExitCode::SUCCESS)
}

fn human(time: Duration) -> String {
    let s = time.as_secs();
    match s {
        0..=119 => format!("{:.0} s", time.as_secs_f64()),
        120..=7199 => format!("{} min", s / 60),
        7200..=172_799 => format!("{:.1} h", s as f64 / 3600.0),
        _ => format!("{:.1} days", s as f64 / 86_400.0),
    }
}

/// `--dry-run` writes nothing into the folder of a run, so it has no use for one that is there.
pub fn check(resume: bool, alone: bool) -> Result<()> {
    if !alone {
        return Err(Error::usage("--dry-run is for one process: start it without a launcher"));
    }
    match resume {
        true => Err(Error::usage("--dry-run and --resume: a run that goes on has been planned already")),
        false => Ok(()),
    }
}
