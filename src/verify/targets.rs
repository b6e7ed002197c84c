//! What runtimes that are not at hand will not take, by operator and form. All tables are here, each with its source.

use std::collections::HashMap;
use std::fmt;

use serde::Serialize;

use crate::graph::edit;
use crate::graph::tensors;
use crate::onnx::{GraphProto, ModelProto, NodeProto, TensorProto};
use crate::passes::portable;
use crate::tensor::DType;

/// A runtime whose limits are checked by tables, without running it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// NVIDIA TensorRT: its own ONNX parser.
    Tensorrt,
    /// Intel OpenVINO.
    Openvino,
    /// Apple Core ML, as execution provider of ONNX Runtime.
    Coreml,
    /// WebGPU in browsers, through onnxruntime-web.
    Webgpu,
    /// The dnn module of OpenCV.
    Opencv,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tensorrt => "TensorRT 10.15",
            Self::Openvino => "OpenVINO 2026.4",
            Self::Coreml => "Core ML (ONNX Runtime 1.32, ML Program)",
            Self::Webgpu => "WebGPU (onnxruntime-web 1.30)",
            Self::Opencv => "OpenCV 5.0 DNN",
        })
    }
}

/// A node that a target will not take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// The node, with its operator; or the weight, or `the file`, where the reason concerns that.
    pub node: String,
    /// The operator's name; empty where the reason concerns no node.
    pub operator: String,
    /// Why the target refuses it, in words for the user.
    pub reason: String,
}

/// Rows marked N in the operator matrix of the TensorRT ONNX parser 10.15 (docs/operators.md); opsets 9 to 24.
const TENSORRT_NOT: &str = "\
    AffineGrid Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Col2Im CenterCropPad Compress \
    ConcatFromSequence ConvInteger DFT Det DynamicQuantizeLinear ImageDecoder MatMulInteger MaxRoiPool MaxUnpool \
    MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement OptionalHasElement \
    QLinearConv QLinearMatMul RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty SequenceErase \
    SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringConcat \
    StringNormalizer StringSplit TfIdfVectorizer Unique";

/// Operators of which OpenVINO 2026.4.1 reads no case of ONNX 1.22's conformance suite (measured: `read_model`).
const OPENVINO_NOT: &str = "\
    Bernoulli BitCast CausalConvWithState CumProd DeformConv Det ImageDecoder LinearAttention MaxUnpool \
    MelWeightMatrix OptionalGetElement OptionalHasElement RegexFullMatch STFT SequenceInsert SequenceMap \
    SplitToSequence StringConcat StringNormalizer StringSplit TensorScatter TfIdfVectorizer";

/// The same of OpenCV 5.0.0's new engine (measured: `readNetFromONNX`).
const OPENCV_NOT: &str = "\
    Bernoulli BitCast CausalConvWithState Col2Im Compress ConvInteger CumProd DeformConv DynamicQuantizeLinear \
    ImageDecoder LinearAttention LpPool MatMulInteger MeanVarianceNormalization MelWeightMatrix \
    OptionalGetElement OptionalHasElement PRelu RNN RegexFullMatch ReverseSequence STFT Scan SequenceInsert \
    SequenceMap SplitToSequence StringConcat StringNormalizer StringSplit TensorScatter TfIdfVectorizer";

/// The ML Program table that ships in the onnxruntime 1.32.0 wheel (`coreml_supported_mlprogram_ops.md`), and the operators
/// that its partitioner takes beside it because they are constants (Constant).
const COREML: &str = "\
    Add And ArgMax AveragePool Cast Ceil Clip Concat Constant Conv ConvTranspose Cos DepthToSpace Div Elu Erf \
    Exp GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool GridSample GroupNormalization HardSigmoid Identity \
    InstanceNormalization LayerNormalization LeakyRelu MatMul Max MaxPool Mul PRelu Pow Reciprocal ReduceMax \
    ReduceMean ReduceSum Relu Reshape Resize Round Shape Sigmoid Sin Slice Softmax Softplus Split Sqrt Squeeze \
    Sub Tanh Tile Transpose Unsqueeze Where";

/// Kernels that onnxruntime-web 1.30.0 registers for WebGPU (its resolve rules), and those it needs none for: they only
/// change a shape.
const WEBGPU: &str = "\
    Abs Acos Acosh Add ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization Cast Ceil \
    Clip Concat Constant Conv ConvTranspose Cos Cosh CumSum DFT DepthToSpace DequantizeLinear Div Einsum Elu \
    Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool \
    Greater GreaterOrEqual GridSample HardSigmoid HardSwish Identity InstanceNormalization LayerNormalization \
    LeakyRelu Less LessOrEqual Log MatMul MaxPool Mul Neg Not Pad Pow Range Reciprocal ReduceLogSum \
    ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize \
    RotaryEmbedding ScatterND Shape Sigmoid Sin Sinh Slice Softmax Split Sqrt Squeeze Sub Tan Tanh \
    ThresholdedRelu Tile Transpose Unsqueeze Where";

