//! Roles from consumers: which slot of which operator reads a constant, directly or through operators that only move it.

use std::collections::{HashMap, HashSet};

use super::Role;
use super::layers::{Flow, leads_to, makes_waves, reads};
use super::tables;
use crate::graph::ir::{Consumers, Graph, Node, Origin, Producers, ValueId};
use crate::graph::op_schema::{self, Weight};
use crate::graph::subgraphs::EITHER;
use crate::tensor::HostTensor;

/// Functions of one weight that a layer may read instead of the weight itself: a gate's tanh, a positive scale, the norm of
/// weight normalisation.
const FUNCTIONS: &[&str] = &[
    "Neg",
    "Abs",
    "Exp",
    "Log",
    "Sqrt",
    "Reciprocal",
    "Sigmoid",
    "Tanh",
    "Softplus",
    "Relu",
    "Softmax",
    "Clip",
    "Pow",
    "Gather",
    "GatherND",
    "GatherElements",
    "Pad",
    "ReduceSum",
    "ReduceMean",
    "ReduceL2",
    "ReduceSumSquare",
    "Erf",
    "Erfc",
    "Split",
    "SplitToSequence",
    "SequenceAt",
];

/// Goes through the nodes once and gives each constant the role of the slot that reads it.
pub(super) struct Classifier<'a> {
    graph: &'a Graph,
    producers: Producers,
    consumers: Consumers,
    flow: Flow,
    roles: HashMap<ValueId, (Role, &'static str)>,
    /// Values that were given a role already: a second time changes nothing, and chains that fork and join again would be
    /// gone through once for each path.
    assigned: HashSet<(ValueId, Role)>,
    /// Scales of ones and biases of zeros that may be the exporter's.
    neutral: Vec<ValueId>,
    /// Weights are initializers here, so that Constant nodes hold what the framework has as numbers in its code.
    weights_are_initializers: bool,
}

impl<'a> Classifier<'a> {
    pub(super) fn new(graph: &'a Graph) -> Self {
        let of_rank_two = |from: fn(&Origin) -> bool| {
            graph.constants.values().any(|c| c.tensor.rank() >= 2 && c.tensor.dtype().is_float() && from(&c.origin))
        };
        Self {
            graph,
            producers: graph.producers(),
            consumers: graph.consumers(),
            flow: Flow::new(graph),
            roles: HashMap::new(),
            assigned: HashSet::new(),
            neutral: Vec::new(),
            weights_are_initializers: of_rank_two(|o| matches!(o, Origin::Initializer(_))),
        }
    }

    pub(super) fn run(mut self) -> HashMap<ValueId, (Role, &'static str)> {
        for node in &self.graph.nodes {
            self.node(node);
        }
        self.rotary_tables();
        // In a network that was trained no scale is all ones; in a fresh one all are.
        let trained = |(v, r): (&ValueId, &(Role, _))| {
            let t = &self.graph.constants[v].tensor;
            r.0 == Role::Scale && t.len() > 1 && !tables::uniform(t)
        };
        if self.roles.iter().any(trained) {
            for v in std::mem::take(&mut self.neutral) {
                self.roles.insert(v, (Role::Buffer, "ones or zeros of a norm without them"));
            }
        }
        self.roles
    }

