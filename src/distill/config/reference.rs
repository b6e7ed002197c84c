//! `docs/configuration.md` is made of the doc comments of these structs and of their defaults. `DISBACK_BLESS=1 cargo test --release --lib
//! configuration_reference` writes it anew.

use std::collections::HashMap;
use std::fmt::Write;
use std::path::Path;

use toml::Value;

use super::Config;
use crate::distill::objective::ObjectiveKind;

const SOURCES: [&str; 8] = [
    include_str!("mod.rs"),
    include_str!("sections.rs"),
    include_str!("gan.rs"),
    include_str!("../objective/sid.rs"),
    include_str!("../objective/sim.rs"),
    include_str!("../objective/f_distill.rs"),
    include_str!("../objective/uni_instruct.rs"),
    include_str!("../objective/mod.rs"),
];

const HEAD: &str = "# Configuration reference

<!-- Made from the doc comments of src/distill/config and src/distill/objective: change them, not this file. -->

`--config run.toml` reads a file of these keys, `--set section.key=value` sets one of them and wins over the file, and every run writes all of them
with their values to `config.toml` in its folder. A key that is not known is refused, with the nearest one that is.
";

/// A struct's fields, or an enum's variants with their names in TOML.
#[derive(Debug, Default)]
struct Item {
    /// Name, type (empty for a variant) and doc.
    parts: Vec<(String, String, String)>,
}

/// `LogIteration` as serde renames it.
fn renamed(variant: &str, rule: &str) -> String {
    let mut out = String::new();
    for (k, c) in variant.chars().enumerate() {
        if c.is_uppercase() && k > 0 && rule == "kebab-case" {
            out.push('-');
        }
        out.extend(c.to_lowercase());
    }
    out
}

/// All structs and enums of the sources.
fn items() -> HashMap<String, Item> {
    let mut all = HashMap::new();
    for text in SOURCES {
        let (mut doc, mut rule, mut open): (String, String, Option<(String, bool)>) = Default::default();
        for line in text.lines() {
            let trimmed = line.trim();
            if let Some(more) = trimmed.strip_prefix("/// ") {
                let _ = write!(doc, "{}{more}", if doc.is_empty() { "" } else { " " });
                continue;
            }
            if trimmed == "///" {
                doc.push_str("<br>");
                continue;
            }
            if let Some((_, rest)) = trimmed.split_once("rename_all = \"") {
                rule = rest.split('"').next().unwrap_or("").to_owned();
            }
            if trimmed.starts_with('#') {
                continue;
            }
            let of = |kind: &str| line.strip_prefix(kind).and_then(|rest| rest.strip_suffix(" {"));
            match (&open, of("pub struct "), of("pub enum ")) {
                (None, Some(name), _) | (None, None, Some(name)) => {
                    doc.clear();
                    all.insert(name.to_owned(), Item::default());
                    open = Some((name.to_owned(), line.starts_with("pub enum")));
                }
                (Some(_), ..) if line == "}" => {
                    open = None;
                    rule.clear();
                }
                (Some((name, is_enum)), ..) => {
                    let item = all.get_mut(name).unwrap();
                    let doc = std::mem::take(&mut doc);
                    match trimmed.trim_end_matches(',').strip_prefix("pub ").and_then(|field| field.split_once(": ")) {
                        Some((field, kind)) => item.parts.push((field.into(), kind.into(), doc)),
                        None if *is_enum && !trimmed.contains('(') => {
                            item.parts.push((renamed(trimmed.trim_end_matches(','), &rule), String::new(), doc));
                        }
                        None => {}
                    }
                }
                _ => {
                    doc.clear();
                    rule.clear();
                }
            }
        }
    }
    all
}

/// A doc comment for a cell of a table: links of rustdoc are names.
fn cell(doc: &str) -> String {
    doc.replace("[`", "`").replace("`]", "`").replace('|', "\\|")
}

fn row(page: &mut String, items: &HashMap<String, Item>, key: &str, kind: &str, doc: &str, default: &Value) {
    let mut meaning = cell(doc);
    if let Some(choice) = items.get(kind).filter(|item| item.parts.iter().all(|(_, kind, _)| kind.is_empty())) {
        let values: Vec<String> = choice
            .parts
            .iter()
            .map(|(name, _, doc)| format!("`{name}`: {}", cell(doc).trim_end_matches('.')))
            .collect();
        let _ = write!(meaning, "<br>{}", values.join("<br>"));
    }
    if kind == "Choice" {
        let names: Vec<String> = ObjectiveKind::ALL.iter().map(|o| format!("`{}`", o.name())).collect();
        let _ = write!(meaning, "<br>{}; or an objective of the caller's own", names.join(", "));
    }
    let default = default.to_string();
    let _ = writeln!(
        page,
        "| `{key}` | {} | {meaning} |",
        if default == "\"\"" { "none".into() } else { format!("`{default}`") }
    );
}

fn page() -> String {
    let items = items();
    let Value::Table(defaults) = Value::try_from(Config::default()).unwrap() else { panic!("a table") };
    let mut page = HEAD.to_owned();
    let table = "\n| key | default | meaning |\n|---|---|---|\n";
    let section = |page: &mut String, name: &str, kind: &str, doc: &str| {
        let _ = write!(page, "\n## `[{name}]`\n\n{}\n{table}", cell(doc));
        for (key, of, doc) in &items[kind].parts {
            row(page, &items, &format!("{name}.{key}"), of, doc, &defaults[name][key]);
        }
    };
    page.push_str(table);
    for (key, kind, doc) in
        items["Config"].parts.iter().filter(|(_, kind, _)| !kind.ends_with("Config") && kind != "Settings")
    {
        row(&mut page, &items, key, kind, doc, &defaults[key]);
    }
    for (key, kind, doc) in &items["Config"].parts {
        match kind.as_str() {
            "Settings" => {
                for (key, kind, doc) in &items["Settings"].parts {
                    section(&mut page, key, kind, doc);
                }
            }
            kind if kind.ends_with("Config") => section(&mut page, key, kind, doc),
            _ => {}
        }
    }
    page
}

#[test]
fn the_configuration_reference_is_what_the_code_says() {
    let made = page();
    // Every key with its default, and nothing without words.
    let Value::Table(defaults) = Value::try_from(Config::default()).unwrap() else { panic!("a table") };
    for (name, value) in &defaults {
        let keys: Vec<String> = match value {
            Value::Table(section) => section.keys().map(|key| format!("{name}.{key}")).collect(),
            _ => vec![name.clone()],
        };
        for key in keys {
            let row =
                made.lines().find(|l| l.starts_with(&format!("| `{key}` |"))).unwrap_or_else(|| panic!("no {key}"));
            let meaning = row.rsplit(" | ").next().unwrap();
            assert!(meaning.len() > 12, "{key} is not described: {row}");
        }
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
    if std::env::var_os("DISBACK_BLESS").is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let there = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        there == made,
        "docs/configuration.md is not what the code says: DISBACK_BLESS=1 cargo test --lib configuration_reference"
    );
}
