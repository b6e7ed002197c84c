//! Attention as fused from its products. See `graph::fuse::attention` for the attributes.

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::graph::Node;
use crate::tensor::DType;
use crate::torch::convert;
use crate::torch::convert::is_float;
use crate::torch::cpu::linear;
use crate::torch::exec::kernel::{Args, Kernel, Value, one};
use crate::torch::ops::util;
use crate::torch::training::{self, autocast_enabled};

#[derive(Clone, Copy, PartialEq)]
enum Mask {
    /// Added to the scores.
    Add,
    /// Scores where it is true keep their value.
    Seen,
    /// Scores where it is true are replaced.
    Hidden,
}

struct Attention {
    q_perm: Option<Vec<i64>>,
    k_perm: Option<Vec<i64>>,
    v_perm: Option<Vec<i64>>,
    out_perm: Option<Vec<i64>>,
    /// Of each factor: 0 where it meets q, 1 k, 2 the scores; and whether it divides.
    factors: Vec<(i64, bool)>,
    mask: Option<Mask>,
    fill: f64,
    axis: i64,
    cast: Option<Kind>,
    guarded: bool,
    parted: Option<Parted>,
}

/// Shapes of the scores between the products, where heads and batch are one axis in these.
struct Parted {
    squeeze: Vec<i64>,
    unsqueeze: Vec<i64>,
}

/// The shape that a Reshape of a tensor of shape `from` makes.
fn reshaped(from: &[i64], to: &[i64]) -> Result<Vec<i64>> {
    let mut shape: Vec<i64> =
        to.iter().enumerate().map(|(i, &d)| if d == 0 { from.get(i).copied().unwrap_or(0) } else { d }).collect();
    let count: i64 = from.iter().product();
    let known: i64 = shape.iter().filter(|&&d| d != -1).product();
    if let Some(open) = shape.iter_mut().find(|d| **d == -1) {
        *open = if known == 0 { 0 } else { count / known };
    }
    if shape.iter().product::<i64>() != count {
        return Err(Error::invalid(format!("a tensor of shape {from:?} cannot be reshaped to {to:?}")));
    }
    Ok(shape)
}

impl Parted {
    /// The scores' shape after the first product of shape `product`, and that of their weights before the second.
    fn shapes(&self, product: &[i64], shape: &[i64], back: &[i64]) -> Result<(Vec<i64>, Vec<i64>)> {
        let mut scores = reshaped(product, shape)?;
        let mut gone = self.squeeze.iter().map(|&x| util::axis(x, scores.len())).collect::<Result<Vec<_>>>()?;
        gone.sort_unstable();
        for x in gone.into_iter().rev() {
            if scores.remove(x as usize) != 1 {
                return Err(Error::invalid(format!("axis {x} is squeezed but is not 1")));
            }
        }
        let mut wide = scores.clone();
        let rank = wide.len() + self.unsqueeze.len();
        let mut new = self.unsqueeze.iter().map(|&x| util::axis(x, rank)).collect::<Result<Vec<_>>>()?;
        new.sort_unstable();
        for x in new {
            wide.insert((x as usize).min(wide.len()), 1);
        }
        Ok((scores, reshaped(&wide, back)?))
    }
}

pub(super) fn build(node: &Node) -> Result<Kernel> {
    let a = &node.attributes;
    let places = a.ints("places")?.unwrap_or_default();
    let divides = a.ints("divides")?.unwrap_or_default();
    let spec = Attention {
        q_perm: a.ints("q_perm")?,
        k_perm: a.ints("k_perm")?,
        v_perm: a.ints("v_perm")?,
        out_perm: a.ints("out_perm")?,
        factors: places.into_iter().zip(divides).map(|(p, d)| (p, d != 0)).collect(),
        mask: match a.string("mask")?.as_deref() {
            None => None,
            Some("add") => Some(Mask::Add),
            Some("seen") => Some(Mask::Seen),
            Some("hidden") => Some(Mask::Hidden),
            Some(other) => return Err(Error::invalid(format!("attribute `mask` is `{other}`"))),
        },
        fill: a.tensor("fill")?.and_then(|t| t.to_f64().first().copied()).unwrap_or(f64::NEG_INFINITY),
        axis: a.int_or("axis", -1)?,
        cast: a.int("cast")?.map(|c| DType::from_onnx(c as i32).map(convert::kind)).transpose()?,
        guarded: a.flag("guarded", false)?,
        parted: match a.flag("parted", false)? {
            true => Some(Parted {
                squeeze: a.ints("squeeze")?.unwrap_or_default(),
                unsqueeze: a.ints("unsqueeze")?.unwrap_or_default(),
            }),
            false => None,
        },
    };
    let more = if spec.parted.is_some() { 2 } else { 0 };
    let slots: Vec<usize> = (0..spec.factors.len() + more).map(|i| 4 + i).collect();
    Ok(Kernel::new(move |a| spec.run(a)).host(&slots))
}

