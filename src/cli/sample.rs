//! `disback sample`: images from a student.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use serde_json::json;

use super::Globals;
use super::engine::EngineArgs;
use crate::error::{Context, Error, Result};
use crate::io::images::{encode_png, quantise};
use crate::io::npy;
use crate::report::grid;
use crate::runtime::student::{Request, Student};
use crate::tensor::HostTensor;

/// Sample images from a student: image k of a seed is the same whatever the batch size, engine or machine.
#[derive(Debug, Args)]
pub struct SampleArgs {
    /// student.onnx.
    student: PathBuf,
    /// Number of images.
    #[arg(short = 'n', long = "number", default_value_t = 64)]
    number: usize,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Where to: a .png (one sheet), .npy (f32 [N,C,H,W]), .npz (`images` and `labels`), or a folder (one PNG an image).
    #[arg(short, long)]
    out: PathBuf,
    /// Classes of the images in turn, as in 0-9 or 3,1,4; drawn from the seed where absent.
    #[arg(long)]
    classes: Option<String>,
    /// Rows for a condition that is not a class, as in text=embeddings.npy.
    #[arg(long = "condition", value_name = "INPUT=FILE.npy")]
    conditions: Vec<String>,
    /// Images a call of the network.
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Images a row of the sheet; about square where absent.
    #[arg(long)]
    columns: Option<usize>,
    #[command(flatten)]
    engine: EngineArgs,
}

/// `0-9`, `3,1,4`, `0-4,9`.
pub(super) fn parse_classes(text: &str) -> Result<Vec<usize>> {
    let bad = || Error::usage(format!("--classes {text}: expected numbers and ranges, as in 0-9 or 3,1,4"));
    let mut classes = Vec::new();
    for part in text.split(',') {
        let part = part.trim();
        match part.split_once('-') {
            Some((a, b)) => {
                let (a, b): (usize, usize) = (a.parse().map_err(|_| bad())?, b.parse().map_err(|_| bad())?);
                if a > b || b - a > 1_000_000 {
                    return Err(bad());
                }
                classes.extend(a..=b);
            }
            None => classes.push(part.parse().map_err(|_| bad())?),
        }
    }
    Ok(classes)
}

/// `INPUT=FILE.npy` entries with their arrays.
pub(super) fn read_conditions(entries: &[String]) -> Result<Vec<(String, HostTensor)>> {
    let read = |entry: &String| {
        let (name, file) = entry
            .split_once('=')
            .ok_or_else(|| Error::usage(format!("--condition {entry}: expected INPUT=FILE.npy")))?;
        Ok((name.to_string(), npy::read(Path::new(file))?))
    };
    entries.iter().map(read).collect()
}

fn write(args: &SampleArgs, student: &Student, samples: &HostTensor, classes: Option<&[usize]>) -> Result<()> {
    let info = student.info();
    let extension = args.out.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
    match extension.as_str() {
        "png" => grid::write(&args.out, samples, info.range, args.columns),
        "npy" => npy::write(&args.out, samples),
        "npz" => {
            let labels = classes.map(|c| HostTensor::vec(&c.iter().map(|&k| k as i64).collect::<Vec<_>>()));
            let mut arrays = vec![("images", samples)];
            arrays.extend(labels.as_ref().map(|l| ("labels", l)));
            npy::write_npz(&args.out, &arrays)
        }
        _ => write_folder(&args.out, samples, info.range, info.shape),
    }
}

fn write_folder(folder: &Path, samples: &HostTensor, range: Option<[f64; 2]>, shape: [usize; 3]) -> Result<()> {
    let range = range.ok_or_else(|| {
        Error::usage("the student makes latents, which are no images").hint("write them with -o latents.npy")
    })?;
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let size: usize = shape.iter().product();
    for (k, image) in samples.to_f64().chunks_exact(size).enumerate() {
        let bytes: Vec<u8> = image.iter().map(|&x| quantise(x, range)).collect();
        crate::files::write_atomic(&folder.join(format!("{k:06}.png")), &encode_png(&bytes, shape)?)?;
    }
    Ok(())
}

pub fn run(args: &SampleArgs, globals: Globals) -> Result<ExitCode> {
    if args.number == 0 {
        return Err(Error::usage("--number 0: nothing to sample"));
    }
    let mut student = Student::open(&args.student, &args.engine.options()?)?;
    let embeddings = read_conditions(&args.conditions)?;
    let classes = args.classes.as_deref().map(parse_classes).transpose()?.unwrap_or_default();
    let request = Request { seed: args.seed, classes, embeddings, batch: args.batch };
    let labels = student.classes(&request, 0, args.number)?;
    let bar = super::progress(globals, args.number as u64, "images");
    let (mut parts, mut seconds) = (Vec::new(), 0.0);
    for start in (0..args.number).step_by(args.batch.max(1)) {
        let count = args.batch.max(1).min(args.number - start);
        let began = Instant::now();
        parts.push(student.sample(&request, start as u64, count)?);
        seconds += began.elapsed().as_secs_f64();
        bar.inc(count as u64);
    }
    bar.finish_and_clear();
    let samples = HostTensor::concat_rows(&parts)?;
    let broken = samples.to_f32().iter().filter(|v| !v.is_finite()).count();
    if broken > 0 {
        eprintln!("warning: {broken} values of the samples are NaN or infinite");
    }
    write(args, &student, &samples, labels.as_deref())?;
    let ms = seconds * 1e3 / args.number as f64;
    if globals.json {
        let out = json!({ "ok": true, "out": args.out, "images": args.number, "shape": samples.shape(), "seed": args.seed,
            "engine": student.engine_name(), "seconds": seconds, "ms_per_image": ms, "not_finite": broken });
        println!("{out}");
    } else if !globals.quiet {
        println!("{} images -> {} ({}, {ms:.2} ms an image)", args.number, args.out.display(), student.engine_name());
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn class_lists() {
        assert_eq!(parse_classes("0-3,9").unwrap(), [0, 1, 2, 3, 9]);
        assert_eq!(parse_classes(" 3, 1").unwrap(), [3, 1]);
        for bad in ["", "a", "3-1", "0-99999999999"] {
            assert_eq!(parse_classes(bad).unwrap_err().exit_code(), 2, "{bad}");
        }
    }
}
