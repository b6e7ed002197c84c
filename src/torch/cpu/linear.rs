//! Linear layers of f32 on the CPU with products of our own, through `linear.cpp`.

use std::ffi::{c_char, c_int};
use std::sync::LazyLock;

use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use crate::error::{Error, Result};
use crate::torch::shim::check;
use crate::torch::training::{autocast_enabled, hollow_product};

unsafe extern "C" {
    fn disback_level() -> c_int;
    fn disback_mkl_at_home() -> bool;
    fn disback_linear(
        x: *const C_tensor,
        w: *const C_tensor,
        bias: *const C_tensor,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
}

/// Rows from which the products of `gemm.cpp` are faster than libtorch's, and the least length of the other sides.
const LEAST_ROWS: i64 = 16;
const LEAST_SIDE: i64 = 16;
/// Weights that are as long on both sides are left to MKL where that is at home: DiT-S/2 took 1.09 of eager's time with the
/// products here and 0.97 with MKL's; for the digits' small ones the difference was within what the machine varied by
/// (benches/RESULTS.md).
const LARGE_SIDE: i64 = 256;

/// The widest vector instructions that the processor has and the kernels here are written for; libtorch's own variable
/// `ATEN_CPU_CAPABILITY` (`default`, `avx2`) limits them too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Neither: the kernels here cannot be used, and libtorch's compute instead.
    None,
    /// AVX2: vectors of 256 bits, eight numbers in f32.
    Avx2,
    /// AVX-512: vectors of 512 bits, sixteen numbers in f32.
    Avx512,
}

/// The level of this processor.
pub fn level() -> Level {
    // SAFETY: asks the processor.
    static LEVEL: LazyLock<Level> = LazyLock::new(|| match unsafe { disback_level() } {
        0 => Level::None,
        1 => Level::Avx2,
        _ => Level::Avx512,
    });
    *LEVEL
}

/// Whether the processor has what `gemm.cpp` is written for.
pub fn has_products() -> bool {
    level() > Level::None
}

/// Whether libtorch's own products are the faster ones: MKL on a processor of Intel's. Decided by the processor, not by a
/// measurement, so that a run that goes on rounds as it did.
fn at_home() -> bool {
    // SAFETY: asks the processor and libtorch's build.
    static AT_HOME: LazyLock<bool> = LazyLock::new(|| unsafe { disback_mkl_at_home() });
    *AT_HOME
}

/// Whether [`linear`] can multiply `x [.., K]` by `w [K, N]` and is expected to be faster than libtorch there.
pub fn pays(x: &Tensor, w: &Tensor) -> bool {
    takes(x, w) && !(at_home() && w.size().iter().all(|&side| side >= LARGE_SIDE))
}

/// Whether [`linear`] takes them.
fn takes(x: &Tensor, w: &Tensor) -> bool {
    let f32_here = |t: &Tensor| t.kind() == Kind::Float && t.device() == Device::Cpu;
    if !f32_here(x) || !f32_here(w) || !has_products() || autocast_enabled(Device::Cpu) {
        return false;
    }
    match (x.size().as_slice(), w.size().as_slice()) {
        ([rows @ .., k], &[k2, n]) if !rows.is_empty() => {
            *k == k2 && rows.iter().product::<i64>() >= LEAST_ROWS && k2.min(n) >= LEAST_SIDE
        }
        _ => false,
    }
}

/// `x [.., K]` times `w [K, N]` of any strides, plus a bias `[N]`: `[.., N]`. For tensors of f32 on the CPU that
/// [`pays`] accepts.
///
/// Errors: tensors of other types, devices or sizes.
pub fn linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    if !takes(x, w) {
        return Err(Error::mismatch(format!(
            "x {:?} {:?} and w {:?} {:?} are no operands of the CPU's product: f32 [.., K] and [K, N] are",
            x.kind(),
            x.size(),
            w.kind(),
            w.size()
        )));
    }
    let bias = bias.map_or(std::ptr::null(), Tensor::as_ptr);
    let mut out = std::ptr::null_mut();
    // SAFETY: live tensors in; on success `out` is a new handle that is ours.
    check(unsafe { disback_linear(x.as_ptr(), w.as_ptr(), bias, &mut out) })?;
    Ok(unsafe { Tensor::from_ptr(out) })
}

/// The product of two tensors by the rules of ONNX's MatMul.
pub fn matmul(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    if pays(x, y) {
        return linear(x, y, None);
    }
    Ok(match hollow_product(x, y, None)? {
        Some(made) => made,
        None => x.f_matmul(y)?,
    })
}

