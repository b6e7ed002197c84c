//! A group of processes as `dist.cpp` has it.

use std::ffi::{CString, c_char, c_int, c_void};
use std::time::Duration;

use tch::Tensor;
use torch_sys::C_tensor;

use super::launcher::Place;
use crate::error::{Error, Result};
use crate::torch::shim::{check, take_bytes};

unsafe extern "C" {
    fn disback_dist_has_nccl() -> bool;
    fn disback_dist_form(
        address: *const c_char,
        port: c_int,
        serves: bool,
        rank: c_int,
        world: c_int,
        timeout_ms: i64,
        prefix: *const c_char,
        nccl: bool,
        out: *mut *mut c_void,
    ) -> *mut c_char;
    fn disback_dist_drop(group: *mut c_void);
    fn disback_dist_put(group: *mut c_void, key: *const c_char, bytes: *const u8, count: usize) -> *mut c_char;
    fn disback_dist_get(
        group: *mut c_void,
        key: *const c_char,
        timeout_ms: i64,
        out: *mut *mut u8,
        count: *mut usize,
    ) -> *mut c_char;
    fn disback_dist_broadcast(group: *mut c_void, tensors: *const *const C_tensor, count: usize) -> *mut c_char;
    fn disback_dist_send(group: *mut c_void, mine: *const C_tensor) -> *mut c_char;
    fn disback_dist_receive(group: *mut c_void, from: c_int, there: *mut C_tensor) -> *mut c_char;
    fn disback_dist_gather(group: *mut c_void, mine: *const C_tensor, out: *mut *mut C_tensor) -> *mut c_char;
}

/// Whether NCCL is there (compiled in, and libtorch's CUDA half loaded), without which CUDA devices of several processes cannot be used
/// together.
pub fn has_nccl() -> bool {
    // SAFETY: reads a constant.
    unsafe { disback_dist_has_nccl() }
}

/// A group of processes. Its calls are blocking, and every process makes the same ones in the same order.
#[derive(Debug)]
pub(super) struct Group(*mut c_void);

// SAFETY: c10d's process groups and stores may be used from any thread; ours are used by one at a time.
unsafe impl Send for Group {}
// SAFETY: as above.
unsafe impl Sync for Group {}

impl Group {
    /// Meets the others. They must come within `timeout`, which is also the longest that one waits for another later.
    pub fn form(place: &Place, timeout: Duration, nccl: bool) -> Result<Self> {
        let text = |s: &str| CString::new(s).map_err(|_| Error::usage(format!("{s:?} holds a zero byte")));
        let (address, prefix) = (text(&place.address)?, text(&format!("disback/{}", place.attempt))?);
        let mut out = std::ptr::null_mut();
        let (rank, world) = (place.rank as c_int, place.world as c_int);
        let serves = place.rank == 0 && !place.served;
        // SAFETY: the texts live through the call; on success `out` is a group that is ours.
        check(unsafe {
            disback_dist_form(
                address.as_ptr(),
                place.port.into(),
                serves,
                rank,
                world,
                timeout.as_millis() as i64,
                prefix.as_ptr(),
                nccl,
                &raw mut out,
            )
        })?;
        Ok(Self(out))
    }

    pub fn raw(&self) -> *mut c_void {
        self.0
    }

    pub fn put(&self, key: &str, bytes: &[u8]) -> Result<()> {
        let key = CString::new(key).expect("keys of ours");
        // SAFETY: key and bytes live through the call.
        check(unsafe { disback_dist_put(self.0, key.as_ptr(), bytes.as_ptr(), bytes.len()) })
    }

    pub fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>> {
        let key = CString::new(key).expect("keys of ours");
        let (mut out, mut count) = (std::ptr::null_mut(), 0);
        // SAFETY: on success `out` is `count` bytes from malloc, ours to free.
        let limit = timeout.as_millis() as i64;
        check(unsafe { disback_dist_get(self.0, key.as_ptr(), limit, &raw mut out, &raw mut count) })?;
        // SAFETY: as above.
        Ok(unsafe { take_bytes(out, count) })
    }

    pub fn broadcast(&self, tensors: &[Tensor]) -> Result<()> {
        let pointers: Vec<_> = tensors.iter().map(Tensor::as_ptr).collect();
        // SAFETY: the tensors live through the call.
        check(unsafe { disback_dist_broadcast(self.0, pointers.as_ptr().cast(), pointers.len()) })
    }

    /// To rank 0, in the order of its rows.
    pub fn send(&self, mine: &Tensor) -> Result<()> {
        // SAFETY: the tensor lives through the call.
        check(unsafe { disback_dist_send(self.0, mine.as_ptr()) })
    }

    /// What `from` sends, into a contiguous tensor of its size.
    pub fn receive(&self, from: usize, there: &mut Tensor) -> Result<()> {
        // SAFETY: the tensor lives through the call.
        check(unsafe { disback_dist_receive(self.0, from as c_int, there.as_mut_ptr()) })
    }

    pub fn gather(&self, mine: &Tensor) -> Result<Tensor> {
        let mut out = std::ptr::null_mut();
        // SAFETY: on success `out` is a new handle that is ours.
        check(unsafe { disback_dist_gather(self.0, mine.as_ptr(), &raw mut out) })?;
        // SAFETY: as above.
        Ok(unsafe { Tensor::from_ptr(out) })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // SAFETY: the group is ours and is not used again.
        unsafe { disback_dist_drop(self.0) };
    }
}