    fn is_data(&self, v: Option<ValueId>) -> bool {
        v.is_some_and(|v| self.flow.data.contains(&v))
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
            if self.flow.data.contains(&value) || !self.assigned.insert((value, role)) {
                continue;
            }
            if let Some(c) = self.graph.constants.get(&value) {
                if c.tensor.dtype().is_float() {
                    let (role, reason) = self.by_numbers(value, &c.tensor, role, reason);
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
                "Expand" if role == Role::ConvWeight => {
                    stack.push((node.input(0), Role::Buffer, "resampling filter, expanded in the graph"));
                }
                // A number that fills a shape: the bias of a layer that has none.
                "Expand" if self.behind(Some(value)).is_some_and(|t| t.len() == 1) => {
                    let named =
                        self.source(Some(value)).is_some_and(|v| tables::named_like_a_weight(&self.graph.names[v]));
                    let role = if named { (role, reason) } else { (Role::Buffer, "plain number") };
                    stack.push((node.input(0), role.0, role.1));
                }
                op if op_schema::hands_on(node) || FUNCTIONS.contains(&op) => stack.push((node.input(0), role, reason)),
                "Mul" | "Div" | "Add" | "Sub" | "Concat" | "MatMul" | "Gemm" | "Einsum" | "Where" | EITHER => {
                    // Of single numbers only those with a weight's name.
                    let named =
                        |v: Option<ValueId>| v.is_some_and(|v| tables::named_like_a_weight(&self.graph.names[v]));
                    let takes = |v: Option<ValueId>| self.constant(v).is_none_or(|t| t.len() > 1) || named(v);
                    let weights = node.inputs.iter().rev().filter(|&&v| takes(v));
                    stack.extend(weights.map(|&v| (v, role, reason)));
                }
                // A filter repeated for each channel inside the graph (EDM's resampling) is no weight.
                "Tile" if role == Role::ConvWeight => {
                    stack.push((node.input(0), Role::Buffer, "resampling filter, tiled in the graph"));
                }
                "Tile" => stack.push((node.input(0), role, reason)),
                _ => {}
            }
        }
    }

    /// The role of a constant whose slot says `role`, after a look at its numbers and its name.
    fn by_numbers(&self, value: ValueId, t: &HostTensor, role: Role, reason: &'static str) -> (Role, &'static str) {
        match role {
            Role::Bias | Role::Scale if tables::named_like_a_buffer(&self.graph.names[value]) => {
                (Role::Buffer, "named like a buffer")
            }
            Role::Bias | Role::Scale | Role::Embedding if tables::sinusoidal(t) => {
                (Role::Buffer, "table of sines and cosines")
            }
            Role::Bias | Role::Scale if t.rank() == 0 && !tables::named_like_a_weight(&self.graph.names[value]) => {
                (Role::Buffer, "plain number")
            }
            // The gain of a weight.
            Role::ConvWeight | Role::LinearWeight if t.rank() == 0 => {
                if tables::named_like_a_weight(&self.graph.names[value]) {
                    (Role::Scale, reason)
                } else {
                    (Role::Buffer, "plain number")
                }
            }
            Role::ConvWeight if t.rank() < 2 => (Role::Buffer, "filter that the graph builds"),
            _ => (role, reason),
        }
    }

