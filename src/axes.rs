//! The axes of a sample: which are there, which holds the channels, and how a graph that has images the other way round sees them.

use serde::{Deserialize, Serialize};
/// Which axis of a sample holds the channels. But for [`Layout::Nhwc`] the card's shape is in the graph's own order, and so is
/// everything outside the graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// `[B, C, ...]`: `[B, C, H, W]`, `[B, C, L]`, `[B, C, D, H, W]`. `nchw` is another name of it.
    #[default]
    #[serde(alias = "nchw")]
    ChannelsFirst,
    /// `[B, ..., C]`: `[B, T, D]`, `[B, N, 3]`.
    ChannelsLast,
    /// Video, `[B, T, C, H, W]`.
    FramesFirst,
    /// No axis holds channels.
    None,
    /// Images that only the graph has as `[B, H, W, C]`: the card's shape is C, H, W, and outside it is `[B, C, H, W]`.
    Nhwc,
}

/// What a sample is. It decides what a person is shown and how samples are measured without a feature network, nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Modality {
    /// `[C, H, W]`.
    Image,
    /// `[C, D, H, W]`.
    Volume,
    /// `[C, T, H, W]`, or `[T, C, H, W]` with [`Layout::FramesFirst`].
    Video,
    /// Values over steps, `[T, D]` or `[D, T]`.
    Sequence,
    /// Sound: `[L]`, `[C, L]`.
    Audio,
    /// A cloud of points, `[N, 3]`.
    Points,
    /// Numbers without an order, such as the row of a table.
    Vector,
}

/// The axis that holds the channels of a sample of `rank` axes (without the batch), outside the graph.
pub fn channel_axis(layout: Layout, rank: usize) -> Option<usize> {
    match layout {
        // The one axis of a table's row or of a wave is the sample itself.
        _ if rank < 2 => None,
        Layout::None => None,
        Layout::ChannelsFirst | Layout::Nhwc => Some(0),
        Layout::ChannelsLast => Some(rank - 1),
        Layout::FramesFirst => Some(1),
    }
}

/// What samples of this rank are where nobody says it: see [`Modality`].
pub fn usual_modality(layout: Layout, rank: usize, sample_rate: Option<u32>) -> Modality {
    match rank {
        1 | 2 if sample_rate.is_some() => Modality::Audio,
        2 => Modality::Sequence,
        3 => Modality::Image,
        4 if layout == Layout::FramesFirst => Modality::Video,
        4 => Modality::Volume,
        _ => Modality::Vector,
    }
}

impl Layout {
    /// Order in which the graph has the axes of a batch that is `[B, C, H, W]` outside; `None` where the order is the same.
    pub fn to_graph(self) -> Option<[i64; 4]> {
        (self == Self::Nhwc).then_some([0, 2, 3, 1])
    }

    /// The way back of [`Layout::to_graph`].
    pub fn from_graph(self) -> Option<[i64; 4]> {
        (self == Self::Nhwc).then_some([0, 3, 1, 2])
    }

    /// Samples of this `shape`, one after the other, as the graph has them.
    pub(crate) fn values_into_graph(self, values: &[f32], shape: &[usize]) -> Vec<f32> {
        match (self.to_graph(), shape) {
            (Some(_), [c, h, w]) => transpose(values, *c, h * w),
            _ => values.to_vec(),
        }
    }

    /// The way back of [`Layout::values_into_graph`].
    pub(crate) fn values_out_of_graph(self, values: Vec<f32>, shape: &[usize]) -> Vec<f32> {
        match (self.from_graph(), shape) {
            (Some(_), [c, h, w]) => transpose(&values, h * w, *c),
            _ => values,
        }
    }
}

/// `[B, a, b]` to `[B, b, a]`.
fn transpose(values: &[f32], a: usize, b: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    for row in values.chunks_exact(a * b) {
        (0..b).for_each(|j| out.extend((0..a).map(|i| row[i * b + j])));
    }
    out
}

/// C, H, W where samples of this shape are images with their channels first.
pub fn image_shape(shape: &[usize], layout: Layout, modality: Modality) -> Option<[usize; 3]> {
    let first = matches!(layout, Layout::ChannelsFirst | Layout::Nhwc);
    <[usize; 3]>::try_from(shape).ok().filter(|_| first && modality == Modality::Image)
}

/// Dimensions for a message: `[B, 16, 7]`.
pub(crate) fn written(shape: &[usize]) -> String {
    let dims: Vec<String> = std::iter::once("B".to_owned()).chain(shape.iter().map(ToString::to_string)).collect();
    format!("[{}]", dims.join(", "))
}
