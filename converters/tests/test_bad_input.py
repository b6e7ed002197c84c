"""What every route shares: names of weights, refusals in words, and never a partial file."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_model
import torch
from onnx import TensorProto, helper, numpy_helper
from proof import ROOT

from disback_convert import finish, weights
from disback_convert.cli import main
from disback_convert.weights import Weight

CARD = [
    "sample=x", "time=sigma", "output=denoised", "prediction=denoised", "time_unit=sigma", "shape=[1, 8, 8]",
    "schedule.kind=edm", "conditions.labels.kind=class-index", "conditions.labels.classes=4",
]  # fmt: skip


def words(out):
    return ["torch", "tiny_model:build", *(w for entry in CARD for w in ("--card", entry)), "-o", str(out)]


@pytest.mark.parametrize(
    ("route", "source", "module", "extra"),
    [
        ("torch", "tiny_model:build", "torch", "torch"),
        ("edm", "net.pkl", "torch", "torch"),
        ("diffusers", ".", "diffusers", "diffusers"),
        ("jax", "m:f", "jax", "jax"),
        ("keras", "m:f", "keras", "keras"),
        ("paddle", "m:f", "paddle", "paddle"),
    ],
)
def test_a_missing_framework_names_the_pip_install(tmp_path, route, source, module, extra):
    # a process of its own, in which the framework cannot be imported
    code = f"import sys; sys.modules[{module!r}] = None; from disback_convert.cli import main; sys.exit(main(sys.argv[1:]))"
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    done = subprocess.run(
        [sys.executable, "-c", code, route, source, "-o", "teacher.onnx"], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT / "converters"), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert f"pip install 'disback[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "teacher.onnx").exists()


def test_no_space_left_is_said_beforehand(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finish.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    assert main(words(tmp_path / "teacher.onnx")) == 1
    assert f"no space left in {tmp_path}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    # no file of this process may grow above 3000 bytes: the write itself fails, as on a full disk
    code = (
        "import resource, signal, sys; import torch, onnxscript, disback_convert.finish; from disback_convert.cli import main; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); sys.exit(main(sys.argv[1:]))"
    )
    here = Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, "-c", code, *words(tmp_path / "teacher.onnx")], cwd=here, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "converters")},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "nothing was written" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_conversion_that_is_killed_leaves_nothing_behind(tmp_path, number):
    # it waits where the exported file lies ready beside its place
    code = (
        "import signal, sys, time; import disback_convert.finish as finish; from disback_convert.cli import main; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # which a shell's background jobs ignore
        "finish.agree = lambda *a: (print('ready', flush=True), time.sleep(60)); sys.exit(main(sys.argv[1:]))"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code, *words(tmp_path / "teacher.onnx"), "-q"], cwd=Path(__file__).resolve().parent, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT / "converters")},
    )  # fmt: skip
    assert run.stdout.readline() == "ready\n", run.stderr.read()
    (inside,) = tmp_path.iterdir()
    assert inside.name.startswith(finish.SCRATCH) and (inside / "teacher.onnx").stat().st_size > 1000
    # a second conversion beside it does not touch what a living one works on
    finish.sweep(tmp_path)
    assert (inside / "teacher.onnx").exists()
    run.send_signal(number)
    _, said = run.communicate()
    if number == signal.SIGKILL:
        assert [p.name for p in tmp_path.iterdir()] == [inside.name], "nothing that could be taken for a result"
        finish.sweep(tmp_path)
    else:
        assert run.returncode == 128 + number
        assert said == "error: stopped; no unfinished file is left\n"
    assert list(tmp_path.iterdir()) == []


def test_a_graph_is_never_left_beside_weights_of_another(tmp_path, monkeypatch):
    made = tmp_path / "made"
    made.mkdir()
    for name in ("teacher.onnx", "teacher.onnx.data"):
        (tmp_path / name).write_text("old")
        (made / name).write_text("new")
    moves = []
    replace = os.replace
    monkeypatch.setattr(finish.os, "replace", lambda a, b: (moves.append(sorted(p.name for p in tmp_path.glob("teacher*"))), replace(a, b)))
    finish.place([made / "teacher.onnx.data", made / "teacher.onnx"], tmp_path)
    assert moves == [[], ["teacher.onnx.data"]]
    (made / "teacher.onnx").write_text("small")
    finish.place([made / "teacher.onnx"], tmp_path)
    assert sorted(p.name for p in tmp_path.glob("teacher*")) == ["teacher.onnx"]


def test_an_absent_folder_is_made_and_goes_again_with_a_refusal(tmp_path, capsys):
    wrong = [w.replace("[1, 8, 8]", "[3, 8, 8]") for w in words(tmp_path / "absent" / "deep" / "teacher.onnx")]
    assert main(wrong) == 1 and list(tmp_path.iterdir()) == []
    assert main(words(tmp_path / "absent" / "deep" / "teacher.onnx")) == 0
    assert (tmp_path / "absent/deep/teacher.onnx").is_file()
    (tmp_path / "file").touch()
    assert main(words(tmp_path / "file" / "teacher.onnx")) == 1
    assert f"{tmp_path}/file: cannot be made" in capsys.readouterr().err


def test_a_card_of_another_shape_is_one_message(tmp_path, capsys):
    wrong = [w.replace("[1, 8, 8]", "[3, 8, 8]") for w in words(tmp_path / "teacher.onnx")]
    assert main(wrong) == 1
    said = capsys.readouterr().err
    assert "x float32 [2, 3, 8, 8]" in said and "The shapes are the card's" in said
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_answers_twice_differently_is_refused(tmp_path, capsys, monkeypatch):
    noisy = tiny_model.build()
    noisy.register_forward_hook(lambda module, given, made: made + torch.rand(()))
    monkeypatch.setattr(tiny_model, "build", lambda: noisy)
    assert main(words(tmp_path / "teacher.onnx")) == 1
    assert "dropout" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def model_of(arrays):
    """A graph that adds up arrays, as initializers under an exporter's own names."""
    nodes = [helper.make_node("Add", ["x" if k == 0 else f"s{k - 1}", f"val_{k}"], [f"s{k}"]) for k in range(len(arrays))]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, ["n"])], [value(f"s{len(arrays) - 1}", TensorProto.FLOAT, ["n"])],
        [numpy_helper.from_array(array, f"val_{k}") for k, array in enumerate(arrays)],
    )  # fmt: skip
    return helper.make_model(graph)