    fn node(&mut self, node: &Node) {
        let i = |k: usize| node.input(k);
        match node.op.as_str() {
            "Conv" | "ConvTranspose" | "FusedConv" | "NhwcConv" | "CausalConvWithState" => {
                let filter = self.constant(i(1)).is_some_and(tables::resampling_filter);
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
            "MatMul" | "Einsum"
                if makes_waves(self.graph, &self.producers, &self.consumers, node)
                    && !node.inputs.iter().flatten().any(|v| self.flow.features.contains(v)) =>
            {
                for v in &node.inputs {
                    self.assign(*v, Role::Buffer, "frequencies");
                }
            }
            "MatMul" | "Einsum" | "FusedMatMul" if node.inputs.iter().any(|v| self.is_data(*v)) => {
                for v in &node.inputs {
                    self.assign(*v, Role::LinearWeight, "");
                }
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
                if self.without_affine(node, 1) {
                    self.assign(i(1), Role::Buffer, "ones of a norm without a scale");
                    self.assign(i(2), Role::Buffer, "zeros of a norm without a bias");
                } else {
                    self.assign(i(1), Role::Scale, "");
                    self.norm_bias(i(1), i(2));
                }
                self.assign(i(3), Role::Buffer, "running statistics");
                self.assign(i(4), Role::Buffer, "running statistics");
            }
            "SkipLayerNormalization" => {
                if self.without_affine(node, 2) {
                    self.assign(i(2), Role::Buffer, "ones of a norm without a scale");
                    self.assign(i(3), Role::Buffer, "zeros of a norm without a bias");
                } else {
                    self.assign(i(2), Role::Scale, "");
                    self.norm_bias(i(2), i(3));
                }
                self.assign(i(4), Role::Bias, "");
                self.elementwise(node, Role::Bias);
            }
            "SkipSimplifiedLayerNormalization" => {
                self.assign(i(2), Role::Scale, "");
                self.assign(i(3), Role::Bias, "");
                self.elementwise(node, Role::Bias);
            }
            "SkipGroupNorm" | "DeformConv" | "LSTM" | "GRU" | "RNN" | "MultiHeadAttention" | "BiasGelu"
            | "FastGelu" | "BiasAdd" | "BiasSplitGelu" | "PRelu" => self.by_slots(node),
            "Attention" if node.domain == "com.microsoft" => self.by_slots(node),
            "Gather" => {
                let table = self.constant(i(0)).is_some_and(|t| t.rank() >= 2);
                if table && self.is_data(i(1)) && !self.is_data(i(0)) {
                    self.assign(i(0), Role::Embedding, "");
                }
            }
            // The learned bias of the scores, where it is none of a mask.
            "Attention" if node.domain.is_empty() => {
                if self.constant(i(3)).is_some_and(tables::mask) {
                    self.assign(i(3), Role::Buffer, "attention mask");
                } else {
                    self.assign(i(3), Role::Bias, "");
                }
            }
            // Learned tokens beside those of the data, learned stand-ins for what is masked.
            "Concat" if self.has_features(node) => {
                for v in &node.inputs {
                    self.token(*v);
                }
            }
            "Where" if self.is_data(i(1)) || self.is_data(i(2)) || self.is_data(i(0)) => {
                self.token(i(1));
                self.token(i(2));
            }
            "Sum" if node.inputs.len() == 2 => self.elementwise(node, Role::Bias),
            "Add" | "Sub" => self.elementwise(node, Role::Bias),
            "Mul" | "Div" => self.elementwise(node, Role::Scale),
            _ => {}
        }
    }

    /// Each slot that the operator's row says is a weight's.
    fn by_slots(&mut self, node: &Node) {
        for (slot, weight) in op_schema::of(node).map_or(&[][..], |row| row.weights) {
            let role = match weight {
                Weight::Filter => Role::ConvWeight,
                Weight::Matrix => Role::LinearWeight,
                Weight::Bias => Role::Bias,
                Weight::Scale => Role::Scale,
                Weight::Statistic => Role::Buffer,
            };
            self.assign(node.input(*slot), role, "");
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
            let placed = || role == Role::Bias && self.behind(mine).is_some_and(tables::positions);
            if !other.is_some_and(|v| self.flow.features.contains(&v)) && !placed() {
                self.assign(mine, Role::Buffer, "meets an input before any layer (frequencies, scaling)");
            } else if role == Role::Bias && self.leads_to_softmax(node) && self.made_of_masks(mine) {
                self.assign(mine, Role::Buffer, "attention mask");
            } else if self.behind(mine).is_some_and(|t| t.len() == 1) && !self.single_weight(mine, other, role) {
                self.assign(mine, Role::Buffer, "plain number");
            } else {
                if self.neutral_affine(mine, other, role) {
                    self.neutral.extend(self.source(mine));
                }
                self.assign(mine, role, "");
            }
        }
    }

    /// Whether no constant behind this value but masks and plain numbers has a say in it.
    fn made_of_masks(&self, v: Option<ValueId>) -> bool {
        let mut seen: HashSet<ValueId> = HashSet::new();
        let mut stack: Vec<ValueId> = v.into_iter().collect();
        while let Some(v) = stack.pop() {
            if !seen.insert(v) || self.is_data(Some(v)) {
                continue;
            }
            match self.constant(Some(v)) {
                Some(t) if t.dtype().is_float() && t.len() > 1 && !tables::mask(t) => return false,
                Some(_) => {}
                None => stack.extend(self.producers.get(&v).iter().flat_map(|&&p| reads(&self.graph.nodes[p]))),
            }
        }
        true
    }

    /// Whether a single number is a weight: by its name, or because a layer with one channel was made just before, whose
    /// bias it is.
    fn single_weight(&self, mine: Option<ValueId>, other: Option<ValueId>, role: Role) -> bool {
        let Some(source) = self.source(mine) else { return false };
        let constant = &self.graph.constants[&source];
        let mut v = other;
        let maker = loop {
            let Some(node) = v.and_then(|v| self.producers.get(&v)).map(|&p| &self.graph.nodes[p]) else { break "" };
            if !op_schema::hands_on(node) {
                break node.op.as_str();
            }
            v = node.input(0);
        };
        tables::named_like_a_weight(&self.graph.names[source])
            || role == Role::Bias
                && constant.tensor.rank() >= 1
                && matches!(constant.origin, Origin::Initializer(_))
                && matches!(maker, "Conv" | "ConvTranspose" | "MatMul" | "Einsum")
    }

    /// Ones that multiply, or zeros that are added to, what an instance norm makes, made up by the exporter: the rest of a
    /// decomposed GroupNorm that has no scale and bias.
    fn neutral_affine(&self, mine: Option<ValueId>, other: Option<ValueId>, role: Role) -> bool {
        let neutral = if role == Role::Scale { 1.0 } else { 0.0 };
        if !self.made_up(mine) || !self.behind(mine).is_some_and(|t| tables::all(t, neutral)) {
            return false;
        }
        let mut v = other;
        loop {
            let Some(node) = v.and_then(|v| self.producers.get(&v)).map(|&p| &self.graph.nodes[p]) else {
                return false;
            };
            v = match node.op.as_str() {
                "InstanceNormalization" => return true,
                _ if op_schema::hands_on(node) => node.input(0),
                "Mul" if role == Role::Bias => node.inputs.iter().flatten().copied().find(|&v| self.is_data(Some(v))),
                _ => return false,
            };
        }
    }

    /// The constant behind operators that only move it.
    fn behind(&self, v: Option<ValueId>) -> Option<&'a HostTensor> {
        super::layers::behind_moves(self.graph, &self.producers, v?)
    }

