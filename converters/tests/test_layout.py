"""How weights lie in the file: orientation and shape are written down, what the exporter split or scaled is computed in the graph."""

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny_model
import torch
from onnx import TensorProto, helper, numpy_helper
from proof import card, disback, framework_tensors, layout_of, same_graph, same_state, same_weights
from safetensors.torch import load_file

from disback_convert import ConversionError, finish, layout, recover, weights
from disback_convert.cli import main
from disback_convert.weights import Weight

CARD = ["sample=x", "time=sigma", "output=denoised", "prediction=denoised", "time_unit=sigma", "shape=[1, 8, 8]", "schedule.kind=edm"]
LABELS = ["conditions.labels.kind=class-index", "conditions.labels.classes=4"]


def convert(factory, out, *entries):
    return main(["torch", factory, *(w for entry in [*CARD, *entries] for w in ("--card", entry)), "-o", str(out), "--json"])


def held(name, array, trained=True):
    store = {"value": array}
    return Weight(name, lambda: store["value"], lambda new: store.update(value=new), trained)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("f4")


def graph_of(arrays, opset=23, op="MatMul"):
    """A graph in which a node of its own reads each array, as the right factor; the outputs are the arrays themselves."""
    value = helper.make_tensor_value_info
    nodes = [helper.make_node(op, ["x", name], [f"read_{name}"]) for name in arrays]
    nodes += [helper.make_node("Identity", [name], [f"out_{name}"]) for name in arrays]
    outputs = [value(f"out_{name}", TensorProto.FLOAT, array.shape) for name, array in arrays.items()]
    stored = [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", [value("x", TensorProto.FLOAT, ["n", "m"])], outputs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10 if opset > 9 else 4)


def evaluate(model):
    """{constant of graph_of: value}"""
    names = [o.name for o in model.graph.output]
    # the nodes that multiply are not what is asked for
    kept = [n for n in model.graph.node if not n.output[0].startswith("read_")]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    onnx.checker.check_model(model, full_check=True)
    run = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return {name.removeprefix("out_"): value for name, value in zip(names, run.run(names, {"x": np.zeros((1, 1), "f4")}))}


def test_every_torch_tensor_is_rebuilt_from_the_file(tmp_path, capsys):
    out = tmp_path / "teacher.onnx"
    assert convert("tiny_model:build_square", out) == 0, capsys.readouterr().err
    net = tiny_model.build_square().eval()
    turned = same_state(out, net.state_dict())
    # Linear on sequences, MatMul with the transpose in the graph before; eye_too and zero equal their own transpose
    assert {"q.weight", "k.weight", "v.weight", "out.weight"} <= set(turned)
    assert layout_of(out)["eye_too"] == {"shape": [16, 16], "perm": [1, 0]} and "eye" not in layout_of(out)
    assert layout_of(out)["zero.weight"] == {"shape": [16, 16], "perm": [1, 0]}
    # the exporter really folded these: what reads them are the nodes that this package wrote
    nodes = {(n.op_type, n.input[0]) for n in onnx.load(out).graph.node}
    assert {("Transpose", "scaled"), ("Div", "scaled"), ("Mul", "gain"), ("Slice", "three")} <= nodes
    assert set(json.loads(card(out)["parameters"])) == {name for name, _ in net.named_parameters()}
    # What a reader of the file without its layout would load, without a word, into a network that then computes something else.
    raw = {name: torch.tensor(stored) for name, (_, stored) in framework_tensors(out).items() if name in net.state_dict()}
    x, sigma = torch.randn(3, 1, 8, 8), torch.rand(3) + 0.1
    with torch.no_grad():
        honest = net(x, sigma)
        square = {name: raw[name] for name in turned}
        net.load_state_dict(net.state_dict() | square, strict=True)
        assert (net(x, sigma) - honest).abs().max() > 0.1 * honest.std()


def test_the_files_of_a_run_load_into_the_network(tmp_path, capsys):
    teacher, run, net = tmp_path / "teacher.onnx", tmp_path / "run", tiny_model.build_square().eval()
    assert convert("tiny_model:build_square", teacher) == 0, capsys.readouterr().err
    (tmp_path / "config.toml").write_text(
        'device = "cpu"\nthreads = 1\nbatch = 4\naccumulate = 1\n[degrade]\nsteps = 4\nnodes = 2\n'
        "[backtrack]\nupdates = 4\nlr_generator = 0.03\n[optimizer]\nwarmup = 0\n[ema]\nhalf_life = 1\n"
    )
    assert disback("distill", teacher, "-o", run, "--config", tmp_path / "config.toml", "--same-graph")["outcome"] == "finished"
    same_weights(teacher, run, net.state_dict())
    assert net.load_state_dict(load_file(run / "trajectory" / "node-000.safetensors"), strict=True)
    assert all(torch.equal(value, tiny_model.build_square().state_dict()[name]) for name, value in net.state_dict().items())
    net.load_state_dict(load_file(run / "student.safetensors"), strict=True)

    def forward(given):
        with torch.no_grad():
            return net(torch.from_numpy(given["x"]), torch.from_numpy(given["sigma"])).numpy()

    same_graph(teacher, run, forward)


def test_what_is_folded_into_more_than_a_multiple_stays_lost(tmp_path, capsys):
    assert convert("tiny_model:build_product", tmp_path / "teacher.onnx", *LABELS) == 0, capsys.readouterr().err
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert sorted(result["not_in_the_graph"]) == sorted(result["folded"]) == ["matrix", "rows"]
    # The list names the constant that they were folded into: it trains in their place.
    declared = json.loads(card(tmp_path / "teacher.onnx")["parameters"])
    own = {name for name, _ in tiny_model.build_product().named_parameters()} - {"matrix", "rows"}
    assert own <= set(declared) and len(set(declared) - own) == 1
    held = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "teacher.onnx").graph.initializer}
    net = tiny_model.build_product()
    (product,) = (held[name] for name in set(declared) - own)
    want = (net.matrix * net.rows).detach().numpy()
    assert np.allclose(product, want, atol=1e-6) or np.allclose(product, want.T, atol=1e-6)


