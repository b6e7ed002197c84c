//! A one-step student in use: `noise` and conditions in, `sample` out, in one call of the network.

use std::collections::BTreeMap;
use std::path::Path;

use prost::Message;

use super::foresight::Foresight;
use super::{Dim, Engine, EngineOptions, ValueInfo, open, open_bytes, run_batched};
use crate::axes::{self, Layout, Modality, usual_modality};
use crate::error::{Context, Error, Result};
use crate::noise::{batch_noise, image_class};
use crate::onnx::ModelProto;
use crate::tensor::{DType, HostTensor};

/// Prefix of our entries in an ONNX file's `metadata_props`.
pub const PREFIX: &str = "disback.";

/// Metadata of a student: the largest term of the sum `x0 = skip x + out F` that makes its sample. An epsilon network at
/// sigma 157 subtracts terms of several hundred to get values of order 1, so that two engines, which round differently,
/// agree to the precision of f32 times this number and no better.
pub const ROUNDING_SCALE: &str = "disback.student.rounding_scale";

/// A serialised model; what is no ONNX file is an error.
pub fn decode(bytes: &[u8]) -> Result<ModelProto> {
    let model = ModelProto::decode(bytes).map_err(|e| Error::invalid(format!("not an ONNX model: {e}")))?;
    match model.graph {
        Some(_) => Ok(model),
        None => Err(Error::invalid("not an ONNX model: it holds no graph")),
    }
}

/// The `disback.*` entries of a model, without the prefix.
pub fn metadata(model: &ModelProto) -> BTreeMap<String, String> {
    let entries = model.metadata_props.iter();
    entries.filter_map(|e| Some((e.key().strip_prefix(PREFIX)?.to_string(), e.value().to_string()))).collect()
}

/// A metadata value: TOML value text, or a plain string where it is no valid TOML.
pub fn parse_value(text: &str) -> toml::Value {
    let table: Option<toml::Table> = toml::from_str(&format!("v = {text}")).ok();
    table.and_then(|mut t| t.remove("v")).unwrap_or_else(|| toml::Value::String(text.to_string()))
}

/// One condition input of a student.
#[derive(Debug, Clone, PartialEq)]
pub struct Condition {
    /// Name, element type and shape of the input.
    pub input: ValueInfo,
    /// What its rows hold.
    pub kind: ConditionKind,
}

/// What a condition input takes for each image.
#[derive(Debug, Clone, PartialEq)]
pub enum ConditionKind {
    /// One class number.
    ClassIndex {
        /// Number of classes; class numbers are 0 to `classes - 1`.
        classes: usize,
    },
    /// A row of zeros with a 1 at the class number.
    OneHot {
        /// Number of classes, that is the length of a row.
        classes: usize,
    },
    /// A row of numbers, such as a text embedding, which the caller gives.
    Embedding,
}

/// What a student's file says about it.
#[derive(Debug, Clone)]
pub struct StudentInfo {
    /// How it was made: `disback`, the base method's name where no trajectory was used, or `weights` where no run is
    /// known.
    pub method: String,
    /// One sample: C, H, W of an image.
    pub shape: Vec<usize>,
    /// The noise of one sample; other than `shape` where a latent decoder is part of the file.
    pub noise_shape: Vec<usize>,
    /// Which axis of a sample holds the channels.
    pub layout: Layout,
    /// What a sample is.
    pub modality: Modality,
    /// Values a second of a sample that is sound, Hz.
    pub sample_rate: Option<u32>,
    /// Range of the sample's values; absent for latents.
    pub range: Option<[f64; 2]>,
    /// Name, element type and shape of the input `noise`: standard normal, `[B, ...noise_shape]`.
    pub noise: ValueInfo,
    /// All other inputs, in the graph's order; empty for an unconditional student.
    pub conditions: Vec<Condition>,
    /// The largest term of the sum that makes a sample, as it was when the file was written; 1 where that is not known.
    /// Rounding errors of f32 are relative to it ([`ROUNDING_SCALE`]).
    pub rounding_scale: f64,
    /// All `disback.*` entries without the prefix.
    pub metadata: BTreeMap<String, String>,
}

fn number(value: &toml::Value) -> Option<f64> {
    value.as_float().or_else(|| value.as_integer().map(|i| i as f64))
}

