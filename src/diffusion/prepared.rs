//! What the host works out before a network is evaluated at some noise levels: the coefficients of the conversion, the times, the
//! strength of guidance. Made apart from the evaluation, it can be made again for other levels of the same form.

use std::rc::Rc;

use tch::{Device, Tensor};

use crate::error::{Context, Error, Result};
use crate::torch::convert;
use crate::torch::convert::column;
use crate::torch::device::send;

use super::card::InputSpec;
use super::condition::Condition;
use super::conditions::HostConditions;
use super::conversion::Coefficients;
use super::denoiser::Denoiser;
use super::guidance::Guidance;

/// How numbers that may be equal for all rows are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// One number for all rows where all are equal, otherwise one number a row.
    Short,
    /// Always one number a row, so that the shapes are the same for all noise levels.
    Fixed,
}

/// What multiplies each row.
#[derive(Debug)]
pub(super) enum Factor {
    One,
    Number(f64),
    /// f32 `[B, 1, ...]`, of the samples' rank.
    Column(Tensor),
}

impl Factor {
    pub(super) fn new(values: &[f64], rank: usize, form: Form, device: Device) -> Result<Self> {
        if values.iter().all(|v| *v == 1.0) {
            return Ok(Self::One);
        }
        if values.iter().all(|v| *v == values[0]) && (form == Form::Short || values[0] == 0.0) {
            return Ok(Self::Number(values[0]));
        }
        Ok(Self::Column(column(values, rank, device)?))
    }

    pub(super) fn is_zero(&self) -> bool {
        matches!(self, Self::Number(n) if *n == 0.0)
    }

    /// `t` times the factor; `t` itself where that is 1, bit for bit.
    pub(super) fn times(&self, t: &Tensor) -> Result<Tensor> {
        match self {
            Self::One => Ok(t.shallow_clone()),
            Self::Number(n) => Ok(t.f_mul_scalar(*n)?),
            Self::Column(c) => t.f_mul(c).context("applying the conversion's coefficients"),
        }
    }

    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(match self {
            Self::One => Self::One,
            Self::Number(n) => Self::Number(*n),
            Self::Column(c) => Self::Column(f(c)?),
        })
    }

    fn form(&self, out: &mut Vec<f64>) {
        out.extend(match self {
            Self::One => [1.0, 1.0],
            Self::Number(n) => [2.0, *n],
            Self::Column(_) => [3.0, 0.0],
        });
    }
}

/// Rows that are evaluated together.
#[derive(Debug)]
pub(super) struct Part {
    /// Which rows (i64); all of them in their order where there is but one part.
    pub rows: Option<Tensor>,
    pub count: usize,
    /// The network's time input.
    pub time: Tensor,
    pub c_in: Factor,
    pub skip: Factor,
    pub out: Factor,
}

impl Part {
    fn new(
        coefficients: &[Coefficients],
        rank: usize,
        spec: &InputSpec,
        single: bool,
        form: Form,
        device: Device,
    ) -> Result<Self> {
        let factor = |pick: fn(&Coefficients) -> f64| {
            Factor::new(&coefficients.iter().map(pick).collect::<Vec<_>>(), rank, form, device)
        };
        Ok(Self {
            rows: None,
            count: coefficients.len(),
            time: send(&time(coefficients, spec, single)?, device)?,
            c_in: factor(|c| c.c_in)?,
            skip: factor(|c| c.skip)?,
            out: factor(|c| c.out)?,
        })
    }
}

/// Guidance of an evaluation.
#[derive(Debug)]
pub(super) struct Guided {
    pub by: By,
    pub strength: Strength,
    pub rescale: Option<Rescale>,
}

/// Where `D_u` comes from.
#[derive(Debug)]
pub(super) enum By {
    /// The network without its conditions, in a call of twice the rows of which these are the second half: null values in the card's
    /// order; none where a condition has none.
    Nulls(Vec<Option<Tensor>>),
    /// A weaker network, and its own evaluation.
    Weaker(Rc<Denoiser>, Box<PreparedLevels>),
}

/// [`Guidance::rescale`], without a share of 0. Of `D = k x + R` it is `R` that is a multiple of the network's output, with a factor of
/// the noise level alone, which leaves the ratio of two deviations.
#[derive(Debug)]
pub(super) struct Rescale {
    /// The share `phi`.
    pub share: f64,
    /// `k` of each row, `c_skip c_in`.
    pub kept: Factor,
}

/// Keeps 0/0 out where a network gives one number for all values of a sample.
const SMALLEST_DEVIATION: f64 = 1e-12;

