//! Memory and precision of training, through `training.cpp`: recomputation of segments, bf16 autocast, a count of the CPU's
//! tensor memory, and a witness of host reads.

use std::ffi::{CString, c_char, c_void};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};

use tch::{Device, Tensor};
use torch_sys::C_tensor;

use crate::error::{Error, Result};
use crate::torch::shim::{Memory, check};

type Run = extern "C" fn(*mut c_void, *const *const C_tensor, usize, *mut *mut C_tensor, usize) -> *mut c_char;
type DropSegment = extern "C" fn(*mut c_void);

unsafe extern "C" {
    fn disback_recompute(
        segment: *mut c_void,
        run: Run,
        drop: DropSegment,
        inputs: *const *const C_tensor,
        count: usize,
        outputs: *mut *mut C_tensor,
        outputs_count: usize,
    ) -> *mut c_char;
    fn disback_text(text: *const c_char) -> *mut c_char;
    fn disback_grad_enabled() -> bool;
    fn disback_autocast(cuda: bool, on: bool) -> bool;
    fn disback_autocast_enabled(cuda: bool) -> bool;
    fn disback_count_memory();
    fn disback_counted_memory_of_all(current: *mut i64, peak: *mut i64, reset: bool);
    fn disback_counted_memory(current: *mut i64, peak: *mut i64, reset: bool);
    fn disback_hollow(on: bool);
    fn disback_is_hollow() -> bool;
    fn disback_hollow_attention(
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn disback_hollow_product(
        x: *const C_tensor,
        w: *const C_tensor,
        bias: *const C_tensor,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn disback_spare_onednn() -> u64;
    fn disback_hollow_convolution(
        x: *const C_tensor,
        w: *const C_tensor,
        bias: *const C_tensor,
        sizes: *const i64,
        rank: usize,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn disback_watch_host_reads() -> u64;
    fn disback_host_reads() -> i64;
    fn disback_note_host_read();
    fn disback_unwatch(handle: u64);
}

/// How networks compute while they are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Compute {
    /// Convolutions and matrix products in bf16, the rest where their results go on in it; weights stay f32.
    pub bf16: bool,
    /// Bytes of inner values that a forward may keep for its backward pass; what goes beyond is computed again there.
    /// 0: everything is kept.
    pub activation_bytes: u64,
}

/// A piece of a network as a function of tensors.
pub type Piece = Box<dyn Fn(&[Tensor]) -> Result<Vec<Tensor>>>;

extern "C" fn run_piece(
    segment: *mut c_void,
    inputs: *const *const C_tensor,
    count: usize,
    outputs: *mut *mut C_tensor,
    outputs_count: usize,
) -> *mut c_char {
    let run = || -> Result<()> {
        // SAFETY: `segment` is the box that `recompute` gave away, alive until `drop_piece`; the pointers are tensors that
        // outlive this call, of which handles of our own are made.
        let (piece, inputs) = unsafe {
            let inputs = std::slice::from_raw_parts(inputs, count);
            let inputs: Vec<Tensor> = inputs.iter().map(|p| Tensor::clone_from_ptr(*p as *mut C_tensor)).collect();
            (&*(segment as *const Piece), inputs)
        };
        let results = piece(&inputs)?;
        if results.len() != outputs_count {
            return Err(Error::backend(format!("a segment gave {} values, expected {outputs_count}", results.len())));
        }
        for (k, mut t) in results.into_iter().enumerate() {
            // SAFETY: `outputs` has `outputs_count` places; the handle is the caller's from here on.
            unsafe { *outputs.add(k) = t.as_mut_ptr() };
            std::mem::forget(t);
        }
        Ok(())
    };
    let message = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => return std::ptr::null_mut(),
        Ok(Err(e)) => e.to_string(),
        Err(_) => "a segment panicked".to_owned(),
    };
    let text = CString::new(message.replace('\0', " ")).unwrap_or_default();
    // SAFETY: a NUL-terminated string, copied.
    unsafe { disback_text(text.as_ptr()) }
}

extern "C" fn drop_piece(segment: *mut c_void) {
    // SAFETY: called once, with the box that `recompute` gave away.
    drop(unsafe { Box::from_raw(segment as *mut Piece) });
}

/// Runs `piece` on `inputs`; where a graph is recorded, its inner values are not kept: the backward pass runs it again.
/// `piece` must be a function of its inputs alone as far as gradients go, and gives `outputs` tensors.
///
/// On CUDA the second run happens on the engine's thread, while the thread that called `backward` waits for it: what
/// `piece` holds is never used by two threads at a time.
pub fn recompute(inputs: &[Tensor], outputs: usize, piece: Piece) -> Result<Vec<Tensor>> {
    let pointers: Vec<*const C_tensor> = inputs.iter().map(Tensor::as_ptr).collect();
    let mut out = vec![std::ptr::null_mut(); outputs];
    let segment = Box::into_raw(Box::new(piece)).cast();
    // SAFETY: live tensors; the shim takes the box over, also where it fails; on success each place holds a new handle.
    check(unsafe {
        disback_recompute(segment, run_piece, drop_piece, pointers.as_ptr(), pointers.len(), out.as_mut_ptr(), outputs)
    })?;
    Ok(out.into_iter().map(|p| unsafe { Tensor::from_ptr(p) }).collect())
}

/// Whether a graph is recorded on this thread.
pub fn grad_enabled() -> bool {
    // SAFETY: reads a flag of this thread.
    unsafe { disback_grad_enabled() }
}

/// Whether autocast is on for this device and thread.
pub fn autocast_enabled(device: Device) -> bool {
    // SAFETY: reads a flag of this thread.
    unsafe { disback_autocast_enabled(matches!(device, Device::Cuda(_))) }
}

/// The tensor as convolutions take it now: in bf16 where autocast is on for its device. libtorch's own list has the
/// convolutions of each rank and not the general one.
pub fn lowered(t: &Tensor) -> Result<Tensor> {
    let lower = t.kind() == tch::Kind::Float && autocast_enabled(t.device());
    Ok(if lower { t.f_to_kind(tch::Kind::BFloat16)? } else { t.shallow_clone() })
}

/// bf16 autocast while it lives, on this thread.
#[derive(Debug)]
pub struct Autocast {
    cuda: bool,
    before: bool,
    /// Bound to its thread.
    _thread: PhantomData<*const ()>,
}

impl Autocast {
    /// Switches autocast for a device; `on = false` changes nothing.
    pub fn new(device: Device, on: bool) -> Option<Self> {
        let cuda = matches!(device, Device::Cuda(_));
        // SAFETY: sets flags of this thread.
        on.then(|| Self { cuda, before: unsafe { disback_autocast(cuda, true) }, _thread: PhantomData })
    }
}

impl Drop for Autocast {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { disback_autocast(self.cuda, self.before) };
    }
}

