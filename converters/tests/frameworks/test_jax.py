"""The JAX route in its own environment: the trained NNX teacher all the way, Linen, plain functions, refusals."""

import json
import sys

import numpy as np
import onnx
import onnxruntime as ort
from proof import TEACHERS, card, layout_of, prove, same_network, same_state, same_student, same_weights
from safetensors.numpy import load_file

from disback_convert.cli import main

FOLDER = TEACHERS / "flax_unet"
CARD = [
    "sample=x", "time=t", "output=denoised", "prediction=denoised", "time_unit=sigma", "shape=[1, 8, 8]", "layout=nhwc",
    "schedule.kind=edm", "conditions.labels.kind=class-index", "conditions.labels.classes=4",
]  # fmt: skip
SMALL = '''
import jax, jax.numpy as jnp
import flax.linen as nn

class Net(nn.Module):
    @nn.compact
    def __call__(self, x, t, labels, train: bool = True):
        emb = nn.Dense(8)(jnp.log(t)[:, None]) + nn.Embed(4, 8)(labels)
        h = nn.Dropout(0.5, deterministic=not train)(nn.Conv(8, (3, 3))(x) + emb[:, None, None, :])
        h = nn.GroupNorm(num_groups=2)(nn.BatchNorm(use_running_average=not train)(h))
        return nn.Conv(1, (3, 3))(nn.silu(h))

def linen():
    return Net()

def function():
    params = {"w": 0.1 * jax.random.normal(jax.random.key(0), (64, 64)), "b": {"bias": jnp.zeros(64)}, "label": jnp.ones((4, 64))}
    def run(params, x, t, labels):
        h = x.reshape(-1, 64) @ params["w"] + params["b"]["bias"] + params["label"][labels]
        return (jnp.tanh(h) * t[:, None]).reshape(-1, 8, 8, 1)
    return run, params

def nonsense():
    return 3
'''

SQUARE = '''
import flax.linen as linen
import jax, jax.numpy as jnp
from flax import nnx

class Net(nnx.Module):
    def __init__(self, c=16, *, rngs):
        self.i, self.o = nnx.Conv(1, c, (3, 3), rngs=rngs), nnx.Conv(c, 1, (3, 3), rngs=rngs)
        self.q, self.k, self.v, self.p = (nnx.Linear(c, c, rngs=rngs) for _ in range(4))
        self.m = nnx.MultiHeadAttention(2, c, rngs=rngs, decode=False)
        self.w = nnx.Param(jax.random.normal(jax.random.key(3), (c, c)))
        self.eye, self.eye_too = nnx.Param(jnp.eye(c)), nnx.Param(jnp.eye(c))

    def __call__(self, x, t):
        h = self.i(x) + jnp.log(t)[:, None, None, None]
        z = h.reshape(-1, 64, 16)
        q, k, v = self.q(z), self.k(z), self.v(z)
        a = self.p(nnx.softmax(q @ jnp.swapaxes(k, 1, 2) / 4.0, axis=-1) @ v) + self.m(z)
        a = a @ self.w[...].T + a @ self.eye[...] + a @ self.eye_too[...].T + a @ (self.w[...] * 0.125)
        return self.o(h + a.reshape(-1, 8, 8, 16))

def build():
    return Net(rngs=nnx.Rngs(0))

class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, t):
        h = linen.Conv(16, (3, 3))(x) + jnp.log(t)[:, None, None, None]
        z = h.reshape(-1, 64, 16)
        q, k, v = (linen.Dense(16, name=name)(z) for name in "qkv")
        a = linen.Dense(16, name="p")(linen.softmax(q @ jnp.swapaxes(k, 1, 2) / 4.0, axis=-1) @ v)
        a = a + linen.MultiHeadDotProductAttention(2, name="m")(z, z) + linen.Dense(16, name="eye", kernel_init=lambda *_: jnp.eye(16))(z)
        return linen.Conv(1, (3, 3))(h + a.reshape(-1, 8, 8, 16))

def linen_net():
    return LinenNet(), LinenNet().init(jax.random.key(0), jnp.zeros((2, 8, 8, 1)), jnp.ones(2))
'''


def convert(factory, out, *more, entries=CARD):
    pairs = [word for entry in entries for word in ("--card", entry)]
    return main(["jax", factory, *pairs, "-o", str(out), "--json", *map(str, more)])


