//! Attention and what goes with it: rotary embeddings, linear attention, causal convolution with state.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::graph::Node;
use crate::tensor::DType;
use crate::torch::convert;
use crate::torch::cpu::linear;
use crate::torch::exec::kernel::{Args, Kernel, Value, one};
use crate::torch::exec::registry::Registry;
use crate::torch::ops::util;
use crate::torch::training::{self, lowered};

pub fn register(r: &mut Registry) {
    r.add("Attention", 23, (3, 7), attention);
    r.add("RotaryEmbedding", 23, (3, 4), rotary_embedding);
    r.add("LinearAttention", 27, (3, 6), linear_attention);
    r.add("CausalConvWithState", 27, (2, 4), causal_conv);
}

/// `[B, T, H*D]` as `[B, H, T, D]`.
pub fn split_heads(x: &Tensor, heads: i64) -> Result<Tensor> {
    let [b, t, c]: [i64; 3] =
        x.size().try_into().map_err(|s| Error::invalid(format!("input of shape {s:?}, expected rank 3")))?;
    if heads < 1 || c % heads != 0 {
        return Err(Error::invalid(format!("{c} channels in {heads} heads")));
    }
    Ok(x.f_reshape([b, t, heads, c / heads])?.f_transpose(1, 2)?)
}

/// The inverse of [`split_heads`].
pub fn join_heads(x: &Tensor) -> Result<Tensor> {
    let [b, h, t, d]: [i64; 4] =
        x.size().try_into().map_err(|s| Error::invalid(format!("heads of shape {s:?}, expected rank 4")))?;
    Ok(x.f_transpose(1, 2)?.f_reshape([b, t, h * d])?)
}

/// Each key-value head serves a run of query heads.
fn repeat_heads(x: &Tensor, heads: i64) -> Result<Tensor> {
    let own = util::dim(x, 1)?;
    if own == heads {
        return Ok(x.shallow_clone());
    }
    if own < 1 || heads % own != 0 {
        return Err(Error::invalid(format!("{heads} query heads for {own} key-value heads")));
    }
    Ok(x.f_repeat_interleave_self_int(heads / own, 1, heads)?)
}

struct Attention {
    scale: Option<f64>,
    causal: bool,
    q_heads: Option<i64>,
    kv_heads: Option<i64>,
    /// How many keys before and after a query's own place it sees; `None`: all.
    window: [Option<i64>; 2],
    softcap: f64,
    precision: Option<Kind>,
    /// Which stage the fourth output shows, where it is asked for.
    shown: Option<i64>,
}

fn attention(node: &Node) -> Result<Kernel> {
    let a = &node.attributes;
    let mode = a.int_or("qk_matmul_output_mode", 0)?;
    if !(0..=3).contains(&mode) {
        return Err(Error::invalid(format!("attribute `qk_matmul_output_mode` is {mode}")));
    }
    let side = |name: &str| -> Result<Option<i64>> {
        match if node.opset >= 25 { a.int_or(name, -1)? } else { -1 } {
            -1 => Ok(None),
            n if n >= 0 => Ok(Some(n)),
            n => Err(Error::invalid(format!("attribute `{name}` is {n}, expected -1 (no limit) or more"))),
        }
    };
    let spec = Attention {
        window: [side("left_window_size")?, side("right_window_size")?],
        scale: a.float("scale")?.map(f64::from),
        causal: a.flag("is_causal", false)?,
        q_heads: a.int("q_num_heads")?,
        kv_heads: a.int("kv_num_heads")?,
        softcap: a.float_or("softcap", 0.0)?,
        precision: a.int("softmax_precision")?.map(|c| DType::from_onnx(c as i32).map(convert::kind)).transpose()?,
        shown: node.output(3).is_some().then_some(mode),
    };
    Ok(Kernel::new(move |args| spec.run(args)))
}

