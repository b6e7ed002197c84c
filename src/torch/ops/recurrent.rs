//! RNN, GRU and LSTM, step by step: any activation, clipping, peepholes, lengths, layouts and directions.

use tch::Tensor;

use crate::error::{Error, Result};
use crate::graph::Node;
use crate::torch::exec::kernel::{Args, Kernel, Value};
use crate::torch::exec::registry::Registry;

pub fn register(r: &mut Registry) {
    r.add("RNN", 1, (3, 6), |n| recurrent(n, Cell::Rnn));
    r.add("GRU", 1, (3, 6), |n| recurrent(n, Cell::Gru));
    r.add("LSTM", 1, (3, 8), |n| recurrent(n, Cell::Lstm));
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cell {
    Rnn,
    Gru,
    Lstm,
}

impl Cell {
    fn gates(self) -> i64 {
        match self {
            Self::Rnn => 1,
            Self::Gru => 3,
            Self::Lstm => 4,
        }
    }
    fn defaults(self) -> &'static [&'static str] {
        match self {
            Self::Rnn => &["Tanh"],
            Self::Gru => &["Sigmoid", "Tanh"],
            Self::Lstm => &["Sigmoid", "Tanh", "Tanh"],
        }
    }
}

/// An activation with its parameters.
#[derive(Debug, Clone, Copy)]
enum Activation {
    Sigmoid,
    Tanh,
    Relu,
    Softplus,
    Softsign,
    Affine(f64, f64),
    LeakyRelu(f64),
    ThresholdedRelu(f64),
    ScaledTanh(f64, f64),
    HardSigmoid(f64, f64),
    Elu(f64),
}

impl Activation {
    fn parse(name: &str, alpha: &mut impl Iterator<Item = f64>, beta: &mut impl Iterator<Item = f64>) -> Result<Self> {
        Ok(match name.to_ascii_lowercase().as_str() {
            "sigmoid" => Self::Sigmoid,
            "tanh" => Self::Tanh,
            "relu" => Self::Relu,
            "softplus" => Self::Softplus,
            "softsign" => Self::Softsign,
            "affine" => Self::Affine(alpha.next().unwrap_or(1.0), beta.next().unwrap_or(0.0)),
            "leakyrelu" => Self::LeakyRelu(alpha.next().unwrap_or(0.01)),
            "thresholdedrelu" => Self::ThresholdedRelu(alpha.next().unwrap_or(1.0)),
            "scaledtanh" => Self::ScaledTanh(alpha.next().unwrap_or(1.0), beta.next().unwrap_or(1.0)),
            "hardsigmoid" => Self::HardSigmoid(alpha.next().unwrap_or(0.2), beta.next().unwrap_or(0.5)),
            "elu" => Self::Elu(alpha.next().unwrap_or(1.0)),
            _ => return Err(Error::unsupported(format!("activation `{name}`"))),
        })
    }

    fn apply(self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Sigmoid => x.f_sigmoid()?,
            Self::Tanh => x.f_tanh()?,
            Self::Relu => x.f_relu()?,
            Self::Softplus => x.f_softplus()?,
            Self::Softsign => x.f_div(&x.f_abs()?.f_add_scalar(1.0)?)?,
            Self::Affine(a, b) => x.f_mul_scalar(a)?.f_add_scalar(b)?,
            Self::LeakyRelu(a) => x.f_where_self(&x.f_ge(0.0)?, &x.f_mul_scalar(a)?)?,
            Self::ThresholdedRelu(a) => x.f_where_self(&x.f_ge(a)?, &x.f_zeros_like()?)?,
            Self::ScaledTanh(a, b) => x.f_mul_scalar(b)?.f_tanh()?.f_mul_scalar(a)?,
            Self::HardSigmoid(a, b) => x.f_mul_scalar(a)?.f_add_scalar(b)?.f_clamp(0.0, 1.0)?,
            Self::Elu(a) => x.f_clamp_min(0.0)?.f_add(&x.f_clamp_max(0.0)?.f_expm1()?.f_mul_scalar(a)?)?,
        })
    }
}

struct Recurrent {
    cell: Cell,
    /// Per direction.
    activations: Vec<Vec<Activation>>,
    /// Per direction: whether it runs backwards.
    reversed: Vec<bool>,
    clip: Option<f64>,
    hidden: Option<i64>,
    batch_first: bool,
    linear_before_reset: bool,
    input_forget: bool,
}