/// `x [M, K]` times `w [K, N]` plus `c`, by libtorch.
pub fn addmm(c: &Tensor, x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let bias = Some(c).filter(|c| c.dim() == 1 && c.size().last() == w.size().last());
    Ok(match bias.map(|_| hollow_product(x, w, bias)).transpose()?.flatten() {
        Some(made) => made,
        None => c.f_addmm(x, w)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn relative(a: &Tensor, b: &Tensor) -> f64 {
        let apart = (a.to_kind(Kind::Double) - b).norm().double_value(&[]);
        apart / b.norm().double_value(&[])
    }

    fn leaf(t: Tensor) -> Tensor {
        t.detach().set_requires_grad(true)
    }

    /// Values and all gradients against the product in f64, for weights of either order in memory. Sizes with rests in every
    /// direction; one whose rows fall on the same lines of the cache, and one with a long sum.
    #[test]
    fn values_and_gradients_are_those_of_the_plain_product() {
        if !has_products() {
            return;
        }
        tch::manual_seed(5);
        let options = (Kind::Float, Device::Cpu);
        for (rows, k, n) in [(33, 17, 45), (130, 64, 48), (40, 1024, 80), (16, 1500, 1030), (3, 100, 77)] {
            for turned in [false, true] {
                let x = leaf(Tensor::randn([2, rows, k], options));
                let kept = leaf(if turned { Tensor::randn([n, k], options) } else { Tensor::randn([k, n], options) });
                let b = leaf(Tensor::randn([n], options));
                let seed = Tensor::randn([2, rows, n], options);
                let view = |w: &Tensor| if turned { w.transpose(0, 1) } else { w.shallow_clone() };
                let grads = |y: &Tensor, seed: &Tensor, of: &[&Tensor]| {
                    Tensor::run_backward(&[(y * seed).sum(None)], of, false, false)
                };
                let w = view(&kept);
                if !takes(&x, &w) {
                    assert!(2 * rows < LEAST_ROWS);
                    continue;
                }
                let y = linear(&x, &w, Some(&b)).unwrap();
                let without = linear(&x, &w, None).unwrap();
                let ours = grads(&y, &seed, &[&x, &kept, &b]);
                assert_eq!(ours[1].stride(), kept.stride());
                let [x, kept, b] = [&x, &kept, &b].map(|t| leaf(t.to_kind(Kind::Double)));
                let plain = x.matmul(&view(&kept));
                let expected = &plain + &b;
                assert!(relative(&y, &expected) < 2e-6, "{}", relative(&y, &expected));
                assert!(relative(&without, &plain) < 2e-6);
                let theirs = grads(&expected, &seed.to_kind(Kind::Double), &[&x, &kept, &b]);
                for (a, b) in ours.iter().zip(&theirs) {
                    assert!(relative(a, b) < 2e-6, "{rows} {k} {n}: {}", relative(a, b));
                }
            }
        }
    }

    /// The gradient of a gradient's norm, as gradient penalties take it.
    #[test]
    fn differentiable_twice() {
        if !has_products() {
            return;
        }
        let options = (Kind::Float, Device::Cpu);
        let (x, w) = (leaf(Tensor::randn([32, 20], options)), leaf(Tensor::randn([20, 24], options)));
        let second = |product: &dyn Fn(&Tensor, &Tensor) -> Tensor| {
            let y = product(&x, &w).square().sum(Kind::Float);
            let first = Tensor::run_backward(&[y], &[&x], true, true);
            Tensor::run_backward(&[first[0].square().sum(Kind::Float)], &[&w], false, false).remove(0)
        };
        let ours = second(&|x, w| linear(x, w, None).unwrap());
        let theirs = second(&|x, w| x.matmul(w));
        assert!(relative(&ours, &theirs.to_kind(Kind::Double)) < 1e-5);
    }

    /// The tests of all three kernels again, in a process that is told to do without AVX-512.
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn avx2_alone_computes_the_same() {
        const LIMIT: &str = "ATEN_CPU_CAPABILITY";
        let has = std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma");
        if std::env::var_os(LIMIT).is_some() {
            let asked = std::env::var(LIMIT).unwrap();
            assert!(!(asked == "avx2" && has) || level() == Level::Avx2, "{:?}", level());
            assert!(asked != "default" || level() == Level::None, "{:?}", level());
            return;
        }
        if !has {
            return;
        }
        let again = std::process::Command::new(std::env::current_exe().unwrap())
            .env(LIMIT, "avx2")
            .args(["torch::cpu::linear::", "torch::cpu::winograd::", "torch::cpu::group_norm::"])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&again.stdout);
        assert!(again.status.success() && text.contains("avx2_alone_computes_the_same ... ok"), "{text}");
    }

    #[test]
    fn loops_are_shared_among_the_threads_of_libtorch() {
        unsafe extern "C" {
            fn disback_has_threads() -> bool;
        }
        // SAFETY: asks the loader.
        assert!(unsafe { disback_has_threads() }, "no OpenMP runtime found: parallel.h runs on one thread");
    }

    #[test]
    fn what_is_small_or_of_another_kind_goes_the_usual_way() {
        let t = |shape: &[i64], kind| Tensor::ones(shape, (kind, Device::Cpu));
        assert!(!pays(&t(&[4, 64], Kind::Float), &t(&[64, 64], Kind::Float)));
        assert!(!pays(&t(&[64, 64], Kind::Double), &t(&[64, 64], Kind::Double)));
        assert!(!pays(&t(&[64, 8], Kind::Float), &t(&[8, 64], Kind::Float)));
        assert!(!pays(&t(&[64, 64], Kind::Float), &t(&[2, 64, 64], Kind::Float)));
        assert!(!pays(&t(&[64], Kind::Float), &t(&[64, 64], Kind::Float)));
        assert_eq!(matmul(&t(&[64, 64], Kind::Float), &t(&[64, 32], Kind::Float)).unwrap().double_value(&[3, 3]), 64.0);
        assert_eq!(matmul(&t(&[4, 64], Kind::Float), &t(&[64], Kind::Float)).unwrap().size(), [4]);
    }
}
