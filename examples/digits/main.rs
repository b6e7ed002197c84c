//! The demo: distils the digits teacher into a one-step student, with and without the trajectory, and measures both
//! beside the teacher. `cargo run --release --example digits -- [--recipe demo|long] [--out runs/digits]`

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Parser;
use disback::diffusion::Sampler;
use disback::diffusion::teacher_engine::{TeacherOnEngine, TeacherRequest};
use disback::error::{Context, Error, Result};
use disback::eval::features::FeatureOptions;
use disback::eval::source::sample_images;
use disback::eval::{FeatureMatrix, FeatureNet, compare};
use disback::io::ImageSet;
use disback::run::{Finished, Request, Session};
use disback::runtime::student::{SampleRequest, Student};
use disback::runtime::{EngineKind, EngineOptions};
use disback::tensor::HostTensor;
use serde_json::{Value, json};

#[derive(Parser)]
struct Args {
    /// `demo` takes minutes, `long` half an hour.
    #[arg(long, default_value = "demo")]
    recipe: String,
    #[arg(long, default_value = "runs/digits")]
    out: PathBuf,
    /// Leave out the run without the trajectory.
    #[arg(long)]
    no_baseline: bool,
}

/// Images behind each distance. With fewer the noise of the estimate shows: two samples of 2048 real digits are 4 apart.
const IMAGES: usize = 5120;
const BATCH: usize = 64;
const TEACHER_STEPS: usize = 18;

fn main() {
    if let Err(e) = run(&Args::parse()) {
        eprintln!("error: {e}");
        std::process::exit(i32::from(e.exit_code()));
    }
}

fn run(args: &Args) -> Result<()> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/digits");
    let config = here.join(format!("{}.toml", args.recipe));
    let teacher = here.join("teacher.onnx");
    let baseline = args.out.with_file_name(format!("{}-baseline", name(&args.out)));
    forget(&args.out)?;
    distil(&teacher, &config, &args.out, &[])?;
    if !args.no_baseline {
        // The same loop, seeds and number of generator updates without stage 1: the base method.
        forget(&baseline)?;
        distil(&teacher, &config, &baseline, &["degrade.nodes=0"])?;
    }

    let engine = EngineOptions { engine: EngineKind::Auto, ..EngineOptions::default() };
    let mut judge = Judge::new(&here, &engine)?;
    let teacher = judge.teacher(&teacher, &engine)?;
    let student = judge.student(&args.out.join("student.onnx"), &engine)?;
    let baseline = if args.no_baseline { None } else { Some(judge.student(&baseline.join("student.onnx"), &engine)?) };
    let (apart, tract) = agreement(&args.out.join("student.onnx"))?;

    let path = args.out.join("summary.json");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let mut summary: Value = serde_json::from_str(&text).map_err(|e| Error::io(format!("{}: {e}", path.display())))?;
    summary["teacher"] = merged(summary["teacher"].take(), &teacher);
    summary["student"] = merged(summary["student"].take(), &student);
    if let Some(b) = &baseline {
        summary["baseline"] = b.clone();
    }
    summary["engines_max_abs"] = json!(apart);
    let bytes = serde_json::to_vec_pretty(&summary).map_err(|e| Error::io(e.to_string()))?;
    disback::files::write_atomic(&path, &bytes)?;
    let report = disback::report::html::write(&args.out)?;

    println!("\n{:<34} {:>9} {:>6} {:>12}", "distance to the real digits", "Frechet", "NFE", "ms an image");
    let row = |what: &str, v: &Value| {
        let number = |key: &str| v[key].as_f64().unwrap_or(f64::NAN);
        println!("{what:<34} {:>9.2} {:>6} {:>12.4}", number("frechet"), number("nfe"), number("ms_per_image"));
    };
    row("teacher, 18 Heun steps", &teacher);
    row("student after DisBack", &student);
    if let Some(b) = &baseline {
        row("student without the trajectory", b);
    }
    println!("\nONNX Runtime and {tract} make the same images: max abs difference {apart:.1e}");
    println!("student  {}\nreport   {}", args.out.join("student.onnx").display(), report.display());
    Ok(())
}