impl Attention {
    fn run(&self, a: &Args) -> Result<Vec<Value>> {
        let flat = a.t(0)?.dim() == 3;
        let heads = |i: usize, n: Option<i64>, name: &str| -> Result<Tensor> {
            let x = a.t(i)?;
            match (x.dim(), n) {
                (4, _) => Ok(x.shallow_clone()),
                (_, Some(n)) => split_heads(x, n),
                (_, None) => Err(Error::invalid(format!("attribute `{name}` is missing for an input of rank 3"))),
            }
        };
        let q = heads(0, self.q_heads, "q_num_heads")?;
        let mut k = heads(1, self.kv_heads, "kv_num_heads")?;
        let mut v = heads(2, self.kv_heads, "kv_num_heads")?;
        let mut past = 0;
        if a.has(4) != a.has(5) {
            return Err(Error::invalid("one of `past_key` and `past_value` without the other"));
        }
        if a.has(4) && a.has(6) {
            return Err(Error::invalid("both past keys and `nonpad_kv_seqlen`: the specification allows one of them"));
        }
        if let Some(p) = a.opt(4)? {
            past = util::dim(p, 2)?;
            k = Tensor::f_cat(&[p, &k], 2)?;
        }
        if let Some(p) = a.opt(5)? {
            v = Tensor::f_cat(&[p, &v], 2)?;
        }
        let (present_k, present_v) = (k.shallow_clone(), v.shallow_clone());
        let k = repeat_heads(&k, q.size()[1])?;
        let v = repeat_heads(&v, q.size()[1])?;
        let scale = self.scale.unwrap_or_else(|| 1.0 / (q.size()[3] as f64).sqrt());
        let bias = self.bias(a, &q, k.size()[2], past)?;
        let own_precision = self.precision.is_none_or(|p| p == q.kind() || p == Kind::Float);
        let fused = self.shown.is_none() && self.softcap == 0.0 && own_precision;
        let (y, shown) = if fused {
            let causal = self.causal && bias.is_none();
            let mask = bias.map(|b| b.f_to_kind(q.kind())).transpose()?;
            (training::attention(&q, &k, &v, mask, causal, scale)?, None)
        } else {
            self.stages(&q, &k, &v, bias, scale, past)?
        };
        let y = if flat { join_heads(&y)? } else { y };
        let shown = shown.unwrap_or_else(|| y.shallow_clone());
        Ok([y, present_k, present_v, shown].map(Value::device).to_vec())
    }

    /// What is added before the softmax: 0 where seen, -inf where not; `None` for no mask or plain causality.
    fn bias(&self, a: &Args, q: &Tensor, total: i64, past: i64) -> Result<Option<Tensor>> {
        let hide = |seen: &Tensor| -> Result<Tensor> {
            Ok(Tensor::f_zeros(&seen.size()[..], (q.kind(), q.device()))?
                .f_masked_fill(&seen.f_logical_not()?, f64::NEG_INFINITY)?)
        };
        let mask = match a.opt(3)? {
            None => None,
            Some(mask) => {
                let mask = if mask.dim() < 2 { mask.f_reshape([1, -1])? } else { mask.shallow_clone() };
                let missing = total - mask.size().last().copied().unwrap_or(0);
                let mask = if mask.kind() == Kind::Bool { hide(&mask)? } else { mask };
                Some(if missing > 0 { mask.f_pad([0, missing], "constant", f64::NEG_INFINITY)? } else { mask })
            }
        };
        let plain = mask.is_none() && past == 0 && self.shown.is_none() && self.softcap == 0.0 && !a.has(6);
        if plain && self.window == [None, None] {
            return Ok(None);
        }
        let places = self.places(a.opt(6)?, q, total, past)?.map(|seen| hide(&seen)).transpose()?;
        Ok(match (mask, places) {
            (Some(m), Some(p)) => Some(m.f_add(&p)?),
            (one, other) => one.or(other),
        })
    }

    /// Which keys the queries see by their places alone, as booleans `[queries, keys]`, or `[batch, 1, queries, keys]` where
    /// `lengths` says how many keys of each sample are no padding: causality and windows count from the last of them.
    fn places(&self, lengths: Option<&Tensor>, q: &Tensor, total: i64, past: i64) -> Result<Option<Tensor>> {
        let (rows, device) = (q.size()[2], q.device());
        let line = |n: i64| Tensor::f_arange(n, (Kind::Int64, device));
        let lengths = lengths.map(|l| l.f_to_kind(Kind::Int64)?.f_reshape([-1, 1, 1, 1])).transpose()?;
        let (own, keys) = (line(rows)?.f_unsqueeze(1)?, line(total)?);
        let own = match &lengths {
            Some(lengths) => own.f_add(&lengths.f_sub_scalar(rows)?)?,
            None => own.f_add_scalar(past)?,
        };
        // How far before the query a key stands.
        let before = own.f_sub(&keys)?;
        let [left, right] = self.window;
        let right = if self.causal { Some(0) } else { right };
        let conditions = [
            right.map(|r| before.f_ge(-r)).transpose()?,
            left.map(|l| before.f_le(l)).transpose()?,
            lengths.map(|lengths| keys.f_lt_tensor(&lengths)).transpose()?,
        ];
        let mut seen: Option<Tensor> = None;
        for c in conditions.into_iter().flatten() {
            seen = Some(match seen {
                Some(s) => s.f_logical_and(&c)?,
                None => c,
            });
        }
        Ok(seen)
    }

