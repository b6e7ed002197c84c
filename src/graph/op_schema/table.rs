//! The rows: versions, arity and types from the operator schemas of ONNX 1.22 with their history, `com.microsoft` as ONNX
//! Runtime has it, and `disback`, the operators that stand for what `graph::fuse` and others rewrote.

use super::ResultType::{self, Bool, Input, Int64};
use super::Weight::{self, Bias, Filter, Matrix, Scale, Statistic};
use super::{Class, MANY, NEVER, OpSchema};

const MICROSOFT: &str = "com.microsoft";
const OURS: &str = "disback";

const FILTERS: &[(usize, Weight)] = &[(1, Filter), (2, Bias)];
const MATRICES: &[(usize, Weight)] = &[(0, Matrix), (1, Matrix)];
const GATES: &[(usize, Weight)] = &[(1, Matrix), (2, Matrix), (3, Bias)];
const AFFINE: &[(usize, Weight)] = &[(1, Scale), (2, Bias)];
const SCALE: &[(usize, Weight)] = &[(1, Scale)];
const SECOND_IS_BIAS: &[(usize, Weight)] = &[(1, Bias)];

// Why a file in 16 bits keeps an operator in f32: sums over many values and functions that enlarge small errors, as automatic
// mixed precision has it, and what ONNX does not allow.
const MEAN: &str = "a mean over many values";
const SUM: &str = "a sum over many values";
const EXPONENTIALS: &str = "a sum of exponentials";
const ENLARGES: &str = "it enlarges small errors";
const STEPS: &str = "errors add up over steps";
const MAKES_F32: &str = "it makes f32";
const EIGHT_BIT: &str = "it has 8-bit operands";
const F32_ALONE: &str = "ONNX has it for f32 alone";

/// A row by its class: name, version, inputs, and the type of its result where nothing else is said.
macro_rules! constructors {
    ($($name:ident $class:ident $result:expr,)*) => {
        $(const fn $name(name: &'static str, since: i64, inputs: (usize, usize)) -> OpSchema {
            OpSchema::new(Class::$class, name, since, inputs, $result)
        })*
    };
}
constructors! {
    elementwise Elementwise Input(0),
    view View Input(0),
    rearrangement Rearrangement Input(0),
    indexing Indexing Input(0),
    product Product Input(0),
    norm Norm Input(0),
    attention Attention Input(0),
    recurrent Recurrent Input(0),
    reduction Reduction Input(0),
    along_axis AlongAxis Input(0),
    pooling Pooling Input(0),
    sampling Sampling Input(0),
    loss Loss Input(0),
    size Size Int64,
    filling Filling ResultType::Other,
    random Random ResultType::Other,
    quantised Quantised ResultType::Other,
    control Control ResultType::Other,
    sequence Sequence ResultType::Other,
    other Other ResultType::Other,
}

