//! Norms: LayerNorm, GroupNorm and RMSNorm from their statistics.
//!
//! First the statistics and their use become one `Normalize` call over some axes; then what stands around it is taken in:
//! the reshapes of a group norm, a scale, a bias. Which native kernel it is, the shapes decide at run time.
//!
//! `Normalize` has the inputs x, scale, bias, inner shape, outer shape (all but the first optional) and the attributes `axes`
//! (absent: all from the third on), `epsilon`, `rms` (no mean is taken away), `inside` (scale and bias meet the inner shape), `view`
//! (the order of axes in which the norm sees x: see `layout`).

use crate::graph::attributes::Attribute;
use crate::graph::fuse::pattern::{Captures, Pattern, either, host, number, op, scalar, value, weight};
use crate::graph::fuse::rule::{Replacement, Rule, attributes, kept};
use crate::graph::fuse::view::View;
use crate::graph::ir::Node;
use crate::tensor::HostTensor;

const MADE: &str = "disback.Normalize";

pub(super) fn rules() -> Vec<Rule> {
    // Takes in what stands around a norm: nothing to report where it is something else.
    let absorb = |pattern: Pattern, check| Rule { name: "norm", patterns: vec![pattern], near: None, check };
    let scale = || absorb(op("Mul", [normalize(), weight("scale")]), with_scale);
    let bias = || absorb(op("Add", [normalize(), weight("bias")]), with_bias);
    vec![
        Rule { name: "LayerNorm or GroupNorm", patterns: centred_norms(), near: Some(5), check: from_statistics },
        Rule { name: "RMSNorm", patterns: rms_norms(), near: Some(5), check: from_statistics },
        Rule { name: "GroupNorm", patterns: vec![instance_norm()], near: Some(2), check: from_instance_norm },
        // Scale and bias of the inner shape, the reshapes, then those of the outer shape.
        scale(),
        bias(),
        absorb(grouped(), with_shapes),
        scale(),
        bias(),
    ]
}

/// The native norm that a `Normalize` call stands for; other operators keep their name.
pub(super) fn final_name(node: &Node) -> &str {
    match node.op.as_str() {
        "Normalize" if node.attributes.get("rms").is_some() => "RMSNorm",
        "Normalize" if node.input(3).is_some() => "GroupNorm",
        "Normalize" => "LayerNorm",
        other => other,
    }
}

fn x() -> Pattern {
    value("x")
}

/// A mean that keeps its axes; tf2onnx takes a pooling where the axes are all from the third on.
fn mean_of(p: Pattern) -> Pattern {
    either([op("ReduceMean", [p.clone()]), op("GlobalAveragePool", [p])])
}

fn square(p: &Pattern) -> Pattern {
    either([op("Mul", [p.clone(), p.clone()]), op("Pow", [p.clone(), number(2.0)])])
}

/// `1 / sqrt(variance + epsilon)` as a root and as its inverse.
fn roots(variance: Pattern) -> (Pattern, Pattern) {
    let sum = op("Add", [variance, scalar("epsilon")]);
    let root = either([op("Sqrt", [sum.clone()]), op("Pow", [sum.clone(), number(0.5)])]);
    let inverse = either([
        op("Reciprocal", [root.clone()]),
        op("Div", [number(1.0), root.clone()]),
        op("Pow", [sum, number(-0.5)]),
    ]);
    (root, inverse)
}

