import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import tiny_model  # noqa: E402
from disback_convert import ConversionError, card, torch_route
from disback_convert.torch_route import export as torch_export  # noqa: E402
from disback_convert.cli import main  # noqa: E402

CARD = [
    "sample=x", "time=sigma", "output=denoised", "prediction=denoised", "time_unit=sigma", "shape=[1, 8, 8]", "range=[-1.0, 1.0]",
    "schedule.kind=edm", "schedule.sigma_max=80.0", "conditions.labels.kind=class-index", "conditions.labels.classes=4",
]  # fmt: skip


def command(out, *more, factory="tiny_model:build", entries=CARD):
    pairs = [word for entry in entries for word in ("--card", entry)]
    return main(["torch", factory, *pairs, "-o", str(out), *more])


def test_weights_card_and_dynamic_batch_arrive(tmp_path, capsys):
    torch.manual_seed(5)
    net = tiny_model.Tiny()
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    out = tmp_path / "teacher.onnx"
    assert command(out, "--state-dict", str(tmp_path / "weights.safetensors"), "--json") == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["parameters"] == sum(p.numel() for p in net.parameters())
    assert result["max_relative_difference"] <= 1e-4
    model = onnx.load(out)
    written = {entry.key: entry.value for entry in model.metadata_props}
    declared = json.loads(written.pop("disback.parameters"))
    assert sorted(declared) == sorted(name for name, _ in net.named_parameters())
    assert written.pop("disback.converter").startswith("disback-convert")
    assert written == {"disback." + k.split("=", 1)[0]: k.split("=", 1)[1] for k in CARD}
    # other weights than the factory's own, at a batch size that was not exported
    x, sigma, labels = torch.randn(7, 1, 8, 8), torch.rand(7) + 0.1, torch.arange(7) % 4
    runner = ort.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    (ours,) = runner.run(["denoised"], {"x": x.numpy(), "sigma": sigma.numpy(), "labels": labels.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(ours, net(x, sigma, labels).numpy(), atol=1e-5)
        assert np.abs(ours - tiny_model.build()(x, sigma, labels).numpy()).max() > 1e-2


def test_factory_may_bring_its_inputs(tmp_path):
    assert command(tmp_path / "teacher.onnx", factory="tiny_model:build_with_inputs") == 0
    assert [i.name for i in onnx.load(tmp_path / "teacher.onnx").graph.input] == ["x", "sigma", "labels"]


def test_card_file_is_overridden_by_the_command_line(tmp_path):
    (tmp_path / "card.toml").write_text('sample = "x"\n[schedule]\nkind = "edm"\nsigma_max = 40.0\n[conditions.labels]\nclasses = 4\n')
    merged = card.parse(["schedule.sigma_max=80.0", "conditions.labels.kind=class-index"], tmp_path / "card.toml")
    assert merged == {
        "sample": "x",
        "schedule.kind": "edm",
        "schedule.sigma_max": 80.0,
        "conditions.labels.classes": 4,
        "conditions.labels.kind": "class-index",
    }


def test_missing_and_surplus_keys_are_listed_and_nothing_is_written(tmp_path, capsys):
    state = tiny_model.build().state_dict()
    state["extra.weight"] = torch.zeros(2)
    del state["norm.bias"]
    state["conv_in.bias"] = torch.zeros(5)
    torch.save({"state_dict": state}, tmp_path / "weights.pt")
    assert command(tmp_path / "teacher.onnx", "--state-dict", str(tmp_path / "weights.pt")) == 1
    said = capsys.readouterr().err
    assert "missing (1): norm.bias" in said
    assert "surplus (1): extra.weight" in said
    assert "conv_in.bias [5] instead of [8]" in said
    assert [p.name for p in tmp_path.iterdir()] == ["weights.pt"]


def test_mismatch_between_the_file_and_torch_is_refused(tmp_path, monkeypatch, capsys):
    honest = torch.onnx.export

    def damaged(module, args, path, **more):
        honest(module, args, path, **more)
        model = onnx.load(path)
        weight = next(t for t in model.graph.initializer if t.name == "conv_out.bias")
        weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) + np.float32(0.01), weight.name))
        onnx.save(model, path)

    monkeypatch.setattr(torch.onnx, "export", damaged)
    assert command(tmp_path / "teacher.onnx") == 1
    assert "differs from torch" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([*CARD, "predicton=epsilon"], "did you mean 'prediction'"),
        ([*CARD, "conditions.labels.clases=4"], "did you mean 'conditions.labels.classes'"),
        ([e for e in CARD if not e.startswith("shape")], "shape missing"),
        ([*CARD, "prediction=noise"], "denoised, edm-raw, epsilon, v, flow, trigflow, scaled-score, consistency"),
        ([*CARD, "time=t"], "the graph has no input 't'"),
        ([e for e in CARD if not e.startswith("conditions")], "nothing said about the inputs labels"),
        ([*CARD, "shape=8"], "the dimensions of one sample"),
        ([*CARD, "nonsense"], "key=value"),
    ],
)
def test_bad_cards_are_refused(tmp_path, capsys, entries, words):
    assert command(tmp_path / "teacher.onnx", entries=entries, factory="tiny_model:build_with_inputs") == 1
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("tiny_model", "module:function"),
        ("no_such_module:build", "no_such_module"),
        ("tiny_model:absent", "absent"),
        ("tiny_model:not_a_module", "not a torch.nn.Module"),
        ("tiny_model:build_nan", "NaN"),
    ],
)
def test_bad_factories_are_refused(tmp_path, capsys, factory, words):
    assert command(tmp_path / "teacher.onnx", factory=factory) == 1
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_unreadable_weights_are_refused(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ConversionError, match="not a torch file"):
        torch_route.read_state(tmp_path / "weights.pt")
    with pytest.raises(ConversionError, match="no such file"):
        torch_route.read_state(tmp_path / "absent.pt")


