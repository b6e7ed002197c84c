//! One network on two devices: values and gradients on the CPU against those on CUDA.

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::{Tolerance, compare, tensors};
use crate::error::{Error, Result};
use crate::graph::Model;
use crate::tensor::HostTensor;
use crate::torch::{Forward, ImportOptions, Network, convert, device};

/// Largest relative L2 difference of a gradient between devices: reductions run in another order.
const GRADIENT_TOLERANCE: f64 = 1e-3;

/// Outcome of [`check`].
#[derive(Debug, Clone, Serialize)]
pub struct DeviceParity {
    /// Whether the output is within the tolerance, and the gradients within 0.001 of relative L2 difference.
    pub ok: bool,
    /// The device that was compared with the CPU, such as `cuda:0`.
    pub device: String,
    /// Largest difference of an output, over its standard deviation.
    pub output_max_rel: f64,
    /// Relative L2 difference of all gradients together.
    pub gradient_rel_l2: f64,
    /// Name of the parameter whose gradient differs most, relative to its size; gradients below 1e-6 of all together do
    /// not count, and where none counts it is empty.
    pub worst_parameter: String,
    /// That parameter's relative L2 difference.
    pub worst_gradient_rel_l2: f64,
}

struct Pass {
    output: HostTensor,
    gradients: Vec<(String, Tensor)>,
}

/// Forward and backward of `sum(output * R)`, R the same fixed noise on both devices.
fn pass(model: &Model, options: &ImportOptions, inputs: &[(String, HostTensor)], on: Device) -> Result<Pass> {
    let net = Network::import(model.clone(), options, on)?;
    net.params().set_requires_grad(true)?;
    let owned = tensors(inputs, on)?;
    let named: Vec<(&str, &Tensor)> = owned.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let outputs = net.forward(&named)?;
    let (_, out) = outputs.first().ok_or_else(|| Error::invalid("the graph has no outputs"))?;
    let noise = crate::noise::image_noise(0, u64::MAX, out.numel());
    let r = Tensor::f_from_slice(&noise)?.f_reshape(out.size())?.f_to_device(on)?;
    out.f_to_kind(Kind::Float)?.f_mul(&r)?.f_sum(Kind::Float)?.f_backward()?;
    let gradients = net
        .params()
        .iter()
        .filter(|(_, t)| t.grad().defined())
        .map(|(n, t)| Ok((n.to_owned(), t.grad().f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?)))
        .collect::<Result<_>>()?;
    Ok(Pass { output: convert::to_host(&out.f_to_device(Device::Cpu)?)?, gradients })
}

fn norm(t: &Tensor) -> Result<f64> {
    Ok(t.f_norm()?.f_double_value(&[])?)
}

/// Runs the model on the CPU and on `on` and compares.
pub fn check(
    model: &Model,
    options: &ImportOptions,
    inputs: &[(String, HostTensor)],
    on: Device,
    tolerance: Tolerance,
) -> Result<DeviceParity> {
    let (cpu, other) = (pass(model, options, inputs, Device::Cpu)?, pass(model, options, inputs, on)?);
    let output = compare("output", &other.output, &cpu.output, tolerance)?;
    let (mut apart, mut total) = (0.0, 0.0);
    let mut norms = Vec::new();
    for ((name, a), (_, b)) in other.gradients.iter().zip(&cpu.gradients) {
        let (d, n) = (norm(&a.f_sub(b)?)?, norm(b)?);
        apart += d * d;
        total += n * n;
        norms.push((name.clone(), d, n));
    }
    // A gradient that vanishes by construction (a bias before a norm) is rounding on both sides.
    let floor = 1e-6 * total.sqrt();
    let worst = norms.iter().filter(|(_, _, n)| *n > floor).map(|(name, d, n)| (name.clone(), d / n));
    let (worst_parameter, worst_gradient_rel_l2) = worst.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or_default();
    let gradient_rel_l2 = (apart / total.max(f64::MIN_POSITIVE)).sqrt();
    Ok(DeviceParity {
        ok: output.ok && gradient_rel_l2 <= GRADIENT_TOLERANCE && other.gradients.len() == cpu.gradients.len(),
        device: device::name(on),
        output_max_rel: output.max_rel,
        gradient_rel_l2,
        worst_parameter,
        worst_gradient_rel_l2,
    })
}
