"""The Paddle route in its own environment: the trained teacher all the way, saved inference models, refusals."""

import json

import numpy as np
import paddle
from proof import TEACHERS, card, layout_of, prove, same_network, same_state, same_student, same_weights
from safetensors.numpy import load_file

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
    state = paddle.load("teacher.pdparams", return_numpy=True)
    state.pop("StructuredToParameterName@@", None)
    same_weights(out, tmp_path / "run", state)
    monkeypatch.syspath_prepend(str(FOLDER))
    import model

    net, weights = model.build(), load_file(tmp_path / "run" / "student.safetensors")
    assert set(net.state_dict()) == set(weights)
    missing, surplus = net.set_state_dict({name: paddle.to_tensor(value) for name, value in weights.items()})
    assert not missing and not surplus
    net.eval()

    def forward(given):
        with paddle.no_grad():
            return net(*(paddle.to_tensor(given[name]) for name in ("x", "sigma", "labels"))).numpy()

    same_student(out, tmp_path / "run", forward)


SQUARE = """
import paddle
from paddle import nn

class Net(nn.Layer):
    def __init__(self, c=16):
        super().__init__()
        self.i, self.o, self.t = nn.Conv2D(1, c, 3, padding=1), nn.Conv2D(c, 1, 3, padding=1), nn.Linear(1, c)
        self.q, self.k, self.v, self.p = (nn.Linear(c, c) for _ in range(4))
        self.m = nn.MultiHeadAttention(c, 2)
        self.w, self.scaled = (self.create_parameter([c, c], default_initializer=nn.initializer.Normal()) for _ in range(2))
        eye = nn.initializer.Assign(paddle.eye(c))
        self.eye, self.eye_too = (self.create_parameter([c, c], default_initializer=eye) for _ in range(2))

    def forward(self, x, sigma):
        h = self.i(x) + self.t(paddle.log(sigma).unsqueeze(-1)).unsqueeze(-1).unsqueeze(-1)
        z = h.flatten(2).transpose([0, 2, 1])
        a = nn.functional.softmax(paddle.matmul(self.q(z), self.k(z), transpose_y=True) / 4.0)
        a = self.p(paddle.matmul(a, self.v(z))) + self.m(z, z, z)
        a = paddle.matmul(a, self.w, transpose_y=True) + paddle.matmul(a, self.eye, transpose_y=True) + paddle.matmul(a, self.eye_too)
        a = a + paddle.matmul(a, self.scaled * 0.125)
        return self.o(h + a.transpose([0, 2, 1]).reshape([-1, 16, 8, 8]))

def build():
    paddle.seed(0)
    return Net()
"""


def square_card(folder):
    text = (TEACHERS / "nchw.toml").read_text().split("[conditions")[0]
    (folder / "card.toml").write_text(text)
    return folder / "card.toml"


def test_square_weights_are_rebuilt_from_the_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "square_paddle.py").write_text(SQUARE)
    monkeypatch.chdir(tmp_path)
    words = ["--card-file", str(square_card(tmp_path)), "-q"]
    assert main(["paddle", "square_paddle:build", *words, "-o", str(tmp_path / "teacher.onnx")]) == 0, capsys.readouterr().err
    import square_paddle

    net = square_paddle.build()
    net.eval()
    state = {name: value.numpy() for name, value in net.state_dict().items()}
    turned = {"shape": [16, 16], "perm": [1, 0]}
    assert set(same_state(tmp_path / "teacher.onnx", state)) == {"w"}, "the exporter folds the transpose"
    layout = layout_of(tmp_path / "teacher.onnx")
    assert layout["eye"] == turned and "eye_too" not in layout
    # A saved inference model, whose values the converter changes in a copy: which way round eye lies shows there too.
    spec = paddle.static.InputSpec
    paddle.jit.save(net, str(tmp_path / "inference"), input_spec=[spec([None, 1, 8, 8], "float32", "x"), spec([None], "float32", "sigma")])
    saved = (tmp_path / "inference.pdiparams").read_bytes()
    assert main(["paddle", str(tmp_path / "inference.json"), *words, "-o", str(tmp_path / "saved.onnx")]) == 0, capsys.readouterr().err
    assert (tmp_path / "inference.pdiparams").read_bytes() == saved
    state = {name: value.numpy() for name, value in paddle.jit.load(str(tmp_path / "inference")).state_dict().items()}
    same_state(tmp_path / "saved.onnx", state)
    eyes = [name for name, value in state.items() if value.shape == (16, 16) and (value == np.eye(16)).all()]
    assert sorted(layout_of(tmp_path / "saved.onnx").get(name) == turned for name in eyes) == [False, True]


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
    # a saved model has names of its own
    same_network(tmp_path / "teacher.onnx", FOLDER / "teacher.onnx", same_layout=False)
    saved = paddle.jit.load(str(tmp_path / "inference")).state_dict()
    same_state(tmp_path / "teacher.onnx", {name: value.numpy() for name, value in saved.items()})


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
