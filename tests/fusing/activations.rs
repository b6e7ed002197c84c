use crate::graphs::{Text, read};

fn text(nodes: &str) -> Text<'_> {
    let inputs = read(nodes, &[("x", &[2, 3, 5]), ("z", &[2, 3, 5])]).leak();
    Text { opset: 20, inputs, weights: &[], nodes }
}

#[test]
fn silu_in_both_forms() {
    text("s = Sigmoid(x)\n y = Mul(x, s)").becomes(&["SiLU"]);
    text("s = Sigmoid(x)\n y = Mul(s, x)").becomes(&["SiLU"]);
    text("n = Neg(x)\n e = Exp(n)\n p = Add(1.0, e)\n y = Div(x, p)").becomes(&["SiLU"]);
}

#[test]
fn a_sigmoid_that_something_else_reads_or_that_gates_another_value_stays() {
    let outcome = text("s = Sigmoid(x)\n y = Mul(x, s)\n w = Add(s, z)").check(1e-6);
    assert_eq!(outcome.left, ["Sigmoid", "Mul", "Add"]);
    assert!(outcome.near_misses.iter().any(|(p, r)| *p == "SiLU" && r.contains("`s` is also used by Add node `n_w`")));
    let outcome = text("s = Sigmoid(z)\n y = Mul(x, s)").check(1e-6);
    assert_eq!(outcome.left, ["Sigmoid", "Mul"]);
    assert!(outcome.near_misses.is_empty(), "gating is no failed SiLU: {:?}", outcome.near_misses);
}

#[test]
fn gelu_of_erf_in_every_order() {
    let erf = "d = Div(x, 1.4142135623730951)\n e = Erf(d)\n p = Add(e, 1.0)\n";
    for end in [
        "m = Mul(x, p)\n y = Mul(m, 0.5)",
        "h = Mul(0.5, x)\n y = Mul(h, p)",
        "h = Mul(p, 0.5)\n y = Mul(x, h)",
        "h = Div(x, 2.0)\n y = Mul(p, h)",
    ] {
        text(&format!("{erf}{end}")).becomes(&["Gelu"]);
    }
    text("d = Mul(x, 0.7071067811865476)\n e = Erf(d)\n p = Add(1.0, e)\n m = Mul(p, x)\n y = Mul(0.5, m)")
        .becomes(&["Gelu"]);
}

#[test]
fn gelu_of_tanh_in_every_order() {
    let end = "t = Tanh(i)\n p = Add(1.0, t)\n h = Mul(0.5, p)\n y = Mul(x, h)";
    for cubic in [
        "c = Pow(x, 3.0)\n k = Mul(0.044715, c)\n a = Add(x, k)\n i = Mul(0.7978845608028654, a)\n",
        "q = Mul(x, x)\n c = Mul(q, x)\n k = Mul(c, 0.044715)\n a = Add(k, x)\n i = Mul(a, 0.7978845608028654)\n",
        "q = Mul(x, x)\n k = Mul(q, 0.044715)\n a = Add(k, 1.0)\n g = Mul(x, 0.7978845608028654)\n i = Mul(g, a)\n",
    ] {
        text(&format!("{cubic}{end}")).becomes(&["Gelu"]);
    }
}

#[test]
fn gelu_with_another_number_stays() {
    text("d = Div(x, 1.5)\n e = Erf(d)\n p = Add(e, 1.0)\n m = Mul(x, p)\n y = Mul(m, 0.5)")
        .stays("Gelu", "is not the number 1.41421");
    text("c = Pow(x, 3.0)\n k = Mul(0.05, c)\n a = Add(x, k)\n i = Mul(0.7978845608028654, a)\n t = Tanh(i)\n p = Add(1.0, t)\n h = Mul(0.5, p)\n y = Mul(x, h)")
        .stays("Gelu", "is not the number 0.044715");
}

#[test]
fn mish() {
    text("s = Softplus(x)\n t = Tanh(s)\n y = Mul(x, t)").becomes(&["Mish"]);
}
