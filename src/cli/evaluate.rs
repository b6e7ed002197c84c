//! `disback evaluate`: distances between sets of images, or of other samples by their values.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::Globals;
use super::card_args::CardArgs;
use super::engine::EngineArgs;
use super::evaluate_table as show;
use crate::diffusion::{Guidance, Sampler};
use crate::error::{Context, Error, Result};
use crate::eval::collect::{Collected, Wanted};
use crate::eval::evaluation::{EvaluationRow, Plan, measure, reference};
use crate::eval::features::FeatureOptions;
use crate::eval::kernel::Estimator;
use crate::eval::sliced::Patches;
use crate::eval::source::Draw;
use crate::eval::sweep::{self, Book, Entry, Neighbours};
use crate::eval::values::Reference;
use crate::eval::{FeatureNet, Source, neighbours, room};
use crate::io::ImageSet;
use crate::io::images::Rounding;
use crate::report::grid;
use crate::runtime::student::SampleRequest;
use crate::shown::tell;
use crate::tensor::HostTensor;

/// Compare generated images with a reference: Frechet and kernel distance, precision, recall, density, coverage, Inception
/// Score in the feature space of any ONNX network, and the sliced Wasserstein distance without one. Samples that are no images
/// are measured by their values, where --features names no network for them.
#[derive(Debug, Args)]
pub struct EvaluateArgs {
    /// The generated sets and, last, the reference. Each is a student.onnx, a teacher with its card, a folder or .zip of
    /// image files, a .npy, a .npz of images, an IDX file (MNIST's form, packed by gzip or not); the reference may also be a .npz
    /// with `mu` and `sigma`. Samples that are no images are read from a .npy, .npz or .csv.
    #[arg(required = true, num_args = 1..)]
    sets: Vec<PathBuf>,
    /// All students of a run directory (snapshots, best.onnx, student.onnx), without those measured before in the same way;
    /// names the best and keeps the figures in evaluation.json for the report.
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
    /// Measure the samples by their values, whatever they are: Frechet distance, kernel distance and coverage of the flattened
    /// samples (of their leading principal components where there are too few samples for so many values), sliced Wasserstein
    /// distance. So it is anyway where a set says that it holds no images.
    #[arg(long)]
    values: bool,
    /// ONNX network whose output is the feature space. Of samples that are no images it takes the values as they are.
    #[arg(long)]
    features: Option<PathBuf>,
    /// Its output to use, where it has several.
    #[arg(long)]
    feature_output: Option<String>,
    /// Value range of its input, as in -1,1 or 0,255.
    #[arg(long, value_name = "LOW,HIGH", allow_hyphen_values = true)]
    feature_range: Option<String>,
    /// An entry of its card: size=[299,299], resize=bicubic-antialias, mean=[...], std=[...], logits=NAME, channels=3.
    #[arg(long, value_name = "KEY=VALUE")]
    feature_card: Vec<String>,
    /// Value range of float arrays [default: -1,1, refused where the values speak against it].
    #[arg(long, value_name = "LOW,HIGH", allow_hyphen_values = true)]
    range: Option<String>,
    /// How floats become 8 bits.
    #[arg(long, value_enum, default_value = "edm")]
    rounding: Rounding,
    /// Images or samples of each generated set (the first ones of a folder); as many as the reference has, else 5000.
    #[arg(short = 'n', long = "number")]
    number: Option<usize>,
    /// Blocks of that many images, each with its own seeds: means, their deviation and the least.
    #[arg(long, default_value_t = 1)]
    repeats: usize,
    /// Seed of what is sampled.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Classes of the samples in turn, as in 0-9; drawn from the seed where absent.
    #[arg(long)]
    classes: Option<String>,
    /// Rows for a condition that is not a class, as in text=embeddings.npy.
    #[arg(long = "condition", value_name = "INPUT=FILE.npy")]
    conditions: Vec<String>,
    /// Sampler of teachers.
    #[arg(long, value_enum, default_value = "heun")]
    sampler: Sampler,
    /// Its steps; a list gives a row for each, as in 5,9,18.
    #[arg(long, value_name = "N,...", default_value = "18", value_delimiter = ',')]
    steps: Vec<usize>,
    /// Time shift of these steps for teachers that are flows, t' = s t / (1 + (s - 1) t): above 1 more steps at high noise. 0: the
    /// card's.
    #[arg(long, value_name = "S", default_value_t = 0.0)]
    shift: f64,
    /// Guidance scale of teachers; 1: none. Classifier-free without --guidance-by.
    #[arg(long, default_value_t = 1.0)]
    guidance: f64,
    /// A weaker network (ONNX, with its card) that guides the teachers, in the place of the teachers without conditions: autoguidance.
    #[arg(long, value_name = "FILE.onnx")]
    guidance_by: Option<PathBuf>,
    /// Share of the rescaling of guided outputs to the standard deviation that they have without guidance, 0 to 1.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    guidance_rescale: f64,
    #[command(flatten)]
    card: CardArgs,
    /// Also measure each class by itself. Holds the features of all images in memory.
    #[arg(long)]
    by_class: bool,
    /// Also the sliced Wasserstein distance; always without --features.
    #[arg(long)]
    sliced: bool,
    /// ONNX decoder of latents, for students and teachers that make latents: they are divided by the card's `latent_scale`
    /// and measured as the images in [-1, 1] that it makes.
    #[arg(long, value_name = "FILE.onnx")]
    decoder: Option<PathBuf>,
    /// Pairs of images that the kernel distance is a mean over. `subsets` (also called clean-fid, torch-fidelity) is noisier, and
    /// what published figures are.
    #[arg(long, value_enum, default_value = "full")]
    kernel: Estimator,
    /// Images a call of the networks.
    #[arg(long, default_value_t = 128)]
    batch: usize,
    /// Keep the reference's mean and covariance as a .npz (`mu`, `sigma`), to serve as reference later.
    #[arg(long, value_name = "FILE.npz")]
    save_statistics: Option<PathBuf>,
    /// Write a sheet of the first set's first images, each with the nearest reference images beside it.
    #[arg(long, value_name = "FILE.png")]
    neighbours: Option<PathBuf>,
    #[command(flatten)]
    engine: EngineArgs,
}

