use crate::graphs::{Text, read};

/// x is `[2, 6, 4, 4]` (z the same in NHWC), tokens are `t`.
fn text(nodes: &str) -> Text<'_> {
    const INPUTS: &[(&str, &[i64])] = &[("x", &[2, 6, 4, 4]), ("z", &[2, 4, 4, 6]), ("t", &[2, 5, 8])];
    const WEIGHTS: &[(&str, &[i64])] = &[
        ("w8", &[8]),
        ("b8", &[8]),
        ("w6", &[6]),
        ("b6", &[6]),
        ("wc", &[6, 1, 1]),
        ("bc", &[1, 6, 1, 1]),
        ("wg", &[1, 1, 1, 3, 2]),
        ("bg", &[1, 1, 1, 3, 2]),
    ];
    Text { opset: 20, inputs: read(nodes, INPUTS).leak(), weights: read(nodes, WEIGHTS).leak(), nodes }
}

const TWO_PASS: &str = "m = ReduceMean(t, [-1])\n c = Sub(t, m)\n q = Pow(c, 2.0)\n v = ReduceMean(q, [-1])\n";
const ONE_PASS: &str =
    "m = ReduceMean(t, [2])\n c = Sub(t, m)\n q = Mul(t, t)\n a = ReduceMean(q, [2])\n k = Mul(m, m)\n";

#[test]
fn layer_norm_of_two_passes() {
    for affine in ["y = Mul(n, 1.0)", "y = Mul(n, w8)", "s = Mul(n, w8)\n y = Add(s, b8)", "y = Add(n, b8)"] {
        let end = format!("e = Add(v, 1e-5)\n r = Sqrt(e)\n n = Div(c, r)\n {affine}");
        let left: &[&str] = if affine.contains("1.0") { &["LayerNorm", "Mul"] } else { &["LayerNorm"] };
        text(&format!("{TWO_PASS}{end}")).becomes(left);
    }
    for end in [
        "e = Add(v, 1e-5)\n r = Sqrt(e)\n i = Reciprocal(r)\n n = Mul(c, i)\n s = Mul(n, w8)\n y = Add(s, b8)",
        "e = Add(v, 1e-5)\n i = Pow(e, -0.5)\n n = Mul(c, i)\n s = Mul(n, w8)\n y = Add(s, b8)",
        "e = Add(v, 1e-5)\n r = Sqrt(e)\n i = Div(1.0, r)\n f = Mul(i, w8)\n s = Mul(c, f)\n y = Add(s, b8)",
    ] {
        text(&format!("{TWO_PASS}{end}")).becomes(&["LayerNorm"]);
    }
}

#[test]
fn layer_norm_of_one_pass_as_flax_writes_it() {
    for variance in ["u = Sub(a, k)\n v = Max(u, 0.0)\n", "v = Sub(a, k)\n", "u = Sub(a, k)\n v = Relu(u)\n"] {
        let end = "e = Add(v, 1e-5)\n r = Sqrt(e)\n n = Div(c, r)\n s = Mul(n, w8)\n y = Add(s, b8)";
        text(&format!("{ONE_PASS}{variance}{end}")).becomes(&["LayerNorm"]);
    }
}

#[test]
fn layer_norm_with_the_affine_drawn_in_as_keras_writes_it() {
    let start =
        format!("{TWO_PASS}e = Add(v, 1e-5)\n r = Sqrt(e)\n i = Reciprocal(r)\n f = Mul(i, w8)\n a = Mul(t, f)\n ");
    for end in [
        "g = Neg(m)\n o = Mul(g, f)\n p = Add(o, b8)\n y = Add(a, p)",
        "o = Mul(m, f)\n p = Sub(b8, o)\n y = Add(a, p)",
        "g = Neg(m)\n o = Mul(g, f)\n y = Add(a, o)",
        "o = Mul(m, f)\n y = Sub(a, o)",
    ] {
        text(&format!("{start}{end}")).becomes(&["LayerNorm"]);
    }
}