/// All operators of ONNX, and those of other domains that are computed here.
pub const TABLE: &[OpSchema] = &[
    // Elementwise.
    elementwise("Abs", 1, (1, 1)),
    elementwise("Acos", 7, (1, 1)).bf16(22),
    elementwise("Acosh", 9, (1, 1)).bf16(22),
    elementwise("Add", 1, (2, 2)).changes(&[7]),
    elementwise("And", 1, (2, 2)).changes(&[7]).makes(Bool),
    elementwise("Asin", 7, (1, 1)).bf16(22),
    elementwise("Asinh", 9, (1, 1)).bf16(22),
    elementwise("Atan", 7, (1, 1)).bf16(22),
    elementwise("Atanh", 9, (1, 1)).bf16(22),
    elementwise("BitShift", 11, (2, 2)),
    elementwise("BitwiseAnd", 18, (2, 2)),
    elementwise("BitwiseNot", 18, (1, 1)),
    elementwise("BitwiseOr", 18, (2, 2)),
    elementwise("BitwiseXor", 18, (2, 2)),
    elementwise("Cast", 1, (1, 1)).changes(&[6]).keeps_type(&[0]).makes(ResultType::Other),
    elementwise("CastLike", 15, (2, 2)).keeps_type(&[0]).makes(Input(1)).bf16(15),
    elementwise("Ceil", 1, (1, 1)),
    elementwise("Celu", 12, (1, 1)).stays_f32(F32_ALONE).bf16(NEVER),
    elementwise("Clip", 1, (1, 3)).changes(&[11]),
    elementwise("Cos", 7, (1, 1)).stays_f32(ENLARGES).bf16(22),
    elementwise("Cosh", 9, (1, 1)).bf16(22),
    elementwise("Div", 1, (2, 2)).changes(&[7]),
    elementwise("Elu", 1, (1, 1)).bf16(22),
    elementwise("Equal", 1, (2, 2)).changes(&[7]).makes(Bool),
    elementwise("Erf", 9, (1, 1)),
    // TensorFlow's 1 - erf, which tf2onnx leaves in the file under this name.
    elementwise("Erfc", 1, (1, 1)),
    elementwise("Exp", 1, (1, 1)).stays_f32(ENLARGES),
    elementwise("Floor", 1, (1, 1)),
    elementwise("Gelu", 20, (1, 1)).bf16(20),
    elementwise("Greater", 1, (2, 2)).changes(&[7]).makes(Bool),
    elementwise("GreaterOrEqual", 12, (2, 2)).makes(Bool).bf16(16),
    elementwise("HardSigmoid", 1, (1, 1)).bf16(22),
    elementwise("HardSwish", 14, (1, 1)).bf16(22),
    elementwise("IsInf", 10, (1, 1)).makes(Bool).bf16(20),
    elementwise("IsNaN", 9, (1, 1)).makes(Bool),
    elementwise("LeakyRelu", 1, (1, 1)).bf16(16),
    elementwise("Less", 1, (2, 2)).changes(&[7]).makes(Bool),
    elementwise("LessOrEqual", 12, (2, 2)).makes(Bool).bf16(16),
    elementwise("Log", 1, (1, 1)).stays_f32(ENLARGES),
    elementwise("Max", 1, (1, MANY)).changes(&[8]),
    elementwise("Mean", 1, (1, MANY)).changes(&[8]),
    elementwise("Min", 1, (1, MANY)).changes(&[8]),
    elementwise("Mish", 18, (1, 1)).bf16(22),
    elementwise("Mod", 10, (2, 2)),
    elementwise("Mul", 1, (2, 2)).changes(&[7]),
    elementwise("Neg", 1, (1, 1)),
    elementwise("Not", 1, (1, 1)).makes(Bool),
    elementwise("Or", 1, (2, 2)).changes(&[7]).makes(Bool),
    elementwise("PRelu", 1, (2, 2)).changes(&[7]).weights(SCALE).bf16(16),
    elementwise("Pow", 1, (2, 2)).changes(&[7]).stays_f32(ENLARGES).bf16(15),
    elementwise("Reciprocal", 1, (1, 1)).stays_f32(ENLARGES),
    elementwise("Relu", 1, (1, 1)),
    elementwise("Round", 11, (1, 1)).bf16(22),
    elementwise("Selu", 1, (1, 1)).bf16(22),
    elementwise("Shrink", 9, (1, 1)).bf16(NEVER),
    elementwise("Sigmoid", 1, (1, 1)),
    elementwise("Sign", 9, (1, 1)),
    elementwise("Sin", 7, (1, 1)).stays_f32(ENLARGES).bf16(22),
    elementwise("Sinh", 9, (1, 1)).bf16(22),
    elementwise("Softplus", 1, (1, 1)).bf16(22),
    elementwise("Softsign", 1, (1, 1)).bf16(22),
    elementwise("Sqrt", 1, (1, 1)).stays_f32(ENLARGES),
    elementwise("Sub", 1, (2, 2)).changes(&[7]),
    elementwise("Sum", 1, (1, MANY)).changes(&[8]),
    elementwise("SwiGLU", 28, (2, 2)).bf16(28),
    elementwise("Swish", 24, (1, 1)).bf16(24),
    elementwise("Tan", 7, (1, 1)).bf16(22),
    elementwise("Tanh", 1, (1, 1)),
    // Experimental before opset 10, with the same meaning.
    elementwise("ThresholdedRelu", 1, (1, 1)).bf16(22),
    elementwise("Where", 9, (3, 3)).makes(Input(1)).bf16(16),
    elementwise("Xor", 1, (2, 2)).changes(&[7]).makes(Bool),
    elementwise("BiasAdd", 1, (3, 3)).of(MICROSOFT).weights(SECOND_IS_BIAS),
    elementwise("BiasGelu", 1, (2, 2)).of(MICROSOFT).weights(SECOND_IS_BIAS),
    elementwise("FastGelu", 1, (1, 2)).of(MICROSOFT).weights(SECOND_IS_BIAS),
    elementwise("Gelu", 1, (1, 1)).of(MICROSOFT),
    elementwise("QuickGelu", 1, (1, 1)).of(MICROSOFT),
    elementwise("Gelu", 1, (1, 1)).of(OURS),
    elementwise("Mish", 1, (1, 1)).of(OURS),
    elementwise("SiLU", 1, (1, 1)).of(OURS),
    elementwise("Widen", 1, (1, 1)).of(OURS).makes(ResultType::Other),
    // Views of the first input.
    view("Expand", 8, (2, 2)),
    view("Flatten", 1, (1, 1)),
    view("Identity", 1, (1, 1)),
    view("Reshape", 1, (1, 2)).changes(&[5]),
    view("Slice", 1, (1, 5)).changes(&[10]),
    view("Squeeze", 1, (1, 2)).changes(&[13]),
    view("Transpose", 1, (1, 1)),
    view("Unsqueeze", 1, (1, 2)).changes(&[13]),
    view("Align", 1, (1, 1)).of(OURS),
    view("Contiguous", 1, (1, 1)).of(OURS),
    view("TransposeLast", 1, (3, 3)).of(OURS),
    // Elements moved, copied, joined or parted.
    rearrangement("CenterCropPad", 18, (2, 2)).bf16(18),
    rearrangement("Concat", 1, (1, MANY)).changes(&[4]),
    rearrangement("DepthToSpace", 1, (1, 1)),
    rearrangement("Pad", 1, (1, 4)).changes(&[2, 11]),
    rearrangement("ReverseSequence", 10, (2, 2)).bf16(NEVER),
    rearrangement("SpaceToDepth", 1, (1, 1)),
    rearrangement("Split", 1, (1, 2)).changes(&[2, 13, 18]),
    rearrangement("Tile", 1, (2, 2)).changes(&[6]),
    rearrangement("Trilu", 14, (1, 2)).bf16(14),
    rearrangement("Ranges", 1, (1, 1)).of(OURS),
    // By position or value.
    indexing("Compress", 9, (2, 2)).bf16(NEVER),
    indexing("Gather", 1, (2, 2)),
    indexing("GatherElements", 11, (2, 2)),
    indexing("GatherND", 11, (2, 2)),
    indexing("NonZero", 9, (1, 1)).makes(Int64),
    indexing("OneHot", 9, (3, 3)).makes(Input(2)).bf16(NEVER),
    indexing("Scatter", 9, (3, 3)).bf16(NEVER),
    indexing("ScatterElements", 11, (3, 3)),
    indexing("ScatterND", 11, (3, 3)),
    indexing("TensorScatter", 24, (2, 3)).bf16(24),
    indexing("TopK", 1, (1, 2)).changes(&[10, 11]).bf16(24),
    indexing("Unique", 11, (1, 1)).bf16(NEVER),
    // Products of matrices and convolutions.
    product("CausalConvWithState", 27, (2, 4)).weights(FILTERS).bf16(27),
    product("Conv", 1, (2, 3)).weights(FILTERS).autocast().bf16(22),
    product("ConvTranspose", 1, (2, 3)).weights(FILTERS).autocast().bf16(22),
    product("DeformConv", 19, (3, 5)).weights(&[(1, Filter), (3, Bias)]).bf16(22),
    product("Einsum", 12, (1, MANY)).weights(MATRICES).bf16(NEVER),
    product("Gemm", 1, (2, 3)).changes(&[7]).weights(&[(0, Matrix), (1, Matrix), (2, Bias)]).autocast(),
    product("MatMul", 1, (2, 2)).weights(MATRICES).autocast(),
    product("FusedConv", 1, (2, 4)).of(MICROSOFT).weights(FILTERS),
    product("FusedGemm", 1, (2, 3)).of(MICROSOFT).weights(&[(0, Matrix), (1, Matrix), (2, Bias)]),
    product("FusedMatMul", 1, (2, 2)).of(MICROSOFT).weights(MATRICES),
    product("NhwcConv", 1, (2, 3)).of(MICROSOFT).weights(FILTERS),
    product("Linear", 1, (3, 3)).of(OURS).weights(&[(1, Matrix), (2, Bias)]).autocast(),
    // Norms.
    norm("BatchNormalization", 1, (5, 5))
        .changes(&[7, 9, 14, 15])
        .weights(&[(1, Scale), (2, Bias), (3, Statistic), (4, Statistic)])
        .stays_f32(MEAN)
        .bf16(14),
    norm("GroupNormalization", 18, (3, 3)).changes(&[21]).weights(AFFINE).stays_f32(MEAN).bf16(18),
    norm("InstanceNormalization", 1, (3, 3)).weights(AFFINE).stays_f32(MEAN).bf16(22),
    norm("LRN", 1, (1, 1)),
    norm("LayerNormalization", 17, (2, 3)).weights(AFFINE).stays_f32(MEAN).bf16(17),
    norm("LpNormalization", 1, (1, 1)).stays_f32(MEAN).bf16(22),
    norm("MeanVarianceNormalization", 9, (1, 1)).stays_f32(MEAN),
    norm("RMSNormalization", 23, (2, 2)).weights(SCALE).makes(Input(1)).stays_f32(MEAN).bf16(23),
    // ONNX Runtime writes this one without a domain.
    norm("SimplifiedLayerNormalization", 1, (2, 2)).weights(SCALE).stays_f32(MEAN),
    norm("GroupNorm", 1, (3, 3)).of(MICROSOFT).weights(AFFINE),
    norm("SimplifiedLayerNormalization", 1, (2, 2)).of(MICROSOFT).weights(SCALE),
    norm("SkipGroupNorm", 1, (4, 5)).of(MICROSOFT).weights(&[(1, Scale), (2, Bias), (4, Bias)]),
    norm("SkipLayerNormalization", 1, (3, 5)).of(MICROSOFT).weights(&[(2, Scale), (3, Bias), (4, Bias)]),
    norm("SkipSimplifiedLayerNormalization", 1, (3, 4)).of(MICROSOFT).weights(&[(2, Scale), (3, Bias)]),
    norm("GroupNorm", 1, (1, 5)).of(OURS).weights(AFFINE),
    norm("LayerNorm", 1, (1, 5)).of(OURS).weights(AFFINE),
    norm("RMSNorm", 1, (1, 5)).of(OURS).weights(AFFINE),
    // What the three above are until all rewrites are done: over some axes, the others as a `view` attribute says.
    norm("Normalize", 1, (1, 5)).of(OURS).weights(AFFINE),
    // Attention.
    attention("Attention", 23, (3, 7)).changes(&[24, 25]).bf16(23),
    attention("LinearAttention", 27, (3, 6)).bf16(27),
    attention("Attention", 1, (2, 6)).of(MICROSOFT).weights(&[(1, Matrix), (2, Bias)]),
    attention("MultiHeadAttention", 1, (1, 8)).of(MICROSOFT).weights(&[(3, Bias)]),
    attention("Attention", 1, (3, MANY)).of(OURS),
    // Recurrent layers.
    recurrent("GRU", 1, (3, 6)).changes(&[3, 7]).weights(GATES).stays_f32(STEPS).bf16(22),
    recurrent("LSTM", 1, (3, 8)).changes(&[7]).weights(GATES).stays_f32(STEPS).bf16(22),
    recurrent("RNN", 1, (3, 6)).changes(&[7]).weights(GATES).stays_f32(STEPS).bf16(22),
    // Reductions.
    reduction("ArgMax", 1, (1, 1)).makes(Int64),
    reduction("ArgMin", 1, (1, 1)).makes(Int64),
    reduction("ReduceL1", 1, (1, 2)).changes(&[18]).stays_f32(SUM),
    reduction("ReduceL2", 1, (1, 2)).changes(&[18]).stays_f32(SUM),
    reduction("ReduceLogSum", 1, (1, 2)).changes(&[18]).stays_f32(SUM),
    reduction("ReduceLogSumExp", 1, (1, 2)).changes(&[18]).stays_f32(SUM),
    reduction("ReduceMax", 1, (1, 2)).changes(&[18]),
    reduction("ReduceMean", 1, (1, 2)).changes(&[18]).stays_f32(SUM),
    reduction("ReduceMin", 1, (1, 2)).changes(&[18]),
    reduction("ReduceProd", 1, (1, 2)).changes(&[18]).stays_f32(SUM),
    reduction("ReduceSum", 1, (1, 2)).changes(&[13]).stays_f32(SUM),
    reduction("ReduceSumSquare", 1, (1, 2)).changes(&[18]).stays_f32(SUM),
    // Along an axis.
    along_axis("CumProd", 26, (2, 2)).stays_f32(ENLARGES).bf16(26),
    along_axis("CumSum", 11, (2, 2)).changes(&[14]).stays_f32(ENLARGES).bf16(14),
    along_axis("Hardmax", 1, (1, 1)).changes(&[13]),
    along_axis("LogSoftmax", 1, (1, 1)).changes(&[13]).stays_f32(EXPONENTIALS),
    along_axis("Softmax", 1, (1, 1)).changes(&[13]).stays_f32(EXPONENTIALS),
    // Pooling.
    pooling("AveragePool", 1, (1, 1)).changes(&[7, 10, 19]).bf16(22),
    pooling("GlobalAveragePool", 1, (1, 1)).bf16(22),
    pooling("GlobalLpPool", 1, (1, 1)).changes(&[2]).bf16(22),
    pooling("GlobalMaxPool", 1, (1, 1)).bf16(22),
    pooling("LpPool", 1, (1, 1)).changes(&[2, 18]).bf16(22),
    pooling("MaxPool", 1, (1, 1)).changes(&[8, 10]).bf16(22),
    pooling("MaxRoiPool", 1, (2, 2)).bf16(22),
    pooling("MaxUnpool", 9, (2, 3)).bf16(22),
    // Interpolation.
    sampling("AffineGrid", 20, (2, 2)).bf16(20),
    sampling("GridSample", 16, (2, 2)).changes(&[20]).bf16(22),
    // Its regions and scales are floats of their own, which stay in f32.
    sampling("Resize", 10, (1, 4)).keeps_type(&[1, 2, 3]).changes(&[11, 18, 19]),
    sampling("RoiAlign", 10, (3, 3)).changes(&[16]).bf16(22),
    sampling("Upsample", 1, (1, 2)).keeps_type(&[1]).changes(&[7, 9]).bf16(NEVER),
    // Losses.
    loss("NegativeLogLikelihoodLoss", 12, (2, 3)).bf16(22),
    loss("SoftmaxCrossEntropyLoss", 12, (2, 3)),
    // Shapes.
    size("Shape", 1, (1, 1)),
    size("Size", 1, (1, 1)),
    // Tensors from attributes or sizes.
    filling("BlackmanWindow", 17, (1, 1)).stays_f32(MAKES_F32).bf16(17),
    filling("Constant", 1, (0, 0)),
    filling("ConstantOfShape", 9, (1, 1)).stays_f32(MAKES_F32).bf16(20),
    filling("EyeLike", 9, (1, 1)).stays_f32(MAKES_F32).bf16(22),
    filling("HammingWindow", 17, (1, 1)).stays_f32(MAKES_F32).bf16(17),
    filling("HannWindow", 17, (1, 1)).stays_f32(MAKES_F32).bf16(17),
    filling("MelWeightMatrix", 17, (5, 5)).stays_f32(MAKES_F32).bf16(17),
    filling("Range", 11, (3, 3)).makes(Input(0)).stays_f32(MAKES_F32).bf16(27),
    // Random.
    random("Bernoulli", 15, (1, 1)).stays_f32(MAKES_F32).bf16(22),
    random("Dropout", 1, (1, 3)).changes(&[7, 10, 12]).makes(Input(0)).bf16(22),
    random("Multinomial", 7, (1, 1)).stays_f32(MAKES_F32).bf16(22),
    random("RandomNormal", 1, (0, 0)).stays_f32(MAKES_F32).bf16(22),
    random("RandomNormalLike", 1, (1, 1)).stays_f32(MAKES_F32).bf16(22),
    random("RandomUniform", 1, (0, 0)).stays_f32(MAKES_F32).bf16(22),
    random("RandomUniformLike", 1, (1, 1)).stays_f32(MAKES_F32).bf16(22),
    // 8 bits.
    quantised("ConvInteger", 10, (2, 4)).stays_f32(EIGHT_BIT),
    quantised("DequantizeLinear", 10, (2, 3)).stays_f32(EIGHT_BIT).bf16(19),
    quantised("DynamicQuantizeLinear", 11, (1, 1)).stays_f32(EIGHT_BIT),
    quantised("MatMulInteger", 10, (2, 4)).stays_f32(EIGHT_BIT),
    quantised("QLinearConv", 10, (8, 9)).stays_f32(EIGHT_BIT),
    quantised("QLinearMatMul", 10, (8, 8)).stays_f32(EIGHT_BIT).bf16(21),
    quantised("QuantizeLinear", 10, (2, 3)).stays_f32(EIGHT_BIT).bf16(19),
    quantised("FakeQuantize", 1, (2, 3)).of(OURS).makes(Input(0)),
    // Graphs inside.
    control("If", 1, (1, 1)),
    control("Loop", 1, (0, MANY)),
    // In opset 8 there is one input more.
    control("Scan", 8, (1, MANY)).changes(&[9]).bf16(16),
    // Sequences and optional values.
    sequence("ConcatFromSequence", 11, (1, 1)).bf16(NEVER),
    sequence("Optional", 15, (0, 1)).bf16(NEVER),
    sequence("OptionalGetElement", 15, (1, 1)).bf16(NEVER),
    sequence("OptionalHasElement", 15, (0, 1)).makes(Bool).bf16(NEVER),
    sequence("SequenceAt", 11, (2, 2)).bf16(NEVER),
    sequence("SequenceConstruct", 11, (1, MANY)).bf16(NEVER),
    sequence("SequenceEmpty", 11, (0, 0)).bf16(NEVER),
    sequence("SequenceErase", 11, (1, 2)).makes(Input(0)).bf16(NEVER),
    sequence("SequenceInsert", 11, (2, 3)).makes(Input(0)).bf16(NEVER),
    sequence("SequenceLength", 11, (1, 1)).makes(Int64).bf16(NEVER),
    sequence("SequenceMap", 17, (1, MANY)).bf16(NEVER),
    // Takes bf16 since 24, but what reads its result takes none.
    sequence("SplitToSequence", 11, (1, 2)).changes(&[24]).bf16(NEVER),
    // The rest.
    other("BitCast", 26, (1, 1)).bf16(26),
    other("Col2Im", 18, (3, 3)).makes(Input(0)).bf16(18),
    other("DFT", 17, (1, 3)).changes(&[20]).makes(Input(0)).bf16(17),
    other("Det", 11, (1, 1)).makes(Input(0)).bf16(22),
    other("ImageDecoder", 20, (1, 1)),
    other("NonMaxSuppression", 10, (2, 5)).makes(Int64).stays_f32(F32_ALONE),
    other("RegexFullMatch", 20, (1, 1)).makes(Bool),
    other("RotaryEmbedding", 23, (3, 4)).makes(Input(0)).bf16(23),
    other("STFT", 17, (2, 4)).bf16(17),
    other("StringConcat", 20, (2, 2)).makes(Input(0)),
    other("StringNormalizer", 10, (1, 1)).makes(Input(0)),
    other("StringSplit", 20, (1, 1)),
    other("TfIdfVectorizer", 9, (1, 1)).stays_f32(MAKES_F32),
    // An activation, but half of its input's last axis is the gate of the other half.
    other("BiasSplitGelu", 1, (2, 2)).of(MICROSOFT).weights(SECOND_IS_BIAS).makes(Input(0)),
];
