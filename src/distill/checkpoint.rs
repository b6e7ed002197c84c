//! Checkpoints: one safetensors file with every tensor of a stage, and beside it a JSON file with the numbers that go with them
//! and the hashes of both. The JSON file is renamed into place after the tensors are on disk, so whatever kills the process, a whole
//! checkpoint is found. The last few are kept (`log.keep`): one that cannot be read falls back to the one before. `latest.json`
//! is the newest JSON file once more, for people and other programs.

use std::collections::HashMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::distill::metrics::Meter;
use crate::distill::sealed;
pub use crate::distill::stage_kind::StageKind;
use crate::distill::trajectory::short;
use crate::error::{Context, Error, Result};
use crate::torch::ParamSet;
use crate::torch::dist::{Named, Owners, World};
use crate::torch::params::{TensorFile, file_order, save_fetched};

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
    /// What the next row of metrics has of the iterations since the row before.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub meters: Vec<Meter>,
    /// Name of the file that holds the tensors.
    pub file: String,
    /// SHA-256 of that file; empty in checkpoints of earlier versions.
    #[serde(default)]
    pub sha256: String,
    /// SHA-256 of this JSON text with nothing in this place; empty in checkpoints of earlier versions.
    #[serde(default)]
    pub hash: String,
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
            meters: Vec::new(),
            file: String::new(),
            sha256: String::new(),
            hash: String::new(),
        }
    }

    /// As JSON text that holds its own hash.
    fn to_text(&self) -> Result<String> {
        let blank = Self { hash: String::new(), ..self.clone() };
        let text = serde_json::to_string_pretty(&blank).map_err(|e| Error::io(e.to_string()))?;
        Ok(sealed::seal(&text, "hash"))
    }

    /// Errors: what is no checkpoint's, or has changed since it was written.
    fn from_text(text: &[u8]) -> Result<Self> {
        let state: Self = serde_json::from_slice(text).map_err(|e| Error::io(format!("not a checkpoint: {e}")))?;
        let whole = match state.hash.as_str() {
            // (What names the tensors' hash has its own.)
            "" => state.sha256.is_empty(),
            hash => sealed::is_whole(text, "hash", hash),
        };
        match whole {
            true if is_tensor_file(&state.file) => state.in_range().map(|()| state),
            true => Err(Error::io(format!("`{}` is not the name of a checkpoint's file", state.file))),
            false => Err(Error::io("the file was changed after it was written")),
        }
    }

    /// Errors: a number that no run comes to.
    fn in_range(&self) -> Result<()> {
        // (Steps of a microsecond for twelve days; a trajectory has some ten nodes.)
        const STEPS: u64 = 1 << 40;
        const NODES: u64 = 1 << 16;
        let before = self.iteration.min(STEPS);
        let numbers = [
            ("iteration", self.iteration, STEPS),
            ("target", self.target as u64, NODES),
            ("target_since", self.target_since, before),
            ("stale", self.stale, before),
            ("best_at", self.best_at, before),
        ];
        if let Some((name, value, most)) = numbers.into_iter().find(|(_, value, most)| value > most) {
            return Err(Error::io(format!("`{name}` is {value}, a checkpoint of this iteration has at most {most}")));
        }
        match self.seconds >= 0.0 && self.seconds.is_finite() {
            true => Ok(()),
            false => Err(Error::io(format!("`seconds` is {}, expected 0 or more", self.seconds))),
        }
    }

    fn place(&self) -> (StageKind, u64) {
        (self.stage, self.iteration)
    }
}

const LATEST: &str = "latest.json";

/// Stage and iteration in the name of a checkpoint's file: `backtrack-00000100.safetensors`.
fn place_of(name: &str, suffix: &str) -> Option<(StageKind, u64)> {
    [StageKind::Degrade, StageKind::Backtrack].into_iter().find_map(|stage| {
        let digits = name.strip_prefix(stage.name())?.strip_prefix('-')?.strip_suffix(suffix)?;
        let plain = digits.len() >= 8 && digits.bytes().all(|b| b.is_ascii_digit());
        Some((stage, digits.parse().ok().filter(|_| plain)?))
    })
}

const TENSORS: &str = ".safetensors";
const NUMBERS: &str = ".json";