/// Every way to write `(x - mean) / sqrt(variance + epsilon)`, with or without scale and bias drawn in.
fn centred_norms() -> Vec<Pattern> {
    let mean = mean_of(x()).named("mean");
    let plain = op("Sub", [x(), mean.clone()]);
    // jax2onnx takes groups that are constant for exactly zero; their rounding errors are all that differs.
    let extremes = op("Equal", [op("ReduceMin", [x()]).named("low"), op("ReduceMax", [x()]).named("high")]);
    let finite = op("Equal", [op("Sub", [mean.clone(), mean.clone()]), number(0.0)]);
    let stable = op("Where", [op("And", [extremes, finite]), number(0.0), plain.clone()]);
    let centred = either([stable.named("centred"), plain.named("centred")]);

    let spread = mean_of(square(&centred)).named("spread");
    let wide = mean_of(op("Cast", [square(&centred)]).named("wide")).named("spread");
    // E[x^2] - E[x]^2, which rounding may make negative.
    let moments = op("Sub", [mean_of(square(&x())).named("spread"), square(&mean)]);
    let variance = either([
        spread,
        op("Cast", [wide]),
        op("Max", [moments.clone(), number(0.0)]),
        op("Relu", [moments.clone()]),
        op("Clip", [moments.clone(), number(0.0)]),
        moments,
    ]);
    let (root, inverse) = roots(variance);
    let scaled = op("Mul", [inverse.clone(), weight("scale")]).named("factor");
    let factor = either([scaled.clone(), inverse.clone().named("factor")]);
    let (weighted, shifted) = (op("Mul", [x(), factor.clone()]), op("Mul", [mean.clone(), factor.clone()]));
    let negative = either([op("Mul", [op("Neg", [mean]), factor]), op("Neg", [shifted.clone()])]);
    vec![
        op("Div", [centred.clone(), root]),
        op("Mul", [centred.clone(), inverse]),
        op("Mul", [centred, scaled]),
        // x f + (bias - mean f), as TensorFlow and Keras do it.
        op(
            "Add",
            [
                weighted.clone(),
                either([
                    op("Add", [negative.clone(), weight("bias")]),
                    op("Sub", [weight("bias"), shifted.clone()]),
                    negative.clone(),
                ]),
            ],
        ),
        op("Add", [op("Add", [weighted.clone(), negative]), weight("bias")]),
        op("Sub", [weighted, shifted]),
    ]
}

/// `x / sqrt(mean(x^2) + epsilon)`
fn rms_norms() -> Vec<Pattern> {
    let spread = mean_of(square(&x())).named("spread");
    let (root, inverse) = roots(spread);
    let scaled = op("Mul", [inverse.clone(), weight("scale")]);
    vec![op("Div", [x(), root]), op("Mul", [x(), inverse]), op("Mul", [x(), scaled])]
}

#[derive(PartialEq)]
enum Axes {
    These(Vec<i64>),
    /// All from the third on.
    Spatial,
}

fn axes(view: &View, i: usize) -> Option<Axes> {
    if view.node(i).is("GlobalAveragePool") { Some(Axes::Spatial) } else { view.kept_axes(i).map(Axes::These) }
}

fn from_statistics(view: &View, captures: &Captures) -> Result<Replacement, String> {
    let axes = |name: &str| captures.call(name).map(|i| axes(view, i));
    let Some(Some(spread)) = axes("spread") else {
        return Err("the axes of the variance are not constant, or are not kept".into());
    };
    for other in ["mean", "low", "high"] {
        match axes(other) {
            Some(a) if a.as_ref() != Some(&spread) => return Err(format!("the {other} is taken over other axes")),
            _ => {}
        }
    }
    if let Some(i) = captures.call("wide")
        && !matches!(view.node(i).attributes.int("to"), Ok(Some(1 | 11)))
    {
        return Err("the variance is taken in a narrower type".into());
    }
    let epsilon = captures.value("epsilon").and_then(|v| view.number(v)).map_or(f64::NAN, |n| n.value);
    if epsilon.is_nan() || epsilon < 0.0 {
        return Err(format!("epsilon is {epsilon}"));
    }
    let mut list = normalize_attributes(epsilon);
    if let Axes::These(axes) = spread {
        list.push(("axes".to_owned(), Attribute::Ints(axes)));
    }
    if captures.call("mean").is_none() {
        list.push(("rms".to_owned(), Attribute::Int(1)));
    }
    let inputs = vec![captures.value("x"), captures.value("scale"), captures.value("bias")];
    Ok(Replacement { op: "Normalize", inputs, attributes: list })
}

