//! 3x3 convolutions on the CPU with fewer multiplications, through `winograd.cpp`.

use std::ffi::c_char;

use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use crate::error::{Error, Result};
use crate::torch::cpu::linear::has_products;
use crate::torch::shim::check;

unsafe extern "C" {
    fn disback_winograd(
        x: *const C_tensor,
        w: *const C_tensor,
        bias: *const C_tensor,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
}

/// Channels from which, and tiles of 2x2 outputs from which, the products saved outweigh the transforms; measured with
/// `gemm.cpp`'s products, without which libtorch's direct convolution is taken.
const LEAST_CHANNELS: i64 = 16;
const LEAST_TILES: i64 = 28;
/// Channels up to which widened operands are convolved faster than those of bf16 by libtorch's direct convolution.
const MOST_NARROW_CHANNELS: i64 = 128;

/// Whether [`convolution`] can convolve `x [N,C,H,W]` with `w [K,C,3,3]` (stride 1, padding 1, one group) and is
/// expected to be faster than libtorch there.
pub fn pays(x: &Tensor, w: &Tensor) -> bool {
    let narrow = match (x.kind(), w.kind()) {
        (Kind::Float, Kind::Float) => false,
        (Kind::BFloat16, Kind::BFloat16) => true,
        _ => return false,
    };
    if x.device() != Device::Cpu || !has_products() {
        return false;
    }
    match (x.size().as_slice(), w.size().as_slice()) {
        (&[n, c, height, width], &[k, c2, 3, 3]) => {
            let channels = c == c2 && c.min(k) >= LEAST_CHANNELS && c % 16 == 0 && k % 16 == 0;
            let channels = channels && !(narrow && c.max(k) > MOST_NARROW_CHANNELS);
            channels && height % 2 == 0 && width % 2 == 0 && n * (height / 2) * (width / 2) >= LEAST_TILES
        }
        _ => false,
    }
}

/// `x [N,C,H,W]` with filters `w [K,C,3,3]` and a bias `[K]`, padded by one: channels-last `[N,K,H,W]`, differentiable
/// once. For tensors that [`pays`] accepts.
///
/// Errors: tensors of other types, devices or sizes.
pub fn convolution(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    if !pays(x, w) {
        return Err(Error::mismatch(format!(
            "x {:?} {:?} and w {:?} {:?} are no operands of the CPU's convolution: f32 or bf16 [N, C, H, W] and [K, C, 3, 3] are, \
             with even sides and multiples of 16 channels",
            x.kind(),
            x.size(),
            w.kind(),
            w.size()
        )));
    }
    let bias = bias.map_or(std::ptr::null(), Tensor::as_ptr);
    let mut out = std::ptr::null_mut();
    // SAFETY: live tensors in; on success `out` is a new handle that is ours.
    check(unsafe { disback_winograd(x.as_ptr(), w.as_ptr(), bias, &mut out) })?;
    Ok(unsafe { Tensor::from_ptr(out) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn relative(a: &Tensor, b: &Tensor) -> f64 {
        let apart = (a.to_kind(Kind::Double) - b).norm().double_value(&[]);
        apart / b.norm().double_value(&[])
    }

    /// Values and all gradients against the direct convolution in f64.
    #[test]
    fn values_and_gradients_are_those_of_the_direct_convolution() {
        if !has_products() {
            return;
        }
        tch::manual_seed(3);
        let options = (Kind::Float, Device::Cpu);
        // The last has more tiles than are done at a time.
        for (n, c, k, height, width) in
            [(2, 64, 80, 16, 18), (3, 96, 64, 14, 10), (5, 512, 64, 32, 16), (40, 48, 32, 2, 2), (19, 16, 112, 4, 2)]
        {
            for last in [false, true] {
                let leaf = |t: Tensor| t.detach().set_requires_grad(true);
                let x = Tensor::randn([n, c, height, width], options);
                // The format of the input in memory makes no difference.
                let x = leaf(if last { x.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2]) } else { x });
                let (w, b) = (leaf(Tensor::randn([k, c, 3, 3], options)), leaf(Tensor::randn([k], options)));
                assert!(pays(&x, &w));
                let seed = Tensor::randn([n, k, height, width], options);
                let grads = |y: &Tensor, seed: &Tensor, of: &[&Tensor]| {
                    Tensor::run_backward(&[(y * seed).sum(None)], of, false, false)
                };
                let y = convolution(&x, &w, Some(&b)).unwrap();
                let ours = grads(&y, &seed, &[&x, &w, &b]);
                let [x, w, b] = [&x, &w, &b].map(|t| leaf(t.to_kind(Kind::Double)));
                let expected = x.conv2d(&w, Some(&b), [1, 1], [1, 1], [1, 1], 1);
                assert!(relative(&y, &expected) < 1.5e-6, "{}", relative(&y, &expected));
                let theirs = grads(&expected, &seed.to_kind(Kind::Double), &[&x, &w, &b]);
                for (a, b) in ours.iter().zip(&theirs) {
                    assert!(relative(a, b) < 1.5e-6, "{n} {c} {k}: {}", relative(a, b));
                }
            }
        }
    }

    /// In bf16 the values and gradients of f64 on the same operands, rounded once: 2^-9 of each at most.
    #[test]
    fn in_bf16_values_and_gradients_are_those_of_f64_rounded() {
        if !has_products() {
            return;
        }
        tch::manual_seed(4);
        let leaf = |t: Tensor| t.detach().set_requires_grad(true);
        let draw = |shape: &[i64]| leaf(Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(Kind::BFloat16));
        for (n, height) in [(3, 8), (40, 2)] {
            let (x, w, b) = (draw(&[n, 32, height, height]), draw(&[64, 32, 3, 3]), draw(&[64]));
            let seed = draw(&[n, 64, height, height]).detach();
            assert!(pays(&x, &w));
            let grads = |y: &Tensor, seed: &Tensor, of: &[&Tensor]| {
                Tensor::run_backward(&[(y * seed).sum(None)], of, false, false)
            };
            let y = convolution(&x, &w, Some(&b)).unwrap();
            assert_eq!(y.kind(), Kind::BFloat16);
            let ours = grads(&y, &seed, &[&x, &w, &b]);
            let [x, w, b] = [&x, &w, &b].map(|t| leaf(t.to_kind(Kind::Double)));
            let expected = x.conv2d(&w, Some(&b), [1, 1], [1, 1], [1, 1], 1);
            let theirs = grads(&expected, &seed.to_kind(Kind::Double), &[&x, &w, &b]);
            for (a, b) in std::iter::once((&y, &expected)).chain(ours.iter().zip(&theirs)) {
                assert_eq!(a.kind(), Kind::BFloat16);
                assert!(relative(a, b) < 1.0 / 512.0, "{n}: {}", relative(a, b));
            }
        }
    }

    #[test]
    fn without_a_bias_and_with_frozen_operands() {
        if !has_products() {
            return;
        }
        let options = (Kind::Float, Device::Cpu);
        let x = Tensor::randn([2, 64, 16, 16], options);
        let w = Tensor::randn([64, 64, 3, 3], options).set_requires_grad(true);
        let y = convolution(&x, &w, None).unwrap();
        y.sum(None).backward();
        assert!(w.grad().defined() && !x.requires_grad());
        let x = x.set_requires_grad(true);
        convolution(&x, &w.detach(), None).unwrap().sum(None).backward();
        let direct = x.conv2d(&w.detach(), None::<Tensor>, [1, 1], [1, 1], [1, 1], 1);
        let expected = Tensor::run_backward(&[direct.sum(None)], &[&x], false, false);
        assert!(relative(&x.grad(), &expected[0].to_kind(Kind::Double)) < 1e-6);
        assert!(!convolution(&x.detach(), &w.detach(), None).unwrap().requires_grad());
    }

    #[test]
    fn what_is_small_or_of_another_form_goes_the_usual_way() {
        let t = |shape: &[i64], kind| Tensor::zeros(shape, (kind, Device::Cpu));
        let w = t(&[64, 64, 3, 3], Kind::Float);
        assert_eq!(pays(&t(&[2, 64, 16, 16], Kind::Float), &w), has_products());
        for shape in [[2, 64, 15, 16], [1, 64, 8, 4], [2, 40, 16, 16]] {
            assert!(!pays(&t(&shape, Kind::Float), &w), "{shape:?}");
        }
        assert!(!pays(&t(&[2, 64, 16, 16], Kind::Double), &t(&[64, 64, 3, 3], Kind::Double)));
        assert!(!pays(&t(&[2, 64, 16, 16], Kind::Float), &t(&[64, 64, 1, 1], Kind::Float)));
        let wide = MOST_NARROW_CHANNELS + 16;
        assert!(!pays(&t(&[2, wide, 16, 16], Kind::BFloat16), &t(&[64, wide, 3, 3], Kind::BFloat16)));
        assert!(!pays(&t(&[2, 64, 16, 16], Kind::BFloat16), &t(&[64, 64, 3, 3], Kind::Float)));
    }
}
