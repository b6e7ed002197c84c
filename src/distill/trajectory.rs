//! The degradation trajectory on disk: one safetensors file a node and `trajectory.json`, which holds its own hash. Node 0 is the teacher, bit for
//! bit; loads are strict and checked against the recorded hash. The other nodes are f32 weights, or their differences from the
//! teacher in bf16 (`memory.nodes`): half the size, and since a node differs little from the teacher, its rounding error is
//! 1/256 of the difference at most, where that of the weights themselves would hide the early nodes.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use tch::Kind;

use crate::distill::config::Precision;
use crate::distill::sealed;
use crate::error::{Context, Error, Result};
use crate::torch::ParamSet;
use crate::torch::dist::World;
use crate::torch::params::{TensorFile, save_tensors};

/// One recorded set of weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Place in the trajectory; 0 is the teacher.
    pub index: usize,
    /// File name inside the trajectory's folder.
    pub file: String,
    /// Stage-1 steps before it was recorded; 0 for the teacher.
    pub iteration: u64,
    /// Denoising loss on the initial student's samples (a fixed batch), weighted by lambda(sigma); none where no
    /// trajectory was recorded. (f32: its decimal form reads back exactly.)
    pub loss: Option<f32>,
    /// [`ParamSet::hash`] of the weights, as they are loaded.
    pub hash: String,
    /// Mean weighted square of the difference between the teacher's and the node's denoised samples, on the batch of `loss`; where the plan
    /// is made by measurement ([`crate::distill::plan`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gap: Option<f32>,
}

/// (No other keys: one whose name changed on the disk would pass for one that earlier versions do not have.)
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Index {
    teacher_hash: String,
    /// [`ParamSet::hash`] of the initial student, where it is not a copy of the teacher.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    student_hash: Option<String>,
    /// Of the nodes beside the teacher: f32 weights, or differences from the teacher in bf16.
    #[serde(default)]
    precision: Precision,
    /// Whether stage 1 has ended: nodes 0..N are final.
    complete: bool,
    /// Why the nodes are these, where the plan was made by measurement.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    plan: Option<String>,
    nodes: Vec<Node>,
    /// SHA-256 of this JSON text with nothing in this place; absent in trajectories of earlier versions.
    #[serde(default)]
    sha256: String,
}

impl Index {
    /// As JSON text that holds its own hash.
    fn to_text(&self) -> Result<String> {
        let blank = Self { sha256: String::new(), ..self.clone() };
        let text = serde_json::to_string_pretty(&blank).map_err(|e| Error::io(e.to_string()))?;
        Ok(sealed::seal(&text, "sha256"))
    }

    /// Errors: what is no trajectory's, or has changed since it was written.
    fn from_text(text: &[u8]) -> Result<Self> {
        let way_out = "put the file back from a copy of the run, or run stage 1 again in a new folder";
        let index: Self = serde_json::from_slice(text)
            .map_err(|e| Error::io(format!("not a trajectory index: {e}")).hint(way_out))?;
        match index.sha256.as_str() {
            "" => Ok(index),
            hash if sealed::is_whole(text, "sha256", hash) => Ok(index),
            _ => Err(Error::io("the file was changed after it was written").hint(way_out)),
        }
    }
}

/// Nodes 0 (the teacher) to N (fits the initial student).
#[derive(Debug, Clone)]
pub struct Trajectory {
    dir: PathBuf,
    index: Index,
    /// Another process of the run has the files.
    elsewhere: bool,
}

pub(crate) const INDEX: &str = "trajectory.json";

/// Whether a node's weights are in a file of this name: `node-001.safetensors`.
pub(crate) fn is_node_file(name: &str) -> bool {
    let digits = name.strip_prefix("node-").and_then(|n| n.strip_suffix(".safetensors"));
    digits.is_some_and(|d| d.len() >= 3 && d.bytes().all(|b| b.is_ascii_digit()))
}

