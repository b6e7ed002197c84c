//! ONNX operators on libtorch, one file a family. Each file registers its operators and builds their kernels. What an operator
//! is (versions, arity, weights, ...) is a row of [`crate::graph::op_schema`].

mod activation;
mod attention;
mod bits;
mod control;
mod conv;
mod elementwise;
mod fused;
mod index;
mod layout;
mod linear;
mod loss;
mod microsoft;
mod ngram;
mod norm;
mod order;
mod pool;
mod quant;
mod recurrent;
mod reduce;
mod resize;
mod sample;
mod sequence;
mod shape;
mod signal;
mod util;

use std::sync::OnceLock;

use crate::torch::exec::registry::Registry;

/// The registry with every family in it.
pub fn registry() -> &'static Registry {
    static REGISTRY: OnceLock<Registry> = OnceLock::new();
    REGISTRY.get_or_init(|| {
        let mut r = Registry::default();
        register(&mut r);
        r
    })
}

fn register(r: &mut Registry) {
    activation::register(r);
    attention::register(r);
    bits::register(r);
    control::register(r);
    conv::register(r);
    elementwise::register(r);
    index::register(r);
    layout::register(r);
    linear::register(r);
    loss::register(r);
    microsoft::register(r);
    ngram::register(r);
    norm::register(r);
    order::register(r);
    pool::register(r);
    quant::register(r);
    fused::register(r);
    recurrent::register(r);
    reduce::register(r);
    resize::register(r);
    sample::register(r);
    sequence::register(r);
    shape::register(r);
    signal::register(r);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::op_schema;

    #[test]
    fn every_kernel_agrees_with_its_row() {
        let mut faults = Vec::new();
        for e in registry().entries() {
            let name = format!("{}.{}", e.domain, e.op);
            let Some(row) = op_schema::find(e.domain, e.op) else {
                faults.push(format!("{name} has no row"));
                continue;
            };
            // A kernel may leave out versions before a change, and its arity is that of the newest.
            let begins = |v: i64| v == row.since || row.changes.contains(&v);
            let newest = e.until == i64::MAX;
            if !begins(e.since) || !(newest || begins(e.until + 1)) {
                faults.push(format!("{name} since {}: the row says {} {:?}", e.since, row.since, row.changes));
            }
            if newest && e.inputs != row.inputs {
                faults.push(format!("{name} takes {:?}: the row says {:?}", e.inputs, row.inputs));
            }
        }
        assert!(faults.is_empty(), "{}", faults.join("\n"));
    }
}
