//! Operators of the `disback` domain: what raising makes of decomposed chains (see `graph::raise`). Each calls libtorch's
//! fused kernel where the shapes are those it is made for, and else computes the chain as it was written.

mod attention;
mod normalize;

use tch::Kind;

use crate::error::Error;
use crate::torch::kernel::{Kernel, Value, one};
use crate::torch::registry::{Entry, MANY, Registry};

pub fn register(r: &mut Registry) {
    let mut add =
        |op, inputs, build| r.add_entry(Entry { domain: "disback", op, since: 1, until: i64::MAX, inputs, build });
    // x * sigmoid(x)
    add("SiLU", (1, 1), |_| Ok(Kernel::new(|a| one(a.t(0)?.f_silu()?))));
    // f32 of f16 and bf16; everything else as it is
    add("Widen", (1, 1), |_| {
        Ok(Kernel::new(|a| match a.value(0)? {
            Value::Host(_) | Value::Device(_) if matches!(a.kind(0)?, Kind::Half | Kind::BFloat16) => {
                one(a.t(0)?.f_to_kind(Kind::Float)?)
            }
            other => Ok(vec![other.clone()]),
        }))
    });
    // x * tanh(softplus(x))
    add("Mish", (1, 1), |_| Ok(Kernel::new(|a| one(a.t(0)?.f_mish()?))));
    // x * Phi(x)
    add("Gelu", (1, 1), |n| {
        let approximate = n.attributes.string_or("approximate", "none")?;
        Ok(Kernel::new(move |a| one(a.t(0)?.f_gelu(&approximate)?)))
    });
    // A view of an operand that broadcasts, with its axes where those of the other operand are.
    add("Align", (1, 1), |n| {
        let perm = n.attributes.ints("perm")?.ok_or_else(|| Error::invalid("attribute `perm` is missing"))?;
        Ok(Kernel::new(move |a| {
            let x = a.t(0)?;
            let missing = perm.len().saturating_sub(x.dim());
            let shape: Vec<i64> = std::iter::repeat_n(1, missing).chain(x.size()).collect();
            one(x.f_reshape(&shape[..])?.f_permute(&perm[..])?)
        }))
    });
    // x, scale, bias, inner shape, outer shape
    for op in ["GroupNorm", "LayerNorm", "RMSNorm"] {
        add(op, (1, 5), normalize::build);
    }
    // q, k, v, mask, factors
    add("Attention", (3, MANY), attention::build);
}
