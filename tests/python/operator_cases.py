"""Operator cases that ONNX's own suite lacks, in its form (DIR/<case>/model.onnx, test_data_set_0/{input,output}_<i>.pb):
the com.microsoft domain, and older operator sets, whose meaning or form differs from the newest. Expected outputs are
ONNX Runtime's (CPU), or numpy's for the operators that ONNX Runtime has for CUDA only."""

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

RNG = np.random.default_rng(5)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    erf = np.vectorize(__import__("math").erf)
    return (0.5 * x * (1 + erf(x / np.sqrt(2)))).astype(np.float32)


def write(root, name, op, inputs, outputs=1, expected=None, asked=None, domain="com.microsoft", opset=17, integers=(),
          **attributes):
    """`asked` lists which outputs are named; `expected` holds numpy's answers where ONNX Runtime has no CPU kernel."""
    names = [f"x{i}" if v is not None else "" for i, v in enumerate(inputs)]
    asked = range(outputs) if asked is None else asked
    out_names = [f"y{i}" if i in asked else "" for i in range(max(asked) + 1)]
    node = helper.make_node(op, names, out_names, domain=domain, **attributes)
    given = [(n, v) for n, v in zip(names, inputs) if v is not None]
    elem = helper.np_dtype_to_tensor_dtype
    ports = [helper.make_tensor_value_info(n, elem(v.dtype), v.shape) for n, v in given]
    kinds = [TensorProto.INT64 if i in integers else TensorProto.FLOAT for i in asked]
    results = [helper.make_tensor_value_info(n, k, None) for n, k in zip([n for n in out_names if n], kinds)]
    graph = helper.make_graph([node], name, ports, results)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=9 if opset > 8 else 4)
    if expected is None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        expected = session.run(None, dict(given))
    for info, value in zip(model.graph.output, expected):
        info.CopyFrom(helper.make_tensor_value_info(info.name, elem(value.dtype), value.shape))
    data = root / name / "test_data_set_0"
    data.mkdir(parents=True)
    onnx.save(model, root / name / "model.onnx")
    for kind, values in (("input", [v for _, v in given]), ("output", expected)):
        for i, v in enumerate(values):
            (data / f"{kind}_{i}.pb").write_bytes(numpy_helper.from_array(np.asarray(v)).SerializeToString())


