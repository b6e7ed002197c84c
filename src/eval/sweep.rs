//! All students of a run measured in one go: what was measured before in the same way is not measured again.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::evaluation::EvaluationRow;
use crate::error::{Context, Error, Result};

/// Name of the file in the run directory that holds the [`Book`].
pub const FILE: &str = "evaluation.json";

/// One measured student.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Entry {
    /// Path within the run directory.
    pub file: String,
    /// SHA-256 of the student's file.
    pub hash: String,
    /// What was measured and how: equal settings give comparable figures.
    pub setting: String,
    /// What was measured of it.
    pub row: EvaluationRow,
}

/// Neighbours of one generated image: places in the reference, and distances.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Neighbours {
    /// Index of the generated image in its set.
    pub image: usize,
    /// Nearest reference images, nearest first: index in the reference, and distance in feature space.
    pub nearest: Vec<(usize, f64)>,
}

/// `evaluation.json` of a run.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Book {
    /// The student with the least Frechet distance (without a feature network, sliced Wasserstein distance) among those measured
    /// in the latest setting.
    pub best: Option<String>,
    /// The latest setting; see [`Entry::setting`].
    pub setting: String,
    /// Command line of the latest evaluation.
    pub command: Option<String>,
    /// Path of the reference in the latest evaluation.
    pub reference: Option<String>,
    /// All measured students, in this and in earlier settings.
    pub entries: Vec<Entry>,
    /// Teachers and other sets measured beside the students, in the latest setting.
    pub others: Vec<EvaluationRow>,
    /// Nearest reference images of some images of the best student, in the latest setting.
    pub neighbours: Vec<Neighbours>,
}

impl Book {
    /// The run's book; an empty one where there is none.
    pub fn read(run: &Path) -> Result<Self> {
        let path = run.join(FILE);
        if !path.exists() {
            return Ok(Self::default());
        }
        let bytes =
            crate::files::read_inside(run, FILE, crate::files::JSON).with_context(|| path.display().to_string())?;
        serde_json::from_slice(&bytes)
            .map_err(|e| Error::io(format!("not the results of an evaluation: {e}")).hint("remove it to start anew"))
            .with_context(|| path.display().to_string())
    }

    /// Writes the book as `evaluation.json` into the run directory.
    pub fn write(&self, run: &Path) -> Result<()> {
        let bytes = serde_json::to_vec_pretty(self).map_err(|e| Error::io(e.to_string()))?;
        crate::files::write_atomic(&run.join(FILE), &bytes)
    }

    /// The row of a student that was measured in this setting.
    pub fn find(&self, hash: &str, setting: &str) -> Option<&EvaluationRow> {
        self.entries.iter().find(|e| e.hash == hash && e.setting == setting).map(|e| &e.row)
    }

    /// Puts a row in, in place of an older one of the same file and setting, and names the best anew.
    pub fn insert(&mut self, entry: Entry) {
        self.entries.retain(|e| e.file != entry.file || e.setting != entry.setting);
        self.setting = entry.setting.clone();
        self.entries.push(entry);
        self.name_best();
    }

    /// Takes `setting` for the latest one.
    pub fn turn_to(&mut self, setting: &str) {
        if self.setting != setting {
            self.setting = setting.to_string();
            self.others.clear();
            self.neighbours.clear();
        }
        self.name_best();
    }

    fn name_best(&mut self) {
        let here = self.entries.iter().filter(|e| e.setting == self.setting);
        let measured = here.filter_map(|e| Some((e.row.frechet.or(e.row.sliced)?, e)));
        self.best = measured.min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, e)| e.file.clone());
    }
}

/// The students of a run: snapshots in order, then the best and the last one.
pub fn students(run: &Path) -> Result<Vec<PathBuf>> {
    if !run.is_dir() {
        return Err(Error::io(format!("{}: no such folder", run.display())));
    }
    let mut found = Vec::new();
    if let Ok(entries) = std::fs::read_dir(run.join("snapshots")) {
        found.extend(entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "onnx")));
    }
    found.sort();
    found.extend(["best.onnx", "student.onnx"].map(|n| run.join(n)).into_iter().filter(|p| p.is_file()));
    match found.is_empty() {
        true => Err(Error::usage(format!("{} holds no students", run.display()))
            .hint("snapshots come with log.snapshot_every, student.onnx with the end of the run or `disback export`")),
        false => Ok(found),
    }
}

/// SHA-256 of a file.
pub fn hash_file(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let mut file = crate::files::open(path).with_context(|| path.display().to_string())?;
    std::io::copy(&mut file, &mut hash).with_context(|| path.display().to_string())?;
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

/// Hash of what decides a figure beside the student.
pub fn setting(parts: &serde_json::Value) -> String {
    let hash = Sha256::digest(parts.to_string().as_bytes());
    hash.iter().take(16).map(|b| format!("{b:02x}")).collect()
}
