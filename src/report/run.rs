//! What a run directory holds, read as it lies there: a run may be unfinished, killed, or of an older version.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Context, Error, Result};
use crate::eval::in_loop::{self, InLoopPoint};

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

/// Lines that are JSON objects.
fn objects(text: &str) -> Vec<Value> {
    text.lines().filter_map(|l| serde_json::from_str(l).ok()).filter(Value::is_object).collect()
}

fn json(path: &Path) -> Option<Value> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

impl Run {
    pub fn read(folder: &Path) -> Result<Self> {
        if !folder.is_dir() {
            return Err(Error::io("no such folder").context(folder.display().to_string()));
        }
        let text = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
        let (config, metrics) = (text("config.toml"), text("metrics.jsonl"));
        if config.is_none() && metrics.is_none() {
            return Err(Error::usage("not a run directory: it holds neither config.toml nor metrics.jsonl"))
                .context(folder.display().to_string());
        }
        let metrics = metrics.unwrap_or_default();
        let rows = objects(&metrics);
        let trajectory = json(&folder.join("trajectory/trajectory.json"));
        let list = trajectory.as_ref().and_then(|t| t["nodes"].as_array()).cloned().unwrap_or_default();
        let nodes = list.iter().enumerate().map(|(k, n)| Node {
            index: n["index"].as_u64().map_or(k, |i| i as usize),
            iteration: n["iteration"].as_u64(),
            loss: n["loss"].as_f64(),
            hash: n["hash"].as_str().map(str::to_string),
        });
        Ok(Self {
            nodes: nodes.collect(),
            teacher_hash: trajectory.as_ref().and_then(|t| t["teacher_hash"].as_str()).map(str::to_string),
            config,
            metrics: rows,
            summary: json(&folder.join("summary.json")),
            evaluation: json(&folder.join(crate::eval::sweep::FILE)),
            bench: json(&folder.join("bench.json")),
            points: in_loop::read(&folder.join(in_loop::FILE)),
            warnings: objects(&text("warnings.jsonl").unwrap_or_default()),
            levels: objects(&text("levels.jsonl").unwrap_or_default()),
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
        let path = self.folder.join("samples").join(name);
        let bytes = std::fs::read(path).ok()?;
        (bytes.starts_with(b"\x89PNG") && bytes.len() < 32 << 20).then_some(bytes)
    }

    /// Whether samples are no images, so that students' pictures have the teacher's samples beneath them.
    pub fn plotted(&self) -> bool {
        self.folder.join("samples/teacher.npy").is_file()
    }

    /// A .wav of `samples/`, where it is there.
    pub fn sound(&self, name: &str) -> Option<Vec<u8>> {
        let bytes = std::fs::read(self.folder.join("samples").join(name)).ok()?;
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