/// From now on the memory of the CPU's tensors is counted, for the whole process. Tensors made before are not.
pub fn count_memory() {
    // SAFETY: exchanges libtorch's allocator once; tensors remember the one that made them.
    unsafe { disback_count_memory() }
}

/// What [`count_memory`] has counted of the tensors that the calling thread made and freed; `reset` sets the peak to the present
/// first.
pub fn counted_memory(reset: bool) -> Memory {
    let (mut current, mut peak) = (0, 0);
    // SAFETY: writes two integers.
    unsafe { disback_counted_memory(&mut current, &mut peak, reset) };
    Memory { current: current.max(0) as u64, peak: peak.max(0) as u64 }
}

/// [`counted_memory`] of all threads together: what a process holds whose tensors are freed by other threads than made them, as those are
/// that are sent to other processes.
pub fn counted_memory_of_process(reset: bool) -> Memory {
    let (mut current, mut peak) = (0, 0);
    // SAFETY: writes two integers.
    unsafe { disback_counted_memory_of_all(&mut current, &mut peak, reset) };
    Memory { current: current.max(0) as u64, peak: peak.max(0) as u64 }
}

/// While it lives, large tensors that this thread makes on the CPU have no content of their own: they count in [`counted_memory`] as
/// always, lie on the same few pages, and the greater part of what would be computed with them is left out. A network that no
/// memory holds can so be measured; its values are nonsense. Small tensors, which decide about shapes, are as always, and so is
/// all that other threads compute.
#[derive(Debug)]
pub struct Hollow {
    before: bool,
    /// Of the callback that spares oneDNN, which belongs to this thread.
    spared: Option<u64>,
    _thread: PhantomData<*const ()>,
}

