//! The sum of a network's gradients over the micro-batches of an update, whichever process computed them.

use std::ffi::{c_char, c_void};
use std::sync::Arc;

use tch::Tensor;
use torch_sys::C_tensor;

use super::World;
use super::group::Group;
use crate::error::Result;
use crate::torch::shim::check;

unsafe extern "C" {
    fn disback_reducer_new(
        group: *mut c_void,
        params: *const *const C_tensor,
        count: usize,
        owners: *const i64,
        bytes: i64,
        out: *mut *mut c_void,
    ) -> *mut c_char;
    fn disback_reducer_drop(reducer: *mut c_void);
    fn disback_reducer_round(reducer: *mut c_void, rows: i64, active: bool) -> *mut c_char;
    fn disback_reducer_finish(reducer: *mut c_void, reached: *mut u8) -> *mut c_char;
    fn disback_reducer_let_go(reducer: *mut c_void) -> *mut c_char;
    fn disback_reducer_hand_out(reducer: *mut c_void) -> *mut c_char;
}

/// Bytes of gradients that are sent together: 220 MB between two processes took 243 ms in parts of 25 MB, 274 ms in one, 388 ms tensor
/// by tensor.
pub const BUCKET: i64 = 25 << 20;

/// Sums gradients in the order of the micro-batches, so that on the CPU the sum has the same bits for any number of processes. (On CUDA
/// each process sums its own, and NCCL the sums.)
#[derive(Debug)]
pub struct Reducer {
    raw: *mut c_void,
    world: World,
    count: usize,
    /// The group outlives the reducer.
    _group: Option<Arc<Group>>,
}

impl Reducer {
    /// For these parameters, f32 on one device. In a world of one process it sums micro-batch by micro-batch all the same. `owners`:
    /// of each parameter the rank that keeps its sum, steps it and hands out the new values (see [`super::Owners`]); none: all do all.
    pub fn new(world: &World, params: &[Tensor], owners: Option<&[usize]>) -> Result<Self> {
        let group = world.group().cloned();
        let pointers: Vec<_> = params.iter().map(Tensor::as_ptr).collect();
        let mut raw = std::ptr::null_mut();
        let of = group.as_ref().map_or(std::ptr::null_mut(), |g| g.raw());
        let owners: Option<Vec<i64>> = owners.map(|all| all.iter().map(|&rank| rank as i64).collect());
        let owned = owners.as_ref().map_or(std::ptr::null(), |all| all.as_ptr());
        let (tensors, count) = (pointers.as_ptr().cast(), pointers.len());
        // SAFETY: tensors and owners (one each) live through the call, the group as long as the reducer; on success `raw` is ours.
        check(unsafe { disback_reducer_new(of, tensors, count, owned, BUCKET, &raw mut raw) })?;
        Ok(Self { raw, world: world.clone(), count, _group: group })
    }

    /// The processes that share the micro-batches.
    pub fn world(&self) -> &World {
        &self.world
    }

    /// A round of micro-batches is done, `rows` in all, one of each of the first processes. The parameters' gradients are taken from
    /// them and are on their way.
    pub fn round(&mut self, rows: usize) -> Result<()> {
        let active = self.world.rank() < rows;
        // SAFETY: the reducer is ours.
        self.world.talk(|| check(unsafe { disback_reducer_round(self.raw, rows as i64, active) }))
    }

    /// All rounds are done: the parameters get the sum as their gradients, on every process or on the one that owns them. Gives which
    /// of them a gradient has reached, also where this process does not have it.
    pub fn finish(&mut self) -> Result<Vec<bool>> {
        let mut reached = vec![0u8; self.count];
        // SAFETY: the reducer is ours, and `reached` has a place for each parameter.
        self.world.talk(|| check(unsafe { disback_reducer_finish(self.raw, reached.as_mut_ptr()) }))?;
        Ok(reached.into_iter().map(|flag| flag != 0).collect())
    }

    /// The parameters have no gradients any more, and their memory goes back.
    pub fn let_go(&mut self) -> Result<()> {
        // SAFETY: the reducer is ours; nothing else reads the gradients it has given.
        check(unsafe { disback_reducer_let_go(self.raw) })
    }

    /// Every process gets the parameters' values from those that own them, in place.
    pub fn hand_out(&mut self) -> Result<()> {
        // SAFETY: the reducer is ours.
        self.world.talk(|| check(unsafe { disback_reducer_hand_out(self.raw) }))
    }
}

impl Drop for Reducer {
    fn drop(&mut self) {
        // SAFETY: the reducer is ours and is not used again.
        unsafe { disback_reducer_drop(self.raw) }
    }
}
