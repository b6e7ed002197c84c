"""The committed files of examples/mnist are what its README says, by the first 200 images of the test set."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

ROOT = Path(__file__).resolve().parents[2]
MNIST = ROOT / "examples" / "mnist"
DISBACK = os.environ.get("DISBACK", str(ROOT / "target/release/disback"))
sys.path.append(str(MNIST))
sys.path.append(str(ROOT / "examples" / "digits"))
sys.path.append(str(ROOT / "converters"))

import sheet  # noqa: E402
from common import from_uint8, session  # noqa: E402
from disback_convert import card as cards  # noqa: E402


@pytest.fixture(scope="module")
def test_set():
    """The first 200 test images in [-1,1], and their classes."""
    data = np.load(MNIST / "test.npz")
    return from_uint8(data["images"])[:, None], data["labels"]


def metadata(path):
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def test_the_networks_are_small_and_the_teacher_carries_its_card():
    assert sum((MNIST / name).stat().st_size for name in ("teacher.onnx", "classifier.onnx")) < 8_000_000
    assert (MNIST / "test.npz").stat().st_size < 60_000
    model = onnx.load(MNIST / "teacher.onnx")
    onnx.checker.check_model(model, full_check=True)
    written = metadata(MNIST / "teacher.onnx")
    card = cards.parse(file=MNIST / "card.toml")
    assert {key: written[f"disback.{key}"] for key in card} == {key: cards.text_of(value) for key, value in card.items()}
    named = set(cards.value_of(written["disback.parameters"]))
    sizes = {t.name: int(np.prod(t.dims)) for t in model.graph.initializer}
    assert sum(sizes[name] for name in named) == 1_430_716


def test_the_classifier_reads_the_test_images(test_set):
    images, labels = test_set
    features, logits = session(MNIST / "classifier.onnx").run(["features", "logits"], {"images": images})
    assert (logits.argmax(1) == labels).mean() >= 0.985
    assert features.shape == (200, 64)
    # 1280 over the training images; 200 others have about as much.
    assert features.var(0, ddof=1).sum() == pytest.approx(1280, rel=0.1)


def test_the_teacher_denoises_the_test_images_and_knows_their_classes(test_set):
    images, labels = (part[:100] for part in test_set)
    denoise = sheet.denoiser(MNIST / "teacher.onnx")
    noise = np.random.default_rng(0).standard_normal(images.shape).astype(np.float32)

    def error(sigma, classes):
        return float(np.square(denoise(images + sigma * noise, sigma, classes) - images).mean())

    # (A Wiener filter that knows only the variance, 0.38, leaves 0.073 and 0.28; this teacher 0.0062 and 0.031.)
    assert error(0.3, labels) < 0.0075
    assert error(1.0, labels) < 0.036
    right, none, wrong = (error(3.0, c) for c in (labels, np.full(100, 10), (labels + 1) % 10))
    assert right < 0.9 * none < none < 0.8 * wrong


def test_the_schedule_of_the_sheet_is_that_of_the_card():
    card = cards.parse(file=MNIST / "card.toml")
    betas = np.linspace(card["schedule.beta_start"], card["schedule.beta_end"], card["schedule.steps"])
    signal = np.exp(np.log1p(-betas).sum())
    assert np.exp(sheet.log_sigmas()[-1]) == pytest.approx(np.sqrt((1 - signal) / signal), rel=1e-9)


def test_disback_reads_idx_files_packed_or_not_as_it_reads_arrays(tmp_path):
    data = np.load(MNIST / "test.npz")
    head = bytes([0, 0, 8, 3]) + np.array([200, 28, 28], ">u4").tobytes()
    (tmp_path / "plain.idx").write_bytes(head + data["images"].tobytes())
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + data["images"].tobytes(), 1))
    for name in ("plain.idx", "t10k-images-idx3-ubyte.gz"):
        words = [DISBACK, "evaluate", tmp_path / name, MNIST / "test.npz", "--features", MNIST / "classifier.onnx", "--json"]
        done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        row = json.loads(done.stdout)
        assert row["images"] == [200, 200]
        assert row["frechet"] == pytest.approx(0, abs=1e-4)
