use crate::graphs::Text;

fn text<'a>(weights: &'a [(&'a str, &'a [i64])], nodes: &'a str) -> Text<'a> {
    Text { opset: 20, inputs: &[("x", &[2, 3, 6])], weights, nodes }
}

#[test]
fn a_product_and_its_bias_are_one_call() {
    let weights: &[(&str, &[i64])] = &[("w", &[6, 4]), ("b", &[4])];
    text(weights, "h = MatMul(x, w)\n y = Add(h, b)").becomes(&["Linear"]);
    text(weights, "h = MatMul(x, w)\n y = Add(b, h)").becomes(&["Linear"]);
    // Other ranks, and a product that something else reads.
    text(&[("w", &[2, 6, 4]), ("b", &[4])], "h = MatMul(x, w)\n y = Add(h, b)").becomes(&["MatMul", "Add"]);
    text(&[("w", &[6, 4]), ("b", &[3, 1])], "h = MatMul(x, w)\n y = Add(h, b)").becomes(&["MatMul", "Add"]);
    text(weights, "h = MatMul(x, w)\n y = Add(h, b)\n z = Exp(h)").becomes(&["MatMul", "Add", "Exp"]);
    // A weight whose shape shows at run time only.
    text(&[("w", &[4, 6]), ("b", &[4])], "t = Transpose(w) {perm=[1, 0]}\n h = MatMul(x, t)\n y = Add(h, b)")
        .becomes(&["Transpose", "Linear"]);
    text(&[("w", &[6, 4]), ("b", &[4])], "c = Reshape(b, [1, 4])\n h = MatMul(x, w)\n y = Add(h, c)")
        .becomes(&["Reshape", "Linear"]);
}

#[test]
fn slices_that_part_a_value_are_made_together() {
    let part = |a: &str, b: &str, c: &str| {
        format!(
            "e = Exp(x)\n a = Slice(e, [0], {a}, [2])\n b = Slice(e, {a}, {b}, [2])\n c = Slice(e, {b}, {c}, [2])\n p = Mul(a, 2.0)\n q = Neg(b)\n r = Exp(c)"
        )
    };
    // To the end, past it, and short of it.
    for end in ["[6]", "[9223372036854775807]", "[5]"] {
        text(&[], &part("[2]", "[4]", end)).becomes(&["Exp", "Ranges", "Mul", "Neg", "Exp"]);
    }
    text(&[], "e = Exp(x)\n a = Slice(e, [0], [2], [2])\n b = Slice(e, [3], [6], [2])\n p = Neg(a)\n q = Exp(b)")
        .becomes(&["Exp", "Slice", "Slice", "Neg", "Exp"]);
    text(&[], "e = Exp(x)\n a = Slice(e, [0], [1], [1])\n b = Slice(e, [1], [6], [2])\n p = Neg(a)\n q = Exp(b)")
        .becomes(&["Exp", "Slice", "Slice", "Neg", "Exp"]);
}
