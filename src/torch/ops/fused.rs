//! Operators of the `disback` domain: what raising makes of decomposed chains (see `graph::raise`).

use crate::error::{Error, Result};
use crate::graph::Node;
use crate::torch::kernel::{Kernel, one};
use crate::torch::registry::{Entry, Registry};

pub fn register(r: &mut Registry) {
    let mut add = |op, inputs, build| r.add_entry(Entry { domain: "disback", op, since: 1, until: i64::MAX, inputs, build });
    // x * sigmoid(x)
    add("SiLU", (1, 1), |_| Ok(Kernel::new(|a| one(a.t(0)?.f_silu()?))));
    // x, scale, bias: GroupNorm with per-channel scale and bias of any shape with C elements.
    add("GroupNorm", (3, 3), group_norm);
    // q, k, v as [..., tokens, channels]: softmax(q k^T * scale) v.
    add("Attention", (3, 3), attention);
}

fn group_norm(node: &Node) -> Result<Kernel> {
    let eps = node.attributes.float_or("epsilon", 1e-5)?;
    let groups = node.attributes.int("groups")?.ok_or_else(|| Error::invalid("attribute `groups` is missing"))?;
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let scale = a.t(1)?.f_reshape([-1])?;
        let bias = a.t(2)?.f_reshape([-1])?;
        one(x.f_group_norm(groups, Some(&scale), Some(&bias), eps, true)?)
    }))
}

fn attention(node: &Node) -> Result<Kernel> {
    let scale = node.attributes.float_or("scale", 1.0)?;
    Ok(Kernel::new(move |a| {
        let (q, k, v) = (a.t(0)?, a.t(1)?, a.t(2)?);
        one(tch::Tensor::f_scaled_dot_product_attention(q, k, v, None::<&tch::Tensor>, 0.0, false, scale, false)?)
    }))
}
