//! `disback compare`: runs with and without the trajectory, and a verdict.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::Globals;
use super::distill::{DegradeOptions, MethodOptions};
use super::signals::{self, STOP};
use super::teacher::TeacherArgs;
use crate::diffusion::{Conditions, Denoiser, TeacherCard};
use crate::distill::compare::{self, Comparison, Curve, Interval, Judge, Point};
use crate::distill::{Config, Student, batches};
use crate::error::{Context, Error, Result};
use crate::eval::features::FeatureOptions;
use crate::eval::kernel::Estimator;
use crate::eval::source::Draw;
use crate::eval::{FeatureNet, Source, Statistics, frechet, values};
use crate::io::ImageSet;
use crate::run::{self, Request, origin};
use crate::runtime::EngineOptions;
use crate::runtime::decoder::Decoder;
use crate::shown::{say, tell};
use crate::tensor::HostTensor;
use crate::torch::dist::launcher::Place;
use crate::torch::{convert, device};

/// Run a recipe with and without the trajectory, several seeds each, and say whether it pays: distances over generator
/// updates, forward passes and seconds, with stage 1 counted. The same command again goes on where it was interrupted.
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
    /// Images a forward pass. [batch]
    #[arg(long)]
    batch: Option<usize>,
    #[command(flatten)]
    degrade: DegradeOptions,
    #[command(flatten)]
    method: MethodOptions,
    /// The reference: images as for `evaluate`, or samples of another kind with their own values.
    #[arg(long, value_name = "PATH")]
    reference: PathBuf,
    /// The feature network (ONNX) in whose space the Frechet distance is taken; needed for images, while samples of another kind
    /// are compared by their values without one.
    #[arg(long, value_name = "FILE")]
    features: Option<PathBuf>,
    /// Seeds, a list with commas; one pair of runs each.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "0,1,2")]
    seeds: Vec<u64>,
    /// Generator updates between two looks; a twentieth of all where absent.
    #[arg(long)]
    every: Option<u64>,
    /// Samples a look.
    #[arg(long, default_value_t = 2048)]
    samples: usize,
    /// Forward passes of all networks, in images and stage 1 counted, that each run may spend: sets the generator updates
    /// of either in place of `backtrack.updates`.
    #[arg(long, value_name = "FORWARDS")]
    budget: Option<u64>,
    /// Folder of an earlier comparison whose runs of the base method are taken where they fit.
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,
    /// Folder of a finished comparison to show in the same figure and table; may be repeated.
    #[arg(long, value_name = "DIR")]
    beside: Vec<PathBuf>,
}

impl CompareArgs {
    /// Keys of the configuration, the options before `--set`.
    fn sets(&self) -> Vec<String> {
        let batch = self.batch.map(|n| format!("batch={n}"));
        let options = batch.into_iter().chain(self.degrade.sets()).chain(self.method.sets());
        options.chain(self.sets.iter().cloned()).collect()
    }
}

/// A finished comparison, as `compare.json` has it.
#[derive(Debug, Serialize, Deserialize)]
struct Finished {
    ok: bool,
    title: String,
    every: u64,
    samples: usize,
    command: String,
    comparison: Comparison,
    base: Vec<Curve>,
    trajectory: Vec<Curve>,
}

impl Finished {
    fn read(dir: &Path) -> Result<Self> {
        let file = dir.join("compare.json");
        let bytes = crate::files::read(&file, crate::files::JSON).with_context(|| file.display().to_string())?;
        serde_json::from_slice(&bytes)
            .map_err(|e| Error::usage(format!("not a finished comparison: {e}")))
            .with_context(|| file.display().to_string())
    }
    fn group(&self) -> compare::Group<'_> {
        compare::Group { title: &self.title, base: &self.base, trajectory: &self.trajectory }
    }
}

/// Time left, from the runs that are done and the share of the present one.
struct Eta {
    started: Instant,
    runs: usize,
    done: usize,
}

impl Eta {
    fn left(&self, share: f64) -> f64 {
        let done = self.done as f64 + share;
        self.started.elapsed().as_secs_f64() * (self.runs as f64 - done) / done.max(1e-9)
    }
}

