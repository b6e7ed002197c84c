//! Where a card comes from. The command line wins over `<model>.card.toml`, that over the model's `metadata_props`, that
//! over diffusers' `scheduler_config.json` beside the model. Each value remembers its origin.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Kind, Result};
use crate::graph::sizes;
use crate::onnx::ModelProto;

use super::card::TeacherCard;
pub use super::card_keys::CardOrigin;
use super::card_keys::{FOREIGN, Key, Leaf, Leaves, NEEDED, build, check_type, insert, insert_text, merge, split};
use super::conversion::Conversion;
use super::fixed::{self, FixedInput};
use super::joined;
use super::scheduler_config;

/// A card, where each of its values came from, and the model's other `disback.*` metadata.
#[derive(Debug, Clone, PartialEq)]
pub struct ResolvedCard {
    /// The card, with defaults where no source gives a value.
    pub card: TeacherCard,
    /// Its conditions of kind `constant`, which are not in `card`: they belong into the graph ([`super::fixed::put_in`]).
    pub fixed: Vec<FixedInput>,
    /// Its `concat`, which is not in `card` either: the parts that are joined to the graph's sample input.
    pub concat: Vec<String>,
    /// Where each value came from, by dotted key; a key that is not here has its default ([`CardOrigin::Default`]).
    pub origins: BTreeMap<String, CardOrigin>,
    /// `disback.*` metadata that is no card key (student, provenance, ...), without the prefix.
    pub extra: BTreeMap<String, String>,
}

impl ResolvedCard {
    /// Whether the card says something that belongs into the graph: see [`ResolvedCard::put_into`].
    pub fn changes_graph(&self) -> bool {
        !self.fixed.is_empty() || !self.concat.is_empty()
    }

    /// The card with what was taken out of it, as a file holds it.
    pub fn written(&self) -> TeacherCard {
        let mut card = self.card.clone();
        card.concat.clone_from(&self.concat);
        card.conditions.extend(self.fixed.iter().map(FixedInput::condition));
        card
    }

    /// Puts what the card says about the graph's inputs into the graph: values that are always the same become initializers, and
    /// the parts of `concat` inputs of their own.
    ///
    /// Errors: an input that the graph does not have; a value or parts that do not fit it.
    pub fn put_into(&self, proto: &mut ModelProto) -> Result<()> {
        if !self.concat.is_empty() {
            joined::put_in(proto, &self.card, &self.concat)?;
        }
        fixed::put_in(proto, &self.card.sample, &self.fixed)
    }

