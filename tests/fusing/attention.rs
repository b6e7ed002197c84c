use crate::graphs::{Text, read};

/// Heads `[2, 2, 5, 4]` and keys of 3 rows, 3-D operands, a mask of each kind.
fn text(nodes: &str) -> Text<'_> {
    const ALL: &[(&str, &[i64])] = &[
        ("q", &[2, 2, 5, 4]),
        ("k", &[2, 2, 3, 4]),
        ("v", &[2, 2, 3, 4]),
        ("wide", &[2, 2, 3, 6]),
        ("q3", &[2, 5, 4]),
        ("k3", &[2, 3, 4]),
        ("v3", &[2, 3, 4]),
        ("mask", &[2, 1, 5, 3]),
        ("row", &[3]),
        ("seen", &[2, 1, 1, 3]),
        ("one", &[1, 2, 3, 4]),
        ("turned", &[2, 5, 2, 4]),
        ("k3b", &[4, 3, 4]),
    ];
    Text { opset: 20, inputs: read(nodes, ALL).leak(), weights: &[], nodes }
}

const T: &str = "kt = Transpose(k) {perm=[0,1,3,2]}\n";

#[test]
fn every_style_of_scale() {
    for scores in [
        "p = MatMul(q, kt)\n s = Mul(p, 0.5)\n",
        "p = MatMul(q, kt)\n s = Div(p, 2.0)\n",
        "a = Mul(q, 0.7)\n b = Mul(kt, 0.7)\n s = MatMul(a, b)\n",
        "a = Div(q, 2.0)\n s = MatMul(a, kt)\n",
        "s = MatMul(q, kt)\n",
    ] {
        text(&format!("{T}{scores} w = Softmax(s)\n y = MatMul(w, v)")).becomes(&["Transpose", "Attention"]);
    }
    text(&format!("{T}p = MatMul(q, kt)\n r = Sqrt(4.0)\n s = Div(p, r)\n w = Softmax(s)\n y = MatMul(w, v)"))
        .makes_one("Attention");
    // Scaled before they are turned.
    text(
        "f = Mul(k, 0.5)\n kt = Transpose(f) {perm=[0,1,3,2]}\n s = MatMul(q, kt)\n w = Softmax(s)\n y = MatMul(w, v)",
    )
    .becomes(&["Attention"]);
    text("a = Mul(turned, 0.5)\n b = Transpose(a) {perm=[0,2,1,3]}\n kt = Transpose(k) {perm=[0,1,3,2]}\n s = MatMul(b, kt)\n w = Softmax(s)\n y = MatMul(w, v)")
        .becomes(&["Transpose", "Attention"]);
    // From the shape of q, as the legacy exporter writes it.
    text(&format!("{T}h = Shape(q)\n d = Slice(h, [-1], [1000])\n f = Cast(d) {{to=FLOAT}}\n r = Sqrt(f)\n i = Div(1.0, r)\n o = Sqrt(i)\n a = Mul(q, o)\n b = Mul(kt, o)\n s = MatMul(a, b)\n w = Softmax(s)\n y = MatMul(w, v)"))
        .makes_one("Attention");
}

#[test]
fn three_dimensions_other_widths_and_a_positive_axis() {
    text("kt = Transpose(k3) {perm=[0,2,1]}\n p = MatMul(q3, kt)\n s = Mul(p, 0.5)\n w = Softmax(s) {axis=2}\n y = MatMul(w, v3)")
        .becomes(&["Transpose", "Attention"]);
    text(&format!("{T}p = MatMul(q, kt)\n w = Softmax(p) {{axis=3}}\n y = MatMul(w, wide)"))
        .becomes(&["Transpose", "Attention"]);
    // Over the rows instead: the kernel sees the rank and computes the chain.
    text(&format!("{T}p = MatMul(q, kt)\n w = Softmax(p) {{axis=2}}\n y = MatMul(w, v)"))
        .becomes(&["Transpose", "Attention"]);
    // Operands that broadcast.
    text(&format!("{T}p = MatMul(q, kt)\n w = Softmax(p)\n y = MatMul(w, one)")).becomes(&["Transpose", "Attention"]);
}

