//! `report.html`: one file that holds everything it shows, readable on a phone and in print, in light and in dark.

use std::path::{Path, PathBuf};

use super::run::Run;
use super::text::{esc, plain};
use super::{curves, gallery, tables};
use crate::error::Result;
use crate::eval::in_loop::InLoopPoint;
use crate::shown::counted;

/// Writes `report.html` into a run directory from what lies in it, finished or not, and returns its path.
pub fn write(run_dir: &Path) -> Result<PathBuf> {
    write_beside(run_dir, &[])
}

/// [`write`], with the distance curves of other runs (the same without a trajectory, say) beside this one's.
pub fn write_beside(run_dir: &Path, baselines: &[PathBuf]) -> Result<PathBuf> {
    let run = Run::read(run_dir)?;
    let mut others = Vec::new();
    for folder in baselines {
        let other = Run::read(folder)?;
        let nodes = other.nodes.len().saturating_sub(1);
        let kind = if nodes > 0 { counted(nodes as u64, "node") } else { "without trajectory".to_string() };
        others.push((format!("{}, {kind}", name_of(folder)), other.points));
    }
    let path = run_dir.join("report.html");
    crate::files::write_atomic(&path, page(&run, &others).as_bytes())?;
    Ok(path)
}

fn name_of(folder: &Path) -> String {
    let real = folder.canonicalize().unwrap_or_else(|_| folder.to_path_buf());
    real.file_name().map_or_else(|| "run".into(), |n| n.to_string_lossy().into_owned())
}

fn section(title: &str, body: &str) -> String {
    if body.trim().is_empty() { String::new() } else { format!("<section><h2>{}</h2>\n{body}</section>\n", esc(title)) }
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

/// The command as the run recorded it, and one that does the same with the resolved configuration from anywhere.
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
    let teacher = recorded("teacher").unwrap_or_else(|| "TEACHER.onnx".into());
    let resolved = format!("disback distill {} --config {} --out NEW_FOLDER", shell(&teacher), shell(&config));
    let as_given = recorded("command").map_or(String::new(), |c| {
        format!(
            "<pre>{}</pre>\n<p class=\"note\">or, with the \
         configuration as it was resolved:</p>\n",
            esc(&c)
        )
    });
    format!("{as_given}<pre>{}</pre>", esc(&resolved))
}

fn warnings(run: &Run) -> String {
    let item = |w: &serde_json::Value| {
        let said = [&w["stage"], &w["iteration"], &w["text"]].map(|v| esc(&plain(v)));
        format!("<li>{}, iteration {}: {}</li>", said[0], said[1], said[2])
    };
    let items: String = run.warnings.iter().map(item).collect();
    if items.is_empty() { items } else { format!("<ul>{items}</ul>") }
}

/// What `degrade.nodes = "auto"` has decided, and why.
fn plan(run: &Run) -> String {
    run.plan.as_ref().map_or_else(String::new, |why| format!("<p>{}.</p>", esc(&upper(why))))
}

/// With a capital at its beginning.
fn upper(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}

