use crate::graphs::{Text, read};

/// x is NHWC, `[2, 4, 4, 6]`; u is NCHW.
fn text(nodes: &str) -> Text<'_> {
    const INPUTS: &[(&str, &[i64])] =
        &[("x", &[2, 4, 4, 6]), ("u", &[2, 6, 4, 4]), ("emb", &[2, 1, 1, 6]), ("flat", &[2, 6])];
    const WEIGHTS: &[(&str, &[i64])] =
        &[("w1", &[6, 6, 3, 3]), ("w2", &[6, 6, 3, 3]), ("w3", &[4, 12, 1, 1]), ("w6", &[6]), ("b6", &[6])];
    Text { opset: 20, inputs: read(nodes, INPUTS).leak(), weights: read(nodes, WEIGHTS).leak(), nodes }
}

const CONV: &str =
    "a = Transpose(x) {perm=[0,3,1,2]}\n b = Conv(a, w1) {pads=[1,1,1,1]}\n c = Transpose(b) {perm=[0,2,3,1]}\n";

#[test]
fn neighbours_cancel_or_become_one() {
    text("a = Transpose(u) {perm=[0,2,3,1]}\n b = Transpose(a) {perm=[0,3,1,2]}\n y = Exp(b)").becomes(&["Exp"]);
    text("a = Transpose(u) {perm=[0,2,3,1]}\n b = Transpose(a) {perm=[0,2,1,3]}\n y = Exp(b)")
        .becomes(&["Transpose", "Exp"]);
    // The result of a pair that is a graph output keeps a node.
    text("a = Transpose(u) {perm=[0,2,3,1]}\n y = Transpose(a) {perm=[0,3,1,2]}").becomes(&["Transpose"]);
}

#[test]
fn between_two_convolutions_of_a_channels_last_network() {
    // A bias, a time embedding, an activation and a number.
    let end = "d = Add(c, b6)\n e = Add(d, emb)\n s = Sigmoid(e)\n f = Mul(e, s)\n g = Mul(f, 0.7)\n h = Transpose(g) {perm=[0,3,1,2]}\n i = Conv(h, w2) {pads=[1,1,1,1]}\n y = Transpose(i) {perm=[0,2,3,1]}";
    text(&format!("{CONV}{end}")).becomes(&[
        "Transpose",
        "Conv",
        "Align",
        "Add",
        "Align",
        "Add",
        "SiLU",
        "Mul",
        "Conv",
        "Transpose",
    ]);
    // A residual and a skip connection.
    let end = "d = Exp(c)\n e = Add(d, c)\n f = Concat(e, c) {axis=-1}\n g = Transpose(f) {perm=[0,3,1,2]}\n h = Conv(g, w3)\n y = Transpose(h) {perm=[0,2,3,1]}";
    text(&format!("{CONV}{end}")).becomes(&["Transpose", "Conv", "Exp", "Add", "Concat", "Conv", "Transpose"]);
}

const NORM: &str = "g = Reshape(c, [2, 4, 4, 3, 2])\n m = ReduceMean(g, [1, 2, 4])\n k = Sub(g, m)\n q = Mul(k, k)\n v = ReduceMean(q, [1, 2, 4])\n e = Add(v, 1e-5)\n r = Sqrt(e)\n n = Div(k, r)\n o = Reshape(n, [2, 4, 4, 6])\n s = Mul(o, w6)\n t = Add(s, b6)\n";

#[test]
fn group_norm_and_layer_norm_on_the_way() {
    let end =
        "h = Transpose(t) {perm=[0,3,1,2]}\n i = Conv(h, w2) {pads=[1,1,1,1]}\n y = Transpose(i) {perm=[0,2,3,1]}";
    text(&format!("{CONV}{NORM}{end}")).becomes(&["Transpose", "Conv", "GroupNorm", "Conv", "Transpose"]);
    let norm = "m = ReduceMean(c, [3])\n k = Sub(c, m)\n q = Mul(k, k)\n v = ReduceMean(q, [3])\n e = Add(v, 1e-5)\n r = Sqrt(e)\n n = Div(k, r)\n s = Mul(n, w6)\n t = Add(s, b6)\n";
    text(&format!("{CONV}{norm}{end}")).becomes(&["Transpose", "Conv", "LayerNorm", "Conv", "Transpose"]);
    let norm =
        "q = Mul(c, c)\n v = ReduceMean(q, [3])\n e = Add(v, 1e-5)\n r = Sqrt(e)\n n = Div(c, r)\n t = Mul(n, w6)\n";
    text(&format!("{CONV}{norm}{end}")).becomes(&["Transpose", "Conv", "RMSNorm", "Conv", "Transpose"]);
}

#[test]
fn other_readers_keep_their_order_of_axes() {
    // The value behind the norm is read in both orders.
    let end = "h = Transpose(t) {perm=[0,3,1,2]}\n i = Conv(h, w2) {pads=[1,1,1,1]}\n y = Transpose(i) {perm=[0,2,3,1]}\n y2 = Reshape(t, [2, 16, 6])";
    text(&format!("{CONV}{NORM}{end}")).becomes(&[
        "Transpose",
        "Conv",
        "GroupNorm",
        "Transpose",
        "Conv",
        "Transpose",
        "Reshape",
    ]);
    // No inverse below: nothing moves.
    text(&format!("{CONV}d = Exp(c)\n y = Reshape(d, [2, 96])")).becomes(&[
        "Transpose",
        "Conv",
        "Transpose",
        "Exp",
        "Reshape",
    ]);
    // A reshape on the way has its own order.
    text(&format!("{CONV}d = Reshape(c, [2, 4, 4, 6])\n h = Transpose(d) {{perm=[0,3,1,2]}}\n y = Exp(h)")).becomes(&[
        "Transpose",
        "Conv",
        "Transpose",
        "Reshape",
        "Transpose",
        "Exp",
    ]);
}
