//! Operators of the `com.microsoft` domain that ONNX Runtime's optimiser puts into exports of diffusion networks.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::graph::Node;
use crate::torch::exec::kernel::{Args, Kernel, Value, one};
use crate::torch::exec::registry::{Build, Entry, Registry};
use crate::torch::ops::attention::{join_heads, split_heads};
use crate::torch::ops::{conv, linear, norm, util};
use crate::torch::training::{Convolution, convolution, lowered};

pub fn register(r: &mut Registry) {
    // ONNX Runtime writes this one without a domain.
    r.add("SimplifiedLayerNormalization", 1, (2, 2), simplified_layer_norm);
    let mut add = |op, inputs, build: Build| {
        r.add_entry(Entry { domain: "com.microsoft", op, since: 1, until: i64::MAX, inputs, build });
    };
    add("SimplifiedLayerNormalization", (2, 2), simplified_layer_norm);
    add("Gelu", (1, 1), |_| Ok(Kernel::new(|a| one(a.t(0)?.f_gelu("none")?))));
    add("FastGelu", (1, 2), |_| {
        Ok(Kernel::new(|a| {
            let x = a.t(0)?;
            one(match a.opt(1)? {
                Some(b) => x.f_add(b)?.f_gelu("tanh")?,
                None => x.f_gelu("tanh")?,
            })
        }))
    });
    add("BiasGelu", (2, 2), |_| Ok(Kernel::new(|a| one(a.t(0)?.f_add(a.t(1)?)?.f_gelu("none")?))));
    add("QuickGelu", (1, 1), |n| {
        let alpha = n.attributes.float_or("alpha", 1.702)?;
        Ok(Kernel::new(move |a| {
            let x = a.t(0)?;
            one(if alpha == 1.0 { x.f_silu()? } else { x.f_mul(&x.f_mul_scalar(alpha)?.f_sigmoid()?)? })
        }))
    });
    add("BiasSplitGelu", (2, 2), |_| {
        Ok(Kernel::new(|a| {
            let halves = a.t(0)?.f_add(a.t(1)?)?.f_chunk(2, -1)?;
            match halves.as_slice() {
                [value, gate] if value.size() == gate.size() => one(value.f_mul(&gate.f_gelu("none")?)?),
                _ => Err(Error::invalid(format!("input of shape {:?} has no two halves", a.t(0)?.size()))),
            }
        }))
    });
    add("BiasAdd", (3, 3), |_| Ok(Kernel::new(|a| one(a.t(0)?.f_add(a.t(1)?)?.f_add(a.t(2)?)?))));
    add("FusedMatMul", (2, 2), fused_matmul);
    add("FusedConv", (2, 4), |n| fused(n, conv::conv(n)?, 3));
    add("FusedGemm", (2, 3), |n| fused(n, linear::gemm(n)?, 3));
    add("NhwcConv", (2, 3), nhwc_conv);
    add("GroupNorm", (3, 3), |n| group_norm(n, false));
    add("SkipGroupNorm", (4, 5), |n| group_norm(n, true));
    add("SkipLayerNormalization", (3, 5), skip_layer_norm);
    add("SkipSimplifiedLayerNormalization", (3, 4), skip_rms_norm);
    add("MultiHeadAttention", (1, 8), multi_head_attention);
    add("Attention", (2, 6), packed_attention);
}

fn simplified_layer_norm(node: &Node) -> Result<Kernel> {
    if node.output(1).is_some() {
        return Err(Error::unsupported("the saved standard deviation as an output"));
    }
    norm::rms_norm(node)
}

fn fused_matmul(node: &Node) -> Result<Kernel> {
    let a = &node.attributes;
    let alpha = a.float_or("alpha", 1.0)?;
    let (ta, tb) = (a.flag("transA", false)?, a.flag("transB", false)?);
    if a.flag("transBatchA", false)? || a.flag("transBatchB", false)? {
        return Err(Error::unsupported("FusedMatMul with transposed batch dimensions"));
    }
    Ok(Kernel::new(move |args| {
        let side = |i: usize, transposed: bool| -> Result<Tensor> {
            let t = args.t(i)?;
            Ok(if transposed && t.dim() > 1 { t.f_transpose(-1, -2)? } else { t.shallow_clone() })
        };
        let y = side(0, ta)?.f_matmul(&side(1, tb)?)?;
        one(if alpha == 1.0 { y } else { y.f_mul_scalar(alpha)? })
    }))
}