W = normal(48, 16)
PIECES = {
    "rows": W[16:32],
    "rows, transposed": W[:16].T,
    "rows, reshaped": W[32:].reshape(4, 4, 16),
    "columns": W[:, 3:11],
    "columns, transposed": W[:, 3:11].T,
    "multiple": W * np.float32(0.3),
    "multiple, transposed": (W / np.sqrt(np.float32(7))).T,
    "slice of a multiple": W[16:32] * np.float32(-1.7),
    "slice of a multiple, transposed, reshaped": (W[:16] * np.float32(0.25)).T.reshape(2, 8, 16),
}


@pytest.mark.parametrize("opset", [8, 13, 23])
def test_parts_and_multiples_are_computed_from_the_weight(tmp_path, opset):
    own = held("w", W)
    model = graph_of({f"val_{k}": value for k, value in enumerate(PIECES.values())}, opset)
    named = weights.name(model, tmp_path, [own], {})
    assert (named.parameters, named.unknown, named.lost, named.partial) == (["w"], [], [], [])
    floats = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
    assert np.array_equal(floats.pop("w"), W) and all(value.size == 1 for value in floats.values())
    assert named.layout["w"].entry() is None
    made = evaluate(model)
    for k, (what, value) in enumerate(PIECES.items()):
        exact = "multiple, transposed" != what
        assert made[f"val_{k}"].shape == value.shape, what
        np.testing.assert_allclose(made[f"val_{k}"], value, rtol=0 if exact else 2e-7, err_msg=what)


def test_a_part_of_a_weight_that_lies_transposed_in_the_file_is_cut_from_that(tmp_path):
    model = graph_of({"whole": W.T.reshape(4, 4, 48), "part": W[16:32].T, "other": W[:, :8] * np.float32(3)})
    named = weights.name(model, tmp_path, [held("w", W)], {})
    assert named.parameters == ["w"] and named.unknown == []
    assert named.layout["w"].entry() == {"shape": [48, 16], "perm": [1, 0]}
    made = evaluate(model)
    assert np.array_equal(made["part"], W[16:32].T) and np.array_equal(made["other"], W[:, :8] * np.float32(3))


