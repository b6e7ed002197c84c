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
    /// The slot, and the network in it. `narrow`: weights that only products read are kept in bf16. A network that cannot be lent is
    /// copied.
    pub fn lend(teacher: &'a Denoiser, narrow: bool) -> Result<(Self, Denoiser)> {
        let kinds = teacher.params().tensors().iter().map(tch::Tensor::kind).collect();
        let Some(target) = teacher.alias() else {
            let copy = if narrow { teacher.copy_narrow()? } else { teacher.copy()? };
            return Ok((Self { teacher, kinds }, copy));
        };
        if narrow {
            for (t, _) in
                teacher.params().tensors().iter().zip(teacher.network().kernels()).filter(|(_, kernel)| *kernel)
            {
                t.shallow_clone().f_set_data(&t.detach().f_to_kind(Kind::BFloat16)?)?;
            }
        }
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