/// `inner` on the first inputs, plus the one behind them, and an activation.
fn fused(node: &Node, inner: Kernel, inputs: usize) -> Result<Kernel> {
    let a = &node.attributes;
    let name = a.string_or("activation", "")?;
    let mut params: Vec<f64> = a.floats("activation_params")?.unwrap_or_default().into_iter().map(f64::from).collect();
    for key in ["activation_alpha", "activation_beta", "activation_gamma"] {
        params.extend(a.float(key)?.map(f64::from));
    }
    let param = |i: usize, default: f64| params.get(i).copied().unwrap_or(default);
    type Activation = Box<dyn Fn(Tensor) -> Result<Tensor, tch::TchError>>;
    let activation: Activation = match name.as_str() {
        "" => Box::new(Ok),
        "Relu" => Box::new(|x| x.f_relu()),
        "Tanh" => Box::new(|x| x.f_tanh()),
        "Sigmoid" => Box::new(|x| x.f_sigmoid()),
        "LeakyRelu" => {
            let slope = param(0, 0.01);
            Box::new(move |x| x.f_where_self(&x.f_ge(0.0)?, &x.f_mul_scalar(slope)?))
        }
        "Clip" => {
            let (low, high) = (param(0, f64::from(f32::MIN)), param(1, f64::from(f32::MAX)));
            Box::new(move |x| x.f_clamp(low, high))
        }
        "HardSigmoid" => {
            let (alpha, beta) = (param(0, 0.2), param(1, 0.5));
            Box::new(move |x| x.f_mul_scalar(alpha)?.f_add_scalar(beta)?.f_clamp(0.0, 1.0))
        }
        other => return Err(Error::unsupported(format!("{} with activation `{other}`", node.op))),
    };
    Ok(Kernel::new(move |args| {
        let first = args.values[..args.len().min(inputs)].to_vec();
        let y = inner.call(first, args.device())?;
        let y = y.first().ok_or_else(|| Error::invalid("no result"))?.tensor(args.device())?.shallow_clone();
        let y = match args.opt(inputs)? {
            Some(z) => y.f_add(z)?,
            None => y,
        };
        one(activation(y)?)
    }))
}

fn channels_first(x: &Tensor) -> Result<Tensor> {
    if x.dim() != 4 {
        return Err(Error::invalid(format!("input of shape {:?}, expected rank 4", x.size())));
    }
    Ok(x.f_permute([0, 3, 1, 2])?)
}

/// Input and weight have their channels last.
fn nhwc_conv(node: &Node) -> Result<Kernel> {
    let window = conv::Window::parse(node)?;
    let groups = node.attributes.int_or("group", 1)?;
    Ok(Kernel::new(move |a| {
        let (x, w) = (lowered(&channels_first(a.t(0)?)?)?, lowered(&channels_first(a.t(1)?)?)?);
        let pads = window.padding(&x.size()[2..], &w.size()[2..])?;
        let (x, padding) = conv::split_padding(&x, &pads, 0.0)?;
        let (strides, dilations) = (window.strides(2)?, window.dilations(2)?);
        let bias = a.opt(2)?.map(lowered).transpose()?;
        let output_padding = vec![0; 2];
        let c = Convolution { strides, padding, dilations, transposed: false, output_padding, groups };
        let y = convolution(&x, &w, bias.as_ref(), c)?;
        one(y.f_permute([0, 2, 3, 1])?)
    }))
}

/// x (plus skip and bias, which sum is the second output), normalised in groups; SiLU where `activation` is 1.
fn group_norm(node: &Node, skip: bool) -> Result<Kernel> {
    let a = &node.attributes;
    let eps = a.float_or("epsilon", 1e-5)?;
    let groups = a.int("groups")?.ok_or_else(|| Error::invalid("attribute `groups` is missing"))?;
    let last = a.flag("channels_last", true)?;
    let silu = match a.int_or("activation", 0)? {
        0 => false,
        1 => true,
        other => return Err(Error::invalid(format!("attribute `activation` is {other}"))),
    };
    Ok(Kernel::new(move |args| {
        let x = args.t(0)?;
        let mut x = if last { channels_first(x)? } else { x.shallow_clone() };
        if skip {
            let s = args.t(3)?;
            let s = match s.dim() {
                2 => s.f_unsqueeze(-1)?.f_unsqueeze(-1)?,
                _ if last => channels_first(s)?,
                _ => s.shallow_clone(),
            };
            x = x.f_add(&s)?;
            if let Some(b) = args.opt(4)? {
                x = x.f_add(&util::per_channel(b, x.dim())?)?;
            }
        }
        let kind = x.kind();
        let affine = |i: usize| -> Result<Tensor> { Ok(args.t(i)?.f_to_kind(kind)?) };
        let y = x.f_group_norm(groups, Some(affine(1)?), Some(affine(2)?), eps, true)?;
        let y = if silu { y.f_silu()? } else { y };
        let back = |t: Tensor| if last { t.f_permute([0, 2, 3, 1]) } else { Ok(t) };
        Ok(vec![Value::device(back(y)?), Value::device(back(x)?)])
    }))
}