/// What the target will not take of this model, in the graph's order.
pub fn refusals(model: &ModelProto, target: Target) -> Vec<Refusal> {
    let Some(graph) = &model.graph else { return Vec::new() };
    let held = edit::constants(graph);
    let look = Look { held: &held, graph };
    let mut out = Vec::new();
    let opset = edit::opset(model);
    if target == Target::Tensorrt && !(9..=24).contains(&opset) {
        let reason = format!("opset {opset}; its parser takes 9 to 24 (disback export --opset)");
        out.push(Refusal { node: "the file".into(), operator: String::new(), reason });
    }
    for n in &graph.node {
        let reason = match n.domain() {
            "" | "ai.onnx" => look.by_name(n, target).or_else(|| look.by_form(n, target)),
            domain => Some(format!("an operator of {domain}")),
        };
        if let Some(reason) = reason {
            out.push(Refusal { node: edit::label(n), operator: n.op_type().to_owned(), reason });
        }
    }
    if matches!(target, Target::Coreml | Target::Webgpu | Target::Opencv) {
        for t in graph.initializer.iter().filter(|t| DType::from_onnx(t.data_type()).is_ok_and(|d| d == DType::BF16)) {
            let node = format!("weight `{}`", t.name());
            out.push(Refusal {
                node,
                operator: String::new(),
                reason: "element type bf16 (export with fp16 or f32)".into(),
            });
        }
    }
    out
}

/// What the target takes and was seen to compute wrongly, in the graph's order.
pub fn warnings(model: &ModelProto, target: Target) -> Vec<Refusal> {
    let one_group = |n: &&NodeProto| edit::is(n, "GroupNormalization") && edit::int(n, "num_groups") == Some(1);
    let nodes = model.graph.iter().flat_map(|g| &g.node);
    let found = nodes.filter(one_group).filter(|_| target == Target::Tensorrt).map(|n| Refusal {
        node: edit::label(n),
        operator: n.op_type().to_owned(),
        // https://github.com/NVIDIA/TensorRT/issues/4756
        reason: "one group: TensorRT 10.16 was reported to normalise each channel by itself here; compare the engine's samples \
                 with ONNX Runtime's, or export with --fuse none, which writes no such operator of its own"
            .into(),
    });
    found.collect()
}

struct Look<'a> {
    held: &'a HashMap<String, &'a TensorProto>,
    graph: &'a GraphProto,
}

