"""`import disback`: its doctests, examples/notebook.ipynb as written, the numbers of `disback sample`, and errors as exceptions."""

import doctest
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "converters"))
os.environ.setdefault("DISBACK", str(ROOT / "target/release/disback"))
DISBACK = os.environ["DISBACK"]
DIGITS = ROOT / "examples/digits"

import disback  # noqa: E402
from disback import launch, program, runs, student as students  # noqa: E402


@pytest.mark.parametrize("module", [launch, program, runs, students], ids=lambda m: m.__name__)
def test_what_the_docstrings_show_is_so(module):
    found = doctest.testmod(module)
    assert found.attempted > 0 and found.failed == 0, found


def test_the_public_names_are_there_and_a_wrong_one_is_an_attribute_error():
    assert all(hasattr(disback, name) for name in disback.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        disback.nothing


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """The names that the notebook's cells leave, run in order with few updates."""
    folder = tmp_path_factory.mktemp("notebook")
    before = dict(os.environ)
    os.environ.update(DIGITS=str(DIGITS), RUNS=str(folder), UPDATES="20", OMP_NUM_THREADS="1")
    names = {}
    try:
        for cell in json.loads((ROOT / "examples/notebook.ipynb").read_text())["cells"]:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), "notebook.ipynb", "exec"), names)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return names


def test_the_notebook_runs_as_written(notebook):
    assert notebook["found"]["card"]
    assert notebook["images"].shape == (100, 1, 8, 8) and np.abs(notebook["images"]).max() < 4
    assert notebook["measured"]["frechet"] > 0
    # Rows came while the run went on, each once; the file has no others.
    rows = notebook["run"].rows
    assert [r["mismatch"] for r in rows if r["mismatch"] is not None] == [m for _, _, m in notebook["mismatch"]] != []


def test_a_student_makes_the_samples_of_the_command(notebook, tmp_path):
    out = tmp_path / "command.npy"
    subprocess.run([DISBACK, "sample", notebook["run"].student, "-n", "7", "--seed", "5", "-o", out, "--quiet"], check=True)
    ours = notebook["student"](n=7, seed=5)
    np.testing.assert_allclose(ours, np.load(out), atol=1e-5)
    # Whatever the batch, and from any sample on.
    np.testing.assert_allclose(notebook["student"](n=4, seed=5, start=3, batch=3), ours[3:], atol=1e-5)
    with pytest.raises(ValueError, match="classes 0 to 9"):
        notebook["student"](labels=[10])
    with pytest.raises(ValueError, match="wants rows for"):
        notebook["student"](conditions={"text": np.zeros((1, 4))})