    fn stages(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        bias: Option<Tensor>,
        scale: f64,
        past: i64,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let root = scale.sqrt();
        let mut scores = linear::matmul(&q.f_mul_scalar(root)?, &k.f_mul_scalar(root)?.f_transpose(-1, -2)?)?;
        let mut shown = scores.shallow_clone();
        if self.softcap != 0.0 {
            scores = scores.f_div_scalar(self.softcap)?.f_tanh()?.f_mul_scalar(self.softcap)?;
        }
        if self.shown == Some(1) {
            shown = scores.shallow_clone();
        }
        debug_assert!(!self.causal || bias.is_some() || past == 0);
        // A row that sees nothing gives zero, as in libtorch's fused kernels and ONNX Runtime.
        let mut blind = None;
        if let Some(b) = bias {
            blind = Some(b.f_amax([-1i64].as_slice(), true)?.f_eq(f64::NEG_INFINITY)?);
            scores = scores.f_add(&b)?;
        }
        if self.shown == Some(2) {
            shown = scores.shallow_clone();
        }
        let weights = match blind {
            Some(rows) => scores.f_masked_fill(&rows, 0.0)?.f_softmax(-1, self.precision)?.f_masked_fill(&rows, 0.0)?,
            None => scores.f_softmax(-1, self.precision)?,
        };
        let weights = weights.f_to_kind(q.kind())?;
        if self.shown == Some(3) {
            shown = weights.shallow_clone();
        }
        Ok((linear::matmul(&weights, v)?, self.shown.map(|_| shown)))
    }
}

fn rotary_embedding(node: &Node) -> Result<Kernel> {
    let interleaved = node.attributes.flag("interleaved", false)?;
    let rotated = node.attributes.int_or("rotary_embedding_dim", 0)?;
    let heads = node.attributes.int_or("num_heads", 0)?;
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let flat = x.dim() == 3;
        // [B, H, T, D]
        let heads_first = if flat { split_heads(x, heads)? } else { x.shallow_clone() };
        let d = util::dim(&heads_first, 3)?;
        let r = if rotated == 0 { d } else { rotated };
        if r < 2 || r > d || r % 2 != 0 {
            return Err(Error::invalid(format!("attribute `rotary_embedding_dim` is {rotated} for heads of {d}")));
        }
        let table = |i: usize| -> Result<Tensor> {
            let t = a.t(i)?;
            let rows = match a.opt(3)? {
                Some(ids) => {
                    let mut shape = ids.size();
                    shape.push(util::dim(t, 1)?);
                    t.f_index_select(0, &ids.f_reshape([-1])?)?.f_reshape(&shape[..])?
                }
                None => t.shallow_clone(),
            };
            Ok(rows.f_unsqueeze(1)?)
        };
        let (cos, sin) = (table(1)?, table(2)?);
        if cos.size().last() != Some(&(r / 2)) {
            return Err(Error::invalid(format!("tables of shape {:?} for {r} rotated channels", cos.size())));
        }
        let turned = heads_first.f_narrow(3, 0, r)?;
        let (first, second) = if interleaved {
            (turned.f_slice(3, 0, None, 2)?, turned.f_slice(3, 1, None, 2)?)
        } else {
            (turned.f_narrow(3, 0, r / 2)?, turned.f_narrow(3, r / 2, r / 2)?)
        };
        let real = first.f_mul(&cos)?.f_sub(&second.f_mul(&sin)?)?;
        let imaginary = first.f_mul(&sin)?.f_add(&second.f_mul(&cos)?)?;
        let mut y = if interleaved {
            Tensor::f_stack(&[real, imaginary], -1)?.f_flatten(-2, -1)?
        } else {
            Tensor::f_cat(&[real, imaginary], 3)?
        };
        if r < d {
            y = Tensor::f_cat(&[y, heads_first.f_narrow(3, r, d - r)?], 3)?;
        }
        one(if flat { join_heads(&y)? } else { y })
    }))
}

