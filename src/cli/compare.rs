//! `disback compare`: runs with and without the trajectory, and a verdict.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::Globals;
use super::distill::{STOP, watch_signals};
use super::teacher::TeacherArgs;
use crate::diffusion::{Conditions, Denoiser};
use crate::distill::compare::{self, Curve, Judge, Point};
use crate::distill::{Config, Student, trainer};
use crate::error::{Context, Error, Result};
use crate::eval::features::FeatureOptions;
use crate::eval::{FeatureNet, Statistics, frechet};
use crate::io::ImageSet;
use crate::runtime::EngineOptions;
use crate::tensor::HostTensor;
use crate::torch::{convert, device};

/// Run a recipe with and without the trajectory, several seeds each, and say whether it pays: distances over generator
/// updates, forward passes and seconds, with stage 1 counted. Runs that are finished are not repeated.
#[derive(Debug, Args)]
pub struct CompareArgs {
    #[command(flatten)]
    teacher: TeacherArgs,
    /// Folder for the runs, compare.json, compare.svg and compare.md.
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Configuration file of the run with the trajectory.
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Any key of the configuration; wins over the file.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// The reference: images as for `evaluate`.
    #[arg(long, value_name = "PATH")]
    reference: PathBuf,
    /// The feature network (ONNX) in whose space the Frechet distance is taken.
    #[arg(long, value_name = "FILE")]
    features: PathBuf,
    /// Seeds, one pair of runs each.
    #[arg(long, value_delimiter = ',', default_value = "0,1,2")]
    seeds: Vec<u64>,
    /// Generator updates between two looks; a twentieth of all where absent.
    #[arg(long)]
    every: Option<u64>,
    /// Images a look.
    #[arg(long, default_value_t = 2048)]
    samples: usize,
}

/// Frechet distance of a student's images, always of the same noise and conditions.
struct FrechetJudge {
    network: FeatureNet,
    reference: Statistics,
    noise: HostTensor,
    conditions: crate::diffusion::HostConditions,
    range: [f64; 2],
    batch: usize,
}

/// Seed of the noise that every student of a comparison is judged by.
const LOOKS: u64 = 0x10_0c5;

impl Judge for FrechetJudge {
    fn distance(&mut self, student: &Student) -> Result<f64> {
        let device = student.params().tensors().first().map_or(tch::Device::Cpu, tch::Tensor::device);
        let z = convert::to_torch(&self.noise)?.f_to_device(device)?;
        let conditions = Conditions::from_host(&self.conditions, device)?;
        let mut parts = Vec::new();
        for start in (0..conditions.len()).step_by(self.batch) {
            let count = (conditions.len() - start).min(self.batch as i64);
            let made =
                tch::no_grad(|| student.generate(&z.f_narrow(0, start, count)?, &conditions.rows(start, count)?))?;
            parts.push(convert::to_host(&made.f_clamp(self.range[0], self.range[1])?)?);
        }
        let set = ImageSet::from_samples(HostTensor::concat_rows(&parts)?, self.range)?;
        let features = self.network.features(&set, 256, |_| {})?;
        frechet::distance(&Statistics::of(&features)?, &self.reference)
    }
}

impl CompareArgs {
    fn judge(&self, config: &Config, denoiser: &Denoiser, student: Option<&Student>) -> Result<FrechetJudge> {
        let card = denoiser.card();
        let range =
            card.range.ok_or_else(|| Error::usage("the teacher makes latents, which have no image distance"))?;
        let options = EngineOptions { threads: Some(config.threads).filter(|t| *t > 0), ..EngineOptions::default() };
        let mut network = FeatureNet::open(&self.features, &FeatureOptions::default(), &options)?;
        let images = ImageSet::open(&self.reference, range)?;
        let reference = Statistics::of(&network.features(&images, 256, |_| {})?)?;
        let [c, h, w] = student.map_or(card.shape, |s| {
            let [_, c, h, w] = s.noise_size(0);
            [c, h, w].map(|d| d as usize)
        });
        let noise = crate::noise::batch_noise(LOOKS, 0, self.samples, c * h * w);
        Ok(FrechetJudge {
            network,
            reference,
            noise: HostTensor::new(&[self.samples, c, h, w], &noise)?,
            conditions: trainer::conditions(config, card)?.of_images(card, LOOKS, 0, self.samples)?,
            range,
            batch: config.batch,
        })
    }
}

