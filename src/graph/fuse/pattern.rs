//! A small matcher for pieces of a graph: patterns are trees of operator calls over named captures, written with [`op`],
//! [`value`] and their like, and matched backwards from the node that makes the result.
//!
//! The same name twice means the same value. Operands of commutative operators are tried in both orders. Where nothing
//! fits, the attempt that came furthest says what was missing: the reason of a near miss.

use std::collections::HashMap;

use crate::graph::fuse::view::View;
use crate::graph::ir::{Node, ValueId};

/// See the module's text.
#[derive(Debug, Clone)]
pub(super) enum Pattern {
    /// Any value.
    Value(&'static str),
    /// A value known on the host: it follows from shapes and constants.
    Host(&'static str),
    /// A value known on the host that may be a single number: no plain tensor of several elements.
    Factor(&'static str),
    /// A value that depends on no graph input, as weights do, with more than one element where it is a plain tensor.
    Weight(&'static str),
    /// Any single number computed from constants.
    Scalar(&'static str),
    /// This number.
    Number(f64),
    Call(Call),
    /// The first of several that fits.
    Either(Vec<Pattern>),
}

/// A call of an operator of the default domain, or of `disback` where the name says so.
#[derive(Debug, Clone)]
pub(super) struct Call {
    op: &'static str,
    name: Option<&'static str>,
    /// The first inputs; what follows (axes) is for the rule to look at.
    inputs: Vec<Pattern>,
}

impl Call {
    /// Whether the node is a call of this operator.
    fn is(&self, node: &Node) -> bool {
        match self.op.strip_prefix("disback.") {
            Some(op) => node.domain == "disback" && node.op == op,
            None => node.is(self.op),
        }
    }
}

pub(super) fn value(name: &'static str) -> Pattern {
    Pattern::Value(name)
}
pub(super) fn host(name: &'static str) -> Pattern {
    Pattern::Host(name)
}
pub(super) fn factor(name: &'static str) -> Pattern {
    Pattern::Factor(name)
}
pub(super) fn weight(name: &'static str) -> Pattern {
    Pattern::Weight(name)
}
pub(super) fn scalar(name: &'static str) -> Pattern {
    Pattern::Scalar(name)
}
pub(super) fn number(n: f64) -> Pattern {
    Pattern::Number(n)
}
/// A call whose first inputs fit.
pub(super) fn op(op: &'static str, inputs: impl Into<Vec<Pattern>>) -> Pattern {
    Pattern::Call(Call { op, name: None, inputs: inputs.into() })
}
pub(super) fn either(choices: impl Into<Vec<Pattern>>) -> Pattern {
    Pattern::Either(choices.into())
}

impl Pattern {
    /// Captures the node of a call; used twice, it stands for one and the same node.
    pub fn named(self, name: &'static str) -> Self {
        match self {
            Self::Call(c) => Self::Call(Call { name: Some(name), ..c }),
            Self::Either(choices) => Self::Either(choices.into_iter().map(|p| p.named(name)).collect()),
            other => other,
        }
    }
}

/// What a pattern was matched with.
#[derive(Debug, Clone, Default)]
pub(super) struct Captures {
    values: HashMap<&'static str, ValueId>,
    calls: HashMap<&'static str, usize>,
    /// All nodes of the match, the root first.
    pub nodes: Vec<usize>,
}

impl Captures {
    /// A captured value, or the output of a captured call.
    pub fn value(&self, name: &str) -> Option<ValueId> {
        self.values.get(name).copied()
    }
    /// A captured call.
    pub fn call(&self, name: &str) -> Option<usize> {
        self.calls.get(name).copied()
    }
}

/// How far the best failed attempt came.
#[derive(Debug, Clone, Default)]
pub(super) struct Furthest {
    /// Calls that fitted.
    pub calls: usize,
    /// Calls and values that fitted, and whether it was a value that did not: that says more than another operator.
    pub steps: (usize, bool),
    /// What did not.
    pub reason: String,
}

/// What is still to be matched.
type Goals<'p> = Vec<(&'p Pattern, Option<ValueId>)>;

struct Matcher<'v, 'a> {
    view: &'v View<'a>,
    furthest: Furthest,
}

/// Matches the call at node `root`.
pub(super) fn find(view: &View, pattern: &Pattern, root: usize) -> Result<Captures, Furthest> {
    let Some(out) = view.node(root).output(0).filter(|_| begins(pattern, view.node(root))) else {
        return Err(Furthest::default());
    };
    let mut m = Matcher { view, furthest: Furthest::default() };
    m.solve(vec![(pattern, Some(out))], Captures::default()).ok_or(m.furthest)
}

/// Whether a match may end at this node, by its operator: most nodes of a graph are none of a pattern's.
fn begins(pattern: &Pattern, node: &Node) -> bool {
    match pattern {
        Pattern::Call(call) => call.is(node),
        Pattern::Either(choices) => choices.iter().any(|p| begins(p, node)),
        _ => true,
    }
}

fn commutes(op: &str) -> bool {
    matches!(op, "Add" | "Mul" | "Max" | "Min" | "Equal" | "And" | "Or")
}

impl Matcher<'_, '_> {
    fn solve<'p>(&mut self, mut goals: Goals<'p>, mut found: Captures) -> Option<Captures> {
        let Some((pattern, v)) = goals.pop() else { return Some(found) };
        let Some(v) = v else {
            self.fail(&found, false, || "an input is missing".to_owned());
            return None;
        };
        match pattern {
            Pattern::Either(choices) => choices.iter().find_map(|p| {
                let mut goals = goals.clone();
                goals.push((p, Some(v)));
                self.solve(goals, found.clone())
            }),
            Pattern::Call(call) => self.call(call, v, goals, found),
            Pattern::Number(n) => {
                let close = |x: &super::view::Number| (x.value - n).abs() <= x.rounding * n.abs().max(1e-30);
                if !self.view.number(v).as_ref().is_some_and(close) {
                    self.fail(&found, true, || format!("value `{}` is not the number {n}", self.view.name(v)));
                    return None;
                }
                self.solve(goals, found)
            }
            Pattern::Value(name)
            | Pattern::Host(name)
            | Pattern::Factor(name)
            | Pattern::Weight(name)
            | Pattern::Scalar(name) => {
                let view = self.view;
                let (fits, wanted) = match pattern {
                    Pattern::Host(_) => (view.is_host(v), "known from shapes and constants"),
                    Pattern::Factor(_) => {
                        (view.is_host(v) && view.stored(Some(v)).is_none_or(|t| t.len() == 1), "a number on the host")
                    }
                    Pattern::Weight(_) => {
                        (view.is_weight(v) && view.stored(Some(v)).is_none_or(|t| t.len() > 1), "a weight")
                    }
                    Pattern::Scalar(_) => (view.number(v).is_some(), "a plain number"),
                    _ => (true, ""),
                };
                if !fits {
                    self.fail(&found, true, || format!("value `{}` is not {wanted}", view.name(v)));
                    return None;
                }
                match found.values.insert(name, v) {
                    Some(old) if old != v => {
                        self.fail(&found, true, || {
                            format!("values `{}` and `{}` differ", self.view.name(old), self.view.name(v))
                        });
                        None
                    }
                    _ => self.solve(goals, found),
                }
            }
        }
    }

    fn call<'p>(&mut self, call: &'p Call, v: ValueId, goals: Goals<'p>, mut found: Captures) -> Option<Captures> {
        let maker = self.view.maker(v).filter(|&i| self.view.node(i).output(0) == Some(v));
        let Some(i) = maker.filter(|&i| call.is(self.view.node(i))) else {
            self.fail(&found, false, || match maker {
                Some(i) => format!("{} does not fit", self.view.node(i).label()),
                None => format!("value `{}` does not fit", self.view.name(v)),
            });
            return None;
        };
        if let Some(name) = call.name {
            match found.calls.insert(name, i) {
                // Seen before: all below it has been matched.
                Some(old) if old == i => return self.solve(goals, found),
                Some(_) => {
                    self.fail(&found, false, || format!("{} differs from its like", self.view.node(i).label()));
                    return None;
                }
                None => {}
            }
        }
        if !found.nodes.contains(&i) {
            found.nodes.push(i);
        }
        let node = self.view.node(i);
        let mut attempt = |order: &[usize], found: Captures| {
            let mut goals = goals.clone();
            // The last goal is the next one: calls that say most about the pattern come first in it.
            goals.extend(call.inputs.iter().zip(order).rev().map(|(p, &slot)| (p, node.input(slot))));
            self.solve(goals, found)
        };
        if call.inputs.len() == 2 && commutes(call.op) {
            attempt(&[0, 1], found.clone()).or_else(|| attempt(&[1, 0], found))
        } else {
            let order: Vec<usize> = (0..call.inputs.len()).collect();
            attempt(&order, found)
        }
    }

    /// Notes why this attempt ends, where none came further.
    fn fail(&mut self, found: &Captures, value: bool, reason: impl FnOnce() -> String) {
        let steps = (found.nodes.len() + found.values.len(), value);
        if steps > self.furthest.steps {
            self.furthest = Furthest { calls: found.nodes.len(), steps, reason: reason() };
        }
    }
}