/// state <- exp(decay) state + k (x) v', with v' = beta (v - state^T k) under the delta rule; y = scale state^T q. In f32 (or
/// f64 where the inputs are).
fn linear_attention(node: &Node) -> Result<Kernel> {
    let rule = node.attributes.string_or("update_rule", "gated_delta")?;
    let (gated, delta) = match rule.as_str() {
        "linear" => (false, false),
        "gated" => (true, false),
        "delta" => (false, true),
        "gated_delta" => (true, true),
        other => return Err(Error::invalid(format!("attribute `update_rule` is `{other}`"))),
    };
    let required =
        |name: &str| node.attributes.int(name)?.ok_or_else(|| Error::invalid(format!("attribute `{name}` is missing")));
    let (q_heads, kv_heads) = (required("q_num_heads")?, required("kv_num_heads")?);
    let scale = node.attributes.float_or("scale", 0.0)?;
    // How the work is cut, not what is computed.
    node.attributes.get("chunk_size");
    if gated != node.input(4).is_some() || delta != node.input(5).is_some() {
        return Err(Error::invalid(format!("inputs `decay` and `beta` do not fit update rule `{rule}`")));
    }
    Ok(Kernel::new(move |a| {
        let kind = a.kind(0)?;
        let wide = if kind == Kind::Double { Kind::Double } else { Kind::Float };
        let part = |i: usize, heads: i64| -> Result<Tensor> { Ok(split_heads(a.t(i)?, heads)?.f_to_kind(wide)?) };
        let (q, k, v) = (part(0, q_heads)?, part(1, kv_heads)?, part(2, kv_heads)?);
        let [batch, _, steps, dk]: [i64; 4] =
            q.size().try_into().map_err(|_| Error::invalid("query of unknown rank"))?;
        let dv = v.size()[3];
        let scale = if scale == 0.0 { 1.0 / (dk as f64).sqrt() } else { scale };
        let decay = if gated { Some(part(4, kv_heads)?.f_exp()?) } else { None };
        let beta = match a.opt(5)? {
            Some(b) if delta => Some(b.f_to_kind(wide)?.f_transpose(1, 2)?.f_unsqueeze(-1)?),
            _ => None,
        };
        let (mut state, state_kind) = match a.opt(3)? {
            Some(s) => (s.f_to_kind(wide)?, s.kind()),
            None => (Tensor::f_zeros([batch, kv_heads, dk, dv], (wide, a.device()))?, kind),
        };
        let mut out = Vec::with_capacity(steps as usize);
        for i in 0..steps {
            let at = |t: &Tensor| t.f_select(2, i);
            let k_t = at(&k)?.f_unsqueeze(-1)?;
            let mut v_t = at(&v)?.f_unsqueeze(-2)?;
            if let Some(g) = &decay {
                state = state.f_mul(&at(g)?.f_unsqueeze(-1)?)?;
            }
            if let Some(b) = &beta {
                let found = k_t.f_transpose(-1, -2)?.f_matmul(&state)?;
                v_t = v_t.f_sub(&found)?.f_mul(&at(b)?.f_unsqueeze(-1)?)?;
            }
            state = state.f_add(&k_t.f_mul(&v_t)?)?;
            let read = repeat_heads(&state, q_heads)?;
            out.push(at(&q)?.f_unsqueeze(-2)?.f_matmul(&read)?.f_squeeze_dim(-2)?);
        }
        let y = Tensor::f_stack(&out, 2)?.f_mul_scalar(scale)?;
        Ok(vec![Value::device(join_heads(&y)?.f_to_kind(kind)?), Value::device(state.f_to_kind(state_kind)?)])
    }))
}

fn causal_conv(node: &Node) -> Result<Kernel> {
    let silu = match node.attributes.string_or("activation", "none")?.as_str() {
        "none" => false,
        "silu" | "swish" => true,
        other => return Err(Error::invalid(format!("attribute `activation` is `{other}`"))),
    };
    Ok(Kernel::new(move |a| {
        let (x, w) = (a.t(0)?, a.t(1)?);
        if x.dim() != 3 || w.dim() != 3 {
            return Err(Error::invalid(format!("input of shape {:?}, weight of shape {:?}", x.size(), w.size())));
        }
        let (channels, kept) = (x.size()[1], w.size()[2] - 1);
        let padded = match a.opt(3)? {
            Some(past) => Tensor::f_cat(&[past, x], 2)?,
            None => x.f_pad([kept, 0], "constant", 0.0)?,
        };
        let bias = a.opt(2)?.map(lowered).transpose()?;
        let (one, none) = (vec![1], vec![0]);
        let c = training::Convolution {
            strides: one.clone(),
            padding: none.clone(),
            dilations: one,
            transposed: false,
            output_padding: none,
            groups: channels,
        };
        let y = training::convolution(&lowered(&padded)?, &lowered(w)?, bias.as_ref(), c)?;
        let state = padded.f_narrow(2, padded.size()[2] - kept, kept)?;
        Ok(vec![Value::device(if silu { y.f_silu()? } else { y }), Value::device(state)])
    }))
}
