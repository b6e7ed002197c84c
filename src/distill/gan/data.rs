//! Real images for the discriminator: a folder or an EDM-style zip of image files, a `.npz`, an IDX file, or latents.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

use crate::axes::written;
use crate::diffusion::{Condition, HostConditions, TeacherCard};
use crate::error::{Error, Result};
use crate::io::images::describe;
use crate::io::ranges::{doubt, some_of};
use crate::io::{ImageSet, RowFile};
use crate::memory;
use crate::tensor::{DType, HostTensor};

/// Clean samples in the teacher's own scale, with the conditions that belong to them.
#[derive(Debug)]
pub struct RealImages {
    source: Source,
    len: usize,
    /// Classes, where the teacher has a class condition.
    labels: Option<Vec<i64>>,
    /// Whether images that cannot be read are passed over (`data.skip_broken`).
    skip: bool,
    /// Those that were found, and why.
    broken: Mutex<BTreeMap<usize, String>>,
}

#[derive(Debug)]
enum Source {
    /// 8-bit images, mapped to the card's range.
    Images(ImageSet, [f64; 2]),
    /// Rows of floats, times the first number plus the second the teacher's samples; conditions by name beside them.
    Rows(RowFile, String, [f64; 2]),
}

/// Names of the array that holds the samples.
const SAMPLES: [&str; 6] = ["images", "latents", "samples", "x", "arr_0", ""];
/// Names of the array that holds their classes.
const LABELS: [&str; 4] = ["labels", "label", "y", "arr_1"];

/// Images that are read at a time where all are.
const PART: usize = 64;

/// Names the way past a broken image.
fn skippable(e: Error) -> Error {
    e.hint("mend or remove it; data.skip_broken=true passes over images that cannot be read, and counts them")
}

/// Refuses samples that are no numbers, or do not look like ones of `range`, by some of their rows. `said`: the range was said of
/// the data, and is believed but for values far from it.
fn check_values(file: &RowFile, name: &str, len: usize, range: Option<[f64; 2]>, said: bool) -> Result<()> {
    let some = some_of(len);
    let values = file.rows(name, &some)?.to_f64();
    let width = values.len() / some.len().max(1);
    let row = |at: usize| some[at / width.max(1)];
    if let Some(at) = values.iter().position(|v| !v.is_finite()) {
        return Err(Error::usage(format!("array `{name}` holds NaN or infinity in row {}", row(at))));
    }
    let Some([low, high]) = range else { return Ok(()) };
    let beyond = 4.0 * (high - low);
    let hint = "floats are taken as the teacher's samples: gan.range = [low, high] says the range that they have, and they are mapped; \
                8-bit images always are";
    if let Some(at) = values.iter().position(|v| *v < low - beyond || *v > high + beyond) {
        let (value, row, whose) =
            (values[at], row(at), if said { "gan.range says" } else { "the teacher's samples lie in" });
        return Err(
            Error::usage(format!("array `{name}` holds {value} in row {row}, {whose} {low} to {high}")).hint(hint)
        );
    }
    match doubt(&values, [low, high]).filter(|_| !said) {
        None => Ok(()),
        Some(why) => Err(Error::usage(format!("array `{name}`: {why}, where the teacher's samples lie")).hint(hint)),
    }
}

impl RealImages {
    /// Opens a data set for the teacher of this card.
    ///
    /// Floats `[N, ...shape]` (`.npz`, `.npy`, `.safetensors`) are taken as the teacher's own samples: images in the card's
    /// range, latents already multiplied by its latent scale. With `range` they lie in that range, and are mapped to the card's.
    /// 8-bit images are mapped to the card's range. A conditional
    /// teacher needs the conditions of every image: classes (`dataset.json`, sub-folders, an array of integers), or arrays
    /// with the names of its conditions.
    ///
    /// `skip`: images that cannot be read are passed over; otherwise those that are looked at here are an error.
    pub fn open(path: &Path, card: &TeacherCard, range: Option<[f64; 2]>, skip: bool) -> Result<Self> {
        Self::open_inner(path, card, range, skip).map_err(|e| {
            let shown = path.display().to_string();
            if e.to_string().contains(&shown) { e } else { e.context(shown) }
        })
    }

