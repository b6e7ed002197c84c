//! `disback sample`: images, sound, tables and anything else from a student.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use serde_json::json;

use super::Globals;
use super::engine::EngineArgs;
use crate::error::{Error, Result};
use crate::io::{ImageSet, Rounding, image_writer, npy, table, wav};
use crate::report::view::{self, View};
use crate::runtime::student::{SampleRequest, Student, StudentInfo};
use crate::shown::{say, tell};
use crate::tensor::HostTensor;

/// Sample from a student: sample k of a seed is the same whatever the batch size, engine or machine.
#[derive(Debug, Args)]
pub struct SampleArgs {
    /// student.onnx.
    student: PathBuf,
    /// Number of samples.
    #[arg(short = 'n', long = "number", default_value_t = 64)]
    number: usize,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Where to: a .png (one picture of all: a sheet of images, slices or frames, or plots), .npy (f32 [N,...], such as
    /// [N,C,H,W]), .npz (`images`, or `samples` of what is no image, and `labels`), .csv (tables: a row a sample), .wav (sound;
    /// several are numbered), a folder (one PNG an image) or a .zip of PNG files (EDM's data sets), both with the classes in
    /// dataset.json.
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
    /// Images a row of the sheet (about square where absent); slices or frames of a volume or video; sequences side by side.
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
    request: &'a SampleRequest,
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

/// Formats that are asked for and not written.
const OTHERS: [&str; 13] =
    ["jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "mp4", "mp3", "flac", "ply", "pt", "safetensors"];

/// Refuses a file that the student's samples do not fit, before anything is sampled.
fn check(args: &SampleArgs, extension: &str, info: &StudentInfo) -> Result<()> {
    let view = View::of_student(info);
    let refuse =
        |why: String, hint: &str| Err(Error::usage(format!("{}: {why}", args.out.display())).hint(hint.to_string()));
    if args.uint8 && !matches!(extension, "npy" | "npz") {
        return Err(Error::usage("--uint8 is for .npy and .npz; PNG files are 8 bits anyway"));
    }
    if OTHERS.contains(&extension) {
        return refuse(
            format!(".{extension} is not written"),
            "a .png is one picture; .npy and .npz hold numbers, .csv tables, .wav sound; a folder or a .zip gets a PNG for each \
             image",
        );
    }
    let shape = crate::axes::written(&info.shape);
    match extension {
        "csv" if info.shape.len() != 1 => refuse(
            format!("a .csv holds tables, a row a sample; these samples are {shape}"),
            ".npy and .npz hold samples of any shape",
        ),
        "wav" => view.check_sound().map(|_| ()).map_err(|e| e.context(args.out.display().to_string())),
        "png" | "npy" | "npz" | "csv" if !args.uint8 => Ok(()),
        _ if info.image_shape().is_none() => refuse(
            format!("8-bit images are asked for; these samples are {shape}, which are no images"),
            ".npy and .npz (without --uint8) hold samples of any shape; a .png is a picture of them",
        ),
        _ => Ok(()),
    }
}

/// Sound into one file, or into numbered ones: `out.wav` becomes `out-000.wav` and on.
fn write_sound(path: &Path, samples: &HostTensor, view: &View) -> Result<()> {
    let (sounds, rate) = view.sound(samples)?;
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    for (k, sound) in sounds.iter().enumerate() {
        let file = match sounds.len() {
            1 => path.to_path_buf(),
            _ => path.with_file_name(format!("{stem}-{k:03}.wav")),
        };
        crate::files::write_atomic(&file, &wav::encode(sound.view(), view.range, rate)?)?;
    }
    Ok(())
}

fn write(args: &SampleArgs, extension: &str, samples: &mut Samples<'_>, classes: Option<&[usize]>) -> Result<()> {
    let view = View::of_student(samples.student.info());
    let mut next = || samples.next_u8(args.rounding);
    match extension {
        "npy" | "npz" if args.uint8 => image_writer::array(&args.out, classes, &mut next),
        "zip" => image_writer::zip(&args.out, classes, &mut next),
        "png" => {
            let pictures = view::view(&samples.all()?, None, &view, args.columns)?;
            crate::files::write_atomic(&args.out, &pictures.sheet)?;
            match pictures.animation {
                Some(moving) => {
                    let stem = args.out.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                    crate::files::write_atomic(&args.out.with_file_name(format!("{stem}-moving.png")), &moving)
                }
                None => Ok(()),
            }
        }
        "wav" => write_sound(&args.out, &samples.all()?, &view),
        "csv" => {
            let all = samples.all()?;
            let rows = all.array::<f32>()?.into_dimensionality::<ndarray::Ix2>();
            table::write(&args.out, rows.map_err(|e| Error::mismatch(e.to_string()))?.view(), classes)
        }
        "npy" => npy::write(&args.out, &samples.all()?),
        "npz" => {
            let values = samples.all()?;
            let labels = classes.map(|c| HostTensor::vec(&c.iter().map(|&k| k as i64).collect::<Vec<_>>()));
            let mut arrays = vec![(if view.is_image() { "images" } else { "samples" }, &values)];
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
    let extension = args.out.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
    check(args, &extension, student.info())?;
    let embeddings = read_conditions(&args.conditions)?;
    let classes = args.classes.as_deref().map(parse_classes).transpose()?.unwrap_or_default();
    let request = SampleRequest { seed: args.seed, classes, embeddings, batch: args.batch };
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
    let written = write(args, &extension, &mut samples, labels.as_deref());
    samples.bar.finish_and_clear();
    written?;
    let (seconds, broken) = (samples.seconds, samples.broken);
    if broken > 0 {
        tell!("warning: {broken} values of the samples are NaN or infinite");
    }
    let ms = seconds * 1e3 / args.number as f64;
    if globals.json {
        let shape: Vec<usize> = std::iter::once(args.number).chain(student.info().shape.iter().copied()).collect();
        let out = json!({ "ok": true, "out": args.out, "images": args.number, "shape": shape, "seed": args.seed,
            "engine": student.engine_name(), "seconds": seconds, "ms_per_image": ms, "not_finite": broken });
        println!("{out}");
    } else if !globals.quiet {
        let what = if View::of_student(student.info()).is_image() { "image" } else { "sample" };
        let (number, engine) = (args.number, student.engine_name());
        say!("{number} {what}s -> {} ({engine}, {ms:.2} ms each)", args.out.display());
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the command in `dir`; the student makes half its noise.
    fn sampled(dir: &Path, shape: &[usize], more: &[(&str, &str)], arguments: &[&str]) -> Result<()> {
        use clap::FromArgMatches as _;
        let student = dir.join("student.onnx");
        std::fs::write(&student, crate::runtime::testing::halved(shape, more)).unwrap();
        let all = ["sample", student.to_str().unwrap(), "-n", "3", "--seed", "5", "--engine", "tract"];
        let command = SampleArgs::augment_args(clap::Command::new("sample"));
        let found = command.get_matches_from(all.iter().chain(arguments));
        let args = SampleArgs::from_arg_matches(&found).unwrap();
        run(&args, Globals { json: false, quiet: true }).map(|_| ())
    }

    fn expected(len: usize) -> Vec<f32> {
        crate::noise::batch_noise(5, 0, 3, len).iter().map(|v| v / 2.0).collect()
    }

    #[test]
    fn tables_sound_and_sequences_are_written_by_extension() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let read = |name: &str| dir.path().join(name);
        // A table: .csv, .npy, a picture.
        for name in ["t.csv", "t.npy", "t.npz", "t.png"] {
            sampled(dir.path(), &[4], &[], &["-o", &path(name)]).unwrap();
        }
        let rows = table::read(&read("t.csv")).unwrap();
        assert_eq!((rows.dim(), rows.iter().copied().collect::<Vec<_>>()), ((3, 4), expected(4)));
        assert_eq!(npy::read(&read("t.npy")).unwrap().to_f32(), expected(4));
        assert_eq!(npy::read_npz(&read("t.npz")).unwrap()[0].0, "samples");
        assert_eq!(image::open(read("t.png")).unwrap().width(), 1200);
        // Sound: a file for each, exact numbers, the card's rate.
        let sound = [("disback.sample_rate", "8000")];
        sampled(dir.path(), &[2, 5], &sound, &["-o", &path("s.wav")]).unwrap();
        let mut reader = hound::WavReader::open(read("s-002.wav")).unwrap();
        assert_eq!((reader.spec().channels, reader.spec().sample_rate), (2, 8000));
        let values: Vec<f32> = reader.samples::<f32>().map(|v| v.unwrap()).collect();
        let third = &expected(10)[20..];
        assert_eq!(values, (0..5).flat_map(|k| [third[k], third[5 + k]]).collect::<Vec<_>>());
        // A video: its frames, and as it moves.
        let video = [("disback.layout", "frames-first"), ("disback.range", "[-1, 1]")];
        sampled(dir.path(), &[5, 1, 4, 4], &video, &["-o", &path("v.png")]).unwrap();
        assert!(std::fs::read(read("v-moving.png")).unwrap().windows(4).any(|w| w == b"acTL"));
    }

    #[test]
    fn what_does_not_fit_is_refused_before_anything_is_sampled() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let cases: [(&str, &[usize], &str); 6] = [
            ("a.csv", &[4, 3], "a .csv holds tables"),
            ("a.wav", &[4, 3], "which the card does not call sound"),
            ("a.mp3", &[16], ".mp3 is not written"),
            ("folder", &[4, 3], "which are no images"),
            ("a.zip", &[4], "which are no images"),
            ("a.ply", &[4, 3], ".ply is not written"),
        ];
        for (name, shape, says) in cases {
            let error = sampled(dir.path(), shape, &[], &["-o", &path(name)]).unwrap_err();
            assert!(error.to_string().contains(says) && error.exit_code() == 2, "{name}: {error}");
            assert!(!dir.path().join(name).exists());
        }
        let error = sampled(dir.path(), &[4], &[], &["-o", &path("a.npy"), "--uint8"]).unwrap_err();
        assert!(error.to_string().contains("no images"), "{error}");
    }

    #[test]
    fn class_lists() {
        assert_eq!(parse_classes("0-3,9").unwrap(), [0, 1, 2, 3, 9]);
        assert_eq!(parse_classes(" 3, 1").unwrap(), [3, 1]);
        for bad in ["", "a", "3-1", "0-99999999999"] {
            assert_eq!(parse_classes(bad).unwrap_err().exit_code(), 2, "{bad}");
        }
    }
}
