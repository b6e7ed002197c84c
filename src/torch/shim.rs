//! What tch leaves out of libtorch, through `shim.cpp`: fused AdamW, foreach kernels, generators of our own, statistics.

use std::ffi::{CStr, c_char, c_int, c_void};

use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use crate::error::{Error, Result};

unsafe extern "C" {
    fn disback_free(p: *mut c_void);
    fn disback_grads(params: *const *const C_tensor, count: usize, out: *mut *mut C_tensor) -> *mut c_char;
    fn disback_norms(tensors: *const *const C_tensor, count: usize, out: *mut *mut C_tensor) -> *mut c_char;
    fn disback_global_norm(tensors: *const *const C_tensor, count: usize, out: *mut *mut C_tensor) -> *mut c_char;
    fn disback_fused_adamw(
        params: *const *const C_tensor,
        grads: *const *const C_tensor,
        exp_avg: *const *const C_tensor,
        exp_avg_sq: *const *const C_tensor,
        count: usize,
        step: *const C_tensor,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
        grad_scale: *const C_tensor,
        found_inf: *const C_tensor,
    ) -> *mut c_char;
    fn disback_foreach_lerp(
        mine: *const *const C_tensor,
        theirs: *const *const C_tensor,
        count: usize,
        weight: f64,
    ) -> *mut c_char;
    fn disback_drop_grads(params: *const *const C_tensor, count: usize) -> *mut c_char;
    fn disback_randn(seed: u64, shape: *const i64, rank: usize, device: c_int, out: *mut *mut C_tensor) -> *mut c_char;
    fn disback_pin(t: *const C_tensor, out: *mut *mut C_tensor) -> *mut c_char;
    fn disback_keep_memory();
    fn disback_set_tf32(on: bool) -> *mut c_char;
    fn disback_free_memory(device: c_int, bytes: *mut i64) -> *mut c_char;
    fn disback_memory_stats(device: c_int, current: *mut i64, peak: *mut i64) -> *mut c_char;
}

/// Turns the shim's answer into ours. libtorch appends notes and a stack; the first line says what happened.
pub(super) fn check(message: *mut c_char) -> Result<()> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: the shim returns a NUL-terminated string from malloc, ours to free.
    let text = unsafe {
        let text = CStr::from_ptr(message).to_string_lossy().into_owned();
        disback_free(message.cast());
        text
    };
    Err(Error::of_libtorch(&text))
}

/// Bytes that C++ has allocated for us.
///
/// # Safety
/// `bytes` is from malloc, holds `count` of them, and is ours to free.
pub(super) unsafe fn take_bytes(bytes: *mut u8, count: usize) -> Vec<u8> {
    // SAFETY: the caller's promise.
    unsafe {
        let taken = std::slice::from_raw_parts(bytes, count).to_vec();
        disback_free(bytes.cast());
        taken
    }
}

fn pointers(tensors: &[Tensor]) -> Vec<*const C_tensor> {
    tensors.iter().map(Tensor::as_ptr).collect()
}

fn same_length(a: &[Tensor], b: &[Tensor]) -> Result<()> {
    if a.len() == b.len() {
        return Ok(());
    }
    Err(Error::mismatch(format!("tensor lists of {} and {} entries", a.len(), b.len())))
}

/// The gradient of each parameter, `None` where nothing has flowed to it.
pub fn grads(params: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
    let mut out = vec![std::ptr::null_mut(); params.len()];
    // SAFETY: the pointers come from live tensors, and `out` has one place for each.
    check(unsafe { disback_grads(pointers(params).as_ptr(), params.len(), out.as_mut_ptr()) })?;
    // SAFETY: a non-null entry is a new handle that is now ours.
    Ok(out.into_iter().map(|p| (!p.is_null()).then(|| unsafe { Tensor::from_ptr(p) })).collect())
}

