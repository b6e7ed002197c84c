"""Generators of digits-like samples with architectures of their own and weights at random, as ONNX.

    student_networks.py FOLDER    writes mlp.onnx, channels_last.onnx, square.onnx, timed.onnx, unconditional.onnx
"""

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

F, I = TensorProto.FLOAT, TensorProto.INT64


def save(folder, name, nodes, inputs, output, weights):
    values = [helper.make_tensor_value_info(n, kind, ["batch", *row]) for n, kind, row in inputs]
    result = helper.make_tensor_value_info(output[0], F, ["batch", *output[1]])
    initializers = [numpy_helper.from_array(np.asarray(w), n) for n, w in weights.items()]
    graph = helper.make_graph(nodes, "generator", values, [result], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / name)


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(7)
    normal = lambda *shape: (draw.standard_normal(shape) / np.sqrt(shape[-1])).astype("f4")
    node = helper.make_node

    # Noise of a length of its own; classes by number; names that are nobody's.
    mlp = {
        "table": draw.standard_normal((10, 16)).astype("f4"),
        "w1": normal(64, 16), "b1": np.zeros(64, "f4"), "w2": normal(64, 64), "b2": np.zeros(64, "f4"),
        "size": np.array([-1, 1, 8, 8]),
    }

    def layers(first, size="size"):
        return [
            node("Gemm", [first, "w1", "b1"], ["h"], transB=1),
            node("Relu", ["h"], ["r"]),
            node("Gemm", ["r", "w2", "b2"], ["o"], transB=1),
            node("Reshape", ["o", size], ["square"]),
            node("Tanh", ["square"], ["image"]),
        ]

    classes = [node("Gather", ["table", "y"], ["e"]), node("Add", ["z", "e"], ["first"])]
    z, y, image = ("z", F, [16]), ("y", I, []), ("image", [1, 8, 8])
    save(folder, "mlp.onnx", classes + layers("first"), [z, y], image, mlp)
    plain = {k: w for k, w in mlp.items() if k != "table"}
    save(folder, "unconditional.onnx", layers("z"), [z], image, plain)
    square = {**mlp, "size": np.array([-1, 4, 4, 4])}
    save(folder, "square.onnx", classes + layers("first"), [z, y], ("image", [4, 4, 4]), square)
    timed = [*classes, node("Unsqueeze", ["t", "one"], ["column"]), node("Add", ["first", "column"], ["late"])]
    save(folder, "timed.onnx", timed + layers("late"), [z, y, ("t", F, [])], image, {**mlp, "one": np.array([1])})

    # Channels last, the class as a one-hot row, `sample` taken by a value inside.
    convolutions = {
        "classes": normal(10, 64), "size": np.array([-1, 8, 8, 1]),
        "k1": (draw.standard_normal((8, 1, 3, 3)) / 3).astype("f4"), "c1": np.zeros(8, "f4"),
        "k2": (draw.standard_normal((1, 8, 3, 3)) / 9).astype("f4"), "c2": np.zeros(1, "f4"),
    }
    nodes = [
        node("MatMul", ["class", "classes"], ["flat"]),
        node("Reshape", ["flat", "size"], ["plane"]),
        node("Add", ["noise", "plane"], ["sample"]),
        node("Transpose", ["sample"], ["nchw"], perm=[0, 3, 1, 2]),
        node("Conv", ["nchw", "k1", "c1"], ["h"], pads=[1, 1, 1, 1]),
        node("LeakyRelu", ["h"], ["r"], alpha=0.1),
        node("Conv", ["r", "k2", "c2"], ["o"], pads=[1, 1, 1, 1]),
        node("Transpose", ["o"], ["made"], perm=[0, 2, 3, 1]),
    ]
    inputs = [("noise", F, [8, 8, 1]), ("class", F, [10])]
    save(folder, "channels_last.onnx", nodes, inputs, ("made", [8, 8, 1]), convolutions)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