@pytest.mark.parametrize("value", [3, 0.002, True, [1, 8, 8], [-1.0, 1.0], "edm", ["a", "b"]])
def test_metadata_text_reads_back(value):
    assert card.value_of(card.text_of(value)) == value


BARE = [entry for entry in CARD if not entry.startswith("conditions")]


def test_a_network_before_its_training_keeps_its_names_and_is_really_compared(tmp_path, capsys, monkeypatch):
    net = tiny_model.build_begun()
    made = lambda *more: command(tmp_path / "teacher", "--json", *more, factory="tiny_model:build_begun", entries=BARE)  # noqa: E731
    assert made() == 0, capsys.readouterr().err
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    # a name without a suffix gets one
    model = onnx.load(tmp_path / "teacher.onnx")
    declared = json.loads({entry.key: entry.value for entry in model.metadata_props}["disback.parameters"])
    unused = ["spare.bias", "spare.weight"]
    assert sorted(declared) == sorted({name for name, _ in net.named_parameters()} - set(unused))
    assert (sorted(result["unused"]), result["merged"], result["folded"]) == (unused, {}, [])
    # The outputs are zeros: what was compared are other weights of the last layer, with a real difference.
    assert result["compared_with_drawn_weights"] == ["last.weight"] and 0 < result["max_relative_difference"] < 1e-4
    held = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert all(np.array_equal(held[name].ravel(), value.detach().numpy().ravel()) for name, value in net.named_parameters() if name in held)
    # A mistake before the last layer is seen.
    whole = torch_export.network

    def mistaken(*arguments, **named):
        made = whole(*arguments, **named)
        native = made.native
        made.native = lambda values: native(values | {"x": values["x"] * np.float32(1.01)})
        return made

    monkeypatch.setattr(torch_route, "network", mistaken)
    assert made() == 1 and "differs from torch" in capsys.readouterr().err
