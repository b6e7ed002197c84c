//! `report.html`: one file that holds everything it shows, readable on a phone, in light and in dark.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use serde_json::Value;

use super::plot::{Mark, Series, curves};
use super::run::Run;
use crate::error::Result;

/// Writes `report.html` into a run directory from what lies in it, finished or not, and returns its path.
pub fn write(run_dir: &Path) -> Result<PathBuf> {
    let run = Run::read(run_dir)?;
    let path = run_dir.join("report.html");
    crate::files::write_atomic(&path, page(&run).as_bytes())?;
    Ok(path)
}

fn esc(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Four significant digits, whole numbers whole.
fn number(v: f64) -> String {
    if v == v.trunc() && v.abs() < 1e9 {
        return format!("{v:.0}");
    }
    let a = v.abs();
    if !(1e-4..1e7).contains(&a) {
        return format!("{v:.3e}");
    }
    let digits = (3 - a.log10().floor() as i32).max(0) as usize;
    format!("{v:.digits$}")
}

fn plain(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(s) => s.clone(),
        Value::Number(n) => n.as_f64().map_or_else(|| n.to_string(), number),
        other => other.to_string(),
    }
}

fn figure(png: Option<Vec<u8>>, caption: &str) -> String {
    let Some(png) = png else { return String::new() };
    let data = base64::engine::general_purpose::STANDARD.encode(png);
    let caption = esc(caption);
    format!(
        "<figure><img alt=\"{caption}\" src=\"data:image/png;base64,{data}\"><figcaption>{caption}</figcaption></figure>\n"
    )
}

fn section(title: &str, body: &str) -> String {
    if body.trim().is_empty() { String::new() } else { format!("<section><h2>{}</h2>\n{body}</section>\n", esc(title)) }
}

/// Keys by which an object of the summary is known to measure a model.
const MEASURES: [&str; 3] = ["frechet", "nfe", "ms_per_image"];

/// Objects of the summary that hold measures (`teacher`, `student`, `baseline`...) as rows of one table; the rest as pairs.
fn summary(run: &Run) -> String {
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
            Value::Object(inner) => inner.iter().for_each(|(k, v)| pairs += &pair(k, v)),
            _ => pairs += &pair(key, value),
        }
    }
    if pairs.is_empty() { out } else { format!("{out}<dl>{pairs}</dl>\n") }
}

fn pair(key: &str, value: &Value) -> String {
    format!("<dt>{}</dt><dd>{}</dd>", esc(&heading(key)), esc(&plain(value)))
}

fn heading(key: &str) -> String {
    match key {
        "frechet" => "Fréchet distance".into(),
        "nfe" => "network calls".into(),
        "ms_per_image" => "ms an image".into(),
        other => other.replace('_', " "),
    }
}

fn state(run: &Run) -> String {
    let last = run.metrics.last();
    let done = run.folder.join("student.onnx").is_file();
    let at = last.map(|row| {
        format!("{} iteration {}, node {}", plain(&row["stage"]), plain(&row["iteration"]), plain(&row["node"]))
    });
    match (done, at) {
        (true, Some(at)) => format!("finished; last row: {at}"),
        (true, None) => "finished".into(),
        (false, Some(at)) => format!("not finished: {at}"),
        (false, None) => "started, nothing measured yet".into(),
    }
}

fn side_by_side(run: &Run) -> String {
    let latest = || {
        // The path leads from high nodes to the teacher: the lowest node left is the newest student.
        let node = *run.numbered("student-node").first()?;
        Some((run.sample(&format!("student-node-{node:03}.png"))?, format!("student so far (after node {node})")))
    };
    let student = run.sample("student-final.png").map(|png| (png, "student: one call of the network".to_string()));
    let mut out = String::new();
    if let Some((png, caption)) = student.or_else(latest) {
        out += &figure(Some(png), &caption);
    }
    out += &figure(run.sample("teacher.png"), "teacher: its many-step sampler");
    if out.is_empty() { out } else { format!("<div class=\"pair\">{out}</div>") }
}

/// Node N to node 0, the way the student takes: what the degraded teacher makes, and the student when it left that node.
fn film(run: &Run) -> String {
    let mut nodes = run.numbered("degraded-node");
    nodes.extend(run.numbered("student-node"));
    if run.sample("teacher.png").is_some() {
        nodes.push(0);
    }
    nodes.sort_unstable();
    nodes.dedup();
    let mut out = String::new();
    for &k in nodes.iter().rev() {
        let recorded = run.nodes.iter().find(|n| n.index == k);
        let mut about = vec![if k == 0 { "node 0, the teacher".to_string() } else { format!("node {k}") }];
        about.extend(recorded.and_then(|n| n.iteration).map(|i| format!("stage-1 step {i}")));
        about.extend(recorded.and_then(|n| n.loss).map(|l| format!("loss {}", number(l))));
        let teacher = if k == 0 { run.sample("teacher.png") } else { None };
        let degraded = run.sample(&format!("degraded-node-{k:03}.png")).or(teacher);
        let last = if k == 0 { run.sample("student-final.png") } else { None };
        let student = run.sample(&format!("student-node-{k:03}.png")).or(last);
        let _ = writeln!(
            out,
            "<div class=\"frame\"><h3>{}</h3>{}{}</div>",
            esc(&about.join(" · ")),
            figure(degraded, "the target"),
            figure(student, "the student after it")
        );
    }
    if out.is_empty() { out } else { format!("<div class=\"strip\">{out}</div>") }
}

