//! Layers: a product with a weight and the bias added to it, as one call that adds while it multiplies.

use crate::graph::fuse::pattern::{op, value, weight};
use crate::graph::fuse::rule::{Replacement, Rule};

pub(super) fn rules() -> Vec<Rule> {
    vec![Rule {
        name: "Linear",
        patterns: vec![op("Add", [op("MatMul", [value("x"), weight("w")]), weight("b")])],
        near: None,
        check: |view, c| {
            let rank = |name| view.stored(c.value(name)).map(|t| t.rank());
            // Where the weight is not plain, the kernel looks at its shape.
            if rank("w").is_some_and(|r| r != 2) || rank("b").is_some_and(|r| r != 1) {
                return Err("weight and bias are no matrix and vector".into());
            }
            let inputs = ["x", "w", "b"].map(|name| c.value(name)).to_vec();
            Ok(Replacement { op: "Linear", inputs, attributes: Vec::new() })
        },
    }]
}
