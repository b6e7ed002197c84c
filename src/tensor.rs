//! Host tensors: what crosses the borders between the ONNX file, libtorch, the runtimes and files on disk. As [`ndarray`]
//! arrays they cross the border to whoever calls this library.

use std::fmt;

use bytemuck::{CheckedBitPattern, NoUninit};
use bytes::Bytes;
use half::{bf16, f16};

use crate::error::{Error, Result};

mod arrays;

/// Element types that a dense tensor can have here. ONNX's complex, string and sub-byte types are not among them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 single precision, 32 bits.
    F32,
    /// IEEE 754 double precision, 64 bits.
    F64,
    /// IEEE 754 half precision, 16 bits: 5 of exponent, 10 of mantissa.
    F16,
    /// bfloat16, 16 bits: 8 of exponent like f32, 7 of mantissa.
    BF16,
    /// Signed integer of 8 bits.
    I8,
    /// Signed integer of 16 bits.
    I16,
    /// Signed integer of 32 bits.
    I32,
    /// Signed integer of 64 bits.
    I64,
    /// Unsigned integer of 8 bits.
    U8,
    /// Unsigned integer of 16 bits.
    U16,
    /// Unsigned integer of 32 bits.
    U32,
    /// Unsigned integer of 64 bits.
    U64,
    /// True or false; one byte an element, 1 or 0.
    Bool,
}

impl DType {
    /// Bytes an element.
    pub fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 | Self::U64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::BF16 | Self::I16 | Self::U16 => 2,
            Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }

    /// Whether elements are floating-point numbers: f32, f64, f16 or bf16.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F64 | Self::F16 | Self::BF16)
    }

    /// f32 for f16 and bf16, which are computed in f32; every other type stays itself.
    pub fn widened(self) -> Self {
        if matches!(self, Self::F16 | Self::BF16) { Self::F32 } else { self }
    }

    /// ONNX's number for it (`TensorProto.DataType`).
    pub fn to_onnx(self) -> i32 {
        match self {
            Self::F32 => 1,
            Self::U8 => 2,
            Self::I8 => 3,
            Self::U16 => 4,
            Self::I16 => 5,
            Self::I32 => 6,
            Self::I64 => 7,
            Self::Bool => 9,
            Self::F16 => 10,
            Self::F64 => 11,
            Self::U32 => 12,
            Self::U64 => 13,
            Self::BF16 => 16,
        }
    }

    /// The inverse of [`DType::to_onnx`]; an error names the ONNX types that have no dense host form here.
    pub fn from_onnx(code: i32) -> Result<Self> {
        Ok(match code {
            1 => Self::F32,
            2 => Self::U8,
            3 => Self::I8,
            4 => Self::U16,
            5 => Self::I16,
            6 => Self::I32,
            7 => Self::I64,
            9 => Self::Bool,
            10 => Self::F16,
            11 => Self::F64,
            12 => Self::U32,
            13 => Self::U64,
            16 => Self::BF16,
            8 => {
                return Err(Error::unsupported("element type string")
                    .hint("texts are turned into numbers before the network: export what follows the tokenizer"));
            }
            14 | 15 => {
                return Err(Error::unsupported("complex element type")
                    .hint("export real and imaginary parts as two real tensors"));
            }
            17..=26 => {
                return Err(Error::unsupported(format!("8-, 4- or 2-bit element type (ONNX type {code})"))
                    .hint("export the network before it is quantised"));
            }
            _ => {
                return Err(Error::invalid(format!("unknown element type {code}"))
                    .hint("the file is damaged, or written for a newer ONNX than this version knows"));
            }
        })
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::I8 => "i8",
            Self::I16 => "i16",
            Self::I32 => "i32",
            Self::I64 => "i64",
            Self::U8 => "u8",
            Self::U16 => "u16",
            Self::U32 => "u32",
            Self::U64 => "u64",
            Self::Bool => "bool",
        })
    }
}

