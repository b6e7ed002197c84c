//! What a person looks at of samples of any kind: sheets of images, slices and frames, plots of everything else.

#[cfg(feature = "report")]
mod canvas;
#[cfg(feature = "report")]
mod panels;
#[cfg(feature = "report")]
mod plots;
mod slices;

use ndarray::{ArrayD, Axis, IxDyn};

use crate::diffusion::{Modality, TeacherCard};
use crate::error::{Error, Result};
use crate::runtime::student::StudentInfo;
use crate::tensor::{DType, HostTensor};

/// What samples are, as far as pictures of them need to know.
#[derive(Debug, Clone, PartialEq)]
pub struct View {
    /// One sample, without the batch.
    pub shape: Vec<usize>,
    /// The axis of `shape` that holds the channels, where one does.
    pub channel_axis: Option<usize>,
    /// What a sample is.
    pub modality: Modality,
    /// Lowest and highest value; where absent, black and white are the lowest and highest of what is shown.
    pub range: Option<[f64; 2]>,
    /// Values a second of sound, Hz.
    pub sample_rate: Option<u32>,
}

/// Pictures of a set of samples.
#[derive(Debug, Clone, PartialEq)]
pub struct Pictures {
    /// A PNG of all that is shown.
    pub sheet: Vec<u8>,
    /// Videos as they move: an animated PNG.
    pub animation: Option<Vec<u8>>,
}

impl View {
    /// Images [C,H,W] with values in `range`.
    pub fn images(shape: &[usize], range: Option<[f64; 2]>) -> Self {
        Self { shape: shape.to_vec(), channel_axis: Some(0), modality: Modality::Image, range, sample_rate: None }
    }

    /// What a teacher with this card makes.
    pub fn of_card(card: &TeacherCard) -> Self {
        Self::images(&card.shape, card.range)
    }

    /// What a student makes.
    pub fn of_student(info: &StudentInfo) -> Self {
        Self::images(&info.shape, info.range)
    }

    /// Whether a sheet of it is a sheet of images.
    pub fn is_image(&self) -> bool {
        self.modality == Modality::Image
    }

    /// What can be shown of samples of this shape: of another number of dimensions than the modality has, they are numbers.
    fn shown(&self) -> Modality {
        let frames = 4 - usize::from(self.channel_axis.is_none());
        match (self.modality, self.shape.len()) {
            (Modality::Image, r) if r + 1 != frames => Modality::Vector,
            (Modality::Volume | Modality::Video, r) if r != frames => Modality::Vector,
            (Modality::Sequence | Modality::Audio, 0 | 3..) => Modality::Vector,
            (Modality::Points, r) if r != 2 => Modality::Vector,
            (modality, _) => modality,
        }
    }

    /// Samples as f32 with the channels behind the batch: `[N, C, ...]`. Where no axis holds channels, the last does of
    /// sequences and points, and of all others there is one.
    fn channels_first(&self, samples: &HostTensor) -> Result<ArrayD<f32>> {
        if samples.rank() == 0 || samples.shape()[1..] != self.shape[..] || samples.is_empty() {
            let (found, wanted) = (samples.shape(), &self.shape);
            return Err(Error::mismatch(format!("samples of shape {found:?}, expected [N, ...] of {wanted:?}")));
        }
        if self.shown() == Modality::Vector {
            // In the sample's own order.
            let (n, len) = (samples.shape()[0], self.shape.iter().product());
            return Ok(samples.reshaped(&[n, 1, len])?.cast(DType::F32).array::<f32>()?.into_owned());
        }
        let mut values = samples.cast(DType::F32).array::<f32>()?.into_owned();
        let rank = self.shape.len();
        let table = matches!(self.shown(), Modality::Sequence | Modality::Points) && rank == 2;
        match self.channel_axis.or(table.then_some(1)) {
            Some(axis) if rank > 1 || self.shown() != Modality::Audio => {
                let mut order: Vec<usize> = (0..=rank).collect();
                let channels = order.remove(axis + 1);
                order.insert(1, channels);
                values = values.permuted_axes(IxDyn(&order));
                if rank == 1 {
                    values.insert_axis_inplace(Axis(1));
                }
            }
            _ => values.insert_axis_inplace(Axis(1)),
        }
        Ok(values)
    }

