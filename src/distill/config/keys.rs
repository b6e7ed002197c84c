//! Dotted keys: which there are, and `key=value` on the command line.

use toml::{Table, Value};

use super::Config;
use crate::error::{Error, Result};

pub(super) fn as_table(config: &Config) -> Result<Table> {
    Table::try_from(config).map_err(|e| Error::usage(format!("configuration: {e}")))
}

/// `(dotted key, value)` of every leaf, in order.
pub(super) fn leaves(table: &Table) -> Vec<(String, Value)> {
    let mut out = Vec::new();
    for (key, value) in table {
        match value {
            Value::Table(inner) => out.extend(leaves(inner).into_iter().map(|(k, v)| (format!("{key}.{k}"), v))),
            other => out.push((key.clone(), other.clone())),
        }
    }
    out
}

/// Refuses keys that the configuration does not have.
pub(super) fn check(table: &Table) -> Result<()> {
    let known: Vec<String> = leaves(&as_table(&Config::default())?).into_iter().map(|(k, _)| k).collect();
    let sections: Vec<&str> = known.iter().filter_map(|k| k.split_once('.').map(|(s, _)| s)).collect();
    for (key, value) in table {
        if sections.contains(&key.as_str()) && !value.is_table() {
            return Err(
                Error::usage(format!("`{key}` is a section, not a value")).hint(format!("write [{key}] and its keys"))
            );
        }
    }
    match leaves(table).into_iter().find(|(k, _)| !known.contains(k)) {
        None => Ok(()),
        Some((key, _)) => Err(unknown_key(&key, &known)),
    }
}

fn unknown_key(key: &str, known: &[String]) -> Error {
    // `lr_fake` alone, `fake_lr` or `backtrak.lr_fake`: the whole key or its last part may be what was meant.
    let last = |k: &str| k.rsplit('.').next().unwrap_or(k).to_owned();
    let likeness = |k: &String| {
        let whole = strsim::normalized_damerau_levenshtein(key, k);
        let alone = 0.95 * strsim::normalized_damerau_levenshtein(&last(key), &last(k));
        // With a section that is nearly one: a short key's beginning counts too (`lr` for `lr_fake`).
        match (key.rsplit_once('.'), k.rsplit_once('.')) {
            (Some((section, name)), Some((other, full))) => {
                let begins = if full.starts_with(name) { 0.9 } else { 0.0 };
                let name = strsim::normalized_damerau_levenshtein(name, full).max(begins);
                whole.max(0.9 * alone).max(0.5 * (name + strsim::normalized_damerau_levenshtein(section, other)))
            }
            _ => whole.max(alone),
        }
    };
    let nearest = known.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    let error = Error::usage(format!("unknown key `{key}`"));
    match nearest {
        Some(k) => error.hint(format!("the nearest known key is `{k}`")),
        None => error,
    }
}

/// Puts one `a.b=value` into the table. The value is TOML; a bare word is taken as a string.
pub(super) fn apply(table: &mut Table, set: &str) -> Result<()> {
    let (key, text) = set.split_once('=').ok_or_else(|| Error::usage("expected key=value"))?;
    let (key, text) = (key.trim(), text.trim());
    let value = match toml::from_str::<Table>(&format!("value = {text}")) {
        Ok(mut parsed) if parsed.len() == 1 => parsed.remove("value").expect("the one key"),
        // (TOML refuses integers beyond 64 bits, as which 1e30 may be written.)
        _ => text.parse().map_or_else(|_| Value::String(text.to_owned()), Value::Float),
    };
    let mut nested = Table::new();
    let mut parts = key.rsplit('.');
    nested.insert(parts.next().unwrap_or_default().to_owned(), value);
    for part in parts {
        nested = Table::from_iter([(part.to_owned(), Value::Table(nested))]);
    }
    check(&nested)?;
    merge(table, nested);
    Ok(())
}

fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(old)), Value::Table(new)) => merge(old, new),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}
