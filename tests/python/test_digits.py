"""The committed files of examples/digits and the numerics that its scripts rest on."""

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"
sys.path.insert(0, str(DIGITS))

import common  # noqa: E402
import model  # noqa: E402
from train_teacher import CARD  # noqa: E402


def test_teacher_file_is_small_carries_its_card_and_half_a_million_weights():
    path = DIGITS / "teacher.onnx"
    assert path.stat().st_size <= 4_000_000
    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    assert not any(t.data_location for t in graph.graph.initializer)
    assert sum(int(np.prod(t.dims)) for t in graph.graph.initializer) >= 500_000
    written = {entry.key: entry.value for entry in graph.metadata_props}
    assert {key: written.pop(f"disback.{key}") for key in CARD} == CARD
    assert list(written) == ["disback.provenance"]
    assert [i.name for i in graph.graph.input] == ["x", "sigma", "labels"]


def test_classifier_reads_the_digits_and_its_features_have_the_documented_scale():
    data = np.load(DIGITS / "digits.npz")
    images, labels = common.digits()
    assert np.array_equal(common.to_uint8(images)[:, 0], data["images"])
    assert np.array_equal(labels, data["labels"])
    features, logits = common.features(data["images"])
    assert features.shape == (1797, 64)
    assert (logits.argmax(1) == labels).mean() > 0.98
    assert features.var(0, ddof=1).sum() == pytest.approx(1280, rel=1e-3)
    assert (DIGITS / "classifier.onnx").stat().st_size <= 300_000


def test_frechet_distance_of_gaussians_whose_distance_is_known():
    # samples whose mean and covariance are exact: whitened, then given the wanted ones
    def exact(mean, std, seed):
        raw = np.random.default_rng(seed).standard_normal((500, 4))
        raw -= raw.mean(0)
        values, vectors = np.linalg.eigh(np.cov(raw, rowvar=False))
        white = raw @ (vectors / np.sqrt(values)) @ vectors.T
        return white * std + mean

    a = exact(np.zeros(4), np.array([1.0, 2.0, 3.0, 4.0]), 1)
    b = exact(np.array([3.0, 0.0, 4.0, 0.0]), np.array([2.0, 2.0, 1.0, 5.0]), 2)
    assert common.frechet(a, b) == pytest.approx(25 + 1 + 0 + 4 + 1, rel=1e-9)
    assert common.frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_singular_covariances_is_finite():
    flat = np.zeros((50, 3))
    spread = np.random.default_rng(0).standard_normal((50, 3))
    assert common.frechet(flat, spread) == pytest.approx(spread.mean(0) @ spread.mean(0) + np.cov(spread.T).trace(), rel=1e-6)


def test_karras_levels_are_the_papers():
    sigmas = model.karras_sigmas(18)
    assert sigmas[0].item() == pytest.approx(80)
    assert sigmas[-1].item() == pytest.approx(0.002)
    # arXiv 2206.00364, eq. 5 with i = 1, N = 18, rho = 7
    assert sigmas[1].item() == pytest.approx((80 ** (1 / 7) + (0.002 ** (1 / 7) - 80 ** (1 / 7)) / 17) ** 7)


def test_heun_sampler_turns_noise_into_a_gaussian_whose_denoiser_is_known():
    # data N(m, s^2) per pixel: D(x; sigma) = (s^2 x + sigma^2 m) / (s^2 + sigma^2); the flow maps z to m + s z / sqrt(1 + (s/80)^2)
    mean, std = 0.3, 0.5

    def denoise(x, sigma, _labels):
        square = (sigma**2)[:, None, None, None]
        return (std**2 * x + square * mean) / (std**2 + square)

    noise = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = model.heun_sample(denoise, noise, None, steps=200)
    want = mean + std * (80 * noise - mean) / (80**2 + std**2) ** 0.5
    assert (made - want).abs().max().item() < 2e-3


def test_denoiser_is_the_identity_at_tiny_noise_and_ignores_nothing():
    torch.manual_seed(0)
    net = model.Denoiser(channels=(16, 16, 32), emb=32)
    x, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 5, model.NULL_CLASS])
    with torch.no_grad():
        assert (net(x, torch.full((3,), 1e-4), labels) - x).abs().max() < 1e-2
        plain = net(x, torch.full((3,), 1.0), labels)
        assert (plain - net(x, torch.full((3,), 1.0), labels.flip(0))).abs().max() > 1e-5
        assert (plain - net(x, torch.full((3,), 2.0), labels)).abs().max() > 1e-3


def test_png_holds_the_pixels(tmp_path):
    import struct
    import zlib

    grey = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    common.write_png(tmp_path / "a.png", grey, scale=2)
    data = (tmp_path / "a.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (6, 4)
    size = struct.unpack(">I", data[33:37])[0]
    rows = np.frombuffer(zlib.decompress(data[41 : 41 + size]), np.uint8).reshape(4, 7)
    assert (rows[:, 0] == 0).all()
    assert np.array_equal(rows[::2, 1::2], grey)
