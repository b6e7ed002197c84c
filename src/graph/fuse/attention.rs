//! Attention: `softmax(q k^T scale + mask) v`, from matrix products or Einsum, with any of the usual scales and masks.
//!
//! The call made has the inputs q, k, v, mask (optional) and then factors of the scores, and the attributes
//! `places` (of each factor: 0 meets q, 1 k, 2 the scores) and `divides`; `mask` (`add`, `seen`, `hidden`) with `fill`;
//! `q_perm`, `k_perm`, `v_perm`, `out_perm` towards `[batch..., rows, channels]` where Einsum has another order (without
//! `k_perm` k comes transposed, as for a matrix product); `parted` where the scores are reshaped behind the first product,
//! losing the axes of `squeeze`, and the weights before the second one, gaining those of `unsqueeze` first (Einsum as Keras
//! writes it: both shapes follow the factors); `axis` of the softmax where it is not -1; `cast`, the type that
//! the weights are cast to behind a softmax in f32; `guarded` where NaN weights count as zero.

use crate::graph::attributes::Attribute;
use crate::graph::fuse::pattern::{Captures, Pattern, either, factor, host, number, op, scalar, value};
use crate::graph::fuse::rule::{Replacement, Rule};
use crate::graph::fuse::view::View;
use crate::graph::ir::ValueId;
use crate::tensor::HostTensor;

pub(super) fn rules() -> Vec<Rule> {
    let (plain, joined) = patterns();
    vec![
        Rule { name: "Attention", patterns: plain, near: Some(2), check },
        // Here two views fit nearly everything.
        Rule { name: "Attention", patterns: joined, near: Some(4), check },
    ]
}

/// Names of the factors, with their place and whether they divide.
const FACTORS: [(&str, i64, i64); 6] =
    [("q_times", 0, 0), ("q_over", 0, 1), ("k_times", 1, 0), ("k_over", 1, 1), ("times", 2, 0), ("over", 2, 1)];

/// With the weights as they are in the second product, and reshaped before it.
fn patterns() -> (Vec<Pattern>, Vec<Pattern>) {
    let operand = |name, times, over, turn| {
        let scaled = either([op("Mul", [value(name), factor(times)]), op("Div", [value(name), factor(over)])]);
        either([scaled.clone(), op("Transpose", [scaled]).named(turn), value(name)])
    };
    let q = operand("q", "q_times", "q_over", "q_turn");
    let k = operand("k", "k_times", "k_over", "k_turn");
    let product = either([op("MatMul", [q.clone(), k.clone()]), op("Einsum", [q, k])]).named("product");
    // Heads and batch are one axis in the products, and two between them.
    let parted = op("Reshape", [product.clone(), host("shape")]).named("parted");
    let product = either([op("Squeeze", [parted.clone()]).named("squeeze"), parted, product]);
    let scaled =
        either([op("Mul", [product.clone(), factor("times")]), op("Div", [product.clone(), factor("over")]), product]);
    // A choice between the scores and a number as tf2onnx writes it.
    let kept = op("Mul", [scaled.clone(), op("Cast", [value("seen")])]);
    let filled = op("Mul", [scalar("fill"), op("Cast", [op("Not", [value("seen")])])]);
    let scores = either([
        op("Add", [kept, filled]),
        op("Where", [value("seen"), scaled.clone(), scalar("fill")]),
        op("Where", [value("hidden"), scalar("fill"), scaled.clone()]),
        op("Add", [scaled.clone(), value("mask")]),
        scaled,
    ]);
    // Half precision models take the softmax in f32.
    let widened = op("Softmax", [op("Cast", [scores.clone()]).named("up")]).named("softmax");
    let plain = op("Softmax", [scores]).named("softmax");
    let softmax = either([op("Cast", [widened]).named("down"), plain]);
    // Rows that see nothing.
    let guarded = |s: Pattern| op("Where", [op("IsNaN", [s.clone()]), number(0.0), s]).named("guard");
    let weights = either([guarded(softmax.clone()), softmax]);
    let wide = either([op("Unsqueeze", [weights.clone()]).named("unsqueeze"), weights.clone()]);
    let joined = op("Reshape", [wide, host("back")]).named("joined");
    let plain = vec![
        op("MatMul", [weights.clone(), value("v")]).named("out"),
        op("Einsum", [weights.clone(), value("v")]).named("out"),
        op("Einsum", [value("v"), weights]).named("out"),
    ];
    (plain, vec![op("MatMul", [joined, value("v")]).named("out")])
}

