//! The tables of the report: distances, cost, summary, hashes.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::html::{esc, plain};
use super::run::Run;

/// Keys by which an object of the summary is known to measure a model.
const MEASURES: [&str; 3] = ["frechet", "nfe", "ms_per_image"];

/// Keys that have their place in other sections.
const ELSEWHERE: [&str; 6] =
    ["command", "seconds_degrade", "seconds_backtrack", "peak_host_bytes", "peak_device_bytes", "parameters"];

/// Objects of the summary that hold measures (`teacher`, `student`, `baseline`...) as rows of one table; the rest as pairs.
pub fn summary(run: &Run) -> String {
    let Some(Value::Object(map)) = &run.summary else { return String::new() };
    let measured = |v: &Value| MEASURES.iter().any(|m| !v[*m].is_null());
    let (groups, rest): (Vec<_>, Vec<_>) = map.iter().partition(|(_, v)| measured(v));
    let mut columns: Vec<&String> = Vec::new();
    for (_, group) in &groups {
        for key in group.as_object().into_iter().flat_map(|g| g.keys()) {
            if !columns.contains(&key) {
                columns.push(key);
            }
        }
    }
    let mut out = String::new();
    if !groups.is_empty() {
        out.push_str("<div class=\"wide\"><table><tr><th></th>");
        columns.iter().for_each(|c| out += &format!("<th>{}</th>", esc(&heading(c))));
        out.push_str("</tr>\n");
        for (name, group) in &groups {
            let _ = write!(out, "<tr><th>{}</th>", esc(name));
            columns.iter().for_each(|c| out += &format!("<td>{}</td>", esc(&plain(&group[c.as_str()]))));
            out.push_str("</tr>\n");
        }
        out.push_str("</table></div>\n");
    }
    let mut pairs = String::new();
    for (key, value) in rest {
        match value {
            Value::Object(inner) => {
                inner.iter().filter(|(k, _)| !ELSEWHERE.contains(&k.as_str())).for_each(|(k, v)| pairs += &pair(k, v));
            }
            _ => pairs += &pair(key, value),
        }
    }
    if pairs.is_empty() { out } else { format!("{out}<dl>{pairs}</dl>\n") }
}

fn pair(key: &str, value: &Value) -> String {
    format!("<dt>{}</dt><dd>{}</dd>", esc(&heading(key)), esc(&plain(value)))
}

pub fn heading(key: &str) -> String {
    match key {
        "frechet" => "Fréchet distance".into(),
        "nfe" => "network calls".into(),
        "ms_per_image" => "ms an image".into(),
        other => other.replace('_', " "),
    }
}

/// Columns of the table of distances: key of a row, heading, digits.
const DISTANCES: [(&str, &str, usize); 9] = [
    ("frechet", "Fréchet distance", 3),
    ("kernel", "kernel distance × 1000", 3),
    ("precision", "precision", 3),
    ("recall", "recall", 3),
    ("density", "density", 3),
    ("coverage", "coverage", 3),
    ("inception_score", "Inception Score", 2),
    ("sliced", "sliced Wasserstein × 1000", 2),
    ("nfe", "network calls", 0),
];

fn cell(row: &Value, key: &str, digits: usize) -> String {
    let scale = if key == "kernel" { 1e3 } else { 1.0 };
    let Some(v) = row[key].as_f64() else { return "-".into() };
    let spread = match key {
        "frechet" => row["frechet_deviation"].as_f64(),
        "kernel" => row["kernel_standard_error"].as_f64(),
        "inception_score" => row["inception_score_deviation"].as_f64(),
        "sliced" => row["sliced_standard_error"].as_f64(),
        _ => None,
    };
    let spread = spread.map_or(String::new(), |s| format!(" ± {:.digits$}", s * scale));
    format!("{:.digits$}{spread}", v * scale)
}