    fn open_inner(path: &Path, card: &TeacherCard, said: Option<[f64; 2]>, skip: bool) -> Result<Self> {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
        if path.is_file() && ["npz", "npy", "safetensors"].contains(&extension.as_str()) {
            let file = RowFile::open(path)?;
            let found = SAMPLES.iter().find_map(|k| file.arrays().find(|(n, ..)| n == k));
            let (name, dtype, shape) = found.ok_or_else(|| {
                let names: Vec<_> = file.arrays().map(|(n, ..)| format!("`{n}`")).collect();
                Error::usage(match names.is_empty() {
                    true => "no arrays in it, expected one called `images` or `latents`".into(),
                    false => format!("none of the arrays {} is called `images` or `latents`", names.join(", ")),
                })
            })?;
            if dtype.is_float() {
                if shape.len() != 1 + card.rank() || shape[1..] != card.shape || shape[0] == 0 {
                    let row: Vec<String> = card.shape.iter().map(ToString::to_string).collect();
                    return Err(Error::usage(format!(
                        "array `{name}` is {dtype} {shape:?}, but the teacher's samples are [rows, {}]",
                        row.join(", ")
                    )));
                }
                let (name, len) = (name.to_owned(), shape[0]);
                let labels = class_condition(card)?.and_then(|(condition, classes)| {
                    let array = file.arrays().map(|(n, ..)| n).find(|n| *n == condition || LABELS.contains(n));
                    array.map(|n| column(&file, n, len, classes))
                });
                let labels = labels.transpose()?;
                if !skip {
                    check_values(&file, &name, len, said.or(card.range), said.is_some())?;
                }
                let line = match (said, card.range) {
                    (Some([a, b]), Some([low, high])) if [a, b] != [low, high] => {
                        let slope = (high - low) / (b - a);
                        [slope, low - slope * a]
                    }
                    (Some(_), None) => {
                        return Err(Error::usage("gan.range: the teacher's samples have no range to map to"));
                    }
                    _ => [1.0, 0.0],
                };
                let this = Self { source: Source::Rows(file, name, line), len, labels, skip, broken: Mutex::default() };
                this.check_conditions(card)?;
                return Ok(this);
            }
        }
        let wanted = card.image_shape().ok_or_else(|| {
            Error::usage(format!("no floats of the teacher's samples, {:?}", card.shape))
                .hint("the teacher makes no images: an array `samples` of floats in a .npy, .npz or .safetensors file")
        })?;
        let range = card.range.ok_or_else(|| {
            Error::usage("the teacher makes latents, these are images")
                .hint("encode them first: an array `latents` of floats in a .npz or .safetensors file")
        })?;
        let set = ImageSet::open(path, said.unwrap_or(range))?;
        if let (None, Some(why)) = (said, set.doubt()?) {
            return Err(Error::usage(why).hint("gan.range = [low, high] says the range that these floats have"));
        }
        if set.shape() != wanted {
            return Err(Error::usage(format!(
                "images of shape {:?} for a teacher of {:?} (C, H, W)",
                set.shape(),
                card.shape
            )));
        }
        // A picture of another size, or a broken one, would end the run when it is first drawn.
        if !skip {
            some_of(set.len()).chunks(16).try_for_each(|some| set.gather_u8(some).map(drop)).map_err(skippable)?;
        }
        let labels = set.labels().map(|l| l.iter().map(|v| *v as i64).collect());
        let labels = match (class_condition(card)?, labels) {
            (Some((_, classes)), Some(labels)) => Some(within(labels, classes)?),
            _ => None,
        };
        let this = Self { len: set.len(), source: Source::Images(set, range), labels, skip, broken: Mutex::default() };
        this.check_conditions(card)?;
        Ok(this)
    }