impl StudentInfo {
    /// Reads a student's description; a clear error for any other ONNX file.
    pub fn from_model(model: &ModelProto) -> Result<Self> {
        let metadata = metadata(model);
        let Some(method) = metadata.get("student.method").cloned() else {
            let what =
                if metadata.contains_key("prediction") { "a teacher's card" } else { "no disback.student.method" };
            return Err(Error::mismatch(format!("not a student written by disback: {what} in its metadata"))
                .hint("students come from `disback distill` or `disback export`"));
        };
        let (inputs, outputs) = super::model_values(model)?;
        let Some(noise) = inputs.iter().find(|i| i.name == "noise").cloned() else {
            return Err(Error::mismatch(
                "the student has no input `noise`: it was exported with the teacher's own inputs",
            )
            .hint("sample with the student.onnx that `disback export` writes without --same-graph"));
        };
        let Some(sample) = outputs.iter().find(|o| o.name == "sample") else {
            return Err(Error::mismatch("the student has no output `sample`"));
        };
        let fixed = |d: Option<&Dim>| if let Some(Dim::Fixed(n)) = d { Some(*n) } else { None };
        let in_graph = |v: &ValueInfo| -> Option<Vec<usize>> {
            let row: Option<Vec<usize>> = v.shape.iter().skip(1).map(|d| fixed(Some(d))).collect();
            row.filter(|row| !row.is_empty())
        };
        let noise_shape = match in_graph(&noise) {
            Some(shape) => shape,
            None => Self::card_shape(&metadata)?,
        };
        let shape = in_graph(sample).unwrap_or_else(|| noise_shape.clone());
        let (layout, modality, sample_rate) = Self::axes(&metadata, &shape)?;
        let range = match metadata.get("range").map(|t| parse_value(t)) {
            None => None,
            Some(toml::Value::Array(v)) if v.len() == 2 => match (number(&v[0]), number(&v[1])) {
                (Some(low), Some(high)) if low < high => Some([low, high]),
                _ => return Err(Error::invalid(format!("metadata disback.range is {v:?}"))),
            },
            Some(other) => return Err(Error::invalid(format!("metadata disback.range is {other}"))),
        };
        let mut conditions = Vec::new();
        for input in inputs.into_iter().filter(|i| i.name != "noise") {
            let key = |leaf: &str| metadata.get(&format!("conditions.{}.{leaf}", input.name)).map(|t| parse_value(t));
            let kind = key("kind").and_then(|v| v.as_str().map(str::to_string)).unwrap_or_default();
            let classes = key("classes").and_then(|v| v.as_integer()).and_then(|n| usize::try_from(n).ok());
            let kind = match (kind.as_str(), classes) {
                ("class-index", Some(classes)) => ConditionKind::ClassIndex { classes },
                ("one-hot", Some(classes)) => ConditionKind::OneHot { classes },
                ("embedding" | "", _) => ConditionKind::Embedding,
                _ => {
                    return Err(Error::invalid(format!(
                        "metadata of condition `{}`: kind {kind} without classes",
                        input.name
                    )));
                }
            };
            conditions.push(Condition { input, kind });
        }
        let scale = metadata.get(ROUNDING_SCALE.trim_start_matches(PREFIX)).and_then(|t| t.parse::<f64>().ok());
        let rounding_scale = scale.filter(|s| s.is_finite()).map_or(1.0, |s| s.max(1.0));
        Ok(Self {
            method,
            shape,
            noise_shape,
            layout,
            modality,
            sample_rate,
            range,
            noise,
            conditions,
            rounding_scale,
            metadata,
        })
    }

    /// The card's layout, modality and sample rate; those of images where a decoder makes images of latents.
    fn axes(metadata: &BTreeMap<String, String>, shape: &[usize]) -> Result<(Layout, Modality, Option<u32>)> {
        fn one<T: serde::de::DeserializeOwned>(metadata: &BTreeMap<String, String>, key: &str) -> Result<Option<T>> {
            let Some(text) = metadata.get(key) else { return Ok(None) };
            let value = parse_value(text).try_into::<T>();
            value.map(Some).map_err(|_| Error::invalid(format!("metadata disback.{key} is {text}")))
        }
        if metadata.contains_key("student.decoder") {
            return Ok((Layout::ChannelsFirst, Modality::Image, None));
        }
        let layout = one(metadata, "layout")?.unwrap_or_default();
        let sample_rate = one(metadata, "sample_rate")?;
        let modality = one(metadata, "modality")?;
        Ok((layout, modality.unwrap_or_else(|| usual_modality(layout, shape.len(), sample_rate)), sample_rate))
    }