fn recurrent(node: &Node, cell: Cell) -> Result<Kernel> {
    let a = &node.attributes;
    let reversed = match a.string_or("direction", "forward")?.as_str() {
        "forward" => vec![false],
        "reverse" => vec![true],
        "bidirectional" => vec![false, true],
        other => return Err(Error::invalid(format!("attribute `direction` is `{other}`"))),
    };
    let per_direction = cell.defaults().len();
    let names = match a.strings("activations")? {
        Some(list) if list.len() == per_direction * reversed.len() => list,
        Some(list) => return Err(Error::invalid(format!("{} activations", list.len()))),
        None => cell.defaults().repeat(reversed.len()).iter().map(|s| (*s).to_owned()).collect(),
    };
    let numbers = |name: &str| -> Result<Vec<f64>> {
        Ok(a.floats(name)?.unwrap_or_default().into_iter().map(f64::from).collect())
    };
    let (alpha, beta) = (numbers("activation_alpha")?, numbers("activation_beta")?);
    let (mut alpha, mut beta) = (alpha.into_iter(), beta.into_iter());
    let all = names.iter().map(|n| Activation::parse(n, &mut alpha, &mut beta)).collect::<Result<Vec<_>>>()?;
    a.get("output_sequence");
    let spec = Recurrent {
        cell,
        activations: all.chunks(per_direction).map(<[_]>::to_vec).collect(),
        reversed,
        clip: a.float("clip")?.map(f64::from),
        hidden: a.int("hidden_size")?,
        batch_first: a.flag("layout", false)?,
        linear_before_reset: a.flag("linear_before_reset", false)?,
        input_forget: a.flag("input_forget", false)?,
    };
    Ok(Kernel::new(move |args| spec.run(args)))
}

impl Recurrent {
    fn run(&self, a: &Args) -> Result<Vec<Value>> {
        let x = a.t(0)?;
        // [T, B, I]
        let x = if self.batch_first { x.f_transpose(0, 1)? } else { x.shallow_clone() };
        let (w, r) = (a.t(1)?, a.t(2)?);
        let directions = self.reversed.len() as i64;
        let (&[steps, batch, _], &[dw, gates, _], &[_, _, hidden]) = (&x.size()[..], &w.size()[..], &r.size()[..])
        else {
            return Err(Error::invalid("inputs X, W and R must have rank 3"));
        };
        if dw != directions || gates != self.cell.gates() * hidden || self.hidden.is_some_and(|h| h != hidden) {
            return Err(Error::invalid(format!("weight of shape {:?} for {hidden} hidden units", w.size())));
        }
        let initial = |i: usize, d: i64| -> Result<Tensor> {
            match a.opt(i)? {
                Some(t) => Ok(t.f_select(if self.batch_first { 1 } else { 0 }, d)?),
                None => Ok(Tensor::f_zeros([batch, hidden], (x.kind(), x.device()))?),
            }
        };
        let lengths = a.opt(4)?;
        let (mut ys, mut hs, mut cs) = (Vec::new(), Vec::new(), Vec::new());
        for (d, &reversed) in self.reversed.iter().enumerate() {
            let dir = d as i64;
            let weights = Weights {
                r: r.f_select(0, dir)?,
                bias: a.opt(3)?.map(|b| b.f_select(0, dir)).transpose()?,
                peepholes: if self.cell == Cell::Lstm {
                    a.opt(7)?.map(|p| p.f_select(0, dir)).transpose()?
                } else {
                    None
                },
            };
            // All inputs at once: [T, B, gates].
            let mut projected = x.f_matmul(&w.f_select(0, dir)?.f_transpose(0, 1)?)?;
            if let Some(b) = &weights.bias {
                projected = projected.f_add(&b.f_narrow(0, 0, gates)?)?;
            }
            let mut h = initial(5, dir)?;
            let mut c = if self.cell == Cell::Lstm { initial(6, dir)? } else { h.shallow_clone() };
            let mut outputs = Vec::with_capacity(steps as usize);
            for i in 0..steps {
                let t = if reversed { steps - 1 - i } else { i };
                let (mut h_new, mut c_new) = self.step(d, &projected.f_select(0, t)?, &h, &c, &weights)?;
                let mut y = h_new.shallow_clone();
                if let Some(lengths) = lengths {
                    let live = lengths.f_gt(t)?.f_unsqueeze(1)?;
                    h_new = h_new.f_where_self(&live, &h)?;
                    c_new = c_new.f_where_self(&live, &c)?;
                    y = y.f_where_self(&live, &y.f_zeros_like()?)?;
                }
                (h, c) = (h_new, c_new);
                outputs.push(y);
            }
            if reversed {
                outputs.reverse();
            }
            ys.push(Tensor::f_stack(&outputs, 0)?);
            hs.push(h);
            cs.push(c);
        }
        // [T, D, B, H] and [D, B, H]
        let mut y = Tensor::f_stack(&ys, 1)?;
        let (mut h, mut c) = (Tensor::f_stack(&hs, 0)?, Tensor::f_stack(&cs, 0)?);
        if self.batch_first {
            y = y.f_permute([2, 0, 1, 3])?;
            (h, c) = (h.f_transpose(0, 1)?, c.f_transpose(0, 1)?);
        }
        let out = if self.cell == Cell::Lstm { vec![y, h, c] } else { vec![y, h] };
        Ok(out.into_iter().map(Value::device).collect())
    }

