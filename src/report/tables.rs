//! The tables of the report: distances, cost, summary, hashes.

use std::fmt::Write as _;

use serde_json::Value;

use super::run::Run;
use super::text::{esc, plain};

/// Keys by which an object of the summary is known to measure a model.
const MEASURES: [&str; 3] = ["frechet", "nfe", "ms_per_image"];

/// Keys that have their place in other sections.
const ELSEWHERE: [&str; 8] = [
    "command",
    "seconds_degrade",
    "seconds_backtrack",
    "peak_host_bytes",
    "peak_device_bytes",
    "parameters",
    "teacher",
    "teacher_hash",
];

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
        "images_degrade" => "images in stage 1".into(),
        "images_backtrack" => "images in stage 2".into(),
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
        "kernel" => row["kernel_standard_error"].as_f64().or(row["kernel_deviation"].as_f64()),
        "inception_score" => row["inception_score_deviation"].as_f64(),
        "sliced" => row["sliced_standard_error"].as_f64(),
        _ => None,
    };
    // Of large values nobody reads the decimals.
    let digits = if (v * scale).abs() >= 1e3 { 0 } else { digits };
    let spread = spread.map_or(String::new(), |s| format!(" ± {:.digits$}", s * scale));
    format!("{:.digits$}{spread}", v * scale)
}

/// A path without its folders, what follows a comma kept: `runs/teacher.onnx, heun 18` is `teacher.onnx, heun 18`.
fn short(name: &str) -> String {
    let (path, rest) = name.find(", ").map_or((name, ""), |at| name.split_at(at));
    format!("{}{rest}", path.rsplit(['/', '\\']).next().unwrap_or(path))
}

/// Measured sets of the latest setting: name, row, whether it is a student of the run, whether it is the best of these.
fn measured(run: &Run) -> Vec<(String, &Value, bool, bool)> {
    let Some(book) = &run.evaluation else { return Vec::new() };
    let list = |key: &str| book[key].as_array().into_iter().flatten();
    let here = list("entries").filter(|e| e["setting"] == book["setting"]);
    let students = here.map(|e| (plain(&e["file"]), &e["row"], true, e["file"] == book["best"]));
    students.chain(list("others").map(|row| (plain(&row["name"]), row, false, false))).collect()
}

fn distance_table(rows: &[&(String, &Value, bool, bool)]) -> String {
    let columns: Vec<_> = DISTANCES.iter().filter(|(k, ..)| rows.iter().any(|(_, r, ..)| !r[*k].is_null())).collect();
    let mut out = String::from("<div class=\"wide\"><table><tr><th></th>");
    columns.iter().for_each(|(_, name, _)| out += &format!("<th>{name}</th>"));
    out.push_str("</tr>\n");
    for (name, row, _, best) in rows {
        let class = if *best { " class=\"best\"" } else { "" };
        let mark = if *best { " (best)" } else { "" };
        let _ = write!(out, "<tr{class}><th title=\"{}\">{}{mark}</th>", esc(name), esc(&short(name)));
        columns.iter().for_each(|(key, _, digits)| out += &format!("<td>{}</td>", cell(row, key, *digits)));
        out.push_str("</tr>\n");
    }
    out.push_str("</table></div>\n");
    out
}

/// More rows than this are folded away, but for those that matter most.
const ROWS: usize = 6;

/// What `disback evaluate --run` measured: every student of the run and what stood beside them, the best in bold.
pub fn distances(run: &Run) -> String {
    let all = measured(run);
    let Some((_, first, ..)) = all.first() else { return String::new() };
    let matters = |(name, _, student, best): &(String, &Value, bool, bool)| {
        !student || *best || all.len() <= ROWS || name == "student.onnx"
    };
    let main: Vec<_> = all.iter().filter(|row| matters(row)).collect();
    let mut out = distance_table(&main);
    if main.len() < all.len() {
        let every: Vec<_> = all.iter().collect();
        let _ = writeln!(
            out,
            "<details><summary>all {} sets that were measured</summary>\n{}</details>",
            all.len(),
            distance_table(&every)
        );
    }
    let book = run.evaluation.as_ref().unwrap_or(&Value::Null);
    let blocks = first["blocks"].as_u64().filter(|b| *b > 1).map_or(String::new(), |b| format!("{b} × "));
    let _ = writeln!(
        out,
        "<p class=\"note\">{blocks}{} {} each against {} of {}{}. Figures of other sample counts, feature networks or filters \
         cannot be compared with these. Repeat: <code>{}</code></p>",
        plain(&first["images"][0]),
        if first["by_values"] == true { "samples" } else { "images" },
        plain(&first["images"][1]),
        esc(&short(&plain(&book["reference"]))),
        if blocks.is_empty() { "" } else { ", means and deviations over the blocks" },
        esc(&plain(&book["command"]))
    );
    out
}

/// One side of the headline.
struct Side {
    frechet: Option<(f64, Option<f64>)>,
    nfe: Option<f64>,
    ms: Option<f64>,
}