fn plots(run: &Run) -> String {
    let marks: Vec<Mark> =
        run.switches().into_iter().map(|(x, node)| Mark { x, label: format!("node {node}") }).collect();
    let mut out = String::new();
    let mut add = |title: &str, stage: &str, columns: &[(&str, &str)], marks: &[Mark]| {
        let series: Vec<Series> =
            columns.iter().map(|(c, n)| Series { name: n.to_string(), points: run.column(stage, c) }).collect();
        if let Some(svg) = curves("iteration", &series, marks) {
            let _ = writeln!(out, "<figure class=\"plot\">{svg}<figcaption>{}</figcaption></figure>", esc(title));
        }
    };
    let losses = [("loss_fake", "fake score"), ("loss_generator", "generator")];
    add("Stage 1, degradation: losses", "degrade", &losses, &[]);
    add("Stage 2: loss of the fake score", "backtrack", &losses[..1], &marks);
    add("Stage 2: loss of the generator", "backtrack", &losses[1..], &marks);
    add("Stage 2: score mismatch to the current target", "backtrack", &[("mismatch", "mismatch")], &marks);
    add("Stage 2: gradient norm of the fake score", "backtrack", &[("grad_norm_fake", "fake score")], &marks);
    add("Stage 2: gradient norm of the generator", "backtrack", &[("grad_norm_generator", "generator")], &marks);
    add("Stage 2: images a second", "backtrack", &[("images_per_s", "images/s")], &marks);
    out
}

fn hashes(run: &Run) -> String {
    let mut rows = String::new();
    if let Some(hash) = &run.teacher_hash {
        let _ = writeln!(rows, "<tr><th>teacher</th><td></td><td></td><td><code>{}</code></td></tr>", esc(hash));
    }
    for node in &run.nodes {
        let _ = writeln!(
            rows,
            "<tr><th>node {}</th><td>{}</td><td>{}</td><td><code>{}</code></td></tr>",
            node.index,
            node.iteration.map_or("-".into(), |i| i.to_string()),
            node.loss.map_or("-".into(), number),
            esc(node.hash.as_deref().unwrap_or("-"))
        );
    }
    if rows.is_empty() {
        return rows;
    }
    format!(
        "<div class=\"wide\"><table><tr><th></th><th>step</th><th>loss</th><th>SHA-256 of the weights</th></tr>\n{rows}</table></div>"
    )
}

/// The command as the run recorded it, or one that does the same with the resolved configuration.
fn repeat(run: &Run) -> String {
    if run.config.is_none() {
        return String::new();
    }
    let recorded = |key: &str| {
        let summary = run.summary.as_ref()?;
        summary["run"][key].as_str().or_else(|| summary[key].as_str()).map(str::to_string)
    };
    let folder = run.folder.canonicalize().unwrap_or_else(|_| run.folder.clone());
    let config = folder.join("config.toml").display().to_string();
    let command = recorded("command").unwrap_or_else(|| {
        let teacher = recorded("teacher").unwrap_or_else(|| "TEACHER.onnx".into());
        format!("disback distill {} --config {} --out NEW_FOLDER", shell(&teacher), shell(&config))
    });
    format!("<pre>{}</pre>", esc(&command))
}