    fn clipped(&self, x: Tensor) -> Result<Tensor> {
        Ok(match self.clip {
            Some(c) => x.f_clamp(-c, c)?,
            None => x,
        })
    }

    /// One step; `x` is the projected input with its bias. Gate order as in the specification: z r h, and i o f c.
    fn step(&self, direction: usize, x: &Tensor, h: &Tensor, c: &Tensor, w: &Weights) -> Result<(Tensor, Tensor)> {
        let f = &self.activations[direction];
        let n = h.size()[1];
        let act = |k: usize, t: Tensor| f[k].apply(&self.clipped(t)?);
        let gate = |t: &Tensor, k: i64| t.f_narrow(1, k * n, n);
        let recurrent_bias =
            w.bias.as_ref().map(|b| b.f_narrow(0, self.cell.gates() * n, self.cell.gates() * n)).transpose()?;
        let recur = |from: &Tensor, k: i64, count: i64| -> Result<Tensor> {
            let y = from.f_matmul(&w.r.f_narrow(0, k * n, count * n)?.f_transpose(0, 1)?)?;
            Ok(match &recurrent_bias {
                Some(b) => y.f_add(&b.f_narrow(0, k * n, count * n)?)?,
                None => y,
            })
        };
        match self.cell {
            Cell::Rnn => {
                let h = act(0, x.f_add(&recur(h, 0, 1)?)?)?;
                Ok((h.shallow_clone(), h))
            }
            Cell::Gru => {
                let zr = x.f_narrow(1, 0, 2 * n)?.f_add(&recur(h, 0, 2)?)?;
                let z = act(0, gate(&zr, 0)?)?;
                let r = act(0, gate(&zr, 1)?)?;
                let inner =
                    if self.linear_before_reset { recur(h, 2, 1)?.f_mul(&r)? } else { recur(&h.f_mul(&r)?, 2, 1)? };
                let new = act(1, gate(x, 2)?.f_add(&inner)?)?;
                let h = new.f_add(&z.f_mul(&h.f_sub(&new)?)?)?;
                Ok((h.shallow_clone(), h))
            }
            Cell::Lstm => {
                let all = x.f_add(&recur(h, 0, 4)?)?;
                let peep = |t: Tensor, k: i64, c: &Tensor| -> Result<Tensor> {
                    Ok(match &w.peepholes {
                        Some(p) => t.f_add(&p.f_narrow(0, k * n, n)?.f_mul(c)?)?,
                        None => t,
                    })
                };
                let i = act(0, peep(gate(&all, 0)?, 0, c)?)?;
                let forget = if self.input_forget {
                    i.f_neg()?.f_add_scalar(1.0)?
                } else {
                    act(0, peep(gate(&all, 2)?, 2, c)?)?
                };
                let candidate = act(1, gate(&all, 3)?)?;
                let c = forget.f_mul(c)?.f_add(&i.f_mul(&candidate)?)?;
                let o = act(0, peep(gate(&all, 1)?, 1, &c)?)?;
                Ok((o.f_mul(&f[2].apply(&c)?)?, c))
            }
        }
    }
}

/// Of one direction.
struct Weights {
    r: Tensor,
    /// Input biases, then recurrent ones.
    bias: Option<Tensor>,
    /// i, o, f
    peepholes: Option<Tensor>,
}
