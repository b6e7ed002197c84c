//! Where a card comes from. The command line wins over `<model>.card.toml`, that over the model's `metadata_props`, that
//! over diffusers' `scheduler_config.json` beside the model. Each value remembers its origin.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};
use crate::graph::sizes;
use crate::onnx::ModelProto;

use super::card::TeacherCard;
use super::conversion::Conversion;
use super::scheduler_config;

/// Where a value was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    CommandLine,
    SideFile(PathBuf),
    Metadata,
    SchedulerConfig(PathBuf),
    /// The rows of the file that `conditions.file` names.
    ConditionsFile,
    /// The graph's own shape of an input.
    Graph,
    /// The graph has no other.
    OnlyOne,
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |p: &Path| p.file_name().unwrap_or(p.as_os_str()).to_string_lossy().into_owned();
        match self {
            Self::CommandLine => f.write_str("from --card"),
            Self::SideFile(path) | Self::SchedulerConfig(path) => write!(f, "from {}", name(path)),
            Self::Metadata => f.write_str("from metadata"),
            Self::ConditionsFile => f.write_str("from conditions.file"),
            Self::Graph => f.write_str("from the graph"),
            Self::OnlyOne => f.write_str("the only one"),
            Self::Default => f.write_str("default"),
        }
    }
}

/// A card, where each of its values came from, and the model's other `disback.*` metadata.
#[derive(Debug, Clone, PartialEq)]
pub struct ResolvedCard {
    pub card: TeacherCard,
    /// By dotted key; what is not here is [`Origin::Default`].
    pub origins: BTreeMap<String, Origin>,
    /// `disback.*` metadata that is no card key (student, provenance, ...), without the prefix.
    pub extra: BTreeMap<String, String>,
}

impl ResolvedCard {
    /// Every value of the card: dotted key, TOML text, origin.
    pub fn rows(&self) -> Result<Vec<(String, String, Origin)>> {
        let leaves = self.card.leaves()?;
        Ok(leaves
            .into_iter()
            .map(|(key, value)| {
                let origin = self.origins.get(&key).cloned().unwrap_or(Origin::Default);
                (key, value.to_string(), origin)
            })
            .collect())
    }
}

/// Sub-trees of `disback.*` metadata that belong to others than the card.
const FOREIGN: [&str; 10] = [
    "student",
    "features",
    "provenance",
    "parameters",
    "converter",
    "teacher",
    "training",
    "license",
    "version",
    "same_graph",
];
const TOP: [&str; 15] = [
    "sample",
    "time",
    "output",
    "prediction",
    "time_unit",
    "shape",
    "layout",
    "range",
    "sigma_data",
    "latent_scale",
    "dataset",
    "schedule",
    "conditions",
    "constants",
    "dims",
];
const SCHEDULE: [&str; 11] =
    ["kind", "sigma_min", "sigma_max", "rho", "betas", "beta_start", "beta_end", "steps", "table", "shift", "scale"];
const CONDITION: [&str; 4] = ["kind", "classes", "null", "shape"];
const NEEDED: [&str; 7] = ["sample", "time", "output", "prediction", "time_unit", "shape", "schedule.kind"];

/// A leaf's path: `["prediction"]`, `["schedule", "kind"]`, `["conditions", input, "kind"]`, `["constants", input]`.
/// Names of graph inputs may hold dots themselves.
type Key = Vec<String>;

#[derive(Debug, Clone)]
struct Leaf {
    value: toml::Value,
    /// The text as given, for keys that take any string.
    text: Option<String>,
    origin: Origin,
}

type Leaves = BTreeMap<Key, Leaf>;

/// Collects the sources of a card.
#[derive(Debug, Clone, Default)]
pub struct CardSource {
    model: Option<PathBuf>,
    metadata: Vec<(String, String)>,
    overrides: Vec<String>,
    /// Of the graph, by its file.
    inputs: Vec<sizes::Declared>,
    rows: BTreeMap<String, Vec<usize>>,
    only_output: Option<String>,
}

impl CardSource {
    pub fn new() -> Self {
        Self::default()
    }

    /// The ONNX file, beside which a side file or scheduler configuration may lie.
    #[must_use]
    pub fn model(mut self, path: &Path) -> Self {
        self.model = Some(path.to_owned());
        self
    }

    /// The model's `metadata_props`.
    #[must_use]
    pub fn metadata<K: Into<String>, V: Into<String>>(mut self, props: impl IntoIterator<Item = (K, V)>) -> Self {
        self.metadata.extend(props.into_iter().map(|(k, v)| (k.into(), v.into())));
        self
    }

