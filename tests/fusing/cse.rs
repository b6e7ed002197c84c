use crate::graphs::Text;

fn text(nodes: &str) -> Text<'_> {
    Text { opset: 20, inputs: &[("x", &[2, 3, 5])], weights: &[], nodes }
}

#[test]
fn equal_calls_are_made_once() {
    // Shape arithmetic of two layers, and two sigmoids of which the second makes a SiLU whole.
    text("h1 = Shape(x)\n d1 = Gather(h1, [0])\n s1 = Concat(d1, [-1]) {axis=0}\n a = Reshape(x, s1)\n e = Exp(a)\n h2 = Shape(x)\n d2 = Gather(h2, [0])\n s2 = Concat(d2, [-1]) {axis=0}\n b = Reshape(x, s2)\n y = Add(e, b)")
        .becomes(&["Shape", "Gather", "Concat", "Reshape", "Exp", "Add"]);
    text("s = Sigmoid(x)\n a = Mul(x, s)\n s2 = Sigmoid(x)\n b = Mul(s2, 2.0)\n c = Mul(x, s2)\n y = Add(a, c)\n y2 = Neg(b)").check(1e-6);
}

#[test]
fn calls_with_other_attributes_or_weights_stay_apart() {
    text("a = Softmax(x) {axis=1}\n b = Softmax(x) {axis=2}\n y = Add(a, b)").becomes(&["Softmax", "Softmax", "Add"]);
    let t = Text { weights: &[("w", &[5]), ("u", &[5])], ..text("a = Mul(x, w)\n b = Mul(x, u)\n y = Sub(a, b)") };
    t.becomes(&["Mul", "Mul", "Sub"]);
}

#[test]
fn casts_that_change_nothing_go() {
    // Through a wider type, and to the type a value has.
    text("a = Cast(x) {to=11}\n b = Cast(a) {to=FLOAT}\n y = Neg(b)").becomes(&["Neg"]);
    text("a = Cast(x) {to=FLOAT}\n i = Identity(a)\n y = Exp(i)").becomes(&["Exp"]);
    text("a = CastLike(x, x)\n y = Exp(a)").becomes(&["Exp"]);
}

#[test]
fn casts_that_round_stay() {
    text("a = Cast(x) {to=10}\n b = Cast(a) {to=FLOAT}\n y = Neg(b)").becomes(&["Cast", "Cast", "Neg"]);
    text("a = Cast(x) {to=7}\n b = Cast(a) {to=FLOAT}\n c = Mul(b, x)\n y = Neg(c)")
        .becomes(&["Cast", "Cast", "Mul", "Neg"]);
}
