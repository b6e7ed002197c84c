//! What each operator is, said once: since when it exists, what it takes, what kind of computation it is, which inputs are
//! weights, what type its result has, what it allows in half precision. Whoever asks such a question reads the [`TABLE`];
//! how an operator is computed stands in `torch::exec::registry`, which a test holds to this table.

mod table;

use std::collections::HashMap;
use std::sync::OnceLock;

use crate::graph::ir::Node;

pub use table::TABLE;

/// Largest number of inputs of variadic operators.
pub const MANY: usize = usize::MAX;

/// A version of the operator set that never comes.
pub const NEVER: i64 = i64::MAX;

/// What kind of computation an operator is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// Each element of the result comes from the elements of the inputs in the same place, which broadcast. There is no
    /// axis: the order of the axes does not matter, as long as all inputs have the same. CastLike reads the type of its
    /// second input only.
    Elementwise,
    /// The elements of the first input, unchanged: in another shape or order of axes, repeated along an axis, or a part.
    View,
    /// Moves elements too, but from several tensors, to several, as copies, or with constants beside them.
    Rearrangement,
    /// Picks, places, sorts or counts elements by position or value.
    Indexing,
    /// Products of matrices, convolutions, and layers with one of them inside.
    Product,
    /// Normalisation: BatchNormalization, GroupNormalization, LayerNormalization and their like.
    Norm,
    /// Attention: products of queries, keys and values, with the softmax or linear form between them.
    Attention,
    /// Recurrent layers: GRU, LSTM and RNN.
    Recurrent,
    /// Reduces axes to one number: the sum, mean, largest element and so on, or the place of the largest or smallest.
    Reduction,
    /// Each element of the result depends on several along an axis: Softmax, CumSum and their like.
    AlongAxis,
    /// Means or maxima over windows, or over all positions, and MaxUnpool, which puts maxima back.
    Pooling,
    /// Interpolates between elements, as Resize and GridSample do, or computes the places for it (AffineGrid).
    Sampling,
    /// Losses of training: NegativeLogLikelihoodLoss and SoftmaxCrossEntropyLoss.
    Loss,
    /// Reads the shape of its input, not its elements.
    Size,
    /// Makes a tensor from attributes or from its size.
    Filling,
    /// Random, at least in training.
    Random,
    /// Has operands or a result of 8 bits.
    Quantised,
    /// Runs subgraphs: If, Loop and Scan.
    Control,
    /// Sequences and optional values.
    Sequence,
    /// None of the other classes: text, images in files, Fourier transforms and single cases such as Det.
    Other,
}

/// The element type of an operator's first result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResultType {
    /// The element type of the input in this slot.
    Input(usize),
    /// Always bool, as comparisons make.
    Bool,
    /// Always i64, as indices and shapes are.
    Int64,
    /// None of these: an attribute says it, the operator fixes another one, or the result is no tensor.
    Other,
}

/// What a weight in an input slot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weight {
    /// Filters of a convolution.
    Filter,
    /// Operand of a product of matrices.
    Matrix,
    /// Added to features: the bias of a convolution, a linear layer, a recurrent layer or a norm.
    Bias,
    /// Multiplies features: the scale of a norm.
    Scale,
    /// A running mean or variance.
    Statistic,
}

/// What is known of one operator.
#[derive(Debug, Clone, Copy)]
pub struct OpSchema {
    /// Empty for ONNX's own.
    pub domain: &'static str,
    /// The operator's name as nodes have it, such as `Conv`.
    pub name: &'static str,
    /// The first version of its domain that has it.
    pub since: i64,
    /// Later versions in which its meaning or form is another, for graphs of f32, f16 and integer tensors. Versions that
    /// only took in more element types are not among them: such a node is the same in both.
    pub changes: &'static [i64],
    /// Smallest and largest number of inputs; [`MANY`]: no limit.
    pub inputs: (usize, usize),
    /// What kind of computation it is.
    pub class: Class,
    /// Input slots in which a constant is a weight.
    pub weights: &'static [(usize, Weight)],
    /// Element type of its first result.
    pub result: ResultType,
    /// libtorch's autocast computes it in bf16, whatever the type of its operands.
    pub autocast: bool,
    /// Why it stays in f32 where a file is written in 16 bits.
    pub stays_f32: Option<&'static str>,
    /// Input slots whose element type does not follow the type that the network computes in.
    pub keeps_type: &'static [usize],
    /// Since which version it takes bf16; 13, the first version with bf16 anywhere, also for operators without floats.
    pub bf16_since: i64,
}

impl OpSchema {
    const fn new(class: Class, name: &'static str, since: i64, inputs: (usize, usize), result: ResultType) -> Self {
        Self {
            domain: "",
            name,
            since,
            changes: &[],
            inputs,
            class,
            weights: &[],
            result,
            autocast: false,
            stays_f32: None,
            keeps_type: &[],
            bf16_since: 13,
        }
    }
    const fn of(mut self, domain: &'static str) -> Self {
        self.domain = domain;
        self
    }
    const fn changes(mut self, versions: &'static [i64]) -> Self {
        self.changes = versions;
        self
    }
    const fn weights(mut self, slots: &'static [(usize, Weight)]) -> Self {
        self.weights = slots;
        self
    }
    const fn makes(mut self, result: ResultType) -> Self {
        self.result = result;
        self
    }
    const fn autocast(mut self) -> Self {
        self.autocast = true;
        self
    }
    const fn stays_f32(mut self, why: &'static str) -> Self {
        self.stays_f32 = Some(why);
        self
    }
    const fn keeps_type(mut self, slots: &'static [usize]) -> Self {
        self.keeps_type = slots;
        self
    }
    const fn bf16(mut self, since: i64) -> Self {
        self.bf16_since = since;
        self
    }

