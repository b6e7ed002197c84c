//! Rewrites of a student's graph on its way out: folded, in plainer operators, at another operator set, in other operators or
//! another precision. Each works on a model in memory and knows nothing of runs.

mod branches;
pub mod contrib;
pub mod evaluate;
pub mod fuse;
pub mod opset;
pub mod portable;
pub mod precision;
pub mod simplify;

pub use crate::graph::pass::{Dump, Pass, Passes};
