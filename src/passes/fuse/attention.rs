//! ONNX's Attention (opset 23) out of fused attention (see `graph::fuse::attention` for the attributes).

use crate::graph::{Node, ValueId};
use crate::tensor::HostTensor;

use crate::graph::edit::{float_attribute, ints_attribute};
use crate::passes::fuse::{Emit, Look};

type Fallible<T> = Result<T, String>;

/// q, k and v as `[batch, heads, rows, channels]`, scores scaled by one number, an added mask where there is one.
pub(super) fn write(node: &Node, look: &Look<'_>, emit: &mut Emit<'_>) -> Fallible<()> {
    let a = &node.attributes;
    let text = |e: crate::error::Error| e.to_string();
    let perm = |name: &str| a.ints(name).map_err(text);
    if a.get("cast").is_some() {
        return Err("its softmax is taken in another type".into());
    }
    let y = look.name(node.output(0).ok_or("it has no result")?).to_owned();
    let rank = look.shapes(node.input(0))?[0].len();
    if !matches!(rank, 3 | 4) {
        return Err(format!("its operands have {rank} axes, expected 3 or 4"));
    }
    if a.int("axis").map_err(text)?.is_some_and(|axis| axis != rank as i64 - 1) {
        return Err("its softmax does not run over the last axis".into());
    }
    let identity: Vec<i64> = (0..rank as i64).collect();
    let mut swapped = identity.clone();
    swapped.swap(rank - 2, rank - 1);
    let orders = [
        perm("q_perm")?.unwrap_or_else(|| identity.clone()),
        perm("k_perm")?.unwrap_or(swapped),
        perm("v_perm")?.unwrap_or_else(|| identity.clone()),
    ];
    let (mut operands, mut shapes) = (Vec::new(), Vec::new());
    for (slot, order) in orders.iter().enumerate() {
        let v = node.input(slot).ok_or("an operand is missing")?;
        let turned = |s: &Vec<usize>| -> Option<Vec<usize>> {
            (s.len() == rank).then(|| order.iter().map(|&i| s[i as usize]).collect())
        };
        let all: Option<Vec<Vec<usize>>> = look.shapes(Some(v))?.iter().map(turned).collect();
        shapes.push(all.ok_or("its operands differ in rank")?);
        operands.push(operand(v, order, &identity, look, emit));
    }
    let batches_agree = (0..shapes[0].len()).all(|run| {
        let batch = |k: usize| &shapes[k][run][..rank - 2];
        batch(0) == batch(1) && batch(0) == batch(2)
    });
    if !batches_agree {
        return Err("its operands are broadcast over the batch".into());
    }
    let mask = mask(node, look, rank, &shapes[0], &shapes[1])?;
    let scale = scale(node, look)?;
    // A single head where there is no axis of heads.
    let axis = (rank == 3).then(|| emit.constant(&format!("{y}/heads"), &HostTensor::vec(&[1i64])));
    if let Some(axis) = &axis {
        for o in &mut operands {
            *o = emit.value("Unsqueeze", &[o, axis], &format!("{y}/operand"), Vec::new());
        }
    }
    let mut inputs: Vec<&str> = operands.iter().map(String::as_str).collect();
    inputs.extend(mask.as_deref());
    let out_perm = perm("out_perm")?.filter(|p| *p != identity);
    let mut to = if rank == 3 || out_perm.is_some() { emit.name(&format!("{y}/attended")) } else { y.clone() };
    emit.node("Attention", &inputs, &to, vec![float_attribute("scale", scale as f32)]);
    if let Some(axis) = axis {
        let next = if out_perm.is_some() { emit.name(&format!("{y}/joined")) } else { y.clone() };
        emit.node("Squeeze", &[&to, &axis], &next, Vec::new());
        to = next;
    }
    if let Some(p) = out_perm {
        emit.node("Transpose", &[&to], &y, vec![ints_attribute("perm", &p)]);
    }
    Ok(())
}

/// The operand in this order of axes, taken from before a Transpose that stands there already.
fn operand(v: ValueId, order: &[i64], identity: &[i64], look: &Look<'_>, emit: &mut Emit<'_>) -> String {
    let (mut from, mut order) = (v, order.to_vec());
    if order != identity
        && let Some((before, source)) = look.transpose(v)
    {
        order = order.iter().map(|&i| before[i as usize]).collect();
        from = source;
    }
    let name = look.name(from).to_owned();
    if order == identity {
        return name;
    }
    emit.value("Transpose", &[&name], &format!("{name}/turned"), vec![ints_attribute("perm", &order)])
}

/// The product of all factors of the scores.
fn scale(node: &Node, look: &Look<'_>) -> Fallible<f64> {
    let divides = node.attributes.ints("divides").map_err(|e| e.to_string())?.unwrap_or_default();
    let mut scale = 1.0;
    for (k, divides) in divides.into_iter().enumerate() {
        let factor = look.constant(node.input(4 + k)).filter(|t| t.len() == 1);
        let f = factor.and_then(|t| t.to_f64().first().copied()).ok_or("its scale is not one constant number")?;
        scale *= if divides != 0 { 1.0 / f } else { f };
    }
    if scale.is_finite() && scale > 0.0 { Ok(scale) } else { Err(format!("its scale is {scale}")) }
}

/// The added mask, where it means the same in the operator.
fn mask(node: &Node, look: &Look<'_>, rank: usize, q: &[Vec<usize>], k: &[Vec<usize>]) -> Fallible<Option<String>> {
    let Some(v) = node.input(3) else { return Ok(None) };
    if node.attributes.string_or("mask", "").map_err(|e| e.to_string())? != "add" {
        return Err("its mask chooses instead of being added".into());
    }
    if node.attributes.get("guarded").is_some() {
        return Err("rows that see nothing are set to zero".into());
    }
    let shapes = look.shapes(Some(v))?;
    for (run, m) in shapes.iter().enumerate() {
        let full = [q[run][rank - 2], k[run][rank - 2]];
        // Two axes, or all four: with three the operator would take the first for the heads.
        if !(m.len() == 2 || m.len() == 4 && rank == 4) || m[m.len() - 2..] != full {
            return Err(format!("its mask has the shape {m:?}"));
        }
    }
    Ok(Some(look.name(v).to_owned()))
}
