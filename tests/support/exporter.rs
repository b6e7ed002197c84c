//! The Python process that exports the corpus, case by case, as tests ask for them.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Mutex;

use sha2::{Digest, Sha256};

use crate::support;

/// Exports are kept between runs, under a name that changes with the scripts and the wheels that export.
pub struct Exporter {
    folder: PathBuf,
    process: Mutex<Option<Process>>,
    /// Held while a case is exported.
    making: Mutex<()>,
}

struct Process {
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A folder of a case that another program wrote, in the layout of `export.py`: `DISBACK_CORPUS=/path/to/it`.
fn foreign(name: &str) -> Option<PathBuf> {
    Some(PathBuf::from(name)).filter(|f| f.is_absolute() && f.join("model.onnx").is_file())
}

impl Exporter {
    pub fn new() -> Self {
        let scripts = support::root().join("tests/python/corpus");
        let mut files: BTreeMap<PathBuf, Vec<u8>> = BTreeMap::new();
        let python = |p: &PathBuf| p.extension().is_some_and(|e| e == "py");
        for path in std::fs::read_dir(&scripts).unwrap().map(|e| e.unwrap().path()).filter(python) {
            files.insert(path.clone(), std::fs::read(&path).unwrap());
        }
        let pins = std::fs::read_to_string(support::root().join("requirements.txt")).unwrap();
        let exporting = ["torch", "onnx", "numpy", "diffusers", "transformers"];
        let mut sha = Sha256::new();
        pins.lines().filter(|l| exporting.iter().any(|p| l.starts_with(p))).for_each(|l| sha.update(l));
        files.values().for_each(|text| sha.update(text));
        let hash: String = sha.finalize().iter().take(6).map(|b| format!("{b:02x}")).collect();
        let parent = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let name = format!("corpus-{hash}");
        // What older scripts wrote only takes space.
        for old in std::fs::read_dir(parent).into_iter().flatten().flatten() {
            let of_ours = old.file_name().to_string_lossy().starts_with("corpus-");
            if of_ours && old.file_name() != name.as_str() {
                let _ = std::fs::remove_dir_all(old.path());
            }
        }
        let folder = parent.join(name);
        std::fs::create_dir_all(&folder).unwrap();
        Self { folder, process: Mutex::new(None), making: Mutex::new(()) }
    }

    /// The folder of a case, exported where it is not there yet.
    pub fn case(&self, name: &str) -> Result<PathBuf, String> {
        if let Some(folder) = foreign(name) {
            return Ok(folder);
        }
        let folder = self.folder.join(name);
        let done = folder.join("done");
        // Two tests of one case: a file that is read must not be written again.
        let _one = self.making.lock().unwrap_or_else(|e| e.into_inner());
        if !done.exists() {
            let answer = self.ask(name)?;
            let missing = answer["missing"].as_array().cloned().unwrap_or_default();
            if !missing.is_empty() {
                return Err(format!("the file holds no tensor with the values of {missing:?}"));
            }
            std::fs::write(done, answer.to_string()).map_err(|e| e.to_string())?;
        }
        Ok(folder)
    }

    /// ONNX's own checker on a file, and that it is its teacher but for weights.
    pub fn check(&self, path: &Path) -> Result<(), String> {
        self.ask(&format!("check {}", path.display())).map(drop)
    }

    fn ask(&self, request: &str) -> Result<serde_json::Value, String> {
        let mut process = self.process.lock().unwrap_or_else(|e| e.into_inner());
        if process.is_none() {
            *process = Some(self.start()?);
        }
        let p = process.as_mut().expect("started above");
        writeln!(p.requests, "{request}").map_err(|e| format!("the exporting process has ended ({e})"))?;
        let mut line = String::new();
        p.answers.read_line(&mut line).map_err(|e| e.to_string())?;
        let answer: serde_json::Value = serde_json::from_str(&line).map_err(|e| format!("{e}: `{line}`"))?;
        match answer["error"].as_str() {
            Some(e) => Err(format!("{request}: {e}")),
            None => Ok(answer),
        }
    }

    fn start(&self) -> Result<Process, String> {
        let python = support::python();
        let log = std::fs::File::create(self.folder.join("exporter.log")).map_err(|e| e.to_string())?;
        let mut child = Command::new(&python)
            .arg(support::root().join("tests/python/corpus"))
            .arg(&self.folder)
            .env("OMP_NUM_THREADS", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .map_err(|e| format!("{} does not start ({e}); run `make setup` first", python.display()))?;
        let requests = child.stdin.take().expect("piped");
        let answers = BufReader::new(child.stdout.take().expect("piped"));
        Ok(Process { child, requests, answers })
    }
}
