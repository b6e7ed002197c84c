//! Roles from consumers: which slot of which operator reads a constant, directly or through operators that only move it.

use std::collections::{HashMap, HashSet};

use super::{Role, uniform};
use crate::graph::ir::{Graph, Node, ValueId};
use crate::tensor::HostTensor;

/// Layers whose output is a feature of the network (as opposed to a function of time or shape alone).
const LAYERS: &[&str] = &[
    "Conv",
    "ConvTranspose",
    "Gemm",
    "MatMul",
    "Einsum",
    "Gather",
    "InstanceNormalization",
    "GroupNormalization",
    "LayerNormalization",
    "RMSNormalization",
    "BatchNormalization",
    "LSTM",
    "GRU",
    "RNN",
    "DeformConv",
    "CausalConvWithState",
    "FusedConv",
    "NhwcConv",
    "FusedGemm",
    "FusedMatMul",
    "Attention",
    "MultiHeadAttention",
    "GroupNorm",
    "SkipGroupNorm",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "SimplifiedLayerNormalization",
];

/// Operators that only move or rescale a weight on its way to the layer.
const PASSING: &[&str] =
    &["Transpose", "Reshape", "Cast", "CastLike", "Identity", "Unsqueeze", "Squeeze", "Flatten", "Expand", "Slice"];

/// Goes through the nodes once and gives each constant the role of the slot that reads it.
pub(super) struct Classifier<'a> {
    graph: &'a Graph,
    producers: HashMap<ValueId, usize>,
    consumers: HashMap<ValueId, Vec<(usize, usize)>>,
    /// Depends on a graph input's elements (not merely on its shape).
    data: HashSet<ValueId>,
    /// Depends on the output of a layer.
    feature: HashSet<ValueId>,
    roles: HashMap<ValueId, (Role, &'static str)>,
    /// Values that were given a role already: a second time changes nothing, and chains that fork and join again would be
    /// gone through once for each path.
    assigned: HashSet<(ValueId, Role)>,
}

impl<'a> Classifier<'a> {
    pub(super) fn new(graph: &'a Graph) -> Self {
        let mut c = Self {
            graph,
            producers: graph.producers(),
            consumers: graph.consumers(),
            data: graph.inputs.iter().map(|p| p.value).chain(graph.captures.iter().map(|(_, v)| *v)).collect(),
            feature: HashSet::new(),
            roles: HashMap::new(),
            assigned: HashSet::new(),
        };
        for node in &graph.nodes {
            let reads = || node.inputs.iter().flatten().chain(node.captures.iter().map(|(_, v)| v));
            let from_shape = matches!(node.op.as_str(), "Shape" | "Size");
            if !from_shape && reads().any(|v| c.data.contains(v)) {
                c.data.extend(node.outputs.iter().flatten());
                let layer = LAYERS.contains(&node.op.as_str());
                if layer || reads().any(|v| c.feature.contains(v)) {
                    c.feature.extend(node.outputs.iter().flatten());
                }
            }
        }
        c
    }

    pub(super) fn run(mut self) -> HashMap<ValueId, (Role, &'static str)> {
        for node in &self.graph.nodes {
            self.node(node);
        }
        self.roles
    }

    fn is_data(&self, v: Option<ValueId>) -> bool {
        v.is_some_and(|v| self.data.contains(&v))
    }

