//! Checkpoints: one safetensors file with every tensor of a stage, and `latest.json` that points to it. The pointer is
//! renamed into place after the file is on disk, so whatever kills the process, a whole checkpoint is found.

use std::collections::HashMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::distill::trajectory::short;
use crate::error::{Context, Error, Result};
use crate::torch::ParamSet;
use crate::torch::params::{load_tensors, save_tensors};

/// The stage that a checkpoint belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StageKind {
    /// Stage 1: the teacher's copy is trained on the initial student's samples, and nodes are recorded.
    Degrade,
    /// Stage 2: the student is trained with the nodes as targets, from the last to the teacher.
    Backtrack,
}

impl StageKind {
    /// The stage's name in files and messages: `degrade` or `backtrack`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Degrade => "degrade",
            Self::Backtrack => "backtrack",
        }
    }
}

/// Numbers that go with the tensors. What decides the run's course is integer or f32: its decimal form reads back exactly.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// The stage that the checkpoint belongs to.
    pub stage: StageKind,
    /// Iterations of the stage that are done.
    pub iteration: u64,
    /// [`ParamSet::hash`] of the teacher's weights.
    pub teacher_hash: String,
    /// Seconds spent in the stage.
    pub seconds: f64,
    /// Index of the node that is stage 2's target; 0 is the teacher.
    pub target: usize,
    /// Generator update at which the present target was set.
    pub target_since: u64,
    /// Lowest score mismatch measured with the present target; absent before the first measurement.
    pub best_mismatch: Option<f32>,
    /// Measurements of the score mismatch since the lowest one (`switch = "mismatch"`).
    pub stale: u64,
    /// Lowest loss of stage 1 on the fixed batch of student samples; absent before it was measured.
    pub best_loss: Option<f32>,
    /// Iteration of stage 1 at which `best_loss` was reached.
    pub best_at: u64,
    /// Name of the file that holds the tensors.
    pub file: String,
}

impl State {
    /// The state of a stage at its beginning.
    pub fn new(stage: StageKind, teacher_hash: &str) -> Self {
        Self {
            stage,
            iteration: 0,
            teacher_hash: teacher_hash.into(),
            seconds: 0.0,
            target: 0,
            target_since: 0,
            best_mismatch: None,
            stale: 0,
            best_loss: None,
            best_at: 0,
            file: String::new(),
        }
    }
}

const LATEST: &str = "latest.json";

/// Whether a checkpoint's tensors are in a file of this name: `backtrack-00000100.safetensors`.
pub fn is_tensor_file(name: &str) -> bool {
    let stages = [StageKind::Degrade, StageKind::Backtrack].map(StageKind::name);
    let iteration = |stage: &str| name.strip_prefix(stage)?.strip_prefix('-')?.strip_suffix(".safetensors");
    stages
        .into_iter()
        .filter_map(iteration)
        .any(|digits| digits.len() >= 8 && digits.bytes().all(|b| b.is_ascii_digit()))
}

/// Saves a checkpoint and removes the ones before. Files with other names than a checkpoint's, links and folders stay.
pub fn save(dir: &Path, state: &State, tensors: &[(String, Tensor)]) -> Result<()> {
    let file = format!("{}-{:08}.safetensors", state.stage.name(), state.iteration);
    let borrowed: Vec<(String, &Tensor)> = tensors.iter().map(|(n, t)| (n.clone(), t)).collect();
    save_tensors(&dir.join(&file), &borrowed)?;
    let state = State { file: file.clone(), ..state.clone() };
    let text = serde_json::to_vec_pretty(&state).map_err(|e| Error::io(e.to_string()))?;
    crate::files::write_atomic(&dir.join(LATEST), &text)?;
    for entry in std::fs::read_dir(dir)?.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let plain = entry.file_type().is_ok_and(|kind| kind.is_file());
        if plain && is_tensor_file(&name) && name != file.as_str() {
            let _ = std::fs::remove_file(entry.path());
        }
    }
    Ok(())
}

/// A checkpoint read back: its state, and its tensors to be taken one by one.
#[derive(Debug)]
pub struct Checkpoint {
    /// The numbers that go with the tensors.
    pub state: State,
    tensors: HashMap<String, Tensor>,
}