impl Rescale {
    /// `D_g + phi (std R_c / std R_g - 1) R_g`: with `D_g` equal to `D_c` that is `D_c`, bit for bit.
    pub(super) fn apply(&self, x: &Tensor, with: &Tensor, guided: Tensor) -> Result<Tensor> {
        let rest = |d: &Tensor| match self.kept.is_zero() {
            true => Ok(d.shallow_clone()),
            false => Ok::<_, Error>(d.f_sub(&self.kept.times(x)?)?),
        };
        let axes: Vec<i64> = (1..x.dim() as i64).collect();
        let deviation =
            |r: &Tensor| Ok::<_, Error>(r.f_std_dim(axes.as_slice(), true, true)?.f_clamp_min(SMALLEST_DEVIATION)?);
        let made = rest(&guided)?;
        let ratio = deviation(&rest(with)?)?.f_div(&deviation(&made)?)?;
        Ok(guided.f_add(&made.f_mul(&ratio.f_sub_scalar(1.0)?.f_mul_scalar(self.share)?)?)?)
    }
}

#[derive(Debug)]
pub(super) enum Strength {
    /// `D_u + scale (D_c - D_u)`.
    Everywhere(f64),
    /// `scale - 1` of each row: `D_c + (scale - 1) (D_c - D_u)`, which is `D_c` to the bit where it is 0.
    Extra(Tensor),
}

/// Coefficients and times of an evaluation at given noise levels, as tensors on the device.
#[derive(Debug)]
pub struct PreparedLevels {
    /// Samples; twice as many are evaluated under guidance.
    pub(super) samples: usize,
    pub(super) parts: Vec<Part>,
    /// Where each row lies among those of all parts.
    pub(super) back: Option<Tensor>,
    pub(super) guided: Option<Guided>,
}

/// What a network's file says about how it is called.
#[derive(Debug, Clone, Copy)]
pub(super) struct Calls<'a> {
    /// Axes of a sample, without the batch.
    pub rank: usize,
    /// The time input.
    pub time: &'a InputSpec,
    /// It takes one time for the whole batch.
    pub single: bool,
    /// The only number of rows that it takes, where the file fixes one.
    pub rows: Option<usize>,
}

impl PreparedLevels {
    /// Of these coefficients, one a row. Rows that cannot be evaluated in one call, since the network takes one time for all or
    /// another number of rows, are evaluated apart; where a call has too few of them, the last is repeated and left out again.
    ///
    /// Errors: a fixed form of rows at several times for a network that takes one.
    pub(super) fn new(coefficients: &[Coefficients], calls: Calls, form: Form, device: Device) -> Result<Self> {
        let Calls { rank, time, single, rows } = calls;
        let samples = coefficients.len();
        let together = !single || coefficients.iter().all(|c| c.time == coefficients[0].time);
        if single && form == Form::Fixed && samples > 1 {
            return Err(Error::usage("the network takes one time for the whole batch: its rows are evaluated apart, differently in each step")
                .hint("leave cuda_graphs out"));
        }
        if samples == 0 {
            return Ok(Self { samples, parts: Vec::new(), back: None, guided: None });
        }
        if together && rows.is_none_or(|n| n == samples) {
            let parts = vec![Part::new(coefficients, rank, time, single, form, device)?];
            return Ok(Self { samples, parts, back: None, guided: None });
        }
        let mut groups: Vec<(f64, Vec<i64>)> = Vec::new();
        for (row, c) in coefficients.iter().enumerate() {
            match groups.iter_mut().find(|(time, _)| together || *time == c.time) {
                Some((_, rows)) => rows.push(row as i64),
                None => groups.push((c.time, vec![row as i64])),
            }
        }
        let (mut parts, mut back, mut place) = (Vec::new(), vec![0i64; samples], 0);
        for (_, group) in &groups {
            for piece in group.chunks(rows.unwrap_or(group.len())) {
                let count = rows.unwrap_or(piece.len());
                let taken: Vec<i64> = (0..count).map(|k| piece[k.min(piece.len() - 1)]).collect();
                let picked: Vec<Coefficients> = taken.iter().map(|r| coefficients[*r as usize]).collect();
                let index = send(&Tensor::f_from_slice(&taken)?, device)?;
                parts.push(Part { rows: Some(index), ..Part::new(&picked, rank, time, single, form, device)? });
                piece.iter().enumerate().for_each(|(k, row)| back[*row as usize] = (place + k) as i64);
                place += count;
            }
        }
        Ok(Self { samples, parts, back: Some(send(&Tensor::f_from_slice(&back)?, device)?), guided: None })
    }

