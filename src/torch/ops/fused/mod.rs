//! Operators of the `disback` domain: what fusing makes of decomposed chains (see `graph::fuse`). Each calls libtorch's
//! fused kernel where the shapes are those it is made for, and else computes the chain as it was written.

mod attention;
mod normalize;

use tch::Kind;

use crate::error::Error;
use crate::torch::cpu::activation::gelu;
use crate::torch::cpu::linear;
use crate::torch::exec::kernel::{Kernel, Value, one};
use crate::torch::exec::registry::{Entry, MANY, Registry};
use crate::torch::ops::util;

/// Start and length-limited end of a slice with step 1, the end not before the start.
fn place(start: i64, end: i64, length: i64) -> (i64, i64) {
    let clamp = |v: i64| if v < 0 { (v.saturating_add(length)).max(0) } else { v.min(length) };
    let start = clamp(start);
    (start, clamp(end).max(start))
}

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
        Ok(Kernel::new(move |a| one(gelu(a.t(0)?, &approximate)?)))
    });
    // Its elements in the order of its axes.
    add("Contiguous", (1, 1), |_| Ok(Kernel::new(|a| one(a.t(0)?.f_contiguous()?))));
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
    // x, weight, bias
    add("Linear", (3, 3), |_| {
        Ok(Kernel::new(|a| {
            let (x, w, b) = (a.t(0)?, a.t(1)?, a.t(2)?);
            let (size, columns) = (x.size(), w.size().last().copied().unwrap_or(0));
            let fits = w.dim() == 2 && size.len() > 1 && b.size() == [columns] && x.is_floating_point();
            if !fits || x.kind() == Kind::Double {
                return one(x.f_matmul(w)?.f_add(b)?);
            }
            if linear::pays(x, w) && b.kind() == Kind::Float {
                return one(linear::linear(x, w, Some(b))?);
            }
            let rows = if size.len() == 2 { x.shallow_clone() } else { x.f_flatten(0, size.len() as i64 - 2)? };
            let y = linear::addmm(b, &rows, w)?;
            one(if size.len() == 2 { y } else { y.f_view(&[&size[..size.len() - 1], &[columns]].concat()[..])? })
        }))
    });
    // x; ranges of one axis, each a result
    add("Ranges", (1, 1), |n| {
        let missing = |name: &str| Error::invalid(format!("attribute `{name}` is missing"));
        let (axis, bounds) =
            (n.attributes.int_or("axis", 0)?, n.attributes.ints("bounds")?.ok_or_else(|| missing("bounds"))?);
        Ok(Kernel::new(move |a| {
            let x = a.t(0)?;
            let axis = util::axis(axis, x.dim())?;
            let length = x.size()[axis as usize];
            // As ONNX's Slice reads its bounds.
            let ends: Vec<(i64, i64)> = bounds.chunks_exact(2).map(|b| place(b[0], b[1], length)).collect();
            let whole = ends.first().is_some_and(|f| f.0 == 0)
                && ends.last().is_some_and(|l| l.1 == length)
                && ends.windows(2).all(|w| w[0].1 == w[1].0);
            if whole {
                let sizes: Vec<i64> = ends.iter().map(|(from, to)| to - from).collect();
                let parts = x.f_split_with_sizes(&sizes[..], axis)?;
                return Ok(parts.into_iter().map(Value::device).collect());
            }
            ends.iter().map(|&(from, to)| Ok(Value::device(x.f_narrow(axis, from, to - from)?))).collect()
        }))
    });
    // x, its shape with three axes, the shape behind the exchange of the last two
    add("TransposeLast", (3, 3), |_| {
        let kernel = Kernel::new(|a| {
            let (x, size) = (a.t(0)?, a.shape(0)?);
            let flat = normalize::resolve(&a.ints(1)?, &size)?;
            let &[outer, rows, columns] = flat.as_slice() else {
                return Err(Error::invalid(format!("a reshape to {flat:?}, expected three axes")));
            };
            let back = normalize::resolve(&a.ints(2)?, &[outer, columns, rows])?;
            let mut own = size.clone();
            let last = own.len().saturating_sub(2);
            own[last..].reverse();
            if size.ends_with(&[rows, columns]) && back == own {
                return one(x.f_transpose(-2, -1)?);
            }
            one(x.f_reshape(&flat[..])?.f_transpose(1, 2)?.f_reshape(&back[..])?)
        });
        Ok(kernel.host(&[1, 2]))
    });
    // q, k, v, mask, factors
    add("Attention", (3, MANY), attention::build);
}
