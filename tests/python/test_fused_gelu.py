"""Gelu by tanh in a student is one kernel of ONNX Runtime, whichever exporter wrote the teacher."""

import collections
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/python"))
from ship_networks import Dit, randomise, write  # noqa: E402

PROGRAM = ROOT / "target/release/disback"
BLOCKS = 3


def kernels(path, folder):
    """Operators of the graph as ONNX Runtime runs it, and the session."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    session = ort.InferenceSession(path, options)
    return collections.Counter(n.op_type for n in onnx.load(folder / "optimised.onnx").graph.node), session


def teacher(path):
    card = {
        "sample": '"sample"', "time": '"timestep"', "output": '"velocity"', "prediction": '"flow"', "time_unit": '"thousand"',
        "shape": "[4, 16, 16]", "schedule.kind": '"flow"',
        "conditions.label.kind": '"class-index"', "conditions.label.classes": "10",
    }  # fmt: skip
    args = (torch.randn(3, 4, 16, 16), torch.tensor([100.0, 500.0, 900.0]), torch.arange(3))
    names = ["sample", "timestep", "label"]
    write(path, randomise(Dit(depth=BLOCKS), 2), args, names, "velocity", card, opset=17, dynamo=False)


@pytest.mark.skipif(not PROGRAM.exists(), reason="the program is not built")
def test_gelu_by_tanh_is_one_kernel(tmp_path):
    (tmp_path / "in").mkdir()
    teacher(tmp_path / "in/teacher.onnx")
    line = [PROGRAM, "distill", tmp_path / "in/teacher.onnx", "-o", tmp_path / "run", "--nodes", "0", "--updates", "1", "--batch", "2"]
    subprocess.run([*line, "--threads", "1", "--quiet", "--set", "log.samples=0"], check=True)
    plain = tmp_path / "plain.onnx"
    subprocess.run([PROGRAM, "export", tmp_path / "run/student.onnx", "--fuse", "none", "-o", plain, "--quiet"], check=True)
    # What the exporter wrote is many kernels, so that the comparison says something.
    teachers, _ = kernels(tmp_path / "in/teacher.onnx", tmp_path)
    students, session = kernels(tmp_path / "run/student.onnx", tmp_path)
    assert teachers["Tanh"] == BLOCKS and teachers["FastGelu"] == 0
    assert students["Tanh"] == 0 and students["FastGelu"] == BLOCKS, students
    feeds = {"noise": np.random.default_rng(1).standard_normal((4, 4, 16, 16)).astype("f4"), "label": np.arange(4)}
    (made,) = session.run(None, feeds)
    (expected,) = ort.InferenceSession(plain).run(None, feeds)
    assert np.abs(made - expected).max() < 1e-5 * np.abs(expected).max()