impl Hollow {
    /// `bf16`: products may be in bf16, of which oneDNN computes what is not left out.
    pub fn new(bf16: bool) -> Self {
        count_memory();
        // SAFETY: reads and sets a flag, and adds a callback of this thread.
        let before = unsafe { disback_is_hollow() };
        unsafe { disback_hollow(true) };
        Self { before, spared: bf16.then(|| unsafe { disback_spare_onednn() }), _thread: PhantomData }
    }
}

impl Drop for Hollow {
    fn drop(&mut self) {
        // SAFETY: as above; tensors made meanwhile know how they are given back. The callback is the one that `new` added.
        unsafe { disback_hollow(self.before) };
        if let Some(handle) = self.spared {
            unsafe { disback_unwatch(handle) };
        }
    }
}

/// Whether operators on tensors of this kind are left out under [`Hollow`].
fn left_out(t: &Tensor) -> bool {
    // SAFETY: reads a flag.
    let hollow = unsafe { disback_is_hollow() };
    hollow && matches!(t.kind(), tch::Kind::Float | tch::Kind::BFloat16) && t.device() == Device::Cpu
}

/// The product of matrices under [`Hollow`] where libtorch would compute in bf16, without computing it; `None` anywhere else.
pub fn hollow_product(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
    let all = [Some(x), Some(w), bias];
    let narrow = autocast_enabled(Device::Cpu) || x.kind() == tch::Kind::BFloat16;
    if !(narrow && x.dim() >= 2 && w.dim() >= 2 && all.iter().flatten().all(|t| left_out(t))) {
        return Ok(None);
    }
    let bias = bias.map_or(std::ptr::null(), Tensor::as_ptr);
    let mut out = std::ptr::null_mut();
    // SAFETY: live tensors in; on success `out` is a new handle that is ours.
    check(unsafe { disback_hollow_product(x.as_ptr(), w.as_ptr(), bias, &mut out) })?;
    Ok(Some(unsafe { Tensor::from_ptr(out) }))
}

/// Settings of a convolution of any rank.
#[derive(Debug, Clone)]
pub struct Convolution {
    /// Step of the filter along each spatial axis; of the output, where `transposed`.
    pub strides: Vec<i64>,
    /// Zeros added at both ends of each spatial axis. A transposed convolution takes as many elements away.
    pub padding: Vec<i64>,
    /// Distance of neighbouring filter elements along each spatial axis; 1: they touch.
    pub dilations: Vec<i64>,
    /// Whether this is a transposed convolution (ONNX's ConvTranspose).
    pub transposed: bool,
    /// Elements added at the end of each spatial axis of a transposed convolution's output; zeros otherwise.
    pub output_padding: Vec<i64>,
    /// Number of groups that the channels are divided into; each is convolved alone.
    pub groups: i64,
}

