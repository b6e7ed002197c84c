//! What callers send: noise and rows for the student's conditions, as one .npy array, an .npz archive or JSON.

use axum::body::Bytes;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use crate::error::{Context, Error, Result};
use crate::io::npy;
use crate::runtime::student::StudentInfo;
use crate::runtime::{Dim, ValueInfo};
use crate::tensor::{DType, HostTensor};

/// Nested arrays in JSON, and dimensions of an array, at most.
const DEEPEST: usize = 8;

/// Arrays of a request, checked against the student's inputs.
#[derive(Debug, Default)]
pub(super) struct Given {
    /// `[n, C, H, W]`, where the caller brings noise of its own.
    pub noise: Option<HostTensor>,
    /// Rows for conditions, by input name, in the input's element type.
    pub rows: Vec<(String, HostTensor)>,
}

impl Given {
    /// Reads a body: empty, a .npy array of noise, an .npz archive or a JSON object with an array for each input. Arrays of
    /// the archive take at most `limit` bytes once unpacked.
    ///
    /// Errors: another form; an array that no input takes, with what it should have been.
    pub fn read(body: &Bytes, info: &StudentInfo, limit: usize) -> Result<Self> {
        let text = body.iter().position(|b| !b.is_ascii_whitespace());
        let arrays = match text.map(|at| body[at]) {
            None => Vec::new(),
            Some(b'{') => json(body)?,
            _ if body.starts_with(b"PK") => npz(body, limit)?,
            _ => {
                let array = npy::read_from(body.as_ref())
                    .map_err(|e| e.context("the body is no .npy array of noise, no .npz archive and no JSON object"))?;
                vec![("noise".to_owned(), array)]
            }
        };
        let mut given = Self::default();
        for (name, array) in arrays {
            if given.rows.iter().any(|(n, _)| *n == name) || (name == "noise" && given.noise.is_some()) {
                return Err(Error::mismatch(format!("`{name}` is given twice")));
            }
            if name == "noise" {
                given.noise = Some(noise(&array, info)?);
            } else {
                let row = rows(&name, &array, info)?;
                given.rows.push((name, row));
            }
        }
        Ok(given)
    }

    /// Images that the arrays are for; a single row goes to all, so that it alone says nothing.
    pub fn count(&self) -> Result<Option<usize>> {
        let noise = self.noise.as_ref().map(|t| ("noise", t.shape()[0]));
        let mut rows = self.rows.iter().map(|(name, t)| (name.as_str(), t.shape()[0])).filter(|(_, n)| *n != 1);
        let decides = noise.or_else(|| rows.clone().next());
        let Some((what, n)) = decides else { return Ok(None) };
        match rows.find(|(_, m)| *m != n) {
            Some((name, m)) => Err(Error::mismatch(format!("`{name}` has rows for {m} images, `{what}` for {n}"))),
            None => Ok(Some(n)),
        }
    }
}

/// Noise from a body, checked.
fn noise(t: &HostTensor, info: &StudentInfo) -> Result<HostTensor> {
    let row = info.noise_shape.as_slice();
    if t.rank() != 1 + row.len() || t.shape()[1..] != *row || !t.dtype().is_float() || t.is_empty() {
        let dims: Vec<String> = row.iter().map(ToString::to_string).collect();
        let (dtype, found) = (t.dtype(), t.shape());
        return Err(Error::mismatch(format!("noise of {dtype}{found:?}, expected f32[n, {}]", dims.join(", "))));
    }
    if !t.is_finite() {
        return Err(Error::mismatch("the noise holds NaN or infinity"));
    }
    Ok(t.cast(info.noise.dtype))
}