impl Checkpoint {
    /// What the latest one says of itself, its tensors not read; `None` where there is none yet.
    pub fn latest_state(dir: &Path) -> Result<Option<State>> {
        let path = dir.join(LATEST);
        if !path.is_file() {
            return Ok(None);
        }
        let text = std::fs::read(&path).with_context(|| path.display().to_string())?;
        let state = serde_json::from_slice(&text).map_err(|e| Error::io(format!("not a checkpoint: {e}")));
        state.map(Some).with_context(|| path.display().to_string())
    }

    /// The latest one; `None` where there is none yet. A checkpoint of another teacher is refused.
    pub fn latest(dir: &Path, teacher_hash: &str) -> Result<Option<Self>> {
        let path = dir.join(LATEST);
        let Some(state) = Self::latest_state(dir)? else { return Ok(None) };
        if state.teacher_hash != teacher_hash {
            return Err(Error::usage(format!(
                "{}: the run began with another teacher (weights {}, this teacher's are {})",
                path.display(),
                short(&state.teacher_hash),
                short(teacher_hash)
            ))
            .hint("give the teacher that the run began with"));
        }
        if !is_tensor_file(&state.file) {
            return Err(Error::io(format!(
                "{}: `{}` is not the name of a checkpoint's file",
                path.display(),
                state.file
            )));
        }
        let tensors = load_tensors(&dir.join(&state.file))?.into_iter().collect();
        Ok(Some(Self { state, tensors }))
    }

    /// Takes a tensor out.
    pub fn take(&mut self, name: &str) -> Result<Tensor> {
        self.tensors.remove(name).ok_or_else(|| Error::mismatch(format!("the checkpoint has no tensor `{name}`")))
    }

    /// Takes a whole parameter set, saved under `prefix`, into `params`.
    pub fn take_params(&mut self, prefix: &str, params: &ParamSet) -> Result<()> {
        let tensors = params.names().iter().map(|n| self.take(&format!("{prefix}{n}"))).collect::<Result<_>>()?;
        params.copy_from(&ParamSet::new(params.names().to_vec(), tensors)?)
    }

    /// Everything must have been taken: a surplus means another network or another version.
    pub fn finish(self) -> Result<()> {
        match self.tensors.keys().min() {
            None => Ok(()),
            Some(name) => Err(Error::mismatch(format!("the checkpoint has a surplus tensor `{name}`"))),
        }
    }
}

/// The tensors of a parameter set under `prefix`.
pub fn named(prefix: &str, params: &ParamSet) -> Vec<(String, Tensor)> {
    params.iter().map(|(n, t)| (format!("{prefix}{n}"), t.shallow_clone())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(v: f32) -> ParamSet {
        ParamSet::new(vec!["a".into()], vec![Tensor::from_slice(&[v, 1.0 / v])]).unwrap()
    }

    #[test]
    fn comes_back_whole_and_strict() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Checkpoint::latest(dir.path(), "h").unwrap().is_none());
        // What others keep in the folder is not a checkpoint of ours, whatever it is called.
        let theirs = ["mymodel.safetensors", "backtrack-best.safetensors", "backtrack-001.safetensors", "notes.txt"];
        for name in theirs {
            std::fs::write(dir.path().join(name), "precious").unwrap();
        }
        for k in 1..4 {
            let state = State { iteration: k, ..State::new(StageKind::Backtrack, "h") };
            save(dir.path(), &state, &named("g/", &set(k as f32 * 3.0))).unwrap();
        }
        let left = std::fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(left, 2 + theirs.len(), "of the checkpoints only the latest is kept, and all else");
        assert!(theirs.iter().all(|name| std::fs::read(dir.path().join(name)).unwrap() == b"precious"));
        let mut c = Checkpoint::latest(dir.path(), "h").unwrap().unwrap();
        assert_eq!((c.state.iteration, c.state.stage), (3, StageKind::Backtrack));
        let into = set(1.0);
        assert!(c.take_params("ema/", &into).unwrap_err().to_string().contains("ema/a"));
        c.take_params("g/", &into).unwrap();
        assert_eq!(into.hash().unwrap(), set(9.0).hash().unwrap());
        c.finish().unwrap();
        assert!(Checkpoint::latest(dir.path(), "h").unwrap().unwrap().finish().is_err());
        let e = Checkpoint::latest(dir.path(), "other").unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains("another teacher"), "{e}");
    }
}
