"""Operators that `export --fuse` writes, beside the chains that PyTorch's exporters write for them, in ONNX Runtime.

    OMP_NUM_THREADS=1 .venv/bin/python benches/fused_operators.py

One thread; chain and operator alternate, medians of ROUNDS calls. Prints rows for RESULTS.md and how far the two outputs are apart.
"""
import time

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, checker, helper, numpy_helper

ROUNDS = 36
OPSET = 23


class Graph:
    """A small graph under construction."""

    def __init__(self):
        self.nodes, self.weights = [], []

    def constant(self, value):
        name = f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def number(self, value):
        return self.constant(np.float32(value))

    def __call__(self, op, *inputs, **attributes):
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def session(self, inputs, result):
        floats = [helper.make_tensor_value_info(n, TensorProto.FLOAT, v.shape) for n, v in inputs.items()]
        out = helper.make_tensor_value_info(result, TensorProto.FLOAT, next(iter(inputs.values())).shape)
        graph = helper.make_graph(self.nodes, "g", floats, [out], self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=11)
        checker.check_model(model)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def affine(shape):
    return [np.random.randn(*shape).astype("f4") for _ in range(2)]


def group_norm(shape, groups=32):
    c = shape[1]
    scale, bias = affine([c])

    def chain(g):
        folded = g("Reshape", "x", g.constant(np.array([0, groups, -1])))
        ones, zeros = g.constant(np.ones(groups, "f4")), g.constant(np.zeros(groups, "f4"))
        normal = g("InstanceNormalization", folded, ones, zeros, epsilon=1e-5)
        back = g("Reshape", normal, g.constant(np.array(shape)))
        scaled = g("Mul", back, g.constant(scale.reshape(c, 1, 1)))
        return g("Add", scaled, g.constant(bias.reshape(c, 1, 1)))

    def operator(g):
        return g("GroupNormalization", "x", g.constant(scale), g.constant(bias), num_groups=groups, epsilon=1e-5)

    return "GroupNormalization", {"x": shape}, chain, operator


def layer_norm(shape):
    scale, bias = affine([shape[-1]])

    def chain(g):
        axis = g.constant(np.array([-1]))
        centred = g("Sub", "x", g("ReduceMean", "x", axis))
        variance = g("ReduceMean", g("Mul", centred, centred), axis)
        normal = g("Div", centred, g("Sqrt", g("Add", variance, g.number(1e-5))))
        return g("Add", g("Mul", normal, g.constant(scale)), g.constant(bias))

    def operator(g):
        return g("LayerNormalization", "x", g.constant(scale), g.constant(bias), axis=-1, epsilon=1e-5)

    return "LayerNormalization", {"x": shape}, chain, operator


def gelu(shape):
    def chain(g):
        error = g("Erf", g("Div", "x", g.number(2**0.5)))
        return g("Mul", g("Mul", "x", g("Add", error, g.number(1))), g.number(0.5))

    return "Gelu", {"x": shape}, chain, lambda g: g("Gelu", "x")


def gelu_tanh(shape):
    def chain(g):
        cube = g("Mul", g("Mul", "x", "x"), "x")
        inner = g("Mul", g("Add", "x", g("Mul", cube, g.number(0.044715))), g.number((2 / np.pi) ** 0.5))
        return g("Mul", g("Mul", "x", g.number(0.5)), g("Add", g("Tanh", inner), g.number(1)))

    return "Gelu by tanh", {"x": shape}, chain, lambda g: g("Gelu", "x", approximate="tanh")


def gelu_tanh_written(shape):
    """The exporters' chain beside the one that `export` writes in its place, each with a Neg behind it: what a graph gives out is not joined."""

    def chain(g):
        cube = g("Mul", g("Mul", "x", "x"), "x")
        inner = g("Mul", g("Add", "x", g("Mul", cube, g.number(0.044715))), g.number((2 / np.pi) ** 0.5))
        return g("Neg", g("Mul", g("Mul", "x", g("Add", g("Tanh", inner), g.number(1))), g.number(0.5)))

    def written(g):
        bracket = g("Add", g("Mul", g("Mul", "x", g.number(0.044715)), "x"), g.number(1))
        inner = g("Mul", g("Mul", "x", g.number((2 / np.pi) ** 0.5)), bracket)
        return g("Neg", g("Mul", g("Mul", "x", g.number(0.5)), g("Add", g("Tanh", inner), g.number(1))))

    return "Gelu by tanh, the chain as `export` writes it", {"x": shape}, chain, written


def attention(shape):
    root = shape[-1] ** -0.25

    def chain(g):
        keys = g("Transpose", g("Mul", "k", g.number(root)), perm=[0, 1, 3, 2])
        scores = g("MatMul", g("Mul", "q", g.number(root)), keys)
        return g("MatMul", g("Softmax", scores, axis=-1), "v")

    return "Attention", {"q": shape, "k": shape, "v": shape}, chain, lambda g: g("Attention", "q", "k", "v")


def main():
    np.random.seed(0)
    print(f"ONNX Runtime {ort.__version__}\n\n| chain, shape | chain ms | operator ms | apart |\n|---|---|---|---|")
    cases = [
        group_norm([16, 64, 32, 32]),
        group_norm([1, 320, 64, 64]),
        layer_norm([16, 256, 384]),
        gelu([16, 256, 384]),
        gelu_tanh([16, 256, 384]),
        gelu_tanh_written([16, 256, 384]),
        attention([2, 8, 1024, 40]),
    ]
    for name, shapes, *forms in cases:
        inputs = {n: np.random.randn(*s).astype("f4") for n, s in shapes.items()}
        sessions = []
        for form in forms:
            g = Graph()
            sessions.append(g.session(inputs, form(g)))
        (a,), (b,) = (s.run(None, inputs) for s in sessions)
        taken = [[], []]
        for _ in range(ROUNDS + 3):
            for session, times in zip(sessions, taken):
                began = time.perf_counter()
                session.run(None, inputs)
                times.append(1e3 * (time.perf_counter() - began))
        chain, operator = (np.median(times[3:]) for times in taken)
        shape = " x ".join(map(str, next(iter(shapes.values()))))
        print(f"| {name}, {shape} | {chain:.3f} | {operator:.3f} | {np.abs(a - b).max():.0e} |", flush=True)


if __name__ == "__main__":
    main()