    /// What is worth knowing of a folder or archive: files that were passed over, formats whose pixels depend on the decoder.
    pub fn notes(&self) -> &[String] {
        match &self.source {
            Source::Images(set, _) => set.notes(),
            Source::Rows(..) => &[],
        }
    }

    /// What they take, for people: all together.
    pub fn size(&self) -> String {
        match &self.source {
            Source::Images(set, _) => {
                let bytes = set.shape().iter().fold(self.len as u64, |n, d| n.saturating_mul(*d as u64));
                let (what, bytes) = (describe(set.shape()), memory::shown(bytes));
                format!("{} images of {what}: {bytes} as 8 bits, of which a batch at a time is read", self.len)
            }
            Source::Rows(file, name, _) => {
                let found = file.arrays().find(|(n, ..)| n == name);
                let (dtype, row) = found.map_or((DType::F32, &[][..]), |(_, dtype, shape)| (dtype, &shape[1..]));
                let bytes = row.iter().fold((self.len * dtype.size()) as u64, |n, d| n.saturating_mul(*d as u64));
                let (row, bytes) = (written(row), memory::shown(bytes));
                format!("{} samples of {row}: {bytes} as {dtype}, of which a batch at a time is taken", self.len)
            }
        }
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.len
    }
    /// Whether there are no images.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Draws `rows` images with their conditions: f32 `[rows, ...shape]`.
    pub fn draw(&self, card: &TeacherCard, rng: &mut ChaCha8Rng, rows: usize) -> Result<(HostTensor, HostConditions)> {
        let drawn: Vec<usize> =
            (0..rows).map(|_| ((u128::from(rng.next_u64()) * self.len as u128) >> 64) as usize).collect();
        let (index, images) = self.readable(&drawn)?;
        let conditions = card.conditions.iter().map(|(name, condition)| {
            let tensor = match (&self.labels, condition.classes(), &self.source) {
                (Some(labels), Some(_), _) => HostTensor::vec(&index.iter().map(|&i| labels[i]).collect::<Vec<_>>()),
                (_, _, Source::Rows(file, ..)) => file.rows(name, &index)?,
                _ => return Err(Error::mismatch(format!("no values for the condition `{name}`"))),
            };
            Ok((name.clone(), tensor))
        });
        Ok((images, HostConditions::new(rows, conditions.collect::<Result<_>>()?)?))
    }

    /// These images as the teacher has them: f32 `[index.len(), ...shape]`.
    ///
    /// Errors: one that cannot be read, or is no number.
    fn values(&self, index: &[usize]) -> Result<HostTensor> {
        match &self.source {
            Source::Rows(file, name, [slope, offset]) => {
                let rows = match [*slope, *offset] {
                    [1.0, 0.0] => file.rows(name, index)?.cast(DType::F32),
                    _ => {
                        let rows = file.rows(name, index)?;
                        let values: Vec<f32> = rows.to_f64().iter().map(|v| (slope * v + offset) as f32).collect();
                        HostTensor::new(rows.shape(), &values)?
                    }
                };
                let values = rows.to_f32();
                match values.iter().position(|v| !v.is_finite()) {
                    None => Ok(rows),
                    Some(at) => Err(Error::usage(format!(
                        "array `{name}` holds NaN or infinity in row {}",
                        index[at * index.len() / values.len()]
                    ))),
                }
            }
            Source::Images(set, [low, high]) => {
                let bytes = set.gather_u8(index)?;
                let step = (high - low) / 255.0;
                let values: Vec<f32> = bytes.bytes().iter().map(|&v| (low + step * f64::from(v)) as f32).collect();
                HostTensor::new(bytes.shape(), &values)
            }
        }
    }

