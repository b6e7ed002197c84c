//! NumPy's `.npy` and `.npz`. Headers are read by a parser of our own that neither recurses nor allocates by what a header
//! claims; memory grows only with data that is really there.

use std::io::{Cursor, Read, Write};
use std::path::Path;

use bytes::Bytes;

use crate::error::{Context, Error, Result};
use crate::files;
use crate::memory;
use crate::tensor::{DType, HostTensor, checked_len};

/// NumPy itself refuses longer headers.
const MAX_HEADER: usize = 10_000;
const MAGIC: &[u8; 6] = b"\x93NUMPY";

struct Header {
    dtype: DType,
    big_endian: bool,
    fortran: bool,
    shape: Vec<usize>,
}

fn bad(what: impl Into<String>) -> Error {
    Error::io(what)
}

/// The value of `'key':` in a header dictionary, up to its end.
fn field<'a>(text: &'a str, key: &str) -> Result<&'a str> {
    let missing = || bad(format!("the .npy header has no {key}"));
    let at = text.find(&format!("'{key}'")).ok_or_else(missing)? + key.len() + 2;
    let rest = text[at..].trim_start().strip_prefix(':').ok_or_else(missing)?.trim_start();
    let end = match rest.as_bytes().first() {
        Some(b'\'') => rest[1..].find('\'').map(|e| e + 2),
        Some(b'(') => rest.find(')').map(|e| e + 1),
        Some(b'[') => Some(1),
        _ => rest.find([',', '}']),
    };
    Ok(rest[..end.ok_or_else(missing)?].trim())
}

fn parse_header(text: &str) -> Result<Header> {
    let descr = field(text, "descr")?;
    let code = descr.trim_matches('\'');
    if descr == "[" {
        return Err(bad("structured arrays are not supported, save one plain array"));
    }
    let (order, kind) = match code.as_bytes().first() {
        Some(b'<' | b'>' | b'|' | b'=') => code.split_at(1),
        _ => ("<", code),
    };
    let dtype = match kind {
        "f4" => DType::F32,
        "f8" => DType::F64,
        "f2" => DType::F16,
        "i1" => DType::I8,
        "i2" => DType::I16,
        "i4" => DType::I32,
        "i8" => DType::I64,
        "u1" => DType::U8,
        "u2" => DType::U16,
        "u4" => DType::U32,
        "u8" => DType::U64,
        "b1" => DType::Bool,
        k if k.starts_with('O') => return Err(bad("pickled Python objects are not read, save a numeric array")),
        _ => return Err(bad(format!("element type {descr} is not supported"))),
    };
    let fortran = match field(text, "fortran_order")? {
        "True" => true,
        "False" => false,
        other => return Err(bad(format!("fortran_order is {other}"))),
    };
    let shape = field(text, "shape")?;
    let inner = shape.strip_prefix('(').and_then(|s| s.strip_suffix(')'));
    let inner = inner.ok_or_else(|| bad(format!("the shape {shape} is not a tuple")))?;
    let dims = inner.split(',').map(str::trim).filter(|d| !d.is_empty());
    let shape = dims
        .map(|d| d.trim_end_matches('L').parse().map_err(|_| bad(format!("the shape holds {d}"))))
        .collect::<Result<Vec<usize>>>()?;
    if shape.len() > 64 {
        return Err(bad(format!("{} dimensions", shape.len())));
    }
    Ok(Header { dtype, big_endian: order == ">", fortran, shape })
}

/// Reads the header: what the array is, and the bytes up to its data.
fn read_header(mut reader: impl Read) -> Result<(Header, usize)> {
    let mut start = [0u8; 8];
    let short = |_| bad("not a .npy array (too short)");
    reader.read_exact(&mut start).map_err(short)?;
    if &start[..6] != MAGIC {
        return Err(bad("not a .npy array"));
    }
    let (length, before) = if start[6] == 1 {
        let mut n = [0u8; 2];
        reader.read_exact(&mut n).map_err(short)?;
        (u16::from_le_bytes(n) as usize, 10)
    } else {
        let mut n = [0u8; 4];
        reader.read_exact(&mut n).map_err(short)?;
        (u32::from_le_bytes(n) as usize, 12)
    };
    if length > MAX_HEADER {
        return Err(bad(format!("a header of {length} bytes (at most {MAX_HEADER})")));
    }
    let mut text = vec![0u8; length];
    reader.read_exact(&mut text).map_err(short)?;
    let text = String::from_utf8(text).map_err(|_| bad("the .npy header is not text"))?;
    Ok((parse_header(&text)?, before + length))
}

