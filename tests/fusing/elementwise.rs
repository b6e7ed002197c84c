//! Every elementwise operator of `graph::op_schema`, from float to float: transposes that undo each other and casts that
//! change nothing go on both sides of it.

use disback::graph::op_schema::{Class, OpSchema, ResultType, TABLE};

use crate::graphs::{Text, read};

/// x and u are `[2, 3, 4, 5]`, transposed `[2, 5, 3, 4]`; w and seen broadcast there, w5 and seen5 before.
fn text(nodes: &str, opset: i64) -> Text<'_> {
    const INPUTS: &[(&str, &[i64])] =
        &[("x", &[2, 3, 4, 5]), ("u", &[2, 3, 4, 5]), ("seen", &[5, 1, 1]), ("seen5", &[5])];
    const WEIGHTS: &[(&str, &[i64])] = &[("w", &[5, 1, 1]), ("w5", &[5])];
    Text { opset, inputs: read(nodes, INPUTS).leak(), weights: read(nodes, WEIGHTS).leak(), nodes }
}

/// Those of whole numbers alone are left out, and those that only we make.
fn rows() -> Vec<&'static OpSchema> {
    let float = |row: &&OpSchema| {
        let result = row.result == ResultType::Input(0) || row.name == "Where";
        result && !row.name.starts_with("Bit") && row.domain != "disback"
    };
    TABLE.iter().filter(|row| row.class == Class::Elementwise).filter(float).collect()
}

/// An operator set that has the operator: the usual one, or the first.
fn opset(row: &OpSchema) -> i64 {
    if row.domain.is_empty() { row.since.max(24) } else { 24 }
}

/// `q`, made of x within the operator's domain.
fn within(row: &OpSchema) -> &'static str {
    match row.name {
        "Log" | "Sqrt" | "Reciprocal" | "Pow" => "p = Abs(x)\n q = Add(p, 0.7)\n",
        "Acosh" => "p = Abs(x)\n q = Add(p, 1.5)\n",
        "Acos" | "Asin" | "Atanh" | "Tan" => "p = Tanh(x)\n q = Mul(p, 0.9)\n",
        _ => "q = Mul(x, 1.3)\n",
    }
}

/// The operator on `a`, where it takes more also on a weight and on another tensor or a mask.
fn call(row: &OpSchema, [weight, other, mask]: [&str; 3]) -> String {
    let name = if row.domain.is_empty() { row.name.to_owned() } else { format!("{}.{}", row.domain, row.name) };
    match (row.name, row.inputs.1) {
        ("Where", _) => format!("Where({mask}, a, {weight})"),
        ("Clip", _) => "Clip(a, -0.5, 0.8)".into(),
        // (It does not broadcast.)
        ("SwiGLU", _) => "SwiGLU(a, a)".into(),
        ("Mod", _) => format!("Mod(a, {weight}) {{fmod=1}}"),
        (_, 1) => format!("{name}(a)"),
        (_, 2) => format!("{name}(a, {weight})"),
        _ => format!("{name}(a, {weight}, {other})"),
    }
}

#[test]
fn the_table_has_them() {
    let names: Vec<&str> = rows().iter().map(|row| row.name).collect();
    assert!(names.len() > 55, "{names:?}");
    for name in ["Swish", "Softsign", "Selu", "Celu", "PRelu", "Shrink", "Mean", "BiasGelu"] {
        assert!(names.contains(&name), "{name}");
    }
}

#[test]
fn transposes_on_both_sides_go() {
    for row in rows() {
        let call = call(row, ["w", "b", "seen"]);
        let other = if call.contains("b)") { "b = Transpose(u) {perm=[0,3,1,2]}\n" } else { "" };
        let nodes = format!(
            "{}a = Transpose(q) {{perm=[0,3,1,2]}}\n {other} c = {call}\n d = Transpose(c) {{perm=[0,2,3,1]}}\n y = Neg(d)",
            within(row)
        );
        let outcome = text(&nodes, opset(row)).check(2e-5);
        let left = &outcome.left;
        assert!(!left.iter().any(|op| op == "Transpose"), "{}: {left:?}", row.name);
        assert!(left.iter().any(|op| op == row.name) && outcome.fused.contains_key("Transpose pair"), "{left:?}");
    }
}

#[test]
fn what_has_an_axis_stays_between_its_transposes() {
    for call in ["Softmax(a) {axis=1}", "LogSoftmax(a) {axis=-1}", "CumSum(a, [2])", "LpNormalization(a) {axis=1}"] {
        let nodes = format!(
            "a = Transpose(x) {{perm=[0,3,1,2]}}\n c = {call}\n d = Transpose(c) {{perm=[0,2,3,1]}}\n y = Neg(d)"
        );
        let op = call.split('(').next().unwrap_or_default();
        text(&nodes, 24).becomes(&["Transpose", op, "Transpose", "Neg"]);
    }
}

#[test]
fn casts_on_both_sides_go() {
    for row in rows() {
        // In f32 the cast to f64 (11) and back loses nothing; in f64 it is idle.
        let call = call(row, ["w5", "u", "seen5"]);
        let nodes = format!(
            "{}a = Cast(q) {{to=FLOAT}}\n c = {call}\n d = Cast(c) {{to=11}}\n e = Cast(d) {{to=FLOAT}}\n y = Neg(e)",
            within(row)
        );
        let outcome = text(&nodes, opset(row)).check(2e-5);
        let left = &outcome.left;
        assert!(!left.iter().any(|op| op == "Cast"), "{}: {left:?}", row.name);
        assert!(left.iter().any(|op| op == row.name) && outcome.fused.contains_key("Cast chain"), "{left:?}");
    }
}

#[test]
fn operands_that_only_give_a_type_or_are_lined_up_by_attribute() {
    // A CastLike's second operand may have more axes than the first.
    let nodes = "h = Cast(u) {to=10}\n r = Unsqueeze(h, [0])\n a = Transpose(x) {perm=[0,3,1,2]}\n c = CastLike(a, r)\n d = Transpose(c) {perm=[0,2,3,1]}\n y = Cast(d) {to=FLOAT}\n y2 = Cast(r) {to=FLOAT}";
    let outcome = text(nodes, 20).check(2e-5);
    assert!(!outcome.left.iter().any(|op| op == "Transpose"), "{:?}", outcome.left);
    // Before opset 7 an attribute says where the second operand begins.
    let nodes = "a = Transpose(x) {perm=[0,3,1,2]}\n c = Add(a, w5) {broadcast=1, axis=1}\n d = Transpose(c) {perm=[0,2,3,1]}\n y = Neg(d)";
    text(nodes, 6).becomes(&["Transpose", "Add", "Transpose", "Neg"]);
    text(&nodes.replace("w5) {broadcast=1, axis=1}", "w)"), 7).becomes(&["Align", "Add", "Neg"]);
}