    fn has_features(&self, node: &Node) -> bool {
        node.inputs.iter().flatten().any(|v| self.flow.features.contains(v))
    }

    /// A constant among features is a learned token unless it is a plain number, padding, coordinates or a mask.
    fn token(&mut self, v: Option<ValueId>) {
        let named = |v: ValueId| tables::given_name(&self.graph.names[v]).is_some();
        let learned = match self.behind(v) {
            // What another weight makes.
            None => v.is_some_and(|v| self.producers.contains_key(&v)),
            Some(t) if t.len() < 2 || tables::mask(t) || tables::ramp(t) => false,
            Some(t) => !tables::uniform(t) || self.source(v).is_some_and(named),
        };
        if learned {
            self.assign(v, Role::Embedding, "");
        } else if self.constant(v).is_some_and(|t| t.len() > 1) {
            self.assign(v, Role::Buffer, "padding, mask or coordinates");
        }
    }

    /// The constant's value behind operators that only move it.
    fn source(&self, v: Option<ValueId>) -> Option<ValueId> {
        let mut v = v?;
        while !self.graph.constants.contains_key(&v) {
            let node = &self.graph.nodes[*self.producers.get(&v)?];
            v = op_schema::hands_on(node).then(|| node.input(0))??;
        }
        Some(v)
    }