def halved(path, fixed=None, extra=()):
    """A student that gives half its noise, and the one-hot row and the embedding that it was given after it."""
    batch = fixed or "batch"
    value = lambda name, *shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, *shape])  # noqa: E731
    nodes = [helper.make_node("Mul", ["noise", "half"], ["scaled"]), helper.make_node("Concat", ["scaled", *extra], ["sample"], axis=1)]
    half = helper.make_tensor("half", TensorProto.FLOAT, [], [0.5])
    sizes = {"label": 4, "text": 2}
    inputs = [value("noise", 3), *(value(name, sizes[name]) for name in extra)]
    outputs = [value("sample", 3 + sum(sizes[name] for name in extra))]
    model = helper.make_model(helper.make_graph(nodes, "half", inputs, outputs, [half]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    consumer = {
        "inputs": [{"name": "noise"}, *({"name": n, "distribution": "one-hot class", "classes": 4} if n == "label" else {"name": n, "distribution": "embedding"} for n in extra)],
        "outputs": [{"name": "sample", "range": None}],
        "seed_convention": students.SEED_CONVENTION,
    }
    entries = {"student.method": "disback", "shape": "[3]", "consumer": json.dumps(consumer)}
    entries |= {"conditions.label.kind": "one-hot", "conditions.label.classes": "4", "conditions.text.kind": "embedding"} if extra else {}
    helper.set_model_props(model, {f"disback.{key}": text for key, text in entries.items()})
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("fixed", [None, 5])
def test_noise_classes_and_rows_are_the_command_s_bit_for_bit(tmp_path, fixed):
    path = halved(tmp_path / "s.onnx", fixed, ("label", "text"))
    text = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.save(tmp_path / "text.npy", text)
    words = ["-n", "303", "--seed", str(2**63 + 11), "--condition", f"text={tmp_path}/text.npy", "--batch", "64", "--quiet"]
    subprocess.run([DISBACK, "sample", path, "-o", tmp_path / "out.npy", *words], check=True)
    ours = disback.Student(path)(n=303, seed=2**63 + 11, conditions={"text": text})
    assert ours.dtype == np.float32 and np.array_equal(ours, np.load(tmp_path / "out.npy"))


def test_a_file_that_is_no_student_is_refused():
    with pytest.raises(ValueError, match="not a student"):
        disback.Student(DIGITS / "teacher.onnx")


def test_a_module_becomes_a_teacher_and_a_student_s_weights_go_back_into_it(tmp_path):
    sys.path.insert(0, str(ROOT / "converters/tests"))
    import tiny_model
    import torch

    module, inputs = tiny_model.build_with_inputs()
    card = {"sample": "x", "time": "sigma", "prediction": "denoised", "time_unit": "sigma", "shape": [1, 8, 8], "range": [-1.0, 1.0],
            "schedule": {"kind": "edm"}, "conditions": {"labels": {"kind": "class-index", "classes": 4}}}  # fmt: skip
    made = disback.convert(module, inputs, card, tmp_path / "teacher.onnx")
    assert made["max_relative_difference"] < 1e-4
    assert disback.inspect(tmp_path / "teacher.onnx")["card"]
    with pytest.raises(disback.DisbackError, match="prediction"):
        disback.convert(module, inputs, card | {"prediction": "guess"}, tmp_path / "other.onnx")
    few = {"batch": 4, "threads": 1, "device": "cpu", "degrade": {"nodes": 1, "steps": 2}, "backtrack": {"updates": 2}, "log": {"samples": 0}}
    run = disback.distill(tmp_path / "teacher.onnx", tmp_path / "run", progress=False, **few)
    student, fresh = run.load(), tiny_model.build()
    assert disback.load_student(run, fresh) is fresh
    before = dict(module.named_parameters())
    assert all(not torch.equal(p, before[n]) for n, p in fresh.named_parameters())
    # One call at the noise level where the student starts is the student, which keeps to its range.
    z, sigma = students.noise([1, 8, 8], seed=3, count=6), float(student.metadata["student.sigma_init"])
    with torch.no_grad():
        ours = fresh(torch.from_numpy(z) * sigma, torch.full((6,), sigma), torch.arange(6) % 4).numpy()
    np.testing.assert_allclose(np.clip(ours, -1, 1), student(n=6, seed=3, labels=range(4)), atol=1e-4)
    with pytest.raises(disback.DisbackError, match="(?s)does not fit the module.*help"):
        disback.load_student(run, torch.nn.Linear(2, 2))
    with pytest.raises(disback.DisbackError, match="has not finished"):
        disback.load_student(tmp_path / "nowhere", torch.nn.Linear(2, 2))


def test_refusals_are_exceptions_with_the_program_s_words(tmp_path):
    with pytest.raises(disback.DisbackError, match="nowhere.onnx"):
        disback.inspect(tmp_path / "nowhere.onnx")
    with pytest.raises(disback.UsageError, match="(?s)backtrack.updats.*nearest known key is `backtrack.updates`") as caught:
        disback.distill(DIGITS / "teacher.onnx", tmp_path / "run", backtrack={"updats": 3})
    assert caught.value.exit_code == 2 and not (tmp_path / "run").exists()


def test_what_on_row_raises_stops_the_run_with_a_checkpoint_and_it_goes_on(tmp_path):
    few = {"config": DIGITS / "demo.toml", "batch": 8, "threads": 1, "degrade": {"steps": 20, "nodes": 1}, "backtrack": {"updates": 10},
           "log": {"every": 2, "samples": 0}, "progress": False}  # fmt: skip
    seen = []

    def stop(row):
        seen.append(row)
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        disback.distill(DIGITS / "teacher.onnx", tmp_path / "run", on_row=stop, **few)
    run = disback.distill(DIGITS / "teacher.onnx", tmp_path / "run", on_row=seen.append, **few)
    keys = [(r["stage"], r["iteration"]) for r in seen]
    assert len(set(keys)) == len(keys) and keys[-1] == ("backtrack", run.rows[-1]["iteration"])
    assert run.student.is_file()


def test_one_version_and_one_licence_everywhere():
    crate = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]
    convert = tomllib.loads((ROOT / "converters/pyproject.toml").read_text())["project"]
    import disback_convert

    cited = (ROOT / "CITATION.cff").read_text()
    versions = {crate["version"], convert["version"], disback.__version__, disback_convert.VERSION, re.search(r"^version: (\S+)", cited, re.M)[1]}
    licences = {crate["license"], convert["license"]["text"], re.search(r"^license: (\S+)", cited, re.M)[1]}
    assert len(versions) == 1 and licences == {"MIT"}, (versions, licences)