fn name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Removes an earlier demo run, and nothing else that may lie there.
fn forget(path: &Path) -> Result<()> {
    let parts = ["trajectory", "checkpoints"];
    if path.join("config.toml").is_file() && parts.iter().any(|p| path.join(p).is_dir()) {
        std::fs::remove_dir_all(path).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// Distils as `disback distill` does, whose command line is shown.
fn distil(teacher: &Path, config: &Path, out: &Path, sets: &[&str]) -> Result<()> {
    println!(
        "$ disback distill {} -o {} --config {}{}",
        shown(teacher),
        out.display(),
        shown(config),
        sets.iter().map(|s| format!(" --set {s}")).collect::<String>()
    );
    let request = Request { progress: true, ..Request::new(teacher, out).config_file(config) };
    let request = sets.iter().fold(request, |request, pair| request.set(*pair));
    match Session::open(request)?.distill()? {
        Finished::Distilled(made) => match made.failed() {
            None => Ok(()),
            Some((path, why)) => Err(Error::mismatch(format!("{}: {why}", path.display()))),
        },
        Finished::Recorded(_) | Finished::Stopped(_) | Finished::Followed => {
            Err(Error::mismatch("the run ended without a student"))
        }
    }
}

fn shown(path: &Path) -> String {
    path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap_or(path).display().to_string()
}

fn merged(mut into: Value, from: &Value) -> Value {
    match (into.as_object_mut(), from.as_object()) {
        (Some(into_map), Some(from)) => {
            into_map.extend(from.clone());
            into
        }
        _ => from.clone(),
    }
}

/// Every class as often as the others, for teacher and students alike.
fn request() -> SampleRequest {
    SampleRequest { batch: BATCH, classes: (0..10).collect(), ..SampleRequest::default() }
}

/// Distances in the classifier's feature space.
struct Judge {
    net: FeatureNet,
    real: FeatureMatrix,
}

impl Judge {
    fn new(here: &Path, engine: &EngineOptions) -> Result<Self> {
        let mut net = FeatureNet::open(&here.join("classifier.onnx"), &FeatureOptions::default(), engine)?;
        let digits = ImageSet::open(&here.join("digits.npz"), [-1.0, 1.0])?;
        let real = net.features(&digits, 256, |_| {})?;
        Ok(Self { net, real })
    }

    fn scores(&mut self, images: &ImageSet, nfe: usize, ms: f64, engine: String) -> Result<Value> {
        let features = self.net.features(images, 256, |_| {})?;
        let s = compare(&features, &self.real)?;
        Ok(json!({
            "frechet": s.frechet, "kernel": s.kernel, "precision": s.precision, "recall": s.recall,
            "nfe": nfe, "ms_per_image": ms, "images": IMAGES, "batch": BATCH, "engine": engine,
        }))
    }

    fn teacher(&mut self, path: &Path, engine: &EngineOptions) -> Result<Value> {
        let mut teacher = TeacherOnEngine::open(path, &[], engine)?;
        let request = TeacherRequest {
            images: request(),
            sampler: Sampler::Heun,
            steps: TEACHER_STEPS,
            shift: 0.0,
            guidance: 1.0.into(),
        };
        teacher.sample(&request, 0, BATCH)?;
        let started = Instant::now();
        let samples = teacher.sample(&request, 0, IMAGES)?;
        let ms = started.elapsed().as_secs_f64() * 1e3 / IMAGES as f64;
        let images = ImageSet::from_samples(samples.images, [-1.0, 1.0])?;
        self.scores(&images, samples.nfe, ms, teacher.engine_name())
    }

    fn student(&mut self, path: &Path, engine: &EngineOptions) -> Result<Value> {
        let mut student = Student::open(path, engine)?;
        let request = request();
        student.sample(&request, 0, BATCH)?;
        let started = Instant::now();
        let samples = student.sample(&request, 0, IMAGES)?;
        let ms = started.elapsed().as_secs_f64() * 1e3 / IMAGES as f64;
        drop(samples);
        let images = sample_images(&mut student, &request, IMAGES, |_| {})?;
        let engine = student.engine_name();
        self.scores(&images, 1, ms, engine)
    }
}

/// The same noise through both engines.
fn agreement(student: &Path) -> Result<(f64, String)> {
    let request = SampleRequest { batch: 16, ..SampleRequest::default() };
    let sample = |kind| -> Result<(HostTensor, String)> {
        let mut s = Student::open(student, &EngineOptions { engine: kind, ..EngineOptions::default() })?;
        Ok((s.sample(&request, 0, 16)?, s.engine_name()))
    };
    let (a, _) = sample(EngineKind::Auto)?;
    let (b, tract) = sample(EngineKind::Tract)?;
    let worst = a.to_f32().iter().zip(b.to_f32()).map(|(x, y)| f64::from((x - y).abs())).fold(0.0, f64::max);
    Ok((worst, tract))
}
