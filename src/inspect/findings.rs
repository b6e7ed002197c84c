//! What a proposed card is made of: one finding a key, each with where it comes from and what speaks for it.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::diffusion::{CardOrigin, Condition, Conversion, Layout, Prediction, ScheduleSpec, TeacherCard, TimeUnit};
use crate::error::{Error, Kind, Result};
use crate::graph::Port;

/// What the sources of a card (metadata, side file, command line) already say, by path.
pub type Known = BTreeMap<Vec<String>, (toml::Value, CardOrigin)>;

/// How a value of the proposed card was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum How {
    /// The card's own sources say so.
    Given,
    /// Read off names, types, shapes and the graph.
    Read,
    /// The numerical probe says so, with a margin.
    Measured,
    /// What is usual; nothing in the file or in the numbers speaks for or against it.
    Assumed,
    /// Not known: the user has to give the value.
    Undecided,
}

impl fmt::Display for How {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Given => "given",
            Self::Read => "read",
            Self::Measured => "measured",
            Self::Assumed => "assumed",
            Self::Undecided => "undecided",
        })
    }
}

/// One key of the proposed card.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// The key in parts, such as `["schedule", "kind"]`.
    #[serde(skip)]
    pub path: Vec<String>,
    /// The key as text, such as `schedule.kind`.
    pub key: String,
    /// The value, as TOML; absent where undecided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<toml::Value>,
    /// How the value was found.
    pub how: How,
    /// Why this value, or why none, in words for the user.
    pub evidence: String,
}

/// Findings by key, in the order in which they were made.
#[derive(Debug, Clone, Default)]
pub struct Findings {
    list: Vec<Finding>,
}

impl Findings {
    /// Sets a key. What the card's own sources gave is never replaced.
    pub fn set(&mut self, path: &[&str], value: Option<toml::Value>, how: How, evidence: impl Into<String>) {
        let path: Vec<String> = path.iter().map(|p| (*p).to_owned()).collect();
        let finding = Finding { key: path.join("."), path, value, how, evidence: evidence.into() };
        match self.list.iter_mut().find(|f| f.path == finding.path) {
            Some(old) if old.how == How::Given => {}
            Some(old) => *old = finding,
            None => self.list.push(finding),
        }
    }

    /// Sets a key to a value.
    pub fn value(&mut self, path: &[&str], value: impl Into<toml::Value>, how: How, evidence: impl Into<String>) {
        self.set(path, Some(value.into()), how, evidence);
    }

    /// Says that a key is undecided, and why.
    pub fn undecided(&mut self, path: &[&str], why: impl Into<String>) {
        self.set(path, None, How::Undecided, why);
    }

    /// The finding of a key, where there is one.
    pub fn get(&self, path: &[&str]) -> Option<&Finding> {
        self.list.iter().find(|f| f.path.iter().map(String::as_str).eq(path.iter().copied()))
    }

    /// The value of a key as text, where it is a string.
    pub fn text(&self, path: &[&str]) -> Option<String> {
        self.get(path)?.value.as_ref()?.as_str().map(str::to_owned)
    }

    /// Whether the key has a value that its own sources gave.
    pub fn given(&self, path: &[&str]) -> bool {
        self.get(path).is_some_and(|f| f.how == How::Given)
    }

    /// All findings, in the order in which they were made.
    pub fn iter(&self) -> impl Iterator<Item = &Finding> {
        self.list.iter()
    }

    /// Keys without a value.
    pub fn open(&self) -> Vec<String> {
        self.list.iter().filter(|f| f.value.is_none()).map(|f| f.key.clone()).collect()
    }

    /// The values as one table.
    pub fn table(&self) -> toml::Table {
        let mut root = toml::Table::new();
        for f in &self.list {
            let Some(value) = &f.value else { continue };
            let mut table = &mut root;
            for part in &f.path[..f.path.len() - 1] {
                let entry = table.entry(part.clone()).or_insert_with(|| toml::Value::Table(toml::Table::new()));
                match entry.as_table_mut() {
                    Some(t) => table = t,
                    None => return root,
                }
            }
            table.insert(f.path[f.path.len() - 1].clone(), value.clone());
        }
        root
    }

    /// The card, where nothing that it needs is undecided.
    pub fn card(&self) -> Result<TeacherCard> {
        let open = self.open();
        if !open.is_empty() {
            return Err(Error::usage(format!("undecided: {}", open.join(", "))).hint(
                "give these with --card key=value, or write the proposal with --write-card and fill in what it leaves out",
            ));
        }
        let card: TeacherCard = self
            .table()
            .try_into()
            .map_err(|e: toml::de::Error| Error::of_text(Kind::Usage, &format!("proposed card: {e}")))?;
        card.validate()?;
        Conversion::new(&card)?;
        Ok(card)
    }

