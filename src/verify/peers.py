"""A student in a runtime that Python brings; called by `disback verify`, not by people.

    checker MODEL                          ONNX's checker, full_check
    openvino|opencv MODEL INPUTS.npz OUT.npy

The last line of standard output is a JSON object: {"absent": true}, {"version": ..., "error": ...} or {"version": ...}.
"""

import json
import sys


def checker(model):
    import onnx

    onnx.checker.check_model(model, full_check=True)
    return onnx.__version__


def openvino(model, inputs):
    import openvino as ov

    core = ov.Core()
    # By default the CPU plug-in may choose bf16: the question here is the file, not the processor.
    compiled = core.compile_model(core.read_model(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(inputs)["sample"]


def opencv(model, inputs):
    import cv2

    net = cv2.dnn.readNetFromONNX(model, cv2.dnn.ENGINE_NEW) if hasattr(cv2.dnn, "ENGINE_NEW") else cv2.dnn.readNetFromONNX(model)
    if net.empty():
        raise RuntimeError("the file is not taken")
    for name, value in inputs.items():
        net.setInput(value, name)
    return net.forward("sample")


def main():
    what, model, *rest = sys.argv[1:]
    module = {"checker": "onnx", "openvino": "openvino", "opencv": "cv2"}[what]
    try:
        version = __import__(module).__version__.split("-")[0]
    except ImportError:
        print(json.dumps({"absent": True}))
        return
    try:
        if what == "checker":
            checker(model)
        else:
            import numpy as np

            inputs, out = rest
            result = {"openvino": openvino, "opencv": opencv}[what](model, dict(np.load(inputs)))
            np.save(out, np.asarray(result, dtype=np.float32))
        print(json.dumps({"version": version}))
    except Exception as e:  # noqa: BLE001: whatever a runtime throws is its answer
        print(json.dumps({"version": version, "error": " ".join(str(e).split())[:400]}))


main()
