//! Operators of the `disback` domain: what raising makes of decomposed chains (see `graph::raise`).

use tch::Tensor;

use crate::error::{Error, Result};
use crate::graph::Node;
use crate::torch::kernel::{Args, Kernel, one};
use crate::torch::registry::{Entry, MANY, Registry};

pub fn register(r: &mut Registry) {
    let mut add =
        |op, inputs, build| r.add_entry(Entry { domain: "disback", op, since: 1, until: i64::MAX, inputs, build });
    // x * sigmoid(x)
    add("SiLU", (1, 1), |_| Ok(Kernel::new(|a| one(a.t(0)?.f_silu()?))));
    // x * Phi(x)
    add("Gelu", (1, 1), |n| {
        let approximate = n.attributes.string_or("approximate", "none")?;
        Ok(Kernel::new(move |a| one(a.t(0)?.f_gelu(&approximate)?)))
    });
    // x, scale, bias, inner shape, outer shape
    add("GroupNorm", (5, 5), group_norm);
    // q [..., n, d], k transposed [..., d, m], v [..., m, e], factors of the scores
    add("Attention", (3, MANY), |_| Ok(Kernel::new(attention).host(&[3, 4, 5])));
}

/// GroupNorm with a scale and a bias a channel. The chain it replaces reshaped to `inner` and back to `outer`; where these
/// are not what a GroupNorm over the channel axis means, the chain is computed as it was written.
fn group_norm(node: &Node) -> Result<Kernel> {
    let missing = |name: &str| Error::invalid(format!("attribute `{name}` is missing"));
    let eps = node.attributes.float_or("epsilon", 1e-5)?;
    let groups = node.attributes.int("groups")?.ok_or_else(|| missing("groups"))?;
    let spatial = node.attributes.int("spatial")?.ok_or_else(|| missing("spatial"))?;
    Ok(Kernel::new(move |a| {
        let (x, scale, bias) = (a.t(0)?, a.t(1)?, a.t(2)?);
        let size = x.size();
        let inner = resolve(&a.ints(3)?, &size)?;
        let outer = resolve(&a.ints(4)?, &inner)?;
        let channels = scale.numel() as i64;
        let plain = outer == size
            && size.len() as i64 == spatial + 2
            && size[1] == channels
            && inner.len() >= 2
            && inner[0] == size[0]
            && inner[1] == groups;
        if plain {
            let (scale, bias) = (scale.f_reshape([-1])?, bias.f_reshape([-1])?);
            return one(x.f_group_norm(groups, Some(&scale), Some(&bias), eps, true)?);
        }
        let y = x.f_reshape(&inner[..])?.f_group_norm(inner[1], None::<&Tensor>, None, eps, true)?;
        one(y.f_reshape(&outer[..])?.f_mul(scale)?.f_add(bias)?)
    })
    .host(&[3, 4]))
}

/// ONNX's reshape rules (0 copies, -1 is what remains) on the host.
fn resolve(wanted: &[i64], size: &[i64]) -> Result<Vec<i64>> {
    let bad = || Error::invalid(format!("cannot reshape {size:?} to {wanted:?}"));
    let mut out: Vec<i64> = wanted
        .iter()
        .enumerate()
        .map(|(i, &d)| if d == 0 { size.get(i).copied().ok_or_else(bad) } else { Ok(d) })
        .collect::<Result<_>>()?;
    let total: i64 = size.iter().product();
    if let Some(free) = out.iter().position(|&d| d == -1) {
        let rest: i64 = out.iter().filter(|&&d| d != -1).product();
        if rest == 0 || total % rest != 0 {
            return Err(bad());
        }
        out[free] = total / rest;
    }
    if out.iter().product::<i64>() == total { Ok(out) } else { Err(bad()) }
}

/// `softmax((q k^T) * product of factors) v`.
fn attention(a: &Args) -> Result<Vec<crate::torch::kernel::Value>> {
    let (q, k, v) = (a.t(0)?, a.t(1)?, a.t(2)?);
    let scale = (3..a.len()).map(|i| a.scalar(i)).product::<Result<f64>>()?;
    let k = k.f_transpose(-2, -1)?;
    one(Tensor::f_scaled_dot_product_attention(q, &k, v, None::<&Tensor>, 0.0, false, scale, false)?)
}