/// What the distance is taken of.
#[allow(clippy::large_enum_variant, reason = "there is one in the process")]
enum Space {
    /// Features of images.
    Images { network: FeatureNet, reference: Statistics, range: [f64; 2], decoder: Option<Decoder> },
    /// The values of samples that are no images, or their features.
    Values { network: Option<FeatureNet>, reference: values::Reference },
}

/// Frechet distance of a student's samples, always of the same noise and conditions.
struct FrechetJudge {
    space: Space,
    noise: HostTensor,
    conditions: crate::diffusion::HostConditions,
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
            let made = convert::to_host(&made)?;
            parts.push(match &mut self.space {
                Space::Images { decoder: Some(decoder), .. } => decoder.decode(&made)?,
                _ => made,
            });
        }
        let made = HostTensor::concat_rows(&parts)?;
        match &mut self.space {
            Space::Images { network, reference, range, .. } => {
                let features = network.features(&ImageSet::from_samples(made, *range)?, 256, |_| {})?;
                frechet::distance(&Statistics::of(&features)?, reference)
            }
            Space::Values { network, reference } => {
                let count = made.shape()[0];
                let mut source = Source::Values(made);
                let row = reference.measure(
                    "the student",
                    &mut source,
                    &Draw::default(),
                    network.as_mut(),
                    (count, 1),
                    Estimator::default(),
                    |_| {},
                )?;
                row.frechet.ok_or_else(|| Error::mismatch("the student's samples have no Frechet distance"))
            }
        }
    }
}

impl CompareArgs {
    fn judge(&self, config: &Config, denoiser: &Denoiser, student: Option<&Student>) -> Result<FrechetJudge> {
        let card = denoiser.card();
        let options = EngineOptions { threads: Some(config.threads).filter(|t| *t > 0), ..EngineOptions::default() };
        let space = self.space(config, card, &options)?;
        let row = student.map_or_else(|| card.shape.clone(), Student::noise_shape);
        let noise = crate::noise::batch_noise(LOOKS, 0, self.samples, row.iter().product());
        let size: Vec<usize> = std::iter::once(self.samples).chain(row).collect();
        Ok(FrechetJudge {
            space,
            noise: HostTensor::new(&size, &noise)?,
            conditions: batches::conditions(config, card)?.of_images(card, LOOKS, 0, self.samples)?,
            batch: config.batch,
        })
    }

    fn space(&self, config: &Config, card: &TeacherCard, options: &EngineOptions) -> Result<Space> {
        let open = |path: &PathBuf| FeatureNet::open(path, &FeatureOptions::default(), options);
        let mut network = self.features.as_ref().map(open).transpose()?;
        let decoder = run::sheets::decoder(config, card)?;
        if decoder.is_none() && card.image_shape().is_none() {
            let mut source = Source::open_values(&self.reference, &[], options)?;
            let count = source.len().ok_or_else(|| {
                Error::usage(format!("{} holds no samples", self.reference.display()))
                    .hint("give the real samples themselves: .npy, .npz, .csv or an IDX file")
            })?;
            let draw = Draw::default();
            let reference =
                values::Reference::collect(&mut source, &draw, network.as_mut(), count, self.samples, |_| {})
                    .with_context(|| self.reference.display().to_string())?;
            reference.check("the student", &card.shape)?;
            return Ok(Space::Values { network, reference });
        }
        let range = decoder.as_ref().map(|_| Decoder::RANGE).or(card.range).ok_or_else(|| {
            Error::usage("the teacher makes latents, which have no image distance")
                .hint("log.decoder = \"decoder.onnx\" makes images of them")
        })?;
        let Some(mut network) = network else {
            return Err(Error::usage("--features is missing: images are compared in the space of a feature network")
                .hint("for instance an Inception network as ONNX; see `disback evaluate --help`"));
        };
        let images = ImageSet::open(&self.reference, range)?;
        if let Some(why) = images.doubt()? {
            return Err(Error::usage(format!("{}: {why}", self.reference.display()))
                .hint("floats are read in the range of the teacher's samples: scale them, or give 8-bit images"));
        }
        let reference = Statistics::of(&network.features(&images, 256, |_| {})?)?;
        Ok(Space::Images { network, reference, range, decoder })
    }
}

