//! The graph: values are numbered, nodes are in topological order, constants hold their data.

use std::collections::{BTreeMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use crate::error::{Error, Result};
use crate::graph::attributes::Attributes;
use crate::shown::line;
use crate::tensor::{DType, HostTensor};

/// Index of a value in its graph.
pub type ValueId = usize;

/// A graph input or output.
#[derive(Debug, Clone)]
pub struct Port {
    /// The name in the file, by which callers give or receive the tensor.
    pub name: String,
    /// The value of the graph that this input sets, or that this output returns.
    pub value: ValueId,
    /// Element type, where the file says it.
    pub dtype: Option<DType>,
    /// Dimensions, where the file says them; `Err` holds a symbol ("batch") or an empty string.
    pub shape: Option<Vec<Result<usize, String>>>,
}

impl Port {
    /// Element type and shape as text, such as `f32[batch, 3, 64, 64]`; `?` for what the file does not say.
    pub fn describe(&self) -> String {
        let dtype = self.dtype.map_or("?".to_owned(), |d| d.to_string());
        match &self.shape {
            None => format!("{dtype}[...]"),
            Some(dims) => {
                let dims: Vec<_> = dims
                    .iter()
                    .map(|d| match d {
                        Ok(n) => n.to_string(),
                        Err(s) if s.is_empty() => "?".to_owned(),
                        Err(s) => line(s).into_owned(),
                    })
                    .collect();
                format!("{dtype}[{}]", dims.join(", "))
            }
        }
    }

    /// Dimensions with symbols as `None`; `None` where the rank is unknown.
    pub fn dims(&self) -> Option<Vec<Option<usize>>> {
        self.shape.as_ref().map(|dims| dims.iter().map(|d| d.as_ref().ok().copied()).collect())
    }
}

/// Where a constant came from, for writing it back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// `graph.initializer` of this index.
    Initializer(usize),
    /// The `value` attribute of the Constant node of this index in the file.
    ConstantNode(usize),
    /// Inside a subgraph: a branch of If, or the body of Loop or Scan.
    Within {
        /// Index in the file of the node that holds the subgraph.
        node: usize,
        /// The attribute of that node that is the subgraph, such as `then_branch`.
        attribute: String,
        /// The place in the subgraph.
        origin: Box<Origin>,
    },
    /// Nowhere in the file: this crate made the tensor.
    Made,
}

/// A tensor known before anything runs.
#[derive(Debug, Clone)]
pub struct Constant {
    /// Element type, shape and data.
    pub tensor: HostTensor,
    /// The place in the file that the tensor was read from.
    pub origin: Origin,
}

/// One operator call.
#[derive(Debug, Clone)]
pub struct Node {
    /// The operator's name, such as `Conv`.
    pub op: String,
    /// Empty for the default domain; `disback` for operators that fusing makes.
    pub domain: String,
    /// Never empty: where the file has no name, `Op_12` after its position.
    pub name: String,
    /// Version of its domain's operator set.
    pub opset: i64,
    /// `None` where an optional input is omitted.
    pub inputs: Vec<Option<ValueId>>,
    /// The values that the node makes, in the operator's order; `None` where an optional output is not asked for.
    pub outputs: Vec<Option<ValueId>>,
    /// Attributes by name; those that the file leaves out are absent here too.
    pub attributes: Attributes,
    /// Outer values that subgraph attributes refer to, as `(name, value)`.
    pub captures: Vec<(String, ValueId)>,
    /// Index in the file's `graph.node`; `None` for nodes that this crate made.
    pub origin: Option<usize>,
    /// Module path from the exporter's node metadata, where it wrote one.
    pub module: Option<String>,
}

impl Node {
    /// ``Conv node `/down.0/conv/Conv` ``: how errors and tables call it.
    pub fn label(&self) -> String {
        let (domain, dot) = (&self.domain, if self.domain.is_empty() { "" } else { "." });
        line(&format!("{domain}{dot}{} node `{}`", self.op, self.name)).into_owned()
    }

    /// The i-th input, where present.
    pub fn input(&self, i: usize) -> Option<ValueId> {
        self.inputs.get(i).copied().flatten()
    }
    /// The i-th output, where present.
    pub fn output(&self, i: usize) -> Option<ValueId> {
        self.outputs.get(i).copied().flatten()
    }
    /// Whether this is the given operator of the default domain.
    pub fn is(&self, op: &str) -> bool {
        self.domain.is_empty() && self.op == op
    }
}

/// Stands for no node.
const NOBODY: usize = usize::MAX;

/// The nodes that make values, see [`Graph::producers`].
#[derive(Debug, Clone)]
pub struct Producers(Vec<usize>);

