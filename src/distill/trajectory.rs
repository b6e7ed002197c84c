//! The degradation trajectory on disk: one safetensors file a node and `trajectory.json`. Node 0 is the teacher, bit for
//! bit; loads are strict and checked against the recorded hash. The other nodes are f32 weights, or their differences from the
//! teacher in bf16 (`memory.nodes`): half the size, and since a node differs little from the teacher, its rounding error is
//! 1/256 of the difference at most, where that of the weights themselves would hide the early nodes.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use tch::Kind;

use crate::distill::config::Precision;
use crate::error::{Context, Error, Result};
use crate::torch::ParamSet;
use crate::torch::dist::World;
use crate::torch::params::{TensorFile, save_tensors};

/// One recorded set of weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
    nodes: Vec<Node>,
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
        let index =
            Index { teacher_hash: teacher.hash()?, student_hash, precision, complete: false, nodes: Vec::new() };
        let mut trajectory = Self { dir: dir.to_owned(), index, elsewhere: false };
        trajectory.record(teacher, 0, loss)?;
        Ok(trajectory)
    }

    /// Opens a recorded trajectory of the teacher with this hash.
    pub fn open(dir: &Path, teacher_hash: &str) -> Result<Self> {
        let path = dir.join(INDEX);
        let text = crate::files::read(&path, crate::files::JSON).with_context(|| path.display().to_string())?;
        let index: Index = serde_json::from_slice(&text)
            .map_err(|e| Error::io(format!("not a trajectory index: {e}")))
            .with_context(|| path.display().to_string())?;
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
        self.index.nodes.push(Node { index, file, iteration, loss, hash });
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
        let text = serde_json::to_vec_pretty(&self.index).map_err(|e| Error::io(e.to_string()))?;
        crate::files::write_atomic(&self.dir.join(INDEX), &text)
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
mod tests {
    use super::*;
    use tch::Tensor;

    fn set(v: f32) -> ParamSet {
        ParamSet::new(vec!["a".into(), "b".into()], vec![Tensor::from(v), Tensor::from_slice(&[v, -v])]).unwrap()
    }

    fn recorded(dir: &Path) -> Trajectory {
        let mut t = Trajectory::create(dir, &set(1.0), None, Some(9.0), Precision::F32).unwrap();
        t.record(&set(2.0), 10, Some(4.0)).unwrap();
        t.record(&set(3.0), 20, Some(1.0)).unwrap();
        t.complete(&[0, 1, 2]).unwrap();
        t
    }

    #[test]
    fn targets_go_back_one_by_one_and_stay_with_the_teacher() {
        let path: Vec<usize> = (0..12).map(|j| target_by_count(j, 2, 4)).collect();
        assert_eq!(path, [3, 3, 2, 2, 1, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(target_by_count(u64::MAX, 1, 7), 0, "the index does not run past the end");
        assert!((0..50).all(|j| target_by_count(j, 3, 0) == 0), "no trajectory: the teacher from the start");
    }

    #[test]
    fn node_zero_is_the_teacher_and_nodes_do_not_alias_the_live_weights() {
        let dir = tempfile::tempdir().unwrap();
        let live = set(1.0);
        let mut t = Trajectory::create(dir.path(), &live, None, None, Precision::F32).unwrap();
        let _ = tch::no_grad(|| live.tensors()[0].shallow_clone().fill_(5.0));
        t.record(&live, 3, None).unwrap();
        let _ = tch::no_grad(|| live.tensors()[0].shallow_clone().fill_(7.0));
        let slot = set(0.0);
        t.load(0, &slot).unwrap();
        assert_eq!(slot.hash().unwrap(), set(1.0).hash().unwrap());
        assert_eq!(slot.hash().unwrap(), t.teacher_hash());
        t.load(1, &slot).unwrap();
        assert_eq!(slot.tensors()[0].double_value(&[]), 5.0);
        assert!(t.load(2, &slot).unwrap_err().to_string().contains("ends with node 1"));
    }

    #[test]
    fn opening_checks_teacher_numbers_and_files() {
        let dir = tempfile::tempdir().unwrap();
        let t = recorded(dir.path());
        let again = Trajectory::open(dir.path(), t.teacher_hash()).unwrap();
        assert_eq!(again.nodes(), t.nodes());
        assert!(again.is_complete() && again.last() == 2);
        let e = Trajectory::open(dir.path(), &set(8.0).hash().unwrap()).unwrap_err();
        assert!(e.to_string().contains("another teacher") && e.exit_code() == 2, "{e}");

        let index = dir.path().join(INDEX);
        let text = std::fs::read_to_string(&index).unwrap();
        for (from, to, says) in [
            ("\"index\": 1", "\"index\": 4", "numbered 4"),
            ("node-002.safetensors", "../node-002.safetensors", "not the name of a node's file"),
            ("node-002.safetensors", "node-009.safetensors", "missing"),
            ("\"nodes\"", "\"knots\"", "not a trajectory index"),
        ] {
            std::fs::write(&index, text.replacen(from, to, 1)).unwrap();
            let e = Trajectory::open(dir.path(), t.teacher_hash()).unwrap_err();
            assert!(e.to_string().contains(says), "{e}");
        }
        // The teacher missing from the path.
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let mut cut = json.clone();
        cut["nodes"].as_array_mut().unwrap().remove(0);
        std::fs::write(&index, cut.to_string()).unwrap();
        assert!(
            Trajectory::open(dir.path(), t.teacher_hash())
                .unwrap_err()
                .to_string()
                .contains("node 0 is not the teacher")
        );
    }

    #[test]
    fn a_node_with_other_keys_or_other_weights_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let t = recorded(dir.path());
        let slot = set(0.0);
        let replace = |names: &[&str]| {
            let tensors = names.iter().map(|_| Tensor::from(1f32)).collect();
            ParamSet::new(names.iter().map(|n| (*n).to_owned()).collect(), tensors)
                .unwrap()
                .save(&dir.path().join("node-001.safetensors"))
                .unwrap();
        };
        replace(&["a"]);
        assert!(t.load(1, &slot).unwrap_err().to_string().contains("missing `b`"));
        replace(&["a", "b", "c"]);
        assert!(t.load(1, &slot).unwrap_err().to_string().contains("surplus `c`"));
        replace(&["module.a", "module.b"]);
        assert!(t.load(1, &slot).is_err());
        set(2.5).save(&dir.path().join("node-001.safetensors")).unwrap();
        assert!(t.load(1, &slot).unwrap_err().to_string().contains("not the recorded"));
        let bytes = std::fs::read(dir.path().join("node-002.safetensors")).unwrap();
        std::fs::write(dir.path().join("node-002.safetensors"), &bytes[..bytes.len() - 3]).unwrap();
        assert!(t.load(2, &slot).unwrap_err().to_string().contains("not a safetensors file"));
    }

    #[test]
    fn truncating_and_choosing_renumber_and_leave_no_stray_files() {
        let dir = tempfile::tempdir().unwrap();
        let mut t = Trajectory::create(dir.path(), &set(1.0), None, None, Precision::F32).unwrap();
        for k in 1..6 {
            t.record(&set(1.0 + k as f32), 10 * k, None).unwrap();
        }
        t.truncate(44).unwrap();
        assert_eq!(t.last(), 4);
        t.complete(&[0, 2, 4]).unwrap();
        let t = Trajectory::open(dir.path(), t.teacher_hash()).unwrap();
        let mut files: Vec<_> =
            std::fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
        files.sort();
        assert_eq!(files, ["node-000.safetensors", "node-001.safetensors", "node-002.safetensors", "trajectory.json"]);
        let slot = set(0.0);
        for (k, v) in [(0, 1.0), (1, 3.0), (2, 5.0)] {
            t.load(k, &slot).unwrap();
            assert_eq!(slot.tensors()[0].double_value(&[]), v);
        }
        assert_eq!(t.nodes().iter().map(|n| n.iteration).collect::<Vec<_>>(), [0, 20, 40]);
    }

    /// A teacher of some size, and a node that has moved away from it by about `step` of each weight.
    fn wide(step: f64) -> (ParamSet, ParamSet) {
        let draw = |seed| crate::torch::shim::randn(seed, &[40, 50], tch::Device::Cpu).unwrap();
        let teacher = draw(1) * 0.05;
        let node = &teacher + draw(2) * &teacher * step;
        let [teacher, node] = [teacher, node].map(|t| ParamSet::new(vec!["w".into()], vec![t]).unwrap());
        (teacher, node)
    }

    #[test]
    fn nodes_in_bf16_keep_their_difference_from_the_teacher() {
        // A node early on the path: bf16 weights could not tell it from the teacher.
        let (teacher, node) = wide(1e-3);
        let dir = tempfile::tempdir().unwrap();
        let mut t = Trajectory::create(dir.path(), &teacher, None, None, Precision::Bf16).unwrap();
        t.record(&node, 3, Some(1.0)).unwrap();
        t.record(&wide(0.5).1, 9, None).unwrap();
        t.complete(&[0, 1, 2]).unwrap();
        let bytes = |k: usize| std::fs::metadata(dir.path().join(format!("node-{k:03}.safetensors"))).unwrap().len();
        assert!((bytes(0) - bytes(1)).abs_diff(2 * 2000) < 16, "half the size: {} and {}", bytes(0), bytes(1));
        let t = Trajectory::open(dir.path(), t.teacher_hash()).unwrap();
        let slot = teacher.deep_copy(tch::Device::Cpu).unwrap();
        let largest = |t: &tch::Tensor| t.abs().max().double_value(&[]);
        for (k, exact) in [(1, &node), (2, &wide(0.5).1)] {
            t.load(k, &slot).unwrap();
            let (got, base, exact) = (&slot.tensors()[0], &teacher.tensors()[0], &exact.tensors()[0]);
            let moved = exact - base;
            let error = (got - exact).abs();
            // Half a unit in the last of bf16's eight places, and f32's own rounding of the sum.
            let bound = moved.abs() / 256.0 + exact.abs() * 1.2e-7;
            assert!(bool::try_from(error.le_tensor(&(bound * 1.01)).all()).unwrap(), "node {k}");
            let direct = exact.to_kind(Kind::BFloat16).to_kind(Kind::Float) - exact;
            println!(
                "node {k}: error {:.1e}, of bf16 weights {:.1e}, moved {:.1e}",
                largest(&error),
                largest(&direct),
                largest(&moved)
            );
            assert!(k == 2 || largest(&error) < 0.02 * largest(&direct));
        }
        t.load(0, &slot).unwrap();
        assert_eq!(slot.hash().unwrap(), teacher.hash().unwrap(), "the teacher, bit for bit");
        // A slot whose weights are bf16 gets the nearest.
        let narrow = ParamSet::new(vec!["w".into()], vec![teacher.tensors()[0].to_kind(Kind::BFloat16)]).unwrap();
        t.load(2, &slot).unwrap();
        t.load(2, &narrow).unwrap();
        assert_eq!(narrow.tensors()[0], slot.tensors()[0].to_kind(Kind::BFloat16));

        let other = dir.path().join("copied");
        t.copy_to(&other).unwrap();
        Trajectory::open(&other, t.teacher_hash()).unwrap().load(1, &slot).unwrap();
        std::fs::copy(dir.path().join("node-001.safetensors"), dir.path().join("node-002.safetensors")).unwrap();
        assert!(t.load(2, &slot).unwrap_err().to_string().contains("not the recorded"));
    }
}