fn pair(name: &str, text: &str) -> Result<[f64; 2]> {
    let parts: Option<Vec<f64>> = text.split(',').map(|p| p.trim().parse().ok()).collect();
    match parts.as_deref() {
        Some([low, high]) if low < high => Ok([*low, *high]),
        _ => Err(Error::usage(format!("{name} {text}: expected LOW,HIGH"))),
    }
}

/// Generated images shown with their neighbours, and neighbours of each.
const QUERIES: usize = 8;
const NEAREST: usize = 7;

/// What is the same for all sets.
struct Judge<'a> {
    args: &'a EvaluateArgs,
    globals: Globals,
    net: Option<FeatureNet>,
    range: [f64; 2],
    draw: Draw,
    wanted: Wanted,
    reference: Collected,
    /// The reference where samples are measured by their values.
    values: Option<Reference>,
    reference_source: Source,
}

/// Whether samples are measured by their values: it is asked for, or one of the sets says that it holds no images.
fn by_values(args: &EvaluateArgs) -> Result<bool> {
    let students = args.run.as_deref().map(sweep::students).transpose()?.unwrap_or_default();
    let card = args.card.overrides();
    let found = args.values || args.sets.iter().chain(students.first()).any(|path| Source::is_no_image(path, &card));
    if found && args.by_class {
        return Err(Error::usage("--by-class is for images with --features"));
    }
    if found && (args.save_statistics.is_some() || args.neighbours.is_some()) {
        return Err(Error::usage("--save-statistics and --neighbours are for images with --features")
            .hint("give the reference's samples themselves"));
    }
    Ok(found)
}

impl EvaluateArgs {
    /// Guidance of the teachers. Errors: what says something of a guidance that there is not.
    fn guidance(&self) -> Result<Guidance> {
        if !(self.guidance.is_finite() && self.guidance >= 0.0) {
            return Err(Error::usage(format!("--guidance {}: expected a number of 0 or more", self.guidance)));
        }
        let said =
            [("--guidance-by", self.guidance_by.is_some()), ("--guidance-rescale", self.guidance_rescale != 0.0)];
        if let Some((option, _)) = said.iter().find(|(_, given)| self.guidance == 1.0 && *given) {
            return Err(Error::usage(format!("{option} without --guidance: nothing is guided"))
                .hint(format!("--guidance 2 guides; or leave {option} out")));
        }
        Guidance::everywhere(self.guidance).rescaled(self.guidance_rescale).context("--guidance-rescale")
    }

