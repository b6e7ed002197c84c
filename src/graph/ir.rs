//! The graph: values are numbered, nodes are in topological order, constants hold their data.

use std::collections::{BTreeMap, HashMap};

use crate::error::{Error, Result};
use crate::graph::attributes::Attributes;
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
                        Err(s) => s.clone(),
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
        if self.domain.is_empty() {
            format!("{} node `{}`", self.op, self.name)
        } else {
            format!("{}.{} node `{}`", self.domain, self.op, self.name)
        }
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
}

impl Graph {
    /// A new value; a name already taken gets a suffix.
    pub fn add_value(&mut self, name: &str) -> ValueId {
        let mut unique = name.to_owned();
        let mut n = 1;
        while self.names.contains(&unique) {
            n += 1;
            unique = format!("{name}#{n}");
        }
        self.names.push(unique);
        self.names.len() - 1
    }

    /// Which node makes each value.
    pub fn producers(&self) -> HashMap<ValueId, usize> {
        self.nodes.iter().enumerate().flat_map(|(i, n)| n.outputs.iter().flatten().map(move |&v| (v, i))).collect()
    }

    /// Which `(node, slot)` reads each value; subgraph captures and graph outputs count as reads of slot `usize::MAX`.
    pub fn consumers(&self) -> HashMap<ValueId, Vec<(usize, usize)>> {
        let mut map: HashMap<ValueId, Vec<(usize, usize)>> = HashMap::new();
        for (i, node) in self.nodes.iter().enumerate() {
            for (slot, v) in node.inputs.iter().enumerate() {
                if let Some(v) = v {
                    map.entry(*v).or_default().push((i, slot));
                }
            }
            for (_, v) in &node.captures {
                map.entry(*v).or_default().push((i, usize::MAX));
            }
        }
        for port in &self.outputs {
            map.entry(port.value).or_default().push((usize::MAX, usize::MAX));
        }
        map
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
        let mut live: std::collections::HashSet<ValueId> = self.outputs.iter().map(|p| p.value).collect();
        let mut keep = vec![false; self.nodes.len()];
        for (i, node) in self.nodes.iter().enumerate().rev() {
            if node.outputs.iter().flatten().any(|v| live.contains(v)) {
                keep[i] = true;
                live.extend(node.inputs.iter().flatten());
                live.extend(node.captures.iter().map(|(_, v)| *v));
            }
        }
        let mut keep = keep.into_iter();
        self.nodes.retain(|_| keep.next().unwrap_or(false));
        self.constants.retain(|v, _| live.contains(v));
    }
}