fn shell(text: &str) -> String {
    let safe = text.chars().all(|c| c.is_ascii_alphanumeric() || "/._-+=:@".contains(c));
    if safe { text.to_string() } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

const STYLE: &str = "
:root { color-scheme: light dark; --ground: #fff; --ink: #1b1f24; --soft: #5b6570; --line: #d7dce1; --card: #f5f7f9; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --ink: #e6e9ec; --soft: #9aa4ae; --line: #343b42;
  --card: #1d2226; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
h3 { font-size: .9rem; margin: 0 0 .4rem; font-weight: 600; }
.state, figcaption, dt { color: var(--soft); font-size: .9rem; }
figure { margin: 0 0 .8rem; } img { max-width: 100%; height: auto; image-rendering: pixelated; border-radius: 4px; }
.pair { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); }
.pair img { width: 100%; }
.strip { display: flex; gap: 1rem; overflow-x: auto; padding-bottom: .5rem; }
.frame { flex: 0 0 auto; width: 15rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem; }
.frame img { width: 100%; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); }
.plot { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6rem; }
.plot svg { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { overflow-wrap: normal; text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
dl { display: grid; grid-template-columns: minmax(8rem, auto) 1fr; gap: .2rem 1rem; } dd { margin: 0; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; overflow-x: auto;
  white-space: pre-wrap; font-size: .85rem; } code { font-size: .85rem; }
";

fn page(run: &Run) -> String {
    let real = run.folder.canonicalize().unwrap_or_else(|_| run.folder.clone());
    let name = real.file_name().map_or_else(|| "run".into(), |n| n.to_string_lossy().into_owned());
    let mut body = String::new();
    body += &section("Summary", &summary(run));
    body += &section("Student beside teacher", &side_by_side(run));
    body += &section("The way back, node by node", &film(run));
    let plots = plots(run);
    body += &section("Curves", &if plots.is_empty() { plots } else { format!("<div class=\"plots\">{plots}</div>") });
    if let Some(config) = &run.config {
        body += &section(
            "Configuration",
            &format!("<details><summary>config.toml</summary><pre>{}</pre></details>", esc(config)),
        );
    }
    body += &section("Trajectory", &hashes(run));
    body += &section("To repeat it", &repeat(run));
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{name} · disback</title>\n<style>{STYLE}</style></head>\n<body>\n<h1>{name}</h1>\n\
         <p class=\"state\">{state} · disback {version}</p>\n{body}</body></html>\n",
        name = esc(&name),
        state = esc(&state(run)),
        version = env!("CARGO_PKG_VERSION"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::images::encode_png;

    fn run_dir() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        };
        put("config.toml", b"seed = 1\nnote = \"<script>\"\n");
        let mut rows = String::new();
        for k in 0..40 {
            rows += &format!(
                "{{\"stage\":\"degrade\",\"iteration\":{k},\"node\":0,\"loss_fake\":{},\"loss_generator\":null}}\n",
                1.0 / (k + 1) as f64
            );
        }
        for k in 0..60 {
            let node = 3 - k / 20;
            rows += &format!(
                "{{\"stage\":\"backtrack\",\"iteration\":{k},\"node\":{node},\"loss_fake\":0.5,\"loss_generator\":{k},\"mismatch\":0.1}}\n"
            );
        }
        rows += "{\"stage\":\"backtr";
        put("metrics.jsonl", rows.as_bytes());
        let nodes: Vec<String> = (0..4)
            .map(|k| format!("{{\"index\":{k},\"file\":\"node-{k:03}.safetensors\",\"iteration\":{},\"loss\":{k}.25,\"hash\":\"hash-{k}\"}}", k * 100))
            .collect();
        put(
            "trajectory/trajectory.json",
            format!("{{\"teacher_hash\":\"abc\",\"nodes\":[{}]}}", nodes.join(",")).as_bytes(),
        );
        let png = encode_png(&[7; 64], [1, 8, 8]).unwrap();
        for name in ["teacher", "degraded-node-001", "degraded-node-003", "student-node-003"] {
            put(&format!("samples/{name}.png"), &png);
        }
        dir
    }

    #[test]
    fn an_unfinished_run_has_a_report() {
        let dir = run_dir();
        let text = std::fs::read_to_string(write(dir.path()).unwrap()).unwrap();
        assert!(text.contains("not finished: backtrack iteration 59, node 1"));
        // Student and teacher; nodes 3 (both sheets), 1 and 0.
        assert_eq!(text.matches("data:image/png;base64,").count(), 2 + 4);
        assert!(text.contains("student so far (after node 3)") && text.contains("hash-3"));
        assert!(text.contains("&lt;script&gt;") && !text.contains("<script"));
        assert_eq!(text.matches("<svg").count(), 4);
        assert!(text.contains("node 2") && text.contains("stage-1 step 300 · loss 3.250"));
        // Nothing is fetched from elsewhere.
        assert!(!text.contains("src=\"http") && !text.contains("href=") && !text.contains("@import"));
    }

    #[test]
    fn a_finished_run_shows_its_summary() {
        let dir = run_dir();
        let summary = r#"{"student":{"frechet":5.6789,"nfe":1,"ms_per_image":0.4},"teacher":{"frechet":1.6,"nfe":35},"run":{"device":"cpu","nodes":5}}"#;
        std::fs::write(dir.path().join("summary.json"), summary).unwrap();
        std::fs::write(dir.path().join("student.onnx"), b"x").unwrap();
        let text = std::fs::read_to_string(write(dir.path()).unwrap()).unwrap();
        assert!(text.contains("finished; last row"));
        assert!(text.contains("<tr><th>student</th><td>5.679</td><td>1</td><td>0.4000</td></tr>"));
        assert!(text.contains("<tr><th>teacher</th><td>1.600</td><td>35</td><td>-</td></tr>"));
        assert!(text.contains("<dt>device</dt><dd>cpu</dd>") && !text.contains("<th>device</th>"));
        assert!(text.contains("disback distill TEACHER.onnx --config "));
    }

    #[test]
    fn other_folders_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(write(dir.path()).unwrap_err().to_string().contains("not a run directory"));
        assert!(write(&dir.path().join("none")).is_err());
        std::fs::write(dir.path().join("config.toml"), "seed = 1").unwrap();
        assert!(write(dir.path()).is_ok());
    }
}