impl Look<'_> {
    fn by_name(&self, n: &NodeProto, target: Target) -> Option<String> {
        let op = n.op_type();
        let listed = |table: &str| table.split_whitespace().any(|o| o == op);
        let taken = match target {
            Target::Tensorrt => !listed(TENSORRT_NOT),
            Target::Openvino => !listed(OPENVINO_NOT),
            Target::Opencv => !listed(OPENCV_NOT),
            Target::Coreml => listed(COREML),
            Target::Webgpu => listed(WEBGPU),
        };
        let instead = match target {
            Target::Coreml | Target::Webgpu => "not in its table: the node runs on the CPU, with copies around it",
            _ => "not in its table",
        };
        (!taken).then(|| instead.to_owned())
    }

    fn by_form(&self, n: &NodeProto, target: Target) -> Option<String> {
        let constant = |slot: usize| n.input.get(slot).is_none_or(|i| i.is_empty() || self.held.contains_key(i));
        let text = |name: &str| edit::text(n, name).unwrap_or_default();
        let spread = |name: &str| edit::ints(n, name).is_some_and(|d| d.iter().any(|&d| d != 1));
        match (target, n.op_type()) {
            (Target::Tensorrt, "Resize") => {
                let mode = text("mode");
                let how = text("coordinate_transformation_mode");
                let known =
                    ["", "half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"];
                if !matches!(mode.as_str(), "" | "nearest" | "linear") {
                    Some(format!("mode {mode}; it has nearest and linear"))
                } else if !known.contains(&how.as_str()) {
                    Some(format!("coordinate_transformation_mode {how}"))
                } else if edit::int(n, "antialias").unwrap_or(0) != 0 {
                    Some("antialias".into())
                } else {
                    None
                }
            }
            (Target::Tensorrt, "AveragePool" | "MaxPool" | "LpPool") if spread("dilations") => {
                Some("dilations other than 1".into())
            }
            (Target::Tensorrt, "MaxPool") if n.output.len() > 1 => Some("the output Indices".into()),
            (Target::Tensorrt, "LayerNormalization") if n.output.len() > 1 => Some("outputs beside Y".into()),
            (Target::Tensorrt, op) if op.starts_with("Reduce") && !constant(1) => {
                Some("axes that are no initializer".into())
            }
            (Target::Tensorrt, "CumSum") if !constant(1) => Some("an axis that is not constant".into()),
            (Target::Tensorrt, "DequantizeLinear" | "QuantizeLinear") => {
                let zero = n.input.get(2).and_then(|i| self.held.get(i)).and_then(|t| tensors::from_proto(t).ok());
                zero.filter(|z| z.to_i64().iter().any(|&v| v != 0)).map(|_| "a zero point that is not 0".to_owned())
            }
            (Target::Tensorrt, "Attention") if n.input.len() > 4 => Some("past keys and values".into()),
            (Target::Coreml, "Gemm") if !constant(1) => Some("B that is not constant".into()),
            (Target::Coreml, "Slice") if !(1..5).all(constant) => Some("bounds that are not constant".into()),
            (Target::Coreml, "Split") if !constant(1) => Some("sizes that are not constant".into()),
            (Target::Coreml, "Conv") if !constant(2) => Some("a bias that is not constant".into()),
            (Target::Coreml, "ConvTranspose") => {
                if !constant(1) || !constant(2) {
                    Some("weights that are not constant".into())
                } else if edit::ints(n, "output_shape").is_some()
                    || edit::ints(n, "output_padding").is_some_and(|p| p.iter().any(|&p| p != 0))
                {
                    Some("output_shape or output_padding".into())
                } else {
                    text("auto_pad").starts_with("SAME").then(|| "auto_pad SAME".to_owned())
                }
            }
            (Target::Coreml | Target::Webgpu | Target::Opencv, _) if edit::has_subgraph(n) => {
                Some("a graph inside a node".into())
            }
            (Target::Coreml | Target::Opencv, "Slice") => {
                let label = edit::label(n);
                portable::left_over(self.graph).into_iter().find(|(node, _)| *node == label).map(|(_, what)| what)
            }
            (Target::Webgpu, "Conv") if self.rank(n, 1) == Some(5) => Some("a convolution in three dimensions".into()),
            _ => None,
        }
    }

    fn rank(&self, n: &NodeProto, slot: usize) -> Option<usize> {
        self.held.get(n.input.get(slot)?).map(|t| t.dims.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(nodes: Vec<NodeProto>) -> ModelProto {
        let opset = crate::onnx::OperatorSetIdProto { domain: None, version: Some(18) };
        let graph = GraphProto { node: nodes, ..GraphProto::default() };
        ModelProto { opset_import: vec![opset], graph: Some(graph), ..ModelProto::default() }
    }

    #[test]
    fn nodes_are_named_with_the_reason() {
        let mut resize = edit::node("Resize", &["x", "", "s"], "up");
        resize.attribute.push(edit::text_attribute("mode", "cubic"));
        let m = model(vec![edit::node("Det", &["x"], "d"), resize, edit::node("Relu", &["x"], "r")]);
        let found = |t| refusals(&m, t).into_iter().map(|r| (r.node, r.reason)).collect::<Vec<_>>();
        let trt = found(Target::Tensorrt);
        assert_eq!(trt.len(), 2, "{trt:?}");
        assert_eq!(trt[0], ("Det node `disback/d`".to_owned(), "not in its table".to_owned()));
        assert!(trt[1].1.starts_with("mode cubic"));
        assert_eq!(found(Target::Opencv).len(), 0);
        assert_eq!(found(Target::Openvino).len(), 1);
        assert!(found(Target::Webgpu)[0].1.contains("runs on the CPU"));
    }

    #[test]
    fn what_tensorrt_gets_wrong_is_a_warning() {
        let norm = |groups: i64| {
            let mut n = edit::node("GroupNormalization", &["x", "s", "b"], &format!("y{groups}"));
            n.attribute.push(edit::int_attribute("num_groups", groups));
            n
        };
        let m = model(vec![norm(1), norm(2), edit::node("Relu", &["x"], "r")]);
        assert!(refusals(&m, Target::Tensorrt).is_empty());
        let found = warnings(&m, Target::Tensorrt);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].node.contains("disback/y1") && found[0].reason.contains("one group"), "{found:?}");
        assert!(warnings(&m, Target::Openvino).is_empty());
    }

    #[test]
    fn tables_hold_each_operator_once() {
        for table in [TENSORRT_NOT, OPENVINO_NOT, OPENCV_NOT, COREML, WEBGPU] {
            let names: Vec<&str> = table.split_whitespace().collect();
            let mut sorted = names.clone();
            sorted.sort_unstable();
            sorted.dedup();
            assert_eq!((sorted.len(), names.contains(&"Clip")), (names.len(), table == COREML || table == WEBGPU));
        }
    }

    #[test]
    fn an_operator_set_out_of_range_is_said_once() {
        let mut m = model(vec![]);
        m.opset_import[0].version = Some(25);
        assert!(refusals(&m, Target::Tensorrt)[0].reason.contains("9 to 24"));
    }
}