fn check(view: &View, captures: &Captures) -> Result<Replacement, String> {
    let node = |name: &str| captures.call(name).map(|i| view.node(i)).ok_or_else(|| format!("no {name}"));
    let (product, softmax, out) = (node("product")?, node("softmax")?, node("out")?);
    let mut list: Vec<(String, Attribute)> = Vec::new();
    let mut set = |name: &str, a: Attribute| list.push((name.to_owned(), a));

    let default = if softmax.opset < 13 { 1 } else { -1 };
    let axis = softmax.attributes.int_or("axis", default).map_err(|e| e.to_string())?;
    let mut rank = None;
    let (mut q, mut k) = (captures.value("q"), captures.value("k"));
    let mut swapped = false;
    // A transpose between the scale and the product.
    let turn = |name: &str| -> Result<Option<Vec<i64>>, String> {
        let Some(i) = captures.call(name) else { return Ok(None) };
        let perm = view.node(i).attributes.ints("perm").ok().flatten();
        perm.filter(|p| p.len() > 1).map(Some).ok_or_else(|| "a transpose without its order of axes".to_owned())
    };
    let (q_turn, mut k_turn) = (turn("q_turn")?, turn("k_turn")?);
    if product.is("Einsum") {
        if q_turn.is_some() || k_turn.is_some() {
            return Err("a transpose stands between the scale and the Einsum".into());
        }
        let e = Product::parse(&equation(product.attributes.string_or("equation", ""))?)?;
        swapped = e.swapped;
        if swapped {
            (q, k) = (k, q);
        }
        rank = Some(e.batch.len() as i64 + 2);
        set("q_perm", Attribute::Ints(e.q_perm));
        set("k_perm", Attribute::Ints(e.k_perm));
    }
    if let Some(p) = q_turn {
        set("q_perm", Attribute::Ints(p));
    }
    if let Some(p) = &mut k_turn {
        // Towards [batch..., keys, channels].
        let last = p.len() - 1;
        p.swap(last - 1, last);
        set("k_perm", Attribute::Ints(p.clone()));
    }
    if out.is("Einsum") {
        let weights_first = out.input(1) == captures.value("v");
        let e = Sum::parse(&equation(out.attributes.string_or("equation", ""))?, weights_first)?;
        if rank.is_some_and(|r| r != e.rank) {
            return Err("the two products are of different rank".into());
        }
        rank = Some(e.rank);
        set("v_perm", Attribute::Ints(e.v_perm));
        set("out_perm", Attribute::Ints(e.out_perm));
    }
    match rank {
        _ if axis == -1 => {}
        Some(r) if axis == r - 1 => {}
        Some(_) => return Err("the softmax does not run over the keys".into()),
        None if axis < 0 => return Err("the softmax does not run over the last axis".into()),
        // The rank of a plain product is seen at run time.
        None => set("axis", Attribute::Int(axis)),
    }

    let type_of = |name: &str| node(name).ok().and_then(|n| n.attributes.int("to").ok().flatten());
    if let (Some(up), Some(down)) = (type_of("up"), type_of("down")) {
        if !matches!(up, 1 | 11) {
            return Err("the softmax is taken in a narrower type".into());
        }
        set("cast", Attribute::Int(down));
    }
    if captures.call("guard").is_some() {
        set("guarded", Attribute::Int(1));
    }
    let mut mask = None;
    for kind in ["mask", "seen", "hidden"] {
        let Some(v) = captures.value(kind) else { continue };
        mask = Some(v);
        if kind == "mask" {
            set("mask", Attribute::String("add".into()));
            continue;
        }
        let fill = captures.value("fill").and_then(|v| view.number(v)).ok_or("the mask's value is not a number")?;
        // Added to the scores it must drown them, as it would replace them.
        if fill.value > if fill.rounding > 5e-4 { -6e4 } else { -1e8 } {
            return Err(format!("hidden scores become {}, which is not far below all others", fill.value));
        }
        set("mask", Attribute::String(kind.into()));
        set("fill", Attribute::Tensor(HostTensor::scalar(fill.value)));
    }
    let mut inputs: Vec<Option<ValueId>> = vec![q, k, captures.value("v"), mask];
    let (mut places, mut divides) = (Vec::new(), Vec::new());
    for (name, place, divide) in FACTORS {
        if let Some(v) = captures.value(name) {
            inputs.push(Some(v));
            places.push(if swapped && place < 2 { 1 - place } else { place });
            divides.push(divide);
        }
    }
    match (captures.call("parted"), captures.call("joined")) {
        (None, None) => {}
        (Some(_), Some(_)) => {
            for name in ["squeeze", "unsqueeze"] {
                if let Some(i) = captures.call(name) {
                    let axes = view.listed_axes(i).ok_or_else(|| format!("the axes of its {name} are not constant"))?;
                    set(name, Attribute::Ints(axes));
                }
            }
            set("parted", Attribute::Int(1));
            inputs.extend([captures.value("shape"), captures.value("back")]);
        }
        _ => return Err("the scores or their weights are reshaped between the products".into()),
    }
    set("places", Attribute::Ints(places));
    set("divides", Attribute::Ints(divides));
    Ok(Replacement { op: "Attention", inputs, attributes: list })
}

