"""seeds.py OUT: small valid models to start from: ONNX's operator cases, and the digits teacher with all weights but the
small ones made by ConstantOfShape."""

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

LARGEST = 16384


def slim(model):
    """The same graph without the bytes of its larger weights."""
    graph = model.graph
    nodes, kept = [], []
    for t in graph.initializer:
        if np.prod(t.dims) <= 64 or t.data_type != onnx.TensorProto.FLOAT:
            kept.append(t)
            continue
        shape = numpy_helper.from_array(np.array(t.dims, np.int64), t.name + "_shape")
        kept.append(shape)
        value = numpy_helper.from_array(np.array([0.01], np.float32))
        nodes.append(helper.make_node("ConstantOfShape", [shape.name], [t.name], value=value))
    del graph.initializer[:], graph.value_info[:], model.metadata_props[:]
    graph.initializer.extend(kept)
    nodes.extend(graph.node)
    for n in nodes:
        del n.metadata_props[:]
        n.doc_string = ""
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def main():
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    cases = Path(onnx.__file__).parent / "backend/test/data/node"
    for case in sorted(cases.iterdir()):
        data = (case / "model.onnx").read_bytes()
        if len(data) <= LARGEST:
            (out / case.name).write_bytes(data)
    teacher = Path(__file__).resolve().parents[1] / "examples/digits/teacher.onnx"
    (out / "digits").write_bytes(slim(onnx.load(teacher)).SerializeToString())


if __name__ == "__main__":
    main()
