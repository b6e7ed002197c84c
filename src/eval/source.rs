//! What can be compared: images, a student, a teacher with its sampler, or reference statistics.

use std::path::Path;

use super::Statistics;
use crate::diffusion::teacher_engine::{TeacherOnEngine, TeacherRequest, card_of};
use crate::diffusion::{Guidance, Sampler, by_itself};
use crate::error::{Context, Error, Result};
use crate::graph::Model;
use crate::io::images::Rounding;
use crate::io::{ImageSet, idx, npy, table};
use crate::runtime::EngineOptions;
use crate::runtime::decoder::Decoder;
use crate::runtime::student::{self, SampleRequest, Student};
use crate::tensor::HostTensor;

/// Names of the array of a `.npz` that holds the samples.
const SETS: [&str; 4] = ["samples", "images", "x", "arr_0"];

/// One side of a comparison.
pub enum Source {
    /// Images that are there already.
    Images(ImageSet),
    /// A student, whose samples are made as they are needed.
    Student(Box<Student>),
    /// A teacher, whose sampler makes the samples as they are needed.
    Teacher(Box<TeacherOnEngine>),
    /// A student or teacher of latents, with the autoencoder's decoder behind it.
    Decoded(Box<Decoded>),
    /// Mean and covariance only: good for the Frechet distance alone.
    Statistics(Statistics),
    /// Samples `[N, ...]` of any kind that are there already, measured by their values.
    Values(HostTensor),
}

/// Latents and what makes images of them.
pub struct Decoded {
    latents: Source,
    decoder: Decoder,
    /// Of an image.
    shape: [usize; 3],
}

/// Float samples of a network.
struct Samples {
    values: HostTensor,
    /// None: latents.
    range: Option<[f64; 2]>,
    labels: Option<Vec<usize>>,
    nfe: usize,
}

/// How images are drawn from a source. Image `k` of a seed is the same whatever the batch size, engine or device.
#[derive(Debug, Clone)]
pub struct Draw {
    /// Seed, classes, embeddings, and number of images a call.
    pub request: SampleRequest,
    /// How a network's float samples become 8 bits.
    pub rounding: Rounding,
    /// The solver of a teacher.
    pub sampler: Sampler,
    /// Steps of the teacher's sampler.
    pub steps: usize,
    /// Time shift of these steps where the teacher is a flow; 0: the card's.
    pub shift: f64,
    /// Guidance of the teacher: classifier-free, or by its weaker network ([`Source::guided_by`]).
    pub guidance: Guidance,
}

impl Default for Draw {
    fn default() -> Self {
        let request = SampleRequest { batch: 64, ..SampleRequest::default() };
        Self {
            request,
            rounding: Rounding::default(),
            sampler: Sampler::Heun,
            steps: 18,
            shift: 0.0,
            guidance: 1.0.into(),
        }
    }
}

/// Images of a source, one after the other.
#[derive(Debug, Clone)]
pub struct Drawn {
    /// 8-bit images `[N, C, H, W]`.
    pub images: HostTensor,
    /// Their classes, where the source has any.
    pub labels: Option<Vec<usize>>,
    /// Network evaluations for one image; absent for images that were there already.
    pub nfe: Option<usize>,
}

fn latents(what: &str) -> Error {
    Error::mismatch(format!("the {what} makes latents, which are no images"))
        .hint("--decoder FILE.onnx (while training: log.decoder) makes images of them")
}

/// Refuses a file of the same network as the one that guides the other.
fn refuse_itself(own: &Path, weaker: &Path) -> Result<()> {
    let len = |path: &Path| std::fs::metadata(path).map(|m| m.len()).with_context(|| path.display().to_string());
    let same = len(own)? == len(weaker)? && Model::load(own)?.graph_hash() == Model::load(weaker)?.graph_hash();
    if same { Err(by_itself(&weaker.display().to_string())) } else { Ok(()) }
}

impl Source {
    /// `student.onnx`, a teacher with its card, a folder or zip of image files, a `.npy`, a `.npz` of images, an IDX file, or a `.npz`
    /// with `mu` and `sigma`. Where a `.npz` holds both images and statistics (ADM's), the images are taken.
    pub fn open(path: &Path, range: [f64; 2], options: &EngineOptions) -> Result<Self> {
        Self::open_with(path, range, &[], options)
    }