/// Labels of the operands and of the result.
fn equation(text: crate::error::Result<String>) -> Result<[Vec<char>; 3], String> {
    let text = text.map_err(|e| e.to_string())?;
    let plain: String = text.chars().filter(|c| !c.is_whitespace()).collect();
    let bad = || format!("the equation `{text}` is not one of attention");
    let (operands, result) = plain.split_once("->").ok_or_else(bad)?;
    let (a, b) = operands.split_once(',').ok_or_else(bad)?;
    let labels = |s: &str| -> Option<Vec<char>> {
        let all: Vec<char> = s.chars().collect();
        let distinct = all.iter().enumerate().all(|(i, c)| c.is_alphabetic() && !all[..i].contains(c));
        distinct.then_some(all)
    };
    match (labels(a), labels(b), labels(result)) {
        (Some(a), Some(b), Some(c)) => Ok([a, b, c]),
        _ => Err(bad()),
    }
}

/// Where each of `order` stands among `labels`; `None` unless they are the same labels.
fn permutation(order: &[char], labels: &[char]) -> Option<Vec<i64>> {
    let at = |c: &char| labels.iter().position(|l| l == c).map(|i| i as i64);
    (order.len() == labels.len()).then(|| order.iter().map(at).collect()).flatten()
}

/// `q, k -> [batch..., rows, keys]`
struct Product {
    batch: Vec<char>,
    q_perm: Vec<i64>,
    k_perm: Vec<i64>,
    /// k comes first.
    swapped: bool,
}

impl Product {
    fn parse([a, b, c]: &[Vec<char>; 3]) -> Result<Self, String> {
        let bad = || "its first equation is not a product of queries and keys".to_owned();
        let [batch @ .., row, key] = c.as_slice() else { return Err(bad()) };
        let swapped = !a.contains(row);
        let (q, k) = if swapped { (b, a) } else { (a, b) };
        let summed: Vec<char> = q.iter().filter(|l| k.contains(l) && !c.contains(l)).copied().collect();
        let [channel] = summed.as_slice() else { return Err(bad()) };
        let order = |last: char| [batch, &[last, *channel]].concat();
        let q_perm = permutation(&order(*row), q).ok_or_else(bad)?;
        let k_perm = permutation(&order(*key), k).ok_or_else(bad)?;
        Ok(Self { batch: batch.to_vec(), q_perm, k_perm, swapped })
    }
}

/// `weights [batch..., rows, keys], v -> result`
struct Sum {
    rank: i64,
    v_perm: Vec<i64>,
    out_perm: Vec<i64>,
}

impl Sum {
    fn parse([a, b, c]: &[Vec<char>; 3], weights_first: bool) -> Result<Self, String> {
        let bad = || "its second equation is not a sum over keys".to_owned();
        let (weights, v) = if weights_first { (a, b) } else { (b, a) };
        let [batch @ .., row, key] = weights.as_slice() else { return Err(bad()) };
        let own: Vec<char> = v.iter().filter(|l| !weights.contains(l)).copied().collect();
        let [channel] = own.as_slice() else { return Err(bad()) };
        let v_perm = permutation(&[batch, &[*key, *channel]].concat(), v).ok_or_else(bad)?;
        let out_perm = permutation(c, &[batch, &[*row, *channel]].concat()).ok_or_else(bad)?;
        Ok(Self { rank: weights.len() as i64, v_perm, out_perm })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(text: &str) -> [Vec<char>; 3] {
        equation(Ok(text.to_owned())).unwrap()
    }

    #[test]
    fn equations_of_edm_and_of_flax_are_read() {
        let e = Product::parse(&labels("ncq,nck->nqk")).unwrap();
        assert_eq!((e.q_perm, e.k_perm, e.swapped), (vec![0, 2, 1], vec![0, 2, 1], false));
        let e = Product::parse(&labels("bkhd, bqhd -> bhqk")).unwrap();
        assert_eq!((e.q_perm, e.k_perm, e.swapped), (vec![0, 2, 1, 3], vec![0, 2, 1, 3], true));
        let e = Sum::parse(&labels("nqk,nck->ncq"), true).unwrap();
        assert_eq!((e.v_perm, e.out_perm, e.rank), (vec![0, 2, 1], vec![0, 2, 1], 3));
        let e = Sum::parse(&labels("bkhd,bhqk->bqhd"), false).unwrap();
        assert_eq!((e.v_perm, e.out_perm, e.rank), (vec![0, 2, 1, 3], vec![0, 2, 1, 3], 4));
    }

    #[test]
    fn other_equations_are_not() {
        assert!(equation(Ok("...qd,...kd->...qk".into())).is_err());
        assert!(equation(Ok("iij,jk->ik".into())).is_err());
        // Batch of one operand only; two summed axes; keys not last.
        for other in ["hqd,bhkd->bhqk", "bqde,bkde->bqk", "bqd,bkd->bkqx"] {
            assert!(Product::parse(&labels(other)).is_err(), "{other}");
        }
        assert!(Sum::parse(&labels("bqk,kd->bqd"), true).is_err());
    }
}