impl Side {
    fn of(row: &Value) -> Option<Self> {
        let f = |key: &str| row[key].as_f64();
        let side =
            Self { frechet: f("frechet").map(|d| (d, f("frechet_deviation"))), nfe: f("nfe"), ms: f("ms_per_image") };
        (side.frechet.is_some() || side.nfe.is_some() || side.ms.is_some()).then_some(side)
    }

    fn distance(&self) -> Option<String> {
        let (d, spread) = self.frechet?;
        let digits = if d < 100.0 { 2 } else { 0 };
        Some(format!("{d:.digits$}{}", spread.map_or(String::new(), |s| format!(" ± {s:.digits$}"))))
    }
}

/// Student and teacher: of the summary, else as measured by `disback evaluate --run` (the teacher with most network calls).
fn sides(run: &Run) -> (Option<Side>, Option<Side>) {
    let of = |who: &str| run.summary.as_ref().and_then(|s| Side::of(&s[who]));
    let all = measured(run);
    let students = || all.iter().filter(|(_, _, student, _)| *student);
    let student = students().find(|(name, ..)| name == "student.onnx").or_else(|| students().find(|(.., best)| *best));
    let teachers = all.iter().filter(|(_, row, student, _)| !student && row["kind"] == "teacher");
    let teacher = teachers.max_by_key(|(_, row, ..)| row["nfe"].as_u64());
    let side = |found: Option<&(String, &Value, bool, bool)>| found.and_then(|(_, row, ..)| Side::of(row));
    (of("student").or_else(|| side(student)), of("teacher").or_else(|| side(teacher)))
}

/// What a reader takes away: what was made of what, and the figures of student and teacher.
pub fn headline(run: &Run) -> String {
    let about = run.summary.as_ref().map_or(&Value::Null, |s| &s["run"]);
    let text = |key: &str| about[key].as_str();
    let count = |key: &str| about[key].as_f64().map(super::text::number);
    let mut out = String::new();
    if let Some(method) = text("method") {
        let teacher = text("teacher").map_or(String::new(), |t| format!(" of {}", esc(&short(t))));
        let how = match (method, count("nodes")) {
            ("disback", Some(nodes)) => {
                let s = if nodes == "1" { "" } else { "s" };
                format!("by DisBack along a trajectory of {nodes} node{s}")
            }
            ("base", _) => "without a trajectory".to_string(),
            (other, _) => format!("by {}", esc(other)),
        };
        let objective = text("objective").map_or(String::new(), |o| format!(", objective {}", esc(o)));
        let updates = count("generator_updates").map_or(String::new(), |n| {
            let s = if n == "1" { "" } else { "s" };
            format!(", {n} generator update{s}")
        });
        let _ = writeln!(out, "<p class=\"lead\">A student{teacher}, distilled {how}{objective}{updates}.</p>");
    }
    let mut tiles = String::new();
    let mut tile = |name: &str, value: String, below: String| {
        let _ = writeln!(
            tiles,
            "<div class=\"tile\"><span>{name}</span><b>{}</b><small>{}</small></div>",
            esc(&value),
            esc(&below)
        );
    };
    let (student, teacher) = sides(run);
    let beside = |v: Option<String>| v.map_or(String::new(), |v| format!("teacher {v}"));
    if let Some(s) = &student {
        let t = teacher.as_ref();
        if let Some(d) = s.distance() {
            tile("Fréchet distance", d, beside(t.and_then(Side::distance)));
        }
        if let Some(n) = s.nfe {
            tile(
                "network calls an image",
                super::text::number(n),
                beside(t.and_then(|t| t.nfe).map(super::text::number)),
            );
        }
        if let Some(ms) = s.ms {
            let other = t.and_then(|t| t.ms).filter(|_| ms > 0.0);
            let below = other.map_or(String::new(), |o| {
                format!("teacher {}: {} times as long", super::text::number(o), super::text::number((o / ms).round()))
            });
            tile("ms an image", super::text::number(ms), below);
        }
    }
    let seconds: f64 = ["seconds_degrade", "seconds_backtrack"].iter().filter_map(|k| about[*k].as_f64()).sum();
    if seconds > 0.0 {
        let memory = about["peak_device_bytes"].as_f64().or(about["peak_host_bytes"].as_f64());
        let memory = memory.map_or(String::new(), |b| format!(", {:.2} GiB at most", b / f64::from(1 << 30)));
        tile("training", duration(seconds), format!("on {}{memory}", text("device").unwrap_or("one device")));
    }
    if tiles.is_empty() { out } else { format!("{out}<div class=\"tiles\">\n{tiles}</div>\n") }
}

fn duration(seconds: f64) -> String {
    let s = seconds.round() as u64;
    match s {
        3600.. => format!("{} h {:02} min", s / 3600, s % 3600 / 60),
        60.. => format!("{} min {:02} s", s / 60, s % 60),
        _ => format!("{s} s"),
    }
}

