//! The run directory: what lies where, and when it may be written to.

use std::path::{Path, PathBuf};

use crate::distill::config::Config;
use crate::error::{Context, Error, Result};

/// Names of everything in a run directory.
#[derive(Debug, Clone)]
pub struct RunDir {
    path: PathBuf,
}

impl RunDir {
    /// A new run: the folder must not exist or be empty. Writes `config.toml`.
    pub fn create(path: &Path, config: &Config) -> Result<Self> {
        let occupied = match std::fs::read_dir(path) {
            Ok(mut entries) => entries.next().is_some(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => false,
            Err(e) => return Err(Error::from(e).context(path.display().to_string())),
        };
        if occupied {
            return Err(Error::usage(format!("output folder {} is not empty", path.display()))
                .hint("--resume goes on with the run in it; otherwise give another folder"));
        }
        let run = Self { path: path.to_owned() };
        for dir in [run.path.clone(), run.checkpoints(), run.samples()] {
            std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        }
        run.write_config(config)?;
        Ok(run)
    }

    /// Removes a run that has not begun.
    pub fn discard(&self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }

    /// An existing run, with the configuration it was started with.
    pub fn open(path: &Path) -> Result<(Self, Config)> {
        let run = Self { path: path.to_owned() };
        let file = run.config_file();
        if !file.is_file() {
            return Err(Error::usage(format!("{} holds no run (no config.toml)", path.display()))
                .hint("`disback distill TEACHER -o DIR` starts one; --resume, --run and --out name its folder"));
        }
        for dir in [run.checkpoints(), run.samples()] {
            std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        }
        let config = Config::resolve(Some(&file), &[])?;
        Ok((run, config))
    }

    /// Saves the configuration as resolved.
    pub fn write_config(&self, config: &Config) -> Result<()> {
        crate::files::write_atomic(&self.config_file(), config.to_toml()?.as_bytes())
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
    pub fn config_file(&self) -> PathBuf {
        self.path.join("config.toml")
    }
    pub fn trajectory(&self) -> PathBuf {
        self.path.join("trajectory")
    }
    pub fn checkpoints(&self) -> PathBuf {
        self.path.join("checkpoints")
    }
    pub fn metrics(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }
    pub fn samples(&self) -> PathBuf {
        self.path.join("samples")
    }
    /// Students kept on the way (`log.snapshot_every`).
    pub fn snapshots(&self) -> PathBuf {
        self.path.join("snapshots")
    }
    /// The student with the least distance measured while training, as ONNX.
    pub fn best(&self) -> PathBuf {
        self.path.join("best.onnx")
    }
    /// Losses by noise level.
    pub fn levels(&self) -> PathBuf {
        self.path.join("levels.jsonl")
    }
    pub fn student(&self) -> PathBuf {
        self.path.join("student.onnx")
    }
    /// The final weights (EMA) as safetensors, beside the ONNX student.
    pub fn student_weights(&self) -> PathBuf {
        self.path.join("student.safetensors")
    }
    /// The final weights of a further average (`ema.more`).
    pub fn average_weights(&self, half_life: f64) -> PathBuf {
        self.path.join(format!("student-ema-{half_life}.safetensors"))
    }
    pub fn summary(&self) -> PathBuf {
        self.path.join("summary.json")
    }
    pub fn report(&self) -> PathBuf {
        self.path.join("report.html")
    }
}

/// Keys that may change when a run is resumed: they do not touch what was computed before.
const CHANGEABLE: [&str; 7] =
    ["device", "threads", "tf32", "cuda_graphs", "memory.format", "backtrack.updates", "optimizer.max_skips"];

/// Refuses to go on with a configuration that would make another run of what is there.
pub fn check_resumable(saved: &Config, wanted: &Config) -> Result<()> {
    let changed = saved.differences(wanted)?;
    if saved.backtrack.updates != wanted.backtrack.updates && saved.backtrack.cooldown > 0.0 {
        return Err(Error::usage("backtrack.updates cannot change on --resume where the learning rates cool down")
            .hint(
                "they fall over the last backtrack.cooldown of the updates; runs with cooldown = 0 can be prolonged",
            ));
    }
    match changed.iter().find(|(key, ..)| {
        !CHANGEABLE.contains(&key.as_str()) && !["log.", "evaluate."].iter().any(|s| key.starts_with(s))
    }) {
        None => Ok(()),
        Some((key, before, now)) => {
            Err(Error::usage(format!("the run was started with {key} = {before}, now it is {now}"))
                .hint(format!("only {}, log.* and evaluate.* may change on --resume", CHANGEABLE.join(", "))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_with_anything_in_it_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        let config = Config { batch: 3, ..Config::default() };
        RunDir::create(&path, &config).unwrap();
        let e = RunDir::create(&path, &config).unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains("--resume"), "{e}");
        assert_eq!(RunDir::open(&path).unwrap().1, config);
        assert!(RunDir::open(dir.path()).unwrap_err().to_string().contains("no config.toml"));
        RunDir::create(&dir.path().join("empty"), &config).unwrap();
        std::fs::write(dir.path().join("file"), "x").unwrap();
        assert!(RunDir::create(&dir.path().join("file"), &config).is_err());
    }

    #[test]
    fn only_harmless_keys_change_on_resume() {
        let mut saved = Config::default();
        let longer = |c: &Config| {
            let mut longer = c.clone();
            longer.backtrack.updates += 1;
            longer
        };
        assert!(check_resumable(&saved, &longer(&saved)).unwrap_err().to_string().contains("cool down"));
        saved.backtrack.cooldown = 0.0;
        let mut wanted = saved.clone();
        wanted.backtrack.updates += 1;
        wanted.log.every = 3;
        check_resumable(&saved, &wanted).unwrap();
        wanted.degrade.lr = 0.5;
        let e = check_resumable(&saved, &wanted).unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains("degrade.lr = 0.0, now it is 0.5"), "{e}");
    }
}
