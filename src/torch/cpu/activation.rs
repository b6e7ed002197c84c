//! Activations that libtorch computes slower than the processor could, through `activation.cpp`.

use std::ffi::c_char;

use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use crate::error::Result;
use crate::torch::shim::check;

unsafe extern "C" {
    fn disback_gelu_tanh(x: *const C_tensor, out: *mut *mut C_tensor) -> *mut c_char;
}

/// `x Phi(x)`; `approximate` is `none` or `tanh`, as libtorch has it.
pub fn gelu(x: &Tensor, approximate: &str) -> Result<Tensor> {
    let ours = approximate == "tanh" && x.device() == Device::Cpu && matches!(x.kind(), Kind::Float | Kind::BFloat16);
    if !ours {
        return Ok(x.f_gelu(approximate)?);
    }
    let mut out = std::ptr::null_mut();
    // SAFETY: a live tensor in; on success `out` is a new handle that is ours.
    check(unsafe { disback_gelu_tanh(x.as_ptr(), &mut out) })?;
    Ok(unsafe { Tensor::from_ptr(out) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gelu_and_its_gradient_are_those_of_f64() {
        // 16 lanes and a rest; both far ends, where exponentials overflow; the origin.
        let mut values: Vec<f32> = (-500..500).map(|k| k as f32 * 0.02).collect();
        values.extend([0.0, -0.0, 30.0, -30.0, 1e4, -1e4, 1e19, -1e19, f32::MIN_POSITIVE]);
        let x = Tensor::from_slice(&values).set_requires_grad(true);
        let y = gelu(&x, "tanh").unwrap();
        let wide = Tensor::from_slice(&values).to_kind(Kind::Double).set_requires_grad(true);
        let expected = wide.gelu("tanh");
        let near = |a: &Tensor, b: &Tensor| {
            let apart = (a.to_kind(Kind::Double) - b).abs();
            let bound = b.abs() * 3e-6 + 2e-7;
            apart.le_tensor(&bound).all().int64_value(&[]) == 1
        };
        assert!(near(&y, &expected));
        let seed = Tensor::linspace(0.5, 1.5, values.len() as i64, (Kind::Float, Device::Cpu));
        (&y * &seed).sum(None).backward();
        // Past 1e9 the cube overflows f64's own form in nothing, f32's slope in infinity: values only.
        (&expected * seed.to_kind(Kind::Double)).sum(None).backward();
        let (ours, theirs) = (x.grad().narrow(0, 0, 1006), wide.grad().narrow(0, 0, 1006));
        assert!(near(&ours, &theirs), "{:?}", (ours.to_kind(Kind::Double) - theirs).abs().max());
        let nan = gelu(&Tensor::from_slice(&[f32::NAN, 1.0]), "tanh").unwrap();
        assert!(nan.double_value(&[0]).is_nan() && !nan.double_value(&[1]).is_nan());
        // Other forms go libtorch's way.
        assert!(gelu(&x, "none").unwrap().equal(&x.gelu("none")));
    }

    /// In bf16 the values and slopes of f32, rounded once: 2^-8 of each, and bf16's own type.
    #[test]
    fn gelu_in_bf16_is_that_of_f64_rounded() {
        let x = (Tensor::arange(1001, (Kind::Float, Device::Cpu)) * 0.02 - 10.0).to_kind(Kind::BFloat16);
        let x = x.set_requires_grad(true);
        let wide = x.detach().to_kind(Kind::Double).set_requires_grad(true);
        let (y, expected) = (gelu(&x, "tanh").unwrap(), wide.gelu("tanh"));
        y.sum(Kind::BFloat16).backward();
        expected.sum(Kind::Double).backward();
        for (ours, theirs) in [(y.detach(), expected.detach()), (x.grad(), wide.grad())] {
            assert_eq!(ours.kind(), Kind::BFloat16);
            let apart = (ours.to_kind(Kind::Double) - &theirs).abs();
            assert_eq!(apart.le_tensor(&(theirs.abs() / 256.0 + 2e-7)).all().int64_value(&[]), 1, "{:?}", apart.max());
        }
    }
}
