//! Host tensors to and from libtorch.

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::tensor::{DType, HostTensor};

/// libtorch's name for an element type. Unsigned 16-, 32- and 64-bit integers, which libtorch barely computes with, are
/// widened to i64 on import.
pub fn kind(dtype: DType) -> Kind {
    match dtype {
        DType::F32 => Kind::Float,
        DType::F64 => Kind::Double,
        DType::F16 => Kind::Half,
        DType::BF16 => Kind::BFloat16,
        DType::I8 => Kind::Int8,
        DType::I16 => Kind::Int16,
        DType::I32 => Kind::Int,
        DType::I64 | DType::U16 | DType::U32 | DType::U64 => Kind::Int64,
        DType::U8 => Kind::Uint8,
        DType::Bool => Kind::Bool,
    }
}

/// Whether tensors of this kind hold floats.
pub fn is_float(kind: Kind) -> bool {
    matches!(kind, Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16)
}

/// The element type that a libtorch tensor has on the host.
pub fn dtype(kind: Kind) -> Result<DType> {
    Ok(match kind {
        Kind::Float => DType::F32,
        Kind::Double => DType::F64,
        Kind::Half => DType::F16,
        Kind::BFloat16 => DType::BF16,
        Kind::Int8 => DType::I8,
        Kind::Int16 => DType::I16,
        Kind::Int => DType::I32,
        Kind::Int64 => DType::I64,
        Kind::Uint8 => DType::U8,
        Kind::Bool => DType::Bool,
        other => return Err(Error::unsupported(format!("libtorch element type {other:?}"))),
    })
}

/// Copies a host tensor to libtorch on the CPU.
pub fn to_torch(t: &HostTensor) -> Result<Tensor> {
    let shape: Vec<i64> = t.shape().iter().map(|&d| d as i64).collect();
    let t = match t.dtype() {
        DType::U16 | DType::U32 | DType::U64 => t.cast(DType::I64),
        _ => t.clone(),
    };
    let kind = kind(t.dtype());
    if t.is_empty() {
        return Ok(Tensor::f_zeros(&shape[..], (kind, Device::Cpu))?);
    }
    Ok(Tensor::f_from_data_size(t.bytes(), &shape, kind)?)
}

/// A libtorch tensor on the host, sharing its memory where it lies there as it is: whoever holds the result must not change
/// the tensor.
pub fn to_host_shared(t: &Tensor) -> Result<HostTensor> {
    struct Held(Tensor, usize);
    impl AsRef<[u8]> for Held {
        fn as_ref(&self) -> &[u8] {
            // SAFETY: a contiguous tensor on the CPU of this many bytes, which this handle keeps alive.
            unsafe { std::slice::from_raw_parts(self.0.data_ptr().cast::<u8>(), self.1) }
        }
    }
    let dtype = dtype(t.kind())?;
    let bytes = t.numel() * dtype.size();
    if t.device() != Device::Cpu || !t.is_contiguous() || bytes == 0 {
        return to_host(t);
    }
    let shape = t.size().iter().map(|&d| d as usize).collect();
    HostTensor::from_bytes(dtype, shape, bytes::Bytes::from_owner(Held(t.detach(), bytes)))
}

/// Copies a libtorch tensor (from any device) to the host.
pub fn to_host(t: &Tensor) -> Result<HostTensor> {
    let dtype = dtype(t.kind())?;
    crate::torch::training::note_host_read();
    let host = t.detach().f_to_device(Device::Cpu)?.f_contiguous()?;
    let mut bytes = vec![0u8; host.numel() * dtype.size()];
    if !bytes.is_empty() {
        host.f_copy_data_u8(&mut bytes, host.numel())?;
    }
    HostTensor::from_bytes(dtype, host.size().iter().map(|&d| d as usize).collect(), bytes.into())
}

/// One number a sample of `rank` axes, f32 `[B, 1, ...]` on `device`, without waiting for the device.
pub fn column(values: &[f64], rank: usize, device: Device) -> Result<Tensor> {
    let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
    let mut size = vec![1i64; 1 + rank];
    size[0] = values.len() as i64;
    let host = Tensor::f_from_slice(&values)?.f_view(&size[..])?;
    super::device::send(&host, device)
}
