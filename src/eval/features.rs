//! Features of images through an ONNX network.
//!
//! What the network says about itself in `metadata_props`: `disback.features.output` (which output), `.range` (value range
//! of its input, `[-1, 1]`, `[0, 1]` or `[0, 255]`). The command line overrides both.

use std::path::Path;

use super::FeatureMatrix;
use crate::error::{Context, Error, Result};
use crate::io::ImageSet;
use crate::io::images::describe;
use crate::onnx::ModelProto;
use crate::runtime::{Dim, Engine, EngineOptions, ValueInfo, open, open_bytes, run_batched, student};
use crate::tensor::{DType, HostTensor};

/// What the user says about a feature network, over what it says itself.
#[derive(Debug, Clone, Default)]
pub struct FeatureOptions {
    pub output: Option<String>,
    pub range: Option<[f64; 2]>,
}

/// A network that turns images into rows of features.
pub struct FeatureNet {
    engine: Box<dyn Engine>,
    input: ValueInfo,
    output: String,
    range: [f64; 2],
    assumed: Option<String>,
}

/// How the network wants its images.
#[derive(Clone, Copy, PartialEq)]
enum Layout {
    ChannelsFirst,
    ChannelsLast,
    Flat,
}

impl FeatureNet {
    /// Opens a feature network.
    pub fn open(path: &Path, features: &FeatureOptions, options: &EngineOptions) -> Result<Self> {
        let read = || student::decode(&std::fs::read(path)?);
        let model = read().with_context(|| path.display().to_string())?;
        Self::from_engine(&model, features, open(path, options)?).with_context(|| path.display().to_string())
    }

    /// A serialised feature network without external data.
    pub fn from_bytes(bytes: &[u8], features: &FeatureOptions, options: &EngineOptions) -> Result<Self> {
        Self::from_engine(&student::decode(bytes)?, features, open_bytes(bytes, None, options)?)
    }

    fn from_engine(model: &ModelProto, features: &FeatureOptions, engine: Box<dyn Engine>) -> Result<Self> {
        let metadata = student::metadata(model);
        let entry = |key: &str| metadata.get(&format!("features.{key}")).map(|t| student::parse_value(t));
        let [input] = engine.inputs() else {
            let inputs: Vec<String> = engine.inputs().iter().map(ValueInfo::to_string).collect();
            return Err(Error::mismatch(format!(
                "a feature network has one input, this one has: {}",
                inputs.join("; ")
            )));
        };
        if !input.dtype.is_float() && input.dtype != DType::U8 {
            return Err(Error::mismatch(format!("the input {input} takes no images")));
        }
        let names: Vec<&str> = engine.outputs().iter().map(|o| o.name.as_str()).collect();
        let wanted = features.output.clone().or_else(|| entry("output").and_then(|v| v.as_str().map(str::to_string)));
        let output = match wanted {
            Some(name) if names.contains(&name.as_str()) => name,
            Some(name) => {
                return Err(Error::usage(format!("no output `{name}`; there are: {}", names.join(", "))));
            }
            None if names.len() == 1 => names[0].to_string(),
            None => {
                return Err(Error::usage(format!("which output holds the features? {}", names.join(", ")))
                    .hint("--feature-output NAME"));
            }
        };
        let stored = entry("range").and_then(|v| {
            let pair = v.as_array()?.iter().map(|x| x.as_float().or_else(|| x.as_integer().map(|i| i as f64)));
            <[f64; 2]>::try_from(pair.collect::<Option<Vec<_>>>()?).ok()
        });
        let assumed = (features.range.is_none() && stored.is_none() && input.dtype != DType::U8)
            .then(|| "the feature network does not say which value range it wants: [-1, 1] is assumed".to_string());
        let range =
            features.range.or(stored).unwrap_or(if input.dtype == DType::U8 { [0.0, 255.0] } else { [-1.0, 1.0] });
        Ok(Self { input: input.clone(), output, range, assumed, engine })
    }

    /// Value range of the network's input.
    pub fn range(&self) -> [f64; 2] {
        self.range
    }
    /// The output used.
    pub fn output(&self) -> &str {
        &self.output
    }
    /// What was assumed because neither the file nor the caller said it.
    pub fn assumed(&self) -> Option<&str> {
        self.assumed.as_deref()
    }

    fn layout(&self, [c, h, w]: [usize; 3]) -> Result<Layout> {
        let fits = |dims: [usize; 3]| {
            self.input.shape.len() == 4
                && self.input.shape[1..].iter().zip(dims).all(|(d, n)| match d {
                    Dim::Fixed(m) => *m == n,
                    Dim::Symbol(_) => true,
                })
        };
        let flat = self.input.shape.len() == 2 && self.input.shape[1] == Dim::Fixed(c * h * w);
        if fits([c, h, w]) {
            Ok(Layout::ChannelsFirst)
        } else if fits([h, w, c]) {
            Ok(Layout::ChannelsLast)
        } else if flat {
            Ok(Layout::Flat)
        } else {
            let images = describe([c, h, w]);
            Err(Error::mismatch(format!("the feature network wants {}, the images are {images}", self.input))
                .hint("use a feature network for this size, or put a Resize into it"))
        }
    }

    /// Features of all images, `batch` a call. `seen` is told how many more images are done.
    pub fn features(&mut self, images: &ImageSet, batch: usize, mut seen: impl FnMut(usize)) -> Result<FeatureMatrix> {
        let layout = self.layout(images.shape())?;
        let [c, h, w] = images.shape();
        let batch = batch.max(1);
        let (low, high) = (self.range[0] as f32, self.range[1] as f32);
        let mut parts = Vec::new();
        for start in (0..images.len()).step_by(batch) {
            let count = batch.min(images.len() - start);
            let bytes = images.batch_u8(start, count)?;
            let mut values: Vec<f32> =
                bytes.bytes().iter().map(|&v| low + (high - low) * (f32::from(v) / 255.0)).collect();
            let shape: Vec<usize> = match layout {
                Layout::ChannelsFirst => vec![count, c, h, w],
                Layout::Flat => vec![count, c * h * w],
                Layout::ChannelsLast => {
                    values = channels_last(&values, count, [c, h, w]);
                    vec![count, h, w, c]
                }
            };
            let tensor = HostTensor::new(&shape, &values)?.cast(self.input.dtype);
            let outputs = run_batched(self.engine.as_mut(), &[(self.input.name.as_str(), &tensor)], batch)?;
            let (_, features) = outputs
                .into_iter()
                .find(|(name, _)| *name == self.output)
                .ok_or_else(|| Error::backend(format!("no output `{}`", self.output)))?;
            // Pooled features often come as [N, D, 1, 1].
            let dims = features.len() / count;
            if features.shape().first() != Some(&count) || dims == 0 {
                let shape = features.shape();
                return Err(Error::mismatch(format!(
                    "output `{}` has shape {shape:?} for {count} images",
                    self.output
                )));
            }
            parts.push(features.reshaped(&[count, dims])?.cast(DType::F32));
            seen(count);
        }
        FeatureMatrix::new(&HostTensor::concat_rows(&parts)?)
    }
}

fn channels_last(values: &[f32], count: usize, [c, h, w]: [usize; 3]) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    for k in 0..count {
        for p in 0..h * w {
            out.extend((0..c).map(|channel| values[(k * c + channel) * h * w + p]));
        }
    }
    out
}
