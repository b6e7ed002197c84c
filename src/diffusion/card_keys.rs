//! The keys of a card: which there are, how text becomes a value, and how the values of several sources become one card.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use super::card::TeacherCard;
use super::schedule::{KINDS, KindKeys};
use crate::error::{Context, Error, Kind, Result};

/// Where a value was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CardOrigin {
    /// Given with `--card`, or by `card` in a configuration.
    CommandLine,
    /// A card file beside the model, such as `teacher.card.toml`.
    SideFile(PathBuf),
    /// `metadata_props` inside the model.
    Metadata,
    /// Diffusers' `scheduler_config.json` beside the model.
    SchedulerConfig(PathBuf),
    /// The rows of the file that `conditions.file` names.
    ConditionsFile,
    /// The graph's own shape of an input.
    Graph,
    /// The graph has only one output, so it is that one.
    OnlyOne,
    /// No source gives it: the card's own default.
    Default,
}

impl fmt::Display for CardOrigin {
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

/// Sub-trees of `disback.*` metadata that belong to others than the card.
pub(super) const FOREIGN: [&str; 10] = [
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
pub(super) const TOP: [&str; 18] = [
    "sample",
    "time",
    "output",
    "prediction",
    "time_unit",
    "shape",
    "layout",
    "modality",
    "sample_rate",
    "range",
    "sigma_data",
    "latent_scale",
    "dataset",
    "schedule",
    "conditions",
    "constants",
    "concat",
    "dims",
];
pub(super) const CONDITION: [&str; 5] = ["kind", "classes", "null", "shape", "file"];
const CONDITIONS: &[KindKeys] = &[
    ("class-index", &["classes"], &["null"]),
    ("one-hot", &["classes"], &["null"]),
    ("embedding", &["shape"], &["null"]),
    ("constant", &["file"], &["shape"]),
];
pub(super) const NEEDED: [&str; 7] = ["sample", "time", "output", "prediction", "time_unit", "shape", "schedule.kind"];

/// A leaf's path: `["prediction"]`, `["schedule", "kind"]`, `["conditions", input, "kind"]`, `["constants", input]`.
/// Names of graph inputs may hold dots themselves.
pub(super) type Key = Vec<String>;

#[derive(Debug, Clone)]
pub(super) struct Leaf {
    pub value: toml::Value,
    /// The text as given, for keys that take any string.
    pub text: Option<String>,
    pub origin: CardOrigin,
}

pub(super) type Leaves = BTreeMap<Key, Leaf>;

/// Later layers win leaf by leaf; where a layer changes the kind of a schedule or condition, the values that belonged to
/// the former kind go with it.
pub(super) fn merge(layers: Vec<Leaves>) -> Leaves {
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
pub(super) fn split(key: &str) -> Result<Key> {
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

pub(super) fn insert_text(key: &str, text: &str, origin: &CardOrigin, leaves: &mut Leaves) -> Result<()> {
    // What is no TOML value is a plain string.
    let parsed =
        format!("v = {text}").parse::<toml::Table>().ok().filter(|t| t.len() == 1).and_then(|mut t| t.remove("v"));
    let value = parsed.unwrap_or_else(|| toml::Value::String(text.to_owned()));
    insert(split(key)?, value, Some(text), origin, leaves)
}

pub(super) fn insert(
    key: Key,
    value: toml::Value,
    text: Option<&str>,
    origin: &CardOrigin,
    leaves: &mut Leaves,
) -> Result<()> {
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

pub(super) fn check_known(key: &Key, is_table: bool) -> Result<()> {
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
        ["schedule", "kind"] => Ok(()),
        ["schedule", field, rest @ ..] => {
            let known: Vec<&str> =
                KINDS.iter().flat_map(|(_, needed, optional)| [*needed, *optional].concat()).collect();
            if rest.is_empty() && known.contains(field) {
                Ok(())
            } else {
                refuse(&[&["kind"], &known[..]].concat(), field)
            }
        }
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

/// The value of a key, where it has the key's type.
pub(super) fn check_type(key: &Key, leaf: &Leaf) -> Result<toml::Value> {
    let free_text = key.len() == 1 && ["sample", "time", "output", "dataset"].contains(&key[0].as_str());
    let value = match (&leaf.value, &leaf.text) {
        // A graph input may be called `1` or `true`.
        (value, Some(text)) if free_text && !value.is_str() => toml::Value::String(text.clone()),
        (value, _) => value.clone(),
    };
    probe(key, &value).with_context(|| format!("card key `{}` ({})", key.join("."), leaf.origin))?;
    Ok(value)
}

/// The card of merged leaves. Each value is read on its own first, so that an error names its key and origin.
pub(super) fn build(leaves: &Leaves) -> Result<TeacherCard> {
    let mut root = toml::Table::new();
    for (key, leaf) in leaves {
        let value = check_type(key, leaf)?;
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
    root.try_into().map_err(|e: toml::de::Error| Error::of_text(Kind::Usage, &format!("card: {e}")))
}

/// Whether the value has the type of its key.
pub(super) fn probe(key: &Key, value: &toml::Value) -> Result<()> {
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
        ["concat"] => as_type::<Vec<String>>(value),
        ["shape"] => as_type::<Vec<usize>>(value),
        ["modality"] => as_type::<super::card::Modality>(value),
        ["sample_rate"] => as_type::<u32>(value),
        ["range"] => as_type::<[f64; 2]>(value),
        ["sigma_data" | "latent_scale"] | ["constants", _] => as_type::<f64>(value),
        ["schedule", "betas"] => as_type::<super::schedule::Betas>(value),
        ["schedule", "direction"] => as_type::<super::schedule::Direction>(value),
        ["schedule", "table"] => as_type::<Vec<f64>>(value),
        ["schedule", "steps"] | ["conditions", _, "classes"] | ["dims", _] => as_type::<usize>(value),
        ["schedule", "kind"] | ["conditions", _, "kind"] => as_type::<String>(value),
        ["schedule", _] => as_type::<f64>(value),
        ["conditions", _, "null"] => as_type::<super::condition::Null>(value),
        ["conditions", _, "shape"] => as_type::<Vec<usize>>(value),
        _ => as_type::<String>(value),
    }
}

/// Whether a schedule or condition has only keys of its kind, and all that it needs.
pub(super) fn check_fields(prefix: &str, table: &toml::Value) -> Result<()> {
    let Some(table) = table.as_table() else { return Ok(()) };
    let kinds = if prefix == "schedule" { KINDS } else { CONDITIONS };
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