    /// `key=value` of the command line, later ones winning.
    #[must_use]
    pub fn overrides<S: Into<String>>(mut self, list: impl IntoIterator<Item = S>) -> Self {
        self.overrides.extend(list.into_iter().map(Into::into));
        self
    }

    /// Shapes of one row of the arrays in a file of conditions: an embedding whose card says no shape has that.
    #[must_use]
    pub fn rows(mut self, rows: impl IntoIterator<Item = (String, Vec<usize>)>) -> Self {
        self.rows.extend(rows);
        self
    }

    /// The file's metadata and graph. Where the graph has one output, a card need not name it; where it says the shape of an
    /// embedding (with the card's `dims`, where it leaves some free), a card need not repeat it.
    #[must_use]
    pub fn proto(mut self, proto: &ModelProto) -> Self {
        self = self.metadata(proto.metadata_props.iter().map(|p| (p.key(), p.value())));
        let Some(graph) = &proto.graph else { return self };
        self.inputs = sizes::declared_inputs(graph);
        self.outputs(graph.output.iter().map(|o| o.name()))
    }

    /// The graph's outputs: where there is one, a card need not name it.
    #[must_use]
    pub fn outputs<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        let mut names = names.into_iter().map(Into::into);
        self.only_output = names.next().filter(|_| names.next().is_none());
        self
    }

    /// Merges the sources into one validated card.
    pub fn resolve(&self) -> Result<ResolvedCard> {
        let mut extra = BTreeMap::new();
        let mut merged = self.merged(&mut extra)?;
        if let Some(name) = self.only_output.as_ref().filter(|_| !merged.is_empty()) {
            let leaf = || Leaf { value: name.clone().into(), text: None, origin: Origin::OnlyOne };
            merged.entry(vec!["output".into()]).or_insert_with(leaf);
        }
        let missing: Vec<_> =
            NEEDED.iter().filter(|n| !merged.contains_key(&n.split('.').map(String::from).collect::<Key>())).collect();
        if !missing.is_empty() {
            return Err(self.missing(merged.is_empty(), &missing));
        }
        let card = build(&merged)?;
        card.validate()?;
        Conversion::new(&card)?;
        let origins = merged.into_iter().map(|(key, leaf)| (key.join("."), leaf.origin)).collect();
        Ok(ResolvedCard { card, origins, extra })
    }

    /// What the sources say, complete or not: path of each key, its value and where it came from.
    pub fn known(&self) -> Result<BTreeMap<Vec<String>, (toml::Value, Origin)>> {
        let merged = self.merged(&mut BTreeMap::new())?;
        Ok(merged.into_iter().map(|(key, leaf)| (key, (leaf.value, leaf.origin))).collect())
    }

    fn merged(&self, extra: &mut BTreeMap<String, String>) -> Result<Leaves> {
        let mut layers = Vec::new();
        let metadata = self.metadata_leaves(extra)?;
        let side = self.side_file_leaves()?;
        let command = self.command_line_leaves()?;
        let kind: Key = vec!["schedule".into(), "kind".into()];
        let stated = [&metadata, &side, &command].iter().any(|l| l.contains_key(&kind));
        match self.scheduler_leaves() {
            Ok(leaves) => layers.push(leaves),
            // A scheduler that we cannot express is no matter where the card itself says what holds.
            Err(e) if !stated => return Err(e),
            Err(_) => {}
        }
        layers.extend([metadata, side, command]);
        let mut merged = merge(layers);
        self.add_shapes(&mut merged);
        Ok(merged)
    }

    /// Shapes of embeddings that no source says, from the file of conditions or the graph.
    fn add_shapes(&self, merged: &mut Leaves) {
        let size = |name: &String| merged.get(&vec!["dims".into(), name.clone()])?.value.as_integer()?.try_into().ok();
        let in_graph = |(name, dims): &sizes::Declared| {
            let known = |dim: &Result<usize, String>| match dim {
                Ok(n) => Some(*n),
                Err(symbol) => size(symbol),
            };
            let row: Option<Vec<usize>> = dims.iter().skip(1).map(known).collect();
            Some((name.clone(), row?, Origin::Graph))
        };
        let in_file = self.rows.iter().map(|(name, row)| (name.clone(), row.clone(), Origin::ConditionsFile));
        let found: Vec<_> = in_file.chain(self.inputs.iter().filter_map(in_graph)).collect();
        for (name, row, origin) in found {
            let key = |leaf: &str| -> Key { vec!["conditions".into(), name.clone(), leaf.into()] };
            if merged.get(&key("kind")).and_then(|l| l.value.as_str()) == Some("embedding") {
                let value = row.iter().map(|n| toml::Value::from(*n as i64)).collect::<Vec<_>>().into();
                merged.entry(key("shape")).or_insert(Leaf { value, text: None, origin });
            }
        }
    }

    fn missing(&self, all: bool, missing: &[&&str]) -> Error {
        let list = missing.iter().map(|m| format!("`{m}`")).collect::<Vec<_>>().join(", ");
        let whose = self.model.as_ref().map_or("the model".into(), |m| m.display().to_string());
        let what = if all { "no teacher card" } else { "the teacher card is incomplete" };
        let side = self.model.as_ref().map_or("<model>.card.toml".into(), |m| side_files(m)[0].display().to_string());
        Error::usage(format!("{whose}: {what}: missing {list}")).hint(format!(
            "`disback inspect {whose} --write-card` proposes them; or give them on the command line (--card key=value), in {side}, or in the model's metadata_props as \
             `disback.<key>`; a diffusers scheduler_config.json beside the model gives prediction, time_unit and schedule"
        ))
    }

    fn command_line_leaves(&self) -> Result<Leaves> {
        let mut leaves = Leaves::new();
        for item in &self.overrides {
            let (key, value) =
                item.split_once('=').ok_or_else(|| Error::usage(format!("--card {item}: expected key=value")))?;
            let run = || -> Result<Leaves> {
                let mut one = Leaves::new();
                insert_text(key.trim(), value.trim(), &Origin::CommandLine, &mut one)?;
                Ok(one)
            };
            leaves = merge(vec![leaves, run().with_context(|| format!("--card {item}"))?]);
        }
        Ok(leaves)
    }

    fn side_file_leaves(&self) -> Result<Leaves> {
        let Some(model) = &self.model else { return Ok(Leaves::new()) };
        let found: Vec<_> = side_files(model).into_iter().filter(|p| p.is_file()).collect();
        let path = match found.as_slice() {
            [] => return Ok(Leaves::new()),
            [path] => path,
            _ => {
                return Err(Error::usage(format!(
                    "two cards for one model: {} and {}",
                    found[0].display(),
                    found[1].display()
                )));
            }
        };
        let run = || -> Result<Leaves> {
            let text = std::fs::read_to_string(path)?;
            let table: toml::Table = text
                .parse()
                .map_err(|e: toml::de::Error| Error::usage(format!("not TOML: {}", e.to_string().trim_end())))?;
            let mut leaves = Leaves::new();
            insert(vec![], toml::Value::Table(table), None, &Origin::SideFile(path.clone()), &mut leaves)?;
            Ok(leaves)
        };
        run().with_context(|| path.display().to_string())
    }

    fn metadata_leaves(&self, extra: &mut BTreeMap<String, String>) -> Result<Leaves> {
        let mut leaves = Leaves::new();
        for (name, value) in &self.metadata {
            let Some(key) = name.strip_prefix("disback.") else { continue };
            if FOREIGN.contains(&key.split('.').next().unwrap_or_default()) {
                extra.insert(key.into(), value.clone());
                continue;
            }
            insert_text(key, value.trim(), &Origin::Metadata, &mut leaves)
                .with_context(|| format!("metadata `{name}`"))?;
        }
        Ok(leaves)
    }

    fn scheduler_leaves(&self) -> Result<Leaves> {
        let mut leaves = Leaves::new();
        if let Some(dir) = self.model.as_ref().map(|m| m.parent().unwrap_or(Path::new(""))) {
            // Beside the model, or where a diffusers pipeline has it beside the `unet` folder.
            let places = [dir.join("scheduler_config.json"), dir.join("../scheduler/scheduler_config.json")];
            if let Some(path) = places.into_iter().find(|p| p.is_file()) {
                for (key, value) in scheduler_config::read(&path)? {
                    insert(split(&key)?, value, None, &Origin::SchedulerConfig(path.clone()), &mut leaves)?;
                }
            }
        }
        Ok(leaves)
    }
}

