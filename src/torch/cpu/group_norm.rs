//! Group norm of channels-last f32 images on the CPU, through `group_norm.cpp`.

use std::ffi::c_char;

use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use crate::error::Result;
use crate::torch::cpu::linear::has_products;
use crate::torch::shim::check;

unsafe extern "C" {
    fn disback_group_norm(
        x: *const C_tensor,
        groups: i64,
        scale: *const C_tensor,
        bias: *const C_tensor,
        epsilon: f64,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
}

/// Whether the channels of a [N,C,H,W] lie side by side in memory, and not the columns.
pub fn is_channels_last(x: &Tensor) -> bool {
    match (x.size().as_slice(), x.stride().as_slice()) {
        (&[_, c, h, w], &[sn, sc, sh, sw]) => c > 1 && h * w > 1 && (sn, sc, sh, sw) == (c * h * w, 1, c * w, c),
        _ => false,
    }
}

/// `x [N,C,...]` normalised over each of `groups` groups of channels, then scaled and shifted by `[C]`: our own kernel for
/// channels-last images of f32 or bf16 that are as many as threads, else libtorch's.
pub fn group_norm(
    x: &Tensor,
    groups: i64,
    scale: Option<&Tensor>,
    bias: Option<&Tensor>,
    epsilon: f64,
) -> Result<Tensor> {
    let ours = |t: &Tensor| t.kind() == Kind::Float && t.device() == Device::Cpu;
    let fits = x.device() == Device::Cpu
        && matches!(x.kind(), Kind::Float | Kind::BFloat16)
        && scale.is_none_or(ours)
        && bias.is_none_or(ours)
        && has_products()
        && is_channels_last(x)
        && x.size()[1] % 16 == 0
        && x.size()[0] >= i64::from(tch::get_num_threads());
    if !fits {
        return Ok(x.f_group_norm(groups, scale, bias, epsilon, true)?);
    }
    let pointer = |t: Option<&Tensor>| t.map_or(std::ptr::null(), Tensor::as_ptr);
    let mut out = std::ptr::null_mut();
    // SAFETY: live tensors in; on success `out` is a new handle that is ours.
    check(unsafe { disback_group_norm(x.as_ptr(), groups, pointer(scale), pointer(bias), epsilon, &mut out) })?;
    Ok(unsafe { Tensor::from_ptr(out) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values and all gradients against libtorch's in f64, also where the mean is far from zero.
    #[test]
    fn values_and_gradients_are_those_of_f64() {
        tch::manual_seed(11);
        let options = (Kind::Float, Device::Cpu);
        let relative = |a: &Tensor, b: &Tensor| {
            let apart = (a.to_kind(Kind::Double) - b).norm().double_value(&[]);
            apart / b.norm().double_value(&[])
        };
        for (n, c, groups, h, w) in [(4, 16, 8, 8, 8), (8, 48, 8, 3, 5), (2, 128, 32, 2, 2), (3, 96, 1, 4, 4)] {
            for affine in [true, false] {
                let leaf = |t: Tensor| t.detach().set_requires_grad(true);
                let x = Tensor::randn([n, h, w, c], options).permute([0, 3, 1, 2]) * 0.5 + 3.0;
                let x = leaf(x);
                assert!(is_channels_last(&x));
                let scale = leaf(Tensor::randn([c], options));
                let bias = leaf(Tensor::randn([c], options));
                let seed = Tensor::randn([n, c, h, w], options);
                let given = |t: &Tensor| affine.then(|| t.shallow_clone());
                let y = group_norm(&x, groups, given(&scale).as_ref(), given(&bias).as_ref(), 1e-5).unwrap();
                let grads = |y: Tensor, of: &[&Tensor], seed: &Tensor| {
                    let of = if affine { of } else { &of[..1] };
                    Tensor::run_backward(&[(y * seed).sum(Kind::Double)], of, false, false)
                };
                let ours = grads(y.shallow_clone(), &[&x, &scale, &bias], &seed);
                let [x, scale, bias] = [&x, &scale, &bias].map(|t| leaf(t.to_kind(Kind::Double)));
                let expected = x.group_norm(groups, given(&scale).as_ref(), given(&bias).as_ref(), 1e-5, false);
                assert!(relative(&y, &expected) < 2e-6, "{}", relative(&y, &expected));
                let theirs = grads(expected, &[&x, &scale, &bias], &seed.to_kind(Kind::Double));
                for (a, b) in ours.iter().zip(&theirs) {
                    assert!(relative(a, b) < 5e-6, "{n} {c} {groups}: {}", relative(a, b));
                }
            }
        }
    }

    /// In bf16 the values and gradients of f64 on the same images, rounded once.
    #[test]
    fn in_bf16_values_and_gradients_are_those_of_f64_rounded() {
        tch::manual_seed(12);
        let options = (Kind::Float, Device::Cpu);
        let leaf = |t: Tensor| t.detach().set_requires_grad(true);
        let relative = |a: &Tensor, b: &Tensor| {
            let apart = (a.to_kind(Kind::Double) - b).norm().double_value(&[]);
            apart / b.norm().double_value(&[])
        };
        let x = leaf(Tensor::randn([4, 6, 6, 48], options).permute([0, 3, 1, 2]).to_kind(Kind::BFloat16));
        let (scale, bias) = (leaf(Tensor::randn([48], options)), leaf(Tensor::randn([48], options)));
        let seed = Tensor::randn([4, 48, 6, 6], options).to_kind(Kind::BFloat16);
        let y = group_norm(&x, 8, Some(&scale), Some(&bias), 1e-5).unwrap();
        let grads = |y: &Tensor, of: &[&Tensor], seed: &Tensor| {
            Tensor::run_backward(&[(y * seed).sum(Kind::Double)], of, false, false)
        };
        let ours = grads(&y, &[&x, &scale, &bias], &seed);
        assert_eq!([y.kind(), ours[0].kind(), ours[1].kind()], [Kind::BFloat16, Kind::BFloat16, Kind::Float]);
        let [x, scale, bias] = [&x, &scale, &bias].map(|t| leaf(t.to_kind(Kind::Double)));
        let expected = x.group_norm(8, Some(&scale), Some(&bias), 1e-5, false);
        let theirs = grads(&expected, &[&x, &scale, &bias], &seed.to_kind(Kind::Double));
        assert!(relative(&y, &expected) < 1.0 / 512.0);
        for (a, b) in ours.iter().zip(&theirs) {
            assert!(relative(a, b) < 1.0 / 512.0, "{}", relative(a, b));
        }
    }
}