    /// Whether its result is a feature of the network, as opposed to a function of time or shape alone: a product,
    /// attention, a recurrent layer, or a norm with weights.
    pub fn is_layer(&self) -> bool {
        match self.class {
            Class::Product | Class::Attention | Class::Recurrent => true,
            Class::Norm => !self.weights.is_empty(),
            _ => false,
        }
    }

    /// Whether its result is its first input, at most in another type, shape or order, or a part of it: a view, a cast,
    /// and Dropout, which does nothing outside of training.
    pub fn hands_on(&self) -> bool {
        self.class == Class::View || matches!(self.name, "Cast" | "CastLike" | "Dropout")
    }

    /// Whether it has weights that are no plain operand of a product: filters, biases, scales. A module of the framework
    /// stands behind such an operator, and its weights belong to that module.
    pub fn is_module(&self) -> bool {
        self.weights.iter().any(|(_, w)| *w != Weight::Matrix)
    }

    /// Whether its result holds no number that it computed: elements of its inputs in other places, sizes, constants or
    /// random numbers.
    pub fn computes_nothing(&self) -> bool {
        self.hands_on()
            || matches!(self.class, Class::Rearrangement | Class::Size | Class::Filling | Class::Random)
            || (self.class == Class::Indexing && !self.name.starts_with("Scatter"))
    }

    /// What the weight in this slot is, where it holds one.
    pub fn weight(&self, slot: usize) -> Option<Weight> {
        self.weights.iter().find(|(s, _)| *s == slot).map(|(_, w)| *w)
    }

    /// The inputs whose elements broadcast against each other, where the operator is elementwise.
    pub fn operands(&self) -> usize {
        if self.name == "CastLike" { 1 } else { self.inputs.1 }
    }
}

/// The row of an operator.
pub fn find(domain: &str, name: &str) -> Option<&'static OpSchema> {
    static ROWS: OnceLock<HashMap<(&str, &str), &OpSchema>> = OnceLock::new();
    let rows = ROWS.get_or_init(|| TABLE.iter().map(|row| ((row.domain, row.name), row)).collect());
    let domain = if domain == "ai.onnx" { "" } else { domain };
    rows.get(&(domain, name)).copied()
}

/// The row of a node's operator.
pub fn of(node: &Node) -> Option<&'static OpSchema> {
    find(&node.domain, &node.op)
}

/// Whether a node is of this class.
pub fn is(node: &Node, class: Class) -> bool {
    of(node).is_some_and(|row| row.class == class)
}

/// See [`OpSchema::hands_on`].
pub fn hands_on(node: &Node) -> bool {
    of(node).is_some_and(OpSchema::hands_on)
}

/// Whether a node computes the same whatever the order of its axes, as long as all its inputs have the same. Before opset 7
/// an attribute said where a second operand's axes lie in the first.
pub fn is_elementwise(node: &Node) -> bool {
    let lined_up = !node.domain.is_empty() || node.opset >= 7 || node.inputs.len() < 2;
    lined_up && is(node, Class::Elementwise)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_there_once_and_agree_with_themselves() {
        let mut seen = std::collections::HashSet::new();
        for row in TABLE {
            let name = format!("{}.{}", row.domain, row.name);
            assert!(seen.insert(name.clone()), "{name} twice");
            assert!(row.inputs.0 <= row.inputs.1, "{name}");
            assert!(row.changes.is_sorted() && row.changes.first().is_none_or(|&v| v > row.since), "{name}");
            assert!(row.weights.iter().all(|(slot, _)| *slot < row.inputs.1), "{name}");
            // 13 stands for operators without floats too, however young.
            assert!(row.bf16_since == 13 || row.bf16_since >= row.since, "{name} takes bf16 before it exists");
            if let ResultType::Input(i) = row.result {
                assert!(i < row.inputs.1, "{name}");
            }
            assert!(row.keeps_type.iter().all(|slot| *slot < row.inputs.1), "{name}");
        }
        assert!(find("ai.onnx", "Relu").is_some() && find("com.microsoft", "Relu").is_none());
    }

    #[test]
    fn what_hands_on_and_what_is_a_layer() {
        let names = |of: fn(&OpSchema) -> bool| {
            TABLE.iter().filter(|r| r.domain.is_empty() && of(r)).map(|r| r.name).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(
            names(OpSchema::hands_on),
            "Cast CastLike Expand Flatten Identity Reshape Slice Squeeze Transpose Unsqueeze Dropout"
        );
        assert_eq!(
            names(OpSchema::is_layer),
            "CausalConvWithState Conv ConvTranspose DeformConv Einsum Gemm MatMul BatchNormalization GroupNormalization \
             InstanceNormalization LayerNormalization RMSNormalization SimplifiedLayerNormalization Attention \
             LinearAttention GRU LSTM RNN"
        );
    }
}