    /// Refuses options that say how teachers sample where there is none.
    fn check_teachers(&self) -> Result<()> {
        if self.shift != 0.0 && !(self.shift.is_finite() && self.shift > 0.0) {
            return Err(Error::usage(format!(
                "--shift {}: expected a number above 0, or 0 for the card's",
                self.shift
            )));
        }
        let said = [
            ("--shift", self.shift != 0.0),
            ("--guidance", self.guidance != 1.0),
            ("--guidance-by", self.guidance_by.is_some()),
            ("--guidance-rescale", self.guidance_rescale != 0.0),
        ];
        match said.iter().find(|(_, given)| *given) {
            Some((option, _)) if !self.sets.iter().any(|set| Source::is_teacher(set)) => Err(Error::usage(format!(
                "{option} says how teachers sample, but none of the sets is a teacher"
            ))
            .hint("students make their samples in the steps, and with the guidance, that they were trained for")),
            _ => Ok(()),
        }
    }

    /// A set of images as it is measured. Floats that do not look like ones of the range need `--range`.
    fn images(&self, set: ImageSet, path: &Path) -> Result<ImageSet> {
        if let (None, Some(why)) = (&self.range, set.doubt()?) {
            return Err(Error::usage(format!("{}: {why}", path.display())).hint(
                "--range 0,1 or --range 0,255 says how floats are read; --range -1,1 that they are right as they are",
            ));
        }
        Ok(set.with_rounding(self.rounding))
    }
}

/// A set that takes less is not worth a line.
const WORTH_A_LINE: u64 = 64 << 20;

/// Says what a large set takes in memory, before it is gathered. Errors: more than there is.
fn foresee(
    args: &EvaluateArgs,
    globals: Globals,
    name: &str,
    source: &Source,
    count: usize,
    values: bool,
) -> Result<()> {
    let told = room::foresee(source, count, values, args.batch).map_err(|e| e.context(name))?;
    if let Some((_, text)) = told.filter(|(bytes, _)| *bytes >= WORTH_A_LINE && !globals.quiet && !globals.json) {
        tell!("{name}: {text}");
    }
    Ok(())
}

impl Judge<'_> {
    fn open(&self, path: &Path) -> Result<Source> {
        let options = self.args.engine.options(&[self.args.batch])?;
        let card = self.args.card.overrides();
        let source = match self.values {
            Some(_) => Source::open_values(path, &card, &options)?,
            None => Source::open_with(path, self.range, &card, &options)?,
        };
        let source = source.guided_by(path, self.args.guidance_by.as_deref(), &options).context("--guidance-by")?;
        let source = source.decoded(self.args.decoder.as_deref(), &options)?;
        Ok(match source {
            Source::Images(set) => Source::Images(self.args.images(set, path)?),
            Source::Statistics(_) => {
                return Err(Error::usage(format!(
                    "{} is a file of statistics: it can only be the reference, the last one",
                    path.display()
                )));
            }
            other => other,
        })
    }

    /// Images a block for a source.
    fn images(&self, source: &Source) -> usize {
        let own = source.len().map(|n| n / self.args.repeats.max(1));
        let reference = Some(self.reference.count).filter(|n| *n > 0);
        match (self.args.number, own) {
            (Some(n), _) => n,
            (None, Some(own)) => own,
            (None, None) => reference.unwrap_or(5000),
        }
    }

    fn measure(&mut self, name: &str, source: &mut Source, steps: usize) -> Result<(EvaluationRow, Collected)> {
        let draw = Draw { steps, ..self.draw.clone() };
        let (blocks, kernel) = (self.args.repeats.max(1), self.args.kernel);
        let plan = Plan { images: self.images(source), blocks, wanted: self.wanted, kernel };
        foresee(self.args, self.globals, name, source, plan.images, self.values.is_some())?;
        let bar = super::progress(self.globals, (plan.images * plan.blocks) as u64, name);
        let seen = |n: usize| bar.inc(n as u64);
        let out = match &self.values {
            Some(values) => {
                let size = (plan.images, plan.blocks);
                (values.measure(name, source, &draw, self.net.as_mut(), size, kernel, seen)?, Collected::default())
            }
            None => measure(name, source, &draw, self.net.as_mut(), &self.reference, &plan, seen)?,
        };
        bar.finish_and_clear();
        Ok(out)
    }

    /// Rows of one path: a teacher has one for each number of steps.
    fn rows(&mut self, path: &Path) -> Result<Vec<(EvaluationRow, Collected)>> {
        let mut source = self.open(path)?;
        let name = path.display().to_string();
        if source.kind() != "teacher" {
            return Ok(vec![self.measure(&name, &mut source, 0)?]);
        }
        let sampler = format!("{:?}", self.args.sampler).to_lowercase();
        let steps = self.args.steps.clone();
        let row = |s: &usize| self.measure(&format!("{name}, {sampler} {s}"), &mut source, *s);
        steps.iter().map(row).collect()
    }

    /// What decides a figure beside the set itself.
    fn setting(&self) -> Result<String> {
        let statistics = self.reference.statistics.as_ref().map(|s| {
            let trace: f64 = s.covariance.diag().iter().sum();
            format!("{:?} {trace:?} {}", s.mean.to_vec(), self.reference.count)
        });
        let args = self.args;
        let mut parts = json!({
            "network": self.net.as_ref().map(FeatureNet::fingerprint), "reference": statistics,
            "patches": self.reference.patches.as_ref().map(Patches::digest),
            "number": args.number.unwrap_or(self.reference.count), "repeats": args.repeats, "seed": args.seed,
            "classes": args.classes, "conditions": args.conditions, "rounding": args.rounding.formula(),
            "by_class": args.by_class, "decoder": args.decoder, "sliced": self.wanted.patches, "kernel": args.kernel,
        });
        if let Some(values) = &self.values {
            parts["values"] = json!(values.digest());
        }
        Ok(sweep::setting(&parts))
    }

    /// The sheet of neighbours and what it shows.
    fn neighbours(&mut self, path: &Path, source: &mut Source, set: &Collected) -> Result<Vec<Neighbours>> {
        let (Some(a), Some(b)) = (&set.rows, &self.reference.rows) else {
            return Err(Error::usage("neighbours need a feature network and reference images, not only statistics"));
        };
        let found = neighbours::nearest(a, b, QUERIES, NEAREST)?;
        let (mut tiles, mut out) = (Vec::new(), Vec::new());
        for (query, nearest) in found.iter().enumerate() {
            let image = set.chosen[query];
            tiles.push(source.draw(&self.draw, image, 1)?.images);
            let places: Vec<(usize, f64)> = nearest.iter().map(|(j, d)| (self.reference.chosen[*j], *d)).collect();
            for (place, _) in &places {
                tiles.push(self.reference_source.draw(&self.draw, *place, 1)?.images);
            }
            out.push(Neighbours { image, nearest: places });
        }
        let sheet = HostTensor::concat_rows(&tiles)?.cast(crate::tensor::DType::F32);
        grid::write(path, &sheet, Some([0.0, 255.0]), Some(NEAREST.min(self.reference.chosen.len()) + 1))?;
        Ok(out)
    }
}