#[test]
fn einsum_of_edm_and_of_flax() {
    text("f = Div(k3, 2.0)\n p = Einsum(q3, f) {equation=\"nqc,nkc->nqk\"}\n w = Softmax(p) {axis=2}\n y = Einsum(w, v3) {equation=\"nqk,nkc->ncq\"}")
        .becomes(&["Attention"]);
    text("p = Einsum(q, k) {equation=\"bhqd,bhkd->bhqk\"}\n s = Div(p, 2.0)\n w = Softmax(s) {axis=3}\n y = Einsum(v, w) {equation=\"bhkd,bhqk->bqhd\"}")
        .becomes(&["Attention"]);
    text("p = Einsum(k, q) {equation=\"bhkd,bhqd->bhqk\"}\n w = Softmax(p)\n y = MatMul(w, v)").becomes(&["Attention"]);
}

/// Einsum as tf2onnx writes it: products over one batch axis, which is two axes between them; the shapes come from Shape.
#[test]
fn heads_apart_between_the_products() {
    let start = "b = Shape(q)\n h = Slice(b, [0], [2])\n r = Slice(b, [2], [3])\n d = Shape(k)\n l = Slice(d, [2], [3])\n n = ReduceProd(h)\n\
                 qs = Concat(n, [-1], [4]) {axis=0}\n qm = Reshape(q, qs)\n km = Reshape(k, qs)\n kt = Transpose(km) {perm=[0,2,1]}\n vm = Reshape(v, qs)\n\
                 p = MatMul(qm, kt)\n s5 = Concat(h, r, l, [1]) {axis=0}\n p5 = Reshape(p, s5)\n p4 = Squeeze(p5, [4])\n";
    let end = "w5 = Unsqueeze(w, [4])\n z = Shape(w5)\n zr = Slice(z, [2], [4])\n zs = Concat(n, zr) {axis=0}\n w3 = Reshape(w5, zs)\n y = MatMul(w3, vm)";
    text(&format!("{start}s = Mul(p4, 0.5)\n w = Softmax(s)\n {end}")).makes_one("Attention");
    text(&format!("{start}s = Mul(p4, 0.5)\n a = Add(s, mask)\n w = Softmax(a)\n {end}")).makes_one("Attention");
    text(&format!("{start}s = Mul(p4, 0.5)\n a = Where(seen, s, -1e9)\n w = Softmax(a)\n {end}"))
        .makes_one("Attention");
    // Over the heads: the kernel sees the shapes and computes the chain.
    text(&format!("{start}w = Softmax(p4) {{axis=1}}\n {end}")).makes_one("Attention");
    // Rows and keys change places on the way.
    text(&format!("{T}p = MatMul(q, kt)\n p6 = Reshape(p, [4,15])\n s = Mul(p6, 0.5)\n w = Softmax(s)\n w3 = Reshape(w, [2,2,5,3])\n y = MatMul(w3, v)"))
        .makes_one("Attention");
    text(&format!("{T}p = MatMul(q, kt)\n p6 = Reshape(p, [4,5,3])\n w = Softmax(p6)\n y = MatMul(w, k3b)\n"))
        .stays("Attention", "reshaped between the products");
}

#[test]
fn masks() {
    let start = format!("{T}p = MatMul(q, kt)\n s = Mul(p, 0.5)\n");
    text(&format!("{start}a = Add(s, mask)\n w = Softmax(a)\n y = MatMul(w, v)")).becomes(&["Transpose", "Attention"]);
    text(&format!("{start}a = Add(row, s)\n w = Softmax(a)\n y = MatMul(w, v)")).becomes(&["Transpose", "Attention"]);
    // CLIP: rows that see nothing are zero.
    text(&format!(
        "{start}a = Add(s, mask)\n w0 = Softmax(a)\n n = IsNaN(w0)\n w = Where(n, 0.0, w0)\n y = MatMul(w, v)"
    ))
    .becomes(&["Transpose", "Attention"]);
    for fill in ["-1e9", "-inf", "-3.4028234e38"] {
        text(&format!("{start}a = Where(seen, s, {fill})\n w = Softmax(a)\n y = MatMul(w, v)"))
            .becomes(&["Transpose", "Attention"]);
        text(&format!("{start}no = Not(seen)\n a = Where(no, {fill}, s)\n w = Softmax(a)\n y = MatMul(w, v)"))
            .becomes(&["Transpose", "Not", "Attention"]);
    }
}