/// Element type, shape and the place of the data in the bytes of a `.npy` file, where the data may be used as it lies
/// there: little-endian and row-major. `None` where it may not. A file that is cut short is an error.
pub fn plain_layout(bytes: &[u8]) -> Result<Option<(DType, Vec<usize>, usize)>> {
    let (header, start) = read_header(bytes)?;
    let expected = array_bytes(&header)?;
    if bytes.len() - start < expected {
        let found = bytes.len() - start;
        return Err(bad(format!("{found} bytes of data where the shape {:?} needs {expected}", header.shape)));
    }
    Ok((!header.big_endian && !header.fortran).then_some((header.dtype, header.shape, start)))
}

fn too_little(got: usize, shape: &[usize], expected: usize) -> Error {
    bad(format!("{got} bytes of data where the shape {shape:?} needs {expected}"))
}

/// Reads one array.
pub fn read_from(mut reader: impl Read) -> Result<HostTensor> {
    let (header, _) = read_header(&mut reader)?;
    let expected = array_bytes(&header)?;
    read_data(header, expected, reader)
}

/// Bytes of the array's data.
fn array_bytes(header: &Header) -> Result<usize> {
    let bytes = checked_len(&header.shape)?.checked_mul(header.dtype.size());
    bytes.ok_or_else(|| bad(format!("an array of shape {:?} is larger than memory", header.shape)))
}

/// Bytes of an array's data up to which nobody asks whether there is room.
const LARGE: usize = 256 << 20;

/// Refuses an array that has to be held in memory as a whole, where there is no room for it.
fn room(bytes: usize, shape: &[usize]) -> Result<()> {
    match memory::free().filter(|free| bytes > LARGE && bytes as u64 > free.bytes) {
        None => Ok(()),
        Some(free) => Err(bad(format!(
            "an array of shape {shape:?} takes {} to put its values in order, {} are free {}",
            memory::shown(bytes as u64),
            memory::shown(free.bytes),
            free.place
        ))
        .hint("numpy.save(FILE, numpy.ascontiguousarray(A)) in the machine's own byte order: such an array is read where it lies")),
    }
}

fn read_data(header: Header, expected: usize, mut reader: impl Read) -> Result<HostTensor> {
    let size = header.dtype.size();
    let mut data = Vec::new();
    // (Whether there is so much at all is seen first: a header may say anything.)
    let first = expected.min(LARGE);
    reader.by_ref().take(first as u64).read_to_end(&mut data)?;
    if data.len() == first && first < expected {
        room(expected.saturating_mul(if header.fortran { 2 } else { 1 }), &header.shape)?;
        reader.take((expected - first) as u64).read_to_end(&mut data)?;
    }
    if data.len() != expected {
        return Err(too_little(data.len(), &header.shape, expected));
    }
    if header.big_endian {
        data.chunks_exact_mut(size).for_each(<[u8]>::reverse);
    }
    if header.fortran {
        data = from_fortran(&data, &header.shape, size);
    }
    HostTensor::from_bytes(header.dtype, header.shape, data.into())
}

/// An array that lies in (mapped) memory: nothing is copied where its order is ours.
fn view(bytes: &Bytes) -> Result<HostTensor> {
    let (header, start) = read_header(&bytes[..])?;
    if header.fortran || (header.big_endian && header.dtype.size() > 1) {
        return read_from(&bytes[..]);
    }
    let expected = array_bytes(&header)?;
    let end = start.checked_add(expected).filter(|end| *end <= bytes.len());
    let end = end.ok_or_else(|| too_little(bytes.len() - start, &header.shape, expected))?;
    HostTensor::from_bytes(header.dtype, header.shape, bytes.slice(start..end))
}

/// Column-major to row-major.
fn from_fortran(data: &[u8], shape: &[usize], size: usize) -> Vec<u8> {
    if data.is_empty() {
        return Vec::new();
    }
    let mut strides = Vec::with_capacity(shape.len());
    let mut step = size;
    for &d in shape {
        strides.push(step);
        step *= d;
    }
    let mut out = Vec::with_capacity(data.len());
    let mut index = vec![0usize; shape.len()];
    while out.len() < data.len() {
        let at: usize = index.iter().zip(&strides).map(|(i, s)| i * s).sum();
        out.extend_from_slice(&data[at..at + size]);
        for k in (0..shape.len()).rev() {
            index[k] += 1;
            if index[k] < shape[k] {
                break;
            }
            index[k] = 0;
        }
    }
    out
}

/// Reads a `.npy` file: mapped, so that only what is looked at takes memory.
pub fn read(path: &Path) -> Result<HostTensor> {
    let open = || view(&files::map(path)?);
    open().with_context(|| path.display().to_string())
}

