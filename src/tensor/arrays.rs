//! `ndarray` arrays to and from [`HostTensor`], the type of arrays at the public border.

use bytemuck::checked::CheckedCastError;
use bytes::Bytes;
use ndarray::{Array, ArrayViewD, CowArray, Dimension, IxDyn};

use super::{Element, HostTensor};
use crate::error::{Error, Result};

/// The elements of an array, kept alive by the bytes that are made of them.
struct Owner<T>(Vec<T>);

impl<T: Element> AsRef<[u8]> for Owner<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

/// Row-major little-endian bytes of the elements, which are taken over where the machine itself is little-endian.
pub(super) fn bytes_of<T: Element>(values: Vec<T>) -> Bytes {
    if cfg!(target_endian = "little") {
        return Bytes::from_owner(Owner(values));
    }
    let mut data = Vec::with_capacity(std::mem::size_of_val(values.as_slice()));
    values.into_iter().for_each(|v| v.append_le(&mut data));
    data.into()
}

/// From an array of any number of dimensions. An array in standard (row-major) order hands its memory over; of any other
/// order, or where it owns more than it shows, the elements are copied in row-major order.
impl<T: Element, D: Dimension> From<Array<T, D>> for HostTensor {
    fn from(array: Array<T, D>) -> Self {
        let shape = array.shape().to_vec();
        let whole = array.is_standard_layout();
        let values = match whole {
            true => {
                let len = array.len();
                let (values, offset) = array.into_raw_vec_and_offset();
                let start = offset.unwrap_or(0);
                if start == 0 && values.len() == len { values } else { values[start..start + len].to_vec() }
            }
            false => array.iter().copied().collect(),
        };
        Self { dtype: T::DTYPE, shape, data: bytes_of(values) }
    }
}

