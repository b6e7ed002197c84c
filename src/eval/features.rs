//! Features of images through an ONNX network, with the preprocessing of its [`FeatureCard`].

use std::path::Path;

use ndarray::Array2;
use sha2::{Digest, Sha256};

use super::FeatureMatrix;
use super::card::FeatureCard;
use super::resize::Resizer;
use crate::error::{Context, Error, Result};
use crate::io::ImageSet;
use crate::io::images::describe;
use crate::onnx::ModelProto;
use crate::runtime::foresight::Foresight;
use crate::runtime::{Dim, Engine, EngineOptions, ValueInfo, open, open_bytes, run_batched, student};
use crate::tensor::{DType, HostTensor};

/// What the user says about a feature network, over what it says itself.
#[derive(Debug, Clone, Default)]
pub struct FeatureOptions {
    /// Output that holds the features; absent: as the card says, or the only one.
    pub output: Option<String>,
    /// Values that 0 and 255 become before mean and std; absent: as the card says.
    pub range: Option<[f64; 2]>,
    /// Entries of the feature card, `key=value`.
    pub card: Vec<String>,
}

/// What a network makes of a batch.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Features `[N, D]`.
    pub features: Array2<f32>,
    /// Class scores before the softmax, `[N, K]`, where the network gives them.
    pub logits: Option<Array2<f32>>,
}

