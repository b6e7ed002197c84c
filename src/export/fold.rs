//! Folding: what follows from a fixed time alone is computed once, with libtorch, and stored as an initializer. Of a UNet
//! that is the whole time embedding.

use std::collections::{HashMap, HashSet};

use tch::Device;

use crate::error::{Context, Result};
use crate::graph::{Graph, Model, ValueId, lower, tensors};
use crate::onnx::ModelProto;
use crate::torch::convert;
use crate::torch::exec::kernel::{Kernel, Value};
use crate::torch::ops;

/// Replaces every node of the main graph that depends on the initializer `source`, and on nothing but constants beside it,
/// by its value. Other constant arithmetic stays as the exporter wrote it, so that names and weights stay where they were.
/// Returns the number of nodes folded.
pub fn fold(model: &mut ModelProto, source: &str) -> Result<usize> {
    let lowered = lower::lower(&Model::from_proto(model.clone()))?;
    let folder = Folder::new(&lowered, source);
    let values = tch::no_grad(|| folder.run())?;
    let Some(graph) = model.graph.as_mut() else { return Ok(0) };
    let folded: HashSet<usize> = lowered
        .nodes
        .iter()
        .filter(|n| n.outputs.iter().flatten().all(|v| values.contains_key(v)))
        .filter_map(|n| n.origin)
        .collect();
    let mut still_read: HashSet<&str> = graph.output.iter().map(|v| v.name()).collect();
    for (i, n) in graph.node.iter().enumerate() {
        if !folded.contains(&i) {
            still_read.extend(n.input.iter().map(String::as_str));
        }
    }
    let mut made = Vec::new();
    for (v, value) in &values {
        let name = &lowered.names[*v];
        if still_read.contains(name.as_str()) {
            made.push(tensors::to_proto(name, &convert::to_host(value.tensor(Device::Cpu)?)?));
        }
    }
    // The order of a hash map must not show in the file.
    made.sort_by(|a, b| a.name().cmp(b.name()));
    let mut index = 0;
    graph.node.retain(|_| {
        index += 1;
        !folded.contains(&(index - 1))
    });
    graph.initializer.extend(made);
    crate::graph::edit::remove_dead(graph);
    Ok(folded.len())
}

struct Folder<'a> {
    graph: &'a Graph,
    source: Option<ValueId>,
}

impl<'a> Folder<'a> {
    fn new(graph: &'a Graph, source: &str) -> Self {
        let source = graph.constants.keys().copied().find(|v| graph.names[*v] == source);
        Self { graph, source }
    }

    /// Values of everything that depends on the source and constants only.
    fn run(&self) -> Result<HashMap<ValueId, Value>> {
        let mut tainted: HashSet<ValueId> = self.source.into_iter().collect();
        let mut known: HashSet<ValueId> = self.graph.constants.keys().copied().collect();
        for n in &self.graph.nodes {
            let simple = n.captures.is_empty()
                && !n.attributes.iter().any(|(_, a)| matches!(a, crate::graph::Attribute::Graph(_)));
            if simple && n.inputs.iter().flatten().all(|v| known.contains(v)) {
                known.extend(n.outputs.iter().flatten());
                if n.inputs.iter().flatten().any(|v| tainted.contains(v)) {
                    tainted.extend(n.outputs.iter().flatten());
                }
            }
        }
        // Only what leads to a tainted value is computed.
        let mut wanted: HashSet<ValueId> = tainted.clone();
        for n in self.graph.nodes.iter().rev() {
            if n.outputs.iter().flatten().any(|v| wanted.contains(v)) {
                wanted.extend(n.inputs.iter().flatten().filter(|v| known.contains(v)));
            }
        }
        let mut values: HashMap<ValueId, Value> = HashMap::new();
        for (v, c) in &self.graph.constants {
            if wanted.contains(v) {
                values.insert(*v, Value::host(convert::to_torch(&c.tensor)?));
            }
        }
        for n in &self.graph.nodes {
            if !n.outputs.iter().flatten().all(|v| known.contains(v) && wanted.contains(v)) {
                continue;
            }
            let kernel: Kernel = ops::registry().build(n).with_context(|| n.label())?;
            let args = n.inputs.iter().map(|v| v.and_then(|v| values.get(&v))).collect();
            let out = kernel.call(args, Device::Cpu).with_context(|| n.label())?;
            for (id, v) in n.outputs.iter().zip(out) {
                if let Some(id) = id {
                    values.insert(*id, v);
                }
            }
        }
        values
            .retain(|v, value| tainted.contains(v) && Some(*v) != self.source && !matches!(value, Value::Sequence(_)));
        Ok(values)
    }
}