/// What `disback evaluate --run` measured: every student of the run and what stood beside them, the best in bold.
pub fn distances(run: &Run) -> String {
    let Some(book) = &run.evaluation else { return String::new() };
    let setting = book["setting"].as_str().unwrap_or_default();
    let entries = book["entries"].as_array().into_iter().flatten();
    let here = entries.filter(|e| e["setting"].as_str() == Some(setting));
    let mut rows: Vec<(String, &Value, bool)> =
        here.map(|e| (plain(&e["file"]), &e["row"], e["file"] == book["best"])).collect();
    rows.extend(book["others"].as_array().into_iter().flatten().map(|row| (plain(&row["name"]), row, false)));
    if rows.is_empty() {
        return String::new();
    }
    let columns: Vec<_> = DISTANCES.iter().filter(|(k, ..)| rows.iter().any(|(_, r, _)| !r[*k].is_null())).collect();
    let mut out = String::from("<div class=\"wide\"><table><tr><th></th>");
    columns.iter().for_each(|(_, name, _)| out += &format!("<th>{name}</th>"));
    out.push_str("</tr>\n");
    for (name, row, best) in &rows {
        let class = if *best { " class=\"best\"" } else { "" };
        let mark = if *best { " (best)" } else { "" };
        let _ = write!(out, "<tr{class}><th>{}{mark}</th>", esc(name));
        columns.iter().for_each(|(key, _, digits)| out += &format!("<td>{}</td>", cell(row, key, *digits)));
        out.push_str("</tr>\n");
    }
    out.push_str("</table></div>\n");
    let images = &rows[0].1["images"];
    let _ = writeln!(
        out,
        "<p class=\"note\">{} images each against {} of {}. Figures of other sample counts, feature networks or filters cannot be \
         compared with these. Repeat: <code>{}</code></p>",
        plain(&images[0]),
        plain(&images[1]),
        esc(&plain(&book["reference"])),
        esc(&plain(&book["command"]))
    );
    out
}

/// What the run and its student cost.
pub fn cost(run: &Run) -> String {
    let summary = run.summary.clone().unwrap_or(json!({}));
    let about = &summary["run"];
    let number = |v: &Value| v.as_f64();
    let mut rows: Vec<(String, [String; 3])> = Vec::new();
    for who in ["teacher", "student", "baseline"] {
        let group = &summary[who];
        if number(&group["nfe"]).is_some() || number(&group["ms_per_image"]).is_some() {
            rows.push((who.into(), [plain(&group["nfe"]), plain(&group["ms_per_image"]), plain(&group["engine"])]));
        }
    }
    if let (true, Some(book)) = (rows.is_empty(), &run.evaluation) {
        let entries = book["entries"].as_array().into_iter().flatten().map(|e| &e["row"]);
        for row in entries.chain(book["others"].as_array().into_iter().flatten()) {
            if number(&row["nfe"]).is_some() {
                rows.push((plain(&row["name"]), [plain(&row["nfe"]), plain(&row["ms_per_image"]), "-".into()]));
            }
        }
    }
    let mut out = String::new();
    if !rows.is_empty() {
        out.push_str(
            "<div class=\"wide\"><table><tr><th></th><th>network calls</th><th>ms an image</th><th>engine</th></tr>\n",
        );
        for (name, cells) in &rows {
            let cells: String = cells.iter().map(|c| format!("<td>{}</td>", esc(c))).collect();
            let _ = writeln!(out, "<tr><th>{}</th>{cells}</tr>", esc(name));
        }
        out.push_str("</table></div>\n");
    }
    let gib = |key: &str| number(&about[key]).map(|b| format!("{:.2} GiB", b / f64::from(1 << 30)));
    let seconds = |key: &str| number(&about[key]).map(|s| format!("{:.0} s", s));
    let passes = run.points.last().map(|p| p.at.passes.to_string());
    let pairs = [
        ("stage 1", seconds("seconds_degrade")),
        ("stage 2", seconds("seconds_backtrack")),
        ("forward passes of networks (images)", passes),
        ("peak memory of the process", gib("peak_host_bytes")),
        ("peak memory of the device", gib("peak_device_bytes")),
        ("parameters", number(&about["parameters"]).map(|n| format!("{n:.0}"))),
    ];
    let list: String = pairs
        .into_iter()
        .filter_map(|(name, value)| Some(format!("<dt>{name}</dt><dd>{}</dd>", esc(&value?))))
        .collect();
    if list.is_empty() { out } else { format!("{out}<dl>{list}</dl>\n") }
}

pub fn hashes(run: &Run) -> String {
    let mut rows = String::new();
    if let Some(hash) = &run.teacher_hash {
        let _ = writeln!(rows, "<tr><th>teacher</th><td></td><td></td><td><code>{}</code></td></tr>", esc(hash));
    }
    if let Some(hash) = &run.student_hash {
        let _ = writeln!(
            rows,
            "<tr><th>student.onnx (the file)</th><td></td><td></td><td><code>{}</code></td></tr>",
            esc(hash)
        );
    }
    for node in &run.nodes {
        let _ = writeln!(
            rows,
            "<tr><th>node {}</th><td>{}</td><td>{}</td><td><code>{}</code></td></tr>",
            node.index,
            node.iteration.map_or("-".into(), |i| i.to_string()),
            node.loss.map_or("-".into(), super::html::number),
            esc(node.hash.as_deref().unwrap_or("-"))
        );
    }
    if rows.is_empty() {
        return rows;
    }
    format!(
        "<div class=\"wide\"><table><tr><th></th><th>step</th><th>loss</th><th>SHA-256</th></tr>\n{rows}</table></div>"
    )
}