def group_norm(x, gamma, beta, groups, eps, silu):
    n, h, w, c = x.shape
    g = x.reshape(n, h, w, groups, c // groups)
    mean = g.mean(axis=(1, 2, 4), keepdims=True)
    var = g.var(axis=(1, 2, 4), keepdims=True)
    y = ((g - mean) / np.sqrt(var + eps)).reshape(x.shape) * gamma + beta
    return (y * sigmoid(y) if silu else y).astype(np.float32)


def nhwc_conv(x, w, b, pads, strides):
    top, left, bottom, right = pads
    x = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    m, kh, kw, _ = w.shape
    oh, ow = (x.shape[1] - kh) // strides[0] + 1, (x.shape[2] - kw) // strides[1] + 1
    y = np.zeros((x.shape[0], oh, ow, m), np.float32)
    for i in range(oh):
        for j in range(ow):
            patch = x[:, i * strides[0] : i * strides[0] + kh, j * strides[1] : j * strides[1] + kw]
            y[:, i, j] = np.tensordot(patch, w, axes=([1, 2, 3], [1, 2, 3])) + b
    return y


def microsoft(root):
    x = normal(2, 5, 8)
    write(root, "gelu", "Gelu", [x])
    write(root, "fast_gelu", "FastGelu", [x])
    write(root, "fast_gelu_bias", "FastGelu", [x, normal(8)])
    write(root, "bias_gelu", "BiasGelu", [x, normal(8)])
    write(root, "quick_gelu", "QuickGelu", [x])
    write(root, "quick_gelu_alpha", "QuickGelu", [x], alpha=1.0)
    wide, bias = normal(2, 3, 10), normal(10)
    left, right = np.split(wide + bias, 2, axis=-1)
    write(root, "bias_split_gelu", "BiasSplitGelu", [wide, bias], expected=[left * gelu(right)])
    bias, skip = normal(8), normal(2, 5, 8)
    write(root, "bias_add", "BiasAdd", [x, bias, skip], expected=[x + bias + skip])

    a, b = normal(2, 3, 4), normal(2, 4, 5)
    write(root, "fused_matmul", "FusedMatMul", [a, b], alpha=0.25)
    write(root, "fused_matmul_a", "FusedMatMul", [normal(2, 4, 3), b], transA=1)
    write(root, "fused_matmul_ab", "FusedMatMul", [normal(2, 4, 3), normal(2, 5, 4)], transA=1, transB=1, alpha=2.0)

    gamma, beta = normal(8), normal(8)
    write(root, "skip_layer_norm", "SkipLayerNormalization", [x, skip, gamma, beta], epsilon=1e-5)
    write(root, "skip_layer_norm_bias_sum", "SkipLayerNormalization", [x, skip, gamma, beta, bias], asked=[0, 3], epsilon=1e-5)
    write(root, "skip_layer_norm_no_beta", "SkipLayerNormalization", [x, skip, gamma], epsilon=1e-3)
    write(root, "skip_rms_norm", "SkipSimplifiedLayerNormalization", [x, skip, gamma, bias], asked=[0, 3], epsilon=1e-5)
    write(root, "rms_norm", "SimplifiedLayerNormalization", [x, gamma], domain="", epsilon=1e-5, axis=-1)

    image, weight, b = normal(1, 3, 7, 7), normal(4, 3, 3, 3), normal(4)
    write(root, "fused_conv_relu", "FusedConv", [image, weight, b], activation="Relu", pads=[1, 1, 1, 1])
    write(root, "fused_conv_sum", "FusedConv", [image, weight, b, normal(1, 4, 7, 7)], activation="Relu", pads=[1, 1, 1, 1])
    write(root, "fused_conv_leaky", "FusedConv", [image, weight, b], activation="LeakyRelu", activation_params=[0.2])
    write(root, "fused_gemm", "FusedGemm", [normal(3, 4), normal(4, 5), normal(5)], activation="LeakyRelu", activation_alpha=0.1)

    x, gamma, beta = normal(2, 3, 5, 8), normal(8), normal(8)
    for silu in (0, 1):
        y = group_norm(x, gamma, beta, 4, 1e-5, silu)
        write(root, f"group_norm_{silu}", "GroupNorm", [x, gamma, beta], expected=[y], groups=4, activation=silu, epsilon=1e-5)
    y = group_norm(x, gamma, beta, 2, 1e-5, 1).transpose(0, 3, 1, 2)
    write(root, "group_norm_nchw", "GroupNorm", [x.transpose(0, 3, 1, 2).copy(), gamma, beta], expected=[y.copy()], groups=2,
          activation=1, epsilon=1e-5, channels_last=0)
    for name, skip in (("full", normal(2, 3, 5, 8)), ("row", normal(2, 8)), ("ones", normal(2, 1, 1, 8))):
        bias = normal(8)
        total = x + (skip[:, None, None] if skip.ndim == 2 else skip) + bias
        write(root, f"skip_group_norm_{name}", "SkipGroupNorm", [x, gamma, beta, skip, bias], outputs=2,
              expected=[group_norm(total, gamma, beta, 4, 1e-5, 1), total], groups=4, activation=1, epsilon=1e-5)
    image, weight, b = normal(2, 6, 5, 3), normal(4, 3, 3, 3), normal(4)
    y = nhwc_conv(image, weight, b, [1, 1, 1, 0], [2, 1])
    write(root, "nhwc_conv", "NhwcConv", [image, weight, b], expected=[y], pads=[1, 1, 1, 0], strides=[2, 1])

    q, k, v = normal(2, 4, 12), normal(2, 6, 12), normal(2, 6, 12)
    bias = normal(36)
    write(root, "mha", "MultiHeadAttention", [q, k, v], num_heads=3)
    write(root, "mha_bias_scale", "MultiHeadAttention", [q, k, v, bias], num_heads=3, scale=0.3)
    lengths = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], np.int32)
    write(root, "mha_padding", "MultiHeadAttention", [q, k, v, None, lengths], num_heads=3)
    write(root, "mha_lengths", "MultiHeadAttention", [q, k, v, None, np.array([4, 6], np.int32)], num_heads=3)
    write(root, "mha_attention_bias", "MultiHeadAttention", [q, k, v, None, None, normal(1, 3, 4, 6)], num_heads=3)
    write(root, "mha_self_causal", "MultiHeadAttention", [k, v, normal(2, 6, 12)], num_heads=2, unidirectional=1)
    write(root, "mha_past", "MultiHeadAttention", [q, normal(2, 4, 12), normal(2, 4, 12), None, None, None, normal(2, 3, 2, 4),
          normal(2, 3, 2, 4)], outputs=3, num_heads=3)
    write(root, "mha_cross_heads", "MultiHeadAttention", [q, normal(2, 3, 6, 4), normal(2, 3, 6, 4)], num_heads=3)
    # Packed inputs are for CUDA only: the same as the unpacked ones.
    packed = normal(2, 6, 3, 3, 4)
    parts = [packed[:, :, :, i].transpose(0, 2, 1, 3) for i in range(3)]
    scores = parts[0] @ parts[1].transpose(0, 1, 3, 2) / 2
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = (weights / weights.sum(-1, keepdims=True)) @ parts[2]
    y = y.transpose(0, 2, 1, 3).reshape(2, 6, 12)
    write(root, "mha_packed_qkv", "MultiHeadAttention", [packed], expected=[y], num_heads=3)
    write(root, "attention", "Attention", [q, normal(12, 36), bias], num_heads=3)
    write(root, "attention_mask", "Attention", [k, normal(12, 36), bias, lengths], num_heads=3)
    write(root, "attention_causal", "Attention", [q, normal(12, 36), bias], num_heads=2, unidirectional=1)
    write(root, "attention_bias", "Attention", [q, normal(12, 36), bias, None, None, normal(2, 3, 4, 4)], num_heads=3)


