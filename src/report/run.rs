//! What a run directory holds, read as it lies there: a run may be unfinished, killed, or of an older version.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Context, Error, Result};
use crate::eval::in_loop::{self, InLoopPoint};
use crate::files;

/// One recorded node of the trajectory.
pub struct Node {
    pub index: usize,
    pub iteration: Option<u64>,
    pub loss: Option<f64>,
    pub hash: Option<String>,
}

/// A run directory's content, without weights.
pub struct Run {
    pub folder: PathBuf,
    pub config: Option<String>,
    /// Rows of warnings.jsonl.
    pub warnings: Vec<Value>,
    /// Rows of metrics.jsonl; lines that are no JSON objects (cut short by a kill) are left out.
    pub metrics: Vec<Value>,
    pub nodes: Vec<Node>,
    /// Why the nodes are these, where `degrade.nodes` is `auto`.
    pub plan: Option<String>,
    pub teacher_hash: Option<String>,
    pub summary: Option<Value>,
    /// What `disback evaluate --run` left.
    pub evaluation: Option<Value>,
    /// What `disback bench --run` left.
    pub bench: Option<Value>,
    /// The curve measured while training.
    pub points: Vec<InLoopPoint>,
    /// Rows of levels.jsonl: losses by noise level.
    pub levels: Vec<Value>,
    /// SHA-256 of student.onnx.
    pub student_hash: Option<String>,
}

/// A file of the run, where it is there.
///
/// Errors: it is a link or no regular file, or too large to be what a run writes: a report shows what lies in the run's own folder.
fn part(folder: &Path, name: &str, most: u64) -> Result<Option<Vec<u8>>> {
    match files::read_inside(folder, name, most) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(e) => Err(refused(e.to_string(), &folder.join(name))),
    }
}

fn refused(why: String, path: &Path) -> Error {
    Error::usage(why)
        .context(path.display().to_string())
        .hint("a report shows what lies in the run's own folder: put the file itself there, or take it away")
}

/// Lines that are JSON objects.
fn objects(folder: &Path, name: &str) -> Result<Option<Vec<Value>>> {
    // (Its size is looked at first; then no more than a line is held beside the rows.)
    let shown = |e: std::io::Error| refused(e.to_string(), &folder.join(name));
    let file = match files::open_inside(folder, name) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(shown(e)),
    };
    let size = file.metadata().map_err(shown)?.len();
    if size > files::LINES {
        let most = files::LINES;
        return Err(refused(format!("has {size} bytes; rows of at most {most} are shown"), &folder.join(name)));
    }
    let mut found = Vec::new();
    files::for_lines(file, |l, _| found.extend(serde_json::from_str(l).ok().filter(Value::is_object)))
        .map_err(shown)?;
    Ok(Some(found))
}