    /// The axis of `shape` that holds the channels, without the batch; `None` where none does.
    pub fn channel_axis(&self) -> Option<usize> {
        axes::channel_axis(self.layout, self.shape.len())
    }

    /// C, H, W where samples are images with their channels first; `None` for everything else.
    pub fn image_shape(&self) -> Option<[usize; 3]> {
        axes::image_shape(&self.shape, self.layout, self.modality)
    }

    fn card_shape(metadata: &BTreeMap<String, String>) -> Result<Vec<usize>> {
        let dims = metadata.get("shape").map(|t| parse_value(t));
        let dims = dims
            .as_ref()
            .and_then(|v| v.as_array())
            .map(|v| v.iter().filter_map(|d| usize::try_from(d.as_integer()?).ok()).collect::<Vec<_>>());
        match dims {
            Some(dims) if !dims.is_empty() => Ok(dims),
            _ => Err(Error::invalid("the student's sample shape is neither in its graph nor in disback.shape")),
        }
    }

    /// The size that a difference between two computations of these samples in f32 is relative to: their largest value, or
    /// the largest term of the sum that makes them, and at least 1.
    pub fn size_of(&self, samples: &[HostTensor]) -> f64 {
        samples.iter().flat_map(HostTensor::to_f32).fold(self.rounding_scale, |m, v| m.max(f64::from(v.abs())))
    }

    /// Factor between the autoencoder's output and the latents, which are the output times this; 1 where the file does
    /// not say.
    pub fn latent_scale(&self) -> f64 {
        self.metadata.get("latent_scale").and_then(|t| number(&parse_value(t))).unwrap_or(1.0)
    }

    /// Conditions whose rows the caller brings.
    pub fn embeddings(&self) -> impl Iterator<Item = &Condition> {
        self.conditions.iter().filter(|c| c.kind == ConditionKind::Embedding)
    }

    /// Stand-ins for the rows that the caller would bring: normal numbers, ones for integers; 77 where a size is left free,
    /// the length of CLIP's texts.
    pub fn random_rows(&self, seed: u64, count: usize) -> Result<Vec<(String, HostTensor)>> {
        let make = |(k, c): (usize, &Condition)| {
            let row = c.input.shape.iter().skip(1).map(|d| if let Dim::Fixed(n) = d { *n } else { 77 });
            let shape: Vec<usize> = std::iter::once(count).chain(row).collect();
            let len = shape[1..].iter().product();
            let rows = match c.input.dtype.is_float() {
                true => HostTensor::new(&shape, &batch_noise(seed ^ 0xe6bd, k as u64 * 1_000_003, count, len))?,
                false => HostTensor::new(&shape, &vec![1i64; count * len])?,
            };
            Ok((c.input.name.clone(), rows.cast(c.input.dtype)))
        };
        self.embeddings().enumerate().map(make).collect()
    }

    /// Number of classes, where a condition is a class.
    pub fn classes(&self) -> Option<usize> {
        self.conditions.iter().find_map(|c| match c.kind {
            ConditionKind::ClassIndex { classes } | ConditionKind::OneHot { classes } => Some(classes),
            ConditionKind::Embedding => None,
        })
    }
}

/// What to sample. Image `k` depends on the seed and on `k` alone.
#[derive(Debug, Clone, Default)]
pub struct SampleRequest {
    /// Seed of the noise, and of the classes where they are drawn.
    pub seed: u64,
    /// Classes of images 0, 1, 2... repeated as needed; drawn uniformly from the seed where empty.
    pub classes: Vec<usize>,
    /// Rows for conditions that the caller must bring, by input name, repeated as needed.
    pub embeddings: Vec<(String, HostTensor)>,
    /// Largest number of images in one call of the network.
    pub batch: usize,
}

/// A student with its engine.
pub struct Student {
    engine: Box<dyn Engine>,
    info: StudentInfo,
    foresight: Foresight,
}

impl Student {
    /// Opens a student file.
    pub fn open(path: &Path, options: &EngineOptions) -> Result<Self> {
        let read = || StudentInfo::from_model(&decode(&crate::files::map(path)?)?);
        let info = read().with_context(|| path.display().to_string())?;
        Ok(Self { engine: open(path, options)?, info, foresight: Foresight::default() })
    }