impl HostTensor {
    /// The elements as an array, without a copy where the tensor's memory allows it: on a little-endian machine, aligned for
    /// `T` (what [`HostTensor::from`] took over always is; a part of a mapped file may not be). Else they are copied.
    /// `.into_owned()` makes an `ArrayD` that lives on its own. An error where the element type is not exactly `T`.
    ///
    /// ```
    /// # use disback::HostTensor;
    /// let tensor = HostTensor::new(&[2, 2], &[1.0f32, 2.0, 3.0, 4.0])?;
    /// assert_eq!(tensor.array::<f32>()?[[1, 0]], 3.0);
    /// assert!(tensor.array::<f64>().is_err());
    /// # Ok::<(), disback::Error>(())
    /// ```
    pub fn array<T: Element>(&self) -> Result<CowArray<'_, T, IxDyn>> {
        let wrong = |e: ndarray::ShapeError| Error::invalid(format!("an array of shape {:?}: {e}", self.shape));
        match self.elements::<T>()? {
            Ok(values) => Ok(ArrayViewD::from_shape(self.shape.as_slice(), values).map_err(wrong)?.into()),
            Err(_) => {
                Ok(ndarray::ArrayD::from_shape_vec(self.shape.as_slice(), self.values::<T>()?).map_err(wrong)?.into())
            }
        }
    }

    /// The elements as an array that is never a copy. An error where the element type is not exactly `T`, and where the
    /// tensor's memory cannot be read as `T` in place (see [`HostTensor::array`], which then copies).
    pub fn array_view<T: Element>(&self) -> Result<ArrayViewD<'_, T>> {
        let values = self.elements::<T>()?.map_err(|why| {
            Error::unsupported(format!("{self:?} cannot be seen in place as {}: {why}", T::DTYPE))
                .hint("HostTensor::array copies where it has to")
        })?;
        ArrayViewD::from_shape(self.shape.as_slice(), values)
            .map_err(|e| Error::invalid(format!("an array of shape {:?}: {e}", self.shape)))
    }

    /// The elements in place; the inner error says why they cannot be seen so.
    fn elements<T: Element>(&self) -> Result<std::result::Result<&[T], &'static str>> {
        if self.dtype != T::DTYPE {
            return Err(Error::mismatch(format!("a tensor of {}, expected {}", self.dtype, T::DTYPE))
                .hint(format!("HostTensor::cast(DType::{:?}) converts the elements", T::DTYPE)));
        }
        if cfg!(target_endian = "big") && self.dtype.size() > 1 {
            return Ok(Err("its bytes are little-endian, this machine is not"));
        }
        if self.data.is_empty() {
            return Ok(Ok(&[]));
        }
        Ok(bytemuck::checked::try_cast_slice(&self.data).map_err(|e| match e {
            CheckedCastError::InvalidBitPattern => "a byte is neither 0 nor 1",
            CheckedCastError::PodCastError(_) => "its memory is not aligned for the element type",
        }))
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use ndarray::{Array1, Array2, Array3, ArrayD, array, s};

    use super::super::DType;
    use super::*;

    /// Memory is handed over and seen in place: the same addresses all the way.
    #[test]
    fn no_copy_is_made_where_none_is_needed() {
        let original = Array3::from_shape_fn((2, 3, 4), |(i, j, k)| (100 * i + 10 * j + k) as f32);
        let at = original.as_ptr();
        let tensor = HostTensor::from(original.clone());
        assert_ne!(tensor.bytes().as_ptr(), at.cast(), "a clone has its own memory");
        let tensor = HostTensor::from(original);
        assert_eq!((tensor.bytes().as_ptr(), tensor.dtype(), tensor.shape()), (at.cast(), DType::F32, &[2, 3, 4][..]));
        let view = tensor.array_view::<f32>().unwrap();
        assert_eq!((view.as_ptr(), view[[1, 2, 3]]), (at, 123.0));
        let array = tensor.array::<f32>().unwrap();
        assert!(array.is_view() && array.as_ptr() == at);
        // Rows of a tensor, another shape of it and a clone share its memory too.
        let rows = tensor.rows(1, 1).unwrap().reshaped(&[3, 4]).unwrap();
        assert_eq!(rows.array_view::<f32>().unwrap().as_ptr(), at.wrapping_add(12));
        let owned: ArrayD<f32> = array.into_owned();
        assert_ne!(owned.as_ptr(), at);
        assert_eq!(owned, tensor.array_view::<f32>().unwrap());
        drop(tensor);
        assert_eq!(rows.array_view::<f32>().unwrap()[[2, 3]], 123.0);
    }

    #[test]
    fn other_orders_are_copied_in_row_major_order() {
        let a = Array2::from_shape_fn((2, 3), |(i, j)| (10 * i + j) as i64);
        assert_eq!(HostTensor::from(a.t().to_owned()), HostTensor::new(&[3, 2], &[0i64, 10, 1, 11, 2, 12]).unwrap());
        assert_eq!(HostTensor::from(a.clone().reversed_axes()).shape(), [3, 2]);
        let cut = a.clone().slice_move(s![1.., ..]);
        assert_eq!(HostTensor::from(cut), HostTensor::new(&[1, 3], &[10i64, 11, 12]).unwrap());
        let cut = a.clone().slice_move(s![.., 1..]);
        assert_eq!(HostTensor::from(cut), HostTensor::new(&[2, 2], &[1i64, 2, 11, 12]).unwrap());
        let back = a.slice_move(s![..;-1, ..]);
        assert_eq!(HostTensor::from(back), HostTensor::new(&[2, 3], &[10i64, 11, 12, 0, 1, 2]).unwrap());
        let scalar = HostTensor::from(ndarray::arr0(2.5f64));
        assert_eq!((scalar.rank(), scalar.array::<f64>().unwrap()[[]]), (0, 2.5));
        let none = HostTensor::from(Array2::<f32>::zeros((0, 5)));
        assert_eq!((none.len(), none.array_view::<f32>().unwrap().shape()), (0, &[0, 5][..]));
    }

    #[test]
    fn every_element_type_comes_back_and_only_as_itself() {
        fn round<T: Element + PartialEq + std::fmt::Debug>(values: Vec<T>) {
            let tensor = HostTensor::from(Array1::from(values.clone()));
            assert_eq!(tensor, HostTensor::vec(&values), "{}", T::DTYPE);
            assert_eq!(tensor.array::<T>().unwrap().iter().copied().collect::<Vec<_>>(), values);
            assert_eq!(tensor.values::<T>().unwrap(), values);
        }
        round(vec![1.5f32, -0.0, f32::INFINITY]);
        round(vec![1.5f64, -2.25]);
        round(vec![f16::from_f32(1.5), f16::MIN]);
        round(vec![bf16::from_f32(-3.0)]);
        round(vec![-1i8, 5]);
        round(vec![-300i16]);
        round(vec![i32::MIN]);
        round(vec![i64::MAX, -1]);
        round(vec![255u8]);
        round(vec![65535u16]);
        round(vec![u32::MAX]);
        round(vec![u64::MAX]);
        round(vec![true, false]);
        let error = HostTensor::vec(&[1i32]).array_view::<f32>().unwrap_err().to_string();
        assert!(error.contains("a tensor of i32, expected f32"), "{error}");
    }

    /// Bytes of a file may lie anywhere, and hold anything.
    #[test]
    fn what_cannot_be_seen_in_place_is_copied() {
        let mut raw = Vec::new();
        array![1.0f32, 2.0].iter().for_each(|v| v.append_le(&mut raw));
        // Memory that is aligned for f32, read from its second byte on.
        let mut words = [vec![0u8], raw, vec![0; 3]].concat();
        words.resize(12, 0);
        let aligned = bytes_of(bytemuck::pod_collect_to_vec::<u8, u32>(&words));
        let odd = aligned.slice(1..9);
        let tensor = HostTensor::from_bytes(DType::F32, vec![2], odd).unwrap();
        let error = tensor.array_view::<f32>().unwrap_err().to_string();
        assert!(error.contains("not aligned"), "{error}");
        assert!(!tensor.array::<f32>().unwrap().is_view());
        assert_eq!(tensor.array::<f32>().unwrap(), array![1.0f32, 2.0].into_dyn());
        let flags = HostTensor::from_bytes(DType::Bool, vec![2], Bytes::from_static(&[0, 7])).unwrap();
        assert!(flags.array_view::<bool>().unwrap_err().to_string().contains("neither 0 nor 1"));
        assert_eq!(flags.array::<bool>().unwrap(), array![false, true].into_dyn());
    }
}
