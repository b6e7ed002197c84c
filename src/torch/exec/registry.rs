//! The one place where operators are looked up: by domain and name, over the range of opset versions in which the meaning
//! holds.

use std::collections::HashMap;

use crate::error::{Context, Error, Result};
use crate::graph::Node;
pub use crate::graph::op_schema::MANY;
use crate::torch::exec::kernel::Kernel;

/// Builds a kernel from a node: reads every attribute, refuses what it cannot do exactly.
pub type Build = fn(&Node) -> Result<Kernel>;

/// One operator over a range of versions.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Domain of the operator; empty for ONNX's own.
    pub domain: &'static str,
    /// The operator's name, such as `Conv`.
    pub op: &'static str,
    /// First version of the domain's operator set with this meaning.
    pub since: i64,
    /// Last version with this meaning; `i64::MAX` where no later one changes it.
    pub until: i64,
    /// Smallest and largest number of inputs; [`MANY`]: no limit.
    pub inputs: (usize, usize),
    /// Builds the kernel of a node of this operator.
    pub build: Build,
}

/// The operators that can be built, by domain and name.
#[derive(Debug, Clone, Default)]
pub struct Registry {
    entries: HashMap<(&'static str, &'static str), Vec<Entry>>,
    /// A caller's own, by domain and name.
    own: HashMap<String, Build>,
}

fn own_key(domain: &str, op: &str) -> String {
    format!("{domain}.{op}")
}

impl Registry {
    /// Adds an operator of the default domain whose meaning holds from `since` on.
    pub fn add(&mut self, op: &'static str, since: i64, inputs: (usize, usize), build: Build) {
        self.add_entry(Entry { domain: "", op, since, until: i64::MAX, inputs, build });
    }

    /// Adds an operator of any domain and range of versions. Where two ranges overlap, the one added first counts.
    pub fn add_entry(&mut self, entry: Entry) {
        self.entries.entry((entry.domain, entry.op)).or_default().push(entry);
    }

    /// Adds a caller's own operator, in all versions and with any number of inputs. It wins over one of this crate.
    pub fn add_own(&mut self, domain: &str, op: &str, build: Build) {
        self.own.insert(own_key(domain, op), build);
    }

    /// Whether a caller added this operator.
    pub fn has_own(&self, domain: &str, op: &str) -> bool {
        self.own.contains_key(&own_key(domain, op))
    }

    /// All operators of this crate, in no order.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values().flatten()
    }

    /// Builds the kernel of a node, or says why not.
    pub fn build(&self, node: &Node) -> Result<Kernel> {
        if let Some(build) = self.own.get(&own_key(&node.domain, &node.op)) {
            let kernel = build(node)?;
            node.attributes.finish()?;
            return Ok(kernel);
        }
        let Some(entries) = self.entries.get(&(node.domain.as_str(), node.op.as_str())) else {
            return Err(self.unknown(node));
        };
        let entry = entries.iter().find(|e| (e.since..=e.until).contains(&node.opset)).ok_or_else(|| {
            let ranges: Vec<_> = entries.iter().map(|e| format!("from {}", e.since)).collect();
            Error::unsupported(format!("{} at opset {} (known {})", node.op, node.opset, ranges.join(", ")))
                .hint("export again with a newer opset")
        })?;
        let given = node.inputs.len();
        let (least, most) = entry.inputs;
        let required = (0..least).all(|i| node.input(i).is_some());
        if given > most || !required {
            let expected = if most == MANY { format!("at least {least}") } else { format!("{least} to {most}") };
            let missing = (0..least).find(|&i| node.input(i).is_none());
            let missing = missing.map_or(String::new(), |i| format!(", input {i} is missing"));
            return Err(Error::invalid(format!("{given} inputs, expected {expected}{missing}"))
                .hint("the file breaks the specification here: export again"));
        }
        let kernel = (entry.build)(node)?;
        node.attributes.finish()?;
        Ok(kernel)
    }

    fn unknown(&self, node: &Node) -> Error {
        let e = if node.domain.is_empty() {
            Error::unsupported(format!("operator {} (opset {}) is not implemented", node.op, node.opset))
        } else {
            Error::unsupported(format!("operator {} of domain `{}` is not implemented", node.op, node.domain))
        };
        match node.domain.as_str() {
            "com.microsoft"
                if ["Quant", "QLinear", "QGemm", "QAttention", "NBits", "Integer", "Bnb4"]
                    .iter()
                    .any(|part| node.op.contains(part)) =>
            {
                e.hint("whole numbers cannot be trained: take the export from before it was quantised")
            }
            "com.microsoft" => {
                e.hint("export without ONNX Runtime's graph optimisations: they introduce com.microsoft operators")
            }
            "com.microsoft.nchwc" => e.hint(
                "this file was optimised for one machine's memory layout: save it with graph_optimization_level = \
                 ORT_ENABLE_EXTENDED, or take the export from before",
            ),
            // The way out depends on who wrote the file: [`advice`].
            "" => e,
            _ => e.hint(
                "export the layer with standard operators, or hand the operator in from a program of your own: \
                 docs/adding-an-operator.md",
            ),
        }
    }

    /// Builds all nodes; the error lists every one that cannot be built, not only the first.
    pub fn build_all(&self, nodes: &[Node]) -> Result<Vec<Kernel>> {
        let mut kernels = Vec::with_capacity(nodes.len());
        let mut failures: Vec<Error> = Vec::new();
        for node in nodes {
            match self.build(node).with_context(|| node.label()) {
                Ok(k) => kernels.push(k),
                Err(e) => failures.push(e),
            }
        }
        match failures.len() {
            0 => Ok(kernels),
            1 => Err(failures.remove(0)),
            n => {
                const SHOWN: usize = 40;
                let mut lines: Vec<_> = failures.iter().take(SHOWN).map(first_line).collect();
                if n > SHOWN {
                    lines.push(format!("... and {} more", n - SHOWN));
                }
                let hint = failures.iter().find_map(|e| e.hint_text().map(str::to_owned));
                let e = Error::new(failures[0].kind(), format!("{n} nodes cannot be imported:")).lines(lines);
                Err(match hint {
                    Some(h) => e.hint(h),
                    None => e,
                })
            }
        }
    }
}

/// What to do about an operator that is not there, for a file that this program wrote (the model's `producer_name`).
pub fn advice(producer: &str) -> &'static str {
    match producer.to_ascii_lowercase().as_str() {
        "pytorch" => "export with the dynamo exporter at opset 20 or newer, or rewrite the layer with common operators",
        "tf2onnx" => {
            "tf2onnx leaves operators of TensorFlow that it does not know in the file: write the layer with others, or convert a \
             Keras model with `disback-convert keras --backend jax`"
        }
        p if p.contains("paddle") => {
            "write the layer with other operators of Paddle, and export with paddle2onnx again"
        }
        p if p.contains("jax") => "write the layer with other operations of JAX, and convert it again",
        _ => "write the layer with operators that ONNX defines, and export the network again",
    }
}

fn first_line(e: &Error) -> String {
    e.to_string().lines().next().unwrap_or_default().to_owned()
}