pub fn run(args: &CompareArgs, globals: Globals) -> Result<ExitCode> {
    Place::refuse("compare")?;
    let config = args.teacher.reading.with_card(Config::resolve(args.config.as_deref(), &args.sets())?);
    if !config.degrade.nodes.any() {
        return Err(Error::usage("degrade.nodes is 0: there is no trajectory to compare with"));
    }
    if args.samples < 2 || args.seeds.is_empty() {
        return Err(Error::usage("a comparison needs two samples and one seed at least"));
    }
    if let Some(twice) = args.seeds.iter().find(|s| args.seeds.iter().filter(|o| o == s).count() > 1) {
        return Err(Error::usage(format!("--seeds has {twice} twice: the same runs would count as two")));
    }
    if args.every == Some(0) {
        return Err(Error::usage("--every is 0, expected 1 or more generator updates between two looks"));
    }
    let place = device::parse(&config.device)?;
    device::set_threads(config.threads);
    let teacher = args.teacher.load(&config, place)?;
    let denoiser = run::denoiser(&teacher, &config)?;
    run::checks::check_stage_two(&config, &denoiser)?;
    let file = origin::load(&config, &teacher, place)?;
    let student = origin::given(file.as_ref(), &denoiser, &config)?;
    let reading = &args.teacher.reading;
    let request = Request {
        freeze: reading.freeze.clone(),
        train: reading.train.clone(),
        ..Request::new(&args.teacher.teacher, &args.out)
    };
    run::memory::foresee(&config, &request, (&teacher, &denoiser, student.as_ref()), place, false)?;
    let every = args.every.unwrap_or(config.backtrack.updates / 20).max(1);
    let arm = |seed, with| match args.budget {
        Some(budget) => compare::within(compare::arm(&config, seed, with), budget),
        None => Ok(compare::arm(&config, seed, with)),
    };
    let beside = args.beside.iter().map(|dir| Finished::read(dir)).collect::<Result<Vec<_>>>()?;
    arm(0, true)?;
    let mut judge = args.judge(&config, &denoiser, student.as_ref())?;
    check_out(&args.out)?;
    signals::watch()?;
    signals::at_work();
    std::fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let (mut base, mut trajectory): (Vec<Curve>, Vec<Curve>) = (Vec::new(), Vec::new());
    let mut eta = Eta { started: Instant::now(), runs: 2 * args.seeds.len(), done: 0 };
    for &seed in &args.seeds {
        for with in [false, true] {
            let name = format!("{}-seed-{seed}", if with { "trajectory" } else { "base" });
            let arm = arm(seed, with)?;
            let dir = match &args.base {
                Some(earlier) if !with && earlier.join(&name).is_dir() => earlier.join(&name),
                _ => args.out.join(&name),
            };
            let total = arm.backtrack.updates;
            let mut note = |p: Point| {
                if !globals.quiet && !globals.json {
                    let left = eta.left(p.updates as f64 / total as f64);
                    tell!(
                        "{name} ({} of {}): update {}/{total}  distance {:.3}  {:.0} s  ETA of all {left:.0} s",
                        eta.done + 1,
                        eta.runs,
                        p.updates,
                        p.distance,
                        p.seconds
                    );
                }
            };
            let began = Instant::now();
            match compare::run_arm(&arm, &denoiser, student.as_ref(), &dir, every, &mut judge, &STOP, &mut note)? {
                Some(curve) if with => trajectory.push(curve),
                Some(curve) => base.push(curve),
                None => {
                    if !globals.quiet {
                        tell!("stopped; the same command goes on with {name}");
                    }
                    return Ok(ExitCode::from(signals::exit_code()));
                }
            }
            // A run that was read back says nothing about the time of the others.
            if began.elapsed().as_secs_f64() < 0.5 {
                eta.runs -= 1;
            } else {
                eta.done += 1;
            }
        }
    }
    let objective = origin::objective_name(&config);
    let found = Finished {
        ok: true,
        title: format!(
            "{objective}: Frechet distance of {} samples, {} seed{}",
            args.samples,
            args.seeds.len(),
            if args.seeds.len() == 1 { "" } else { "s" }
        ),
        every,
        samples: args.samples,
        command: super::command_line(),
        comparison: compare::compare(&base, &trajectory)?,
        base,
        trajectory,
    };
    let file = |name: &str| args.out.join(name);
    let all: Vec<&Finished> = beside.iter().chain([&found]).collect();
    let title =
        if beside.is_empty() { &*found.title } else { "Frechet distance, means and standard deviations over seeds" };
    if let Some(svg) = compare::svg(title, &all.iter().map(|o| o.group()).collect::<Vec<_>>()) {
        crate::files::write_atomic(&file("compare.svg"), svg.as_bytes())?;
    }
    let text = markdown(&all);
    crate::files::write_atomic(&file("compare.md"), text.as_bytes())?;
    let bytes = serde_json::to_vec_pretty(&found).map_err(|e| Error::io(e.to_string()))?;
    crate::files::write_atomic(&file("compare.json"), &bytes)?;
    if globals.json {
        println!("{}", serde_json::to_string(&found).map_err(|e| Error::io(e.to_string()))?);
    } else if !globals.quiet {
        say!("{text}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Refuses a folder of something else.
fn check_out(out: &Path) -> Result<()> {
    let entries = match std::fs::read_dir(out) {
        Ok(entries) => entries.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect::<Vec<_>>(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::from(e).context(out.display().to_string())),
    };
    let ours = |name: &String| ["base-seed-", "trajectory-seed-", "compare."].iter().any(|s| name.starts_with(s));
    match entries.is_empty() || entries.iter().any(ours) {
        true => Ok(()),
        false => Err(Error::usage(format!("output folder {} holds something other than a comparison", out.display()))
            .hint("give a new folder, or that of a comparison that was interrupted")),
    }
}

/// The table, a column for each comparison, with the verdicts and the commands.
fn markdown(all: &[&Finished]) -> String {
    let name = |o: &Finished| o.title.split(':').next().unwrap_or_default().to_owned();
    let mut text = String::new();
    let titles: Vec<&str> = all.iter().map(|o| &*o.title).collect();
    text += &format!("# {}\n\nMeans over seeds with 95 % intervals.\n\n|", titles.join("; "));
    for outcome in all {
        text += &format!(" | {}", name(outcome));
    }
    text += &format!(" |\n|{}\n", "---|".repeat(all.len() + 1));
    type Cell = fn(&Comparison) -> Option<Interval>;
    let rows: [(&str, Cell); 9] = [
        ("final distance, base method", |c| Some(c.base)),
        ("final distance, trajectory", |c| Some(c.trajectory)),
        ("final distance, trajectory over base", |c| Some(c.final_ratio)),
        ("share of updates to the base method's final distance", |c| c.updates),
        ("share of forward passes, stage 1 counted", |c| c.forwards),
        ("share of seconds, stage 1 counted", |c| c.seconds),
        ("share of updates, the base method itself", |c| Some(c.base_updates)),
        ("updates to the base method's distance at a quarter of its run, over its own", |c| c.early_updates),
        ("the same in forward passes, stage 1 counted", |c| c.early_forwards),
    ];
    for (what, cell) in rows {
        text += &format!("| {what} |");
        for outcome in all {
            let c = &outcome.comparison;
            let never = || {
                let never = c.seeds.iter().filter(|s| s.updates.is_none()).count();
                format!("never in {never} of {} seeds", c.seeds.len())
            };
            text += &format!(" {} |", cell(c).map_or_else(never, |i| i.to_string()));
        }
        text.push('\n');
    }
    for outcome in all {
        let verdict = &outcome.comparison.verdict;
        text += &format!("\n{}: {verdict}\n\nCommand: `{}`\n", name(outcome), outcome.command);
    }
    text
}
