//! The teacher card: what an ONNX file does not say about the diffusion model in it.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::axes::written;
pub use crate::axes::{Layout, Modality};
use crate::error::{Context, Error, Result};
use crate::graph::{Sizes, sizes};
use crate::shown::line;
use crate::tensor::DType;

use super::condition::Condition;
use super::schedule::{DEVIATIONS, Schedule, ScheduleSpec};

/// What the network's output is. `x_t = a x0 + b e`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Prediction {
    /// x0 itself; with an EDM schedule the preconditioning is inside the graph.
    Denoised,
    /// EDM's raw `F`: `D(x) = c_skip x + c_out F(c_in x)`.
    EdmRaw,
    /// The noise `e`.
    Epsilon,
    /// `a e - b x0` with `a^2 + b^2 = 1`.
    V,
    /// `e - x0` (rectified flow).
    Flow,
    /// `cos t e - sin t x0 / scale` (TrigFlow; Lu & Song 2024), for diffusion and consistency models alike.
    #[serde(rename = "trigflow")]
    TrigFlow,
    /// `-e`: the score times `b`, as EDM's VE networks (NCSN++) have it.
    ScaledScore,
    /// A consistency model's raw `F`: `f(x) = c_skip x + c_out F(c_in x)` with the boundary condition `f(x, sigma_min) = x`
    /// (Song et al. 2023). Its clean estimate lies on the sample's own trajectory; one evaluation makes an image.
    Consistency,
}

/// The number that the network takes as time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TimeUnit {
    /// The noise level sigma itself.
    Sigma,
    /// ln(sigma) / 4, EDM's c_noise.
    #[serde(rename = "ln-sigma-4")]
    LnSigma4,
    /// 250 ln(sigma): a thousand times c_noise, as the consistency models of OpenAI and diffusers have it.
    #[serde(rename = "ln-sigma-250")]
    LnSigma250,
    /// ln(sigma / 2), c_noise of EDM's VE networks.
    #[serde(rename = "ln-sigma-half")]
    LnSigmaHalf,
    /// TrigFlow's angle t, 0 to pi / 2.
    Radians,
    /// Index into a VP table, 0 to N-1.
    Step,
    /// \[0, 1\]: the flow's t, or the step divided by N-1.
    Unit,
    /// \[0, 1000\]: a thousand times [`TimeUnit::Unit`].
    Thousand,
}

fn one() -> f64 {
    1.0
}
fn half() -> f64 {
    0.5
}

/// What a teacher's ONNX file does not say about its diffusion model. docs/teacher-cards.md documents the fields under the same
/// names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TeacherCard {
    /// Graph input that takes the noisy sample.
    pub sample: String,
    /// Graph input that takes the noise level or time: rank 0, `[1]` or `[B]`.
    pub time: String,
    /// Graph output to use. Of twice the channels the first half is taken: a network that learns its variance (improved
    /// diffusion, ADM, DiT, PixArt) gives that in the second.
    pub output: String,
    /// What the network's output is.
    pub prediction: Prediction,
    /// The number that the network takes as time.
    pub time_unit: TimeUnit,
    /// One sample, without the batch, in the graph's own order; for [`Layout::Nhwc`] C, H, W.
    pub shape: Vec<usize>,
    /// Which axis of a sample holds the channels.
    #[serde(default)]
    pub layout: Layout,
    /// What a sample is; absent: by its rank ([`TeacherCard::modality`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modality: Option<Modality>,
    /// Values a second of a sample that is sound, Hz.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample_rate: Option<u32>,
    /// Lowest and highest value of a clean sample; absent for latents.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<[f64; 2]>,
    /// Standard deviation of the data, for EDM's preconditioning.
    #[serde(default = "half")]
    pub sigma_data: f64,
    /// Latents are the autoencoder's output times this.
    #[serde(default = "one")]
    pub latent_scale: f64,
    /// Name of the data set that the teacher was trained on, for people only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dataset: Option<String>,
    /// The noise schedule that the network was trained with.
    pub schedule: ScheduleSpec,
    /// The teacher's conditions, by the graph input that takes them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub conditions: BTreeMap<String, Condition>,
    /// Graph inputs that are always filled with one number, with that number.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub constants: BTreeMap<String, f64>,
    /// Where the graph takes more channels than the sample has: the names of its parts in the order in which they are joined, the
    /// sample's own among them, the others conditions of kind `embedding`. The join is put into the graph where the file is read,
    /// so that each part is an input of its own: no card that is in use has it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub concat: Vec<String>,
    /// Sizes of dimensions that the graph leaves free, by the names that the file has for them. What the shapes of the sample
    /// and of the conditions say need not be said here.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub dims: BTreeMap<String, usize>,
}

