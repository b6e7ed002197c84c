//! Tensors across the border to ONNX Runtime. Inputs are views of our bytes; outputs are copied once.

use half::{bf16, f16};
use ort::session::SessionInputValue;
use ort::value::{DynValue, Tensor, TensorElementType, TensorRef, ValueType};

use crate::error::{Context, Error, Result};
use crate::runtime::{Dim, ValueInfo};
use crate::tensor::{DType, HostTensor};

fn dtype_of(ty: TensorElementType) -> Result<DType> {
    use TensorElementType as T;
    Ok(match ty {
        T::Float32 => DType::F32,
        T::Float64 => DType::F64,
        T::Float16 => DType::F16,
        T::Bfloat16 => DType::BF16,
        T::Int8 => DType::I8,
        T::Int16 => DType::I16,
        T::Int32 => DType::I32,
        T::Int64 => DType::I64,
        T::Uint8 => DType::U8,
        T::Uint16 => DType::U16,
        T::Uint32 => DType::U32,
        T::Uint64 => DType::U64,
        T::Bool => DType::Bool,
        other => return Err(Error::unsupported(format!("element type {other}"))),
    })
}

/// Name, type and shape of a session's input or output.
pub fn value_info(outlet: &ort::value::Outlet) -> Result<ValueInfo> {
    let ValueType::Tensor { ty, shape, dimension_symbols } = outlet.dtype() else {
        return Err(Error::unsupported(format!("`{}` is not a tensor but {}", outlet.name(), outlet.dtype())));
    };
    let dims = shape.iter().enumerate().map(|(k, &d)| match usize::try_from(d) {
        Ok(n) => Dim::Fixed(n),
        Err(_) => Dim::Symbol(dimension_symbols.get(k).cloned().unwrap_or_default()),
    });
    Ok(ValueInfo {
        name: outlet.name().to_string(),
        dtype: dtype_of(*ty).context(outlet.name())?,
        shape: dims.collect(),
    })
}

macro_rules! by_dtype {
    ($dtype:expr, $go:ident!($($arg:expr),*), $bool:expr) => {
        match $dtype {
            DType::F32 => $go!(f32, $($arg),*),
            DType::F64 => $go!(f64, $($arg),*),
            DType::F16 => $go!(f16, $($arg),*),
            DType::BF16 => $go!(bf16, $($arg),*),
            DType::I8 => $go!(i8, $($arg),*),
            DType::I16 => $go!(i16, $($arg),*),
            DType::I32 => $go!(i32, $($arg),*),
            DType::I64 => $go!(i64, $($arg),*),
            DType::U8 => $go!(u8, $($arg),*),
            DType::U16 => $go!(u16, $($arg),*),
            DType::U32 => $go!(u32, $($arg),*),
            DType::U64 => $go!(u64, $($arg),*),
            DType::Bool => $bool,
        }
    };
}

/// An input that borrows the tensor's bytes where they are aligned (little-endian hosts), else a copy.
pub fn input(tensor: &HostTensor) -> Result<SessionInputValue<'_>> {
    macro_rules! go {
        ($t:ty, $x:expr) => {
            match bytemuck::try_cast_slice::<u8, $t>($x.bytes()) {
                Ok(view) if cfg!(target_endian = "little") && !view.is_empty() => {
                    TensorRef::<$t>::from_array_view(($x.shape().to_vec(), view))?.into()
                }
                _ => Tensor::<$t>::from_array(($x.shape().to_vec(), $x.values::<$t>()?))?.into(),
            }
        };
    }
    let bools = || -> Result<SessionInputValue<'_>> {
        Ok(Tensor::<bool>::from_array((tensor.shape().to_vec(), tensor.values::<bool>()?))?.into())
    };
    Ok(by_dtype!(tensor.dtype(), go!(tensor), bools()?))
}

/// The same as a value that owns its data, for binding.
pub fn owned(tensor: &HostTensor) -> Result<DynValue> {
    macro_rules! go {
        ($t:ty, $x:expr) => {
            Tensor::<$t>::from_array(($x.shape().to_vec(), $x.values::<$t>()?))?.into_dyn()
        };
    }
    let bools = || -> Result<DynValue> {
        Ok(Tensor::<bool>::from_array((tensor.shape().to_vec(), tensor.values::<bool>()?))?.into_dyn())
    };
    Ok(by_dtype!(tensor.dtype(), go!(tensor), bools()?))
}

/// An output, copied.
pub fn output(value: &DynValue) -> Result<HostTensor> {
    let ty = value.dtype().tensor_type().ok_or_else(|| Error::unsupported("an output that is not a tensor"))?;
    let dims = |shape: &[i64]| -> Vec<usize> { shape.iter().map(|&d| d.max(0) as usize).collect() };
    macro_rules! go {
        ($t:ty, $x:expr) => {{
            let (shape, values) = $x.try_extract_tensor::<$t>()?;
            if cfg!(target_endian = "little") {
                let bytes = bytes::Bytes::copy_from_slice(bytemuck::cast_slice::<$t, u8>(values));
                HostTensor::from_bytes(dtype_of(ty)?, dims(shape), bytes)
            } else {
                HostTensor::new(&dims(shape), values)
            }
        }};
    }
    let bools = || -> Result<HostTensor> {
        let (shape, values) = value.try_extract_tensor::<bool>()?;
        HostTensor::new(&dims(shape), values)
    };
    by_dtype!(dtype_of(ty)?, go!(value), bools())
}