fn write_header(out: &mut impl Write, header: &Header) -> std::io::Result<()> {
    let order = match (header.dtype.size(), header.big_endian) {
        (1, _) => '|',
        (_, true) => '>',
        (_, false) => '<',
    };
    let code = match header.dtype {
        DType::F32 | DType::BF16 => "f4",
        DType::F64 => "f8",
        DType::F16 => "f2",
        DType::I8 => "i1",
        DType::I16 => "i2",
        DType::I32 => "i4",
        DType::I64 => "i8",
        DType::U8 => "u1",
        DType::U16 => "u2",
        DType::U32 => "u4",
        DType::U64 => "u8",
        DType::Bool => "b1",
    };
    let fortran = if header.fortran { "True" } else { "False" };
    let dims: String = header.shape.iter().map(|d| format!("{d}, ")).collect();
    let mut text =
        format!("{{'descr': '{order}{code}', 'fortran_order': {fortran}, 'shape': ({}), }}", dims.trim_end());
    // Data starts at a multiple of 64 bytes, as NumPy writes it: 10 bytes before the text and a newline at its end.
    let padded = (10 + text.len() + 1).next_multiple_of(64) - 10;
    text.extend(std::iter::repeat_n(' ', padded - text.len() - 1));
    text.push('\n');
    out.write_all(MAGIC)?;
    out.write_all(&[1, 0])?;
    out.write_all(&(text.len() as u16).to_le_bytes())?;
    out.write_all(text.as_bytes())
}

/// Writes one array, version 1.0, C order. NumPy has no bf16: such tensors are written as f32, which loses nothing.
pub fn write_to(mut out: impl Write, tensor: &HostTensor) -> std::io::Result<()> {
    let tensor = if tensor.dtype() == DType::BF16 { &tensor.cast(DType::F32) } else { tensor };
    let shape = tensor.shape().to_vec();
    write_header(&mut out, &Header { dtype: tensor.dtype(), big_endian: false, fortran: false, shape })?;
    out.write_all(tensor.bytes())
}

/// Writes a `.npy` file, whole or not at all.
pub fn write(path: &Path, tensor: &HostTensor) -> Result<()> {
    crate::files::write_atomic_with(path, |out| write_to(out, tensor))
}

/// Names of the arrays of a `.npz` file, in the file's order.
pub fn npz_names(path: &Path) -> Result<Vec<String>> {
    let run = || -> Result<Vec<String>> {
        let zip = archive(&files::map(path)?)?;
        Ok(zip.file_names().filter_map(npyz::npz::array_name_from_file_name).map(str::to_string).collect())
    };
    run().with_context(|| path.display().to_string())
}

pub(crate) fn archive(bytes: &Bytes) -> Result<zip::ZipArchive<Cursor<Bytes>>> {
    zip::ZipArchive::new(Cursor::new(bytes.clone())).map_err(|e| bad(format!("not a zip archive: {e}")))
}

/// Reads every array of a `.npz` file, in the file's order. Arrays that are stored as they are (`np.savez`) are mapped;
/// compressed ones beyond 64 MB are unpacked into a temporary file that is mapped: a set of any size takes little memory.
pub fn read_npz(path: &Path) -> Result<Vec<(String, HostTensor)>> {
    // What the unpacked arrays take in memory, all together.
    let mut held = 0;
    let mut run = || -> Result<Vec<(String, HostTensor)>> {
        let bytes = files::map(path)?;
        let mut zip = archive(&bytes).map_err(|e| bad(format!("not a .npz archive: {e}")))?;
        let mut arrays = Vec::new();
        for k in 0..zip.len() {
            let mut file = zip.by_index(k).map_err(|e| bad(format!("not a .npz archive: {e}")))?;
            let Some(name) = npyz::npz::array_name_from_file_name(file.name()).map(str::to_string) else { continue };
            let array = if file.compression() == zip::CompressionMethod::Stored {
                let start = file.data_start() as usize;
                let end = start.checked_add(file.compressed_size() as usize).filter(|e| *e <= bytes.len());
                end.ok_or_else(|| bad("cut short")).and_then(|end| view(&bytes.slice(start..end)))
            } else {
                let size = file.size();
                unpack(&mut file, size, &mut held)
            };
            arrays.push((name.clone(), array.context(format!("array `{name}`"))?));
        }
        Ok(arrays)
    };
    run().with_context(|| path.display().to_string())
}