#[cfg(test)]
impl TeacherCard {
    /// A denoiser of `shape` in EDM's terms, without conditions.
    pub(crate) fn plain(shape: &[usize]) -> Self {
        Self {
            sample: "x".into(),
            time: "sigma".into(),
            output: "denoised".into(),
            prediction: Prediction::Denoised,
            time_unit: TimeUnit::Sigma,
            shape: shape.to_vec(),
            layout: Layout::ChannelsFirst,
            modality: None,
            sample_rate: None,
            range: None,
            sigma_data: 0.5,
            latent_scale: 1.0,
            dataset: None,
            schedule: ScheduleSpec::Edm { sigma_min: 0.002, sigma_max: 80.0, rho: 7.0 },
            conditions: BTreeMap::new(),
            constants: BTreeMap::new(),
            concat: Vec::new(),
            dims: BTreeMap::new(),
        }
    }
}

/// A graph input or output as its file declares it: `None` is a dynamic dimension.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputSpec {
    /// Name in the graph.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Size of each dimension, `None` where it is dynamic; empty for a scalar.
    pub shape: Vec<Option<usize>>,
}

impl InputSpec {
    /// An input or output with this name, element type and shape.
    pub fn new(name: impl Into<String>, dtype: DType, shape: &[Option<usize>]) -> Self {
        Self { name: name.into(), dtype, shape: shape.to_vec() }
    }
}

impl From<(String, DType, Vec<Option<usize>>)> for InputSpec {
    fn from((name, dtype, shape): (String, DType, Vec<Option<usize>>)) -> Self {
        Self { name, dtype, shape }
    }
}

impl From<&crate::graph::Port> for InputSpec {
    /// An element type or shape that the file leaves out reads as a f32 scalar.
    fn from(port: &crate::graph::Port) -> Self {
        let shape = port.shape.iter().flatten().map(|d| d.as_ref().ok().copied()).collect();
        Self { name: port.name.clone(), dtype: port.dtype.unwrap_or(DType::F32), shape }
    }
}

impl From<&crate::runtime::ValueInfo> for InputSpec {
    fn from(value: &crate::runtime::ValueInfo) -> Self {
        use crate::runtime::Dim;
        let size = |d: &Dim| match d {
            Dim::Fixed(n) => Some(*n),
            Dim::Symbol(_) => None,
        };
        Self { name: value.name.clone(), dtype: value.dtype, shape: value.shape.iter().map(size).collect() }
    }
}

impl std::fmt::Display for InputSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let dims: Vec<_> = self.shape.iter().map(|d| d.map_or("?".into(), |d| d.to_string())).collect();
        write!(f, "{} {}[{}]", line(&self.name), self.dtype, dims.join(", "))
    }
}

impl TeacherCard {
    /// Elements of one sample.
    pub fn sample_len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Sizes of the free dimensions of a graph with these inputs: `dims`, and the shapes of the sample and of the conditions.
    ///
    /// Errors: `dims` names a dimension that no input has.
    pub fn sizes(&self, inputs: &[sizes::Declared]) -> Result<Sizes> {
        let rows = self.conditions.iter().map(|(name, condition)| (name.clone(), condition.row_shape()));
        Sizes::new(inputs, &self.dims, rows.chain([(self.sample.clone(), self.graph_shape())]))
    }

    /// The schedule with its tables.
    pub fn schedule(&self) -> Result<Schedule> {
        Schedule::new(&self.schedule)
    }

    /// Number of classes of the first class condition, where there is one.
    pub fn classes(&self) -> Option<usize> {
        self.conditions.values().find_map(Condition::classes)
    }

