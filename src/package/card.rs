//! The card of a model hub: what the student is, where it comes from, what was measured and how.

use std::fmt::Write;
use std::path::Path;

use serde_json::Value;

use super::{PackageOptions, Packed};
use crate::error::{Context, Error, Result};
use crate::eval::row::EvaluationRow;
use crate::eval::sweep::Book;
use crate::files;
use crate::runtime::student::ConditionKind;

/// `README.md`.
///
/// Errors: no licence was given; a run that made another student.
pub(super) fn write(p: &Packed, options: &PackageOptions) -> Result<String> {
    let Some(license) = options.license.as_deref().filter(|l| !l.trim().is_empty()) else {
        return Err(Error::usage("--model-card needs --license: that of the teacher, which a student inherits").hint(
            "name it as the hub does, as in --license apache-2.0; where the teacher's forbids derivatives, do not publish the student",
        ));
    };
    let run = options.run.as_deref().map(|r| Training::read(r, p)).transpose()?;
    let get = |key: &str| p.info.metadata.get(key).map(String::as_str).unwrap_or("not recorded");
    let mut text = format!("---\nlicense: {}\nlibrary_name: onnx\n", Value::from(license));
    let image = p.info.image_shape().is_some();
    if image {
        let task = if p.info.conditions.is_empty() { "unconditional-image-generation" } else { "image-generation" };
        let _ = write!(text, "tags: [onnx, diffusion, distillation, one-step, {task}]\n---\n\n");
    } else {
        text.push_str("tags: [onnx, diffusion, distillation, one-step]\n---\n\n");
    }
    let steps = get("student.steps");
    let calls = if steps == "1" { "one call".to_owned() } else { format!("{steps} steps inside one file") };
    let _ = write!(
        text,
        "# {}\n\nA generator distilled from a diffusion model by disback: a sample in {calls} of the network, in any runtime for ONNX.\n\n",
        p.name
    );
    text.push_str("| | |\n|---|---|\n");
    let objective = get("student.objective");
    let mut row = |name: &str, value: &str| {
        let _ = writeln!(text, "| {name} | {} |", value.replace('|', "\\|"));
    };
    row("file", &format!("`{}.onnx`, {} bytes, SHA-256 `{}`", p.name, p.bytes, p.sha256));
    row("teacher", &format!("SHA-256 `{}` of its graph and weights", get("student.teacher_hash")));
    row("method", &format!("{}, objective {objective}", get("student.method")));
    row("precision", get("student.precision"));
    row("licence", license);
    row("sample", &format!("{}, range {}", crate::axes::written(&p.info.shape), range(p)));
    if let Some(run) = &run {
        row("training data", &run.data);
        row("cost", &run.cost);
    }
    text.push_str("\n## Inputs\n\n");
    let _ = writeln!(text, "- `noise`: {}, standard normal", crate::axes::written(&p.info.noise_shape));
    for c in &p.info.conditions {
        let what = match c.kind {
            ConditionKind::ClassIndex { classes } => format!("a class, 0 to {}", classes.saturating_sub(1)),
            ConditionKind::OneHot { classes } => format!("a row of {classes} with a 1 at the class"),
            ConditionKind::Embedding => "a row of the teacher's encoder".to_owned(),
        };
        let _ = writeln!(text, "- `{}`: {what}", c.input);
    }
    let _ = write!(text, "\n{}", sample(p));
    match run.as_ref().and_then(|r| r.measured.as_ref()) {
        Some((row, command)) => {
            text.push_str("\n## Measured\n\n");
            text.push_str(&figures(row, command));
        }
        None => text.push_str("\n## Measured\n\nNothing yet: `disback evaluate reference.npz --run RUN --features features.onnx`, then this card again.\n"),
    }
    if let Some(run) = &run {
        let _ = write!(text, "\n## Made by\n\n```console\n$ {}\n```\n", run.command.replace("```", ""));
    }
    Ok(text)
}

fn range(p: &Packed) -> String {
    p.info.range.map_or("none (latents)".to_owned(), |[low, high]| format!("{low} to {high}"))
}