/// Global Euclidean norm of a non-empty list: f32 of rank 0 that stays on the device.
pub fn global_norm(tensors: &[Tensor]) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: live tensors in; on success `out` is a new handle that is ours.
    check(unsafe { disback_global_norm(pointers(tensors).as_ptr(), tensors.len(), &mut out) })?;
    Ok(unsafe { Tensor::from_ptr(out) })
}

/// Euclidean norm of each tensor of a non-empty list: f32 `[count]` that stays on the device.
pub fn norms(tensors: &[Tensor]) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: as above.
    check(unsafe { disback_norms(pointers(tensors).as_ptr(), tensors.len(), &mut out) })?;
    Ok(unsafe { Tensor::from_ptr(out) })
}

/// Hyperparameters of one AdamW step.
#[derive(Debug, Clone, Copy)]
pub struct AdamWStep {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the mean of the gradients, 0 to 1.
    pub beta1: f64,
    /// Decay of the mean of the squared gradients, 0 to 1.
    pub beta2: f64,
    /// Decoupled weight decay: parameters shrink by `lr * weight_decay`.
    pub weight_decay: f64,
    /// Added to the square root in the denominator, against division by 0.
    pub eps: f64,
}

/// One step of AdamW over lists of equal length. `step` (f32, rank 0) is this step's number, counted from 1. Gradients
/// are divided by `grad_scale` (f32, rank 0); where `found_inf` (f32, rank 0) is 1 nothing changes.
#[allow(clippy::too_many_arguments)]
pub fn fused_adamw(
    params: &[Tensor],
    grads: &[Tensor],
    exp_avg: &[Tensor],
    exp_avg_sq: &[Tensor],
    step: &Tensor,
    numbers: AdamWStep,
    grad_scale: &Tensor,
    found_inf: &Tensor,
) -> Result<()> {
    same_length(params, grads)?;
    same_length(params, exp_avg)?;
    same_length(params, exp_avg_sq)?;
    let AdamWStep { lr, beta1, beta2, weight_decay, eps } = numbers;
    // SAFETY: live tensors, four lists of one length.
    check(unsafe {
        disback_fused_adamw(
            pointers(params).as_ptr(),
            pointers(grads).as_ptr(),
            pointers(exp_avg).as_ptr(),
            pointers(exp_avg_sq).as_ptr(),
            params.len(),
            step.as_ptr(),
            lr,
            beta1,
            beta2,
            weight_decay,
            eps,
            grad_scale.as_ptr(),
            found_inf.as_ptr(),
        )
    })
}

/// `mine += weight * (theirs - mine)` for each pair.
pub fn foreach_lerp(mine: &[Tensor], theirs: &[Tensor], weight: f64) -> Result<()> {
    same_length(mine, theirs)?;
    // SAFETY: live tensors, two lists of one length.
    check(unsafe { disback_foreach_lerp(pointers(mine).as_ptr(), pointers(theirs).as_ptr(), mine.len(), weight) })
}

/// Lets go of the parameters' gradients: the next backward pass makes them anew, without a pass over zeros.
pub fn drop_grads(params: &[Tensor]) -> Result<()> {
    // SAFETY: live tensors.
    check(unsafe { disback_drop_grads(pointers(params).as_ptr(), params.len()) })
}

/// Standard normal noise (f32) that depends on `seed`, the shape and the kind of device alone: libtorch's process-wide
/// generators are neither read nor moved.
pub fn randn(seed: u64, shape: &[i64], device: Device) -> Result<Tensor> {
    let index = match device {
        Device::Cpu => -1,
        Device::Cuda(i) => i as c_int,
        other => return Err(Error::unsupported(format!("noise on {other:?}"))),
    };
    let mut out = std::ptr::null_mut();
    // SAFETY: the shape outlives the call; on success `out` is a new handle that is ours.
    check(unsafe { disback_randn(seed, shape.as_ptr(), shape.len(), index, &mut out) })?;
    let noise = unsafe { Tensor::from_ptr(out) };
    debug_assert_eq!(noise.kind(), Kind::Float);
    Ok(noise)
}

