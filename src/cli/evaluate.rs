//! `disback evaluate`: distances between two sets of images.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::Globals;
use super::engine::EngineArgs;
use crate::error::{Context, Error, Result};
use crate::eval::features::FeatureOptions;
use crate::eval::source::sample_images;
use crate::eval::{FeatureMatrix, FeatureNet, Scores, Source, Statistics, compare, frechet};
use crate::io::ImageSet;
use crate::io::images::describe;
use crate::runtime::student::Request;

/// Compare two sets of images in the feature space of an ONNX network: Frechet distance, kernel distance, precision, recall.
#[derive(Debug, Args)]
pub struct EvaluateArgs {
    /// The generated set: a student.onnx, a folder of PNG files, a .npy or a .npz.
    a: PathBuf,
    /// The reference: the same, or a .npz with `mu` and `sigma`.
    b: PathBuf,
    /// ONNX network whose output is the feature space.
    #[arg(long)]
    features: PathBuf,
    /// Its output to use, where it has several.
    #[arg(long)]
    feature_output: Option<String>,
    /// Value range of its input, as in -1,1 or 0,255.
    #[arg(long, value_name = "LOW,HIGH", allow_hyphen_values = true)]
    feature_range: Option<String>,
    /// Value range of float arrays.
    #[arg(long, value_name = "LOW,HIGH", default_value = "-1,1", allow_hyphen_values = true)]
    range: String,
    /// Images to use of each set (the first ones) and to sample from a student; as many as the other set has, else 5000.
    #[arg(short = 'n', long = "number")]
    number: Option<usize>,
    /// Seed of a student's samples.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Images a call of the networks.
    #[arg(long, default_value_t = 128)]
    batch: usize,
    /// Keep the mean and covariance of the second set as a .npz (`mu`, `sigma`), to serve as reference later.
    #[arg(long, value_name = "FILE.npz")]
    save_statistics: Option<PathBuf>,
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

/// One side after its features are known.
struct Side {
    path: PathBuf,
    features: Option<FeatureMatrix>,
    statistics: Statistics,
    shape: Option<[usize; 3]>,
}

fn side(
    args: &EvaluateArgs,
    path: &Path,
    source: Source,
    other: Option<usize>,
    net: &mut FeatureNet,
    globals: Globals,
) -> Result<Side> {
    let images = match source {
        Source::Statistics(statistics) => {
            return Ok(Side { path: path.to_path_buf(), features: None, statistics, shape: None });
        }
        Source::Images(set) => match args.number {
            Some(n) if n < set.len() => ImageSet::from_samples(set.batch_u8(0, n)?, [0.0, 255.0])?,
            _ => set,
        },
        Source::Student(mut student) => {
            let count = args.number.or(other).unwrap_or(5000);
            let request = Request { seed: args.seed, batch: args.batch, ..Request::default() };
            let bar = super::progress(globals, count as u64, "samples");
            sample_images(&mut student, &request, count, |n| bar.inc(n as u64))
                .with_context(|| path.display().to_string())?
        }
    };
    let bar = super::progress(globals, images.len() as u64, "features");
    let features =
        net.features(&images, args.batch, |n| bar.inc(n as u64)).with_context(|| path.display().to_string())?;
    bar.finish_and_clear();
    let statistics = Statistics::of(&features);
    Ok(Side { path: path.to_path_buf(), features: Some(features), statistics, shape: Some(images.shape()) })
}

pub fn run(args: &EvaluateArgs, globals: Globals) -> Result<ExitCode> {
    let options = args.engine.options()?;
    let range = pair("--range", &args.range)?;
    let feature_range = args.feature_range.as_deref().map(|t| pair("--feature-range", t)).transpose()?;
    let wanted = FeatureOptions { output: args.feature_output.clone(), range: feature_range };
    let mut net = FeatureNet::open(&args.features, &wanted, &options)?;
    let (a, b) = (Source::open(&args.a, range, &options)?, Source::open(&args.b, range, &options)?);
    if let Source::Statistics(_) = a {
        return Err(Error::usage("the first set is a file of statistics: give the generated images there"));
    }
    let (len_a, len_b) = (a.len(), b.len());
    let a = side(args, &args.a, a, len_b, &mut net, globals)?;
    let b = side(args, &args.b, b, len_a, &mut net, globals)?;
    if let (Some(x), Some(y)) = (a.shape, b.shape)
        && x != y
    {
        return Err(Error::mismatch(format!(
            "{} holds images of {}, {} of {}",
            a.path.display(),
            describe(x),
            b.path.display(),
            describe(y)
        )));
    }
    if let Some(path) = &args.save_statistics {
        b.statistics.write(path)?;
    }
    let mut out = json!({ "ok": true, "a": args.a, "b": args.b, "network": args.features, "output": net.output(),
        "input_range": net.range() });
    let mut warnings: Vec<String> = net.assumed().map(str::to_string).into_iter().collect();
    let scores = match (&a.features, &b.features) {
        (Some(x), Some(y)) => Some(compare(x, y)?),
        _ => None,
    };
    let distance = match &scores {
        Some(s) => s.frechet,
        None => frechet::distance(&a.statistics, &b.statistics)?,
    };
    if let Some(Scores { warnings: more, .. }) = &scores {
        warnings.extend(more.iter().cloned());
    }
    out["frechet"] = json!(distance);
    if let Some(s) = &scores {
        out["kernel"] = json!(s.kernel);
        out["kernel_standard_error"] = json!(s.kernel_standard_error);
        out["precision"] = json!(s.precision);
        out["recall"] = json!(s.recall);
        out["images"] = json!(s.images);
        out["features"] = json!(s.features);
    }
    out["warnings"] = json!(warnings);
    if globals.json {
        println!("{out}");
        return Ok(ExitCode::SUCCESS);
    }
    if !globals.quiet {
        warnings.iter().for_each(|w| eprintln!("warning: {w}"));
    }
    let mut table = super::table(["measure", "value"]);
    table.add_row(["Frechet distance", &format!("{distance:.4}")]);
    if let Some(s) = &scores {
        table.add_row(["kernel distance", &format!("{:.5} +- {:.5}", s.kernel, s.kernel_standard_error)]);
        table.add_row(["precision (quality)", &format!("{:.4}", s.precision)]);
        table.add_row(["recall (diversity)", &format!("{:.4}", s.recall)]);
        table.add_row(["images", &format!("{} against {}", s.images[0], s.images[1])]);
        table.add_row(["features", &format!("{} of {}", s.features, net.output())]);
    }
    println!("{table}");
    Ok(ExitCode::SUCCESS)
}