    /// [`Source::open`], with entries of a teacher's card (`key=value`).
    pub fn open_with(path: &Path, range: [f64; 2], card: &[String], options: &EngineOptions) -> Result<Self> {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
        if extension == "onnx" {
            return Self::model(path, card, options);
        }
        if extension == "pkl" {
            return Err(Error::usage(format!(
                "{}: pickled statistics are Python programs and are not read",
                path.display()
            ))
            .hint("np.savez('reference.npz', mu=ref['fid']['mu'], sigma=ref['fid']['sigma'])"));
        }
        if extension == "npz" && path.is_file() {
            let arrays = npy::read_npz(path)?;
            let has = |name: &str| arrays.iter().any(|(n, _)| n == name);
            let images = SETS.iter().any(|n| has(n));
            if has("mu") && has("sigma") && !images {
                return Ok(Self::Statistics(
                    Statistics::from_arrays(&arrays).with_context(|| path.display().to_string())?,
                ));
            }
        }
        Ok(Self::Images(ImageSet::open(path, range)?))
    }

    /// Opens a set whose values are measured: `.onnx` as [`Source::open_with`] does, a `.npy`, a `.npz` (its array `samples`,
    /// `images`, `x`, `arr_0`, or the only one), a `.csv`, or an IDX file.
    pub fn open_values(path: &Path, card: &[String], options: &EngineOptions) -> Result<Self> {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
        let run = || match extension.as_str() {
            "npy" => npy::read(path),
            "csv" => Ok(HostTensor::from(table::read(path)?)),
            "npz" => {
                let arrays = npy::read_npz(path)?;
                let found = SETS.iter().find_map(|name| arrays.iter().find(|(n, _)| n == name));
                let found = found.or(arrays.first().filter(|_| arrays.len() == 1));
                found.map(|(_, t)| t.clone()).ok_or_else(|| {
                    Error::usage("which array holds the samples?")
                        .hint("name it `samples`, or keep it alone in the file")
                })
            }
            _ if idx::named(path) => idx::read(path),
            _ => Err(Error::usage(
                "samples that are measured by their values are read from a .npy, .npz, .csv or an IDX file",
            )),
        };
        if extension == "onnx" {
            return Self::model(path, card, options);
        }
        let values = run().with_context(|| path.display().to_string())?;
        match values.rank() < 2 || values.is_empty() {
            true => Err(Error::usage(format!("an array of shape {:?}, expected [N, ...]", values.shape())))
                .with_context(|| path.display().to_string()),
            false => Ok(Self::Values(values)),
        }
    }

    /// Whether a file holds, or a network makes, samples that are no images, as far as the file says it; `card`: entries of a
    /// teacher's card. What cannot be read is told where it is opened.
    pub fn is_no_image(path: &Path, card: &[String]) -> bool {
        let images = |t: &HostTensor| match *t.shape() {
            [_, _, _] => true,
            [_, a, _, c] => [a, c].iter().any(|d| matches!(d, 1 | 3)),
            _ => false,
        };
        match path.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase().as_str() {
            "csv" => true,
            "npy" => npy::read(path).is_ok_and(|t| !images(&t)),
            // (Its arrays may be statistics, or latents that a decoder makes images of.)
            "npz" => npy::read_npz(path).is_ok_and(|arrays| {
                let found = SETS.iter().find_map(|name| arrays.iter().find(|(n, _)| n == name));
                found.is_some_and(|(_, t)| t.rank() == 2 || t.rank() > 4)
            }),
            "onnx" => {
                let decoded = crate::files::map(path).map_err(Error::from).and_then(|bytes| student::decode(&bytes));
                let Ok(model) = decoded else { return false };
                if student::metadata(&model).contains_key("student.method") {
                    return student::StudentInfo::from_model(&model).is_ok_and(|info| info.image_shape().is_none());
                }
                card_of(path, card).is_ok_and(|resolved| resolved.card.image_shape().is_none())
            }
            _ => false,
        }
    }

    /// Whether a file is an ONNX model that is no student of ours, as far as the file says it.
    pub fn is_teacher(path: &Path) -> bool {
        if !path.extension().is_some_and(|e| e.eq_ignore_ascii_case("onnx")) {
            return false;
        }
        let decoded = crate::files::map(path).map_err(Error::from).and_then(|bytes| student::decode(&bytes));
        decoded.is_ok_and(|model| !student::metadata(&model).contains_key("student.method"))
    }

