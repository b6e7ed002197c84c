//! The feature card: what an ONNX feature network does not say about itself, and what decides the figure: the resize filter, the
//! value range, the normalisation, the layer. From the command line, else from `<model>.features.toml` beside the network, else
//! from its `metadata_props` under `disback.features.`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toml::Value;

use super::resize::Filter;
use crate::error::{Context, Error, Kind, Result};
use crate::runtime::student::parse_value;

/// Keys of the card.
pub const KEYS: [&str; 8] = ["output", "logits", "range", "size", "resize", "mean", "std", "channels"];
/// Entries of the metadata that say the same as the graph.
const SILENT: [&str; 4] = ["input", "shape", "name", "source"];

/// How images become the network's input, and which of its outputs are looked at.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FeatureCard {
    /// Output with the features, one row an image.
    pub output: Option<String>,
    /// Output with class scores before the softmax, for the Inception Score.
    pub logits: Option<String>,
    /// What 0 and 255 become, before mean and std.
    pub range: Option<[f64; 2]>,
    /// Height and width that images are resized to.
    pub size: Option<[usize; 2]>,
    /// Filter that resizes the images; given together with `size`.
    pub resize: Option<Filter>,
    /// What is subtracted from each channel, after `range` is applied; one number a channel.
    pub mean: Option<Vec<f64>>,
    /// What each channel is divided by, after `mean` is subtracted; one number a channel.
    pub std: Option<Vec<f64>>,
    /// 3: grey images are given three equal channels.
    pub channels: Option<usize>,
}

fn numbers(value: &Value) -> Option<Vec<f64>> {
    let number = |v: &Value| v.as_float().or_else(|| v.as_integer().map(|i| i as f64));
    value.as_array()?.iter().map(number).collect()
}

impl FeatureCard {
    /// Sets one key. What makes no sense is refused.
    pub fn set(&mut self, key: &str, value: &Value) -> Result<()> {
        let bad = |wanted: &str| Error::usage(format!("feature card, {key} = {value}: expected {wanted}"));
        let text = || value.as_str().map(str::to_string).ok_or_else(|| bad("a name"));
        match key {
            "output" => self.output = Some(text()?),
            "logits" => self.logits = Some(text()?),
            "range" => {
                let pair: Option<[f64; 2]> = numbers(value).and_then(|v| v.try_into().ok());
                self.range = Some(pair.filter(|[a, b]| a < b).ok_or_else(|| bad("[low, high]"))?);
            }
            "size" => {
                let whole = |v: f64| (1.0..=8192.0).contains(&v).then_some(v as usize).filter(|n| *n as f64 == v);
                let pair = numbers(value).and_then(|v| match v[..] {
                    [h, w] => Some([whole(h)?, whole(w)?]),
                    _ => None,
                });
                self.size = Some(pair.ok_or_else(|| bad("[height, width]"))?);
            }
            "resize" => self.resize = Some(text()?.parse()?),
            "mean" => self.mean = Some(numbers(value).ok_or_else(|| bad("a list of numbers"))?),
            "std" => {
                let std = numbers(value).filter(|v| v.iter().all(|s| *s > 0.0));
                self.std = Some(std.ok_or_else(|| bad("a list of numbers above 0"))?);
            }
            "channels" => {
                let n = value.as_integer().filter(|n| [1, 3].contains(n));
                self.channels = Some(n.ok_or_else(|| bad("1 or 3"))? as usize);
            }
            _ => {
                return Err(Error::usage(format!("feature card: unknown key `{key}`"))
                    .hint(format!("known keys: {}", KEYS.join(", "))));
            }
        }
        Ok(())
    }

    /// The card of a network: metadata (without the prefix `disback.`), then the file beside the model, then `overrides`
    /// (`key=value`).
    pub fn resolve(metadata: &BTreeMap<String, String>, model: Option<&Path>, overrides: &[String]) -> Result<Self> {
        let mut card = Self::default();
        for (key, text) in metadata {
            if let Some(key) = key.strip_prefix("features.").filter(|k| !SILENT.contains(k)) {
                card.set(key, &parse_value(text)).context("metadata disback.features")?;
            }
        }
        if let Some(path) = model.map(side_file).filter(|p| p.is_file()) {
            let read = || -> Result<toml::Table> {
                let text = crate::files::read_text(&path, crate::files::SETTINGS)?;
                toml::from_str(&text).map_err(|e| Error::of_text(Kind::Usage, &format!("not TOML: {e}")))
            };
            let table = read().with_context(|| path.display().to_string())?;
            for (key, value) in table.iter().filter(|(k, _)| !SILENT.contains(&k.as_str())) {
                card.set(key, value).with_context(|| path.display().to_string())?;
            }
        }
        for entry in overrides {
            let (key, text) = entry
                .split_once('=')
                .ok_or_else(|| Error::usage(format!("--feature-card {entry}: expected KEY=VALUE")))?;
            card.set(key.trim(), &parse_value(text.trim())).with_context(|| format!("--feature-card {entry}"))?;
        }
        if card.size.is_some() != card.resize.is_some() {
            return Err(Error::usage("feature card: size and resize belong together").hint(
                "the filter decides the figure; clean-fid, DINOv2, CLIP: bicubic-antialias; pytorch-fid: bilinear",
            ));
        }
        if card.mean.as_ref().map(Vec::len) != card.std.as_ref().map(Vec::len) {
            return Err(Error::usage("feature card: mean and std belong together, a number a channel each"));
        }
        Ok(card)
    }
}

/// `inception.onnx` -> `inception.features.toml`.
pub fn side_file(model: &Path) -> PathBuf {
    model.with_extension("features.toml")
}