fn permuted(t: &Tensor, perm: Option<&Vec<i64>>) -> Result<Tensor> {
    match perm {
        Some(p) if p.len() != t.dim() => {
            Err(Error::invalid(format!("operand of shape {:?}, expected rank {}", t.size(), p.len())))
        }
        Some(p) => Ok(t.f_permute(&p[..])?),
        None => Ok(t.shallow_clone()),
    }
}

impl Attention {
    fn run(&self, a: &Args) -> Result<Vec<Value>> {
        let y = match self.fused(a)? {
            Some(y) => y,
            None => self.chain(a)?,
        };
        one(permuted(&y, self.out_perm.as_ref())?)
    }

    /// The product of all factors, where each is one number.
    fn scale(&self, a: &Args) -> Result<Option<f64>> {
        let mut scale = 1.0;
        for (i, (_, divides)) in self.factors.iter().enumerate() {
            match a.floats(4 + i)?.as_slice() {
                [f] => scale *= if *divides { 1.0 / f } else { *f },
                _ => return Ok(None),
            }
        }
        Ok(Some(scale).filter(|s| s.is_finite()))
    }

    /// As scaled_dot_product_attention; `None` where that would mean something else.
    fn fused(&self, a: &Args) -> Result<Option<Tensor>> {
        let Some(scale) = self.scale(a)? else { return Ok(None) };
        let (k_raw, rank) = (a.t(1)?, a.t(0)?.dim());
        // Types differ only under autocast, which casts for this kernel.
        let alike = [k_raw, a.t(2)?].iter().all(|t| is_float(t.kind()) && t.dim() == rank);
        if !alike || rank < 2 || self.cast.is_some_and(|c| c != k_raw.kind()) {
            return Ok(None);
        }
        let q = permuted(a.t(0)?, self.q_perm.as_ref())?;
        let k = match &self.k_perm {
            Some(_) => permuted(k_raw, self.k_perm.as_ref())?,
            None => k_raw.f_transpose(-2, -1)?,
        };
        let v = permuted(a.t(2)?, self.v_perm.as_ref())?;
        let Some((q, k, v, back)) = self.with_heads(a, q, k, v)? else { return Ok(None) };
        let rank = q.dim();
        if util::axis(self.axis, rank)? != rank as i64 - 1 {
            return Ok(None);
        }
        let (qs, ks, vs) = (q.size(), k.size(), v.size());
        let batch = &qs[..rank - 2];
        if ks[..rank - 2] != *batch || vs[..rank - 2] != *batch {
            return Ok(None);
        }
        let (rows, keys) = (qs[rank - 2], ks[rank - 2]);
        let mask = match self.mask(a)? {
            // libtorch does not let a mask enlarge the scores.
            Some(m) if !broadcasts(&m.size(), &[batch, &[rows, keys]].concat()) || !is_float(m.kind()) => {
                return Ok(None);
            }
            other => other,
        };
        // The fused kernels want [batch, heads, rows, channels] and channels side by side.
        let masked = mask.is_some();
        let four = |t: &Tensor| -> Result<Tensor> {
            let t = match rank {
                2 => t.f_unsqueeze(0)?.f_unsqueeze(0)?,
                3 => t.f_unsqueeze(1)?,
                4 => t.shallow_clone(),
                _ if !masked => t.f_flatten(0, rank as i64 - 4)?,
                _ => t.shallow_clone(),
            };
            Ok(if t.stride().last() == Some(&1) { t } else { t.f_contiguous()? })
        };
        // The mask likewise: [batch, heads, rows, keys] or a part of it.
        let mask = match mask {
            Some(m) => {
                let own = m.size();
                let mut full = vec![1; rank.saturating_sub(own.len())];
                full.extend(own);
                match rank {
                    2 => full.splice(0..0, [1, 1]).for_each(drop),
                    3 => full.insert(1, 1),
                    _ => {}
                }
                Some(m.f_reshape(&full[..])?)
            }
            None => None,
        };
        let mut shape = back.unwrap_or_else(|| qs.clone());
        if let Some(last) = shape.last_mut() {
            *last = vs[rank - 1];
        }
        let (q, k, v) = (four(&q)?, four(&k)?, four(&v)?);
        let y = match &mask {
            None if products_faster(&q, &k) => products(&q, &k, &v, scale)?,
            _ => training::attention(&q, &k, &v, mask, false, scale)?,
        };
        Ok(Some(if y.size() == shape { y } else { y.f_reshape(&shape[..])? }))
    }