def test_the_trained_nnx_teacher_goes_all_the_way(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(FOLDER)
    out = tmp_path / "teacher.onnx"
    assert main(["jax", "model:build", "--weights", "weights.npz", "--card-file", "../nhwc.toml", "-o", str(out), "-q"]) == 0
    same_network(out, FOLDER / "teacher.onnx")
    declared = json.loads(card(out)["parameters"])
    assert set(declared) == set(np.load("weights.npz").files)
    assert onnx.load(out).opset_import[0].version == 23
    with capsys.disabled():
        prove("Flax NNX", out, tmp_path)
    same_weights(out, tmp_path / "run", np.load("weights.npz"))
    import model
    from flax import nnx

    net, weights = model.build(), load_file(tmp_path / "run" / "student.safetensors")
    state = nnx.state(net, nnx.Param)
    assert {".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)} == set(weights)
    for path, variable in nnx.to_flat_state(state):
        assert variable[...].shape == weights[".".join(map(str, path))].shape
        variable[...] = weights[".".join(map(str, path))]
    nnx.update(net, state)
    same_student(out, tmp_path / "run", lambda given: np.asarray(net(given["x"], given["sigma"], given["labels"])))


def test_square_weights_are_rebuilt_from_the_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "square_jax.py").write_text(SQUARE)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "teacher.onnx"
    assert convert("square_jax:build", out, entries=[e for e in CARD if "labels" not in e]) == 0, capsys.readouterr().err
    from flax import nnx

    import square_jax

    state = {".".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(nnx.state(square_jax.build(), nnx.Param))}
    same_state(out, state)
    # attention's kernels have their heads' axis back, convolutions their channels last
    assert layout_of(out)["m.query.kernel"] == {"shape": [16, 2, 8], "perm": [0, 1, 2]}
    assert layout_of(out)["i.kernel"] == {"shape": [3, 3, 1, 16], "perm": [3, 2, 0, 1]}


def test_square_weights_of_linen_are_rebuilt_from_the_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "square_jax.py").write_text(SQUARE)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("square_jax", None)
    out = tmp_path / "teacher.onnx"
    assert convert("square_jax:linen_net", out, entries=[e for e in CARD if "labels" not in e]) == 0, capsys.readouterr().err
    import square_jax

    from disback_convert import trees

    _, variables = square_jax.linen_net()
    same_state(out, trees.flatten(variables["params"]))


def test_linen_modules_and_functions(tmp_path, monkeypatch, capsys):
    (tmp_path / "small_jax.py").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    assert convert("small_jax:linen", tmp_path / "linen.onnx") == 0, capsys.readouterr().err
    layers = {"Dense_0": "kernel bias", "Embed_0": "embedding", "Conv_0": "kernel bias", "Conv_1": "kernel bias"}
    layers |= {"BatchNorm_0": "scale bias", "GroupNorm_0": "scale bias"}
    wanted = {f"{layer}.{name}" for layer, names in layers.items() for name in names.split()}
    assert set(json.loads(card(tmp_path / "linen.onnx")["parameters"])) == wanted
    assert convert("small_jax:function", tmp_path / "function.onnx") == 0, capsys.readouterr().err
    assert set(json.loads(card(tmp_path / "function.onnx")["parameters"])) == {"w", "b.bias", "label"}
    import small_jax

    run, params = small_jax.function()
    x, t, labels = np.random.randn(7, 8, 8, 1).astype("f4"), np.linspace(0.1, 2, 7).astype("f4"), (np.arange(7) % 4).astype("i4")
    net = ort.InferenceSession(str(tmp_path / "function.onnx"), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(net.run(None, {"x": x, "t": t, "labels": labels})[0], run(params, x, t, labels), atol=1e-5)


def test_checkpoint_formats_hold_the_same_arrays(tmp_path):
    import flax.serialization
    import orbax.checkpoint
    from safetensors.numpy import save_file

    from disback_convert import trees

    tree = {"params": {"conv": {"kernel": np.arange(6, dtype="f4").reshape(2, 3)}, "bias": np.ones(2, "f4")}}
    flat = trees.flatten(tree)
    assert sorted(flat) == ["params.bias", "params.conv.kernel"]
    np.savez(tmp_path / "w.npz", **flat)
    save_file(flat, tmp_path / "w.safetensors")
    (tmp_path / "w.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    orbax.checkpoint.PyTreeCheckpointer().save(tmp_path / "orbax", tree)
    for name in ("w.npz", "w.safetensors", "w.msgpack", "orbax"):
        found = trees.read(tmp_path / name)
        assert sorted(found) == sorted(flat), name
        assert all(np.array_equal(found[key], flat[key]) for key in flat), name


def test_bad_input_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "small_jax.py").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "w.npz", **{"w": np.zeros((64, 64)), "label": np.zeros((4, 3)), "foreign": np.zeros(2)})
    before = sorted(p.name for p in tmp_path.iterdir())
    for factory, more, words in [
        ("small_jax:function", ["--weights", "w.npz"], ["missing (1): b.bias", "surplus (1): foreign", "label [4, 3] instead of [4, 64]"]),
        ("small_jax:function", ["--weights", "absent.npz"], ["no such file"]),
        ("small_jax:nonsense", [], ["returned int"]),
        ("small_jax", [], ["module:function"]),
    ]:
        assert convert(factory, tmp_path / "teacher.onnx", *more) == 1
        said = capsys.readouterr().err
        assert all(word in said for word in words), said
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == before


def test_keras_on_jax(tmp_path, monkeypatch, capsys):
    # the Keras teacher's own code and weights, on the other backend
    folder = TEACHERS / "keras_unet"
    monkeypatch.chdir(folder)
    sys.modules.pop("model", None)
    out = tmp_path / "teacher.onnx"
    words = ["keras", "model:build", "--weights", "weights.npz", "--backend", "jax", "--card-file", "../nhwc.toml", "-o", str(out), "-q"]
    assert main(words) == 0, capsys.readouterr().err
    same_network(out, folder / "teacher.onnx", same_layout=False)
    same_state(out, np.load("weights.npz"))