/// Rows of a condition, checked.
fn rows(name: &str, t: &HostTensor, info: &StudentInfo) -> Result<HostTensor> {
    let Some(condition) = info.embeddings().find(|c| c.input.name == name) else {
        let takes: Vec<String> = info.embeddings().map(|c| format!("`{}`", c.input.name)).collect();
        let more = if takes.is_empty() { String::new() } else { format!(" and {}", takes.join(", ")) };
        let classes = info.conditions.iter().any(|c| c.input.name == name);
        let hint = if classes { ": classes go into the query, as in ?classes=3" } else { "" };
        return Err(Error::mismatch(format!("no array `{name}` is taken, only `noise`{more}{hint}")));
    };
    let input = &condition.input;
    let fits = t.rank() == input.shape.len()
        && input.shape.iter().zip(t.shape()).skip(1).all(|(d, n)| match d {
            Dim::Fixed(m) => m == n,
            Dim::Symbol(_) => *n > 0,
        });
    if !fits || t.is_empty() {
        return Err(Error::mismatch(format!("`{name}` is {}{:?}, expected {}", t.dtype(), t.shape(), wanted(input))));
    }
    if !input.dtype.is_float() && t.dtype().is_float() && t.to_f64().iter().any(|v| v.fract() != 0.0) {
        return Err(Error::mismatch(format!("`{name}` holds fractions, expected {}", wanted(input))));
    }
    if !t.is_finite() {
        return Err(Error::mismatch(format!("`{name}` holds NaN or infinity")));
    }
    Ok(t.cast(input.dtype))
}

/// `f32[n, 77, 768]`: what a caller must send for an input.
pub(super) fn wanted(input: &ValueInfo) -> String {
    let dims = input.shape.iter().skip(1).map(Dim::to_string);
    let all: Vec<String> = std::iter::once("n".to_owned()).chain(dims).collect();
    format!("{}[{}]", input.dtype, all.join(", "))
}

fn npz(body: &Bytes, limit: usize) -> Result<Vec<(String, HostTensor)>> {
    // What the archive says of its sizes may be a lie: the reader stops at the header's size, which is bounded here.
    let mut zip = npy::archive(body).context("the body")?;
    let mut left = limit;
    let mut arrays = Vec::new();
    for k in 0..zip.len() {
        let file = zip.by_index(k).map_err(|e| Error::invalid(format!("the body is a broken .npz archive: {e}")))?;
        let name = file.name().strip_suffix(".npy").unwrap_or(file.name()).to_owned();
        let mut bounded = std::io::Read::take(file, left as u64 + 1);
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut bounded, &mut bytes).context(format!("array `{name}`"))?;
        left = left.checked_sub(bytes.len()).ok_or_else(|| {
            Error::mismatch(format!("the arrays of the body take more than {limit} bytes once unpacked"))
        })?;
        arrays.push((name.clone(), npy::read_from(bytes.as_slice()).context(format!("array `{name}`"))?));
    }
    Ok(arrays)
}

/// `{"input": [[...], ...], ...}`
fn json(body: &Bytes) -> Result<Vec<(String, HostTensor)>> {
    struct Arrays;
    impl<'de> Visitor<'de> for Arrays {
        type Value = Vec<(String, Array)>;
        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("an object with an array of numbers for each input")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
            let mut all = Vec::new();
            while let Some(name) = map.next_key::<String>()? {
                let mut array = Array::default();
                map.next_value_seed(Level { array: &mut array, depth: 0 })?;
                all.push((name, array));
            }
            Ok(all)
        }
    }
    let mut reader = serde_json::Deserializer::from_slice(body);
    let read = reader.deserialize_map(Arrays).and_then(|a| reader.end().map(|()| a));
    let arrays = read.map_err(|e| Error::mismatch(format!("the body is no JSON object of arrays: {e}")))?;
    arrays
        .into_iter()
        .map(|(name, a)| {
            let shape: Vec<usize> = a.shape.iter().map(|d| d.unwrap_or(0)).collect();
            let t = HostTensor::new(&shape, &a.values).context(format!("array `{name}`"))?;
            // Whole numbers as they are written; f32 is what the noise and most conditions are.
            Ok((name, if a.whole { t.cast(DType::I64) } else { t.cast(DType::F32) }))
        })
        .collect::<Result<Vec<_>>>()
        .map(|all| all.into_iter().map(|(n, t)| if n == "noise" { (n, t.cast(DType::F32)) } else { (n, t) }).collect())
}

/// Numbers as they come, and the lengths of the arrays that they come in.
#[derive(Debug)]
pub(super) struct Array {
    pub values: Vec<f64>,
    shape: Vec<Option<usize>>,
    /// At which depth numbers stand.
    leaf: Option<usize>,
    /// Whether all are whole numbers.
    pub whole: bool,
}