impl Producers {
    /// The node that makes this value; none makes inputs and constants.
    pub fn get(&self, value: &ValueId) -> Option<&usize> {
        self.0.get(*value).filter(|i| **i != NOBODY)
    }
    /// Whether a node makes this value.
    pub fn contains_key(&self, value: &ValueId) -> bool {
        self.get(value).is_some()
    }
}

/// The readers of values, see [`Graph::consumers`].
#[derive(Debug, Clone)]
pub struct Consumers {
    /// Where the readers of each value begin in `all`, and their end behind the last.
    first: Vec<usize>,
    all: Vec<(usize, usize)>,
}

impl Consumers {
    /// The readers of this value, in the order of the nodes; `None` where nobody reads it.
    pub fn get(&self, value: &ValueId) -> Option<&[(usize, usize)]> {
        let (from, to) = (self.first.get(*value)?, self.first.get(value + 1)?);
        Some(&self.all[*from..*to]).filter(|readers| !readers.is_empty())
    }
    /// Whether somebody reads this value.
    pub fn contains_key(&self, value: &ValueId) -> bool {
        self.get(value).is_some()
    }
}

/// A graph (or subgraph) with numbered values.
#[derive(Debug, Clone, Default)]
pub struct Graph {
    /// The name in the file; may be empty.
    pub name: String,
    /// Name of each value; unique and not empty.
    pub names: Vec<String>,
    /// Operator calls in topological order: a node comes after all nodes whose results it reads.
    pub nodes: Vec<Node>,
    /// What the caller gives, in the file's order. Initializers are not among them.
    pub inputs: Vec<Port>,
    /// What the graph returns, in the file's order.
    pub outputs: Vec<Port>,
    /// Values known before the graph runs: initializers and the results of Constant nodes.
    pub constants: BTreeMap<ValueId, Constant>,
    /// Values of an enclosing graph that this subgraph reads, by name.
    pub captures: Vec<(String, ValueId)>,
    /// Version of each operator set that the file imports, by domain; the domain of ONNX itself is the empty string.
    pub opsets: BTreeMap<String, i64>,
    /// For [`Graph::add_value`], once it was called.
    pub(crate) taken: Taken,
}

/// Hashes of the names that a graph has given away: two names of one hash count as one, which costs a suffix.
#[derive(Debug, Clone, Default)]
pub(crate) struct Taken {
    hashes: HashSet<u64>,
    /// Names that are among them.
    known: usize,
}

impl Taken {
    fn hash(name: &str) -> u64 {
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        hasher.finish()
    }
    /// Takes in the names since the last time.
    fn learn(&mut self, names: &[String]) {
        self.hashes.extend(names.iter().skip(self.known).map(|n| Self::hash(n)));
        self.known = names.len();
    }
    fn has(&self, name: &str) -> bool {
        self.hashes.contains(&Self::hash(name))
    }
}

impl Graph {
    /// A new value; a name already taken gets a suffix.
    pub fn add_value(&mut self, name: &str) -> ValueId {
        let mut unique = name.to_owned();
        let mut n = 1;
        self.taken.learn(&self.names);
        while self.taken.has(&unique) {
            n += 1;
            unique = format!("{name}#{n}");
        }
        self.names.push(unique);
        self.names.len() - 1
    }

    /// Which node makes each value.
    pub fn producers(&self) -> Producers {
        let mut makers = vec![NOBODY; self.names.len()];
        for (i, node) in self.nodes.iter().enumerate() {
            node.outputs.iter().flatten().for_each(|&v| makers[v] = i);
        }
        Producers(makers)
    }

    /// Which `(node, slot)` reads each value; subgraph captures and graph outputs count as reads of slot `usize::MAX`.
    pub fn consumers(&self) -> Consumers {
        let reads = || {
            let of_node = |(i, node): (usize, &'_ Node)| {
                let slots = node.inputs.iter().enumerate().filter_map(move |(slot, v)| Some(((*v)?, (i, slot))));
                let captured = node.captures.iter().map(move |(_, v)| (*v, (i, usize::MAX)));
                slots.chain(captured).collect::<Vec<_>>()
            };
            let outputs = self.outputs.iter().map(|port| (port.value, (usize::MAX, usize::MAX)));
            self.nodes.iter().enumerate().flat_map(of_node).chain(outputs)
        };
        // Each value's readers lie together, in the order of the nodes: first how many there are, then each in its place.
        let mut first = vec![0; self.names.len() + 1];
        reads().for_each(|(v, _)| first[v + 1] += 1);
        (0..self.names.len()).for_each(|v| first[v + 1] += first[v]);
        let (mut next, mut all) = (first.clone(), vec![(0, 0); first[self.names.len()]]);
        for (v, reader) in reads() {
            all[next[v]] = reader;
            next[v] += 1;
        }
        Consumers { first, all }
    }

