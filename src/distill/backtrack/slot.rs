//! The target's slot: the teacher's own weights, which nothing reads in stage 2, lent to one node after the other.

use tch::Kind;

use crate::diffusion::Denoiser;
use crate::distill::trajectory::Trajectory;
use crate::error::Result;
use crate::torch::dist::World;

/// The teacher's network as the target. Its weights are those of the target until [`Slot::give_back`].
pub(super) struct Slot<'a> {
    teacher: &'a Denoiser,
    /// Element types that its weights had.
    kinds: Vec<Kind>,
}

impl<'a> Slot<'a> {
    /// The slot, and the network in it. A network that cannot be lent is copied, `narrow` as [`Denoiser::copy_narrow`] does.
    pub fn lend(teacher: &'a Denoiser, narrow: bool) -> Result<(Self, Denoiser)> {
        let kinds = teacher.params().tensors().iter().map(tch::Tensor::kind).collect();
        let target = match teacher.alias() {
            Some(target) => target,
            None if narrow => teacher.copy_narrow()?,
            None => teacher.copy()?,
        };
        Ok((Self { teacher, kinds }, target))
    }

    /// The teacher has its own weights again, bit for bit.
    pub fn give_back(self, trajectory: &Trajectory, world: &World) -> Result<()> {
        let params = self.teacher.params();
        for (t, &kind) in params.tensors().iter().zip(&self.kinds).filter(|(t, kind)| t.kind() != **kind) {
            t.shallow_clone().f_set_data(&t.detach().f_to_kind(kind)?)?;
        }
        trajectory.load_shared(world, 0, params)
    }
}

/// Keeps the weights of the target that only products read in bf16 from now on. (All copies of the teacher have been made by then.)
pub(super) fn narrow(target: &Denoiser) -> Result<()> {
    for (t, _) in target.params().tensors().iter().zip(target.network().kernels()).filter(|(_, kernel)| *kernel) {
        t.shallow_clone().f_set_data(&t.detach().f_to_kind(Kind::BFloat16)?)?;
    }
    Ok(())
}
