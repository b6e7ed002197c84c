//! SiLU, GELU and Mish.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI, SQRT_2};

use crate::graph::attributes::Attribute;
use crate::graph::fuse::pattern::{Captures, Pattern, either, number, op, value};
use crate::graph::fuse::rule::{Replacement, Rule, attributes};
use crate::graph::fuse::view::View;

pub(super) fn rules() -> Vec<Rule> {
    vec![
        Rule { name: "SiLU", patterns: silu(), near: Some(usize::MAX), check: |v, c| unary(v, c, "SiLU") },
        Rule { name: "Gelu", patterns: gelu_erf(), near: Some(4), check: |v, c| gelu(v, c, "none") },
        Rule { name: "Gelu", patterns: gelu_tanh(), near: Some(5), check: |v, c| gelu(v, c, "tanh") },
        Rule { name: "Mish", patterns: mish(), near: Some(usize::MAX), check: |v, c| unary(v, c, "Mish") },
    ]
}

fn x() -> Pattern {
    value("x")
}

/// `x sigmoid(x)`, `x / (1 + exp(-x))`.
fn silu() -> Vec<Pattern> {
    let exp = op("Exp", [op("Neg", [x()])]);
    vec![op("Mul", [x(), op("Sigmoid", [x()])]), op("Div", [x(), op("Add", [exp, number(1.0)])])]
}

/// `x tanh(softplus(x))`
fn mish() -> Vec<Pattern> {
    vec![op("Mul", [x(), op("Tanh", [op("Softplus", [x()])])])]
}

/// `0.5 a b` in every order of the factors; half may be a division by two.
fn half_of(a: &Pattern, b: &Pattern) -> Vec<Pattern> {
    let half = |p: Pattern| either([op("Mul", [p.clone(), number(0.5)]), op("Div", [p, number(2.0)])]);
    vec![
        half(op("Mul", [a.clone(), b.clone()])),
        op("Mul", [half(a.clone()), b.clone()]),
        op("Mul", [a.clone(), half(b.clone())]),
    ]
}

/// `0.5 x (1 + erf(x / sqrt 2))`, or with the complement
fn gelu_erf() -> Vec<Pattern> {
    let scaled = either([op("Div", [x(), number(SQRT_2)]), op("Mul", [x(), number(FRAC_1_SQRT_2)])]);
    let mut forms = half_of(&x(), &op("Add", [op("Erf", [scaled]), number(1.0)]));
    // With erfc(-x / sqrt 2), as TensorFlow has it.
    let minus = || op("Neg", [x()]);
    let turned = either([
        op("Div", [minus(), number(SQRT_2)]),
        op("Mul", [minus(), number(FRAC_1_SQRT_2)]),
        op("Mul", [x(), number(-FRAC_1_SQRT_2)]),
        op("Div", [x(), number(-SQRT_2)]),
    ]);
    forms.extend(half_of(&x(), &op("Erfc", [turned])));
    forms
}

/// `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`
fn gelu_tanh() -> Vec<Pattern> {
    let square = || either([op("Mul", [x(), x()]), op("Pow", [x(), number(2.0)])]);
    let cube = either([op("Pow", [x(), number(3.0)]), op("Mul", [square(), x()])]);
    let cubic = either([
        op("Mul", [cube, number(0.044_715)]),
        op("Mul", [op("Mul", [square(), number(0.044_715)]), x()]),
        op("Mul", [square(), op("Mul", [x(), number(0.044_715)])]),
    ]);
    let root = || number(FRAC_2_PI.sqrt());
    // 1 + 0.044715 x^2 with one x taken out.
    let factored = op("Add", [op("Mul", [square(), number(0.044_715)]), number(1.0)]);
    let inner = either([
        op("Mul", [op("Add", [x(), cubic]), root()]),
        op("Mul", [op("Mul", [x(), root()]), factored.clone()]),
        op("Mul", [op("Mul", [x(), factored]), root()]),
    ]);
    half_of(&x(), &op("Add", [op("Tanh", [inner]), number(1.0)]))
}

fn unary(_: &View, captures: &Captures, op: &'static str) -> Result<Replacement, String> {
    Ok(Replacement { op, inputs: vec![captures.value("x")], attributes: Vec::new() })
}

fn gelu(_: &View, captures: &Captures, approximate: &str) -> Result<Replacement, String> {
    Ok(Replacement {
        op: "Gelu",
        inputs: vec![captures.value("x")],
        attributes: attributes([("approximate", Attribute::String(approximate.to_owned()))]),
    })
}