    fn broken(&self) -> MutexGuard<'_, BTreeMap<usize, String>> {
        self.broken.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Those of the images that can be read, each that cannot with the next one that can in its place: whenever it is found, the same
    /// images are drawn.
    fn readable(&self, drawn: &[usize]) -> Result<(Vec<usize>, HostTensor)> {
        loop {
            let index = {
                let broken = self.broken();
                if broken.len() >= self.len {
                    return Err(Error::io("none of the images can be read"));
                }
                let whole = |k: usize| (0..self.len).map(|n| (k + n) % self.len).find(|k| !broken.contains_key(k));
                drawn.iter().filter_map(|&k| whole(k)).collect::<Vec<_>>()
            };
            let failed = match self.values(&index) {
                Ok(images) => return Ok((index, images)),
                Err(e) if !self.skip => return Err(skippable(e)),
                Err(e) => e,
            };
            // (What fails together and not one by one is no broken image.)
            if self.find_broken(&index) == 0 {
                return Err(failed);
            }
        }
    }

    /// Looks at these one by one; how many of them cannot be read that were not known.
    fn find_broken(&self, index: &[usize]) -> usize {
        let mut broken = self.broken();
        let before = broken.len();
        for &k in index {
            if !broken.contains_key(&k)
                && let Err(e) = self.values(&[k])
            {
                broken.insert(k, e.to_string());
            }
        }
        broken.len() - before
    }

    /// About how many seconds [`RealImages::check`] takes, by a few of the images.
    pub fn seconds_to_check(&self) -> f64 {
        let some = some_of(self.len);
        let some = &some[..some.len().min(PART)];
        let started = std::time::Instant::now();
        let _ = self.values(some);
        started.elapsed().as_secs_f64() * self.len as f64 / some.len().max(1) as f64
    }

    /// Reads every image once, as long as it is to `go_on`. Gives what is wrong with those that cannot be read, in their order.
    pub fn check(&self, go_on: &dyn Fn() -> bool) -> Vec<String> {
        for start in (0..self.len).step_by(PART) {
            let part: Vec<usize> = (start..(start + PART).min(self.len)).collect();
            if !go_on() {
                break;
            }
            if self.values(&part).is_err() {
                self.find_broken(&part);
            }
        }
        self.broken().values().cloned().collect()
    }

    fn check_conditions(&self, card: &TeacherCard) -> Result<()> {
        for (name, condition) in &card.conditions {
            if condition.classes().is_some() && self.labels.is_some() {
                continue;
            }
            let row = condition.row_shape();
            let fits = match &self.source {
                Source::Images(..) => false,
                Source::Rows(file, ..) => file.arrays().any(|(n, _, shape)| {
                    n == name
                        && shape.first() == Some(&self.len)
                        && shape[1..] == row[..]
                        && matches!(condition, Condition::Embedding { .. })
                }),
            };
            if !fits {
                return Err(Error::usage(format!(
                    "the data says nothing of the teacher's condition `{name}`, which the discriminator needs for every image"
                ))
                .hint(match condition.classes() {
                    Some(_) => "add classes: dataset.json, one sub-folder a class, or an array `labels` of integers".into(),
                    None => format!("add an array `{name}` of shape [{}, ...{row:?}] beside the images", self.len),
                }));
            }
        }
        Ok(())
    }
}

/// The teacher's class condition; more than one cannot be told apart by a column of labels.
fn class_condition(card: &TeacherCard) -> Result<Option<(&str, usize)>> {
    let mut all = card.conditions.iter().filter_map(|(n, c)| Some((n.as_str(), c.classes()?)));
    let first = all.next();
    match all.next() {
        Some((other, _)) => Err(Error::unsupported(format!(
            "a discriminator for a teacher with two class conditions (`{}` and `{other}`)",
            first.map_or("", |f| f.0)
        ))),
        None => Ok(first),
    }
}

fn column(file: &RowFile, name: &str, len: usize, classes: usize) -> Result<Vec<i64>> {
    let found = file.arrays().find(|(n, ..)| *n == name);
    let fits =
        found.is_some_and(|(_, d, s)| !d.is_float() && s.iter().product::<usize>() == len && s.first() == Some(&len));
    if !fits {
        return Err(Error::usage(format!("array `{name}`: expected {len} integers, one class an image")));
    }
    within(file.rows(name, &(0..len).collect::<Vec<_>>())?.to_i64(), classes)
}