/// Epsilon in f64, as graphs of f64 have it.
fn normalize_attributes(epsilon: f64) -> Vec<(String, Attribute)> {
    attributes([("epsilon", Attribute::Tensor(HostTensor::scalar(epsilon)))])
}

/// Reshape to `[N, G, ...]`, instance norm with ones and zeros, Reshape back: what PyTorch and Paddle make of GroupNorm.
fn instance_norm() -> Pattern {
    let split = op("Reshape", [x(), host("inner")]);
    let norm = op("InstanceNormalization", [split, value("ones"), value("zeros")]).named("norm");
    op("Reshape", [norm, host("outer")])
}

fn from_instance_norm(view: &View, captures: &Captures) -> Result<Replacement, String> {
    let all = |name: &str, n: f64| {
        let v = captures.value(name);
        let constant = view.constant(v).map(|t| t.to_f64().iter().all(|&x| x == n));
        constant.unwrap_or_else(|| v.and_then(|v| view.number(v)).is_some_and(|k| k.value == n))
    };
    if !all("ones", 1.0) || !all("zeros", 0.0) {
        return Err("the instance norm has a scale or bias of its own".into());
    }
    let node = captures.call("norm").map(|i| view.node(i)).ok_or("no instance norm")?;
    let epsilon = node.attributes.float_or("epsilon", 1e-5).map_err(|e| e.to_string())?;
    let inputs = [captures.value("x"), None, None, captures.value("inner"), captures.value("outer")];
    Ok(Replacement { op: "Normalize", inputs: inputs.to_vec(), attributes: normalize_attributes(epsilon) })
}

fn normalize() -> Pattern {
    op(MADE, [x()]).named("norm")
}

fn grouped() -> Pattern {
    let split = op("Reshape", [x(), host("inner")]);
    op("Reshape", [op(MADE, [split]).named("norm"), host("outer")])
}

fn made<'a>(view: &View<'a>, captures: &Captures) -> Result<&'a Node, String> {
    captures.call("norm").map(|i| view.node(i)).ok_or_else(|| "no norm".to_owned())
}

/// Takes in the reshapes around a norm over several axes.
fn with_shapes(view: &View, captures: &Captures) -> Result<Replacement, String> {
    let norm = made(view, captures)?;
    let several = norm.attributes.ints("axes").ok().flatten().is_some_and(|a| a.len() > 1);
    if norm.input(3).is_some() || !several {
        return Err("not the norm of groups".into());
    }
    let mut list = kept(norm);
    if norm.input(1).is_some() || norm.input(2).is_some() {
        list.push(("inside".to_owned(), Attribute::Int(1)));
    }
    let inputs = [captures.value("x"), norm.input(1), norm.input(2), captures.value("inner"), captures.value("outer")];
    Ok(Replacement { op: "Normalize", inputs: inputs.to_vec(), attributes: list })
}

/// Takes in the scale behind a norm that has none.
fn with_scale(view: &View, captures: &Captures) -> Result<Replacement, String> {
    let norm = made(view, captures)?;
    if norm.input(1).is_some() || norm.input(2).is_some() {
        return Err("it has a scale or bias".into());
    }
    let inputs = [norm.input(0), captures.value("scale"), None, norm.input(3), norm.input(4)];
    Ok(Replacement { op: "Normalize", inputs: inputs.to_vec(), attributes: kept(norm) })
}

/// Takes in the bias behind a norm that has none.
fn with_bias(view: &View, captures: &Captures) -> Result<Replacement, String> {
    let norm = made(view, captures)?;
    if norm.input(2).is_some() || norm.attributes.get("inside").is_some() {
        return Err("it has a bias".into());
    }
    let inputs = [norm.input(0), norm.input(1), captures.value("bias"), norm.input(3), norm.input(4)];
    Ok(Replacement { op: "Normalize", inputs: inputs.to_vec(), attributes: kept(norm) })
}