    fn model(path: &Path, card: &[String], options: &EngineOptions) -> Result<Self> {
        let decoded = crate::files::map(path).map_err(Error::from).and_then(|bytes| student::decode(&bytes));
        let metadata = student::metadata(&decoded.with_context(|| path.display().to_string())?);
        if metadata.contains_key("student.method") {
            return Ok(Self::Student(Box::new(Student::open(path, options)?)));
        }
        let teacher = TeacherOnEngine::open(path, card, options).map_err(|e| {
            let hint = "students come from `disback distill` or `disback export`; a teacher needs its card \
                        (`disback inspect` shows it, --card KEY=VALUE says it)";
            e.context("neither a student nor a teacher with a card").also(hint)
        })?;
        Ok(Self::Teacher(Box::new(teacher)))
    }

    /// Puts a decoder behind a source of latents; any other stays as it is.
    pub fn decoded(self, decoder: Option<&Path>, options: &EngineOptions) -> Result<Self> {
        let latents = match &self {
            Self::Student(s) if s.info().range.is_none() => Some((s.info().shape.clone(), s.info().latent_scale())),
            Self::Teacher(t) if t.card().range.is_none() => Some((t.card().shape.clone(), t.card().latent_scale)),
            _ => None,
        };
        let (Some(decoder), Some((shape, scale))) = (decoder, latents) else { return Ok(self) };
        let mut decoder = Decoder::open(decoder, &shape, scale, options)?;
        let shape = decoder.image_shape(&shape)?;
        Ok(Self::Decoded(Box::new(Decoded { latents: self, decoder, shape })))
    }