/// The fourth output is the sum; the saved statistics between are for ONNX Runtime's own training.
fn only_sum(node: &Node) -> Result<()> {
    if node.output(1).is_some() || node.output(2).is_some() {
        return Err(Error::unsupported("saved statistics as outputs"));
    }
    Ok(())
}

fn skipped(a: &Args, bias: usize) -> Result<Tensor> {
    let sum = a.t(0)?.f_add(a.t(1)?)?;
    Ok(match a.opt(bias)? {
        Some(b) => sum.f_add(b)?,
        None => sum,
    })
}

fn with_sum(y: Tensor, sum: Tensor) -> Vec<Value> {
    [y, sum.shallow_clone(), sum.shallow_clone(), sum].map(Value::device).to_vec()
}

fn skip_layer_norm(node: &Node) -> Result<Kernel> {
    let eps = node.attributes.float_or("epsilon", 1e-12)?;
    only_sum(node)?;
    Ok(Kernel::new(move |a| {
        let sum = skipped(a, 4)?;
        let channels = sum.size().last().copied().unwrap_or(1);
        let y = sum.f_layer_norm([channels], Some(a.t(2)?), a.opt(3)?, eps, true)?;
        Ok(with_sum(y, sum))
    }))
}

fn skip_rms_norm(node: &Node) -> Result<Kernel> {
    let eps = node.attributes.float_or("epsilon", 1e-12)?;
    only_sum(node)?;
    Ok(Kernel::new(move |a| {
        let sum = skipped(a, 3)?;
        let (wide, kind) = util::widened(&sum)?;
        let inverse = wide.f_square()?.f_mean_dim([-1i64].as_slice(), true, None)?.f_add_scalar(eps)?.f_rsqrt()?;
        Ok(with_sum(wide.f_mul(&inverse)?.f_to_kind(kind)?.f_mul(a.t(2)?)?, sum))
    }))
}

/// What both attentions share: heads, scale, masks.
struct Heads {
    count: i64,
    scale: Option<f64>,
    causal: bool,
    hidden: f64,
}

impl Heads {
    fn parse(node: &Node) -> Result<Self> {
        let a = &node.attributes;
        let count = a.int("num_heads")?.ok_or_else(|| Error::invalid("attribute `num_heads` is missing"))?;
        Ok(Self {
            count,
            scale: a.float("scale")?.map(f64::from).filter(|&s| s != 0.0),
            causal: a.flag("unidirectional", false)?,
            hidden: a.float_or("mask_filter_value", -10000.0)?,
        })
    }

    /// q, k, v as [B, heads, T, D]; `mask` has 1 where a key is seen, `bias` is added to the scores.
    fn attend(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        mask: Option<&Tensor>,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (rows, total) = (q.size()[2], k.size()[2]);
        let mut sum = bias.map(|b| b.f_to_kind(q.kind())).transpose()?;
        let mut add = |t: Tensor| -> Result<()> {
            sum = Some(match sum.take() {
                Some(s) => s.f_add(&t)?,
                None => t,
            });
            Ok(())
        };
        if let Some(mask) = mask {
            let seen = match (mask.dim(), mask.size().first()) {
                (1, Some(&n)) if n == q.size()[0] => {
                    let at = Tensor::f_arange(total, (Kind::Int64, mask.device()))?;
                    at.f_unsqueeze(0)?.f_lt_tensor(&mask.f_unsqueeze(1)?)?.f_reshape([n, 1, 1, total])?
                }
                (2, _) => mask.f_ne(0)?.f_unsqueeze(1)?.f_unsqueeze(1)?,
                (3, _) => mask.f_ne(0)?.f_unsqueeze(1)?,
                _ => return Err(Error::unsupported(format!("an attention mask of shape {:?}", mask.size()))),
            };
            add(seen.f_logical_not()?.f_to_kind(q.kind())?.f_mul_scalar(self.hidden)?)?;
        }
        let plain_causal = self.causal && sum.is_none() && rows == total;
        if self.causal && !plain_causal {
            let seen = Tensor::f_ones([rows, total], (Kind::Bool, q.device()))?.f_tril(total - rows)?;
            let zeros = Tensor::f_zeros([rows, total], (q.kind(), q.device()))?;
            let bias = zeros.f_masked_fill(&seen.f_logical_not()?, f64::NEG_INFINITY)?;
            sum = Some(match sum {
                Some(s) => s.f_add(&bias)?,
                None => bias,
            });
        }
        Ok(Tensor::f_scaled_dot_product_attention(q, k, v, sum, 0.0, plain_causal, self.scale, false)?)
    }
}