    /// The operands with heads and batch apart where the scores between the products have them so, and the shape of the
    /// weights in the second product. `None` where more than these axes is reshaped.
    #[allow(clippy::type_complexity)]
    fn with_heads(
        &self,
        a: &Args,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> Result<Option<(Tensor, Tensor, Tensor, Option<Vec<i64>>)>> {
        let Some(parted) = &self.parted else { return Ok(Some((q, k, v, None))) };
        let (qs, ks, vs) = (q.size(), k.size(), v.size());
        let rank = qs.len();
        if ks[..rank - 2] != qs[..rank - 2] {
            return Ok(None);
        }
        let at = 4 + self.factors.len();
        let product = [&qs[..rank - 1], &[ks[rank - 2]]].concat();
        let (scores, back) = parted.shapes(&product, &a.ints(at)?, &a.ints(at + 1)?)?;
        let last = &product[rank - 2..];
        let kept = |s: &[i64]| s.len() > 2 && s[s.len() - 2..] == *last;
        if !kept(&scores) || !kept(&back) || vs[..rank - 2] != back[..back.len() - 2] || back.len() != rank {
            return Ok(None);
        }
        let lead = &scores[..scores.len() - 2];
        let apart = |t: &Tensor, s: &[i64]| -> Result<Tensor> { Ok(t.f_reshape([lead, &s[s.len() - 2..]].concat())?) };
        Ok(Some((apart(&q, &qs)?, apart(&k, &ks)?, apart(&v, &vs)?, Some(back))))
    }

    /// What is added to the scores: 0 where they are seen, the fill where not.
    fn mask(&self, a: &Args) -> Result<Option<Tensor>> {
        let Some(kind) = self.mask else { return Ok(None) };
        let m = a.t(3)?;
        if kind == Mask::Add {
            return Ok(Some(m.shallow_clone()));
        }
        let hidden = if kind == Mask::Seen { m.f_logical_not()? } else { m.shallow_clone() };
        Ok(Some(Tensor::f_zeros(&m.size()[..], (a.kind(0)?, m.device()))?.f_masked_fill(&hidden, self.fill)?))
    }

    /// The chain as it was written.
    fn chain(&self, a: &Args) -> Result<Tensor> {
        let apply = |t: &Tensor, place: i64| -> Result<Tensor> {
            let mut t = t.shallow_clone();
            for (i, (_, divides)) in self.factors.iter().enumerate().filter(|(_, (p, _))| *p == place) {
                let f = a.t(4 + i)?;
                t = if *divides { t.f_div(f)? } else { t.f_mul(f)? };
            }
            Ok(t)
        };
        let q = permuted(&apply(a.t(0)?, 0)?, self.q_perm.as_ref())?;
        let k = permuted(&apply(a.t(1)?, 1)?, self.k_perm.as_ref())?;
        let k = if self.k_perm.is_some() { k.f_transpose(-2, -1)? } else { k };
        let product = linear::matmul(&q, &k)?;
        let at = 4 + self.factors.len();
        let shapes = match &self.parted {
            Some(p) => Some(p.shapes(&product.size(), &a.ints(at)?, &a.ints(at + 1)?)?),
            None => None,
        };
        let product = match &shapes {
            Some((scores, _)) => product.f_reshape(&scores[..])?,
            None => product,
        };
        let mut scores = apply(&product, 2)?;
        scores = match self.mask {
            None => scores,
            Some(Mask::Add) => scores.f_add(a.t(3)?)?,
            Some(kind) => {
                let fill = Tensor::f_full([0i64; 0], self.fill, (scores.kind(), scores.device()))?;
                let (yes, no) = if kind == Mask::Seen { (&scores, &fill) } else { (&fill, &scores) };
                yes.f_where_self(a.t(3)?, no)?
            }
        };
        let up = self.cast.map(|_| if scores.kind() == Kind::Double { Kind::Double } else { Kind::Float });
        let mut weights = scores.f_softmax(util::axis(self.axis, scores.dim())?, up)?;
        if let Some(c) = self.cast {
            weights = weights.f_to_kind(c)?;
        }
        if self.guarded {
            weights = weights.f_masked_fill(&weights.f_isnan()?, 0.0)?;
        }
        if let Some((_, back)) = &shapes {
            weights = weights.f_reshape(&back[..])?;
        }
        linear::matmul(&weights, &permuted(a.t(2)?, self.v_perm.as_ref())?)
    }
}

/// Scores from which libtorch's fused kernel needs less time for bf16 on the CPU than two products do, and less memory.
const MOST_SCORES: i64 = 1 << 18;

/// bf16 on the CPU: the fused kernel's products are slower there than single ones, twice over in the backward pass.
fn products_faster(q: &Tensor, k: &Tensor) -> bool {
    let narrow = q.kind() == Kind::BFloat16 || autocast_enabled(Device::Cpu);
    let scores = q.size().iter().rev().nth(1).zip(k.size().iter().rev().nth(1)).map_or(i64::MAX, |(r, c)| r * c);
    q.device() == Device::Cpu && narrow && scores <= MOST_SCORES
}

/// softmax(scale q k') v, its scores and weights kept for the backward pass.
fn products(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<Tensor> {
    let scores = linear::matmul(&q.f_mul_scalar(scale)?, &k.f_transpose(-2, -1)?)?;
    linear::matmul(&scores.f_softmax(-1, None)?, v)
}

/// Whether a tensor of this size broadcasts to `to` without enlarging it.
fn broadcasts(size: &[i64], to: &[i64]) -> bool {
    size.len() <= to.len() && size.iter().rev().zip(to.iter().rev()).all(|(&a, &b)| a == 1 || a == b)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In bf16 the products give what attention in f32 gives, to a few roundings of bf16, and so do their gradients.
    #[test]
    fn products_in_bf16_are_those_of_f32() {
        tch::manual_seed(2);
        let operands: Vec<Tensor> = (0..3).map(|_| Tensor::randn([2, 3, 40, 16], (Kind::Float, Device::Cpu))).collect();
        let seed = Tensor::randn([2, 3, 40, 16], (Kind::Float, Device::Cpu));
        let run = |kind: Kind| {
            let leaves: Vec<Tensor> = operands.iter().map(|t| t.to_kind(kind).set_requires_grad(true)).collect();
            let [q, k, v] = &leaves[..] else { unreachable!("three operands") };
            let y = if products_faster(q, k) {
                products(q, k, v, 0.25).unwrap()
            } else {
                Tensor::scaled_dot_product_attention(q, k, v, None::<Tensor>, 0.0, false, 0.25, false)
            };
            let loss = (&y * &seed).sum(Kind::Float);
            let mut out = Tensor::run_backward(&[loss], &[q, k, v], false, false);
            out.push(y);
            out
        };
        for (narrow, wide) in run(Kind::BFloat16).iter().zip(run(Kind::Float)) {
            let apart = (narrow.to_kind(Kind::Float) - &wide).norm().double_value(&[]);
            assert!(apart / wide.norm().double_value(&[]) < 0.012, "{apart}");
        }
        let large = Tensor::zeros([1, 1, 1024, 8], (Kind::BFloat16, Device::Cpu));
        assert!(!products_faster(&large, &large));
    }
}
