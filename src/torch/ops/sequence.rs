//! Sequences and optionals.

use tch::Tensor;

use crate::error::{Error, Result};
use crate::graph::Node;
use crate::torch::exec::kernel::{Kernel, Value, one};
use crate::torch::exec::registry::{MANY, Registry};
use crate::torch::ops::util;

pub fn register(r: &mut Registry) {
    r.add("SequenceConstruct", 11, (1, MANY), |_| {
        Ok(Kernel::new(|a| {
            let items = (0..a.len()).map(|i| a.value(i).cloned()).collect::<Result<Vec<_>>>()?;
            Ok(vec![Value::Sequence(items.into())])
        }))
    });
    r.add("SequenceEmpty", 11, (0, 0), |n| {
        n.attributes.get("dtype");
        Ok(Kernel::new(|_| Ok(vec![Value::Sequence(Vec::new().into())])))
    });
    r.add("SequenceAt", 11, (2, 2), |_| {
        Ok(Kernel::new(|a| {
            let items = a.sequence(0)?;
            Ok(vec![items[position(a.ints(1)?, items.len(), false)?].clone()])
        })
        .host(&[1]))
    });
    r.add("SequenceErase", 11, (1, 2), |_| {
        Ok(Kernel::new(|a| {
            let mut items = a.sequence(0)?.to_vec();
            let at = if a.has(1) { a.ints(1)? } else { vec![-1] };
            items.remove(position(at, items.len(), false)?);
            Ok(vec![Value::Sequence(items.into())])
        })
        .host(&[1]))
    });
    r.add("SequenceInsert", 11, (2, 3), |_| {
        Ok(Kernel::new(|a| {
            let mut items = a.sequence(0)?.to_vec();
            let at = if a.has(2) { position(a.ints(2)?, items.len(), true)? } else { items.len() };
            items.insert(at, a.value(1)?.clone());
            Ok(vec![Value::Sequence(items.into())])
        })
        .host(&[2]))
    });
    r.add("SequenceLength", 11, (1, 1), |_| {
        Ok(Kernel::new(|a| one(Tensor::from(a.sequence(0)?.len() as i64))).shapes())
    });
    r.add("SplitToSequence", 11, (1, 2), split_to_sequence);
    r.add("ConcatFromSequence", 11, (1, 1), |n| {
        let axis = n.attributes.int("axis")?.ok_or_else(|| Error::invalid("attribute `axis` is missing"))?;
        let new_axis = n.attributes.flag("new_axis", false)?;
        Ok(Kernel::new(move |a| {
            let items = a.sequence(0)?;
            let tensors = items.iter().map(|v| v.tensor(a.device())).collect::<Result<Vec<_>>>()?;
            let first = tensors.first().ok_or_else(|| Error::invalid("nothing to join: the sequence is empty"))?;
            if new_axis {
                let axis = util::axis(axis, first.dim() + 1)?;
                return one(Tensor::f_stack(&tensors, axis)?);
            }
            let axis = util::axis(axis, first.dim())?;
            one(Tensor::f_cat(&tensors, axis)?)
        }))
    });
    r.add("Optional", 15, (0, 1), |n| {
        n.attributes.get("type");
        Ok(Kernel::new(|a| Ok(vec![if a.has(0) { a.value(0)?.clone() } else { Value::Nothing }])))
    });
    r.add("OptionalHasElement", 15, (0, 1), |_| {
        Ok(Kernel::new(|a| {
            let there = a.has(0) && !matches!(a.value(0)?, Value::Nothing);
            one(Tensor::from(there))
        })
        .shapes())
    });
    r.add("OptionalGetElement", 15, (1, 1), |_| {
        Ok(Kernel::new(|a| match a.value(0)? {
            Value::Nothing => Err(Error::invalid("the optional is empty")),
            v => Ok(vec![v.clone()]),
        }))
    });
}

/// A position from the end where negative; `insert` allows the place behind the last.
fn position(at: Vec<i64>, len: usize, insert: bool) -> Result<usize> {
    let at = at.first().copied().ok_or_else(|| Error::invalid("an empty position"))?;
    let n = len as i64;
    let i = if at < 0 { at + n } else { at };
    if i >= 0 && (i < n || (insert && i == n)) {
        Ok(i as usize)
    } else {
        Err(Error::invalid(format!("position {at} in a sequence of {len}")))
    }
}

fn split_to_sequence(node: &Node) -> Result<Kernel> {
    let axis = node.attributes.int_or("axis", 0)?;
    let keep = node.attributes.flag("keepdims", true)?;
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let axis = util::axis(axis, x.dim())?;
        let total = x.size().get(axis as usize).copied().ok_or_else(|| Error::invalid("a scalar cannot be split"))?;
        let sizes = if a.has(1) {
            let given = a.ints(1)?;
            if a.shape(1)?.is_empty() {
                let part = given[0];
                if part < 1 {
                    return Err(Error::invalid(format!("parts of size {part}")));
                }
                (0..total.div_euclid(part) + i64::from(total % part != 0)).map(|i| part.min(total - i * part)).collect()
            } else {
                given
            }
        } else {
            vec![1; total as usize]
        };
        let squeeze = !keep && !a.has(1);
        let parts = x.f_split_with_sizes(&sizes[..], axis)?;
        let parts = parts
            .into_iter()
            .map(|p| Ok(Value::device(if squeeze { p.f_squeeze_dim(axis)? } else { p })))
            .collect::<Result<Vec<_>>>()?;
        Ok(vec![Value::Sequence(parts.into())])
    })
    .host(&[1]))
}