/// A copy of a host tensor in memory that a CUDA device reads by itself (the tensor where it lies there already). libtorch keeps
/// the memory until copies from it are done.
pub fn pin(t: &Tensor) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: a live tensor in; on success `out` is a new handle that is ours.
    check(unsafe { disback_pin(t.as_ptr(), &mut out) })?;
    Ok(unsafe { Tensor::from_ptr(out) })
}

/// Lets the C allocator keep what libtorch frees, for good: without it each step faults its large tensors in anew.
pub fn keep_memory() {
    // SAFETY: sets options of malloc.
    unsafe { disback_keep_memory() }
}

/// TF32 in matrix products and convolutions of f32 tensors on CUDA (10 bits of mantissa, several times faster).
pub fn set_tf32(on: bool) -> Result<()> {
    // SAFETY: sets two flags of libtorch's context.
    check(unsafe { disback_set_tf32(on) })
}

/// Bytes of a CUDA device that this process may still take; `None` for other devices.
pub fn free_memory(device: Device) -> Result<Option<u64>> {
    let Device::Cuda(index) = device else { return Ok(None) };
    let mut bytes = 0;
    // SAFETY: writes an integer.
    check(unsafe { disback_free_memory(index as c_int, &mut bytes) })?;
    Ok(Some(bytes.max(0) as u64))
}

/// Bytes of a CUDA device that tensors hold: now, and at most since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Bytes that tensors hold now.
    pub current: u64,
    /// The most bytes that tensors held at one time.
    pub peak: u64,
}

/// Memory of a CUDA device; `None` for the CPU, whose allocator keeps no count.
pub fn memory(device: Device) -> Result<Option<Memory>> {
    let Device::Cuda(index) = device else { return Ok(None) };
    let (mut current, mut peak) = (0, 0);
    // SAFETY: writes two integers.
    check(unsafe { disback_memory_stats(index as c_int, &mut current, &mut peak) })?;
    Ok(Some(Memory { current: current.max(0) as u64, peak: peak.max(0) as u64 }))
}