    /// Checks every value; whether prediction, time unit and schedule go together is [`super::Conversion::new`]'s to say.
    pub fn validate(&self) -> Result<()> {
        let bad = |what: String| Err(Error::usage(format!("card: {what}")));
        for (key, name) in [("sample", &self.sample), ("time", &self.time), ("output", &self.output)] {
            if name.is_empty() {
                return bad(format!("`{key}` is empty"));
            }
        }
        self.validate_axes()?;
        if let Some([low, high]) = self.range
            && !(low < high && low.abs().max(high.abs()) <= *DEVIATIONS.end())
        {
            let most = *DEVIATIONS.end();
            return bad(format!(
                "`range` is [{low:?}, {high:?}], expected a low and a higher value of at most {most:?} in size"
            ));
        }
        for (key, value) in [("sigma_data", self.sigma_data), ("latent_scale", self.latent_scale)] {
            if !DEVIATIONS.contains(&value) {
                let (low, high) = DEVIATIONS.into_inner();
                return bad(format!("`{key}` is {value:?}, expected a number from {low:?} to {high:?}"));
            }
        }
        let mut used = vec![("sample", &self.sample)];
        let rest = std::iter::once(("time", &self.time))
            .chain(self.conditions.keys().map(|k| ("conditions", k)))
            .chain(self.constants.keys().map(|k| ("constants", k)));
        for (key, name) in rest {
            if let Some((other, _)) = used.iter().find(|(_, n)| *n == name) {
                return bad(format!("graph input `{name}` is named by both `{other}` and `{key}`"));
            }
            used.push((key, name));
        }
        for (name, condition) in &self.conditions {
            condition.validate().with_context(|| format!("card key `conditions.{name}`"))?;
        }
        self.validate_concat()?;
        if let Some((name, _)) = self.dims.iter().find(|(_, n)| **n == 0) {
            return bad(format!("`dims.{name}` is 0, expected 1 or more"));
        }
        if let Some((name, value)) = self.constants.iter().find(|(_, v)| v.is_nan()) {
            return bad(format!("`constants.{name}` is {value}"));
        }
        Ok(())
    }

    /// Checks that the graph has what the card names and that every graph input is covered. `inputs` without
    /// initializers.
    pub fn check_against(&self, inputs: &[InputSpec], outputs: &[InputSpec]) -> Result<()> {
        let graph = Ports { inputs, outputs };
        let fail = |what: String| graph.contradicted(what);
        let sample = graph.input("sample", &self.sample)?;
        let time = graph.input("time", &self.time)?;
        let output = outputs.iter().find(|v| v.name == self.output);
        let output =
            output.ok_or_else(|| fail(format!("`output` names `{}`, which is no output of the graph", self.output)))?;
        let row = self.graph_shape();
        if !sample.dtype.is_float() {
            return Err(fail(format!("sample `{sample}` is of type {}, which is not a float", sample.dtype)));
        }
        if let Some((given, made)) = joined(sample, output) {
            return Err(Error::unsupported(format!(
                "the network takes {given} channels as `{}` and gives {made} as `{}`: the others are conditions that its caller joins \
                 to the sample (inpainting, an image to edit or to enlarge)",
                sample.name, output.name
            ))
            .hint(format!(
                "the card says which they are, in their order: shape = the sample's, concat = [\"{}\", \"mask\", ...], and for each of the \
                 others conditions.NAME.kind = \"embedding\" with its shape",
                sample.name
            )));
        }
        if !fits(&sample.shape, &row) {
            return Err(fail(format!("sample `{sample}` does not fit {}{}", written(&row), says(sample, self))));
        }
        // Exporters may leave an output's shape out; it reads like a scalar then.
        let both = self.graph_shape_with_variance();
        if !output.shape.is_empty()
            && !fits(&output.shape, &row)
            && !both.as_ref().is_some_and(|both| fits(&output.shape, both))
        {
            let twice = match both {
                Some(_) if self.rank() > 1 => {
                    ", nor twice the channels, of which the second half is a learned variance"
                }
                Some(_) => ", nor twice as many values, of which the second half is a learned variance",
                None => "",
            };
            return Err(fail(format!("output `{output}` does not fit {}{twice}", written(&row))));
        }
        let batch = sample.shape[0];
        let lead = time.shape.first().copied().flatten();
        if time.shape.iter().skip(1).any(|d| d.is_some_and(|d| d != 1)) || lead.is_some_and(|d| d != 1 && batch != lead)
        {
            return Err(fail(format!("time `{time}` is not one number a sample (rank 0, [1] or [B])")));
        }
        if time.dtype == DType::Bool || (!time.dtype.is_float() && !matches!(self.time_unit, TimeUnit::Step)) {
            let unit = self.time_unit;
            return Err(fail(format!(
                "time `{time}` is of type {}, which cannot hold the fractions of {unit:?}",
                time.dtype
            )));
        }
        self.check_rest(&graph, batch)
    }