def test_changed_values_reach_the_parts(tmp_path):
    # all ones: the exporter sees other numbers, and slices of those
    own = held("w", np.ones((48, 16), "f4"))
    with weights.told_apart([own]) as changed:
        shown = own.get()
        model = graph_of({"a": shown[:16].T, "b": shown[16:] * np.float32(0.5)})
    named = weights.name(model, tmp_path, [own], changed)
    assert named.partial == [] and named.unknown == []
    assert np.array_equal(evaluate(model)["b"], np.full((32, 16), 0.5, "f4"))
    assert (numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == "w")) == 1).all()


def test_weights_of_which_a_part_is_missing_are_named(tmp_path):
    model = graph_of({"a": W[:16], "b": W[16:32] ** 2})
    named = weights.name(model, tmp_path, [held("w", W)], {})
    assert (named.partial, named.unknown) == (["w"], ["b"])


def test_nothing_matches_by_chance(tmp_path):
    random = np.random.default_rng(1)
    own = [
        held("bias", np.array([0.5, -1, 2], "f4")), held("flags", np.tile(np.array([0, 1], "f4"), 32)), held("w", W),
        held("grid", np.arange(64, dtype="f4").reshape(8, 8) % 5), held("zeros", np.zeros((16, 16), "f4")),
    ]  # fmt: skip
    given = {
        "small": np.array([1, -2, 4], "f4"),  # twice the bias
        "bits": np.tile(np.array([0, 1], "f4"), 8),  # a slice of the flags
        "near": W[:16] * (1 + 1e-5 * random.random((16, 16)).astype("f4")),
        "scaled by rows": W * np.linspace(1, 2, 48, dtype="f4")[:, None],
        "one off": np.concatenate([W[:15], W[16:17]]),
        "few values": np.arange(64, dtype="f4")[:32] % 5,
    }
    model = graph_of(given)
    named = weights.name(model, tmp_path, own, {})
    assert named.parameters == [] and set(named.unknown) == set(given)


def test_what_fits_two_weights_is_left_alone():
    # two weights that share half of their rows: which of them the constant is cannot be told
    a, b = W.copy(), np.concatenate([W[:16], normal(32, 16, seed=2)])
    finder = recover.Parts([held("a", a), held("b", b)], lambda weight: weight.get())
    assert finder.find(W[:16]) is None and finder.find(W[16:32]).weight.name == "a"


@pytest.mark.parametrize("value", [np.eye(8), np.zeros((4, 4)), np.ones((3, 5)), np.full((3, 3, 2, 2), 0.5), normal(6, 6) + normal(6, 6).T])
def test_what_equals_its_own_transpose_is_shown_otherwise(value):
    own = held("w", value.astype("f4"))
    with weights.told_apart([own]) as changed:
        assert set(changed) == {"w"} and not layout.is_own_transpose(own.get())
    assert np.array_equal(own.get(), value.astype("f4"))


def test_what_equals_the_transpose_of_another_is_shown_otherwise():
    own = [held("a", normal(5, 7)), held("b", np.ascontiguousarray(normal(5, 7).T)), held("c", normal(5, 7, seed=3))]
    with weights.told_apart(own) as changed:
        assert set(changed) == {"b"}
    # a buffer keeps its values, so the weight that equals it changes
    own = [held("weight", normal(4, 4)), held("buffer", normal(4, 4), trained=False)]
    with weights.told_apart(own) as changed:
        assert set(changed) == {"weight"}


@pytest.mark.parametrize("order", list(layout.orders((3, 4, 5, 2))))
def test_every_order_of_axes_is_found(tmp_path, order):
    value = normal(3, 4, 5, 2)
    model = graph_of({"val": value.transpose(order).reshape(6, 20)})
    named = weights.name(model, tmp_path, [held("w", value)], {})
    entry = named.layout["w"].entry()
    assert entry == {"shape": [3, 4, 5, 2], "perm": list(order)}
    assert np.array_equal(value.transpose(entry["perm"]).reshape(6, 20), numpy_helper.to_array(model.graph.initializer[0]))