    fn constant(&self, v: Option<ValueId>) -> Option<&'a HostTensor> {
        v.and_then(|v| self.graph.constants.get(&v)).map(|c| &c.tensor)
    }

    /// Gives a role to a slot: to the constant in it, or to those that reach it through operators that only move weights.
    fn assign(&mut self, value: Option<ValueId>, role: Role, reason: &'static str) {
        // Chains may be as long as the file: a stack of our own.
        let mut stack: Vec<(Option<ValueId>, Role, &'static str)> = vec![(value, role, reason)];
        while let Some((value, role, reason)) = stack.pop() {
            let Some(value) = value else { continue };
            if self.data.contains(&value) || !self.assigned.insert((value, role)) {
                continue;
            }
            if let Some(c) = self.graph.constants.get(&value) {
                if c.tensor.dtype().is_float() {
                    let entry = self.roles.entry(value).or_insert((role, reason));
                    // A tensor that any layer trains is a parameter, whoever else reads it.
                    if entry.0 == Role::Buffer {
                        *entry = (role, reason);
                    }
                }
                continue;
            }
            let Some(&p) = self.producers.get(&value) else { continue };
            let node = &self.graph.nodes[p];
            match node.op.as_str() {
                op if PASSING.contains(&op) => stack.push((node.input(0), role, reason)),
                "Mul" | "Div" | "Add" | "Sub" | "Concat" => {
                    let weights = node.inputs.iter().rev().filter(|&&v| self.constant(v).is_none_or(|t| t.len() > 1));
                    stack.extend(weights.map(|&v| (v, role, reason)));
                }
                // A filter repeated for each channel inside the graph (EDM's resampling) is no weight.
                "Tile" => stack.push((node.input(0), Role::Buffer, "resampling filter, tiled in the graph")),
                _ => {}
            }
        }
    }

    fn node(&mut self, node: &Node) {
        let i = |k: usize| node.input(k);
        match node.op.as_str() {
            "DeformConv" => {
                self.assign(i(1), Role::ConvWeight, "");
                self.assign(i(3), Role::Bias, "");
            }
            "Conv" | "ConvTranspose" | "FusedConv" | "NhwcConv" | "CausalConvWithState" => {
                let filter = self.constant(i(1)).is_some_and(resampling_filter);
                if filter {
                    self.assign(i(1), Role::Buffer, "resampling filter: every channel has the same");
                } else {
                    self.assign(i(1), Role::ConvWeight, "");
                }
                self.assign(i(2), Role::Bias, "");
            }
            "Gemm" | "FusedGemm" if self.is_data(i(0)) || self.is_data(i(1)) => {
                self.assign(i(0), Role::LinearWeight, "");
                self.assign(i(1), Role::LinearWeight, "");
                self.assign(i(2), Role::Bias, "");
            }
            "MatMul" | "Einsum" | "FusedMatMul" if node.inputs.iter().any(|v| self.is_data(*v)) => {
                for v in &node.inputs {
                    self.assign(*v, Role::LinearWeight, "");
                }
            }
            "LSTM" | "GRU" | "RNN" => {
                self.assign(i(1), Role::LinearWeight, "");
                self.assign(i(2), Role::LinearWeight, "");
                self.assign(i(3), Role::Bias, "");
            }
            "InstanceNormalization" => {
                if self.plain_statistics(node) {
                    self.assign(i(1), Role::Buffer, "ones of a decomposed GroupNorm");
                    self.assign(i(2), Role::Buffer, "zeros of a decomposed GroupNorm");
                } else {
                    self.assign(i(1), Role::Scale, "");
                    self.assign(i(2), Role::Bias, "");
                }
            }
            "GroupNormalization"
            | "LayerNormalization"
            | "RMSNormalization"
            | "BatchNormalization"
            | "GroupNorm"
            | "SimplifiedLayerNormalization" => {
                self.assign(i(1), Role::Scale, "");
                self.assign(i(2), Role::Bias, "");
                self.assign(i(3), Role::Buffer, "running statistics");
                self.assign(i(4), Role::Buffer, "running statistics");
            }
            "SkipLayerNormalization" => {
                self.assign(i(2), Role::Scale, "");
                self.assign(i(3), Role::Bias, "");
                self.assign(i(4), Role::Bias, "");
            }
            "SkipSimplifiedLayerNormalization" => {
                self.assign(i(2), Role::Scale, "");
                self.assign(i(3), Role::Bias, "");
            }
            "SkipGroupNorm" => {
                self.assign(i(1), Role::Scale, "");
                self.assign(i(2), Role::Bias, "");
                self.assign(i(4), Role::Bias, "");
            }
            "MultiHeadAttention" => self.assign(i(3), Role::Bias, ""),
            "Attention" if node.domain == "com.microsoft" => {
                self.assign(i(1), Role::LinearWeight, "");
                self.assign(i(2), Role::Bias, "");
            }
            "BiasGelu" | "FastGelu" | "BiasAdd" | "BiasSplitGelu" => self.assign(i(1), Role::Bias, ""),
            "PRelu" => self.assign(i(1), Role::Scale, ""),
            "Gather" => {
                let table = self.constant(i(0)).is_some_and(|t| t.rank() >= 2);
                if table && self.is_data(i(1)) {
                    self.assign(i(0), Role::Embedding, "");
                }
            }
            "Add" | "Sub" => self.elementwise(node, Role::Bias),
            "Mul" | "Div" => self.elementwise(node, Role::Scale),
            _ => {}
        }
    }

    /// A constant that is added to, or multiplies, what layers made is a bias or scale; one that meets time or shapes is a
    /// table.
    fn elementwise(&mut self, node: &Node, role: Role) {
        for (mine, other) in [(0, 1), (1, 0)] {
            let (mine, other) = (node.input(mine), node.input(other));
            if self.is_data(mine) || !self.is_data(other) {
                continue;
            }
            if !other.is_some_and(|v| self.feature.contains(&v)) {
                self.assign(mine, Role::Buffer, "meets an input before any layer (frequencies, scaling)");
            } else if role == Role::Bias && self.leads_to_softmax(node) && self.constant(mine).is_none_or(is_mask) {
                self.assign(mine, Role::Buffer, "attention mask");
            } else if self
                .constant(mine)
                .is_some_and(|t| t.len() == 1 && !named_like_a_weight(&self.graph.names[mine.unwrap_or(0)]))
            {
                self.assign(mine, Role::Buffer, "plain number");
            } else {
                self.assign(mine, role, "");
            }
        }
    }

    fn leads_to_softmax(&self, node: &Node) -> bool {
        let mut at = node.output(0);
        for _ in 0..4 {
            let Some(uses) = at.and_then(|v| self.consumers.get(&v)) else { return false };
            let Some(next) = uses.iter().find_map(|&(n, _)| self.graph.nodes.get(n)) else { return false };
            match next.op.as_str() {
                "Softmax" => return true,
                "Cast" | "Reshape" | "Identity" | "Add" => at = next.output(0),
                _ => return false,
            }
        }
        false
    }

    /// Instance norm with scale 1 and bias 0 whose result is reshaped: the middle of a decomposed GroupNorm, whose real
    /// scale and bias come after.
    fn plain_statistics(&self, node: &Node) -> bool {
        let all = |v: Option<ValueId>, n: f64| self.constant(v).is_some_and(|t| uniform(t) && t.to_f64()[0] == n);
        let reshaped = node
            .output(0)
            .and_then(|v| self.consumers.get(&v))
            .is_some_and(|u| u.iter().all(|&(n, _)| self.graph.nodes.get(n).is_some_and(|n| n.is("Reshape"))));
        all(node.input(1), 1.0) && all(node.input(2), 0.0) && reshaped
    }
}