    /// A copy with each tensor `t` replaced by `f(t)`; the order of the calls is fixed.
    pub fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let parts = self.parts.iter().map(|p| {
            Ok(Part {
                rows: p.rows.as_ref().map(&mut *f).transpose()?,
                count: p.count,
                time: f(&p.time)?,
                c_in: p.c_in.map(f)?,
                skip: p.skip.map(f)?,
                out: p.out.map(f)?,
            })
        });
        let parts = parts.collect::<Result<_>>()?;
        let back = self.back.as_ref().map(&mut *f).transpose()?;
        let guided = match &self.guided {
            None => None,
            Some(g) => Some(Guided {
                by: match &g.by {
                    By::Nulls(nulls) => {
                        By::Nulls(nulls.iter().map(|n| n.as_ref().map(&mut *f).transpose()).collect::<Result<_>>()?)
                    }
                    By::Weaker(network, levels) => By::Weaker(network.clone(), Box::new(levels.map(f)?)),
                },
                rescale: match &g.rescale {
                    None => None,
                    Some(r) => Some(Rescale { share: r.share, kept: r.kept.map(f)? }),
                },
                strength: match &g.strength {
                    Strength::Everywhere(scale) => Strength::Everywhere(*scale),
                    Strength::Extra(t) => Strength::Extra(f(t)?),
                },
            }),
        };
        Ok(Self { samples: self.samples, parts, back, guided })
    }

    /// Appends everything that is not kept in tensors, as numbers: two evaluations can share a recorded CUDA graph only
    /// where these are equal.
    pub fn form(&self, out: &mut Vec<f64>) {
        out.push(self.samples as f64);
        for p in &self.parts {
            out.push(p.count as f64);
            [&p.c_in, &p.skip, &p.out].iter().for_each(|f| f.form(out));
        }
        if let Some(g) = &self.guided {
            match &g.by {
                By::Nulls(nulls) => out.extend(nulls.iter().map(|n| f64::from(u8::from(n.is_some())))),
                By::Weaker(_, levels) => levels.form(out),
            }
            if let Some(r) = &g.rescale {
                out.push(r.share);
                r.kept.form(out);
            }
            out.push(if let Strength::Everywhere(scale) = g.strength { scale } else { f64::INFINITY });
        }
    }

    /// [`Guidance`] of an evaluation at the noise levels `sigma`: by null values its coefficients were given twice over, by a weaker
    /// network once.
    pub(super) fn guide(&mut self, guidance: Guidance, sigma: &[f64], by: By, with: &Wanted) -> Result<()> {
        let Wanted { rank, form, device, coefficients } = *with;
        let scales: Vec<f64> = sigma.iter().map(|s| guidance.at(*s)).collect();
        let strength =
            if guidance.is_everywhere() || (form == Form::Short && scales.iter().all(|s| *s == guidance.scale)) {
                Strength::Everywhere(guidance.scale)
            } else {
                // Rows outside the interval keep `D_c`, bit for bit.
                let extra: Vec<f64> = scales.iter().map(|s| s - 1.0).collect();
                Strength::Extra(column(&extra, rank, device)?)
            };
        let kept: Vec<f64> = coefficients.iter().map(|c| c.skip * c.c_in).collect();
        let rescale = match guidance.rescale {
            0.0 => None,
            share => Some(Rescale { share, kept: Factor::new(&kept, rank, form, device)? }),
        };
        self.guided = Some(Guided { by, strength, rescale });
        self.samples = sigma.len();
        Ok(())
    }
}

/// How guidance is to be made ready.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    /// Axes of a sample, without the batch.
    pub rank: usize,
    pub form: Form,
    pub device: Device,
    /// Of the guided network, one a row.
    pub coefficients: &'a [Coefficients],
}

/// Null values of conditions for `rows` samples, in the order of the conditions.
pub(super) fn nulls(conditions: &[(Condition, InputSpec)], rows: usize, device: Device) -> Result<Vec<Option<Tensor>>> {
    let null = |(condition, spec): &(Condition, InputSpec)| {
        let host = HostConditions::null(condition, spec, rows)?;
        host.map(|h| send(&convert::to_torch(&h)?, device)).transpose()
    };
    conditions.iter().map(null).collect()
}

/// The time input in the graph's element type and rank.
fn time(coefficients: &[Coefficients], spec: &InputSpec, single: bool) -> Result<Tensor> {
    let count = if single { 1 } else { coefficients.len() };
    let times: Vec<f64> = coefficients[..count].iter().map(|c| c.time).collect();
    let tensor = Tensor::f_from_slice(&times)?;
    // Integer steps are rounded, not cut off.
    let tensor = if spec.dtype.is_float() { tensor } else { tensor.f_round()? };
    let mut shape = vec![1i64; spec.shape.len()];
    if let Some(lead) = shape.first_mut() {
        *lead = count as i64;
    }
    Ok(tensor.f_to_kind(convert::kind(spec.dtype))?.f_reshape(&shape)?)
}