def older(root):
    def case(name, op, opset, inputs, **attributes):
        write(root, f"{name}_opset{opset}", op, inputs, domain="", opset=opset, **attributes)

    i64 = lambda *v: np.array(v, np.int64)  # noqa: E731
    f32 = lambda *v: np.array(v, np.float32)  # noqa: E731
    x, image = normal(2, 3, 4), normal(1, 2, 5, 7)
    # Softmax and its kin ran over all axes behind `axis`, flattened.
    for op in ("Softmax", "LogSoftmax", "Hardmax"):
        for axis in (0, 1, 2):
            case(f"{op.lower()}_axis{axis}", op, 11, [x], axis=axis)
        case(f"{op.lower()}_default", op, 11, [x])
        case(f"{op.lower()}_default", op, 13, [x])
    # Attributes that became inputs.
    case("squeeze", "Squeeze", 11, [normal(1, 3, 1)], axes=[0, 2])
    case("unsqueeze", "Unsqueeze", 11, [x], axes=[0, 4])
    case("clip", "Clip", 6, [x], min=-0.5, max=0.75)
    case("clip_none", "Clip", 6, [x])
    case("pad", "Pad", 2, [x], pads=[0, 1, 0, 1, 0, 2], value=0.5)
    case("pad_reflect", "Pad", 2, [x], pads=[0, 1, 2, 0, 1, 1], mode="reflect")
    case("pad_edge", "Pad", 2, [x], pads=[1, 0, 2, 0, 1, 1], mode="edge")
    case("slice", "Slice", 9, [x], starts=[0, -3], ends=[2, 100], axes=[1, 2])
    case("slice_no_axes", "Slice", 9, [x], starts=[1, 0], ends=[2, -1])
    case("slice_steps", "Slice", 10, [x, i64(3, -1), i64(0, -100), i64(2, 1), i64(-2, -1)])
    write(root, "split_opset11", "Split", [x], outputs=2, domain="", opset=11, axis=2, split=[1, 3])
    write(root, "split_even_opset11", "Split", [x], outputs=2, domain="", opset=11, axis=2)
    write(root, "topk_opset10", "TopK", [x, i64(2)], outputs=2, integers=(1,), domain="", opset=10, axis=1)
    write(root, "dropout_opset10", "Dropout", [x], domain="", opset=10, ratio=0.3)
    for op in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceProd", "ReduceL2", "ReduceLogSumExp"):
        case(op.lower(), op, 11, [x], axes=[-1, 0], keepdims=0)
        case(f"{op.lower()}_all", op, 11, [x])
    case("reshape", "Reshape", 5, [x, i64(0, -1)])
    case("flatten", "Flatten", 9, [x], axis=2)
    # Broadcasting was one-sided, the slope of PRelu one a channel.
    case("prelu", "PRelu", 7, [image, normal(2, 1, 1)])
    case("gemm", "Gemm", 9, [normal(3, 4), normal(5, 4), normal(5)], transB=1, alpha=0.5, beta=2.0)
    case("batchnorm", "BatchNormalization", 9, [image, normal(2), normal(2), normal(2), np.abs(normal(2)) + 0.1])
    case("instancenorm", "InstanceNormalization", 6, [image, normal(2), normal(2)])
    # Resizing in the ways of its time: asymmetric coordinates, rounded down.
    case("upsample", "Upsample", 9, [image, f32(1, 1, 2, 3)])
    case("upsample_linear", "Upsample", 9, [image, f32(1, 1, 2, 1.6)], mode="linear")
    case("upsample", "Upsample", 7, [image], scales=[1.0, 1.0, 2.0, 2.0])
    case("resize", "Resize", 10, [image, f32(1, 1, 1.7, 0.6)])
    case("resize_linear", "Resize", 10, [image, f32(1, 1, 1.7, 2)], mode="linear")
    roi = np.zeros(0, np.float32)
    for mode in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"):
        for kind in ("nearest", "linear", "cubic"):
            # ONNX Runtime and the reference evaluator disagree about corners where the size is no whole number.
            scales = f32(1, 1, 2, 3) if mode == "align_corners" else f32(1, 1, 1.5, 2.3)
            case(f"resize_{kind}_{mode}", "Resize", 11, [image, roi, scales], mode=kind, coordinate_transformation_mode=mode)
            sizes = i64(1, 2, 3, 11)
            case(f"resize_{kind}_{mode}_sizes", "Resize", 13, [image, roi[:0], None, sizes], mode=kind,
                 coordinate_transformation_mode=mode)
    case("resize_floor_asymmetric", "Resize", 13, [image, None, f32(1, 1, 2, 2)], mode="nearest", nearest_mode="floor",
         coordinate_transformation_mode="asymmetric")
    # Windows.
    for count in (0, 1):
        case(f"averagepool_{count}", "AveragePool", 11, [image], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2],
             ceil_mode=1, count_include_pad=count)
        case(f"averagepool_uneven_{count}", "AveragePool", 10, [image], kernel_shape=[2, 3], pads=[0, 1, 1, 0],
             count_include_pad=count)
    case("maxpool", "MaxPool", 10, [image], kernel_shape=[3, 2], pads=[1, 0, 1, 1], strides=[2, 1], dilations=[1, 2])
    case("maxpool_same", "MaxPool", 8, [image], kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_LOWER")
    case("conv_same", "Conv", 11, [image, normal(3, 2, 3, 2)], strides=[2, 2], auto_pad="SAME_UPPER")
    case("conv_groups", "Conv", 11, [normal(1, 4, 6), normal(6, 2, 3), normal(6)], group=2, pads=[2, 0], dilations=[2])
    w = normal(2, 3, 3, 3)
    case("convtranspose", "ConvTranspose", 11, [image, w], strides=[2, 2], pads=[1, 0, 1, 1], output_padding=[1, 0])
    case("convtranspose_same", "ConvTranspose", 11, [image, w], strides=[2, 2], auto_pad="SAME_UPPER")
    case("convtranspose_shape", "ConvTranspose", 11, [image, w], strides=[2, 2], output_shape=[10, 15])
    case("lrn", "LRN", 1, [normal(1, 6, 3, 3)], size=5, alpha=0.3, beta=0.6, bias=1.5)
    case("lstm", "LSTM", 7, [normal(3, 2, 4), normal(2, 20, 4), normal(2, 20, 5), normal(2, 40)], hidden_size=5,
         direction="bidirectional")
    case("gru", "GRU", 7, [normal(3, 2, 4), normal(1, 15, 4), normal(1, 15, 5), normal(1, 30)], hidden_size=5,
         direction="reverse", linear_before_reset=1)
    case("gather", "Gather", 11, [x, np.array([[0, -1], [2, 1]], np.int64)], axis=2)
    case("where", "Where", 9, [normal(3, 1) > 0, x[0], normal(4)])
    case("einsum", "Einsum", 12, [normal(2, 3, 4), normal(2, 5, 4)], equation="b i d, b j d -> b i j")
    case("layernorm", "LayerNormalization", 17, [x, normal(3, 4), normal(3, 4)], axis=1)
    case("gridsample", "GridSample", 16, [image, np.tanh(normal(1, 3, 4, 2))], mode="bicubic", padding_mode="reflection")


if __name__ == "__main__":
    microsoft(Path(sys.argv[1]))
    older(Path(sys.argv[1]))