/// A Rust type that is the element of a [`HostTensor`].
pub trait Element: Copy + Send + Sync + NoUninit + CheckedBitPattern + 'static {
    /// The tensor element type that this Rust type stands for.
    const DTYPE: DType;
    /// Appends the value's little-endian bytes, as many as [`DType::size`] says.
    fn append_le(self, out: &mut Vec<u8>);
    /// Reads a value from its little-endian bytes. Panics where their number is not [`DType::size`].
    fn read_le(bytes: &[u8]) -> Self;
}

macro_rules! element {
    ($($t:ty => $d:ident),* $(,)?) => {$(
        impl Element for $t {
            const DTYPE: DType = DType::$d;
            fn append_le(self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
            fn read_le(bytes: &[u8]) -> Self {
                <$t>::from_le_bytes(bytes.try_into().expect("chunk of the element's size"))
            }
        }
    )*};
}
element!(f32 => F32, f64 => F64, f16 => F16, bf16 => BF16, i8 => I8, i16 => I16, i32 => I32, i64 => I64, u8 => U8,
    u16 => U16, u32 => U32, u64 => U64);

impl Element for bool {
    const DTYPE: DType = DType::Bool;
    fn append_le(self, out: &mut Vec<u8>) {
        out.push(u8::from(self));
    }
    fn read_le(bytes: &[u8]) -> Self {
        bytes[0] != 0
    }
}

/// A dense, row-major tensor in host memory (or in a memory-mapped file): element type, shape, little-endian bytes.
/// Cloning is cheap: the bytes are shared.
#[derive(Clone, PartialEq)]
pub struct HostTensor {
    dtype: DType,
    shape: Vec<usize>,
    data: Bytes,
}

impl fmt::Debug for HostTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}", self.dtype, self.shape)?;
        if self.len() <= 16 { write!(f, " {:?}", self.to_f64()) } else { Ok(()) }
    }
}

/// Product of the dimensions, refusing what does not fit in memory addresses (a hostile file may claim 2^60). A dimension of 0 does not
/// make the others harmless: steps between elements are products of them.
pub fn checked_len(shape: &[usize]) -> Result<usize> {
    let whole = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d.max(1)));
    let Some(len) = whole.filter(|&n| n <= isize::MAX as usize / 8) else {
        return Err(Error::invalid(format!("a tensor of shape {shape:?} is larger than memory"))
            .hint("no exporter writes such a shape: the file is damaged, export again"));
    };
    Ok(if shape.contains(&0) { 0 } else { len })
}

impl HostTensor {
    /// From raw little-endian bytes; an error where their number does not fit the shape.
    pub fn from_bytes(dtype: DType, shape: Vec<usize>, data: Bytes) -> Result<Self> {
        let expected = checked_len(&shape)? * dtype.size();
        if data.len() != expected {
            return Err(Error::invalid(format!(
                "{} bytes of data for {dtype}{shape:?}, expected {expected}",
                data.len()
            ))
            .hint("shape and data belong to different tensors, or the file was cut short: export again"));
        }
        Ok(Self { dtype, shape, data })
    }

    /// From elements in row-major order.
    pub fn new<T: Element>(shape: &[usize], values: &[T]) -> Result<Self> {
        Self::from_bytes(T::DTYPE, shape.to_vec(), arrays::bytes_of(values.to_vec()))
    }

    /// A rank-0 tensor.
    pub fn scalar<T: Element>(value: T) -> Self {
        Self::new(&[], &[value]).expect("one element fits the empty shape")
    }

    /// A rank-1 tensor.
    pub fn vec<T: Element>(values: &[T]) -> Self {
        Self::new(&[values.len()], values).expect("the shape is taken from the values")
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
    /// Dimensions, outermost first; empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }
    /// Number of dimensions; 0 for a scalar.
    pub fn rank(&self) -> usize {
        self.shape.len()
    }
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.data.len() / self.dtype.size()
    }
    /// Whether it has no elements: one of its dimensions is 0.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }
    /// Row-major little-endian bytes.
    pub fn bytes(&self) -> &Bytes {
        &self.data
    }