/// A tensor of the device `meta`, which has no elements to read.
#[cfg(test)]
pub(super) fn meta(shape: &[i64]) -> Tensor {
    unsafe extern "C" {
        fn disback_meta(shape: *const i64, rank: usize, out: *mut *mut C_tensor) -> *mut c_char;
    }
    let mut out = std::ptr::null_mut();
    // SAFETY: a live slice in; on success `out` is a new handle that is ours.
    check(unsafe { disback_meta(shape.as_ptr(), shape.len(), &mut out) }).unwrap();
    unsafe { Tensor::from_ptr(out) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every kernel of ours for the CPU, each operand in turn on another device: an error, not a signal.
    #[test]
    fn kernels_for_the_cpu_refuse_tensors_of_other_devices() {
        type Out = *mut *mut C_tensor;
        unsafe extern "C" {
            fn disback_gelu_tanh(x: *const C_tensor, out: Out) -> *mut c_char;
            fn disback_linear(x: *const C_tensor, w: *const C_tensor, b: *const C_tensor, out: Out) -> *mut c_char;
            fn disback_winograd(x: *const C_tensor, w: *const C_tensor, b: *const C_tensor, out: Out) -> *mut c_char;
            fn disback_group_norm(
                x: *const C_tensor,
                groups: i64,
                scale: *const C_tensor,
                bias: *const C_tensor,
                epsilon: f64,
                out: Out,
            ) -> *mut c_char;
            fn disback_hollow_attention(
                q: *const C_tensor,
                k: *const C_tensor,
                v: *const C_tensor,
                out: Out,
            ) -> *mut c_char;
            fn disback_hollow_product(
                x: *const C_tensor,
                w: *const C_tensor,
                b: *const C_tensor,
                out: Out,
            ) -> *mut c_char;
            fn disback_hollow_convolution(
                x: *const C_tensor,
                w: *const C_tensor,
                b: *const C_tensor,
                sizes: *const i64,
                rank: usize,
                out: Out,
            ) -> *mut c_char;
        }
        let (image, filters, one) = ([2i64, 16, 8, 8], [16i64, 16, 3, 3], [16i64]);
        let (rows, square) = ([32i64, 16], [16i64, 16]);
        // The entry with the tensors' handles, and the shapes of its operands.
        type Call = fn(&[*const C_tensor], Out) -> *mut c_char;
        // SAFETY (all): the handles are of live tensors.
        let entries: [(&str, Call, Vec<&[i64]>); 7] = [
            ("GELU", |t, out| unsafe { disback_gelu_tanh(t[0], out) }, vec![&image]),
            ("linear", |t, out| unsafe { disback_linear(t[0], t[1], t[2], out) }, vec![&rows, &square, &one]),
            ("convolution", |t, out| unsafe { disback_winograd(t[0], t[1], t[2], out) }, vec![&image, &filters, &one]),
            (
                "group norm",
                |t, out| unsafe { disback_group_norm(t[0], 4, t[1], t[2], 1e-5, out) },
                vec![&image, &one, &one],
            ),
            ("attention", |t, out| unsafe { disback_hollow_attention(t[0], t[1], t[2], out) }, vec![&image; 3]),
            ("product", |t, out| unsafe { disback_hollow_product(t[0], t[1], t[2], out) }, vec![&rows, &square, &one]),
            (
                "convolution",
                |t, out| unsafe { disback_hollow_convolution(t[0], t[1], t[2], [2i64, 16, 8, 8].as_ptr(), 4, out) },
                vec![&image, &filters, &one],
            ),
        ];
        for (name, call, shapes) in entries {
            for away in 0..shapes.len() {
                let place = |(i, shape): (usize, &&[i64])| {
                    if i == away { meta(shape) } else { Tensor::ones(*shape, (Kind::Float, Device::Cpu)) }
                };
                let tensors: Vec<Tensor> = shapes.iter().enumerate().map(place).collect();
                let mut out = std::ptr::null_mut();
                let handles: Vec<*const C_tensor> = tensors.iter().map(Tensor::as_ptr).collect();
                let e = check(call(&handles, &mut out)).unwrap_err().to_string();
                assert!(e.contains(name) && e.contains("the device meta") && out.is_null(), "{name} {away}: {e}");
            }
        }
    }

    #[test]
    fn noise_depends_on_the_seed_alone() {
        tch::manual_seed(1);
        let a = randn(7, &[3, 5], Device::Cpu).unwrap();
        tch::manual_seed(2);
        let before = Tensor::randn([4], (Kind::Float, Device::Cpu));
        tch::manual_seed(2);
        let b = randn(7, &[3, 5], Device::Cpu).unwrap();
        let after = Tensor::randn([4], (Kind::Float, Device::Cpu));
        assert!(a.equal(&b));
        assert!(!a.equal(&randn(8, &[3, 5], Device::Cpu).unwrap()));
        assert!(before.equal(&after), "the process-wide generator was moved");
        let many = randn(3, &[100_000], Device::Cpu).unwrap();
        assert!(many.mean(Kind::Float).double_value(&[]).abs() < 0.02);
        assert!((many.std(true).double_value(&[]) - 1.0).abs() < 0.02);
    }

    #[test]
    fn exceptions_become_errors() {
        let e = global_norm(&[]).unwrap_err();
        assert!(e.to_string().contains("libtorch"), "{e}");
        let e = foreach_lerp(&[Tensor::zeros([2], (Kind::Float, Device::Cpu))], &[], 0.5).unwrap_err();
        assert!(e.to_string().contains("1 and 0"), "{e}");
    }

    #[test]
    fn global_norm_joins_all_entries() {
        let a = Tensor::from_slice(&[3.0f32, 0.0]);
        let b = Tensor::from_slice(&[0.0f32, -4.0, 12.0]);
        assert_eq!(global_norm(&[a, b]).unwrap().double_value(&[]), 13.0);
    }
}