    /// Every value of the card: dotted key, TOML text, origin.
    pub fn rows(&self) -> Result<Vec<(String, String, CardOrigin)>> {
        let leaves = self.card.leaves()?;
        Ok(leaves
            .into_iter()
            .map(|(key, value)| {
                let origin = self.origins.get(&key).cloned().unwrap_or(CardOrigin::Default);
                (key, value.to_string(), origin)
            })
            .collect())
    }
}

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
    /// No sources yet.
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
            let leaf = || Leaf { value: name.clone().into(), text: None, origin: CardOrigin::OnlyOne };
            merged.entry(vec!["output".into()]).or_insert_with(leaf);
        }
        let missing: Vec<_> =
            NEEDED.iter().filter(|n| !merged.contains_key(&n.split('.').map(String::from).collect::<Key>())).collect();
        if !missing.is_empty() {
            return Err(self.missing(merged.is_empty(), &missing));
        }
        let mut card = build(&merged)?;
        card.validate()?;
        Conversion::new(&card)?;
        let origins = merged.into_iter().map(|(key, leaf)| (key.join("."), leaf.origin)).collect();
        let folder = self.model.as_ref().and_then(|m| m.parent());
        let fixed = FixedInput::take(&mut card, folder);
        let concat = std::mem::take(&mut card.concat);
        Ok(ResolvedCard { card, fixed, concat, origins, extra })
    }

    /// What the sources say, complete or not: path of each key, its value and where it came from.
    pub fn known(&self) -> Result<BTreeMap<Vec<String>, (toml::Value, CardOrigin)>> {
        let merged = self.merged(&mut BTreeMap::new())?;
        for (key, leaf) in &merged {
            check_type(key, leaf)?;
        }
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
        let of_sample = self.sizes_of_sample(merged);
        let size = |name: &String| -> Option<usize> {
            let given =
                merged.get(&vec!["dims".into(), name.clone()]).and_then(|l| l.value.as_integer()?.try_into().ok());
            given.or_else(|| of_sample.get(name).copied())
        };
        let in_graph = |(name, dims): &sizes::Declared| {
            let known = |dim: &Result<usize, String>| match dim {
                Ok(n) => Some(*n),
                Err(symbol) => size(symbol),
            };
            let row: Option<Vec<usize>> = dims.iter().skip(1).map(known).collect();
            Some((name.clone(), row?, CardOrigin::Graph))
        };
        let in_file = self.rows.iter().map(|(name, row)| (name.clone(), row.clone(), CardOrigin::ConditionsFile));
        let found: Vec<_> = in_file.chain(self.inputs.iter().filter_map(in_graph)).collect();
        for (name, row, origin) in found {
            let key = |leaf: &str| -> Key { vec!["conditions".into(), name.clone(), leaf.into()] };
            if merged.get(&key("kind")).and_then(|l| l.value.as_str()) == Some("embedding") {
                let value = row.iter().map(|n| toml::Value::from(*n as i64)).collect::<Vec<_>>().into();
                merged.entry(key("shape")).or_insert(Leaf { value, text: None, origin });
            }
        }
    }

    /// Sizes of the sample's free dimensions by their names, where the card says its shape: a mask or a condition image that has
    /// the same dimensions follows it.
    fn sizes_of_sample(&self, merged: &Leaves) -> BTreeMap<String, usize> {
        let text = |key: &str| merged.get(&vec![key.to_owned()]).and_then(|l| l.value.as_str());
        let shape = merged.get(&vec!["shape".to_owned()]).and_then(|l| l.value.as_array());
        let declared = self.inputs.iter().find(|(name, _)| Some(name.as_str()) == text("sample"));
        let (Some(shape), Some((_, dims))) = (shape, declared) else { return BTreeMap::new() };
        let mut row: Vec<Option<usize>> = shape.iter().map(|n| n.as_integer()?.try_into().ok()).collect();
        if text("layout") == Some("nhwc") && !row.is_empty() {
            row.rotate_left(1);
        }
        let named = dims.iter().skip(1).zip(row).filter_map(|(dim, size)| Some((dim.as_ref().err()?.clone(), size?)));
        named.filter(|(name, _)| !name.is_empty()).collect()
    }

    fn missing(&self, all: bool, missing: &[&&str]) -> Error {
        let list = missing.iter().map(|m| format!("`{m}`")).collect::<Vec<_>>().join(", ");
        let whose = self.model.as_ref().map_or("the model".into(), |m| m.display().to_string());
        let what = if all { "no teacher card" } else { "the teacher card is incomplete" };
        let side = self.model.as_ref().map_or("<model>.card.toml".into(), |m| side_files(m)[0].display().to_string());
        let error = Error::usage(format!("{what}: missing {list}")).hint(format!(
            "`disback inspect {whose} --write-card` proposes them; or give them on the command line (--card key=value), in {side}, or in the model's metadata_props as \
             `disback.<key>`; a diffusers scheduler_config.json beside the model gives prediction, time_unit and schedule"
        ));
        match &self.model {
            Some(_) => error.context(whose),
            None => error,
        }
    }

    fn command_line_leaves(&self) -> Result<Leaves> {
        let mut leaves = Leaves::new();
        for item in &self.overrides {
            let (key, value) =
                item.split_once('=').ok_or_else(|| Error::usage(format!("--card {item}: expected key=value")))?;
            let run = || -> Result<Leaves> {
                let mut one = Leaves::new();
                insert_text(key.trim(), value.trim(), &CardOrigin::CommandLine, &mut one)?;
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
            let text = crate::files::read_text(path, crate::files::SETTINGS)?;
            let table: toml::Table =
                text.parse().map_err(|e: toml::de::Error| Error::of_text(Kind::Usage, &format!("not TOML: {e}")))?;
            let mut leaves = Leaves::new();
            insert(vec![], toml::Value::Table(table), None, &CardOrigin::SideFile(path.clone()), &mut leaves)?;
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
            if value.len() as u64 > crate::files::SETTINGS {
                let most = crate::files::SETTINGS;
                return Err(Error::invalid(format!(
                    "metadata `{name}` has {} bytes, a key of a card has at most {most}",
                    value.len()
                )));
            }
            insert_text(key, value.trim(), &CardOrigin::Metadata, &mut leaves)
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
                    insert(split(&key)?, value, None, &CardOrigin::SchedulerConfig(path.clone()), &mut leaves)?;
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

#[cfg(test)]
#[path = "card_source_tests.rs"]
mod tests;
