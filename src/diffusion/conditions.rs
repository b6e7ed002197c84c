//! Conditions of a batch. In memory a class is always one i64 per row (-1: none, all zeros of a one-hot), whatever the
//! graph wants; the graph's form (element type, rank, one-hot) is made when a network is called.

use rand_chacha::rand_core::Rng;

use crate::error::{Context, Error, Result};
use crate::noise;
use crate::tensor::{DType, HostTensor};

use super::card::{InputSpec, TeacherCard};
use super::condition::Condition;

/// Named condition tensors in host memory, first dimension the batch.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HostConditions {
    rows: usize,
    tensors: Vec<(String, HostTensor)>,
}

impl HostConditions {
    /// No conditions, for `rows` samples.
    pub fn none(rows: usize) -> Self {
        Self { rows, tensors: Vec::new() }
    }

    /// Takes tensors that all have `rows` rows.
    pub fn new(rows: usize, tensors: Vec<(String, HostTensor)>) -> Result<Self> {
        match tensors.iter().find(|(_, t)| t.shape().first() != Some(&rows)) {
            Some((name, t)) => Err(Error::usage(format!("condition `{name}` is {t:?}, expected {rows} rows"))),
            None => Ok(Self { rows, tensors }),
        }
    }

    /// Uniformly drawn classes, each class condition on its own.
    pub fn draw(card: &TeacherCard, rng: &mut impl Rng, rows: usize) -> Result<Self> {
        let mut tensors = Vec::new();
        for (name, condition) in &card.conditions {
            let count = condition.classes().ok_or_else(|| {
                Error::usage(format!("condition `{name}` is an embedding, which cannot be drawn: give its values"))
            })?;
            let labels: Vec<i64> =
                (0..rows).map(|_| ((u128::from(rng.next_u64()) * count as u128) >> 64) as i64).collect();
            tensors.push((name.clone(), HostTensor::vec(&labels)));
        }
        Ok(Self { rows, tensors })
    }

    /// The classes of images `start..start + count` of a run, [`noise::image_class`], for every class condition. A card
    /// with embeddings is refused: those must be given.
    pub fn of_images(card: &TeacherCard, seed: u64, start: u64, count: usize) -> Result<Self> {
        let mut tensors = Vec::new();
        for (name, condition) in &card.conditions {
            let classes = condition.classes().ok_or_else(|| {
                Error::usage(format!("condition `{name}` is an embedding, which cannot be drawn: give its values"))
            })?;
            let class = |k: u64| noise::image_class(seed, start.wrapping_add(k), classes) as i64;
            tensors.push((name.clone(), HostTensor::vec(&(0..count as u64).map(class).collect::<Vec<_>>())));
        }
        Ok(Self { rows: count, tensors })
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows
    }
    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }
    /// The tensor of condition `name`, where it is given.
    pub fn get(&self, name: &str) -> Option<&HostTensor> {
        self.tensors.iter().find(|(n, _)| n == name).map(|(_, t)| t)
    }
    /// All conditions with their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &HostTensor)> {
        self.tensors.iter().map(|(n, t)| (n.as_str(), t))
    }

    /// Rows `start..start + count`.
    pub fn rows(&self, start: usize, count: usize) -> Result<Self> {
        let tensors =
            self.tensors.iter().map(|(n, t)| Ok((n.clone(), t.rows(start, count)?))).collect::<Result<_>>()?;
        Self::new(count, tensors)
    }

    /// The graph's form of condition `name`, one tensor as the graph's input wants it.
    pub(super) fn bound(&self, name: &str, condition: &Condition, spec: &InputSpec) -> Result<HostTensor> {
        let given = self.get(name).ok_or_else(|| Error::usage(format!("condition `{name}` is not given")))?;
        bind(given, condition, spec).with_context(|| format!("condition `{name}`"))
    }

    /// Rows of the card's null value in the graph's form, or `None` where the card has none.
    pub(super) fn null(condition: &Condition, spec: &InputSpec, rows: usize) -> Result<Option<HostTensor>> {
        let Some(row) = condition.null_row() else { return Ok(None) };
        let mut shape = vec![rows];
        shape.extend(condition.row_shape());
        let values: Vec<f64> = std::iter::repeat_n(row, rows).flatten().collect();
        let tensor = HostTensor::new(&shape, &values)?;
        let tensor = if matches!(condition, Condition::ClassIndex { .. }) { tensor.cast(DType::I64) } else { tensor };
        bind(&tensor, condition, spec).map(Some)
    }
}

/// An error unless a condition of the card has a null value, which classifier-free guidance needs.
pub fn check_guidance(card: &TeacherCard) -> Result<()> {
    if card.conditions.values().any(Condition::has_null) {
        return Ok(());
    }
    Err(Error::usage("guidance needs a null value, which no condition of the card has")
        .hint("give it with --card conditions.<input>.null=..., or use guidance scale 1"))
}

/// A class given as one integer a row, rather than as the rows of a one-hot.
fn is_index(t: &HostTensor) -> bool {
    !t.dtype().is_float() && t.rank() == 1
}

fn bind(given: &HostTensor, condition: &Condition, spec: &InputSpec) -> Result<HostTensor> {
    let rows = given.shape().first().copied().unwrap_or(0);
    let mut shape = vec![rows];
    shape.extend(condition.row_shape());
    let tensor = match condition {
        Condition::OneHot { classes, .. } if is_index(given) => {
            let labels = given.to_i64();
            let hot = labels.iter().flat_map(|l| (0..*classes as i64).map(move |c| f32::from(u8::from(c == *l))));
            HostTensor::new(&shape, &hot.collect::<Vec<_>>())?
        }
        _ => given.clone(),
    };
    if tensor.len() != shape.iter().product::<usize>() {
        return Err(Error::usage(format!("{given:?}, expected shape {shape:?}")));
    }
    let want: Vec<usize> = match (condition, spec.shape.len()) {
        (Condition::ClassIndex { .. }, 0) if rows == 1 => vec![],
        (Condition::ClassIndex { .. }, 2) => vec![rows, 1],
        _ => shape,
    };
    tensor.cast(spec.dtype).reshaped(&want)
}