/// How to call it.
fn sample(p: &Packed) -> String {
    let mut fed = vec![format!("\"noise\": rng.standard_normal((4, {}), dtype=\"f4\")", list(&p.info.noise_shape))];
    for c in &p.info.conditions {
        fed.push(match c.kind {
            ConditionKind::ClassIndex { .. } => format!("{}: np.arange(4)", Value::from(c.input.name.as_str())),
            ConditionKind::OneHot { classes } => {
                format!("{}: np.eye({classes}, dtype=\"f4\")[:4]", Value::from(c.input.name.as_str()))
            }
            ConditionKind::Embedding => format!("{}: rows", Value::from(c.input.name.as_str())),
        });
    }
    format!(
        "```python\nimport numpy as np, onnxruntime as ort\nrng = np.random.default_rng(0)\nstudent = ort.InferenceSession(\"{}.onnx\")\n\
         samples = student.run([\"sample\"], {{{}}})[0]\n```\n",
        p.name,
        fed.join(", ")
    )
}

fn list(shape: &[usize]) -> String {
    shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn figures(row: &EvaluationRow, command: &str) -> String {
    let mut text = "| measure | value |\n|---|---|\n".to_owned();
    for (name, value) in [
        ("Frechet distance", row.frechet),
        ("kernel distance", row.kernel),
        ("precision", row.precision),
        ("recall", row.recall),
        ("density", row.density),
        ("coverage", row.coverage),
        ("Inception Score", row.inception_score),
        ("sliced Wasserstein distance, times 1000", row.sliced),
    ] {
        if let Some(value) = value {
            let _ = writeln!(text, "| {name} | {value:.4} |");
        }
    }
    let [made, real] = row.images;
    let _ = write!(text, "\n{made} samples against {real} of the reference");
    let _ = write!(
        text,
        "{}, by\n\n```console\n$ {command}\n```\n",
        if row.blocks > 1 { format!(", {} blocks of seeds", row.blocks) } else { String::new() }
    );
    text
}

/// What a run says of a student.
struct Training {
    data: String,
    cost: String,
    command: String,
    measured: Option<(EvaluationRow, String)>,
}

impl Training {
    fn read(run: &Path, p: &Packed) -> Result<Self> {
        let read = |name: &str, most| {
            files::read_text_inside(run, name, most).with_context(|| run.join(name).display().to_string())
        };
        let summary: Value = serde_json::from_str(&read("summary.json", files::JSON)?)
            .map_err(|e| Error::io(format!("{}: {e}", run.join("summary.json").display())))?;
        let config: toml::Table = read("config.toml", files::SETTINGS)?
            .parse()
            .map_err(|e| Error::io(format!("{}: {e}", run.join("config.toml").display())))?;
        let said = &summary["run"];
        let teacher = said["teacher_hash"].as_str().unwrap_or_default();
        if p.info.metadata.get("student.teacher_hash").is_some_and(|h| h != teacher) {
            return Err(Error::usage(format!("{}: its student was distilled from another teacher", run.display())));
        }
        let gan = config.get("gan").and_then(|g| g.get("data")).and_then(toml::Value::as_str).unwrap_or_default();
        let data = match gan {
            "" => "none: the student learned from the teacher alone".to_owned(),
            _ => "the teacher, and real samples for a discriminator (gan.data)".to_owned(),
        };
        let number = |key: &str| said[key].as_f64().unwrap_or(0.0);
        let images = number("images_degrade") + number("images_backtrack");
        let hours = (number("seconds_degrade") + number("seconds_backtrack")) / 3600.0;
        let cost = format!(
            "{images:.0} images, {hours:.2} hours on {}",
            said["device"].as_str().unwrap_or("an unknown device")
        );
        let book = Book::read(run)?;
        let entry = book.entries.iter().rev().find(|e| e.hash == p.sha256);
        let command = book.command.clone().unwrap_or_else(|| "disback evaluate".to_owned());
        Ok(Self {
            data,
            cost,
            command: said["command"].as_str().unwrap_or_default().to_owned(),
            measured: entry.map(|e| (e.row.clone(), command)),
        })
    }
}