fn within(labels: Vec<i64>, classes: usize) -> Result<Vec<i64>> {
    match labels.iter().position(|l| !(0..classes as i64).contains(l)) {
        None => Ok(labels),
        Some(at) => {
            Err(Error::usage(format!("image {at} has class {}, the teacher has 0 to {}", labels[at], classes - 1)))
        }
    }
}

#[cfg(test)]
mod tests {
    use rand_chacha::rand_core::SeedableRng;

    use super::*;
    use crate::diffusion::{Layout, Prediction, ScheduleSpec, TimeUnit};

    /// A denoiser of 4x4 grey images in [-1, 1].
    fn card() -> TeacherCard {
        TeacherCard {
            sample: "x".into(),
            time: "t".into(),
            output: "y".into(),
            prediction: Prediction::Denoised,
            time_unit: TimeUnit::Sigma,
            shape: vec![1, 4, 4],
            modality: None,
            sample_rate: None,
            layout: Layout::ChannelsFirst,
            range: Some([-1.0, 1.0]),
            sigma_data: 0.5,
            latent_scale: 1.0,
            dataset: None,
            schedule: ScheduleSpec::Edm { sigma_min: 0.002, sigma_max: 80.0, rho: 7.0 },
            conditions: Default::default(),
            constants: Default::default(),
            concat: Vec::new(),
            dims: Default::default(),
        }
    }

    #[test]
    fn floats_of_a_said_range_are_mapped_to_the_cards() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.npy");
        let unit: Vec<f32> = (0..64).map(|k| k as f32 / 63.0).collect();
        crate::io::npy::write(&path, &HostTensor::new(&[4, 1, 4, 4], &unit).unwrap()).unwrap();
        let card = card();
        let error = RealImages::open(&path, &card, None, false).unwrap_err().to_string();
        assert!(error.contains("none in the lower half of -1 to 1"), "{error}");
        let draw = |range| {
            let data = RealImages::open(&path, &card, Some(range), false).unwrap();
            data.draw(&card, &mut ChaCha8Rng::seed_from_u64(1), 3).unwrap().0.to_f32()
        };
        let (plain, mapped) = (draw([-1.0, 1.0]), draw([0.0, 1.0]));
        assert!(plain.iter().zip(&mapped).all(|(a, b)| (2.0 * a - 1.0 - b).abs() < 1e-6));
        assert!(mapped.iter().any(|v| *v < 0.0));
    }

    #[test]
    fn idx_files_bring_their_classes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("train-images-idx3-ubyte");
        // Image k is all 100 k, and of class 2 - k.
        let write = |name: &str, head: &[u8], data: &[u8]| std::fs::write(dir.path().join(name), [head, data].concat());
        let pixels: Vec<u8> = (0..48).map(|at| at / 16 * 100).collect();
        write("train-images-idx3-ubyte", &[0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0, 4], &pixels).unwrap();
        let card = TeacherCard {
            conditions: [("c".to_owned(), Condition::ClassIndex { classes: 3, null: None })].into_iter().collect(),
            ..card()
        };
        let error = RealImages::open(&path, &card, None, false).unwrap_err().to_string();
        assert!(error.contains("the data says nothing of the teacher's condition `c`"), "{error}");
        write("train-labels-idx1-ubyte", &[0, 0, 8, 1, 0, 0, 0, 3], &[2, 1, 0]).unwrap();
        let data = RealImages::open(&path, &card, None, false).unwrap();
        let (images, conditions) = data.draw(&card, &mut ChaCha8Rng::seed_from_u64(1), 8).unwrap();
        let classes = conditions.get("c").unwrap().to_i64();
        for (image, class) in images.to_f32().chunks(16).zip(classes) {
            let wanted = (200 - 100 * class) as f32 / 127.5 - 1.0;
            assert!(image.iter().all(|v| (v - wanted).abs() < 1e-6), "{class}: {image:?}");
        }
    }
}