#[test]
fn layer_norm_guarded_against_constant_rows() {
    let guard = "lo = ReduceMin(t, [-1])\n hi = ReduceMax(t, [-1])\n eq = Equal(lo, hi)\n d = Sub(m, m)\n fin = Equal(d, 0.0)\n and = And(eq, fin)\n";
    text(&format!(
        "m = ReduceMean(t, [-1])\n c0 = Sub(t, m)\n {guard} c = Where(and, 0.0, c0)\n q = Mul(c, c)\n q2 = Cast(q) {{to=11}}\n v2 = ReduceMean(q2, [-1])\n v = Cast(v2) {{to=1}}\n e = Add(v, 1e-5)\n r = Sqrt(e)\n n = Div(c, r)\n s = Mul(n, w8)\n y = Add(s, b8)"
    ))
    .becomes_in_f32(&["LayerNorm"]);
}

#[test]
fn norms_over_channels_and_over_several_axes() {
    let chain = |x: &str, axes: &str, affine: &str| {
        format!(
            "m = ReduceMean({x}, {axes})\n c = Sub({x}, m)\n q = Mul(c, c)\n v = ReduceMean(q, {axes})\n e = Add(v, 1e-5)\n r = Sqrt(e)\n n = Div(c, r)\n {affine}"
        )
    };
    // Channels of NCHW; of NHWC; instance norms of both; a scale that is not of the normalised shape.
    text(&chain("x", "[1]", "s = Mul(n, wc)\n y = Add(s, bc)")).becomes(&["LayerNorm"]);
    text(&chain("z", "[3]", "s = Mul(n, w6)\n y = Add(s, b6)")).becomes(&["LayerNorm"]);
    text(&chain("x", "[2, 3]", "s = Mul(n, wc)\n y = Add(s, bc)")).becomes(&["LayerNorm"]);
    text(&chain("z", "[1, 2]", "s = Mul(n, w6)\n y = Add(s, b6)")).becomes(&["LayerNorm"]);
    text(&chain("x", "[1, 2, 3]", "s = Mul(n, wc)\n y = Add(s, bc)")).becomes(&["LayerNorm"]);
}

#[test]
fn group_norm_of_pytorch_and_paddle() {
    let norm = |shapes: [&str; 2], affine: &str| {
        format!(
            "g = Reshape(x, {})\n i = InstanceNormalization(g, ones3, zeros3) {{epsilon=1e-5}}\n b = Reshape(i, {})\n {affine}",
            shapes[0], shapes[1]
        )
    };
    let affine = "s = Mul(b, wc)\n y = Add(s, bc)";
    text(&norm(["[0, 3, -1]", "[2, 6, 4, 4]"], affine)).becomes(&["GroupNorm"]);
    text(&norm(["[2, 3, -1]", "[0, 6, 4, 4]"], "y = Mul(b, wc)")).becomes(&["GroupNorm"]);
    // No affine at all.
    text(&norm(["[0, 3, -1]", "[2, 6, 4, 4]"], "y = Neg(b)")).becomes(&["GroupNorm", "Neg"]);
    // Not back to where it came from: still the chain's values.
    text(&norm(["[0, 3, -1]", "[2, 6, 16]"], "y = Neg(b)")).becomes(&["GroupNorm", "Neg"]);
    text(&norm(["[4, 3, -1]", "[2, 6, 4, 4]"], affine)).becomes(&["GroupNorm"]);
}

const GROUPS: &str = "h = Shape(z)\n p = Slice(h, [0], [3], [0])\n d = Concat(p, [3, 2]) {axis=0}\n g = Reshape(z, d)\n m = ReduceMean(g, [1, 2, 4])\n c = Sub(g, m)\n";

#[test]
fn group_norm_of_flax() {
    text(&format!(
        "{GROUPS}q = Mul(g, g)\n a = ReduceMean(q, [1, 2, 4])\n k = Mul(m, m)\n u = Sub(a, k)\n v = Max(u, 0.0)\n e = Add(v, 1e-6)\n r = Sqrt(e)\n n = Div(c, r)\n o = Reshape(n, h)\n s = Mul(o, w6)\n y = Add(s, b6)"
    ))
    .becomes(&["Shape", "Slice", "Concat", "GroupNorm"]);
}