    /// The conditions and constants, and that no input is left over.
    fn check_rest(&self, graph: &Ports, batch: Option<usize>) -> Result<()> {
        for (name, condition) in &self.conditions {
            let input = graph.input("conditions", name)?;
            let fitting = match condition {
                Condition::ClassIndex { .. } => input.shape.len() <= 1 || fits(&input.shape, &[1]),
                _ => fits(&input.shape, &condition.row_shape()),
            };
            if input.dtype == DType::Bool && matches!(condition, Condition::ClassIndex { .. }) {
                let rows = "the rows of a mask are an `embedding`";
                return Err(
                    graph.contradicted(format!("condition `{input}` holds booleans, which no class index is; {rows}"))
                );
            }
            // Of an array without a batch dimension the first is no row.
            let lead = input.shape.first().copied().flatten();
            let without = input.shape.len() == condition.row_shape().len()
                && !input.shape.is_empty()
                && input.shape.iter().zip(condition.row_shape()).all(|(d, n)| d.is_none_or(|d| d == n));
            if (!fitting && without) || (fitting && lead.is_some_and(|n| n != 1 && batch != lead)) {
                return Err(graph.without_batch(format!("condition `{input}` does not begin with the batch"), input));
            }
            if !fitting {
                return Err(graph.contradicted(format!("condition `{input}` does not fit {condition:?}")));
            }
        }
        for name in self.constants.keys() {
            graph.input("constants", name)?;
        }
        let covered = |name: &str| {
            name == self.sample
                || name == self.time
                || self.conditions.contains_key(name)
                || self.constants.contains_key(name)
        };
        let open: Vec<_> = graph.inputs.iter().filter(|i| !covered(&i.name)).collect();
        let names = open.iter().map(|i| format!("`{}`", i.name)).collect::<Vec<_>>().join(", ");
        let what = format!("input {names} is neither sample, time, a condition nor a constant of the card");
        let without = |i: &&&InputSpec| i.shape.first().copied().flatten().is_some_and(|n| n != 1 && batch != Some(n));
        match (open.is_empty(), open.iter().find(without)) {
            (true, _) => Ok(()),
            (_, None) => Err(graph.contradicted(what)),
            (_, Some(input)) => {
                Err(graph.without_batch(format!("{what}, and `{input}` does not begin with the batch"), input))
            }
        }
    }

    /// One `(dotted key, TOML value)` a leaf, for files and tables.
    pub fn leaves(&self) -> Result<Vec<(String, toml::Value)>> {
        let table = toml::Table::try_from(self).map_err(|e| Error::usage(format!("card: {e}")))?;
        let mut leaves = Vec::new();
        flatten(String::new(), toml::Value::Table(table), &mut leaves);
        // The layout of images under its first name, which files and readers of before know.
        let images = self.rank() == 3 && self.layout == Layout::ChannelsFirst;
        for (_, value) in leaves.iter_mut().filter(|(key, _)| images && key == "layout") {
            *value = "nchw".into();
        }
        Ok(leaves)
    }

    /// Keys with different values, as `(key, here, there)`; a key that one of them leaves out is `unset` there. The name of the
    /// data set says nothing about the network.
    pub fn differences(&self, other: &Self) -> Result<Vec<(String, String, String)>> {
        let table = |card: &Self| -> Result<BTreeMap<String, String>> {
            let leaves = card.leaves()?.into_iter().filter(|(key, _)| key != "dataset");
            Ok(leaves.map(|(key, value)| (key, value.to_string())).collect())
        };
        let (here, there) = (table(self)?, table(other)?);
        let keys: BTreeSet<&String> = here.keys().chain(there.keys()).collect();
        let text = |of: &BTreeMap<String, String>, key: &String| of.get(key).cloned().unwrap_or_else(|| "unset".into());
        let both = keys.into_iter().map(|key| (key.clone(), text(&here, key), text(&there, key)));
        Ok(both.filter(|(_, a, b)| a != b).collect())
    }

