//! The discriminator's head: small networks on the fake score's own features, one for each tap, whose answers are averaged; or no
//! weights at all, where the features' own mean over their channels is the answer at each place.

use tch::{Device, Kind, Tensor};

use crate::diffusion::{Layout, TeacherCard};
use crate::distill::config::HeadKind;
use crate::error::{Error, Result};
use crate::torch::{ParamSet, shim};

/// Channels of the hidden layers.
const WIDTH: i64 = 128;
/// Feature maps are halved until no side is longer.
const SMALLEST: i64 = 4;

/// What a tap's features look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// `[B, C, ...]` over one to three axes: convolutions of stride 2, so many of them. `channels`: the axis of the channels as
    /// the features come.
    Map { halvings: usize, channels: usize },
    /// `[B, T, C]` or `[B, C]`: a layer on every token.
    Tokens,
    /// The mean over this axis.
    Mean { channels: usize },
}

/// What the sample's own axes say about those of features inside the network.
#[derive(Debug, Clone)]
pub struct Axes {
    /// Sizes of the sample's axes without the channels', in the graph's order.
    lengths: Vec<i64>,
    /// Axes of a batch of samples in the graph, and which of them holds the channels.
    rank: usize,
    channels: Option<usize>,
    /// Of images the layout alone decides: feature maps lie as the sample does, and tokens have their channels last.
    image: bool,
}

impl Axes {
    /// Of this teacher's samples.
    pub fn of(card: &TeacherCard) -> Self {
        let channels = card.channel_axis_in_graph();
        let shape = card.graph_shape();
        let lengths = (1..).zip(&shape).filter(|(axis, _)| Some(*axis) != channels).map(|(_, n)| *n as i64).collect();
        let image = card.rank() == 3 && matches!(card.layout, Layout::ChannelsFirst | Layout::Nhwc);
        Self { lengths, rank: 1 + shape.len(), channels, image }
    }

    /// The axis of the channels in features `[B, ...]` of this shape. A graph may turn its sample round before its first
    /// convolution: what lies along an axis (the sample's length, halved or not) says more than the layout.
    fn channels_in(&self, shape: &[i64]) -> usize {
        let last = shape.len() - 1;
        let usual = match self.channels.filter(|_| shape.len() == self.rank) {
            Some(axis) => axis,
            None if last <= 2 => last,
            None => 1,
        };
        if self.image || last < 2 {
            return usual;
        }
        let first = |exact| [usual, 1, last].into_iter().find(|axis| self.are_lengths(shape, *axis, exact));
        first(true).or_else(|| first(false)).unwrap_or(usual)
    }

    /// Whether the axes of features beside the batch and `channels` are the sample's own; halved any number of times where not
    /// `exact`.
    fn are_lengths(&self, shape: &[i64], channels: usize, exact: bool) -> bool {
        let rest: Vec<i64> = (0..).zip(shape).filter(|(k, _)| *k != 0 && *k != channels).map(|(_, n)| *n).collect();
        let halved = |mut length: i64, found: i64| {
            while !exact && length > found && length > 1 {
                length = (length + 1) / 2;
            }
            length == found
        };
        match rest.as_slice() {
            [tokens] if self.lengths.len() != 1 => *tokens == self.lengths.iter().product::<i64>(),
            rest => {
                rest.len() == self.lengths.len() && rest.iter().zip(&self.lengths).all(|(found, n)| halved(*n, *found))
            }
        }
    }
}

/// Heads with their parameters.
#[derive(Debug)]
pub struct Head {
    params: ParamSet,
    forms: Vec<Form>,
}

