//! The discriminator's head: small networks on the fake score's own features, one for each tap, whose answers are averaged.

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::torch::{ParamSet, shim};

/// Channels of the hidden layers.
const WIDTH: i64 = 128;
/// Feature maps are halved until neither side is longer.
const SMALLEST: i64 = 4;

/// What a tap's features look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// `[B, C, H, W]`: convolutions of stride 2, so many of them.
    Map { halvings: usize },
    /// `[B, T, C]` or `[B, C]`: a layer on every token.
    Tokens,
}

/// Heads with their parameters.
#[derive(Debug)]
pub struct Head {
    params: ParamSet,
    forms: Vec<Form>,
    channels_last: bool,
}

impl Head {
    /// Heads for features of these shapes (first dimension the batch). The last layer starts at zero: every logit is 0, real
    /// and generated images are equally likely.
    pub fn new(features: &[(String, Vec<i64>)], channels_last: bool, seed: u64, device: Device) -> Result<Self> {
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
            let channels = |at: usize| shape.get(at).copied().unwrap_or(0);
            let form = match shape.len() {
                4 => {
                    let [c, h, w] = if channels_last { [3, 1, 2] } else { [1, 2, 3] }.map(channels);
                    let mut halvings = 0;
                    let mut side = h.max(w);
                    while side > SMALLEST {
                        side = (side + 1) / 2;
                        halvings += 1;
                    }
                    // One layer at least, even on maps that are small already.
                    let layers = halvings.max(1);
                    for layer in 0..layers {
                        let from = if layer == 0 { c } else { WIDTH };
                        add(&format!("conv{layer}.weight"), &[WIDTH, from, 3, 3], Some(9 * from))?;
                        add(&format!("conv{layer}.bias"), &[WIDTH], None)?;
                        add(&format!("norm{layer}.scale"), &[WIDTH], None)?;
                        add(&format!("norm{layer}.bias"), &[WIDTH], None)?;
                    }
                    Form::Map { halvings }
                }
                2 | 3 => {
                    let c = channels(shape.len() - 1);
                    add("linear.weight", &[WIDTH, c], Some(c))?;
                    add("linear.bias", &[WIDTH], None)?;
                    Form::Tokens
                }
                _ => {
                    return Err(Error::usage(format!(
                        "gan.taps: `{tap}` has shape {shape:?}, expected feature maps [B, C, H, W] or tokens [B, T, C]"
                    )));
                }
            };
            add("out.weight", &[1, WIDTH], None)?;
            add("out.bias", &[1], None)?;
            forms.push(form);
        }
        Ok(Self { params: ParamSet::new(names, tensors)?, forms, channels_last })
    }

    /// Trained weights of the head.
    pub fn params(&self) -> &ParamSet {
        &self.params
    }

    /// Logits `[B]` that an image is real, the mean over the taps.
    pub fn logits(&self, features: &[Tensor]) -> Result<Tensor> {
        if features.len() != self.forms.len() {
            return Err(Error::mismatch(format!("{} features for {} taps", features.len(), self.forms.len())));
        }
        let mut params = self.params.tensors().iter();
        let mut next = || params.next().ok_or_else(|| Error::mismatch("the head has too few parameters"));
        let mut sum: Option<Tensor> = None;
        for (x, form) in features.iter().zip(&self.forms) {
            let x = x.f_to_kind(Kind::Float)?;
            let pooled = match form {
                Form::Map { halvings } => {
                    let mut x = if self.channels_last { x.f_permute([0, 3, 1, 2])? } else { x };
                    let stride = if *halvings == 0 { 1 } else { 2 };
                    for _ in 0..(*halvings).max(1) {
                        let (weight, bias) = (next()?, next()?);
                        x = x.f_conv2d(weight, Some(bias), [stride, stride], [1, 1], [1, 1], 1)?;
                        x = x.f_group_norm(32, Some(next()?), Some(next()?), 1e-5, false)?.f_silu()?;
                    }
                    x.f_mean_dim([2i64, 3].as_slice(), false, Kind::Float)?
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
        let sum = sum.ok_or_else(|| Error::mismatch("a discriminator without taps"))?;
        Ok(sum.f_div_scalar(self.forms.len() as f64)?)
    }
}
