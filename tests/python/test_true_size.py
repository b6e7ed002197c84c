"""The networks of the recipes' true size: they have the published numbers of weights, and their conversion goes through (Stable
Diffusion's with few channels, its null prompt and file of prompts beside it)."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes/true_size"))
edm_networks = pytest.importorskip("edm_networks")
import make  # noqa: E402


@pytest.mark.parametrize(("name", "millions"), [("cifar10", 55.7), ("ffhq64", 61.8), ("imagenet64", 295.9)])
def test_the_networks_have_the_published_sizes(name, millions):
    net = getattr(edm_networks, name)()
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == millions


def test_a_small_stable_diffusion_is_written_with_prompts_and_null(tmp_path):
    np, onnx = pytest.importorskip("numpy"), pytest.importorskip("onnx")
    pytest.importorskip("diffusers")
    make.sd15(tmp_path, channels=(32, 64, 64, 64), size=32, embedding=16)
    model = onnx.load(tmp_path / "teacher.onnx")
    assert {i.name for i in model.graph.input} >= {"encoder_hidden_states"}
    card = {p.key: p.value for p in model.metadata_props}
    assert card["disback.prediction"].strip('"') == "epsilon" and float(card["disback.latent_scale"]) == 0.18215
    assert np.load(tmp_path / "prompts.npz")["encoder_hidden_states"].shape == (64, 77, 16)
    import tomllib

    null = tomllib.loads((tmp_path / "teacher.card.toml").read_text())["conditions"]["encoder_hidden_states"]["null"]
    assert len(null) == 77 * 16
