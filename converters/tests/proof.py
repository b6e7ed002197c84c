"""The way of a converted teacher through disback: import, parity, both stages, and what became of the distance to the digits."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnx

ROOT = Path(__file__).resolve().parents[2]
TEACHERS = ROOT / "converters" / "teachers"
sys.path[:0] = [str(ROOT / "converters"), str(TEACHERS)]

import recipe  # noqa: E402

common = recipe.common
SAMPLES = 2048


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


def labels_for(name, about, labels):
    """Class indices 0..9 as the graph's condition takes them."""
    if about[f"conditions.{name}.kind"] == "one-hot":
        return {name: np.eye(10, dtype=np.float32)[labels]}
    return {name: labels}


def denoiser(path):
    """denoise(x, sigma, labels) in NCHW of a denoiser of sigma, or of a v-prediction network on DDPM's linear schedule."""
    about, net = card(path), common.session(path)
    condition = next(key.split(".")[1] for key in about if key.endswith(".classes"))
    integer = {i.name: np.int32 if "int32" in i.type else np.int64 for i in net.get_inputs()}
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    ln_sigma = 0.5 * np.log((1 - abar) / abar)

    def run(x, time, labels):
        given = labels_for(condition, about, labels)
        given = {name: value if value.dtype.kind == "f" else value.astype(integer[name]) for name, value in given.items()}
        nhwc = about.get("layout") == "nhwc"
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if nhwc else x
        (made,) = net.run([about["output"]], {about["sample"]: x.astype(np.float32), about["time"]: time.astype(np.float32), **given})
        return made.transpose(0, 3, 1, 2) if nhwc else made

    def vp(x, sigma, labels):
        a, b = 1 / np.hypot(1, sigma[0]), sigma[0] / np.hypot(1, sigma[0])
        x = a * x
        return a * x - b * run(x, np.interp(np.log(sigma), ln_sigma, np.arange(1000.0)), labels)

    return {"denoised": run, "v": vp}[about["prediction"]]


def student_distance(path, about, count=SAMPLES):
    """The student in ONNX Runtime, one call an image."""
    net = common.session(path)
    names = {i.name: i for i in net.get_inputs()}
    (condition,) = set(names) - {"noise"}
    labels = np.arange(count) % 10
    given = labels_for(condition, about, labels)[condition]
    if given.dtype.kind == "i":
        given = given.astype(np.int32 if "int32" in names[condition].type else np.int64)
    noise = np.random.default_rng(1).standard_normal((count, 1, 8, 8)).astype(np.float32)
    (images,) = net.run(["sample"], {"noise": noise, condition: given})
    assert images.shape == noise.shape
    return distance_of(images)


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
    result = disback("distill", teacher, "-o", run, "--config", settings)
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


def same_network(live, committed):
    """A live conversion computes what the committed teacher computes, under the same card."""
    ours, theirs = card(live), card(committed)
    keys = {key for key in theirs if key not in ("converter", "parameters", "provenance")}
    assert {key: ours.get(key) for key in keys} == {key: theirs[key] for key in keys}
    stored = np.load(committed.with_name("teacher.sample.npz"))
    net = common.session(live)
    (made,) = net.run([theirs["output"]], {i.name: stored[i.name] for i in net.get_inputs()})
    np.testing.assert_allclose(made, stored[theirs["output"]], atol=1e-4)