/// libtorch's convolution; without computing it under [`Hollow`].
pub fn convolution(x: &Tensor, w: &Tensor, bias: Option<&Tensor>, c: Convolution) -> Result<Tensor> {
    if !left_out(x) {
        let Convolution { strides, padding, dilations, transposed, output_padding, groups } = c;
        return Ok(x.f_convolution(w, bias, strides, padding, dilations, transposed, output_padding, groups)?);
    }
    let (from, filters) = (x.size(), w.size());
    let mut sizes = vec![from[0], if c.transposed { filters[1] * c.groups } else { filters[0] }];
    for i in 0..from.len() - 2 {
        let reach = c.dilations[i] * (filters[i + 2] - 1) + 1;
        sizes.push(match c.transposed {
            true => (from[i + 2] - 1) * c.strides[i] - 2 * c.padding[i] + reach + c.output_padding[i],
            false => (from[i + 2] + 2 * c.padding[i] - reach).div_euclid(c.strides[i]) + 1,
        });
    }
    if sizes.iter().any(|n| *n < 0) {
        return Err(Error::invalid(format!("images of {from:?} under filters of {filters:?}")));
    }
    let bias = bias.map_or(std::ptr::null(), Tensor::as_ptr);
    let mut out = std::ptr::null_mut();
    // SAFETY: live tensors and as many sizes as said go in; on success `out` is a new handle that is ours.
    check(unsafe { disback_hollow_convolution(x.as_ptr(), w.as_ptr(), bias, sizes.as_ptr(), sizes.len(), &mut out) })?;
    Ok(unsafe { Tensor::from_ptr(out) })
}

/// libtorch's attention on `[B, H, T, D]`; without computing it under [`Hollow`].
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<Tensor>,
    causal: bool,
    scale: impl Into<Option<f64>>,
) -> Result<Tensor> {
    if [q, k, v].iter().all(|t| t.dim() == 4 && left_out(t)) && mask.is_none() {
        let (q, k, v) = (lowered(q)?, lowered(k)?, lowered(v)?);
        // SAFETY: live tensors in; on success `out` is a new handle that is ours.
        let mut out = std::ptr::null_mut();
        check(unsafe { disback_hollow_attention(q.as_ptr(), k.as_ptr(), v.as_ptr(), &mut out) })?;
        return Ok(unsafe { Tensor::from_ptr(out) });
    }
    Ok(Tensor::f_scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale, false)?)
}

/// Counts, on this thread and while it lives, what makes the host wait for values of the device: operators of libtorch
/// that read a tensor's elements, and our own copies to the host.
#[derive(Debug)]
pub struct HostReads {
    handle: u64,
    _thread: PhantomData<*const ()>,
}

impl HostReads {
    /// Starts counting at 0. One at a time on each thread: they share the counter.
    pub fn watch() -> Self {
        // SAFETY: adds a callback of this thread.
        Self { handle: unsafe { disback_watch_host_reads() }, _thread: PhantomData }
    }
    /// Number of such operators and copies since [`HostReads::watch`].
    pub fn count(&self) -> u64 {
        // SAFETY: reads a counter of this thread.
        unsafe { disback_host_reads() }.max(0) as u64
    }
}

impl Drop for HostReads {
    fn drop(&mut self) {
        // SAFETY: removes the callback that `watch` added.
        unsafe { disback_unwatch(self.handle) }
    }
}

