"""The Paddle route in its own environment: the trained teacher all the way, saved inference models, refusals."""

import json

import numpy as np
import paddle
from proof import TEACHERS, card, prove, same_network

from disback_convert.cli import main

FOLDER = TEACHERS / "paddle_unet"


def convert(source, out, *more):
    return main(["paddle", str(source), "--card-file", str(TEACHERS / "nchw.toml"), "-o", str(out), "-q", *map(str, more)])


def test_the_trained_teacher_goes_all_the_way(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(FOLDER)
    out = tmp_path / "teacher.onnx"
    assert convert("model:build", out, "--weights", "teacher.pdparams") == 0, capsys.readouterr().err
    same_network(out, FOLDER / "teacher.onnx")
    assert set(json.loads(card(out)["parameters"])) == set(paddle.load("teacher.pdparams", return_numpy=True)) - {"StructuredToParameterName@@"}
    with capsys.disabled():
        prove("PaddlePaddle", out, tmp_path)


def test_a_saved_inference_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(FOLDER)
    monkeypatch.syspath_prepend(str(FOLDER))
    import model

    net = model.build()
    net.set_state_dict(paddle.load(str(model.WEIGHTS)))
    net.eval()
    spec = paddle.static.InputSpec
    inputs = [spec([None, 1, 8, 8], "float32", "x"), spec([None], "float32", "sigma"), spec([None], "int64", "labels")]
    paddle.jit.save(net, str(tmp_path / "inference"), input_spec=inputs)
    assert convert(tmp_path / "inference.json", tmp_path / "teacher.onnx") == 0, capsys.readouterr().err
    same_network(tmp_path / "teacher.onnx", FOLDER / "teacher.onnx")


def test_bad_input_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(FOLDER)
    state = {name: value for name, value in paddle.load("teacher.pdparams", return_numpy=True).items()}
    state["foreign"] = state.pop("unet.time1.bias")
    paddle.save({name: paddle.to_tensor(value) for name, value in state.items() if not name.startswith("Structured")}, str(tmp_path / "w.pdparams"))
    (tmp_path / "text.pdparams").write_text("hello")
    before = sorted(p.name for p in tmp_path.iterdir())
    for source, more, words in [
        ("model:build", ["--weights", tmp_path / "w.pdparams"], ["missing (1): unet.time1.bias", "surplus (1): foreign"]),
        ("model:build", ["--weights", tmp_path / "text.pdparams"], ["not a file of Paddle parameters"]),
        (tmp_path / "absent.json", [], ["no such file"]),
        (tmp_path, [], ["not a Paddle model"]),
        ("model:ResBlock.__name__", [], ["failed"]),
    ]:
        assert convert(source, tmp_path / "teacher.onnx", *more) == 1
        said = capsys.readouterr().err
        assert all(word in said for word in words), said
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_operators_that_paddle2onnx_lacks_are_one_message(tmp_path, monkeypatch, capsys):
    (tmp_path / "odd.py").write_text(
        "import paddle\nclass Net(paddle.nn.Layer):\n    def __init__(self):\n        super().__init__()\n"
        "        self.label = paddle.nn.Embedding(11, 64)\n"
        "    def forward(self, x, sigma, labels):\n"
        "        return x + (1.0 / sigma).reshape([-1, 1, 1, 1]) + self.label(labels).reshape([-1, 1, 8, 8])\n"
        "def build():\n    return Net()\n"
    )
    monkeypatch.chdir(tmp_path)
    code = convert("odd:build", tmp_path / "teacher.onnx")
    said = capsys.readouterr().err
    if code:  # a later paddle2onnx may know it
        assert "does not convert this network" in said and "3.0.0" in said
        assert not (tmp_path / "teacher.onnx").exists()
    assert not list(tmp_path.glob(".convert-*"))