    /// Number of images, where the source has a number of its own.
    pub fn len(&self) -> Option<usize> {
        match self {
            Self::Images(set) => Some(set.len()),
            Self::Values(values) => values.shape().first().copied(),
            _ => None,
        }
    }
    /// Whether the source is known to hold no images; false where its number is not fixed.
    pub fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }

    /// What is worth knowing of the set itself.
    pub fn notes(&self) -> &[String] {
        match self {
            Self::Images(set) => set.notes(),
            _ => &[],
        }
    }

    /// What it is, for a table.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Images(_) => "images",
            Self::Student(_) => "student",
            Self::Teacher(_) => "teacher",
            Self::Decoded(d) => d.latents.kind(),
            Self::Statistics(_) => "statistics",
            Self::Values(_) => "values",
        }
    }

    /// Channels, height and width of its images; `None` where it holds none.
    pub fn shape(&self) -> Option<[usize; 3]> {
        match self {
            Self::Images(set) => Some(set.shape()),
            Self::Student(student) => student.info().image_shape(),
            Self::Teacher(teacher) => teacher.card().image_shape(),
            Self::Decoded(d) => Some(d.shape),
            Self::Statistics(_) | Self::Values(_) => None,
        }
    }

    /// One sample, without the batch: what [`Source::draw_values`] gives. `None` for statistics.
    pub fn sample_shape(&self) -> Option<Vec<usize>> {
        match self {
            Self::Images(set) => Some(set.shape().to_vec()),
            Self::Student(student) => Some(student.info().shape.clone()),
            Self::Teacher(teacher) => Some(teacher.card().shape.clone()),
            Self::Decoded(d) => Some(d.shape.to_vec()),
            Self::Values(values) => Some(values.shape()[1..].to_vec()),
            Self::Statistics(_) => None,
        }
    }

    /// Samples `start..start+count` as they are, with the network evaluations for one of them.
    pub fn draw_values(&mut self, draw: &Draw, start: usize, count: usize) -> Result<(HostTensor, Option<usize>)> {
        match self {
            Self::Values(values) => Ok((values.rows(start, count)?, None)),
            Self::Images(set) => Ok((set.batch(start, count)?, None)),
            Self::Student(_) | Self::Teacher(_) => {
                let made = self.samples(draw, start, count)?;
                Ok((made.values, Some(made.nfe)))
            }
            Self::Decoded(d) => {
                let made = d.latents.samples(draw, start, count)?;
                Ok((d.decoder.decode(&made.values)?, Some(made.nfe)))
            }
            Self::Statistics(_) => Err(Error::usage("statistics hold no samples")),
        }
    }

    /// A teacher, opened from the file `own`, guided by the weaker network in `path`, read by its own card: see [`TeacherOnEngine::guided_by`]. Other sources are as
    /// they were.
    ///
    /// Errors: a file that is no teacher, or one that cannot guide this one.
    pub fn guided_by(self, own: &Path, path: Option<&Path>, options: &EngineOptions) -> Result<Self> {
        let Some(path) = path else { return Ok(self) };
        match self {
            Self::Teacher(teacher) => {
                refuse_itself(own, path)?;
                let weaker = TeacherOnEngine::open(path, &[], options)?;
                let guided = teacher.guided_by(weaker).with_context(|| path.display().to_string())?;
                Ok(Self::Teacher(Box::new(guided)))
            }
            other => Ok(other),
        }
    }

    /// Images `start..start+count`.
    pub fn draw(&mut self, draw: &Draw, start: usize, count: usize) -> Result<Drawn> {
        match self {
            Self::Images(set) => {
                let labels = set.labels().map(|l| l[start..(start + count).min(l.len())].to_vec());
                Ok(Drawn { images: set.batch_u8(start, count)?, labels, nfe: None })
            }
            Self::Student(_) | Self::Teacher(_) => {
                let what = self.kind();
                let made = self.samples(draw, start, count)?;
                let range = made.range.ok_or_else(|| latents(what))?;
                made.images(range, draw.rounding)
            }
            Self::Decoded(d) => {
                let made = d.latents.samples(draw, start, count)?;
                let values = d.decoder.decode(&made.values)?;
                Samples { values, ..made }.images(Decoder::RANGE, draw.rounding)
            }
            Self::Statistics(_) => Err(Error::usage("statistics hold no images")),
            Self::Values(_) => Err(Error::usage("the samples are no images").hint("--values measures their values")),
        }
    }

    /// What a student's or teacher's network makes, images or latents.
    fn samples(&mut self, draw: &Draw, start: usize, count: usize) -> Result<Samples> {
        match self {
            Self::Student(student) => Ok(Samples {
                range: student.info().range,
                labels: student.classes(&draw.request, start as u64, count)?,
                values: student.sample(&draw.request, start as u64, count)?,
                nfe: 1,
            }),
            Self::Teacher(teacher) => {
                let Draw { sampler, steps, shift, guidance, .. } = *draw;
                let request = TeacherRequest { images: draw.request.clone(), sampler, steps, shift, guidance };
                let made = teacher.sample(&request, start as u64, count)?;
                let labels = teacher.card().classes().map(|classes| {
                    let given = &draw.request.classes;
                    let class = |k: usize| match given.len() {
                        0 => crate::noise::image_class(draw.request.seed, k as u64, classes),
                        n => given[k % n],
                    };
                    (start..start + count).map(class).collect()
                });
                Ok(Samples { range: teacher.card().range, labels, values: made.images, nfe: made.nfe })
            }
            _ => Err(Error::usage("no network makes these images")),
        }
    }
}

impl Samples {
    fn images(self, range: [f64; 2], rounding: Rounding) -> Result<Drawn> {
        let count = self.values.shape().first().copied().unwrap_or(0);
        let set = ImageSet::from_samples(self.values, range)?.with_rounding(rounding);
        Ok(Drawn { images: set.batch_u8(0, count)?, labels: self.labels, nfe: Some(self.nfe) })
    }
}

/// `count` images of a student as an image set.
pub fn sample_images(
    student: &mut Student,
    request: &SampleRequest,
    count: usize,
    mut seen: impl FnMut(usize),
) -> Result<ImageSet> {
    let range = student.info().range.ok_or_else(|| latents("student"))?;
    let batch = request.batch.max(1);
    let mut parts = Vec::new();
    for start in (0..count).step_by(batch) {
        let rows = batch.min(count - start);
        let samples = student.sample(request, start as u64, rows)?;
        parts.push(ImageSet::from_samples(samples, range)?.batch_u8(0, rows)?);
        seen(rows);
    }
    ImageSet::from_samples(HostTensor::concat_rows(&parts)?, [0.0, 255.0])
}
