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


def test_a_small_sdxl_is_written_from_shapes_alone_and_runs(tmp_path):
    np, ort = pytest.importorskip("numpy"), pytest.importorskip("onnxruntime")
    pytest.importorskip("diffusers")
    from sdxl import sdxl

    sdxl(
        tmp_path, sample_size=16, block_out_channels=(32, 64), attention_head_dim=(2, 4), cross_attention_dim=24,
        layers_per_block=1, transformer_layers_per_block=(1, 1), addition_time_embed_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        projection_class_embeddings_input_dim=6 * 16 + 40,
    )  # fmt: skip
    session = ort.InferenceSession(tmp_path / "teacher.onnx")
    rows = np.load(tmp_path / "prompts.npz")
    assert {name: rows[name].shape[1:] for name in rows} == {
        "encoder_hidden_states": (77, 24), "text_embeds": (40,), "time_ids": (6,),
    }  # fmt: skip
    noise = np.random.default_rng(1).standard_normal((2, 4, 16, 16)).astype("f4")
    feeds = {"sample": noise, "timestep": np.array([3, 700], "f4"), **{name: rows[name][:2] for name in rows}}
    (made,) = session.run(None, feeds)
    assert made.shape == noise.shape and np.isfinite(made).all() and made.std() > 1e-3