def held(name, array):
    store = {"value": array}
    return Weight(name, lambda: store["value"], lambda new: store.update(value=new))


def test_weights_are_found_again_transposed_reshaped_and_after_having_been_equal(tmp_path):
    random = np.random.default_rng(0)
    linear, kernel = random.standard_normal((3, 5)).astype("f4"), random.standard_normal((3, 3, 2, 4)).astype("f4")
    own = [held("a.kernel", linear), held("b.kernel", kernel), held("n1.scale", np.ones(4, "f4")), held("n2.scale", np.ones(4, "f4"))]
    with weights.told_apart(own) as changed:
        assert set(changed) == {"n1.scale", "n2.scale"}
        shown = [np.array(w.get()) for w in own]
        assert not np.array_equal(shown[2], shown[3])
        model = model_of([shown[0].T, shown[1].transpose(3, 2, 0, 1), shown[2].reshape(4, 1, 1), shown[3], random.random(7).astype("f4")])
    named = weights.name(model, tmp_path, own, changed)
    found = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert named.parameters == ["a.kernel", "b.kernel", "n1.scale", "n2.scale"] and named.unknown == ["val_4"]
    assert np.array_equal(found["a.kernel"], linear.T) and np.array_equal(found["b.kernel"], kernel.transpose(3, 2, 0, 1))
    assert found["n1.scale"].shape == (4, 1, 1) and (found["n1.scale"] == 1).all() and (found["n2.scale"] == 1).all()
    assert (own[2].get() == 1).all()
    assert [node.input[1] for node in model.graph.node][:2] == ["a.kernel", "b.kernel"]
    assert {p.key: p.value for p in model.graph.node[0].metadata_props} == {"namespace": "a"}
    onnx.checker.check_model(model)


def test_tied_weights_stay_one_and_are_written_down(tmp_path):
    from disback_convert.torch_route.export import weights as weights_of

    net = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    net[1].weight = net[0].weight
    (one,) = weights_of(net)
    assert (one.name, one.aliases) == ("0.weight", ["1.weight"])
    named = weights.name(model_of([one.get().T]), tmp_path, [one], {})
    assert named.tied == [["0.weight", "1.weight"]]


@pytest.mark.parametrize("form", [lambda w: w.T, lambda w: w, lambda w: w.reshape(1, 12), lambda w: w.T.reshape(2, 6)])
def test_a_weight_that_the_exporter_stored_twice_is_one_again(tmp_path, form):
    # an embedding that the last layer shares, folded into two constants
    own = held("embedding", np.random.default_rng(0).standard_normal((3, 4)).astype("f4"))
    second = np.ascontiguousarray(form(own.get()))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Identity", ["first"], ["a"]), helper.make_node("Add", ["second", "x"], ["b"])], "g",
        [value("x", TensorProto.FLOAT, second.shape)], [value("a", TensorProto.FLOAT, [3, 4]), value("b", TensorProto.FLOAT, second.shape)],
        [numpy_helper.from_array(own.get(), "first"), numpy_helper.from_array(second, "second")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    named = weights.name(model, tmp_path, [own], {})
    assert named.parameters == ["embedding"]
    assert [t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT] == ["embedding"]
    onnx.checker.check_model(model, full_check=True)
    made = finish.ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": np.zeros_like(second)})
    assert np.array_equal(made[0], own.get()) and np.array_equal(made[1], second)


def test_equal_weights_in_a_saved_file_stay_two(tmp_path):
    own = [held("norm1.scale", np.ones(4, "f4")), held("norm2.scale", np.ones(4, "f4"))]
    model = model_of([np.ones(4, "f4"), np.ones(4, "f4"), np.ones(4, "f4")])
    named = weights.name(model, tmp_path, own, {})
    assert named.parameters == ["norm1.scale", "norm2.scale"]
    assert [t.name for t in model.graph.initializer] == ["norm1.scale", "norm2.scale", "val_2"]