/// A depthwise kernel that is the same for every channel and not constant zero.
fn resampling_filter(t: &HostTensor) -> bool {
    let [channels, 1, ref window @ ..] = *t.shape() else { return false };
    if channels < 2 || window.iter().product::<usize>() < 2 || !t.dtype().is_float() {
        return false;
    }
    let bytes = t.bytes();
    let slice = bytes.len() / channels;
    bytes.chunks_exact(slice).all(|c| c == &bytes[..slice]) && bytes.iter().any(|&b| b != 0)
}

fn is_mask(t: &HostTensor) -> bool {
    t.to_f32().iter().any(|v| !v.is_finite() || *v <= -1e4)
}

fn named_like_a_weight(name: &str) -> bool {
    const ENDS: &[&str] = &["weight", "bias", "scale", "gamma", "beta", "alpha", "gate"];
    name.contains('.') && ENDS.iter().any(|e| name.ends_with(e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_depthwise_kernel_is_a_filter_only_when_all_channels_agree() {
        let same = HostTensor::new(&[2, 1, 1, 2], &[0.25f32, 0.75, 0.25, 0.75]).unwrap();
        let different = HostTensor::new(&[2, 1, 1, 2], &[0.25f32, 0.75, 0.25, 0.5]).unwrap();
        assert!(resampling_filter(&same));
        assert!(!resampling_filter(&different));
    }
}