#[test]
fn masks_that_take_the_shape_of_the_scores() {
    let start = format!("{T}p = MatMul(q, kt)\n s = Mul(p, 0.5)\n h = Shape(s)\n");
    let end = "w = Softmax(a)\n y = MatMul(w, v)";
    text(&format!("{start}m = Expand(row, h)\n a = Add(s, m)\n {end}")).makes_one("Attention");
    text(&format!("{start}m = Expand(seen, h)\n a = Where(m, s, -1e9)\n {end}")).makes_one("Attention");
    // A choice as tf2onnx writes it for Keras: by products with the mask and with its opposite.
    let choice = "keep = Cast(m) {to=FLOAT}\n a1 = Mul(s, keep)\n no = Not(m)\n n = Cast(no) {to=FLOAT}\n a2 = Mul(n, -2e38)\n a = Add(a1, a2)\n";
    text(&format!("{start}m = Expand(seen, h)\n {choice} {end}")).makes_one("Attention");
    // The other mask in one of the two.
    let other = choice.replace("Not(m)", "Not(seen)");
    text(&format!("{start}m = Expand(seen, h)\n {other} {end}")).stays("Attention", "values `m` and `seen` differ");
    // A value of the scores is more than their shape.
    text(&format!("{start}x = ReduceMax(s)\n m = Expand(x, h)\n a = Add(s, m)\n {end}"))
        .stays("Attention", "value `s` is also used by ReduceMax node `n_x`");
}

#[test]
fn weights_in_a_type_of_their_own() {
    text(&format!(
        "{T}p = MatMul(q, kt)\n s = Cast(p) {{to=11}}\n w0 = Softmax(s)\n w = Cast(w0) {{to=FLOAT}}\n y = MatMul(w, v)"
    ))
    .makes_one("Attention");
}

#[test]
fn attention_that_is_not_quite() {
    let start = format!("{T}p = MatMul(q, kt)\n s = Mul(p, 0.5)\n");
    text(&format!("{start}w = Softmax(s)\n y = MatMul(w, v)\n y2 = Neg(w)"))
        .stays("Attention", "value `w` is also used by Neg node `n_y2`");
    text(&format!("{start}w = Softmax(s)\n y = MatMul(w, v)\n y2 = Neg(p)"))
        .stays("Attention", "value `p` is also used by Neg node `n_y2`");
    text(&format!("{start}t = Tanh(s)\n w = Softmax(t)\n y = MatMul(w, v)"))
        .stays("Attention", "Tanh node `n_t` does not fit");
    text(&format!("{start}w = Softmax(s) {{axis=-2}}\n y = MatMul(w, v)"))
        .stays("Attention", "the softmax does not run over the last axis");
    text(&format!("{start}a = Where(seen, s, -100.0)\n w = Softmax(a)\n y = MatMul(w, v)"))
        .stays("Attention", "hidden scores become -100");
    text("p = Einsum(q, k) {equation=\"bhqd,bhkd->bhkq\"}\n w = Softmax(p) {axis=2}\n y = MatMul(w, q)")
        .stays("Attention", "the softmax does not run over the keys");
}

#[test]
fn a_trained_scale_is_a_value() {
    let nodes = format!("{T}p = MatMul(q, kt)\n s = Mul(p, w)\n w0 = Softmax(s)\n y = MatMul(w0, v)");
    let t = Text { weights: &[("w", &[1])], ..text(&nodes) };
    t.stays("Attention", "value `w` is not a number on the host");
}

#[test]
fn rows_that_see_nothing_are_zero_where_the_graph_guards_them() {
    let nodes = format!(
        "{T}p = MatMul(q, kt)\n no = Less(row, row)\n m = Where(no, 0.0, -inf)\n a = Add(p, m)\n w0 = Softmax(a)\n n = IsNaN(w0)\n w = Where(n, 0.0, w0)\n y = MatMul(w, v)"
    );
    for fuse in [true, false] {
        let largest = text(&nodes).largest_output(fuse);
        assert_eq!(largest, 0.0, "fuse={fuse}");
    }
}
