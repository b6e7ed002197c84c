//! The next node of the trajectory, read and checked by a thread while the present one is the target. It lies in pinned memory
//! until its turn, and is then copied into the slot without waiting for the device.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use tch::{Device, Tensor};

use crate::distill::trajectory::Trajectory;
use crate::error::{Error, Result};
use crate::torch::ParamSet;
use crate::torch::device::send;
use crate::torch::dist::World;
use crate::torch::shim::pin;

/// Hands the nodes to one slot, from the last to the first.
#[derive(Debug)]
pub struct Nodes<'a> {
    trajectory: &'a Trajectory,
    /// Whether the node before the present one is read ahead.
    ahead: bool,
    next: Option<Reading>,
    world: World,
}

impl<'a> Nodes<'a> {
    /// Reads ahead where the slot is on another device: on the CPU the memory and the time of a second node would be taken
    /// from the training itself.
    /// Rank 0 of `world` reads, the others get what it has read.
    pub fn new(trajectory: &'a Trajectory, device: Device, world: &World) -> Self {
        let ahead = device != Device::Cpu && world.leads();
        Self { trajectory, ahead, next: None, world: world.clone() }
    }

    /// Copies node `index` into `slot` as [`Trajectory::load`] does.
    pub fn load(&mut self, index: usize, slot: &ParamSet) -> Result<()> {
        match self.next.take().filter(|next| next.index == index) {
            Some(next) => next.finish(slot)?,
            None if self.world.leads() => self.trajectory.load(index, slot)?,
            None => {}
        }
        self.world.broadcast(slot.tensors())?;
        if self.ahead && index > 0 {
            self.next = Some(Reading::start(self.trajectory.clone(), index - 1, slot.alias())?);
        }
        Ok(())
    }
}

/// A node on its way.
#[derive(Debug)]
struct Reading {
    index: usize,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Vec<Tensor>>>>,
}

impl Reading {
    fn start(trajectory: Trajectory, index: usize, slot: ParamSet) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let read = move || {
            let mut values = Vec::with_capacity(slot.len());
            trajectory.read(index, &slot, &mut |k, value| {
                if stopped.load(Ordering::Relaxed) {
                    return Err(Error::backend("reading a node ahead was given up"));
                }
                let (kind, device) = (slot.tensors()[k].kind(), slot.tensors()[k].device());
                let value = value.f_to_kind(kind)?;
                values.push(if device.is_cuda() { pin(&value)? } else { value });
                Ok(())
            })?;
            Ok(values)
        };
        let thread = std::thread::Builder::new().name("next node".into()).spawn(read)?;
        Ok(Self { index, stop, thread: Some(thread) })
    }

    fn finish(mut self, slot: &ParamSet) -> Result<()> {
        let thread = self.thread.take().expect("taken once");
        let values =
            thread.join().map_err(|_| Error::backend("reading a node of the trajectory ended in a panic"))??;
        tch::no_grad(|| {
            for (mine, value) in slot.tensors().iter().zip(&values) {
                mine.shallow_clone().f_copy_(&send(value, mine.device())?)?;
            }
            Ok(())
        })
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tch::Kind;

    use super::*;
    use crate::distill::config::Precision;

    fn set(v: f32) -> ParamSet {
        ParamSet::new(vec!["a".into(), "b".into()], vec![Tensor::from(v), Tensor::from_slice(&[v, -v / 3.0])]).unwrap()
    }

    fn recorded(dir: &Path, precision: Precision) -> Trajectory {
        let mut t = Trajectory::create(dir, &set(1.0), None, None, precision).unwrap();
        for k in 1..4 {
            t.record(&set(1.0 + k as f32 / 7.0), k, None).unwrap();
        }
        t.complete(&[0, 1, 2, 3]).unwrap();
        t
    }

    fn ahead(trajectory: &Trajectory) -> Nodes<'_> {
        Nodes { trajectory, ahead: true, next: None, world: World::alone() }
    }

    #[test]
    fn nodes_read_ahead_are_those_loaded_at_once() {
        for precision in [Precision::F32, Precision::Bf16] {
            let dir = tempfile::tempdir().unwrap();
            let t = recorded(dir.path(), precision);
            let narrow = |p: ParamSet| {
                let tensors = p.tensors().iter().map(|t| t.to_kind(Kind::BFloat16)).collect();
                ParamSet::new(p.names().to_vec(), tensors).unwrap()
            };
            for [slot, plain] in [[set(0.0), set(0.0)], [narrow(set(0.0)), narrow(set(0.0))]] {
                slot.set_requires_grad(false).unwrap();
                let mut nodes = ahead(&t);
                // The third jumps: what was read ahead is of no use.
                for (index, next) in [(3, Some(2)), (2, Some(1)), (0, None)] {
                    nodes.load(index, &slot).unwrap();
                    t.load(index, &plain).unwrap();
                    assert_eq!(slot.tensors(), plain.tensors(), "node {index}");
                    assert_eq!(nodes.next.as_ref().map(|n| n.index), next);
                }
            }
        }
    }

    #[test]
    fn a_changed_file_is_refused_when_its_turn_comes() {
        let dir = tempfile::tempdir().unwrap();
        let t = recorded(dir.path(), Precision::F32);
        std::fs::copy(dir.path().join("node-001.safetensors"), dir.path().join("node-002.safetensors")).unwrap();
        let slot = set(0.0);
        let mut nodes = ahead(&t);
        nodes.load(3, &slot).unwrap();
        let before = slot.hash().unwrap();
        let e = nodes.load(2, &slot).unwrap_err();
        assert!(e.to_string().contains("not the recorded"), "{e}");
        assert_eq!(slot.hash().unwrap(), before);
    }

    #[test]
    fn the_cpu_reads_nothing_ahead() {
        let dir = tempfile::tempdir().unwrap();
        let t = recorded(dir.path(), Precision::F32);
        let mut nodes = Nodes::new(&t, Device::Cpu, &World::alone());
        nodes.load(3, &set(0.0)).unwrap();
        assert!(nodes.next.is_none());
        assert!(Nodes::new(&t, Device::Cuda(0), &World::alone()).ahead);
    }
}