impl Trajectory {
    /// Starts a trajectory with the teacher as node 0.
    /// `student_hash`: the initial student's, where it is not a copy of the teacher. `precision`: of the nodes to come.
    pub fn create(
        dir: &Path,
        teacher: &ParamSet,
        student_hash: Option<String>,
        loss: Option<f32>,
        precision: Precision,
    ) -> Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        let (teacher_hash, nodes, sha256) = (teacher.hash()?, Vec::new(), String::new());
        let index = Index { teacher_hash, student_hash, precision, complete: false, plan: None, nodes, sha256 };
        let mut trajectory = Self { dir: dir.to_owned(), index, elsewhere: false };
        trajectory.record(teacher, 0, loss)?;
        Ok(trajectory)
    }

    /// Opens a recorded trajectory of the teacher with this hash.
    pub fn open(dir: &Path, teacher_hash: &str) -> Result<Self> {
        let path = dir.join(INDEX);
        if !path.exists() {
            return Err(Error::usage(format!("{}: no trajectory (there is no {INDEX})", dir.display())).hint(
                "`disback degrade TEACHER -o DIR` records one; --trajectory takes that DIR, or its trajectory/",
            ));
        }
        let text = crate::files::read(&path, crate::files::JSON).with_context(|| path.display().to_string())?;
        let index = Index::from_text(&text).with_context(|| path.display().to_string())?;
        let bad = |what: String| Err(Error::mismatch(what).context(path.display().to_string()));
        if index.teacher_hash != teacher_hash {
            return Err(Error::usage(format!(
                "{}: recorded with another teacher (weights {}, this teacher's are {})",
                path.display(),
                short(&index.teacher_hash),
                short(teacher_hash)
            ))
            .hint("give the teacher that the run began with, or another output folder"));
        }
        match index.nodes.first() {
            Some(first) if first.hash == index.teacher_hash => {}
            _ => return bad("node 0 is not the teacher".into()),
        }
        for (k, node) in index.nodes.iter().enumerate() {
            if node.index != k {
                return bad(format!("node {k} is numbered {}", node.index));
            }
            if node.iteration > 1 << 40 {
                return bad(format!("node {k}: `iteration` is {}, which no run comes to", node.iteration));
            }
            // Of ours, and never a path that leaves the folder: files of dropped nodes are removed.
            if !is_node_file(&node.file) {
                return bad(format!("node {k}: `{}` is not the name of a node's file", node.file));
            }
            if !dir.join(&node.file).is_file() {
                return bad(format!("node {k}: {} is missing", node.file));
            }
        }
        Ok(Self { dir: dir.to_owned(), index, elsewhere: false })
    }

    /// The trajectory that rank 0 of `world` makes or finds. The others know its nodes and have no files.
    pub(crate) fn shared(world: &World, make: impl FnOnce() -> Result<Option<Self>>) -> Result<Option<Self>> {
        let mut mine = None;
        let index: Option<Index> = world.from_leader(|| {
            mine = make()?;
            Ok(mine.as_ref().map(|t| t.index.clone()))
        })?;
        Ok(if world.leads() { mine } else { index.map(|index| Self { dir: PathBuf::new(), index, elsewhere: true }) })
    }

    /// [`Trajectory::shared`] where there is one.
    pub(crate) fn shared_one(world: &World, make: impl FnOnce() -> Result<Self>) -> Result<Self> {
        Self::shared(world, || make().map(Some))?.ok_or_else(|| Error::mismatch("a run without a trajectory"))
    }

    /// Whether another process of the run has the files.
    pub(crate) fn is_elsewhere(&self) -> bool {
        self.elsewhere
    }

    /// [`Trajectory::load`] on rank 0, whose values every process gets.
    pub(crate) fn load_shared(&self, world: &World, index: usize, slot: &ParamSet) -> Result<()> {
        if !self.elsewhere {
            self.load(index, slot)?;
        }
        world.broadcast(slot.tensors())
    }

    /// Folder that the trajectory lies in.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
    /// All nodes in order, the teacher first.
    pub fn nodes(&self) -> &[Node] {
        &self.index.nodes
    }
    /// N: the number of nodes beside the teacher.
    pub fn last(&self) -> usize {
        self.index.nodes.len() - 1
    }
    /// Whether stage 1 has ended, so that the nodes are final.
    pub fn is_complete(&self) -> bool {
        self.index.complete
    }
    /// Why the nodes are these, where the plan was made by measurement.
    pub fn plan(&self) -> Option<&str> {
        self.index.plan.as_deref()
    }
    /// Sets [`Trajectory::plan`]; [`Trajectory::complete`] writes it.
    pub(crate) fn set_plan(&mut self, why: String) {
        self.index.plan = Some(why);
    }
    /// [`ParamSet::hash`] of the teacher's weights.
    pub fn teacher_hash(&self) -> &str {
        &self.index.teacher_hash
    }

    /// Refuses a trajectory that leads to another student than this one (none: the teacher's copy).
    pub fn check_student(&self, student_hash: Option<&str>) -> Result<()> {
        let ours = self.index.student_hash.as_deref();
        if ours == student_hash {
            return Ok(());
        }
        let name = |h: Option<&str>| h.map_or("the teacher's copy".into(), |h| format!("weights {}", short(h)));
        Err(Error::usage(format!(
            "{}: recorded on the samples of another initial student ({}, this one is {})",
            self.dir.join(INDEX).display(),
            name(ours),
            name(student_hash)
        ))
        .hint("give the student and seed that the run began with, or record a trajectory for this one"))
    }

    /// Writes the weights as the next node.
    pub fn record(&mut self, params: &ParamSet, iteration: u64, loss: Option<f32>) -> Result<usize> {
        let index = self.index.nodes.len();
        let file = format!("node-{index:03}.safetensors");
        let path = self.dir.join(&file);
        let hash = match self.teacher_file(index)? {
            _ if self.elsewhere => String::new(),
            None => {
                params.save(&path)?;
                params.hash()?
            }
            Some(teacher) => {
                let difference = |(name, t): (&str, &tch::Tensor)| {
                    let from = teacher.get(name)?;
                    let to = params.for_file(name, &t.detach())?.f_to_device(from.device())?;
                    Ok((name.to_owned(), to.f_sub(&from)?.f_to_kind(Kind::BFloat16)?))
                };
                let differences = params.iter().map(difference).collect::<Result<Vec<_>>>()?;
                let named: Vec<_> = differences.iter().map(|(name, t)| (name.clone(), t)).collect();
                save_tensors(&path, &named)?;
                params.visit(&teacher, Some(&TensorFile::open(&path)?), &mut |_, _| Ok(()))?
            }
        };
        self.index.nodes.push(Node { index, file, iteration, loss, hash, gap: None });
        self.save()?;
        Ok(index)
    }

    /// [`Trajectory::record`] with the node's [`Node::gap`] to the teacher.
    pub(crate) fn record_looked(&mut self, params: &ParamSet, seen: &Node) -> Result<usize> {
        let index = self.record(params, seen.iteration, seen.loss)?;
        self.index.nodes[index].gap = seen.gap;
        self.save()?;
        Ok(index)
    }

    /// The teacher's file, where node `index` is kept as its difference from it.
    fn teacher_file(&self, index: usize) -> Result<Option<TensorFile>> {
        if index == 0 || self.index.precision == Precision::F32 || self.elsewhere {
            return Ok(None);
        }
        TensorFile::open(&self.dir.join(&self.index.nodes[0].file)).map(Some)
    }

    /// Copies node `index` into `slot`. Every key and shape must fit and the weights must have the recorded hash. (Tensors of
    /// the slot may be bf16: they get the nearest values.)
    pub fn load(&self, index: usize, slot: &ParamSet) -> Result<()> {
        self.read(index, slot, &mut |k, value| {
            let slot = &slot.tensors()[k];
            tch::no_grad(|| slot.shallow_clone().f_copy_(value))?;
            Ok(())
        })
    }

    /// Reads node `index` in the order of a slot whose keys and shapes it must fit: `each` gets the place and the f32 value, on
    /// the CPU. Errors as in [`Trajectory::load`], that of the hash after the last value.
    pub(crate) fn read(
        &self,
        index: usize,
        slot: &ParamSet,
        each: &mut dyn FnMut(usize, &tch::Tensor) -> Result<()>,
    ) -> Result<()> {
        let node = self.index.nodes.get(index).ok_or_else(|| {
            Error::mismatch(format!("node {index} of a trajectory that ends with node {}", self.last()))
        })?;
        let path = self.dir.join(&node.file);
        let file = TensorFile::open(&path)?;
        let found = match self.teacher_file(index)? {
            None => slot.visit(&file, None, each)?,
            Some(teacher) => slot.visit(&teacher, Some(&file), each)?,
        };
        if found != node.hash {
            return Err(Error::mismatch(format!(
                "{}: weights {} are not the recorded {}",
                path.display(),
                short(&found),
                short(&node.hash)
            ))
            .hint("the file was changed after it was recorded; run stage 1 again in a new folder"));
        }
        Ok(())
    }

    /// Copies a complete trajectory into another folder.
    pub fn copy_to(&self, dir: &Path) -> Result<()> {
        if !self.index.complete {
            return Err(Error::usage(format!("{}: the trajectory is not complete", self.dir.display()))
                .hint("`disback degrade --resume` completes it"));
        }
        std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        for node in &self.index.nodes {
            let from = self.dir.join(&node.file);
            std::fs::copy(&from, dir.join(&node.file)).with_context(|| from.display().to_string())?;
        }
        Self { dir: dir.to_owned(), index: self.index.clone(), elsewhere: false }.save()
    }

    /// Forgets nodes recorded after `iteration` steps: a resumed stage 1 records them again.
    pub fn truncate(&mut self, iteration: u64) -> Result<()> {
        let keep = self.index.nodes.iter().take_while(|n| n.iteration <= iteration).count();
        self.keep(&(0..keep).collect::<Vec<_>>())
    }

    /// Keeps these nodes (rising, beginning with 0) and numbers them anew.
    fn keep(&mut self, which: &[usize]) -> Result<()> {
        debug_assert!(which.first() == Some(&0) && which.windows(2).all(|w| w[0] < w[1]));
        let mut dropped: Vec<PathBuf> = Vec::new();
        let mut nodes = Vec::new();
        for (old, node) in self.index.nodes.iter().enumerate() {
            if which.contains(&old) {
                nodes.push(Node { index: nodes.len(), ..node.clone() });
            } else {
                dropped.push(self.dir.join(&node.file));
            }
        }
        self.index.nodes = nodes;
        self.save()?;
        for path in dropped.iter().filter(|_| !self.elsewhere) {
            let _ = std::fs::remove_file(path);
        }
        Ok(())
    }

    /// Stage 1 has ended: these nodes (rising, beginning with 0) are the trajectory. Files get their final names.
    pub fn complete(&mut self, which: &[usize]) -> Result<()> {
        self.index.complete = true;
        self.keep(which)?;
        for k in 0..self.index.nodes.len() {
            let (from, to) = (self.index.nodes[k].file.clone(), format!("node-{k:03}.safetensors"));
            if from == to || self.elsewhere {
                self.index.nodes[k].file = to;
                continue;
            }
            // Numbers only fall and are saved one by one, so `to` is no node's file any more. A copy before the index,
            // the old name after it: a kill in between loses nothing.
            let (from, to_path) = (self.dir.join(from), self.dir.join(&to));
            let _ = std::fs::remove_file(&to_path);
            std::fs::hard_link(&from, &to_path)
                .or_else(|_| std::fs::copy(&from, &to_path).map(|_| ()))
                .with_context(|| to_path.display().to_string())?;
            self.index.nodes[k].file = to;
            self.save()?;
            let _ = std::fs::remove_file(from);
        }
        Ok(())
    }

    fn save(&self) -> Result<()> {
        if self.elsewhere {
            return Ok(());
        }
        crate::files::write_atomic(&self.dir.join(INDEX), self.index.to_text()?.as_bytes())
    }
}

/// The first digits of a hash, for people.
pub fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

/// Index of the node that is stage 2's target after `updates` generator updates, with a switch every `every` of them:
/// `N - min(1 + floor(updates / every), N)`, where N is `last`. It starts at N-1, ends at 0 (the teacher) and stays
/// there.
pub fn target_by_count(updates: u64, every: u64, last: usize) -> usize {
    last - (updates / every.max(1)).saturating_add(1).min(last as u64) as usize
}

#[cfg(test)]
#[path = "trajectory_tests.rs"]
mod tests;
