//! What `disback evaluate` prints: a table for people, one document for machines.

use std::path::Path;

use serde_json::{Value, json};

use super::Globals;
use crate::eval::FeatureNet;
use crate::eval::evaluation::EvaluationRow;
use crate::io::images::Rounding;
use crate::shown::{say, tell};

/// Everything to print.
pub struct Shown<'a> {
    pub rows: &'a [EvaluationRow],
    /// The best student of a run.
    pub best: Option<&'a str>,
    pub reference: &'a Path,
    pub net: Option<(&'a FeatureNet, &'a Path)>,
    pub rounding: Rounding,
    pub saved: Option<&'a Path>,
    pub globals: Globals,
}

fn warnings(shown: &Shown<'_>) -> Vec<String> {
    let assumed = shown.net.and_then(|(net, _)| net.assumed().map(str::to_string));
    let mut all: Vec<String> = assumed.into_iter().collect();
    for w in shown.rows.iter().flat_map(|r| &r.warnings) {
        if !all.contains(w) {
            all.push(w.clone());
        }
    }
    all
}

/// The first row's figures lie at the top as well, where programs that compare two sets look for them.
fn document(shown: &Shown<'_>) -> Value {
    let mut out = shown.rows.first().map_or(json!({}), |row| json!(row));
    out["ok"] = json!(true);
    out["rows"] = json!(shown.rows);
    out["reference"] = json!(shown.reference);
    out["rounding"] = json!(shown.rounding.formula());
    out["best"] = json!(shown.best);
    out["warnings"] = json!(warnings(shown));
    if let Some((net, path)) = shown.net {
        out["network"] = json!(path);
        out["network_fingerprint"] = json!(net.fingerprint());
        out["output"] = json!(net.output());
        out["input_range"] = json!(net.range());
        out["preprocessing"] = json!(net.preprocessing());
    }
    out
}

/// A line of the table: what it is called and how a row shows it.
type Line = (&'static str, fn(&EvaluationRow) -> Option<String>);

fn with(value: Option<f64>, error: Option<f64>, digits: usize) -> Option<String> {
    let value = value?;
    // Of large values nobody reads the decimals.
    let digits = if value.abs() >= 1e3 { 1 } else { digits };
    Some(match error {
        Some(e) => format!("{value:.digits$} +- {e:.digits$}"),
        None => format!("{value:.digits$}"),
    })
}

const LINES: [Line; 13] = [
    ("Frechet distance", |r| with(r.frechet, r.frechet_deviation, 4)),
    ("  least of the blocks", |r| with(r.frechet_least, None, 4)),
    ("kernel distance x 1000", |r| {
        with(r.kernel.map(|v| v * 1e3), r.kernel_standard_error.or(r.kernel_deviation).map(|v| v * 1e3), 4)
    }),
    ("precision (quality)", |r| with(r.precision, None, 4)),
    ("recall (diversity)", |r| with(r.recall, None, 4)),
    ("density", |r| with(r.density, None, 4)),
    ("coverage", |r| with(r.coverage, None, 4)),
    ("Inception Score", |r| with(r.inception_score, r.inception_score_deviation, 3)),
    ("sliced Wasserstein x 1000", |r| with(r.sliced, r.sliced_standard_error, 3)),
    ("images", |r| {
        let blocks = if r.blocks > 1 { format!("{} x ", r.blocks) } else { String::new() };
        let reference = if r.images[1] > 0 { r.images[1].to_string() } else { "statistics".into() };
        Some(format!("{blocks}{} against {reference}", r.images[0]))
    }),
    ("features", |r| r.features.map(|n| n.to_string())),
    ("network calls an image", |r| r.nfe.map(|n| n.to_string())),
    ("ms an image", |r| with(r.ms_per_image, None, 3)),
];

/// More sets than this stand below one another, not side by side.
const BESIDE: usize = 4;

/// Measures down and sets across, or the other way round where there are many; measures that no set has are left out.
fn table(rows: &[EvaluationRow]) -> comfy_table::Table {
    let by_values = rows.iter().any(|r| r.by_values);
    let names = rows.iter().map(|r| r.name.clone());
    let mut columns: Vec<Vec<String>> = vec![std::iter::once("measure".to_string()).chain(names).collect()];
    for (name, value) in LINES {
        let cells: Vec<Option<String>> = rows.iter().map(value).collect();
        if cells.iter().any(Option::is_some) {
            let cells = cells.into_iter().map(|c| c.unwrap_or_else(|| "-".into()));
            let name = if by_values {
                name.replace("an image", "a sample").replace("image", "sample")
            } else {
                name.to_string()
            };
            columns.push(std::iter::once(name.trim().to_string()).chain(cells).collect());
        }
    }
    let many = rows.len() > BESIDE;
    let lines = match many {
        true => (0..=rows.len()).map(|k| columns.iter().map(|c| c[k].clone()).collect()).collect(),
        false => columns,
    };
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::UTF8_FULL_CONDENSED);
    for (k, line) in lines.into_iter().enumerate() {
        match k {
            // Words of a heading under one another: a heading is no wider than its figures.
            0 if many => table.set_header(line.iter().map(|c| c.replace(' ', "\n"))),
            0 => table.set_header(line),
            _ => table.add_row(line),
        };
    }
    table
}