fn multi_head_attention(node: &Node) -> Result<Kernel> {
    let heads = Heads::parse(node)?;
    if node.output(3).is_some() {
        return Err(Error::unsupported("MultiHeadAttention with its weights as an output"));
    }
    Ok(Kernel::new(move |a| {
        let query = a.t(0)?;
        let bias = a.opt(3)?;
        let n = heads.count;
        // Bias [3 * hidden] over q, k and v in turn, each [B, T, hidden].
        let biased = |x: &Tensor, start: i64| -> Result<Tensor> {
            Ok(match bias {
                Some(b) => x.f_add(&b.f_narrow(0, start, x.size()[2])?)?,
                None => x.shallow_clone(),
            })
        };
        let (q, mut k, mut v) = match (query.dim(), a.opt(1)?, a.opt(2)?) {
            // [B, T, heads, 3, D]
            (5, None, None) => {
                if bias.is_some() {
                    return Err(Error::unsupported("MultiHeadAttention with packed QKV and a bias"));
                }
                let part = |i: i64| query.f_select(3, i)?.f_transpose(1, 2);
                (part(0)?, part(1)?, part(2)?)
            }
            // [B, L, heads, 2, D]
            (3, Some(packed), None) if packed.dim() == 5 => {
                let part = |i: i64| packed.f_select(3, i)?.f_transpose(1, 2);
                if bias.is_some() {
                    return Err(Error::unsupported("MultiHeadAttention with packed KV and a bias"));
                }
                (split_heads(query, n)?, part(0)?, part(1)?)
            }
            (3, Some(k), Some(v)) if k.dim() == 3 && v.dim() == 3 => {
                let hidden = query.size()[2];
                (
                    split_heads(&biased(query, 0)?, n)?,
                    split_heads(&biased(k, hidden)?, n)?,
                    split_heads(&biased(v, 2 * hidden)?, n)?,
                )
            }
            // Keys and values of another pass, [B, heads, L, D].
            (3, Some(k), Some(v)) if k.dim() == 4 && v.dim() == 4 => {
                (split_heads(&biased(query, 0)?, n)?, k.shallow_clone(), v.shallow_clone())
            }
            _ => return Err(Error::unsupported("MultiHeadAttention with inputs in this layout")),
        };
        if let Some(past) = a.opt(6)? {
            k = Tensor::f_cat(&[past, &k], 2)?;
        }
        if let Some(past) = a.opt(7)? {
            v = Tensor::f_cat(&[past, &v], 2)?;
        }
        let y = heads.attend(&q, &k, &v, a.opt(4)?, a.opt(5)?)?;
        Ok([join_heads(&y)?, k, v].map(Value::device).to_vec())
    }))
}

/// The projection of q, k and v included: x W + b, split in three.
fn packed_attention(node: &Node) -> Result<Kernel> {
    let heads = Heads::parse(node)?;
    let sizes = node.attributes.ints("qkv_hidden_sizes")?;
    if node.attributes.flag("do_rotary", false)? || node.attributes.flag("past_present_share_buffer", false)? {
        return Err(Error::unsupported("com.microsoft Attention with rotary embedding or shared buffers"));
    }
    node.attributes.get("rotary_embedding_dim");
    if node.input(4).is_some() || node.output(1).is_some() {
        return Err(Error::unsupported("com.microsoft Attention with past keys and values"));
    }
    Ok(Kernel::new(move |a| {
        let projected = a.t(0)?.f_matmul(a.t(1)?)?;
        let projected = match a.opt(2)? {
            Some(b) => projected.f_add(b)?,
            None => projected,
        };
        let width = projected.size().last().copied().unwrap_or(0);
        let sizes = sizes.clone().unwrap_or_else(|| vec![width / 3; 3]);
        if sizes.len() != 3 || sizes.iter().sum::<i64>() != width {
            return Err(Error::invalid(format!("a projection to {width} for hidden sizes {sizes:?}")));
        }
        let parts = projected.f_split_with_sizes(&sizes[..], -1)?;
        let parts = parts.iter().map(|p| split_heads(p, heads.count)).collect::<Result<Vec<_>>>()?;
        one(join_heads(&heads.attend(&parts[0], &parts[1], &parts[2], a.opt(3)?, a.opt(5)?)?)?)
    }))
}
