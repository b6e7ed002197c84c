//! `disback sample`: images from a student.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use serde_json::json;

use super::Globals;
use super::engine::EngineArgs;
use crate::error::{Error, Result};
use crate::io::{ImageSet, Rounding, image_writer, npy};
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
    /// Where to: a .png (one sheet), .npy (f32 [N,C,H,W]), .npz (`images` and `labels`), a folder (one PNG an image) or a
    /// .zip of PNG files (EDM's data sets), both with the classes in dataset.json.
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
    /// 8-bit images [N,H,W,C] in a .npy, or as `arr_0` and `arr_1` (classes) in a .npz: ADM's batches.
    #[arg(long)]
    uint8: bool,
    /// How floats become 8 bits in PNG files and with --uint8.
    #[arg(long, value_enum, default_value = "edm")]
    rounding: Rounding,
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

/// A student's samples, batch by batch.
struct Samples<'a> {
    student: &'a mut Student,
    request: &'a Request,
    number: usize,
    done: usize,
    bar: indicatif::ProgressBar,
    seconds: f64,
    broken: usize,
}

impl Samples<'_> {
    fn next(&mut self) -> Result<Option<HostTensor>> {
        let count = self.request.batch.max(1).min(self.number - self.done);
        if count == 0 {
            return Ok(None);
        }
        let began = Instant::now();
        let samples = self.student.sample(self.request, self.done as u64, count)?;
        self.seconds += began.elapsed().as_secs_f64();
        self.broken += samples.to_f32().iter().filter(|v| !v.is_finite()).count();
        self.done += count;
        self.bar.inc(count as u64);
        Ok(Some(samples))
    }

    fn all(&mut self) -> Result<HostTensor> {
        let mut parts = Vec::new();
        while let Some(part) = self.next()? {
            parts.push(part);
        }
        HostTensor::concat_rows(&parts)
    }

    /// The next batch as 8 bits.
    fn next_u8(&mut self, rounding: Rounding) -> Result<Option<HostTensor>> {
        let range = self.student.info().range.ok_or_else(|| {
            Error::usage("the student makes latents, which are no images").hint("write them with -o latents.npy")
        })?;
        let Some(samples) = self.next()? else { return Ok(None) };
        let count = samples.shape()[0];
        let first = self.done - count;
        let set = ImageSet::from_samples(samples, range)?.with_rounding(rounding);
        set.batch_u8(0, count).map(Some).map_err(|e| e.context(format!("samples {first} to {}", self.done - 1)))
    }
}

fn write(args: &SampleArgs, samples: &mut Samples<'_>, classes: Option<&[usize]>) -> Result<()> {
    let extension = args.out.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
    if args.uint8 && !matches!(extension.as_str(), "npy" | "npz") {
        return Err(Error::usage("--uint8 is for .npy and .npz; PNG files are 8 bits anyway"));
    }
    if matches!(
        extension.as_str(),
        "jpg" | "jpeg" | "webp" | "gif" | "bmp" | "tif" | "tiff" | "mp4" | "pt" | "safetensors"
    ) {
        return Err(Error::usage(format!("{}: .{extension} is not written", args.out.display()))
            .hint("a .png is one sheet; .npy and .npz hold numbers; a folder or a .zip gets a PNG for each image"));
    }
    let mut next = || samples.next_u8(args.rounding);
    match extension.as_str() {
        "npy" | "npz" if args.uint8 => image_writer::array(&args.out, classes, &mut next),
        "zip" => image_writer::zip(&args.out, classes, &mut next),
        "png" => {
            let range = samples.student.info().range;
            grid::write(&args.out, &samples.all()?, range, args.columns)
        }
        "npy" => npy::write(&args.out, &samples.all()?),
        "npz" => {
            let images = samples.all()?;
            let labels = classes.map(|c| HostTensor::vec(&c.iter().map(|&k| k as i64).collect::<Vec<_>>()));
            let mut arrays = vec![("images", &images)];
            arrays.extend(labels.as_ref().map(|l| ("labels", l)));
            npy::write_npz(&args.out, &arrays)
        }
        _ => image_writer::folder(&args.out, classes, &mut next),
    }
}

/// Runs the command. Errors: no image asked for, a file that is no student, conditions that do not fit it.
pub fn run(args: &SampleArgs, globals: Globals) -> Result<ExitCode> {
    if args.number == 0 {
        return Err(Error::usage("--number 0: nothing to sample"));
    }
    let mut student = Student::open(&args.student, &args.engine.options(&[args.batch])?)?;
    let embeddings = read_conditions(&args.conditions)?;
    let classes = args.classes.as_deref().map(parse_classes).transpose()?.unwrap_or_default();
    let request = Request { seed: args.seed, classes, embeddings, batch: args.batch };
    let labels = student.classes(&request, 0, args.number)?;
    let mut samples = Samples {
        bar: super::progress(globals, args.number as u64, "images"),
        student: &mut student,
        request: &request,
        number: args.number,
        done: 0,
        seconds: 0.0,
        broken: 0,
    };
    let written = write(args, &mut samples, labels.as_deref());
    samples.bar.finish_and_clear();
    written?;
    let (seconds, broken) = (samples.seconds, samples.broken);
    if broken > 0 {
        eprintln!("warning: {broken} values of the samples are NaN or infinite");
    }
    let ms = seconds * 1e3 / args.number as f64;
    if globals.json {
        let shape: Vec<usize> = std::iter::once(args.number).chain(student.info().shape.iter().copied()).collect();
        let out = json!({ "ok": true, "out": args.out, "images": args.number, "shape": shape, "seed": args.seed,
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