/// Prints to standard output; warnings go to standard error.
pub fn print(shown: &Shown<'_>) {
    if shown.globals.json {
        println!("{}", document(shown));
        return;
    }
    if !shown.globals.quiet {
        warnings(shown).iter().for_each(|w| tell!("warning: {w}"));
    }
    if !shown.rows.is_empty() {
        say!("{}", table(shown.rows));
    }
    for row in shown.rows.iter().filter(|r| !r.classes.is_empty()) {
        say!("{}, class by class", row.name);
        let mut table = super::table(["class", "images", "Frechet", "kernel x 1000", "precision", "recall"]);
        for c in &row.classes {
            let share = |v: Option<f64>| v.map_or("-".into(), |v| format!("{v:.4}"));
            table.add_row([
                c.class.to_string(),
                format!("{} against {}", c.images[0], c.images[1]),
                format!("{:.4}", c.frechet),
                format!("{:.4}", c.kernel * 1e3),
                share(c.precision),
                share(c.recall),
            ]);
        }
        say!("{table}");
    }
    if shown.globals.quiet {
        return;
    }
    if let Some((net, path)) = shown.net {
        say!(
            "features: `{}` of {} ({}); 8 bits by {}",
            net.output(),
            path.display(),
            net.preprocessing(),
            shown.rounding.formula()
        );
    }
    if let Some(best) = shown.best {
        say!("best: {best}");
    }
    if let Some(saved) = shown.saved {
        say!("statistics: {}", saved.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_sets_stand_below_one_another() {
        let row = |k: usize| EvaluationRow {
            name: format!("set-{k}"),
            frechet: Some(1.5 * k as f64),
            kernel: (k != 2).then_some(250.0),
            images: [100, 0],
            blocks: 1,
            ..EvaluationRow::default()
        };
        let lines = |n: usize| -> Vec<String> {
            let rows: Vec<EvaluationRow> = (1..=n).map(row).collect();
            table(&rows).to_string().lines().map(str::to_string).collect()
        };
        let few = lines(3);
        assert!(few.iter().any(|l| l.contains("set-1") && l.contains("set-3")), "{few:?}");
        assert!(few.iter().any(|l| l.contains("Frechet distance") && l.contains("1.5000") && l.contains("4.5000")));
        assert!(few.iter().any(|l| l.contains("kernel distance x 1000") && l.contains("250000.0") && l.contains("-")));
        let many = lines(7);
        assert!(
            many.iter().any(|l| l.contains("set-6") && l.contains("9.0000") && l.contains("100 against statistics"))
        );
        assert!(!many.iter().any(|l| l.contains("recall")), "measures that no set has are left out");
    }
}