/// `teacher.card.toml` and `teacher.onnx.card.toml` for `teacher.onnx`.
fn side_files(model: &Path) -> [PathBuf; 2] {
    let full = model.file_name().unwrap_or_default().to_string_lossy().into_owned();
    [model.with_extension("card.toml"), model.with_file_name(format!("{full}.card.toml"))]
}

/// Later layers win leaf by leaf; where a layer changes the kind of a schedule or condition, the values that belonged to
/// the former kind go with it.
fn merge(layers: Vec<Leaves>) -> Leaves {
    let mut merged = Leaves::new();
    for layer in layers {
        for (key, leaf) in &layer {
            let (Some(last), prefix) = (key.last(), &key[..key.len() - 1]) else { continue };
            if last == "kind" && !prefix.is_empty() && merged.get(key).is_some_and(|old| old.value != leaf.value) {
                merged.retain(|k, _| !k.starts_with(prefix));
            }
        }
        merged.extend(layer);
    }
    merged
}

/// A dotted key into its path. `conditions.<input>.<field>` and `constants.<input>` take dots within `<input>`; quotes
/// around a part are dropped.
fn split(key: &str) -> Result<Key> {
    let unquote = |s: &str| s.trim_matches(|c| c == '"' || c == '\'').to_owned();
    let Some((head, rest)) = key.split_once('.') else { return Ok(vec![key.to_owned()]) };
    Ok(match head {
        "conditions" => match rest.rsplit_once('.') {
            Some((input, field)) if CONDITION.contains(&field) => vec![head.into(), unquote(input), field.into()],
            // `conditions.labels.clases`: a wrong field, unless the input's own name has the dot (then it is a table).
            _ => vec![head.into(), unquote(rest)],
        },
        "constants" | "dims" => vec![head.into(), unquote(rest)],
        _ => key.split('.').map(unquote).collect(),
    })
}

