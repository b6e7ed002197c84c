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
        Self {
            shape: card.shape.clone(),
            channel_axis: card.channel_axis(),
            modality: card.modality(),
            range: card.range,
            sample_rate: card.sample_rate,
        }
    }

    /// What a student makes.
    pub fn of_student(info: &StudentInfo) -> Self {
        Self {
            shape: info.shape.clone(),
            channel_axis: info.channel_axis(),
            modality: info.modality,
            range: info.range,
            sample_rate: info.sample_rate,
        }
    }

    /// Whether a picture of it is a sheet of images, so that neither plots nor a teacher beneath belong to it.
    pub fn is_image(&self) -> bool {
        self.shown() == Modality::Image
    }

    /// Whether a picture of it is curves, clouds or histograms, in which other samples can lie beneath.
    pub fn is_plot(&self) -> bool {
        !matches!(self.shown(), Modality::Image | Modality::Volume | Modality::Video)
    }

    /// What can be shown of samples of this shape: of another number of dimensions than the modality has, they are numbers.
    fn shown(&self) -> Modality {
        let frames = 4 - usize::from(self.channel_axis.is_none());
        match (self.modality, self.shape.len()) {
            (Modality::Image, r) if r + 1 != frames => Modality::Vector,
            (Modality::Audio, 2) if self.channel_axis.is_none() => Modality::Vector,
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
        match self.channels() {
            Some(axis) => {
                let mut order: Vec<usize> = (0..values.ndim()).collect();
                let channels = order.remove(axis + 1);
                order.insert(1, channels);
                values = values.permuted_axes(IxDyn(&order));
            }
            None => values.insert_axis_inplace(Axis(1)),
        }
        Ok(values)
    }

    /// The axis of `shape` that is shown as channels.
    fn channels(&self) -> Option<usize> {
        let table = self.shape.len() == 2;
        match (self.shown(), self.channel_axis) {
            // Coordinates are few, points are many: nobody means 1024 coordinates of 3 points.
            (Modality::Points, _) => Some(usize::from(self.shape[1] <= self.shape[0])),
            (Modality::Sequence, None) if table => Some(1),
            (_, axis) => axis,
        }
    }

    /// Refuses samples that are no sound, or whose rate is not known; gives the rate, Hz.
    pub fn check_sound(&self) -> Result<u32> {
        if self.shown() != Modality::Audio {
            let shape = crate::axes::written(&self.shape);
            return Err(Error::usage(format!("the samples are {shape}, which the card does not call sound")).hint(
                "sound is [B, L] or [B, C, L] with a `sample_rate` in the card; .npy and .npz hold samples of any kind",
            ));
        }
        self.sample_rate.filter(|r| *r > 0).ok_or_else(|| {
            Error::usage("the card does not say how many values a second of sound has").hint("sample_rate = 22050")
        })
    }

    /// The samples as sound, each `[C, L]`, with the number of values a second. Errors as [`View::check_sound`].
    pub fn sound(&self, samples: &HostTensor) -> Result<(Vec<ndarray::Array2<f32>>, u32)> {
        let rate = self.check_sound()?;
        let values = self.channels_first(samples)?;
        let each = values.outer_iter().map(|sample| {
            let two = sample.to_owned().into_dimensionality::<ndarray::Ix2>();
            two.map_err(|e| Error::mismatch(format!("sound of shape {:?}: {e}", self.shape)))
        });
        Ok((each.collect::<Result<Vec<_>>>()?, rate))
    }
}

/// Samples that are drawn beneath others.
#[derive(Debug, Clone, Copy)]
pub struct Beneath<'a> {
    /// Samples of the same shape, from the same noise.
    pub samples: &'a HostTensor,
    /// What those on top are called, and these.
    pub names: [&'a str; 2],
}

/// Pictures of samples `[N, ...]` of the view's shape, by its modality:
/// images as a sheet in rows of `columns` (about square where absent); volumes as a row of slices each; videos as a row of
/// frames each, and as they move; sequences and sound as curves, a row a channel and a column a sample; vectors as histograms
/// and clouds of their leading values; points as clouds, a row a sample. `beneath` is seen in curves, clouds and histograms alone. NaN and infinities are magenta.
pub fn view(
    samples: &HostTensor,
    beneath: Option<Beneath<'_>>,
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
            let under = beneath.map(|b| Ok::<_, Error>((view.channels_first(b.samples)?, b.names))).transpose()?;
            Ok(still(plot(values, under, view, other, columns)?))
        }
    }
}

#[cfg(feature = "report")]
fn plot(
    values: ArrayD<f32>,
    under: Option<(ArrayD<f32>, [&str; 2])>,
    view: &View,
    modality: Modality,
    columns: Option<usize>,
) -> Result<Vec<u8>> {
    let three = |a: ArrayD<f32>| {
        a.into_dimensionality::<ndarray::Ix3>()
            .map_err(|e| Error::mismatch(format!("samples of {:?}: {e}", view.shape)))
    };
    let names = under.as_ref().map_or(Vec::new(), |(_, names)| names.to_vec());
    let (values, under) = (three(values)?, under.map(|(u, _)| three(u)).transpose()?);
    let under = under.as_ref().map(|u| u.view());
    let set = plots::Sets { legend: &names, own: values.view(), under };
    match modality {
        Modality::Points => plots::points(&set),
        Modality::Sequence | Modality::Audio => {
            let unit = match (modality, view.sample_rate) {
                (Modality::Audio, Some(rate)) if rate > 0 => 1.0 / f64::from(rate),
                _ => 1.0,
            };
            plots::lines(&set, unit, columns)
        }
        _ => plots::vectors(&set),
    }
}

#[cfg(not(feature = "report"))]
fn plot(
    _: ArrayD<f32>,
    _: Option<(ArrayD<f32>, [&str; 2])>,
    _: &View,
    _: Modality,
    _: Option<usize>,
) -> Result<Vec<u8>> {
    Err(Error::unsupported("this program was built without plots").hint("build it with the feature `report`"))
}

#[cfg(test)]
mod tests;