fn judge<'a>(args: &'a EvaluateArgs, reference_path: &Path, globals: Globals) -> Result<Judge<'a>> {
    let options = args.engine.options(&[args.batch])?;
    let range = args.range.as_deref().map_or(Ok([-1.0, 1.0]), |text| pair("--range", text))?;
    if args.repeats == 0 || args.number == Some(0) || args.batch == 0 {
        return Err(Error::usage("--repeats, --number and --batch start at 1"));
    }
    let feature_range = args.feature_range.as_deref().map(|t| pair("--feature-range", t)).transpose()?;
    let card = args.feature_card.clone();
    let wanted = FeatureOptions { output: args.feature_output.clone(), range: feature_range, card };
    let mut net = args.features.as_deref().map(|f| FeatureNet::open(f, &wanted, &options)).transpose()?;
    let classes = args.classes.as_deref().map(super::sample::parse_classes).transpose()?.unwrap_or_default();
    let embeddings = super::sample::read_conditions(&args.conditions)?;
    let draw = Draw {
        request: SampleRequest { seed: args.seed, classes, embeddings, batch: args.batch },
        rounding: args.rounding,
        sampler: args.sampler,
        steps: args.steps.first().copied().unwrap_or(18),
        shift: args.shift,
        guidance: args.guidance()?,
    };
    let values = by_values(args)?;
    let wanted = Wanted { rows: net.is_some(), classes: args.by_class, patches: args.sliced || net.is_none() };
    let card = args.card.overrides();
    let mut source = match values {
        true => Source::open_values(reference_path, &card, &options)?,
        false => Source::open_with(reference_path, range, &card, &options)?,
    };
    source = source.guided_by(reference_path, args.guidance_by.as_deref(), &options).context("--guidance-by")?;
    source = source.decoded(args.decoder.as_deref(), &options)?;
    if let Source::Images(set) = source {
        source = Source::Images(args.images(set, reference_path)?);
    }
    if args.by_class && (net.is_none() || matches!(source, Source::Statistics(_))) {
        return Err(Error::usage("--by-class needs --features and reference images with classes"));
    }
    let count = source.len().or(args.number).unwrap_or(5000);
    foresee(args, globals, &reference_path.display().to_string(), &source, count, values)?;
    let bar = super::progress(globals, count as u64, if values { "reference samples" } else { "reference images" });
    let seen = |n: usize| bar.inc(n as u64);
    let context = |e: Error| e.context(reference_path.display().to_string());
    let (reference, values) = match values {
        true => {
            let samples = args.number.unwrap_or(count);
            let values = Reference::collect(&mut source, &draw, net.as_mut(), count, samples, seen).map_err(context)?;
            (Collected { count, ..Collected::default() }, Some(values))
        }
        false => (reference(&mut source, &draw, net.as_mut(), count, wanted, seen).map_err(context)?, None),
    };
    bar.finish_and_clear();
    if let Some(path) = &args.save_statistics {
        match &reference.statistics {
            Some(s) => s.write(path)?,
            None => return Err(Error::usage("--save-statistics needs --features")),
        }
    }
    Ok(Judge { args, globals, net, range, draw, wanted, reference, values, reference_source: source })
}