fn insert_text(key: &str, text: &str, origin: &Origin, leaves: &mut Leaves) -> Result<()> {
    // What is no TOML value is a plain string.
    let parsed =
        format!("v = {text}").parse::<toml::Table>().ok().filter(|t| t.len() == 1).and_then(|mut t| t.remove("v"));
    let value = parsed.unwrap_or_else(|| toml::Value::String(text.to_owned()));
    insert(split(key)?, value, Some(text), origin, leaves)
}

fn insert(key: Key, value: toml::Value, text: Option<&str>, origin: &Origin, leaves: &mut Leaves) -> Result<()> {
    check_known(&key, value.is_table())?;
    if let toml::Value::Table(table) = value {
        for (name, value) in table {
            let mut key = key.clone();
            key.push(name);
            insert(key, value, None, origin, leaves)?;
        }
        return Ok(());
    }
    leaves.insert(key, Leaf { value, text: text.map(str::to_owned), origin: origin.clone() });
    Ok(())
}

fn check_known(key: &Key, is_table: bool) -> Result<()> {
    let parts: Vec<&str> = key.iter().map(String::as_str).collect();
    let refuse = |known: &[&str], found: &str| {
        let nearest =
            known.iter().max_by(|a, b| strsim::jaro_winkler(a, found).total_cmp(&strsim::jaro_winkler(b, found)));
        Err(Error::usage(format!("unknown card key `{}`", parts.join(".")))
            .hint(format!("the nearest known key is `{}`", nearest.unwrap_or(&""))))
    };
    match parts.as_slice() {
        [] => Ok(()),
        ["schedule" | "conditions" | "constants" | "dims"] if !is_table => {
            Err(Error::usage(format!("card key `{}` is a table of keys, not a value", parts[0])))
        }
        [top] if TOP.contains(top) => Ok(()),
        ["schedule", field] if SCHEDULE.contains(field) => Ok(()),
        ["schedule", field, ..] => refuse(&SCHEDULE, field),
        ["constants" | "dims", _] if !is_table => Ok(()),
        ["conditions", _] if is_table => Ok(()),
        ["conditions", _, field] if CONDITION.contains(field) => Ok(()),
        ["conditions", input] => match input.rsplit_once('.') {
            Some((_, field)) => refuse(&CONDITION, field),
            None => Err(Error::usage(format!("card key `conditions.{input}` needs a field: {}", CONDITION.join(", ")))),
        },
        ["conditions", _, field, ..] => refuse(&CONDITION, field),
        [top, ..] => refuse(&TOP, top),
    }
}

/// The card of merged leaves. Each value is read on its own first, so that an error names its key and origin.
fn build(leaves: &Leaves) -> Result<TeacherCard> {
    let mut root = toml::Table::new();
    for (key, leaf) in leaves {
        let free_text = key.len() == 1 && ["sample", "time", "output", "dataset"].contains(&key[0].as_str());
        let value = match (&leaf.value, &leaf.text) {
            (toml::Value::String(_), _) | (_, None) => leaf.value.clone(),
            // A graph input may be called `1` or `true`.
            (_, Some(text)) if free_text => toml::Value::String(text.clone()),
            _ => leaf.value.clone(),
        };
        probe(key, &value).with_context(|| format!("card key `{}` ({})", key.join("."), leaf.origin))?;
        let mut table = &mut root;
        for part in &key[..key.len() - 1] {
            let entry = table.entry(part.clone()).or_insert_with(|| toml::Value::Table(toml::Table::new()));
            table = entry.as_table_mut().ok_or_else(|| Error::usage(format!("card key `{}`", key.join("."))))?;
        }
        table.insert(key[key.len() - 1].clone(), value);
    }
    for (name, table) in root.get("conditions").and_then(|c| c.as_table()).into_iter().flatten() {
        check_fields(&format!("conditions.{name}"), table)?;
    }
    if let Some(table) = root.get("schedule") {
        check_fields("schedule", table)?;
    }
    root.try_into().map_err(|e: toml::de::Error| Error::usage(format!("card: {}", e.to_string().trim_end())))
}