/// Notes a copy from a device tensor to the host that no operator shows.
pub fn note_host_read() {
    // SAFETY: fuses a counter of this thread.
    unsafe { disback_note_host_read() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    #[test]
    fn host_reads_are_seen_and_computing_is_none() {
        let t = Tensor::ones([4], (Kind::Float, Device::Cpu));
        let reads = HostReads::watch();
        let sum = (&t * 2.0).sum(Kind::Float);
        assert_eq!(reads.count(), 0);
        assert_eq!(sum.double_value(&[]), 8.0);
        assert_eq!(reads.count(), 1);
        crate::torch::convert::to_host(&t).unwrap();
        assert_eq!(reads.count(), 2);
    }

    #[test]
    fn a_recomputed_piece_has_the_gradients_of_the_piece() {
        let x = Tensor::from_slice(&[0.3f32, -1.2, 2.0]).set_requires_grad(true);
        let w = Tensor::from_slice(&[1.5f32, 0.5, -0.7]).set_requires_grad(true);
        let f = |t: &[Tensor]| vec![(&t[0] * &t[1]).sin(), (&t[0] + &t[1]).exp()];
        let loss = |out: Vec<Tensor>| (&out[0] * 3.0 + &out[1]).sum(Kind::Float);
        loss(f(&[x.shallow_clone(), w.shallow_clone()])).backward();
        let expected = (x.grad().copy(), w.grad().copy());
        let (mut gx, mut gw) = (x.grad(), w.grad());
        let _ = (gx.zero_(), gw.zero_());
        let piece: Piece = Box::new(move |t| Ok(f(t)));
        let out = recompute(&[x.shallow_clone(), w.shallow_clone()], 2, piece).unwrap();
        loss(out).backward();
        assert!(x.grad().equal(&expected.0) && w.grad().equal(&expected.1));
        // One input without a gradient; and a piece that fails says why.
        let c = Tensor::from_slice(&[1f32, 2.0, 3.0]);
        let out = recompute(&[x.shallow_clone(), c], 2, Box::new(move |t| Ok(f(t)))).unwrap();
        loss(out).backward();
        let e = recompute(&[x.shallow_clone()], 1, Box::new(|_| Err(Error::backend("no such thing")))).unwrap_err();
        assert!(e.to_string().contains("no such thing"), "{e}");
    }

    #[test]
    fn autocast_ends_with_its_guard() {
        let (a, b) =
            (Tensor::ones([4, 4], (Kind::Float, Device::Cpu)), Tensor::ones([4, 4], (Kind::Float, Device::Cpu)));
        {
            let _on = Autocast::new(Device::Cpu, true);
            assert_eq!(a.matmul(&b).kind(), Kind::BFloat16);
            let _off = Autocast::new(Device::Cpu, false);
            assert_eq!(a.matmul(&b).kind(), Kind::BFloat16);
        }
        assert_eq!(a.matmul(&b).kind(), Kind::Float);
    }

    #[test]
    fn the_count_follows_the_tensors_of_its_thread() {
        count_memory();
        let before = counted_memory(true).current;
        let t = Tensor::zeros([1 << 20], (Kind::Float, Device::Cpu));
        std::thread::scope(|s| {
            let other = s.spawn(|| drop(Tensor::zeros([8 << 20], (Kind::Float, Device::Cpu))));
            other.join().unwrap();
        });
        let with = counted_memory(false);
        drop(t);
        assert_eq!(counted_memory(false).current, before);
        for bytes in [with.current, with.peak] {
            let grown = bytes - before;
            assert!((4 << 20..5 << 20).contains(&grown), "{grown} bytes");
        }
    }

    /// A run of a library's caller opens while another thread computes.
    #[test]
    fn other_threads_compute_while_this_one_measures() {
        let computed = || {
            // Some MiB each, and channels enough for the products of our own.
            let numbers = |n: i64| Tensor::arange(n, (Kind::Float, Device::Cpu)).sin();
            let image = numbers(4 * 32 * 96 * 96).reshape([4, 32, 96, 96]);
            let filter = numbers(32 * 32 * 9).reshape([32, 32, 3, 3]);
            let plain = Convolution {
                strides: vec![1; 2],
                padding: vec![1; 2],
                dilations: vec![1; 2],
                transposed: false,
                output_padding: vec![0; 2],
                groups: 1,
            };
            let mut made = vec![
                &image + 1.0,
                crate::torch::cpu::activation::gelu(&image, "none").unwrap(),
                convolution(&image, &filter, None, plain).unwrap(),
            ];
            if crate::torch::cpu::linear::has_products() {
                let rows = image.reshape([-1, 96]);
                made.push(crate::torch::cpu::linear::matmul(&rows, &rows.narrow(0, 0, 96)).unwrap());
                made.push(crate::torch::cpu::winograd::convolution(&image, &filter, None).unwrap());
            }
            made.iter().map(|t| crate::torch::convert::to_host(t).unwrap()).collect::<Vec<_>>()
        };
        let expected = computed();
        let _hollow = Hollow::new(true);
        let beside = std::thread::scope(|s| s.spawn(computed).join().unwrap());
        for (k, (a, b)) in expected.iter().zip(&beside).enumerate() {
            assert!(a.bytes() == b.bytes(), "result {k} is another one");
        }
    }
}