fn shell(text: &str) -> String {
    let safe = text.chars().all(|c| c.is_ascii_alphanumeric() || "/._-+=:@".contains(c));
    if safe { text.to_string() } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");
/// Nothing may be fetched, whatever the page holds.
const POLICY: &str = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'";

fn page(run: &Run, others: &[(String, Vec<InLoopPoint>)]) -> String {
    let name = name_of(&run.folder);
    let mut body = String::new();
    body += &tables::headline(run);
    body += &section("Warnings", &warnings(run));
    body += &section("Student beside teacher", &gallery::side_by_side(run));
    body += &section("Distances", &(tables::distances(run) + &curves::students(run)));
    body += &section("The plan", &plan(run));
    body += &section("The way back, node by node", &gallery::film(run));
    body += &section("Inside the loss, node by node", &gallery::inside(run));
    body += &section("Distance while training", &curves::distances(run, others));
    body += &section("Mismatch per node", &curves::mismatch(run));
    body += &section("Losses by noise level", &curves::levels(run));
    body += &section("Curves", &curves::losses(run));
    body += &section("Cost", &tables::cost(run));
    body += &section("Nearest neighbours", &gallery::neighbours(run));
    body += &section("The run", &tables::summary(run));
    if let Some(config) = &run.config {
        body += &section(
            "Configuration",
            &format!("<details><summary>config.toml</summary><pre>{}</pre></details>", esc(config)),
        );
    }
    body += &section("Hashes", &tables::hashes(run));
    body += &section("To repeat it", &repeat(run));
    format!(
        "<!doctype html>\n<html lang=\"en\" class=\"no-script\"><head><meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{POLICY}\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{name} · disback</title>\n<style>\n{STYLE}</style></head>\n<body>\n<h1>{name}</h1>\n\
         <p class=\"state\">{state} · disback {version}</p>\n{body}<script>\n{SCRIPT}</script></body></html>\n",
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
            format!("{{\"teacher_hash\":\"abc\",\"plan\":\"stage 1 took <9> steps\",\"nodes\":[{}]}}", nodes.join(","))
                .as_bytes(),
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
        // Student and teacher, beside one another and under the slider; nodes 3 (both sheets), 1 and 0.
        assert_eq!(text.matches("data:image/png;base64,").count(), 2 + 2 + 4);
        assert!(text.contains("The student so far, after node 3") && text.contains("hash-3"));
        assert!(text.contains("&lt;script&gt;") && !text.contains("<script>\""));
        // Three losses, the mismatch over iterations, and its bars by node.
        assert_eq!(text.matches("<svg").count(), 5);
        assert!(text.contains("Node 1<") && text.contains("stage-1 step 300, loss 3.250"));
        assert!(text.contains("<p>Stage 1 took &lt;9&gt; steps.</p>"));
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
        assert!(
            text.contains("<b>5.68</b><small>teacher 1.60</small>")
                && text.contains("<b>1</b><small>teacher 35</small>")
        );
        assert!(text.contains("disback distill TEACHER.onnx --config "));
    }

    #[cfg(unix)]
    #[test]
    fn links_pipes_and_files_without_end_are_refused() {
        use std::os::unix::fs::symlink;
        let outside = tempfile::tempdir().unwrap();
        let secret = outside.path().join("secret.png");
        std::fs::write(&secret, encode_png(&[9; 64], [1, 8, 8]).unwrap()).unwrap();
        for (name, target, says) in [
            ("samples/student-node-002.png", secret.as_path(), "symbolic link"),
            ("summary.json", secret.as_path(), "symbolic link"),
            ("config.toml", Path::new("/dev/zero"), "symbolic link"),
            ("levels.jsonl", Path::new("nowhere"), "symbolic link"),
        ] {
            let dir = run_dir();
            let _ = std::fs::remove_file(dir.path().join(name));
            symlink(target, dir.path().join(name)).unwrap();
            let e = write(dir.path()).unwrap_err().to_string();
            assert!(e.contains(says) && e.contains(name) && e.contains("the run's own folder"), "{e}");
            assert!(!dir.path().join("report.html").exists());
        }
        let dir = run_dir();
        std::fs::rename(dir.path().join("samples"), outside.path().join("samples")).unwrap();
        symlink(outside.path().join("samples"), dir.path().join("samples")).unwrap();
        assert!(write(dir.path()).unwrap_err().to_string().contains("samples: is a symbolic link"));
        for (name, refused) in [("warnings.jsonl", true), ("samples/teacher.png", false), ("student.onnx", false)] {
            let dir = run_dir();
            let path = dir.path().join(name);
            let _ = std::fs::remove_file(&path);
            let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
            // SAFETY: a C string that lives as long as the call.
            assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
            assert_eq!(write(dir.path()).is_err(), refused, "{}", path.display());
        }
        // Sparse: nothing of it is read.
        for name in ["metrics.jsonl", "bench.json", "config.toml"] {
            let dir = run_dir();
            std::fs::File::create(dir.path().join(name)).unwrap().set_len(8 << 30).unwrap();
            let e = write(dir.path()).unwrap_err().to_string();
            assert!(e.contains("8589934592 bytes") && e.contains(name), "{e}");
        }
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