/// Unpacks an array of a member that has `size` bytes by what the archive says: into memory, or once more than 64 MB are `held` there
/// into a nameless temporary file that is mapped. Nothing is unpacked beyond what header and archive agree on.
fn unpack(file: &mut impl Read, size: u64, held: &mut u64) -> Result<HostTensor> {
    const LARGE: u64 = 64 << 20;
    let (header, start) = read_header(&mut *file)?;
    let expected = array_bytes(&header)?;
    if size.saturating_sub(start as u64) < expected as u64 {
        return Err(too_little(size.saturating_sub(start as u64) as usize, &header.shape, expected));
    }
    if *held + expected as u64 <= LARGE {
        *held += expected as u64;
        return read_data(header, expected, file);
    }
    let mut out = tempfile::tempfile()?;
    let mut head = Vec::new();
    // The header again, in our own words, so that the file is an array by itself.
    write_header(&mut head, &header)?;
    out.write_all(&head)?;
    let copied = std::io::copy(&mut file.take(expected as u64), &mut out)?;
    if copied != expected as u64 {
        return Err(too_little(copied as usize, &header.shape, expected));
    }
    view(&files::map_file(&out)?)
}

/// Writes named arrays as a `.npz` file, whole or not at all.
pub fn write_npz(path: &Path, arrays: &[(&str, &HostTensor)]) -> Result<()> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    {
        let mut archive = npyz::npz::NpzWriter::new(&mut bytes);
        let zip = archive.zip_writer();
        for (name, tensor) in arrays {
            let file = npyz::npz::file_name_from_array_name(name);
            let options = zip::write::FileOptions::default()
                .compression_method(zip::CompressionMethod::Stored)
                .large_file(tensor.bytes().len() > 1 << 31);
            zip.start_file(file, options).map_err(|e| bad(e.to_string()))?;
            write_to(&mut *zip, tensor)?;
        }
        zip.finish().map_err(|e| bad(e.to_string()))?;
    }
    crate::files::write_atomic(path, bytes.get_ref())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of(header: &str, data: &[u8]) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend([1, 0]);
        out.extend((header.len() as u16).to_le_bytes());
        out.extend(header.as_bytes());
        out.extend(data);
        out
    }

    #[test]
    fn every_type_survives_the_round_trip() {
        let base = HostTensor::new(&[2, 3], &[0.0f64, 1.0, 2.0, 3.0, 100.0, 7.0]).unwrap();
        use DType::*;
        for dtype in [F32, F64, F16, I8, I16, I32, I64, U8, U16, U32, U64, Bool] {
            let tensor = base.cast(dtype);
            let mut out = Vec::new();
            write_to(&mut out, &tensor).unwrap();
            assert_eq!(read_from(&out[..]).unwrap(), tensor, "{dtype}");
            assert_eq!((out.len() - tensor.bytes().len()) % 64, 0);
        }
        for shape in [&[][..], &[1], &[0, 4]] {
            let n: usize = shape.iter().product();
            let tensor = HostTensor::new(shape, &vec![1.5f32; n]).unwrap();
            let mut out = Vec::new();
            write_to(&mut out, &tensor).unwrap();
            assert_eq!(read_from(&out[..]).unwrap(), tensor);
        }
    }

    #[test]
    fn fortran_and_big_endian_are_put_right() {
        let data: Vec<u8> = [1i16, 4, 2, 5, 3, 6].iter().flat_map(|v| v.to_be_bytes()).collect();
        let file = bytes_of("{'descr': '>i2', 'fortran_order': True, 'shape': (2, 3), }\n", &data);
        let tensor = read_from(&file[..]).unwrap();
        assert_eq!(tensor.values::<i16>().unwrap(), [1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn hostile_headers_are_errors() {
        let f4 = |shape: &str| format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}");
        let cases = [
            (f4("(9223372036854775807, 9223372036854775807)"), "larger than memory"),
            (f4("(1000000000000,)"), "0 bytes of data"),
            (f4("(-1,)"), "holds -1"),
            (f4("(2"), "no shape"),
            ("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}".into(), "pickled"),
            ("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}".into(), "structured"),
            ("{'descr': '<U7', 'fortran_order': False, 'shape': (1,)}".into(), "not supported"),
            ("((((((((".into(), "no descr"),
        ];
        for (header, want) in cases {
            let error = read_from(&bytes_of(&header, &[])[..]).unwrap_err().to_string();
            assert!(error.contains(want), "{header}: {error}");
        }
        let mut long = MAGIC.to_vec();
        long.extend([2, 0, 0xff, 0xff, 0xff, 0xff]);
        assert!(read_from(&long[..]).unwrap_err().to_string().contains("a header of 4294967295 bytes"));
        assert!(read_from(&b"\x93NUM"[..]).is_err());
    }

    #[test]
    fn archives_keep_names_and_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.npz");
        let (a, b) = (HostTensor::vec(&[1i64, 2]), HostTensor::scalar(0.25f64));
        write_npz(&path, &[("x", &a), ("a/b", &b)]).unwrap();
        let read = read_npz(&path).unwrap();
        assert_eq!(read, [("x".to_string(), a), ("a/b".to_string(), b)]);
        std::fs::write(&path, b"PK nonsense").unwrap();
        assert!(read_npz(&path).unwrap_err().to_string().contains("a.npz"));
    }
}
