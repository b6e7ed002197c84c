//! The axes of a teacher's samples as its card says them.

#[cfg(feature = "train")]
use tch::Tensor;

use crate::axes::{channel_axis, image_shape, usual_modality};
use crate::error::{Error, Result};

use super::card::{Layout, Modality, TeacherCard};

/// A batch of samples as the graph has it.
#[cfg(feature = "train")]
pub(crate) fn into_graph(layout: Layout, t: &Tensor) -> Result<Tensor> {
    match layout.to_graph() {
        Some(order) => Ok(t.f_permute(order)?.f_contiguous()?),
        None => Ok(t.shallow_clone()),
    }
}

/// What the graph gave for a batch of samples, as it is outside.
#[cfg(feature = "train")]
pub(crate) fn out_of_graph(layout: Layout, t: Tensor) -> Result<Tensor> {
    match layout.from_graph() {
        Some(order) => Ok(t.f_permute(order)?),
        None => Ok(t),
    }
}

impl TeacherCard {
    /// The axis of the sample's `shape` that holds the channels, without the batch; `None` where none does.
    pub fn channel_axis(&self) -> Option<usize> {
        channel_axis(self.layout, self.shape.len())
    }

    /// The axis of the graph's sample input that holds the channels, without the batch; `None` where none does.
    pub fn graph_channel_axis(&self) -> Option<usize> {
        match self.layout {
            Layout::Nhwc => Some(self.rank() - 1),
            _ => self.channel_axis(),
        }
    }

    /// What a sample is: as the card says, or by its rank.
    pub fn modality(&self) -> Modality {
        self.modality.unwrap_or_else(|| usual_modality(self.layout, self.shape.len(), self.sample_rate))
    }

    /// C, H, W where samples are images with their channels first; `None` for everything else.
    pub fn image_shape(&self) -> Option<[usize; 3]> {
        image_shape(&self.shape, self.layout, self.modality())
    }

    /// Checks shape, layout, modality and sample rate against one another.
    pub(super) fn validate_axes(&self) -> Result<()> {
        let bad = |what: String| Err(Error::usage(format!("card: {what}")));
        let rank = self.rank();
        let len = self.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        if rank == 0 || self.shape.contains(&0) || len.is_none() {
            return bad(format!(
                "`shape` is {:?}, expected the dimensions of one sample without the batch, each above 0",
                self.shape
            ));
        }
        match (self.layout, rank) {
            (Layout::Nhwc, 3) | (Layout::FramesFirst, 4) => {}
            (Layout::Nhwc, _) => {
                return bad(format!(
                    "layout `nhwc` is for images, shape = [C, H, W], but `shape` is {:?}; `channels-last` says that the last \
                     dimension holds the channels",
                    self.shape
                ));
            }
            (Layout::FramesFirst, _) => {
                return bad(format!(
                    "layout `frames-first` is for video, shape = [T, C, H, W], but `shape` is {:?}",
                    self.shape
                ));
            }
            _ => {}
        }
        let (fits, expected) = match self.modality {
            None | Some(Modality::Vector) => (true, ""),
            Some(Modality::Image) => (rank == 3, "3 dimensions, C, H, W"),
            Some(Modality::Volume) => (rank == 4, "4 dimensions, C, D, H, W"),
            Some(Modality::Video) => (rank == 4, "4 dimensions, C, T, H, W"),
            Some(Modality::Points) => (rank == 2, "2 dimensions, N, 3"),
            Some(Modality::Sequence | Modality::Audio) => (rank <= 2, "1 or 2 dimensions"),
        };
        if !fits {
            return bad(format!(
                "`modality` wants a shape of {expected} (in the layout's order), but `shape` is {:?}",
                self.shape
            ));
        }
        match self.sample_rate {
            Some(0) => bad("`sample_rate` is 0, expected values a second".into()),
            _ => Ok(()),
        }
    }

    /// Axes of one sample.
    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// One sample as the graph has it.
    pub fn graph_shape(&self) -> Vec<usize> {
        match (self.layout, self.shape.as_slice()) {
            (Layout::Nhwc, [c, h, w]) => vec![*h, *w, *c],
            (_, shape) => shape.to_vec(),
        }
    }

    /// `[rows, ...shape]`.
    pub fn batch_of(&self, rows: usize) -> Vec<usize> {
        std::iter::once(rows).chain(self.shape.iter().copied()).collect()
    }

    /// [`TeacherCard::batch_of`] in libtorch's numbers.
    #[cfg(feature = "train")]
    pub(crate) fn size_of(&self, rows: usize) -> Vec<i64> {
        self.batch_of(rows).into_iter().map(|d| d as i64).collect()
    }

    /// The axis (of `shape`) along which a network gives its learned variance behind its prediction: the channels', or the only
    /// one.
    pub(crate) fn variance_axis(&self) -> Option<usize> {
        self.channel_axis().or((self.rank() == 1 && self.layout != Layout::None).then_some(0))
    }

    /// The graph's output with a learned variance behind the prediction, without the batch.
    pub(crate) fn graph_shape_with_variance(&self) -> Option<Vec<usize>> {
        let axis = self.variance_axis()?;
        let mut shape = self.graph_shape();
        shape[self.axis_in_graph(axis)] *= 2;
        Some(shape)
    }

    fn axis_in_graph(&self, axis: usize) -> usize {
        match (self.layout, axis) {
            (Layout::Nhwc, 0) => 2,
            (Layout::Nhwc, axis) => axis - 1,
            (_, axis) => axis,
        }
    }

    /// The axis of the channels in the graph's own batches, `[B, ...]`.
    #[cfg(feature = "train")]
    pub(crate) fn channel_axis_in_graph(&self) -> Option<usize> {
        self.channel_axis().map(|axis| 1 + self.axis_in_graph(axis))
    }

    /// The prediction of a batch `[B, ...shape]`, or of one with a learned variance behind it.
    #[cfg(feature = "train")]
    pub(crate) fn without_variance(&self, output: Tensor) -> Result<Tensor> {
        let Some(axis) = self.variance_axis() else { return Ok(output) };
        let (at, channels) = (1 + axis as i64, self.shape[axis] as i64);
        match output.size().get(1 + axis) {
            Some(&n) if n == 2 * channels => Ok(output.f_narrow(at, 0, channels)?),
            _ => Ok(output),
        }
    }

    /// The prediction in an output of `rows` samples, which may have a learned variance behind it; in the graph's order.
    /// `None` where it is of another size.
    pub fn prediction_of(&self, output: Vec<f32>, rows: usize) -> Option<Vec<f32>> {
        let len = rows * self.sample_len();
        match (output.len(), self.variance_axis()) {
            (n, _) if n == len => Some(output),
            (n, Some(axis)) if n == 2 * len => {
                // Each run of channels with what lies within them, and as much of the variance behind it.
                let run: usize = self.graph_shape()[self.axis_in_graph(axis)..].iter().product();
                Some(output.chunks_exact(2 * run).flat_map(|both| &both[..run]).copied().collect())
            }
            _ => None,
        }
    }
}

#[cfg(all(test, feature = "train"))]
#[path = "sample_axes_tests.rs"]
mod tests;