impl Head {
    /// Heads for features of these shapes (first dimension the batch). The last layer starts at zero: every logit is 0, real
    /// and generated samples are equally likely.
    ///
    /// [`HeadKind::ChannelMean`] has no layers.
    ///
    /// Errors: features of less than two or more than five dimensions.
    pub fn new(
        kind: HeadKind,
        features: &[(String, Vec<i64>)],
        axes: &Axes,
        seed: u64,
        device: Device,
    ) -> Result<Self> {
        let (mut names, mut tensors, mut forms) = (Vec::new(), Vec::new(), Vec::new());
        for (k, (tap, shape)) in features.iter().enumerate() {
            let mut add = |name: &str, shape: &[i64], fan_in: Option<i64>| -> Result<()> {
                let draw = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(names.len() as u64);
                tensors.push(match fan_in {
                    Some(n) => shim::randn(draw, shape, device)?.f_mul_scalar((1.0 / n as f64).sqrt())?,
                    None if name.ends_with("scale") => Tensor::f_ones(shape, (Kind::Float, device))?,
                    None => Tensor::f_zeros(shape, (Kind::Float, device))?,
                });
                names.push(format!("{k}.{name}"));
                Ok(())
            };
            if !(2..=5).contains(&shape.len()) {
                return Err(Error::usage(format!(
                    "gan.taps: `{tap}` has shape {shape:?}, expected tokens [B, T, C] or feature maps [B, C, ...] over one to \
                     three axes"
                )));
            }
            let at = axes.channels_in(shape);
            if kind == HeadKind::ChannelMean {
                forms.push(Form::Mean { channels: at });
                continue;
            }
            let c = shape[at];
            let form = if at + 1 == shape.len() && shape.len() <= 3 {
                add("linear.weight", &[WIDTH, c], Some(c))?;
                add("linear.bias", &[WIDTH], None)?;
                Form::Tokens
            } else {
                let sides = (1..).zip(&shape[1..]).filter(|(axis, _)| *axis != at).map(|(_, n)| *n);
                let (mut halvings, mut side) = (0, sides.clone().max().unwrap_or(1));
                while side > SMALLEST {
                    side = (side + 1) / 2;
                    halvings += 1;
                }
                let sides = sides.count();
                // One layer at least, even on maps that are small already.
                for layer in 0..halvings.max(1) {
                    let from = if layer == 0 { c } else { WIDTH };
                    let mut filter = vec![3; 2 + sides];
                    filter[..2].copy_from_slice(&[WIDTH, from]);
                    add(&format!("conv{layer}.weight"), &filter, Some(from * 3i64.pow(sides as u32)))?;
                    add(&format!("conv{layer}.bias"), &[WIDTH], None)?;
                    add(&format!("norm{layer}.scale"), &[WIDTH], None)?;
                    add(&format!("norm{layer}.bias"), &[WIDTH], None)?;
                }
                Form::Map { halvings, channels: at }
            };
            add("out.weight", &[1, WIDTH], None)?;
            add("out.bias", &[1], None)?;
            forms.push(form);
        }
        Ok(Self { params: ParamSet::new(names, tensors)?, forms })
    }

    /// Trained weights of the head.
    pub fn params(&self) -> &ParamSet {
        &self.params
    }

    /// Logits that a sample is real: `[B]`, the mean over the taps, or `[B, places]` without layers, with the places of all taps.
    pub fn logits(&self, features: &[Tensor]) -> Result<Tensor> {
        if features.len() != self.forms.len() {
            return Err(Error::mismatch(format!("{} features for {} taps", features.len(), self.forms.len())));
        }
        let mut params = self.params.tensors().iter();
        let mut next = || params.next().ok_or_else(|| Error::mismatch("the head has too few parameters"));
        let mut sum: Option<Tensor> = None;
        let mut places = Vec::new();
        for (x, form) in features.iter().zip(&self.forms) {
            let x = x.f_to_kind(Kind::Float)?;
            let pooled = match form {
                Form::Map { halvings, channels } => {
                    let mut x = channels_first(x, *channels)?;
                    let stride = if *halvings == 0 { 1 } else { 2 };
                    for _ in 0..(*halvings).max(1) {
                        x = convolved(&x, next()?, next()?, stride)?;
                        x = x.f_group_norm(32, Some(next()?), Some(next()?), 1e-5, false)?.f_silu()?;
                    }
                    let sides: Vec<i64> = (2..x.dim() as i64).collect();
                    x.f_mean_dim(sides.as_slice(), false, Kind::Float)?
                }
                Form::Mean { channels } => {
                    let mean = x.f_mean_dim([*channels as i64].as_slice(), false, Kind::Float)?;
                    places.push(mean.f_reshape([mean.size()[0], -1])?);
                    continue;
                }
                Form::Tokens => {
                    let hidden = x.f_linear(next()?, Some(next()?))?.f_silu()?;
                    if hidden.dim() == 3 { hidden.f_mean_dim([1i64].as_slice(), false, Kind::Float)? } else { hidden }
                }
            };
            let logit = pooled.f_linear(next()?, Some(next()?))?.f_squeeze_dim(1)?;
            sum = Some(match sum {
                None => logit,
                Some(sum) => sum.f_add(&logit)?,
            });
        }
        if !places.is_empty() {
            return Ok(Tensor::f_cat(&places, 1)?);
        }
        let sum = sum.ok_or_else(|| Error::mismatch("a discriminator without taps"))?;
        Ok(sum.f_div_scalar(self.forms.len() as f64)?)
    }
}

/// Features with their channels behind the batch.
fn channels_first(x: Tensor, channels: usize) -> Result<Tensor> {
    if channels == 1 {
        return Ok(x);
    }
    let channels = channels as i64;
    let rest = (1..x.dim() as i64).filter(|axis| *axis != channels);
    Ok(x.f_permute([0, channels].into_iter().chain(rest).collect::<Vec<i64>>())?)
}

/// A convolution of three values along each axis.
fn convolved(x: &Tensor, weight: &Tensor, bias: &Tensor, stride: i64) -> Result<Tensor> {
    let bias = Some(bias);
    Ok(match x.dim() {
        3 => x.f_conv1d(weight, bias, [stride], [1], [1], 1)?,
        4 => x.f_conv2d(weight, bias, [stride, stride], [1, 1], [1, 1], 1)?,
        _ => x.f_conv3d(weight, bias, [stride; 3], [1; 3], [1; 3], 1)?,
    })
}

#[cfg(test)]
#[path = "head_tests.rs"]
mod tests;
