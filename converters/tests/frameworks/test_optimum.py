"""`disback export --format optimum` beside student.onnx: optimum's ONNX Runtime pipelines make the same images of the same noise."""

import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import save_file

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import small_pipelines as small  # noqa: E402
from folders import called, export, noise, same, student  # noqa: E402
from proof import disback  # noqa: E402

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def pipeline(kind, folder):
    """A text-to-image pipeline with random weights."""
    parts = lambda **given: [(name, part, "diffusers" if name == "vae" else "transformers") for name, part in given.items()]  # noqa: E731
    vae = small.autoencoder()
    if kind == "StableDiffusionXLPipeline":
        (one, token), (two, token_2), net = small.clip(folder, 12), small.clip(folder, 20, 32, seed=8), small.conditional(xl=True)
        more = parts(vae=vae, text_encoder=one, tokenizer=token, text_encoder_2=two, tokenizer_2=token_2)
        schedule = diffusers.DDIMScheduler(**SD)
    else:
        (one, token), (two, token_2), net = small.clip(folder, 6, 4), small.clip(folder, 6, 6, seed=8), small.sd3()
        vae.register_to_config(shift_factor=0.05)
        more = parts(vae=vae, text_encoder=one, tokenizer=token, text_encoder_2=two, tokenizer_2=token_2)
        schedule = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    # Weights that are equal, as they begin, would be one in the exporter's file.
    torch.manual_seed(3)
    for weight in net.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    path = small.write(folder / "p", net, "transformer" if "3" in kind else "unet", kind, schedule, more)
    absent = ["text_encoder_3", "tokenizer_3"] if "3" in kind else []
    index = json.loads((path / "model_index.json").read_text()) | {name: [None, None] for name in absent}
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def exported(folder, out, export_from_model):
    """What `optimum-cli export onnx` makes of a pipeline; SD3's without its third encoder, as diffusers wants to be told."""
    index = json.loads((folder / "model_index.json").read_text())
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **{name: None for name, part in index.items() if part == [None, None]})
    export_from_model(model=pipe, output=out, task="text-to-image", do_validation=False, sequence_length=12)


CARDS = {
    "StableDiffusionXLPipeline": """sample = "sample"
time = "timestep"
output = "out_sample"
prediction = "epsilon"
time_unit = "step"
shape = [4, 8, 8]
latent_scale = 0.25
schedule = { kind = "vp", betas = "scaled-linear", beta_start = 0.00085, beta_end = 0.012, steps = 1000 }
conditions.encoder_hidden_states = { kind = "embedding", shape = [12, 32] }
conditions.text_embeds = { kind = "embedding", shape = [32] }
conditions.time_ids = { kind = "embedding", shape = [6] }
""",
    "StableDiffusion3Pipeline": """sample = "hidden_states"
time = "timestep"
output = "out_hidden_states"
prediction = "flow"
time_unit = "thousand"
shape = [4, 8, 8]
latent_scale = 0.25
schedule = { kind = "flow", shift = 3.0 }
conditions.encoder_hidden_states = { kind = "embedding", shape = [20, 12] }
conditions.pooled_projections = { kind = "embedding", shape = [10] }
""",
}


def as_teacher(model, kind, path):
    """The network that optimum exported, as a teacher: XL's with one time a sample, as disback-convert has it."""
    graph = onnx.load(model)
    if "XL" in kind:
        time = next(i for i in graph.graph.input if i.name == "timestep")
        time.type.tensor_type.shape.dim.add().dim_param = "batch_size"
        for node in graph.graph.node:
            node.input[:] = ["first_timestep" if name == "timestep" else name for name in node.input]
        graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0), "first"))
        graph.graph.node.insert(0, onnx.helper.make_node("Gather", ["timestep", "first"], ["first_timestep"]))
    onnx.save(graph, path)
    path.with_suffix(".card.toml").write_text(CARDS[kind])


def other_weights(teacher, file):
    """Weights that are not the teacher's."""
    random, trained = np.random.default_rng(5), {p["name"] for p in disback("inspect", teacher, "--parameters", "--no-probe")["parameter_list"]}
    state = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(teacher).graph.initializer if t.name in trained}
    assert set(state) == trained
    draw = lambda v: random.standard_normal(v.shape).astype(np.float32)  # noqa: E731
    save_file({name: v * (1 + 0.2 * draw(v)) + 0.02 * draw(v) for name, v in state.items()}, file)


@pytest.mark.parametrize("kind", CARDS)
def test_onnx_runtime_pipelines_make_the_students_images(tmp_path, kind):
    from optimum.exporters.onnx import onnx_export_from_model
    from optimum.onnxruntime import ORTDiffusionPipeline

    folder, part = pipeline(kind, tmp_path), "transformer" if "3" in kind else "unet"
    theirs, teacher = tmp_path / "onnx", tmp_path / "teacher.onnx"
    exported(folder, theirs, onnx_export_from_model)
    as_teacher(theirs / part / "model.onnx", kind, teacher)
    other_weights(teacher, tmp_path / "w.safetensors")
    given = ["--weights", tmp_path / "w.safetensors"]
    report = export(teacher, "optimum", theirs, tmp_path / "exported", *given, *(["--copy"] if "XL" in kind else []))
    disback("export", teacher, *given, "-o", tmp_path / "student.onnx")
    onnx.checker.check_model(str(tmp_path / "exported" / part / "model.onnx"), full_check=True)
    assert (tmp_path / "exported" / "vae_decoder").is_symlink() == ("XL" not in kind) and "vae_decoder" in report["linked"]
    pipe = ORTDiffusionPipeline.from_pretrained(tmp_path / "exported", export=False)
    assert type(pipe).__name__ == f"ORT{kind}"
    more = {"height": 16, "width": 16} | ({"max_sequence_length": 8} if "3" in kind else {})
    text = {"max_sequence_length": 8, "prompt_2": None, "prompt_3": None} if "3" in kind else {}
    embeds, _, pooled, _ = pipe.encode_prompt(prompt=["a cat"], do_classifier_free_guidance=False, **text)
    rows = {"encoder_hidden_states": embeds.numpy(), "pooled_projections" if "3" in kind else "text_embeds": pooled.numpy()}
    if "XL" in kind:
        rows["time_ids"] = np.array([[16, 16, 0, 0, 16, 16]], np.float32)
    ours = student(tmp_path / "student.onnx", noise((1, 4, 8, 8))[0], **rows)
    off = same(called(report, pipe, output_type="latent", **more).images, ours)
    print(f"{type(pipe).__name__}, {report['scheduler']}: {off:.1e} deviations apart")
    latents = torch.from_numpy(ours) / 0.25 + (0.05 if "3" in kind else 0)
    images = pipe.image_processor.postprocess(pipe.vae_decoder(latent_sample=latents)[0], output_type="np")
    same(called(report, pipe, output_type="np", **more).images, images)
    # The diffusers folder that it was exported from has no ONNX files to link.
    with pytest.raises(AssertionError, match="optimum-cli export onnx"):
        export(teacher, "optimum", folder, tmp_path / "none", *given)
    assert not (tmp_path / "none").exists()