    /// `metadata_props` entries: `disback.<dotted key>` to the value as TOML text.
    pub fn to_metadata(&self) -> Result<Vec<(String, String)>> {
        Ok(self.leaves()?.into_iter().map(|(k, v)| (format!("disback.{k}"), v.to_string())).collect())
    }

    /// The side file's text.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Error::usage(format!("card: {e}")))
    }
}

/// A graph's inputs and outputs, for what a card says of them.
struct Ports<'a> {
    inputs: &'a [InputSpec],
    outputs: &'a [InputSpec],
}

impl Ports<'_> {
    fn input(&self, key: &str, name: &str) -> Result<&InputSpec> {
        let found = self.inputs.iter().find(|v| v.name == name);
        found.ok_or_else(|| self.contradicted(format!("`{key}` names `{name}`, which is no input of the graph")))
    }

    fn unlike(&self, what: String) -> Error {
        let list = |values: &[InputSpec]| values.iter().map(|v| v.to_string()).collect::<Vec<_>>().join("; ");
        let (inputs, outputs) = (list(self.inputs), list(self.outputs));
        Error::usage(format!("the card contradicts the graph: {what}"))
            .lines([format!("graph inputs: {inputs}"), format!("graph outputs: {outputs}")])
    }

    fn contradicted(&self, what: String) -> Error {
        self.unlike(what).hint("correct the card: --card key=value, <model>.card.toml, or the model's metadata_props")
    }

    /// Of an input without the batch the value is the same in every call.
    fn without_batch(&self, what: String, input: &InputSpec) -> Error {
        let hint = "an input without the batch has the same value in every call: numpy.save it beside the model and write into \
                    <model>.card.toml";
        self.unlike(what).hint(hint).hint_lines(input.as_constant())
    }
}

/// What the graph declares of the sample, as the card would have it; empty where it leaves a size open.
fn says(sample: &InputSpec, card: &TeacherCard) -> String {
    let row: Option<Vec<usize>> = sample.shape.get(1..).and_then(|dims| dims.iter().copied().collect());
    match (row.as_deref(), card.shape.as_slice()) {
        (None | Some([]), _) => String::new(),
        (Some([a, b, last]), [c, h, w]) if [a, b, last] == [h, w, c] && card.layout != Layout::Nhwc => {
            "; layout = \"nhwc\" is for images with the channels last".into()
        }
        _ if card.layout == Layout::Nhwc => String::new(),
        (Some(row), _) => format!("; by the graph it is shape = {row:?}"),
    }
}

/// Channels in and out, where the graph takes more of them than it gives and is the same otherwise. (Of twice as many that come
/// out, the second half is a learned variance.)
pub(crate) fn joined(sample: &InputSpec, output: &InputSpec) -> Option<(usize, usize)> {
    if sample.shape.len() < 3 || sample.shape.len() != output.shape.len() {
        return None;
    }
    let pairs = || sample.shape.iter().zip(&output.shape).skip(1);
    let mut unlike = pairs().filter_map(|(a, b)| a.zip(*b)).filter(|(a, b)| a != b);
    let found = unlike.next().filter(|(given, made)| given > made)?;
    unlike.next().is_none().then_some(found)
}

/// A graph's shape against `[B, ...row]`; dynamic dimensions fit anything.
fn fits(shape: &[Option<usize>], row: &[usize]) -> bool {
    shape.len() == row.len() + 1 && shape[1..].iter().zip(row).all(|(d, r)| d.is_none_or(|d| d == *r))
}

fn flatten(key: String, value: toml::Value, leaves: &mut Vec<(String, toml::Value)>) {
    match value {
        toml::Value::Table(table) => {
            for (name, value) in table {
                let key = if key.is_empty() { name } else { format!("{key}.{name}") };
                flatten(key, value, leaves);
            }
        }
        value => leaves.push((key, value)),
    }
}

#[cfg(test)]
#[path = "card_tests.rs"]
mod tests;