fn json(folder: &Path, name: &str) -> Result<Option<Value>> {
    Ok(part(folder, name, files::JSON)?.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
}

/// Refuses pictures and sounds of `samples/` that are links: what they point to would end up in the page.
fn refuse_linked_samples(folder: &Path) -> Result<()> {
    let samples = folder.join("samples");
    let linked = |path: &Path| path.symlink_metadata().is_ok_and(|m| m.is_symlink());
    let inside = std::fs::read_dir(&samples).into_iter().flatten().flatten().map(|e| e.path());
    let shown = inside.filter(|p| p.extension().is_some_and(|e| e == "png" || e == "wav"));
    match std::iter::once(samples.clone()).chain(shown).find(|p| linked(p)) {
        Some(path) => Err(refused("is a symbolic link".into(), &path)),
        None => Ok(()),
    }
}

impl Run {
    pub fn read(folder: &Path) -> Result<Self> {
        if !folder.is_dir() {
            return Err(Error::io("no such folder").context(folder.display().to_string()));
        }
        refuse_linked_samples(folder)?;
        let config = part(folder, "config.toml", files::SETTINGS)?.and_then(|bytes| String::from_utf8(bytes).ok());
        let metrics = objects(folder, "metrics.jsonl")?;
        if config.is_none() && metrics.is_none() {
            return Err(Error::usage("not a run directory: it holds neither config.toml nor metrics.jsonl"))
                .context(folder.display().to_string());
        }
        let trajectory = json(folder, "trajectory/trajectory.json")?;
        let points = objects(folder, in_loop::FILE)?.unwrap_or_default();
        let list = trajectory.as_ref().and_then(|t| t["nodes"].as_array()).cloned().unwrap_or_default();
        let nodes = list.iter().enumerate().map(|(k, n)| Node {
            index: n["index"].as_u64().map_or(k, |i| i as usize),
            iteration: n["iteration"].as_u64(),
            loss: n["loss"].as_f64(),
            hash: n["hash"].as_str().map(str::to_string),
        });
        Ok(Self {
            nodes: nodes.collect(),
            plan: trajectory.as_ref().and_then(|t| t["plan"].as_str()).map(str::to_string),
            teacher_hash: trajectory.as_ref().and_then(|t| t["teacher_hash"].as_str()).map(str::to_string),
            config,
            metrics: metrics.unwrap_or_default(),
            summary: json(folder, "summary.json")?,
            evaluation: json(folder, crate::eval::sweep::FILE)?,
            bench: json(folder, "bench.json")?,
            points: points.into_iter().filter_map(|row| serde_json::from_value(row).ok()).collect(),
            warnings: objects(folder, "warnings.jsonl")?.unwrap_or_default(),
            levels: objects(folder, "levels.jsonl")?.unwrap_or_default(),
            student_hash: crate::eval::sweep::hash_file(&folder.join("student.onnx")).ok(),
            folder: folder.to_path_buf(),
        })
    }

    /// Calls of the network an image of the student takes, by the configuration.
    pub fn student_calls(&self) -> usize {
        let config: Option<toml::Table> = self.config.as_ref().and_then(|text| toml::from_str(text).ok());
        let further = config.as_ref().and_then(|c| c.get("student")?.get("sigmas")?.as_array().map(Vec::len));
        1 + further.unwrap_or(0)
    }

    /// Rows of one stage.
    pub fn stage<'a>(&'a self, stage: &'a str) -> impl Iterator<Item = &'a Value> {
        self.metrics.iter().filter(move |row| row["stage"] == stage)
    }

    /// A column of a stage over its iterations.
    pub fn column(&self, stage: &str, name: &str) -> Vec<(f64, f64)> {
        self.stage(stage).filter_map(|row| Some((row["iteration"].as_f64()?, row[name].as_f64()?))).collect()
    }

    /// Where stage 2 went on to another node: (iteration, node).
    pub fn switches(&self) -> Vec<(f64, u64)> {
        let mut last = None;
        let rows = self.stage("backtrack").filter_map(|row| Some((row["iteration"].as_f64()?, row["node"].as_u64()?)));
        rows.filter(|(_, node)| last.replace(*node) != Some(*node)).collect()
    }

    /// A PNG of `samples/`, where it is there.
    pub fn sample(&self, name: &str) -> Option<Vec<u8>> {
        let bytes = files::read_inside(&self.folder, &format!("samples/{name}"), files::PICTURE).ok()?;
        bytes.starts_with(b"\x89PNG").then_some(bytes)
    }

    /// Whether samples are no images, so that students' pictures have the teacher's samples beneath them.
    pub fn plotted(&self) -> bool {
        self.folder.join("samples/teacher.npy").is_file()
    }

    /// A .wav of `samples/`, where it is there.
    pub fn sound(&self, name: &str) -> Option<Vec<u8>> {
        let bytes = files::read_inside(&self.folder, &format!("samples/{name}"), files::PICTURE).ok()?;
        bytes.starts_with(b"RIFF").then_some(bytes)
    }

    /// Looks inside the loss, `samples/inside-node-<node>-update-<update>.png`, in the order of the way back: file, node, update.
    pub fn inside(&self) -> Vec<(String, usize, u64)> {
        let files = std::fs::read_dir(self.folder.join("samples")).into_iter().flatten().flatten();
        let mut found: Vec<(String, usize, u64)> = files
            .filter_map(|e| {
                let name = e.file_name().into_string().ok()?;
                let (node, update) = name.strip_prefix("inside-node-")?.strip_suffix(".png")?.split_once("-update-")?;
                let (node, update) = (node.parse().ok()?, update.parse().ok()?);
                Some((name, node, update))
            })
            .collect();
        found.sort_unstable_by_key(|(_, node, update)| (std::cmp::Reverse(*node), *update));
        found
    }

    /// Numbers `k` of the files `samples/<stem>-<k>.png`, ascending.
    pub fn numbered(&self, stem: &str) -> Vec<usize> {
        let files = std::fs::read_dir(self.folder.join("samples")).into_iter().flatten().flatten();
        let mut found: Vec<usize> = files
            .filter_map(|e| e.file_name().into_string().ok())
            .filter_map(|n| n.strip_prefix(stem)?.strip_prefix('-')?.strip_suffix(".png")?.parse().ok())
            .collect();
        found.sort_unstable();
        found
    }
}