    /// The dimensions of an input, those that the file leaves free by the card's `dims`; `None` where neither says one, or all.
    pub fn dims_of(&self, port: &Port) -> Option<Vec<Option<usize>>> {
        let size = |dim: &Result<usize, String>| match dim {
            Ok(n) => Some(*n),
            Err(symbol) => self.get(&["dims", symbol])?.value.as_ref()?.as_integer()?.try_into().ok(),
        };
        Some(port.shape.as_ref()?.iter().map(size).collect())
    }

    /// A card to compute with before everything is decided: open keys get values that let the network run.
    pub fn stand_in(&self, time_is_integer: bool) -> Option<TeacherCard> {
        let table = self.table();
        let value = |key: &str| table.get(key).cloned();
        let conditions: BTreeMap<String, Condition> = match table.get("conditions").and_then(|c| c.as_table()) {
            None => BTreeMap::new(),
            Some(t) => t.iter().filter_map(|(k, v)| Some((k.clone(), v.clone().try_into().ok()?))).collect(),
        };
        Some(TeacherCard {
            sample: value("sample")?.as_str()?.to_owned(),
            time: value("time")?.as_str()?.to_owned(),
            output: value("output")?.as_str()?.to_owned(),
            prediction: Prediction::Denoised,
            time_unit: if time_is_integer { TimeUnit::Step } else { TimeUnit::Sigma },
            shape: value("shape")?.try_into().ok()?,
            layout: value("layout").and_then(|v| v.try_into().ok()).unwrap_or(Layout::ChannelsFirst),
            modality: None,
            sample_rate: None,
            range: None,
            sigma_data: value("sigma_data").and_then(|v| v.as_float()).unwrap_or(0.5),
            latent_scale: 1.0,
            dataset: None,
            schedule: ScheduleSpec::Edm { sigma_min: 0.002, sigma_max: 80.0, rho: 7.0 },
            conditions,
            constants: value("constants").and_then(|v| v.try_into().ok()).unwrap_or_default(),
            concat: value("concat").and_then(|v| v.try_into().ok()).unwrap_or_default(),
            dims: value("dims").and_then(|v| v.try_into().ok()).unwrap_or_default(),
        })
    }

    /// The side file: every value with what speaks for it, every open key as a comment to fill in.
    pub fn to_toml(&self) -> String {
        let mut out = String::from("# Proposed by `disback inspect`: check it, then it is yours.\n");
        let line = |out: &mut String, f: &Finding, key: &str| {
            let why = f.evidence.replace('\n', " ");
            match &f.value {
                Some(v) => out.push_str(&format!("{key} = {v}  # {}: {why}\n", f.how)),
                None => out.push_str(&format!("# {key} = ?  # undecided: {why}\n")),
            }
        };
        for f in self.list.iter().filter(|f| f.path.len() == 1) {
            line(&mut out, f, &bare(&f.key));
        }
        let mut tables: Vec<&[String]> = Vec::new();
        for f in self.list.iter().filter(|f| f.path.len() > 1) {
            let table = &f.path[..f.path.len() - 1];
            if !tables.contains(&table) {
                tables.push(table);
            }
        }
        for table in tables {
            let members = || self.list.iter().filter(move |f| f.path.len() > 1 && f.path[..f.path.len() - 1] == *table);
            let name: Vec<String> = table.iter().map(|p| bare(p)).collect();
            // An empty table would be refused for its missing kind before its comments are read.
            let open = members().all(|f| f.value.is_none());
            out.push_str(&format!("{}[{}]\n", if open { "# " } else { "" }, name.join(".")));
            members().for_each(|f| line(&mut out, f, &bare(&f.path[f.path.len() - 1])));
        }
        out
    }
}

/// A TOML key, quoted where it must be.
fn bare(key: &str) -> String {
    let plain = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    if plain { key.to_owned() } else { toml::Value::String(key.to_owned()).to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_side_file_reads_back_and_open_keys_stay_comments() {
        let mut f = Findings::default();
        f.value(&["sample"], "x \"1\"", How::Read, "a\nb");
        f.value(&["shape"], vec![1i64, 8, 8], How::Read, "declared");
        f.undecided(&["prediction"], "two fit alike");
        f.value(&["conditions", "a.b", "kind"], "class-index", How::Read, "a table of 11 rows");
        f.undecided(&["schedule", "kind"], "?");
        let text = f.to_toml();
        let back: toml::Table = text.parse().unwrap();
        assert_eq!(toml::Value::Table(back), toml::Value::Table(f.table()), "{text}");
        assert!(text.contains("# prediction = ?") && text.contains("# [schedule]"), "{text}");
        assert_eq!(f.open(), ["prediction", "schedule.kind"]);
        assert!(f.card().unwrap_err().to_string().contains("prediction, schedule.kind"));
    }

    #[test]
    fn what_was_given_is_not_replaced() {
        let mut f = Findings::default();
        f.value(&["prediction"], "v", How::Given, "from --card");
        f.value(&["prediction"], "epsilon", How::Measured, "");
        assert_eq!(f.text(&["prediction"]).as_deref(), Some("v"));
        assert!(f.given(&["prediction"]) && !f.given(&["time"]));
    }
}