/// Whether a checkpoint's tensors are in a file of this name: `backtrack-00000100.safetensors`.
pub fn is_tensor_file(name: &str) -> bool {
    place_of(name, TENSORS).is_some()
}

/// Whether a file of this name is a checkpoint's: its tensors, or `backtrack-00000100.json`.
pub(crate) fn is_own_file(name: &str) -> bool {
    is_tensor_file(name) || place_of(name, NUMBERS).is_some()
}

/// Saves a checkpoint and removes all but the last `keep`. Files with other names than a checkpoint's, links and folders stay. Rank 0 of
/// `world` writes; where tensors have owners, every process calls this and sends it what it keeps.
pub fn save(dir: &Path, state: &State, tensors: &[Named], keep: usize, world: &World) -> Result<()> {
    if !world.leads() {
        return send(tensors, world);
    }
    let stem = format!("{}-{:08}", state.stage.name(), state.iteration);
    let file = format!("{stem}{TENSORS}");
    let sha256 = write(&dir.join(&file), tensors, world)?;
    let text = State { file, sha256, ..state.clone() }.to_text()?;
    crate::files::write_atomic(&dir.join(format!("{stem}{NUMBERS}")), text.as_bytes())?;
    crate::files::write_atomic(&dir.join(LATEST), text.as_bytes())?;
    prune(dir, state.place(), keep)
}

/// The order in which rank 0 writes these tensors, and so asks the others for them.
fn order(tensors: &[Named]) -> Vec<usize> {
    file_order(&tensors.iter().map(|t| t.name.as_str()).collect::<Vec<_>>())
}

/// Sends rank 0 what this process keeps of them, in the order in which it writes.
fn send(tensors: &[Named], world: &World) -> Result<()> {
    for t in order(tensors).into_iter().map(|k| &tensors[k]) {
        if let Some(owner) = t.owner {
            world.to_leader(owner, &t.tensor)?;
        }
    }
    Ok(())
}

/// Writes the tensors, one at a time in memory where another process keeps them.
fn write(path: &Path, tensors: &[Named], world: &World) -> Result<String> {
    let fetch = |k: usize| -> Result<Tensor> {
        let t = &tensors[k];
        let theirs = t.owner.map(|owner| world.to_leader(owner, &t.tensor)).transpose()?;
        Ok(theirs.flatten().unwrap_or_else(|| t.tensor.shallow_clone()))
    };
    let named: Vec<(String, &Tensor)> = tensors.iter().map(|t| (t.name.clone(), &t.tensor)).collect();
    let mut fetched = 0;
    let written = save_fetched(path, &named, &mut |k| {
        fetched += 1;
        fetch(k)
    });
    if written.is_err() && !world.is_broken() {
        // The others send all they keep, whatever becomes of the file.
        order(tensors)[fetched..]
            .iter()
            .filter(|k| tensors[**k].owner.is_some())
            .try_for_each(|&k| fetch(k).map(drop))?;
    }
    written
}

/// Whether the checkpoint of this state has been written.
pub(crate) fn is_there(dir: &Path, state: &State) -> bool {
    let found = states(dir).map(|(states, _)| states.iter().any(|s| s.place() == state.place()));
    found.unwrap_or(false)
}