    /// The samples as sound, each `[C, L]`, with the number of values a second. An error where they are none, or the rate is
    /// not known.
    pub fn sound(&self, samples: &HostTensor) -> Result<(Vec<ndarray::Array2<f32>>, u32)> {
        let rate = self.sample_rate.filter(|r| *r > 0);
        if self.shown() != Modality::Audio && (rate.is_none() || !matches!(self.shape.len(), 1 | 2)) {
            return Err(Error::usage("the samples are no sound: the card has neither modality = \"audio\" nor sample_rate")
                .hint(".npy and .npz hold samples of any kind"));
        }
        let rate = rate.ok_or_else(|| {
            Error::usage("the card does not say how many values a second of sound has").hint("sample_rate = 22050")
        })?;
        let own = Self { modality: Modality::Audio, ..self.clone() };
        let values = own.channels_first(samples)?;
        let each = values.outer_iter().map(|sample| {
            let two = sample.to_owned().into_dimensionality::<ndarray::Ix2>();
            two.map_err(|e| Error::mismatch(format!("sound of shape {:?}: {e}", self.shape)))
        });
        Ok((each.collect::<Result<Vec<_>>>()?, rate))
    }
}

/// Pictures of samples `[N, ...]` of the view's shape, by its modality:
/// images as a sheet in rows of `columns` (about square where absent); volumes as a row of slices each; videos as a row of
/// frames each, and as they move; sequences and sound as curves, a row a channel and a column a sample; vectors as histograms
/// and clouds of their leading values; points as clouds, a row a sample. `under`, samples of a teacher, is drawn beneath in
/// curves, clouds and histograms. NaN and infinities are magenta.
pub fn view(
    samples: &HostTensor,
    under: Option<&HostTensor>,
    view: &View,
    columns: Option<usize>,
) -> Result<Pictures> {
    let still = |sheet: Vec<u8>| Pictures { sheet, animation: None };
    let values = view.channels_first(samples)?;
    match view.shown() {
        Modality::Image => Ok(still(super::grid::png(&HostTensor::from(values), view.range, columns)?)),
        Modality::Volume => Ok(still(slices::sheet(&values, view.range, columns)?)),
        Modality::Video => {
            let sheet = slices::sheet(&values, view.range, columns)?;
            Ok(Pictures { sheet, animation: Some(slices::animation(&values, view.range)?) })
        }
        other => {
            let under = under.map(|u| view.channels_first(u)).transpose()?;
            Ok(still(plot(values, under, view, other, columns)?))
        }
    }
}

#[cfg(feature = "report")]
fn plot(
    values: ArrayD<f32>,
    under: Option<ArrayD<f32>>,
    view: &View,
    modality: Modality,
    columns: Option<usize>,
) -> Result<Vec<u8>> {
    let three = |a: ArrayD<f32>| {
        a.into_dimensionality::<ndarray::Ix3>()
            .map_err(|e| Error::mismatch(format!("samples of {:?}: {e}", view.shape)))
    };
    let (values, under) = (three(values)?, under.map(three).transpose()?);
    let under = under.as_ref().map(|u| u.view());
    match modality {
        Modality::Points => plots::points(values.view(), under),
        Modality::Sequence | Modality::Audio => {
            let unit = match (modality, view.sample_rate) {
                (Modality::Audio, Some(rate)) if rate > 0 => 1.0 / f64::from(rate),
                _ => 1.0,
            };
            plots::lines(values.view(), under, unit, columns)
        }
        _ => plots::vectors(values.index_axis(Axis(1), 0), under.map(|u| u.index_axis_move(Axis(1), 0))),
    }
}

#[cfg(not(feature = "report"))]
fn plot(_: ArrayD<f32>, _: Option<ArrayD<f32>>, _: &View, _: Modality, _: Option<usize>) -> Result<Vec<u8>> {
    Err(Error::unsupported("this program was built without plots").hint("build it with the feature `report`"))
}