/// What an image costs: as `disback bench --run` timed it, else as the summary or the evaluation has it.
fn image_cost(run: &Run) -> (Vec<&'static str>, Vec<Vec<String>>) {
    let mut rows: Vec<Vec<String>> = Vec::new();
    if let Some(bench) = &run.bench {
        let list = |key: &str| bench[key].as_array().into_iter().flatten();
        let mib = |v: &Value| v.as_f64().map_or("-".into(), |m| format!("{m:.0}"));
        for t in list("timings") {
            let ms =
                t["p50_ms"].as_f64().zip(t["batch"].as_f64()).map_or("-".into(), |(p, b)| super::text::number(p / b));
            let cells = [
                plain(&t["engine"]),
                plain(&t["batch"]),
                "1".into(),
                ms,
                plain(&t["images_per_s"]),
                mib(&t["peak_mib"]),
            ];
            rows.push(std::iter::once("student".to_string()).chain(cells).collect());
        }
        for t in list("teacher") {
            let rate = t["ms_per_image"].as_f64().map_or("-".into(), |ms| super::text::number(1e3 / ms));
            let cells = [
                plain(&t["engine"]),
                plain(&t["batch"]),
                plain(&t["nfe"]),
                plain(&t["ms_per_image"]),
                rate,
                mib(&t["peak_mib"]),
            ];
            rows.push(std::iter::once(format!("teacher, {} steps", plain(&t["steps"]))).chain(cells).collect());
        }
        return (vec!["engine", "batch", "network calls", "ms an image", "images/s", "peak memory, MiB"], rows);
    }
    let cells = |row: &Value| [plain(&row["nfe"]), plain(&row["ms_per_image"])];
    let known = |row: &Value| row["nfe"].is_number() || row["ms_per_image"].is_number();
    let summary = run.summary.as_ref().unwrap_or(&Value::Null);
    for who in ["teacher", "student", "baseline"].into_iter().filter(|w| known(&summary[*w])) {
        rows.push(std::iter::once(who.to_string()).chain(cells(&summary[who])).collect());
    }
    if rows.is_empty() {
        let worth = |(name, row, student, best): &&(String, &Value, bool, bool)| {
            known(row) && (!student || *best || name == "student.onnx")
        };
        let all = measured(run);
        rows = all
            .iter()
            .filter(worth)
            .map(|(n, row, ..)| std::iter::once(short(n)).chain(cells(row)).collect())
            .collect();
    }
    (vec!["network calls", "ms an image"], rows)
}

/// What the run and its student cost.
pub fn cost(run: &Run) -> String {
    let about = run.summary.as_ref().map_or(&Value::Null, |s| &s["run"]);
    let number = |v: &Value| v.as_f64();
    let (columns, rows) = image_cost(run);
    let mut out = String::new();
    if !rows.is_empty() {
        let heads: String = columns.iter().map(|c| format!("<th>{c}</th>")).collect();
        let _ = writeln!(out, "<div class=\"wide\"><table><tr><th></th>{heads}</tr>");
        for row in &rows {
            let cells: String = row[1..].iter().map(|c| format!("<td>{}</td>", esc(c))).collect();
            let _ = writeln!(out, "<tr><th>{}</th>{cells}</tr>", esc(&row[0]));
        }
        out.push_str("</table></div>\n");
    }
    let gib = |key: &str| number(&about[key]).map(|b| format!("{:.2} GiB", b / f64::from(1 << 30)));
    let seconds = |key: &str| number(&about[key]).map(duration);
    let passes = run.points.last().map(|p| p.at.passes.to_string());
    let size = std::fs::metadata(run.folder.join("student.onnx")).ok().map(|m| m.len() as f64 / f64::from(1 << 20));
    let pairs = [
        ("stage 1", seconds("seconds_degrade")),
        ("stage 2", seconds("seconds_backtrack")),
        ("forward passes of networks (images)", passes),
        ("training, peak memory of the process", gib("peak_host_bytes")),
        ("training, peak memory of the device", gib("peak_device_bytes")),
        ("parameters", number(&about["parameters"]).map(|n| format!("{n:.0}"))),
        ("student.onnx", size.map(|s| format!("{s:.2} MiB"))),
    ];
    let list: String = pairs
        .into_iter()
        .filter_map(|(name, value)| Some(format!("<dt>{name}</dt><dd>{}</dd>", esc(&value?))))
        .collect();
    if list.is_empty() { out } else { format!("{out}<dl>{list}</dl>\n") }
}

pub fn hashes(run: &Run) -> String {
    let mut rows = String::new();
    if let Some(hash) = run.summary.as_ref().and_then(|s| s["run"]["teacher_hash"].as_str()) {
        let _ =
            writeln!(rows, "<tr><th>teacher (the file)</th><td></td><td></td><td><code>{}</code></td></tr>", esc(hash));
    }
    if let Some(hash) = &run.teacher_hash {
        let _ = writeln!(
            rows,
            "<tr><th>teacher (the weights)</th><td></td><td></td><td><code>{}</code></td></tr>",
            esc(hash)
        );
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
            node.loss.map_or("-".into(), super::text::number),
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