    /// The input of this name, or an error that lists what there is.
    pub fn input(&self, name: &str) -> Result<&Port> {
        self.inputs.iter().find(|p| p.name == name).ok_or_else(|| {
            let names: Vec<_> = self.inputs.iter().map(|p| format!("`{}`", p.name)).collect();
            Error::usage(format!("the graph has no input `{name}`; its inputs are {}", names.join(", ")))
        })
    }

    /// Sorts nodes so that each comes after those it reads; an error names a node on a cycle. Stable where possible.
    pub fn sort(&mut self) -> Result<()> {
        let producers = self.producers();
        let mut state = vec![0u8; self.nodes.len()];
        let mut order = Vec::with_capacity(self.nodes.len());
        for root in 0..self.nodes.len() {
            let mut stack = vec![(root, false)];
            while let Some((i, done)) = stack.pop() {
                if done {
                    state[i] = 2;
                    order.push(i);
                    continue;
                }
                match state[i] {
                    2 => continue,
                    1 => return Err(self.cycle(i)),
                    _ => state[i] = 1,
                }
                stack.push((i, true));
                let node = &self.nodes[i];
                let reads = node.inputs.iter().flatten().chain(node.captures.iter().map(|(_, v)| v));
                let before: Vec<usize> = reads.filter_map(|v| producers.get(v).copied()).collect();
                for &p in before.iter().rev() {
                    match state[p] {
                        0 => stack.push((p, false)),
                        // On the path from here to itself, unless it merely waits on the stack.
                        1 if stack.iter().any(|&(k, d)| k == p && d) => {
                            return Err(self.cycle(p));
                        }
                        _ => {}
                    }
                }
            }
        }
        let mut nodes: Vec<Option<Node>> = std::mem::take(&mut self.nodes).into_iter().map(Some).collect();
        self.nodes = order.into_iter().map(|i| nodes[i].take().expect("each node once")).collect();
        Ok(())
    }

    fn cycle(&self, node: usize) -> Error {
        Error::invalid(format!(
            "{} is part of a cycle: it reads what is made from its own result",
            self.nodes[node].label()
        ))
        .hint("repetition is written as a Loop or Scan node; export again, or look at this node's inputs")
    }

    /// Drops nodes and constants that no output needs.
    pub fn remove_dead(&mut self) {
        let mut live = vec![false; self.names.len()];
        self.outputs.iter().for_each(|p| live[p.value] = true);
        let mut keep = vec![false; self.nodes.len()];
        for (i, node) in self.nodes.iter().enumerate().rev() {
            if node.outputs.iter().flatten().any(|v| live[*v]) {
                keep[i] = true;
                node.inputs.iter().flatten().for_each(|v| live[*v] = true);
                node.captures.iter().for_each(|(_, v)| live[*v] = true);
            }
        }
        let mut keep = keep.into_iter();
        self.nodes.retain(|_| keep.next().unwrap_or(false));
        self.constants.retain(|v, _| live[*v]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn makers_and_readers_are_those_of_the_nodes() {
        let mut graph = Graph::default();
        let [x, a, b, c] = ["x", "a", "b", "c"].map(|name| graph.add_value(name));
        let node = |inputs: &[ValueId], output, captures: &[ValueId]| Node {
            op: "Add".into(),
            domain: String::new(),
            name: "n".into(),
            opset: 17,
            inputs: inputs.iter().map(|v| Some(*v)).collect(),
            outputs: vec![None, Some(output)],
            attributes: Attributes::default(),
            captures: captures.iter().map(|v| ("outer".to_owned(), *v)).collect(),
            origin: None,
            module: None,
        };
        graph.nodes = vec![node(&[x, x], a, &[]), node(&[a], b, &[x])];
        graph.outputs.push(Port { name: "b".into(), value: b, dtype: None, shape: None });
        let (makers, readers) = (graph.producers(), graph.consumers());
        assert_eq!([x, a, b, c, 99].map(|v| makers.get(&v).copied()), [None, Some(0), Some(1), None, None]);
        const OUTSIDE: usize = usize::MAX;
        assert_eq!(readers.get(&x), Some(&[(0, 0), (0, 1), (1, OUTSIDE)][..]));
        assert_eq!(readers.get(&a), Some(&[(1, 0)][..]));
        assert_eq!(readers.get(&b), Some(&[(OUTSIDE, OUTSIDE)][..]));
        assert!(readers.get(&c).is_none() && readers.get(&99).is_none() && !readers.contains_key(&c));
        // Names stay apart, those given behind the graph's back too.
        graph.names.push("a#2".into());
        let fresh = graph.add_value("a");
        assert_eq!(graph.names[fresh], "a#3");
        graph.outputs[0].value = a;
        graph.remove_dead();
        assert_eq!(graph.nodes.len(), 1);
    }
}
