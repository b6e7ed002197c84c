"""What every route shares: names of weights, refusals in words, and never a partial file."""

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
    assert f"pip install 'disback-convert[{extra}]'" in done.stderr
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
    import os

    done = subprocess.run(
        [sys.executable, "-c", code, *words(tmp_path / "teacher.onnx")], cwd=here, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "converters")},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "nothing was written" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_absent_folder_is_named(tmp_path, capsys):
    assert main(words(tmp_path / "absent" / "teacher.onnx")) == 1
    assert "no such folder" in capsys.readouterr().err


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