    /// Opens a serialised student without external data.
    pub fn from_bytes(bytes: &[u8], options: &EngineOptions) -> Result<Self> {
        let info = StudentInfo::from_model(&decode(bytes)?)?;
        Ok(Self { info, engine: open_bytes(bytes, None, options)?, foresight: Foresight::default() })
    }

    /// What the student's file says about it.
    pub fn info(&self) -> &StudentInfo {
        &self.info
    }
    /// The engine that holds the network, for calls beside sampling.
    pub fn engine(&mut self) -> &mut dyn Engine {
        self.engine.as_mut()
    }
    /// What computes, with version and provider.
    pub fn engine_name(&self) -> String {
        self.engine.name()
    }

    /// Classes of images `start..start+count`, where the student has classes.
    pub fn classes(&self, request: &SampleRequest, start: u64, count: usize) -> Result<Option<Vec<usize>>> {
        Self::classes_of(&self.info, request, start, count)
    }

    fn classes_of(info: &StudentInfo, request: &SampleRequest, start: u64, count: usize) -> Result<Option<Vec<usize>>> {
        let Some(classes) = info.classes() else {
            return match request.classes.is_empty() {
                true => Ok(None),
                false => Err(Error::usage("the student has no classes")),
            };
        };
        if let Some(wrong) = request.classes.iter().find(|&&c| c >= classes) {
            return Err(Error::usage(format!("class {wrong}: the student has classes 0 to {}", classes - 1)));
        }
        let class = |k: u64| match request.classes.as_slice() {
            [] => image_class(request.seed, k, classes),
            given => given[(k % given.len() as u64) as usize],
        };
        Ok(Some((0..count as u64).map(|k| class(start + k)).collect()))
    }

    /// Inputs of the network for images `start..start+count`, by name.
    pub fn inputs(&self, request: &SampleRequest, start: u64, count: usize) -> Result<Vec<(String, HostTensor)>> {
        Self::inputs_of(&self.info, request, start, count)
    }

    /// [`Student::inputs`] of a student that is not open.
    pub fn inputs_of(
        info: &StudentInfo,
        request: &SampleRequest,
        start: u64,
        count: usize,
    ) -> Result<Vec<(String, HostTensor)>> {
        let mut inputs = Self::drawn_inputs(info, request, start, count)?;
        for condition in info.embeddings() {
            let name = condition.input.name.clone();
            let given = request.embeddings.iter().find(|(n, _)| *n == name).map(|(_, t)| t);
            let rows = given.filter(|t| t.rank() > 0 && t.shape()[0] > 0).ok_or_else(|| {
                Error::usage(format!("the student wants rows for its condition {}", condition.input))
                    .hint(format!("--condition {name}=rows.npy"))
            })?;
            let pick = |k: u64| rows.rows(((start + k) % rows.shape()[0] as u64) as usize, 1);
            let tensor = HostTensor::concat_rows(&(0..count as u64).map(pick).collect::<Result<Vec<_>>>()?)?;
            inputs.push((name, tensor.cast(condition.input.dtype)));
        }
        Ok(inputs)
    }

    /// The inputs that follow from the seed and the classes: noise and class conditions, not the rows that a caller brings.
    pub fn drawn_inputs(
        info: &StudentInfo,
        request: &SampleRequest,
        start: u64,
        count: usize,
    ) -> Result<Vec<(String, HostTensor)>> {
        let size: Vec<usize> = std::iter::once(count).chain(info.noise_shape.iter().copied()).collect();
        let noise =
            HostTensor::new(&size, &batch_noise(request.seed, start, count, info.noise_shape.iter().product()))?;
        let mut inputs = vec![("noise".to_string(), noise.cast(info.noise.dtype))];
        let labels = Self::classes_of(info, request, start, count)?.unwrap_or_default();
        for condition in &info.conditions {
            let tensor = match condition.kind {
                ConditionKind::ClassIndex { .. } => {
                    let rows = HostTensor::vec(&labels.iter().map(|&l| l as i64).collect::<Vec<_>>());
                    // Some graphs take a column of class numbers.
                    if condition.input.shape.len() == 2 { rows.reshaped(&[count, 1])? } else { rows }
                }
                ConditionKind::OneHot { classes } => {
                    let mut rows = vec![0f32; count * classes];
                    labels.iter().enumerate().for_each(|(k, &l)| rows[k * classes + l] = 1.0);
                    HostTensor::new(&[count, classes], &rows)?
                }
                ConditionKind::Embedding => continue,
            };
            inputs.push((condition.input.name.clone(), tensor.cast(condition.input.dtype)));
        }
        Ok(inputs)
    }

