"""The way of a converted teacher through disback: import, parity, both stages, and what became of the distance to the digits."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnx
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
TEACHERS = ROOT / "converters" / "teachers"
sys.path[:0] = [str(ROOT / "converters"), str(TEACHERS)]

import recipe  # noqa: E402

common = recipe.common
# The README's table is made with DISBACK_PROOF=full: the whole recipe, more samples.
FULL = os.environ.get("DISBACK_PROOF") == "full"
SAMPLES = 2048 if FULL else 1024
SHORTER = [] if FULL else ["--updates", 250, "--degrade-steps", 40]


def disback(*words):
    """Runs the built binary; its JSON."""
    binary = Path(os.environ.get("DISBACK", ROOT / "target" / "release" / "disback"))
    assert binary.is_file(), f"{binary} is missing: cargo build --release"
    done = subprocess.run([binary, *map(str, words), "--json"], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"disback {words[0]}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return json.loads(done.stdout)


def card(path):
    """{key: text} of a model's card."""
    props = onnx.load(path, load_external_data=False).metadata_props
    return {entry.key.removeprefix("disback."): entry.value.strip('"') for entry in props if entry.key.startswith("disback.")}


def layout_of(path):
    """{initializer: {"shape": ..., "perm": ...}} of the tensors that the file holds in another form than the framework."""
    return json.loads(card(path).get("parameters.layout", "{}"))


def framework_tensors(path):
    """{name: (array in the framework's own shape and orientation, array in the file)} of a graph's float tensors."""
    layout, found = layout_of(path), {}
    for tensor in onnx.load(path).graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        stored = own = onnx.numpy_helper.to_array(tensor)
        if tensor.name in layout:
            shape, perm = layout[tensor.name]["shape"], layout[tensor.name]["perm"]
            assert (perm, shape) != (list(range(len(perm))), list(stored.shape)), f"{tensor.name}: an entry that changes nothing"
            own = stored.reshape([shape[axis] for axis in perm]).transpose(np.argsort(perm))
        found[tensor.name] = own, stored
    assert set(layout) <= set(found)
    return found


def same_state(path, state, unused=()):
    """Every tensor of the framework's state is in the graph, bit by bit, but for those that the forward does not use. Returns
    the names of square matrices that the file holds the other way round: a reader that ignores the layout gets them wrong."""
    found = framework_tensors(path)
    state = {name: np.asarray(value) for name, value in state.items()}
    assert set(state) - set(found) == set(unused)
    for name in set(state) - set(unused):
        own, _ = found[name]
        assert own.shape == state[name].shape and own.dtype == state[name].dtype, name
        assert np.array_equal(own, state[name]), f"{name} is not the framework's"
    assert set(json.loads(card(path)["parameters"])) <= set(state)
    turned = [name for name, entry in layout_of(path).items() if entry["perm"] == [1, 0] and entry["shape"][0] == entry["shape"][1]]
    return [name for name in turned if not np.array_equal(found[name][1], state[name])]


def same_weights(teacher, run, state):
    """The first node of a run's trajectory, which is the teacher, equals the framework's state tensor by tensor: names, shapes,
    bits. `state`: {name: array}."""
    found = load_file(run / "trajectory" / "node-000.safetensors")
    state = {name: np.asarray(value) for name, value in state.items()}
    assert set(json.loads(card(teacher)["parameters"])) <= set(found) <= set(state)
    for name, value in found.items():
        assert value.shape == state[name].shape, f"{name}: {value.shape} instead of the framework's {state[name].shape}"
        assert np.array_equal(value, state[name]), f"{name} is not the framework's"
    # Where the file holds a tensor the other way round, the file's own order would not have passed.
    for name, (own, stored) in framework_tensors(teacher).items():
        if name in layout_of(teacher) and name in found and own.squeeze().ndim > 1 and not np.array_equal(own.ravel(), stored.ravel()):
            assert not np.array_equal(found[name].ravel(), stored.ravel()), f"{name} has the file's orientation"


def same_graph(teacher, run, forward):
    """The framework's network with the weights of `run/student.safetensors` computes what student-same-graph.onnx computes.
    `forward`: {input of the teacher: array} -> output, by that network."""
    about = card(teacher)
    stored = np.load(teacher.with_name("teacher.sample.npz"))
    net = common.session(run / "student-same-graph.onnx")
    given = {i.name: stored[i.name] for i in net.get_inputs()}
    (ours,), theirs = net.run([about["output"]], given), forward(given)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-4 * theirs.std(), f"student-same-graph.onnx: {np.abs(ours - theirs).max():.2e}"
    assert np.abs(stored[about["output"]] - theirs).max() > 1e-2 * theirs.std(), "the teacher's weights, not the student's"


def same_student(teacher, run, forward):
    """The same of both files that a student of the digits has."""
    same_graph(teacher, run, forward)
    # One call of the student is the denoiser at sigma_init, of noise of that level; on a VP schedule, of what is unit noise there.
    sigma, count = float(card(run / "student.onnx")["student.sigma_init"]), 20
    scale = np.hypot(1, sigma) if card(teacher)["schedule.kind"] == "vp" else sigma
    noise, labels = np.random.default_rng(3).standard_normal((count, 1, 8, 8)).astype(np.float32), np.arange(count) % 10
    theirs = denoiser(teacher, forward)(scale * noise, np.full(count, sigma), labels).clip(-1, 1)
    ours = student_images(run / "student.onnx", card(teacher), noise, labels)
    assert np.abs(ours - theirs).max() <= 1e-4 * theirs.std(), f"student.onnx: {np.abs(ours - theirs).max():.2e}"