#[cfg(feature = "train")]
pub use device::Conditions;

#[cfg(feature = "train")]
mod device {
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::torch::convert;

    /// Named condition tensors on a device, first dimension the batch.
    #[derive(Debug, Default)]
    pub struct Conditions {
        rows: i64,
        tensors: Vec<(String, Tensor)>,
    }

    impl Conditions {
        /// No conditions, for `rows` samples.
        pub fn none(rows: i64) -> Self {
            Self { rows, tensors: Vec::new() }
        }

        /// Takes tensors that all have `rows` rows.
        pub fn new(rows: i64, tensors: Vec<(String, Tensor)>) -> Result<Self> {
            match tensors.iter().find(|(_, t)| t.size().first() != Some(&rows)) {
                Some((name, t)) => {
                    Err(Error::usage(format!("condition `{name}` has shape {:?}, expected {rows} rows", t.size())))
                }
                None => Ok(Self { rows, tensors }),
            }
        }

        /// Sends the conditions to a device.
        pub fn from_host(host: &HostConditions, device: Device) -> Result<Self> {
            let tensors = host
                .iter()
                .map(|(name, t)| Ok((name.to_owned(), crate::torch::device::send(&convert::to_torch(t)?, device)?)))
                .collect::<Result<_>>()?;
            Self::new(host.len() as i64, tensors)
        }

        /// Number of rows.
        pub fn len(&self) -> i64 {
            self.rows
        }
        /// Whether there are no rows.
        pub fn is_empty(&self) -> bool {
            self.rows == 0
        }
        /// The tensor of condition `name`, where it is given.
        pub fn get(&self, name: &str) -> Option<&Tensor> {
            self.tensors.iter().find(|(n, _)| n == name).map(|(_, t)| t)
        }
        /// All conditions with their names.
        pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
            self.tensors.iter().map(|(n, t)| (n.as_str(), t))
        }

        /// `rows` rows that `f` makes of each tensor, in the order of their names.
        pub(crate) fn map(&self, rows: i64, mut f: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
            let tensors = self.tensors.iter().map(|(n, t)| Ok((n.clone(), f(t)?))).collect::<Result<_>>()?;
            Self::new(rows, tensors)
        }

        /// Another handle on the same tensors.
        pub fn shallow_clone(&self) -> Self {
            let tensors = self.tensors.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
            Self { rows: self.rows, tensors }
        }

        /// Rows `start..start + count`, without a copy.
        pub fn rows(&self, start: i64, count: i64) -> Result<Self> {
            self.map(count, |t| Ok(t.f_narrow(0, start, count)?))
        }

        /// The rows that an i64 index picks.
        pub fn select(&self, index: &Tensor) -> Result<Self> {
            self.map(index.size1()?, |t| Ok(t.f_index_select(0, index)?))
        }

        /// The same conditions on another device.
        pub fn to_device(&self, device: Device) -> Result<Self> {
            self.map(self.rows, |t| Ok(t.f_to_device(device)?))
        }

        /// All parts' rows, one after the other; the parts must have the same names.
        pub fn cat(parts: &[&Self]) -> Result<Self> {
            let first = parts.first().ok_or_else(|| Error::usage("no conditions to join"))?;
            let rows = parts.iter().map(|p| p.rows).sum();
            let mut tensors = Vec::new();
            for (name, _) in first.iter() {
                let column = parts
                    .iter()
                    .map(|p| {
                        p.get(name).ok_or_else(|| Error::usage(format!("condition `{name}` is not in every part")))
                    })
                    .collect::<Result<Vec<_>>>()?;
                tensors.push((name.to_owned(), Tensor::f_cat(&column, 0)?));
            }
            Self::new(rows, tensors)
        }

        /// The graph's form of condition `name`.
        pub(in crate::diffusion) fn bound(
            &self,
            name: &str,
            condition: &Condition,
            spec: &InputSpec,
        ) -> Result<Tensor> {
            let given = self.get(name).ok_or_else(|| Error::usage(format!("condition `{name}` is not given")))?;
            let mut shape = vec![self.rows];
            shape.extend(condition.row_shape().iter().map(|d| *d as i64));
            let is_index = !given.is_floating_point() && given.dim() == 1;
            let tensor = match condition {
                Condition::OneHot { classes, .. } if is_index => {
                    let all = Tensor::f_arange(*classes as i64, (Kind::Int64, given.device()))?;
                    given.f_to_kind(Kind::Int64)?.f_unsqueeze(1)?.f_eq_tensor(&all)?
                }
                _ => given.shallow_clone(),
            };
            if tensor.numel() as i64 != shape.iter().product::<i64>() {
                return Err(Error::usage(format!(
                    "condition `{name}` has shape {:?}, expected {shape:?}",
                    given.size()
                )));
            }
            let want = match (condition, spec.shape.len()) {
                (Condition::ClassIndex { .. }, 0) if self.rows == 1 => vec![],
                (Condition::ClassIndex { .. }, 2) => vec![self.rows, 1],
                _ => shape,
            };
            Ok(tensor.f_to_kind(convert::kind(spec.dtype))?.f_reshape(&want)?)
        }
    }
}