impl<'de> Deserialize<'de> for Array {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        let mut array = Self::default();
        Level { array: &mut array, depth: 0 }.deserialize(d)?;
        Ok(array)
    }
}

impl Default for Array {
    fn default() -> Self {
        Self { values: Vec::new(), shape: Vec::new(), leaf: None, whole: true }
    }
}

/// One level of nesting.
struct Level<'a> {
    array: &'a mut Array,
    depth: usize,
}

impl<'de> DeserializeSeed<'de> for Level<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> std::result::Result<(), D::Error> {
        d.deserialize_any(self)
    }
}

impl Level<'_> {
    fn number<E: serde::de::Error>(self, v: f64, whole: bool) -> std::result::Result<(), E> {
        if *self.array.leaf.get_or_insert(self.depth) != self.depth {
            return Err(E::custom("numbers and arrays side by side"));
        }
        self.array.whole &= whole;
        self.array.values.push(v);
        Ok(())
    }
}

impl<'de> Visitor<'de> for Level<'_> {
    type Value = ();
    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("numbers in nested arrays")
    }
    fn visit_f64<E: serde::de::Error>(self, v: f64) -> std::result::Result<(), E> {
        self.number(v, false)
    }
    fn visit_i64<E: serde::de::Error>(self, v: i64) -> std::result::Result<(), E> {
        self.number(v as f64, true)
    }
    fn visit_u64<E: serde::de::Error>(self, v: u64) -> std::result::Result<(), E> {
        self.number(v as f64, true)
    }
    fn visit_bool<E: serde::de::Error>(self, v: bool) -> std::result::Result<(), E> {
        self.number(f64::from(u8::from(v)), true)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<(), A::Error> {
        let Level { array, depth } = self;
        if depth >= DEEPEST {
            return Err(A::Error::custom(format!("arrays in arrays, more than {DEEPEST} deep")));
        }
        if array.leaf.is_some_and(|leaf| depth >= leaf) {
            return Err(A::Error::custom("numbers and arrays side by side"));
        }
        let mut n = 0;
        while seq.next_element_seed(Level { array: &mut *array, depth: depth + 1 })?.is_some() {
            n += 1;
        }
        if array.shape.len() <= depth {
            array.shape.resize(depth + 1, None);
        }
        match *array.shape[depth].get_or_insert(n) {
            m if m == n => Ok(()),
            m => Err(A::Error::custom(format!("rows of {m} and of {n} elements in one array"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> std::result::Result<Vec<(String, HostTensor)>, String> {
        json(&Bytes::copy_from_slice(text.as_bytes())).map_err(|e| e.to_string())
    }

    #[test]
    fn nested_numbers_become_tensors() {
        let all = read(r#"{"a": [[1, 2.5], [3, -4e-1]], "b": [true, 3], "noise": [1]}"#).unwrap();
        assert_eq!((all[0].1.shape(), all[0].1.to_f32()), (&[2, 2][..], vec![1.0, 2.5, 3.0, -0.4]));
        assert_eq!((all[1].1.dtype(), all[1].1.to_i64()), (DType::I64, vec![1, 3]));
        assert_eq!(all[2].1.dtype(), DType::F32);
        assert_eq!(read(r#"{"a": [[], []]}"#).unwrap()[0].1.shape(), [2, 0]);
    }

    #[test]
    fn what_is_no_array_says_why() {
        let why = |text: &str| read(text).unwrap_err();
        assert!(why(r#"{"a": [[1, 2], [3]]}"#).contains("rows of 2 and of 1 elements"));
        assert!(
            why(r#"{"a": [1, [2]]}"#).contains("side by side") && why(r#"{"a": [[2], 1]}"#).contains("side by side")
        );
        assert!(why(r#"{"a": ["x"]}"#).contains("expected numbers in nested arrays"));
        assert!(why(r#"{"a": [1"#).contains("EOF"));
        assert!(why(r#"{"a": [1]} 2"#).contains("trailing"));
        let deep = format!(r#"{{"a": {}1{}}}"#, "[".repeat(9), "]".repeat(9));
        assert!(why(&deep).contains("more than 8 deep"));
    }
}
