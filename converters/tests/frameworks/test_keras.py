"""The Keras route on TensorFlow, in its own environment: the trained teacher all the way by both exporters, saved models, refusals."""

import json
import os

os.environ["KERAS_BACKEND"] = "tensorflow"

import numpy as np
import onnxruntime as ort
from proof import TEACHERS, card, layout_of, prove, same_network, same_state, same_student, same_weights
from safetensors.numpy import load_file

from disback_convert.cli import main

FOLDER = TEACHERS / "keras_unet"
CARD = [
    "sample=x", "time=t", "output=denoised", "prediction=denoised", "time_unit=sigma", "shape=[1, 8, 8]", "layout=nhwc", "schedule.kind=edm",
]  # fmt: skip


def convert(source, out, *more, entries=CARD):
    pairs = [word for entry in entries for word in ("--card", entry)]
    return main(["keras", str(source), *pairs, "-o", str(out), "--json", *map(str, more)])


def net_value(variable):
    import keras

    return keras.ops.convert_to_numpy(variable.value)


def small():
    """A model with what exporters fold away: BatchNorm and Dropout."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    x, t = keras.Input((8, 8, 1), name="x"), keras.Input((), name="t")
    emb = layers.Dense(8, name="time")(layers.Reshape((1,))(t))
    h = layers.Conv2D(8, 3, padding="same", use_bias=False, name="conv")(x)
    h = layers.Dropout(0.5)(layers.BatchNormalization(name="norm")(h) + layers.Reshape((1, 1, 8))(emb))
    return keras.Model([x, t], layers.Conv2D(1, 3, padding="same", name="out")(keras.ops.silu(h)))


def test_the_trained_teacher_goes_all_the_way(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(FOLDER)
    for exporter in ("tf2onnx", "keras"):
        out = tmp_path / exporter / "teacher.onnx"
        out.parent.mkdir()
        words = ["--weights", "weights.npz", "--exporter", exporter, "--card-file", "../nhwc.toml", "-o", str(out), "-q"]
        assert main(["keras", "model:build", *words]) == 0, capsys.readouterr().err
        same_network(out, FOLDER / "teacher.onnx")
    assert set(json.loads(card(out)["parameters"])) == set(np.load("weights.npz").files)
    with capsys.disabled():
        prove("Keras 3", out, tmp_path)
    same_weights(out, tmp_path / "run", np.load("weights.npz"))
    import keras
    import model

    keras.utils.clear_session()
    net, weights = model.build(), load_file(tmp_path / "run" / "student.safetensors")
    assert {v.path.replace("/", ".") for v in net.trainable_variables} == set(weights)
    for variable in net.trainable_variables:
        variable.assign(weights[variable.path.replace("/", ".")])
    same_student(out, tmp_path / "run", lambda given: net(given, training=False).numpy())


def square(c=16):
    """Square matrices read as they are and the other way round, attention with its heads' axes, a scale that is folded away."""
    import keras
    from keras import layers, ops

    class Mix(layers.Layer):
        def build(self, shape):
            self.w, self.scaled = (self.add_weight(name=name, shape=(c, c), initializer="glorot_uniform") for name in ("w", "scaled"))
            self.eye, self.eye_too = (self.add_weight(name=name, shape=(c, c), initializer="identity") for name in ("eye", "eye_too"))

        def call(self, z):
            turned = ops.matmul(z, ops.transpose(self.w)) + ops.matmul(z, ops.transpose(self.eye))
            return turned + ops.matmul(z, self.eye_too) + ops.matmul(z, self.scaled * 0.125)

    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    x, t = keras.Input((8, 8, 1), name="x"), keras.Input((), name="t")
    emb = layers.Dense(c, name="time")(layers.Reshape((1,))(ops.log(t)))
    h = layers.Conv2D(c, 3, padding="same", name="i")(x) + layers.Reshape((1, 1, c))(emb)
    z = layers.Reshape((64, c))(h)
    q, k, v = (layers.Dense(c, name=name)(z) for name in "qkv")
    a = ops.matmul(ops.softmax(ops.matmul(q, ops.transpose(k, (0, 2, 1))) / 4.0), v)
    a = Mix(name="mix")(layers.Dense(c, name="p")(a) + layers.MultiHeadAttention(2, c // 2, name="m")(z, z))
    return keras.Model([x, t], layers.Conv2D(1, 3, padding="same", name="o")(h + layers.Reshape((8, 8, c))(a)))


def test_square_weights_are_rebuilt_from_the_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "square_keras.py").write_text("import test_keras\ndef build():\n    return test_keras.square()\n")
    monkeypatch.chdir(tmp_path)
    for exporter in ("keras", "tf2onnx"):
        out = tmp_path / f"{exporter}.onnx"
        assert convert("square_keras:build", out, "--exporter", exporter) == 0, capsys.readouterr().err
        state = {v.path.replace("/", "."): net_value(v) for v in square().weights}
        assert set(same_state(out, state)) == {"mix.w"}, "the exporter folds the transpose"
        assert layout_of(out)["mix.eye"] == {"shape": [16, 16], "perm": [1, 0]} and "mix.eye_too" not in layout_of(out)


def test_a_saved_model_with_batch_norm(tmp_path, capsys):
    net = small()
    net.get_layer("norm").set_weights([np.random.rand(8) + 0.5, np.random.rand(8), np.random.rand(8), np.random.rand(8) + 0.5])
    net.save(tmp_path / "net.keras")
    net.save_weights(tmp_path / "net.weights.h5")
    assert convert(tmp_path / "net.keras", tmp_path / "teacher.onnx") == 0, capsys.readouterr().err
    x, t = np.random.randn(7, 8, 8, 1).astype("f4"), np.linspace(0.1, 2, 7).astype("f4")
    run = ort.InferenceSession(str(tmp_path / "teacher.onnx"), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(run.run(None, {"x": x, "t": t})[0], net([x, t], training=False), atol=1e-5)


def test_bad_input_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "other.py").write_text("import test_keras, keras\ndef build():\n    return test_keras.small()\ndef nonsense():\n    return 3\n")
    monkeypatch.chdir(tmp_path)
    net = small()
    arrays = {v.path.replace("/", "."): net_value(v) for v in net.variables}
    arrays["foreign"] = arrays.pop("time.bias")
    np.savez(tmp_path / "w.npz", **arrays)
    (tmp_path / "bad.keras").write_text("no zip")
    (tmp_path / "folder").mkdir()
    before = sorted(p.name for p in tmp_path.iterdir())
    for source, more, words in [
        ("other:build", ["--weights", "w.npz"], ["missing (1): time.bias", "surplus (1): foreign"]),
        ("bad.keras", [], ["does not load as a Keras model"]),
        ("absent.keras", [], ["no such file"]),
        ("folder", [], ["a folder is no Keras model"]),
        ("other:nonsense", [], ["returned int"]),
    ]:
        assert convert(source, tmp_path / "teacher.onnx", *more) == 1
        said = capsys.readouterr().err
        assert all(word in said for word in words), said
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == before