def test_axes_of_length_one_stand_where_the_file_has_them():
    assert layout.natural((3, 0, 1, 2), (3, 3, 1, 16), (16, 1, 3, 3)) == (3, 2, 0, 1)
    assert layout.natural((1, 0, 2), (5, 7, 1), (35,)) == (1, 0, 2)
    assert list(layout.orders((1, 4, 1))) == [(0, 1, 2)]


def test_a_saved_file_takes_the_orientation_of_what_is_read_alike(tmp_path):
    # its values cannot be changed: q and k show how MatMul reads its weights, Add shows nothing
    own = [held("q", normal(8, 8)), held("k", normal(8, 8, seed=1)), held("eye", np.eye(8, dtype="f4"))]
    arrays = {name: weight.get().T for name, weight in zip(("val_0", "val_1", "val_2"), own)}
    named = weights.name(graph_of(arrays), tmp_path, own, {})
    assert named.unclear == [] and named.layout["eye"].entry() == {"shape": [8, 8], "perm": [1, 0]}
    model = graph_of(arrays)
    model.graph.node[2].op_type = "Add"
    for weight in own:
        weight.found.clear()
    assert weights.name(model, tmp_path, own, {}).unclear == ["eye"]


def network_of(own, arrays, fails=False):
    """A network whose exporter writes what `arrays()` gives then."""

    def write(path, values, opset):
        path.write_bytes(graph_of(arrays(), opset).SerializeToString())

    def refuse(path, values, opset):
        raise ConversionError("it does not save this model again")

    return finish.Network(
        card={}, framework="f", exporter="e", inputs=["x"], outputs=[], export=refuse if fails else write, native=None, weights=own,
        examples={"x": np.zeros((2, 3), "f4")}, export_saved=write if fails else None,
    )  # fmt: skip


def test_a_folded_weight_has_its_own_value_while_the_others_are_told_apart(tmp_path):
    # exp(w) is no multiple of w: it has to be computed of the true value, while eye still shows which way round it lies
    own = [held("w", np.zeros((4, 4), "f4")), held("eye", np.eye(8, dtype="f4")), held("used", normal(8, 4))]
    network = network_of(own, lambda: {"c": np.exp(own[0].get()) + normal(4, 4), "e": own[1].get().T, "u": own[2].get()})
    network.native = lambda given: [weight.get() for weight in own]
    model, named, fates = finish.export(network, tmp_path / "teacher.onnx", None, lambda text: None)
    assert (named.lost, named.unknown, named.parameters) == (["w"], ["c"], ["eye", "used", "c"])
    assert (fates.unused, fates.merged, fates.folded) == ([], {}, ["w"])
    assert named.layout["eye"].entry() == {"shape": [8, 8], "perm": [1, 0]}
    found = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert np.array_equal(found["c"], 1 + normal(4, 4)) and np.array_equal(found["eye"], np.eye(8))


def test_an_orientation_that_nothing_tells_is_refused(tmp_path):
    own = [held("eye", np.eye(8, dtype="f4")), held("bias", normal(8))]
    network = network_of(own, lambda: {"e": own[0].get(), "b": own[1].get()}, fails=True)
    with pytest.raises(ConversionError, match="which way round eye lies .* cannot be told.*by 1e-6"):
        finish.export(network, tmp_path / "teacher.onnx", None, lambda text: None)
    # with another matrix that is read in the same way it is known
    own.append(held("q", normal(8, 8)))
    network = network_of(own, lambda: {"e": own[0].get(), "b": own[1].get(), "q": own[2].get().T}, fails=True)
    _, named, _ = finish.export(network, tmp_path / "teacher.onnx", None, lambda text: None)
    assert named.layout["eye"].entry() == {"shape": [8, 8], "perm": [1, 0]}