/// A network that turns images into rows of features.
pub struct FeatureNet {
    engine: Box<dyn Engine>,
    input: ValueInfo,
    output: String,
    logits: Option<String>,
    range: [f64; 2],
    card: FeatureCard,
    file_hash: String,
    assumed: Option<String>,
    foresight: Foresight,
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
        let run = || {
            let bytes = crate::files::map(path)?;
            let model = student::decode(&bytes)?;
            let hash = file_hash(&bytes, &model, path.parent())?;
            Self::from_engine(&model, hash, Some(path), features, open(path, options)?)
        };
        run().map_err(|e| {
            if e.to_string().contains(&path.display().to_string()) { e } else { e.context(path.display().to_string()) }
        })
    }

    /// A serialised feature network without external data.
    pub fn from_bytes(bytes: &[u8], features: &FeatureOptions, options: &EngineOptions) -> Result<Self> {
        let model = student::decode(bytes)?;
        let hash = file_hash(bytes, &model, None)?;
        Self::from_engine(&model, hash, None, features, open_bytes(bytes, None, options)?)
    }

    fn from_engine(
        model: &ModelProto,
        file_hash: String,
        path: Option<&Path>,
        features: &FeatureOptions,
        engine: Box<dyn Engine>,
    ) -> Result<Self> {
        let card = FeatureCard::resolve(&student::metadata(model), path, &features.card)?;
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
        let check = |name: String| match names.contains(&name.as_str()) {
            true => Ok(name),
            false => Err(Error::usage(format!("no output `{name}`; there are: {}", names.join(", ")))),
        };
        // A network's logits go by that name; anything else has to be said.
        let logits = card.logits.clone().map(&check).transpose()?;
        let logits = logits.or_else(|| names.contains(&"logits").then(|| "logits".to_string()));
        let rest: Vec<&&str> = names.iter().filter(|n| Some(**n) != logits.as_deref()).collect();
        let output = match features.output.clone().or_else(|| card.output.clone()) {
            Some(name) => check(name)?,
            None => match (names.as_slice(), rest.as_slice()) {
                ([only], _) => only.to_string(),
                (_, [only]) => only.to_string(),
                _ => {
                    return Err(Error::usage(format!("which output holds the features? {}", names.join(", ")))
                        .hint("--feature-output NAME"));
                }
            },
        };
        let stored = features.range.or(card.range);
        let assumed = (stored.is_none() && input.dtype != DType::U8)
            .then(|| "the feature network does not say which value range it wants: [-1, 1] is assumed".to_string());
        let range = stored.unwrap_or(if input.dtype == DType::U8 { [0.0, 255.0] } else { [-1.0, 1.0] });
        let foresight = Foresight::default();
        Ok(Self { input: input.clone(), output, logits, range, card, file_hash, assumed, engine, foresight })
    }

    /// Value range of the network's input, before mean and std.
    pub fn range(&self) -> [f64; 2] {
        self.range
    }
    /// The output used.
    pub fn output(&self) -> &str {
        &self.output
    }
    /// The output with class scores, where there is one.
    pub fn logits(&self) -> Option<&str> {
        self.logits.as_deref()
    }
    /// The feature card, as the file and the caller gave it.
    pub fn card(&self) -> &FeatureCard {
        &self.card
    }
    /// What was assumed because neither the file nor the caller said it.
    pub fn assumed(&self) -> Option<&str> {
        self.assumed.as_deref()
    }

    /// Hash of the network's file, its output and its preprocessing: features of equal fingerprints can be compared.
    pub fn fingerprint(&self) -> String {
        let c = &self.card;
        let text = format!(
            "{} output={} range={:?} size={:?} resize={:?} mean={:?} std={:?} channels={:?}",
            self.file_hash, self.output, self.range, c.size, c.resize, c.mean, c.std, c.channels
        );
        hex(&Sha256::digest(text.as_bytes()))
    }

    /// The preprocessing in words.
    pub fn preprocessing(&self) -> String {
        let mut text = match (self.card.size, self.card.resize) {
            (Some([h, w]), Some(filter)) => format!("{} to {w}x{h}, ", filter.name()),
            _ => "no resizing, ".to_string(),
        };
        text += &format!("range [{}, {}]", self.range[0], self.range[1]);
        if self.card.mean.is_some() {
            text += ", then mean and std";
        }
        text
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
            let hint = match (c, self.card.channels) {
                (3, _) if fits([1, h, w]) || fits([h, w, 1]) => {
                    "the network takes grey images, and colour is not made grey: use grey images, or a network for colour"
                }
                (1, None) if fits([3, h, w]) || fits([h, w, 3]) => {
                    "the network takes colour: --feature-card channels=3 gives grey images three equal channels"
                }
                _ => "say how to resize: --feature-card size=[299,299] --feature-card resize=bicubic-antialias",
            };
            Err(Error::mismatch(format!("the feature network wants {}, the images are {images}", self.input))
                .hint(hint))
        }
    }

    /// The network's input for 8-bit images [N,C,H,W].
    fn prepare(&self, images: &HostTensor) -> Result<HostTensor> {
        let [n, c, h, w] = *images.shape() else {
            return Err(Error::mismatch(format!("images of shape {:?}", images.shape())));
        };
        let [oh, ow] = self.card.size.unwrap_or([h, w]);
        let copies = match self.card.channels {
            Some(wanted) if wanted != c && c == 1 => wanted,
            Some(wanted) if wanted != c => {
                return Err(Error::mismatch(format!("the images have {c} channels, the feature card says {wanted}"))
                    .hint("colour is not made grey: use grey images, or a network for colour"));
            }
            _ => 1,
        };
        let channels = c * copies;
        if let Some(mean) = self.card.mean.as_ref().filter(|m| m.len() != channels && m.len() != 1) {
            return Err(Error::mismatch(format!("{} means for {channels} channels", mean.len())));
        }
        let resizer =
            self.card.resize.filter(|_| [oh, ow] != [h, w]).map(|filter| Resizer::new(filter, [h, w], [oh, ow]));
        let (low, high) = (self.range[0] as f32, self.range[1] as f32);
        let mut values: Vec<f32> = Vec::with_capacity(n * channels * oh * ow);
        for image in images.bytes().chunks_exact(c * h * w) {
            for (channel, plane) in image.chunks_exact(h * w).enumerate() {
                let mut plane: Vec<f32> = plane.iter().map(|&v| f32::from(v)).collect();
                if let Some(resizer) = &resizer {
                    plane = resizer.plane(&plane);
                    // A cubic filter overshoots; the references cut that off.
                    plane.iter_mut().for_each(|v| *v = v.clamp(0.0, 255.0));
                }
                for copy in 0..copies {
                    let at = |list: &Option<Vec<f64>>, none: f64| {
                        list.as_ref().and_then(|l| l.get(channel + copy).or(l.last()).copied()).unwrap_or(none) as f32
                    };
                    let (mean, std) = (at(&self.card.mean, 0.0), at(&self.card.std, 1.0));
                    values.extend(plane.iter().map(|v| (low + (high - low) * (v / 255.0) - mean) / std));
                }
            }
        }
        let shape = match self.layout([channels, oh, ow])? {
            Layout::ChannelsFirst => vec![n, channels, oh, ow],
            Layout::Flat => vec![n, channels * oh * ow],
            Layout::ChannelsLast => {
                values = channels_last(&values, n, [channels, oh, ow]);
                vec![n, oh, ow, channels]
            }
        };
        let tensor = HostTensor::new(&shape, &values)?;
        if self.input.dtype == DType::U8 {
            // Resized values are no whole numbers: to the nearest.
            let rounded: Vec<f32> = values.iter().map(|v| v.round().clamp(0.0, 255.0)).collect();
            return Ok(HostTensor::new(&shape, &rounded)?.cast(DType::U8));
        }
        Ok(tensor.cast(self.input.dtype))
    }

    /// Features of 8-bit images [N,C,H,W], `batch` a call.
    pub fn see(&mut self, images: &HostTensor, batch: usize) -> Result<Seen> {
        let tensor = self.prepare(images)?;
        self.run(&tensor, batch)
    }

    /// Features `[N, D]` of samples that are no images, `[N, ...]`, which go in as they are, `batch` a call.
    ///
    /// Errors: an input that takes other samples.
    pub fn see_values(&mut self, samples: &HostTensor, batch: usize) -> Result<Array2<f32>> {
        let fits = |(d, s): (&Dim, &usize)| !matches!(d, Dim::Fixed(n) if n != s);
        let shape = &self.input.shape;
        if shape.len() != samples.rank() || !shape.iter().zip(samples.shape()).skip(1).all(fits) {
            let found = crate::axes::written(samples.shape().get(1..).unwrap_or_default());
            return Err(Error::mismatch(format!("the feature network wants {}, the samples are {found}", self.input))
                .hint("export it for samples in the shape of the teacher's"));
        }
        let tensor = samples.cast(self.input.dtype);
        Ok(self.run(&tensor, batch)?.features)
    }

    fn run(&mut self, tensor: &HostTensor, batch: usize) -> Result<Seen> {
        let n = tensor.shape().first().copied().unwrap_or(0);
        let name = self.input.name.clone();
        let inputs = |rows: usize| Ok(vec![(name.clone(), tensor.rows(0, rows)?)]);
        self.foresight.check(self.engine.as_mut(), batch.min(n), inputs)?;
        let mut outputs = run_batched(self.engine.as_mut(), &[(self.input.name.as_str(), tensor)], batch.max(1))?;
        let mut rows = |wanted: &str| -> Result<Array2<f32>> {
            let at = outputs.iter().position(|(name, _)| name == wanted);
            let (_, values) = outputs.swap_remove(at.ok_or_else(|| Error::backend(format!("no output `{wanted}`")))?);
            let dims = values.len().checked_div(n).unwrap_or(0);
            if values.shape().first() != Some(&n) || dims == 0 {
                let shape = values.shape();
                return Err(Error::mismatch(format!("output `{wanted}` has shape {shape:?} for {n} images")));
            }
            // Pooled features often come as [N, D, 1, 1].
            let rows = Array2::from_shape_vec((n, dims), values.to_f32());
            rows.map_err(|e| Error::mismatch(format!("output `{wanted}`: {e}")))
        };
        let same = self.logits.as_deref() == Some(self.output.as_str());
        let features = rows(&self.output)?;
        let logits = match &self.logits {
            Some(_) if same => Some(features.clone()),
            Some(name) => Some(rows(name)?),
            None => None,
        };
        Ok(Seen { features, logits })
    }

    /// Features of all images held at once, `batch` a call. `seen` is told how many more images are done.
    pub fn features(&mut self, images: &ImageSet, batch: usize, mut seen: impl FnMut(usize)) -> Result<FeatureMatrix> {
        let batch = batch.max(1);
        let mut parts = Vec::new();
        for start in (0..images.len()).step_by(batch) {
            let count = batch.min(images.len() - start);
            parts.push(self.see(&images.batch_u8(start, count)?, batch)?.features);
            seen(count);
        }
        let parts: Vec<_> = parts.iter().map(|p| p.view()).collect();
        let all = ndarray::concatenate(ndarray::Axis(0), &parts).map_err(|e| Error::mismatch(e.to_string()))?;
        FeatureMatrix::new(all.view())
    }
}

/// SHA-256 of a model file and of the external data its initializers lie in.
fn file_hash(bytes: &[u8], model: &ModelProto, folder: Option<&Path>) -> Result<String> {
    let mut hash = Sha256::new_with_prefix(bytes);
    let initializers = model.graph.iter().flat_map(|g| &g.initializer);
    let places = initializers.flat_map(|t| &t.external_data).filter(|e| e.key() == "location");
    let mut files: Vec<&str> = places.map(|e| e.value()).collect();
    files.sort_unstable();
    files.dedup();
    for name in files {
        // Only names beside the model: the loader refuses anything else.
        if let Some(folder) = folder.filter(|_| Path::new(name).components().count() == 1) {
            let path = folder.join(name);
            let mut file = crate::files::open(&path).with_context(|| path.display().to_string())?;
            std::io::copy(&mut file, &mut hash)?;
        }
    }
    Ok(hex(&hash.finalize()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
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