/// Measures the students of a run, each setting once.
fn sweep_run(judge: &mut Judge<'_>, run: &Path, others: &[EvaluationRow]) -> Result<(Vec<EvaluationRow>, Book)> {
    let students = sweep::students(run)?;
    let setting = judge.setting()?;
    let mut book = Book::read(run)?;
    book.turn_to(&setting);
    book.others = others.to_vec();
    book.command = Some(super::command_line());
    book.reference = judge.args.sets.last().map(|p| p.display().to_string());
    let mut rows = Vec::new();
    for path in &students {
        let file = path.strip_prefix(run).unwrap_or(path).display().to_string().replace('\\', "/");
        let hash = sweep::hash_file(path)?;
        let known = book.find(&hash, &setting).cloned();
        let row = match known {
            Some(row) => EvaluationRow { name: file.clone(), ..row },
            None => {
                let mut source = judge.open(path)?;
                judge.measure(&file, &mut source, 0)?.0
            }
        };
        book.insert(Entry { file, hash, setting: setting.clone(), row: row.clone() });
        // After each: what was measured stays measured.
        book.write(run)?;
        rows.push(row);
    }
    if let (Some(best), Some(_), true) = (book.best.clone(), &judge.reference.rows, judge.wanted.rows) {
        let mut source = judge.open(&run.join(best))?;
        let wanted = Wanted { rows: true, ..Wanted::default() };
        let span = (0, QUERIES.max(2));
        let set =
            crate::eval::collect::collect(&mut source, &judge.draw.clone(), judge.net.as_mut(), span, wanted, |_| {})?;
        crate::files::make_inside(run, "samples").with_context(|| run.join("samples").display().to_string())?;
        book.neighbours = judge.neighbours(&run.join("samples/neighbours.png"), &mut source, &set)?;
    }
    book.write(run)?;
    Ok((rows, book))
}

/// Runs the command. Errors: fewer sets than the options need; a set that cannot be read.
pub fn run(args: &EvaluateArgs, globals: Globals) -> Result<ExitCode> {
    let (reference, generated) = args.sets.split_last().ok_or_else(|| Error::usage("no sets"))?;
    if generated.is_empty() && args.run.is_none() && args.save_statistics.is_none() {
        return Err(Error::usage("one set alone: give the generated set, then the reference").hint(
            "--save-statistics FILE.npz keeps the statistics of one set; --run DIR measures the students of a run",
        ));
    }
    args.check_teachers()?;
    let mut judge = judge(args, reference, globals)?;
    let mut rows = Vec::new();
    for (k, path) in generated.iter().enumerate() {
        let found = judge.rows(path)?;
        if let (0, Some(sheet), Some((_, set))) = (k, &args.neighbours, found.first()) {
            let mut source = judge.open(path)?;
            let set = set.clone();
            judge.neighbours(sheet, &mut source, &set)?;
        }
        rows.extend(found.into_iter().map(|(row, _)| row));
    }
    let mut best = None;
    if let Some(run) = &args.run {
        let (students, book) = sweep_run(&mut judge, run, &rows)?;
        rows.splice(0..0, students);
        best = book.best;
    }
    show::print(&show::Shown {
        rows: &rows,
        best: best.as_deref(),
        reference,
        net: judge.net.as_ref().zip(args.features.as_deref()),
        rounding: args.rounding,
        saved: args.save_statistics.as_deref(),
        globals,
    });
    Ok(ExitCode::SUCCESS)
}