    /// The elements, where the type is exactly `T`.
    pub fn values<T: Element>(&self) -> Result<Vec<T>> {
        if self.dtype != T::DTYPE {
            return Err(Error::mismatch(format!("a tensor of {}, expected {}", self.dtype, T::DTYPE)));
        }
        Ok(self.data.chunks_exact(self.dtype.size()).map(T::read_le).collect())
    }

    fn map<R>(&self, f: impl Fn(&[u8]) -> R) -> Vec<R> {
        self.data.chunks_exact(self.dtype.size()).map(f).collect()
    }

    /// Whether no element is NaN or infinite; looks at the bytes where they are, without a copy.
    pub fn is_finite(&self) -> bool {
        // All bits of the exponent set: NaN or infinity. Without a branch for each element, so that it runs in vectors.
        fn any<const N: usize>(bytes: &[u8], mask: u16) -> bool {
            let elements = bytes.as_chunks::<N>().0;
            elements.chunks(4096).any(|c| {
                c.iter().fold(false, |found, e| found | (u16::from_le_bytes([e[N - 2], e[N - 1]]) & mask == mask))
            })
        }
        !match self.dtype {
            DType::F32 => any::<4>(&self.data, 0x7f80),
            DType::BF16 => any::<2>(&self.data, 0x7f80),
            DType::F16 => any::<2>(&self.data, 0x7c00),
            DType::F64 => any::<8>(&self.data, 0x7ff0),
            _ => false,
        }
    }

    /// Every element as f64 (64-bit integers beyond 2^53 are rounded).
    pub fn to_f64(&self) -> Vec<f64> {
        match self.dtype {
            DType::F32 => self.map(|b| f64::from(f32::read_le(b))),
            DType::F64 => self.map(f64::read_le),
            DType::F16 => self.map(|b| f16::read_le(b).to_f64()),
            DType::BF16 => self.map(|b| bf16::read_le(b).to_f64()),
            DType::U64 => self.map(|b| u64::read_le(b) as f64),
            _ => self.to_i64().into_iter().map(|v| v as f64).collect(),
        }
    }