    /// Cosines and sines of the same angles, in two tensors that multiply features.
    fn rotary_tables(&mut self) {
        let scales: Vec<ValueId> = {
            let mut all: Vec<_> = self.roles.iter().filter(|(_, r)| r.0 == Role::Scale).map(|(v, _)| *v).collect();
            all.retain(|v| self.graph.constants[v].tensor.rank() >= 2);
            all.sort_unstable();
            all
        };
        for (k, a) in scales.iter().enumerate() {
            for b in &scales[k + 1..] {
                let tensor = |v: &ValueId| &self.graph.constants[v].tensor;
                if tables::cosines_and_sines(tensor(a), tensor(b)) {
                    for v in [a, b] {
                        self.roles.insert(*v, (Role::Buffer, "rotary table"));
                    }
                }
            }
        }
    }

    fn leads_to_softmax(&self, node: &Node) -> bool {
        leads_to(self.graph, &self.consumers, node, &["Softmax"], &["Add", "Where", "Max"], 5)
    }

    /// A norm's scale of ones (and bias of zeros) that the exporter made up because the operator wants them: the framework's
    /// norm has none. Nothing but a fresh initialisation looks the same, and its tensors have names.
    ///
    /// `slot`: of the scale; the bias comes next.
    fn without_affine(&self, node: &Node, slot: usize) -> bool {
        let (scale, bias) = (node.input(slot), node.input(slot + 1));
        let is = |v: Option<ValueId>, n: f64| self.behind(v).is_some_and(|t| tables::all(t, n));
        if !is(scale, 1.0) || bias.is_some() && !is(bias, 0.0) {
            return false;
        }
        // A merged tensor has the name of one of its readers; what has no bias beside it is not that one.
        let others = || {
            let name = scale.map_or("", |v| self.graph.names[v].as_str());
            let path = name.rsplit_once('.').map_or("", |(path, _)| path);
            node.is("LayerNormalization")
                && bias.is_none()
                && node
                    .module
                    .as_ref()
                    .is_some_and(|m| tables::given_name(name).is_some() && !m.contains(&format!("'{path}'")))
        };
        self.made_up(scale) || others()
    }

    /// The bias of a norm; where its scale has a name and it is zeros without one, the framework's norm has none.
    fn norm_bias(&mut self, scale: Option<ValueId>, bias: Option<ValueId>) {
        let zeros = self.behind(bias).is_some_and(|t| tables::all(t, 0.0));
        if zeros && self.made_up(bias) && self.source(scale).is_some() && !self.made_up(scale) {
            self.assign(bias, Role::Buffer, "zeros of a norm without a bias");
        } else {
            self.assign(bias, Role::Bias, "");
        }
    }

    /// A constant that the exporter made up: a number of the code where weights are initializers, or without a name.
    fn made_up(&self, v: Option<ValueId>) -> bool {
        self.source(v).is_some_and(|v| {
            let in_code =
                matches!(self.graph.constants[&v].origin, Origin::ConstantNode(_)) && self.weights_are_initializers;
            in_code || tables::made_up(&self.graph.names[v])
        })
    }

    /// Instance norm with scale 1 and bias 0 whose result is reshaped, or multiplied by a weight where there is nothing to
    /// reshape: the middle of a decomposed GroupNorm, whose real scale and bias come after.
    fn plain_statistics(&self, node: &Node) -> bool {
        let is = |v: Option<ValueId>, n: f64| self.behind(v).is_some_and(|t| tables::all(t, n));
        let scaled = |n: &Node| n.is("Mul") && n.inputs.iter().any(|&v| self.behind(v).is_some_and(|t| t.len() > 1));
        let middle = |n: usize| self.graph.nodes.get(n).is_some_and(|n| n.is("Reshape") || scaled(n));
        let reshaped =
            node.output(0).and_then(|v| self.consumers.get(&v)).is_some_and(|u| u.iter().all(|&(n, _)| middle(n)));
        is(node.input(1), 1.0) && is(node.input(2), 0.0) && reshaped
    }
}