def labels_for(name, about, labels):
    """Class indices 0..9 as the graph's condition takes them."""
    if about[f"conditions.{name}.kind"] == "one-hot":
        return {name: np.eye(10, dtype=np.float32)[labels]}
    return {name: labels}


def denoiser(path, forward=None):
    """denoise(x, sigma, labels) in NCHW of a denoiser of sigma, or of a v-prediction network on DDPM's linear schedule.
    `forward`: {input: array} -> output, by something else than the file, which then only says what it takes."""
    about, net = card(path), common.session(path)
    forward = forward or (lambda given: net.run([about["output"]], given)[0])
    condition = next(key.split(".")[1] for key in about if key.endswith(".classes"))
    integer = {i.name: np.int32 if "int32" in i.type else np.int64 for i in net.get_inputs()}
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    ln_sigma = 0.5 * np.log((1 - abar) / abar)

    def run(x, time, labels):
        given = labels_for(condition, about, labels)
        given = {name: value if value.dtype.kind == "f" else value.astype(integer[name]) for name, value in given.items()}
        nhwc = about.get("layout") == "nhwc"
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if nhwc else x
        made = forward({about["sample"]: x.astype(np.float32), about["time"]: time.astype(np.float32), **given})
        return made.transpose(0, 3, 1, 2) if nhwc else made

    def vp(x, sigma, labels):
        a, b = 1 / np.hypot(1, sigma[0]), sigma[0] / np.hypot(1, sigma[0])
        x = a * x
        return a * x - b * run(x, np.interp(np.log(sigma), ln_sigma, np.arange(1000.0)), labels)

    return {"denoised": run, "v": vp}[about["prediction"]]


def student_distance(path, about, count=SAMPLES):
    """The student in ONNX Runtime, one call an image."""
    noise = np.random.default_rng(1).standard_normal((count, 1, 8, 8)).astype(np.float32)
    return distance_of(student_images(path, about, noise, np.arange(count) % 10))


def student_images(path, about, noise, labels):
    """What the student makes of noise, NCHW."""
    net = common.session(path)
    names = {i.name: i for i in net.get_inputs()}
    (condition,) = set(names) - {"noise"}
    given = labels_for(condition, about, labels)[condition]
    if given.dtype.kind == "i":
        given = given.astype(np.int32 if "int32" in names[condition].type else np.int64)
    (images,) = net.run(["sample"], {"noise": noise, condition: given})
    assert images.shape == noise.shape
    return images


def untrained_distance(denoise, sigma):
    """What the student is before it is trained: the teacher's denoiser on pure noise of one level."""
    noise = np.random.default_rng(1).standard_normal((SAMPLES, 1, 8, 8)).astype(np.float32)
    images = denoise(sigma * noise, np.full(SAMPLES, sigma, np.float32), np.arange(SAMPLES) % 10)
    return distance_of(images)


def distance_of(images):
    """Frechet distance to the 1797 digits."""
    ours, _ = common.features(common.to_uint8(images))
    real, _ = common.features(np.load(recipe.DIGITS / "digits.npz")["images"])
    return common.frechet(ours, real)


def prove(name, teacher, folder):
    """Import, parity with ONNX Runtime and with the framework's stored outputs, both stages, distance. Returns the numbers.

    The student must come within three times its teacher's distance, from far outside it.
    """
    parity = disback("parity", teacher)
    assert parity["ok"] and parity["expected"], parity
    settings = TEACHERS / "recipe.toml"
    about, denoise = card(teacher), denoiser(teacher)
    best, _ = recipe.distance(denoise, SAMPLES)
    before = untrained_distance(denoise, tomllib.loads(settings.read_text())["student"]["sigma_init"])
    run = folder / "run"
    result = disback("distill", teacher, "-o", run, "--config", settings, "--same-graph", *SHORTER)
    assert result["outcome"] == "finished", result
    stages = {json.loads(line)["stage"] for line in (run / "metrics.jsonl").read_text().splitlines()}
    assert stages == {"degrade", "backtrack"}
    onnx.checker.check_model(str(run / "student.onnx"), full_check=True)
    after = student_distance(run / "student.onnx", about)
    print(
        f"{name}: parity {parity['max_abs']:.1e}, teacher {best:.2f} in 35 calls, student {after:.2f} in one, {after / best:.2f} times it; "
        f"{before:.0f} untrained ({SAMPLES} images)"
    )
    assert before > 10 * best, f"{name}: the untrained student is at {before:.2f} already"
    assert after <= 3 * best, f"{name}: the student's distance is {after:.2f}, its teacher's {best:.2f}"
    return {"parity": parity["max_abs"], "teacher": best, "untrained": before, "student": after}


def same_network(live, committed, same_layout=True):
    """A live conversion computes what the committed teacher computes, under the same card, and lays weights out alike."""
    ours, theirs = card(live), card(committed)
    keys = {key for key in theirs if key not in ("converter", "parameters", "parameters.layout", "provenance")}
    assert not same_layout or layout_of(live) == layout_of(committed)
    assert {key: ours.get(key) for key in keys} == {key: theirs[key] for key in keys}
    stored = np.load(committed.with_name("teacher.sample.npz"))
    net = common.session(live)
    (made,) = net.run([theirs["output"]], {i.name: stored[i.name] for i in net.get_inputs()})
    np.testing.assert_allclose(made, stored[theirs["output"]], atol=1e-4)