    /// Every element as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        match self.dtype {
            DType::F32 => self.map(f32::read_le),
            _ => self.to_f64().into_iter().map(|v| v as f32).collect(),
        }
    }

    /// Every element as i64; floats are truncated, u64 wraps.
    pub fn to_i64(&self) -> Vec<i64> {
        match self.dtype {
            DType::I64 => self.map(i64::read_le),
            DType::I32 => self.map(|b| i64::from(i32::read_le(b))),
            DType::I16 => self.map(|b| i64::from(i16::read_le(b))),
            DType::I8 => self.map(|b| i64::from(i8::read_le(b))),
            DType::U64 => self.map(|b| u64::read_le(b) as i64),
            DType::U32 => self.map(|b| i64::from(u32::read_le(b))),
            DType::U16 => self.map(|b| i64::from(u16::read_le(b))),
            DType::U8 => self.map(|b| i64::from(b[0])),
            DType::Bool => self.map(|b| i64::from(b[0] != 0)),
            _ => self.to_f64().into_iter().map(|v| v as i64).collect(),
        }
    }

    /// A matrix with rows and columns exchanged.
    pub fn transposed(&self) -> Result<Self> {
        let &[rows, columns] = self.shape() else {
            return Err(Error::mismatch(format!("cannot transpose {:?}, expected a matrix", self.shape())));
        };
        let size = self.dtype().size();
        let mut bytes = Vec::with_capacity(self.bytes().len());
        for j in 0..columns {
            for i in 0..rows {
                let at = (i * columns + j) * size;
                bytes.extend_from_slice(&self.bytes()[at..at + size]);
            }
        }
        Self::from_bytes(self.dtype(), vec![columns, rows], bytes.into())
    }

    /// The same elements under another shape of the same size.
    pub fn reshaped(&self, shape: &[usize]) -> Result<Self> {
        Self::from_bytes(self.dtype, shape.to_vec(), self.data.clone())
    }

    /// Rows `start..start+count` of the first dimension.
    pub fn rows(&self, start: usize, count: usize) -> Result<Self> {
        let total = self.shape.first().copied().unwrap_or(0);
        if start + count > total {
            return Err(Error::mismatch(format!("rows {start}..{} of {total}", start + count)));
        }
        let row = self.data.len().checked_div(total).unwrap_or(0);
        let mut shape = self.shape.clone();
        shape[0] = count;
        Self::from_bytes(self.dtype, shape, self.data.slice(start * row..(start + count) * row))
    }

    /// Joins along the first dimension; types and the other dimensions must agree.
    pub fn concat_rows(parts: &[Self]) -> Result<Self> {
        let first = parts.first().ok_or_else(|| Error::mismatch("nothing to join"))?;
        let mut shape = first.shape.clone();
        let mut data = Vec::with_capacity(parts.iter().map(|p| p.data.len()).sum());
        let mut rows = 0;
        for part in parts {
            if part.rank() == 0 || part.dtype != first.dtype || part.shape[1..] != first.shape[1..] {
                return Err(Error::mismatch(format!("cannot join {part:?} to {first:?}")));
            }
            rows += part.shape[0];
            data.extend_from_slice(&part.data);
        }
        shape[0] = rows;
        Self::from_bytes(first.dtype, shape, data.into())
    }

    /// Converts the element type; values are rounded towards the target's precision.
    pub fn cast(&self, dtype: DType) -> Self {
        if dtype == self.dtype {
            return self.clone();
        }
        fn write<T: Element>(values: impl Iterator<Item = T>) -> Vec<u8> {
            let mut out = Vec::new();
            values.for_each(|v| v.append_le(&mut out));
            out
        }
        let ints = || self.to_i64().into_iter();
        let floats = || self.to_f64().into_iter();
        let data = match dtype {
            DType::F32 => write(self.to_f32().into_iter()),
            DType::F64 => write(floats()),
            DType::F16 => write(floats().map(f16::from_f64)),
            DType::BF16 => write(floats().map(bf16::from_f64)),
            DType::I8 => write(ints().map(|v| v as i8)),
            DType::I16 => write(ints().map(|v| v as i16)),
            DType::I32 => write(ints().map(|v| v as i32)),
            DType::I64 => write(ints()),
            DType::U8 => write(ints().map(|v| v as u8)),
            DType::U16 => write(ints().map(|v| v as u16)),
            DType::U32 => write(ints().map(|v| v as u32)),
            DType::U64 => write(ints().map(|v| v as u64)),
            DType::Bool => write(floats().map(|v| v != 0.0)),
        };
        Self { dtype, shape: self.shape.clone(), data: data.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_shape_is_larger_than_memory_however_empty() {
        assert_eq!(checked_len(&[3, 0, 4]).unwrap(), 0);
        assert_eq!(checked_len(&[]).unwrap(), 1);
        for shape in [[0, 1 << 62, 1 << 62], [1 << 62, 1 << 62, 0]] {
            let e = checked_len(&shape).unwrap_err().to_string();
            assert!(e.contains("is larger than memory") && e.lines().count() == 2, "{e}");
        }
    }

    #[test]
    fn finite_is_what_the_element_type_says() {
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            let of = |v: f64| HostTensor::vec(&[1.0f64, v, -2.0]).cast(dtype);
            for v in [0.0, -1.5, 3e38, f64::MAX, 6.0e4] {
                let finite = of(v).to_f64()[1].is_finite();
                assert_eq!(of(v).is_finite(), finite, "{v} as {dtype}");
            }
            for v in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                assert!(!of(v).is_finite(), "{v} as {dtype}");
            }
        }
        assert!(HostTensor::vec(&[i64::MAX, -1]).is_finite());
    }
}
