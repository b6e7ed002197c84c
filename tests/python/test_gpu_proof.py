"""scripts/gpu-proof as far as a machine without a GPU goes: it claims nothing there, and what it times and prints works with
the CPU in the device's place."""

import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu-proof"
DISBACK = ROOT / "target" / "release" / "disback"


@pytest.fixture
def proof():
    loader = SourceFileLoader("gpu_proof", str(SCRIPT))
    module = module_from_spec(spec_from_loader("gpu_proof", loader))
    loader.exec_module(module)
    return module


def test_without_a_device_nothing_is_claimed(proof):
    if proof.has_device():
        pytest.skip("there is a device here")
    out = subprocess.run([sys.executable, SCRIPT], text=True, capture_output=True, timeout=600)
    assert out.returncode == 0
    assert "nothing was checked, nothing is claimed" in out.stdout and "ok" not in out.stdout.split()


def test_the_module_is_timed(proof):
    eager, graphed = proof.torch_calls(torch, "cpu", batch=2, calls=5)
    assert eager > 0 and graphed is None


def test_calls_that_lose_fall_short(proof, capsys):
    found = {"CUDA, IoBinding": 1.0, "CUDA graph, IoBinding": 0.5, "TensorRT, CUDA graph": "no such provider"}
    proof.compare_calls(found, 0.9, 0.6)
    told = [(what.split(";")[0], ok) for _, what, _, ok in proof.rows]
    assert told == [
        ("ONNX Runtime CUDA, IoBinding", False),
        ("ONNX Runtime CUDA graph, IoBinding", True),
        ("ONNX Runtime CUDA graph, IoBinding", True),
        ("ONNX Runtime TensorRT, CUDA graph", True),
    ]
    assert capsys.readouterr().out.count("FALLS SHORT") == 1
    proof.rows.clear()
    proof.compare_calls({"CUDA, IoBinding": "no such provider"}, 0.9, 0.6)
    assert [ok for *_, ok in proof.rows] == [False]


def test_a_student_is_called_in_every_way(proof, tmp_path):
    if not DISBACK.is_file():
        pytest.skip("the binary is not built")
    shape = ["batch", 1, 8, 8]
    graph = helper.make_graph(
        [helper.make_node("Mul", ["noise", "half"], ["sample"])], "student",
        [helper.make_tensor_value_info("noise", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("sample", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.float32(0.5), "half")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    for key, value in {"disback.student.method": "test", "disback.range": "[-1.0, 1.0]"}.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    student = tmp_path / "student.onnx"
    onnx.save(model, student)
    env = proof.environment()

    def disback(*words, expect=0):
        return subprocess.run([DISBACK, *map(str, words)], env=env, text=True, capture_output=True)

    ways = {"CPU": ["--seconds", "0.05"], **proof.CALLS}
    found = proof.student_calls(disback, student, tmp_path, batch=4, ways=ways)
    assert list(found) == list(ways) and found["CPU"] > 0
    assert onnx.load(tmp_path / "fixed.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_value == 4
    if not proof.has_device():
        # A provider that is not there is an error with its reason, never a time of the CPU.
        assert all("cuda" in found[name] or "tensorrt" in found[name] for name in proof.CALLS), found


def test_several_processes_are_compared_with_one(proof, tmp_path):
    if not DISBACK.is_file():
        pytest.skip("the binary is not built")
    args = SimpleNamespace(device="cpu", batch=2, steps=20)
    proof.process_rows(str(DISBACK), proof.environment(), tmp_path, args, 2)
    assert len(proof.rows) == 3, proof.rows
    part, what, apart, ok = proof.rows[0]
    # (On the CPU several processes end with the bytes of one.)
    assert part == "processes" and float(apart) == 0.0 and ok, proof.rows