    /// Refuses a call with so many samples that memory will not hold.
    ///
    /// Errors: as of [`Foresight::check`].
    pub fn foresee(&mut self, request: &SampleRequest, count: usize) -> Result<()> {
        let info = &self.info;
        self.foresight.check(self.engine.as_mut(), count, |rows| Self::inputs_of(info, request, 0, rows))
    }

    /// Samples `start..start+count` as f32 `[count, ...shape]` in the student's range.
    ///
    /// Errors: a request that the student does not fit, a batch that memory does not hold.
    pub fn sample(&mut self, request: &SampleRequest, start: u64, count: usize) -> Result<HostTensor> {
        self.foresee(request, count.min(request.batch.max(1)))?;
        let inputs = self.inputs(request, start, count)?;
        let named: Vec<(&str, &HostTensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let outputs = run_batched(self.engine.as_mut(), &named, request.batch.max(1))?;
        let (_, sample) =
            outputs.into_iter().find(|(n, _)| n == "sample").ok_or_else(|| Error::backend("no output `sample`"))?;
        let expected: Vec<usize> = std::iter::once(count).chain(self.info.shape.iter().copied()).collect();
        if sample.shape() != expected {
            return Err(Error::mismatch(format!("the student gave {:?}, expected {expected:?}", sample.shape())));
        }
        Ok(sample.cast(DType::F32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::EngineKind;
    use crate::runtime::testing;

    fn kinds() -> Vec<EngineOptions> {
        let kinds = [EngineKind::Auto, EngineKind::Tract];
        kinds.into_iter().map(|engine| EngineOptions { engine, ..EngineOptions::default() }).collect()
    }

    #[test]
    fn an_image_does_not_depend_on_its_batch() {
        for options in kinds() {
            let mut student = Student::from_bytes(&testing::student("batch"), &options).unwrap();
            assert_eq!((student.info().shape.as_slice(), student.info().range), (&[1, 2, 2][..], Some([-1.0, 1.0])));
            assert_eq!(student.info().classes(), Some(3));
            let mut request = SampleRequest { seed: 5, batch: 64, ..SampleRequest::default() };
            let whole = student.sample(&request, 0, 10).unwrap();
            for batch in [1, 3, 10] {
                request.batch = batch;
                assert_eq!(student.sample(&request, 0, 10).unwrap(), whole);
            }
            assert_eq!(student.sample(&request, 7, 2).unwrap(), whole.rows(7, 2).unwrap());
            request.seed = 6;
            assert_ne!(student.sample(&request, 0, 10).unwrap(), whole);
        }
    }

    #[test]
    fn classes_are_the_ones_asked_for() {
        let mut student = Student::from_bytes(&testing::student("batch"), &EngineOptions::default()).unwrap();
        let request = SampleRequest { classes: vec![0, 2], batch: 8, ..SampleRequest::default() };
        assert_eq!(student.classes(&request, 1, 3).unwrap(), Some(vec![2, 0, 2]));
        let samples = student.sample(&request, 0, 2).unwrap().to_f32();
        let noise = batch_noise(0, 0, 2, 4);
        for k in 0..8 {
            let want = (noise[k] * 0.5 + if k < 4 { -0.5 } else { 0.5 }).clamp(-1.0, 1.0);
            assert!((samples[k] - want).abs() < 1e-6);
        }
        let request = SampleRequest { classes: vec![3], batch: 8, ..SampleRequest::default() };
        assert_eq!(student.sample(&request, 0, 2).unwrap_err().exit_code(), 2);
    }

    #[test]
    fn other_files_are_refused() {
        let error = Student::from_bytes(&testing::features(&[1.0; 4]), &EngineOptions::default()).err().unwrap();
        assert!(error.to_string().contains("not a student"), "{error}");
        assert!(
            Student::from_bytes(b"hello", &EngineOptions::default()).err().unwrap().to_string().contains("not an ONNX")
        );
    }

    #[test]
    fn metadata_values_are_toml_or_plain_text() {
        assert_eq!(parse_value("[1, 2]").as_array().unwrap().len(), 2);
        assert_eq!(parse_value("\"class-index\"").as_str(), Some("class-index"));
        assert_eq!(parse_value("class-index").as_str(), Some("class-index"));
        assert_eq!(parse_value("3").as_integer(), Some(3));
    }
}