/// Whether the value has the type of its key.
fn probe(key: &Key, value: &toml::Value) -> Result<()> {
    fn as_type<T: serde::de::DeserializeOwned>(value: &toml::Value) -> Result<()> {
        value.clone().try_into::<T>().map(drop).map_err(|e: toml::de::Error| {
            Error::usage(format!("`{value}`: {}", e.to_string().lines().next().unwrap_or_default()))
        })
    }
    let parts: Vec<&str> = key.iter().map(String::as_str).collect();
    match parts.as_slice() {
        ["prediction"] => as_type::<super::card::Prediction>(value),
        ["time_unit"] => as_type::<super::card::TimeUnit>(value),
        ["layout"] => as_type::<super::card::Layout>(value),
        ["shape"] => as_type::<[usize; 3]>(value),
        ["range"] => as_type::<[f64; 2]>(value),
        ["sigma_data" | "latent_scale"] | ["constants", _] => as_type::<f64>(value),
        ["schedule", "betas"] => as_type::<super::schedule::Betas>(value),
        ["schedule", "table"] => as_type::<Vec<f64>>(value),
        ["schedule", "steps"] | ["conditions", _, "classes"] | ["dims", _] => as_type::<usize>(value),
        ["schedule", "kind"] | ["conditions", _, "kind"] => as_type::<String>(value),
        ["schedule", _] => as_type::<f64>(value),
        ["conditions", _, "null"] => as_type::<super::card::Null>(value),
        ["conditions", _, "shape"] => as_type::<Vec<usize>>(value),
        _ => as_type::<String>(value),
    }
}

/// Whether a schedule or condition has only keys of its kind, and all that it needs.
fn check_fields(prefix: &str, table: &toml::Value) -> Result<()> {
    let Some(table) = table.as_table() else { return Ok(()) };
    let kinds: &[(&str, &[&str], &[&str])] = if prefix == "schedule" {
        &[
            ("edm", &[], &["sigma_min", "sigma_max", "rho"]),
            ("vp", &["betas"], &["beta_start", "beta_end", "steps", "table"]),
            ("flow", &[], &["shift"]),
            ("trigflow", &[], &["sigma_min", "sigma_max", "scale"]),
        ]
    } else {
        &[
            ("class-index", &["classes"], &["null"]),
            ("one-hot", &["classes"], &["null"]),
            ("embedding", &["shape"], &["null"]),
        ]
    };
    let names = || kinds.iter().map(|k| format!("`{}`", k.0)).collect::<Vec<_>>().join(", ");
    let Some(kind) = table.get("kind").and_then(|k| k.as_str()) else {
        return Err(Error::usage(format!("card key `{prefix}.kind` is missing, expected one of {}", names())));
    };
    let Some((_, needed, optional)) = kinds.iter().find(|k| k.0 == kind) else {
        return Err(Error::usage(format!("card key `{prefix}.kind` is `{kind}`, expected one of {}", names())));
    };
    if let Some(field) = needed.iter().find(|f| !table.contains_key(**f)) {
        let error = Error::usage(format!("card key `{prefix}.{field}` is missing, which kind `{kind}` needs"));
        return Err(match kind {
            "embedding" => error.hint(format!(
                "the graph leaves it free: give its dimensions by name (--dim NAME=N), or the shape of one row, as in --card \
                 {prefix}.shape=[77,768]; for training, the rows of conditions.file say it too"
            )),
            _ => error,
        });
    }
    let surplus =
        table.keys().find(|k| *k != "kind" && !needed.contains(&k.as_str()) && !optional.contains(&k.as_str()));
    match surplus {
        Some(field) => Err(Error::usage(format!("card key `{prefix}.{field}` does not belong to kind `{kind}`"))),
        None => Ok(()),
    }
}

#[cfg(test)]
#[path = "card_source_tests.rs"]
mod tests;
