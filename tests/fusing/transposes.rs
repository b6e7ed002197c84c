use crate::graphs::{Text, read};

/// x is `[2, 3, 4, 5]`; qkv `[2, 4, 18]`; image `[2, 6, 4]`.
fn text(nodes: &str) -> Text<'_> {
    const INPUTS: &[(&str, &[i64])] = &[("x", &[2, 3, 4, 5]), ("qkv", &[2, 4, 18]), ("image", &[2, 6, 4])];
    const WEIGHTS: &[(&str, &[i64])] = &[("place", &[4, 6]), ("w6", &[6]), ("b6", &[6]), ("w", &[6, 6])];
    Text { opset: 20, inputs: read(nodes, INPUTS).leak(), weights: read(nodes, WEIGHTS).leak(), nodes }
}

#[test]
fn keys_turned_on_three_axes_are_turned_on_their_own() {
    text("a = Reshape(x, [6, 4, 5])\n b = Transpose(a) {perm=[0,2,1]}\n y = Reshape(b, [2, 3, 5, 4])")
        .becomes(&["TransposeLast"]);
    text("a = Reshape(x, [-1, 4, 5])\n b = Transpose(a) {perm=[0,2,1]}\n y = Reshape(b, [2, 3, 5, -1])")
        .becomes(&["TransposeLast"]);
    // Other shapes are computed as they are written.
    for (flat, back) in [("[6, 4, 5]", "[3, 2, 5, 4]"), ("[6, 5, 4]", "[2, 3, 4, 5]"), ("[2, 12, 5]", "[2, 5, 3, 4]")] {
        text(&format!("a = Reshape(x, {flat})\n b = Transpose(a) {{perm=[0,2,1]}}\n y = Reshape(b, {back})"))
            .becomes(&["TransposeLast"]);
    }
    text("a = Reshape(x, [6, 4, 5])\n b = Transpose(a) {perm=[1,0,2]}\n y = Reshape(b, [4, 2, 3, 5])").becomes(&[
        "Reshape",
        "Transpose",
        "Reshape",
    ]);
}

/// Three heads' operands out of one projection.
const PARTS: &str = "a = Reshape(qkv, [2, 4, 3, 6])\n b = Transpose(a) {perm=[2,0,1,3]}\n q = Slice(b, [0], [1], [0], [1])\n k = Slice(b, [1], [2], [0], [1])\n v = Slice(b, [2], [3], [0], [1])\n";

#[test]
fn projections_are_parted_before_they_are_turned() {
    let end = "s = Exp(q)\n t = Mul(s, k)\n y = Add(t, v)";
    text(&format!("{PARTS}{end}")).becomes(&[
        "Reshape",
        "Ranges",
        "Transpose",
        "Transpose",
        "Transpose",
        "Exp",
        "Mul",
        "Add",
    ]);
    // Whoever reads the whole reads it turned.
    let end = "s = Exp(q)\n t = Mul(s, k)\n y = Add(t, v)\n z = Exp(b)";
    text(&format!("{PARTS}{end}")).becomes(&["Reshape", "Transpose", "Ranges", "Exp", "Mul", "Add", "Exp"]);
}

const NORM: &str = "n = LayerNormalization(s, w6, b6) {axis=-1}\n";

#[test]
fn a_patch_embeddings_stream_is_copied_once() {
    let begin = "t = Transpose(image) {perm=[0,2,1]}\n s = Add(t, place)\n";
    text(&format!("{begin}{NORM}m = MatMul(n, w)\n y = Add(s, m)")).becomes(&[
        "Transpose",
        "Contiguous",
        "Add",
        "LayerNormalization",
        "MatMul",
        "Add",
    ]);
    // Not where no norm follows, nor for a norm over other axes, nor where the last axis stays the last.
    text(&format!("{begin}y = Exp(s)")).becomes(&["Transpose", "Add", "Exp"]);
    text(&format!("{begin}y = LayerNormalization(s, place) {{axis=1}}")).becomes(&[
        "Transpose",
        "Add",
        "LayerNormalization",
    ]);
    text("a = Reshape(qkv, [2, 4, 3, 6])\n s = Transpose(a) {perm=[0,2,1,3]}\n y = LayerNormalization(s, w6, b6) {axis=-1}")
        .becomes(&["Reshape", "Transpose", "LayerNormalization"]);
}