/// Removes all checkpoints but the one just written at `last` and the newest of those before it. (Later ones are of a course that was
/// given up: one that could not be read, before which the run went on.)
fn prune(dir: &Path, last: (StageKind, u64), keep: usize) -> Result<()> {
    let own = |entry: &std::fs::DirEntry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        let plain = entry.file_type().is_ok_and(|kind| kind.is_file());
        place_of(&name, TENSORS).or_else(|| place_of(&name, NUMBERS)).filter(|_| plain)
    };
    let all: Vec<_> = std::fs::read_dir(dir)?.flatten().filter_map(|e| Some((own(&e)?, e.path()))).collect();
    let mut places: Vec<_> = all.iter().map(|(place, _)| *place).filter(|place| *place <= last).collect();
    places.sort_unstable();
    places.dedup();
    let kept = &places[places.len().saturating_sub(keep.max(1))..];
    for (_, path) in all.iter().filter(|(place, _)| !kept.contains(place)) {
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

/// A checkpoint read back: its state, and its tensors to be taken one by one.
#[derive(Debug)]
pub struct Checkpoint {
    /// The numbers that go with the tensors.
    pub state: State,
    /// Newer ones that could not be read, a sentence each.
    pub passed_over: Vec<String>,
    /// Sizes of the tensors that have not been taken.
    left: HashMap<String, Vec<i64>>,
    /// What they are read from; on other processes than rank 0 of `world` there is nothing.
    file: Option<TensorFile>,
    /// Those that take the same tensors in the same order.
    world: World,
}

impl Checkpoint {
    /// What the newest one that is whole says of itself, its tensors not read; `None` where there is none yet.
    pub fn latest_state(dir: &Path) -> Result<Option<State>> {
        let (states, mut problems) = states(dir)?;
        match (states.into_iter().next(), problems.pop()) {
            (Some(state), _) => Ok(Some(state)),
            (None, Some((_, problem))) => Err(problem),
            (None, None) => Ok(None),
        }
    }

    /// The newest one that can be read; `None` where there is none yet. A checkpoint of another teacher is refused.
    ///
    /// Errors: there are some, and none of them can be read.
    pub fn latest(dir: &Path, teacher_hash: &str) -> Result<Option<Self>> {
        let (states, mut problems) = states(dir)?;
        for state in states {
            if state.teacher_hash != teacher_hash {
                return Err(Error::usage(format!(
                    "{}: the run began with another teacher (weights {}, this teacher's are {})",
                    dir.join(LATEST).display(),
                    short(&state.teacher_hash),
                    short(teacher_hash)
                ))
                .hint("give the teacher that the run began with"));
            }
            match tensors(dir, &state) {
                Ok((file, left)) => {
                    // What was found unreadable before this one's place in time is what is passed over.
                    problems.retain(|(place, _)| *place > Some(state.place()));
                    let passed_over = problems.iter().map(|(_, e)| e.to_string()).collect();
                    return Ok(Some(Self { state, passed_over, left, file: Some(file), world: World::alone() }));
                }
                Err(e) => problems.push((Some(state.place()), e)),
            }
        }
        match problems.into_iter().max_by_key(|(place, _)| *place) {
            None => Ok(None),
            Some((_, e)) => Err(e.also(
                "no checkpoint of this run can be read; `disback backtrack --trajectory` takes stage 1 of it into a new run",
            )),
        }
    }

    /// What `read` gives on rank 0 of `world`, on every process: all take the same tensors in the same order.
    pub(crate) fn shared(world: &World, read: impl FnOnce() -> Result<Option<Self>>) -> Result<Option<Self>> {
        if world.is_alone() {
            return read();
        }
        let mut mine = None;
        type Head = (State, HashMap<String, Vec<i64>>);
        let head: Option<Head> = world.from_leader(|| {
            mine = read()?;
            let Some(Self { state, left, file: Some(file), .. }) = &mine else { return Ok(None) };
            for name in left.keys() {
                let kind = file.kind(name)?;
                if kind != Kind::Float {
                    return Err(Error::mismatch(format!("the checkpoint's tensor `{name}` is {kind:?}, expected f32")));
                }
            }
            Ok(Some((state.clone(), left.clone())))
        })?;
        let Some((state, left)) = head else { return Ok(None) };
        let (file, passed_over) = mine.map_or((None, Vec::new()), |found| (found.file, found.passed_over));
        Ok(Some(Self { state, passed_over, left, file, world: world.clone() }))
    }

    /// Takes a tensor out.
    pub fn take(&mut self, name: &str) -> Result<Tensor> {
        let size = self.left.remove(name);
        let size = size.ok_or_else(|| Error::mismatch(format!("the checkpoint has no tensor `{name}`")))?;
        let tensor = match &self.file {
            Some(file) => file.get(name)?,
            None => Tensor::f_empty(&size[..], (Kind::Float, Device::Cpu))?,
        };
        self.world.broadcast(std::slice::from_ref(&tensor))?;
        Ok(tensor)
    }

    /// Takes a whole parameter set, saved under `prefix`, into `params`; where they have `owners`, what this process keeps of them.
    pub fn take_params(&mut self, prefix: &str, params: &ParamSet, owners: Option<&Owners>) -> Result<()> {
        for (k, (name, mine)) in params.iter().enumerate() {
            let theirs = self.take(&format!("{prefix}{name}"))?;
            if theirs.size() != mine.size() {
                return Err(Error::mismatch(format!(
                    "the checkpoint's tensor `{prefix}{name}` has shape {:?}, expected {:?}",
                    theirs.size(),
                    mine.size()
                )));
            }
            if owners.is_none_or(|o| o.is_mine(k)) {
                tch::no_grad(|| mine.shallow_clone().f_copy_(&theirs))?;
            }
        }
        Ok(())
    }

    /// Everything must have been taken: a surplus means another network or another version.
    pub fn finish(self) -> Result<()> {
        match self.left.keys().min() {
            None => Ok(()),
            Some(name) => Err(Error::mismatch(format!("the checkpoint has a surplus tensor `{name}`"))),
        }
    }
}

/// Where a problem lies in the course of a run, where that is known, and the problem.
type Problem = (Option<(StageKind, u64)>, Error);

/// All checkpoints that say what they are, the newest first, and what is wrong with the others.
fn states(dir: &Path) -> Result<(Vec<State>, Vec<Problem>)> {
    let mut names: Vec<String> = match std::fs::read_dir(dir) {
        Ok(entries) => entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Default::default()),
        Err(e) => return Err(Error::from(e).context(dir.display().to_string())),
    };
    names.retain(|name| place_of(name, NUMBERS).is_some());
    // A run of an earlier version has this one alone; otherwise it repeats what stands beside the tensors.
    if names.is_empty() && dir.join(LATEST).is_file() {
        names.push(LATEST.into());
    }
    let (mut found, mut problems) = (Vec::new(), Vec::new());
    for name in names {
        let path = dir.join(&name);
        let read =
            crate::files::read(&path, crate::files::JSON).map_err(Error::from).and_then(|text| State::from_text(&text));
        match read.with_context(|| path.display().to_string()) {
            Ok(state) => found.push(state),
            Err(e) => problems.push((place_of(&name, NUMBERS), e)),
        }
    }
    found.sort_by_key(|state| std::cmp::Reverse(state.place()));
    Ok((found, problems))
}

