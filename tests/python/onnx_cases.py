"""Writes ONNX's operator cases as folders, as wheels up to 1.22 hold them: later ones have only the program that makes them.

    PYTHONPATH=folder-of-the-wheel python tests/python/onnx_cases.py FOLDER
"""

import sys
import warnings
from pathlib import Path

import onnx
from onnx import TensorProto, numpy_helper
from onnx.backend.test.loader import load_model_tests


def value(given, info):
    """One input or output as the message that the graph declares."""
    kind, name = info.type.WhichOneof("value"), info.name
    if kind == "map_type":
        return numpy_helper.from_dict(given, name)
    if kind == "sequence_type":
        return numpy_helper.from_list(given, name)
    if kind == "optional_type":
        return numpy_helper.from_optional(given, name)
    return given if isinstance(given, TensorProto) else numpy_helper.from_array(given, name)


def write(case, folder):
    """`model.onnx` and a folder of values for each data set."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(case.model.SerializeToString())
    graph = case.model.graph
    for k, values in enumerate(case.data_sets):
        place = folder / f"test_data_set_{k}"
        place.mkdir(exist_ok=True)
        for prefix, infos, given in zip(("input", "output"), (graph.input, graph.output), values):
            for i, (info, one) in enumerate(zip(infos, given)):
                (place / f"{prefix}_{i}.pb").write_bytes(value(one, info).SerializeToString())


def main(out):
    warnings.filterwarnings("ignore")
    cases = load_model_tests(kind="node")
    for case in cases:
        write(case, out / case.name)
    print(f"onnx {onnx.__version__}: {len(cases)} operator cases in {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
