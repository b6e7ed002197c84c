//! `TensorProto` to and from [`HostTensor`].

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::onnx::TensorProto;
use crate::tensor::{DType, HostTensor, checked_len};

/// The dense tensor of a proto whose external data is already resolved into `raw_data`. Raw bytes are shared, not copied.
///
/// Errors: string, complex, 8/4/2-bit and segmented tensors; negative or absurd dimensions; bytes that do not fit.
pub fn from_proto(t: &TensorProto) -> Result<HostTensor> {
    let name = || format!("tensor `{}`", t.name());
    let read = || -> Result<HostTensor> {
        let dtype = DType::from_onnx(t.data_type())?;
        if t.segment.is_some() {
            return Err(Error::unsupported("a tensor cut into segments"));
        }
        let shape = t
            .dims
            .iter()
            .map(|&d| {
                usize::try_from(d).map_err(|_| {
                    Error::invalid(format!("negative dimension in {:?}", t.dims))
                        .hint("weights have fixed sizes: export again")
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let len = checked_len(&shape)?;
        if let Some(raw) = &t.raw_data {
            return HostTensor::from_bytes(dtype, shape, raw.clone());
        }
        let fits = |n: usize| {
            if n == len {
                Ok(())
            } else {
                Err(Error::invalid(format!("{n} elements of data for {dtype}{shape:?}, expected {len}"))
                    .hint("shape and data belong to different tensors, or the file was cut short: export again"))
            }
        };
        let bytes: Vec<u8> = match dtype {
            DType::F32 => {
                fits(t.float_data.len())?;
                t.float_data.iter().flat_map(|v| v.to_le_bytes()).collect()
            }
            DType::F64 => {
                fits(t.double_data.len())?;
                t.double_data.iter().flat_map(|v| v.to_le_bytes()).collect()
            }
            DType::I64 => {
                fits(t.int64_data.len())?;
                t.int64_data.iter().flat_map(|v| v.to_le_bytes()).collect()
            }
            DType::U32 | DType::U64 => {
                fits(t.uint64_data.len())?;
                t.uint64_data.iter().flat_map(|v| v.to_le_bytes()[..dtype.size()].to_vec()).collect()
            }
            // Narrow integers, booleans and the bits of f16/bf16: one element an int32.
            _ => {
                fits(t.int32_data.len())?;
                t.int32_data.iter().flat_map(|v| v.to_le_bytes()[..dtype.size()].to_vec()).collect()
            }
        };
        HostTensor::from_bytes(dtype, shape, Bytes::from(bytes))
    };
    read().map_err(|e| e.context(name()))
}

/// A proto with raw data under the given name.
pub fn to_proto(name: &str, tensor: &HostTensor) -> TensorProto {
    TensorProto {
        dims: tensor.shape().iter().map(|&d| d as i64).collect(),
        data_type: Some(tensor.dtype().to_onnx()),
        name: Some(name.to_owned()),
        raw_data: Some(tensor.bytes().clone()),
        ..TensorProto::default()
    }
}