/// The file of a checkpoint's tensors, as it was written, and their sizes.
fn tensors(dir: &Path, state: &State) -> Result<(TensorFile, HashMap<String, Vec<i64>>)> {
    let file = TensorFile::open(&dir.join(&state.file))?;
    if !state.sha256.is_empty() && file.sha256() != state.sha256 {
        return Err(Error::io(format!("{}: the file was changed after it was written", file.path().display())));
    }
    let sizes = file.names().into_iter().map(|name| file.shape(&name).map(|shape| (name, shape)));
    let sizes = sizes.collect::<Result<_>>()?;
    Ok((file, sizes))
}

/// The tensors of a parameter set under `prefix`.
pub fn named(prefix: &str, params: &ParamSet, owners: Option<&Owners>) -> Vec<Named> {
    params.iter().enumerate().map(|(k, (n, t))| Named::owned(format!("{prefix}{n}"), t, owners, k)).collect()
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
        for k in 1..5 {
            let state = State { iteration: k, ..State::new(StageKind::Backtrack, "h") };
            save(dir.path(), &state, &named("g/", &set(k as f32 * 3.0 - 3.0), None), 2, &World::alone()).unwrap();
        }
        let left = std::fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(left, 5 + theirs.len(), "of the checkpoints the last two are kept, and all else");
        assert!(theirs.iter().all(|name| std::fs::read(dir.path().join(name)).unwrap() == b"precious"));
        let mut c = Checkpoint::latest(dir.path(), "h").unwrap().unwrap();
        assert_eq!((c.state.iteration, c.state.stage), (4, StageKind::Backtrack));
        assert!(c.passed_over.is_empty());
        let into = set(1.0);
        assert!(c.take_params("ema/", &into, None).unwrap_err().to_string().contains("ema/a"));
        c.take_params("g/", &into, None).unwrap();
        assert_eq!(into.hash().unwrap(), set(9.0).hash().unwrap());
        c.finish().unwrap();
        assert!(Checkpoint::latest(dir.path(), "h").unwrap().unwrap().finish().is_err());
        let e = Checkpoint::latest(dir.path(), "other").unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains("another teacher"), "{e}");
    }
    #[test]
    fn numbers_that_no_run_comes_to_are_refused() {
        let whole = State { iteration: 9, ..State::new(StageKind::Backtrack, "h") };
        let file = "backtrack-00000009.safetensors".to_owned();
        let whole = serde_json::to_value(State { file, ..whole }).unwrap();
        assert!(State::from_text(whole.to_string().as_bytes()).is_ok());
        for (key, value) in [
            ("iteration", serde_json::json!(1u64 << 63)),
            ("iteration", u64::MAX.into()),
            ("target", (1u64 << 63).into()),
            ("target_since", 10.into()),
            ("best_at", u64::MAX.into()),
            ("stale", u64::MAX.into()),
            ("seconds", (-1e300).into()),
        ] {
            let mut changed = whole.clone();
            changed[key] = value;
            let e = State::from_text(changed.to_string().as_bytes()).unwrap_err().to_string();
            assert!(e.contains(&format!("`{key}` is")), "{e}");
        }
    }

    /// Any byte of any file of the newest checkpoint: found, said, and the one before is taken.
    #[test]
    fn what_was_changed_on_disk_falls_back_to_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let write = |k: u64| {
            let state = State { iteration: k, best_loss: Some(0.1), ..State::new(StageKind::Degrade, "h") };
            save(dir, &state, &named("g/", &set(k as f32), None), 2, &World::alone()).unwrap();
        };
        let latest = || Checkpoint::latest(dir, "h");
        (1..3).for_each(write);
        for name in ["degrade-00000002.safetensors", "degrade-00000002.json"] {
            let path = dir.join(name);
            let whole = std::fs::read(&path).unwrap();
            for at in 0..whole.len() {
                let mut bytes = whole.clone();
                bytes[at] ^= 0x10;
                std::fs::write(&path, &bytes).unwrap();
                let found = latest().unwrap().unwrap();
                assert_eq!(found.state.iteration, 1, "{name}, byte {at}");
                assert!(found.passed_over.len() == 1 && found.passed_over[0].contains("00000002"), "{found:?}");
            }
            std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
            assert_eq!(latest().unwrap().unwrap().state.iteration, 1);
            assert!(Checkpoint::latest_state(dir).unwrap().is_some());
            std::fs::write(&path, &whole).unwrap();
        }
        // The pointer is for people: what becomes of it loses nothing.
        std::fs::write(dir.join(LATEST), "").unwrap();
        let found = latest().unwrap().unwrap();
        assert!(found.state.iteration == 2 && found.passed_over.is_empty());
        // Gone on from the first, what comes later on the disk is of a course given up.
        std::fs::remove_file(dir.join("degrade-00000002.safetensors")).unwrap();
        assert_eq!(latest().unwrap().unwrap().state.iteration, 1);
        save(
            dir,
            &State { iteration: 1, ..State::new(StageKind::Degrade, "h") },
            &named("g/", &set(1.0), None),
            2,
            &World::alone(),
        )
        .unwrap();
        assert!(!dir.join("degrade-00000002.json").exists());
        // None left.
        std::fs::write(dir.join("degrade-00000001.safetensors"), "x").unwrap();
        let e = latest().unwrap_err().to_string();
        assert!(e.contains("degrade-00000001.safetensors") && e.contains("no checkpoint of this run"), "{e}");
    }

    /// One file that points to one other, without hashes.
    #[test]
    fn checkpoints_of_earlier_versions_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        save(
            dir,
            &State { iteration: 7, ..State::new(StageKind::Degrade, "h") },
            &named("g/", &set(2.0), None),
            2,
            &World::alone(),
        )
        .unwrap();
        let mut old: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.join(LATEST)).unwrap()).unwrap();
        let fields = old.as_object_mut().unwrap();
        ["sha256", "hash"].iter().for_each(|key| drop(fields.remove(*key)));
        std::fs::write(dir.join(LATEST), old.to_string()).unwrap();
        std::fs::remove_file(dir.join("degrade-00000007.json")).unwrap();
        let into = set(1.0);
        let mut found = Checkpoint::latest(dir, "h").unwrap().unwrap();
        found.take_params("g/", &into, None).unwrap();
        assert_eq!((found.state.iteration, into.hash().unwrap()), (7, set(2.0).hash().unwrap()));
    }
}