pub fn run(args: &CompareArgs, globals: Globals) -> Result<ExitCode> {
    let config = Config::resolve(args.config.as_deref(), &args.sets)?;
    if config.degrade.nodes == 0 {
        return Err(Error::usage("degrade.nodes is 0: there is no trajectory to compare with"));
    }
    if args.samples < 2 || args.seeds.is_empty() {
        return Err(Error::usage("a comparison needs two samples and one seed at least"));
    }
    let place = device::parse(&config.device)?;
    device::set_threads(config.threads);
    let teacher = args.teacher.load(place)?;
    let denoiser = super::distill::denoiser(&teacher, &config)?;
    super::distill::check_stage_two(&config, &denoiser)?;
    let file = super::student::load(&config, &teacher, place)?;
    let student = super::student::given(file.as_ref(), &denoiser, &config)?;
    let mut judge = args.judge(&config, &denoiser, student.as_ref())?;
    let every = args.every.unwrap_or(config.backtrack.updates / 20).max(1);
    watch_signals()?;
    std::fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let (mut base, mut trajectory): (Vec<Curve>, Vec<Curve>) = (Vec::new(), Vec::new());
    for &seed in &args.seeds {
        for with in [false, true] {
            let name = format!("{}-seed-{seed}", if with { "trajectory" } else { "base" });
            let mut note = |p: Point| {
                if !globals.quiet && !globals.json {
                    eprintln!("{name}: update {}  distance {:.3}  {:.0} s", p.updates, p.distance, p.seconds);
                }
            };
            let arm = compare::arm(&config, seed, with);
            let dir = args.out.join(&name);
            match compare::run_arm(&arm, &denoiser, student.as_ref(), &dir, every, &mut judge, &STOP, &mut note)? {
                Some(curve) if with => trajectory.push(curve),
                Some(curve) => base.push(curve),
                None => return Ok(ExitCode::from(130)),
            }
        }
    }
    let found = compare::compare(&base, &trajectory)?;
    let objective = super::student::objective_name(&config);
    let title = format!("{objective}: Frechet distance of {} images, {} seeds", args.samples, args.seeds.len());
    let file = |name: &str| args.out.join(name);
    if let Some(svg) = compare::svg(&title, &base, &trajectory) {
        crate::files::write_atomic(&file("compare.svg"), svg.as_bytes())?;
    }
    let row = |name: &str, i: Option<compare::Interval>| {
        format!("| {name} | {} |\n", i.map_or("never in one seed or more".into(), |i| i.to_string()))
    };
    let mut text = format!("# {title}\n\n| | mean [95 %] |\n|---|---|\n");
    text += &row("final distance, base method", Some(found.base));
    text += &row("final distance, trajectory", Some(found.trajectory));
    text += &row("final distance, trajectory over base", Some(found.final_ratio));
    text += &row("share of updates to the base method's final distance", found.updates);
    text += &row("share of forward passes, stage 1 counted", found.forwards);
    text += &row("share of seconds, stage 1 counted", found.seconds);
    text += &row("share of updates, the base method itself", Some(found.base_updates));
    text += &format!("\n{}\n\nCommand: `{}`\n", found.verdict, super::command_line());
    crate::files::write_atomic(&file("compare.md"), text.as_bytes())?;
    let result = json!({ "ok": true, "objective": objective, "every": every, "samples": args.samples,
        "comparison": found, "base": base, "trajectory": trajectory });
    let bytes = serde_json::to_vec_pretty(&result).map_err(|e| Error::io(e.to_string()))?;
    crate::files::write_atomic(&file("compare.json"), &bytes)?;
    if globals.json {
        println!("{result}");
    } else if !globals.quiet {
        println!("{text}");
    }
    Ok(ExitCode::SUCCESS)
}