#[test]
fn group_norm_of_keras() {
    text(&format!(
        "{GROUPS}q = Mul(c, c)\n v = ReduceMean(q, [1, 2, 4])\n e = Add(v, 1e-3)\n r = Sqrt(e)\n i = Reciprocal(r)\n f = Mul(i, wg)\n a = Mul(g, f)\n k = Neg(m)\n o = Mul(k, f)\n j = Add(o, bg)\n n = Add(a, j)\n y = Reshape(n, [2, 4, 4, 6])"
    ))
    .becomes(&["Shape", "Slice", "Concat", "GroupNorm"]);
}

#[test]
fn means_by_pooling_as_tf2onnx_writes_them() {
    text("m = GlobalAveragePool(t)\n c = Sub(t, m)\n q = Mul(c, c)\n v = GlobalAveragePool(q)\n e = Add(v, 1e-5)\n r = Sqrt(e)\n n = Div(c, r)\n s = Mul(n, w8)\n y = Add(s, b8)")
        .becomes(&["LayerNorm"]);
    text("m = GlobalAveragePool(t)\n c = Sub(t, m)\n q = Mul(c, c)\n v = ReduceMean(q, [2])\n e = Add(v, 1e-5)\n r = Sqrt(e)\n n = Div(c, r)\n y = Neg(n)")
        .stays("LayerNorm", "the mean is taken over other axes");
}

#[test]
fn rms_norm() {
    let start = "q = Pow(t, 2.0)\n v = ReduceMean(q, [-1])\n e = Add(v, 1e-6)\n r = Sqrt(e)\n ";
    text(&format!("{start}n = Div(t, r)\n y = Mul(n, w8)")).becomes(&["RMSNorm"]);
    text(&format!("{start}i = Reciprocal(r)\n n = Mul(t, i)\n y = Mul(w8, n)")).becomes(&["RMSNorm"]);
    text(&format!("{start}i = Reciprocal(r)\n f = Mul(i, w8)\n y = Mul(t, f)")).becomes(&["RMSNorm"]);
    text(&format!("{start}n = Div(t, r)\n y = Neg(n)")).becomes(&["RMSNorm", "Neg"]);
}

#[test]
fn norms_that_are_not_quite() {
    let end = "e = Add(v, 1e-5)\n r = Sqrt(e)\n n = Div(c, r)\n s = Mul(n, w8)\n y = Add(s, b8)";
    // The mean is read by something else; other axes; epsilon that is a value; a dimension that is not kept.
    text(&format!("{TWO_PASS}{end}\n y2 = Neg(v)")).stays("LayerNorm", "value `v` is also used by Neg node `n_y2`");
    // Without its mean it is still the RMS norm of the centred value.
    text(&format!("{TWO_PASS}{end}\n y2 = Neg(m)")).becomes(&["ReduceMean", "Sub", "RMSNorm", "Neg"]);
    text("m = ReduceMean(t, [2])\n c = Sub(t, m)\n q = Mul(c, c)\n v = ReduceMean(q, [1, 2])\n e = Add(v, 1e-5)\n r = Sqrt(e)\n n = Div(c, r)\n y = Neg(n)")
        .stays("LayerNorm", "the mean is taken over other axes");
    text(&format!(
        "{TWO_PASS}k = ReduceMax(t, [-1])\n k2 = Mul(k, k)\n e = Add(v, k2)\n r = Sqrt(e)\n n = Div(c, r)\n y = Neg(n)"
    ))
    .stays("LayerNorm", "is not a plain number");
    text("g = Reshape(x, [0, 3, -1])\n i = InstanceNormalization(g, k, k)\n b = Reshape(i, [2, 6, 4, 4])\n s = Mul(b, wc)\n y = Add(s, bc)\n k = Expand(0.5, [3])")
        .stays("GroupNorm", "the instance norm has a scale or bias of its own");
}

#[test]
fn a_trained_number_is_no_constant() {
    let nodes = "q = Mul(t, t)\n v = ReduceMean(q, [-1])\n e = Add(v, w)\n r = Sqrt(e)\n y = Div(t, r)";
    let t = Text { opset: 20, inputs: &[("t", &[2, 5, 8])], weights: &[("w", &[1])], nodes };
    t.stays("RMSNorm", "value `w` is not a plain number");
}
