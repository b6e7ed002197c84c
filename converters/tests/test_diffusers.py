"""The diffusers route: every class against diffusers' own forward (the converter's check), cards, parts, prompts, refusals."""

import json
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import diffusers  # noqa: E402
import small_pipelines as small  # noqa: E402
from folders import same_text_images  # noqa: E402
from proof import TEACHERS, disback, prove, same_network, same_student, same_weights  # noqa: E402
from disback_convert import ConversionError, finish  # noqa: E402
from disback_convert.cli import main  # noqa: E402
from disback_convert.diffusers_route import scheduler  # noqa: E402

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


def convert(folder, out, *more):
    return main(["diffusers", str(folder), "-o", str(out), "--json", *map(str, more)])


def card(path):
    props = {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}
    return {key.removeprefix("disback."): value for key, value in props.items()}


CASES = {
    "UNet2DModel": (small.unet, "unet", diffusers.DDPMScheduler(prediction_type="v_prediction"), ["--null", "10"]),
    "UNet2DConditionModel": (small.conditional, "unet", diffusers.DDIMScheduler(**SD), ["--tokens", "5"]),
    "SDXL": (lambda: small.conditional(xl=True), "unet", diffusers.EulerDiscreteScheduler(**SD), ["--tokens", "5"]),
    "inpainting": (lambda: small.conditional(channels=9), "unet", diffusers.DDIMScheduler(**SD), ["--tokens", "5"]),
    "InstructPix2Pix": (lambda: small.conditional(channels=8), "unet", diffusers.DDIMScheduler(**SD), ["--tokens", "5"]),
    "DiTTransformer2DModel": (small.dit, "transformer", diffusers.DDIMScheduler(), []),
    "PixArtTransformer2DModel": (small.pixart, "transformer", diffusers.DPMSolverMultistepScheduler(), ["--tokens", "6"]),
    "SD3Transformer2DModel": (small.sd3, "transformer", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), ["--tokens", "6"]),
    "FluxTransformer2DModel": (
        small.flux, "transformer", diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        ["--tokens", "6", "--size", "8x12"],
    ),
}  # fmt: skip
WANT = {
    "UNet2DModel": {"prediction": "v", "time_unit": "step", "shape": "[1, 8, 8]", "schedule.betas": "linear", "range": "[-1.0, 1.0]"}
    | {"conditions.class_labels.classes": "10", "conditions.class_labels.null": "10"},
    "UNet2DConditionModel": {"prediction": "epsilon", "schedule.betas": "scaled-linear", "schedule.beta_end": "0.012"}
    | {"conditions.encoder_hidden_states.shape": "[5, 32]"},
    "SDXL": {"conditions.text_embeds.shape": "[32]", "conditions.time_ids.shape": "[6]"},
    "inpainting": {"shape": "[4, 8, 8]", "concat": '["sample", "mask", "masked_image_latents"]'}
    | {"conditions.mask.shape": "[1, 8, 8]", "conditions.masked_image_latents.shape": "[4, 8, 8]"},
    "InstructPix2Pix": {"shape": "[4, 8, 8]", "concat": '["sample", "image_latents"]', "conditions.image_latents.shape": "[4, 8, 8]"},
    "DiTTransformer2DModel": {"shape": "[4, 8, 8]", "conditions.class_labels.null": "10", "conditions.class_labels.classes": "10"},
    "PixArtTransformer2DModel": {"conditions.encoder_attention_mask.shape": "[6]"},
    "SD3Transformer2DModel": {"prediction": "flow", "time_unit": "thousand", "schedule.shift": "3.0"},
    "FluxTransformer2DModel": {"prediction": "flow", "time_unit": "unit", "shape": "[4, 8, 12]", "constants.guidance": "3.5"},
}


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_folder_becomes_a_teacher(tmp_path, capsys, name):
    make, part, schedule, more = CASES[name]
    net = make()
    folder = tmp_path / "pipeline"
    small.write(folder, net, part, "Pipeline", schedule)
    out = tmp_path / "teacher.onnx"
    assert convert(folder, out, *more) == 0, capsys.readouterr().err
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["max_relative_difference"] <= 1e-4
    assert result["parameters"] == sum(p.numel() for p in net.parameters())
    found = card(out)
    assert {key: found.get(key) for key in WANT[name]} == WANT[name]
    # framework names, and all of them that the forward uses
    declared = json.loads(found["parameters"])
    assert set(declared) | set(result["not_in_the_graph"]) == {n for n, _ in net.named_parameters()}
    assert {t.name for t in onnx.load(out).graph.initializer} >= set(declared)
    # the side file is the framework's own answer: give it to ONNX Runtime again
    stored = np.load(tmp_path / "teacher.sample.npz")
    runner = ort.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    (ours,) = runner.run(["prediction"], {i.name: stored[i.name] for i in runner.get_inputs()})
    np.testing.assert_allclose(ours, stored[found["output"]], atol=1e-4)


def test_an_inpainting_network_becomes_a_student_with_its_parts_as_inputs(tmp_path):
    """The student's call beside diffusers' own network, which takes the parts joined."""
    net = small.conditional(channels=9)
    small.write(tmp_path / "p", net, "unet", "Pipeline", diffusers.DDIMScheduler(**SD))
    teacher = tmp_path / "teacher.onnx"
    assert convert(tmp_path / "p", teacher, "--tokens", 5) == 0
    # Without the card's `concat` its parts are proposed by their usual counts, and the probe sees what it would with it.
    bare = onnx.load(teacher)
    del bare.metadata_props[:]
    onnx.save(bare, tmp_path / "bare.onnx")
    proposed = disback("inspect", tmp_path / "bare.onnx", "--no-probe")["proposed_card"]
    assert proposed["concat"] == ["sample", "mask", "masked_image_latents"]
    assert proposed["shape"] == [4, 8, 8] and proposed["conditions"]["mask"]["shape"] == [1, 8, 8]
    # Where the file does not declare the output's channels, a run of the network shows them.
    bare.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(bare, tmp_path / "undeclared.onnx")
    assert "concat" not in disback("inspect", tmp_path / "undeclared.onnx", "--no-probe")["proposed_card"]
    seen = disback("inspect", tmp_path / "undeclared.onnx", "--probe-seconds", 0)["proposed_card"]
    assert seen["concat"] == proposed["concat"] and seen["conditions"] == proposed["conditions"]
    random = np.random.default_rng(0)
    rows = {"encoder_hidden_states": (5, 32), "mask": (1, 8, 8), "masked_image_latents": (4, 8, 8)}
    rows = {name: random.standard_normal((6, *shape)).astype(np.float32) for name, shape in rows.items()}
    np.savez(tmp_path / "rows.npz", **rows)
    run, steps = tmp_path / "run", ["degrade.steps=2", "degrade.nodes=1", "backtrack.updates=3", "batch=2", "student.sigma_init=0.5"]
    sets = [word for pair in [f"conditions.file={tmp_path / 'rows.npz'}", *steps] for word in ("--set", pair)]
    disback("distill", teacher, "-o", run, *sets)
    assert disback("verify", run / "student.onnx")["ok"]
    net.load_state_dict(load_file(run / "student.safetensors"), strict=True)
    about = card(run / "student.onnx")
    sigma, z = float(about["student.sigma_init"]), random.standard_normal((6, 4, 8, 8)).astype(np.float32)
    student = ort.InferenceSession(str(run / "student.onnx"), providers=["CPUExecutionProvider"])
    noise = next(i.name for i in student.get_inputs() if i.name not in rows)
    assert {i.name for i in student.get_inputs()} == {noise, *rows}
    (ours,) = student.run(None, {noise: z, **rows})
    # At the step whose noise level is the student's, on the table of Stable Diffusion's betas, the network sees unit noise.
    kept = torch.cumprod(1 - torch.linspace(SD["beta_start"] ** 0.5, SD["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2, 0)
    step = int(((1 - kept).sqrt() / kept.sqrt() - sigma).abs().argmin())
    joined = torch.cat([torch.from_numpy(z), *(torch.from_numpy(rows[n]) for n in ("mask", "masked_image_latents"))], 1)
    with torch.no_grad():
        noise = net(joined.float(), torch.full((6,), step), torch.from_numpy(rows["encoder_hidden_states"])).sample.numpy()
    np.testing.assert_allclose(ours, (np.hypot(1, sigma) * z - sigma * noise).clip(-1, 1), atol=1e-4)
    assert (np.abs(ours) < 1).mean() > 0.5


def test_an_image_to_edit_is_a_condition_of_the_run(tmp_path):
    """InstructPix2Pix's eight channels: the card as it was converted is taken, with the image as rows of a condition."""
    small.write(tmp_path / "p", small.conditional(channels=8), "unet", "Pipeline", diffusers.DDIMScheduler(**SD))
    teacher = tmp_path / "teacher.onnx"
    assert convert(tmp_path / "p", teacher, "--tokens", 5) == 0
    found = disback("inspect", teacher)["card"]
    assert "error" not in found and found["conditions"]["image_latents"]["shape"] == [4, 8, 8]
    rows = {"encoder_hidden_states": (5, 32), "image_latents": (4, 8, 8)}
    np.savez(tmp_path / "rows.npz", **{name: np.ones((4, *shape), np.float32) for name, shape in rows.items()})
    sets = ("--set", f"conditions.file={tmp_path / 'rows.npz'}", "--set", "student.sigma_init=0.5", "--batch", 2)
    assert disback("distill", teacher, "-o", tmp_path / "run", "--dry-run", *sets)
    assert not (tmp_path / "run").exists()


def test_a_pipeline_saved_part_by_part_needs_no_index(tmp_path, capsys):
    make, part, schedule, more = CASES["UNet2DModel"]
    small.write(tmp_path / "parts", make(), part, "Pipeline", schedule)
    (tmp_path / "parts" / "model_index.json").unlink()
    assert convert(tmp_path / "parts", tmp_path / "teacher.onnx", *more) == 0, capsys.readouterr().err
    assert {key: card(tmp_path / "teacher.onnx").get(key) for key in WANT["UNet2DModel"]} == WANT["UNet2DModel"]


def test_the_trained_teacher_goes_all_the_way(tmp_path, capsys):
    folder, out = TEACHERS / "diffusers_unet", tmp_path / "teacher.onnx"
    assert convert(folder, out, "--null", 10, "--card", "dataset=digits") == 0, capsys.readouterr().err
    same_network(out, folder / "teacher.onnx")
    with capsys.disabled():
        prove("diffusers UNet2DModel", out, tmp_path)
    net = diffusers.UNet2DModel.from_pretrained(folder / "unet").eval()
    same_weights(out, tmp_path / "run", net.state_dict())
    net.load_state_dict(load_file(tmp_path / "run" / "student.safetensors"), strict=True)

    def forward(given):
        with torch.no_grad():
            return net(*(torch.from_numpy(given[name]) for name in ("sample", "timestep", "class_labels"))).sample.numpy()

    same_student(out, tmp_path / "run", forward)


def test_network_values_are_those_of_diffusers_itself(tmp_path):
    # beside the wrapper: the class called as a user would
    folder = small.write(tmp_path / "p", small.flux(), "transformer", "FluxPipeline", diffusers.FlowMatchEulerDiscreteScheduler())
    assert convert(folder, tmp_path / "teacher.onnx", "--tokens", 6, "--size", "8x12") == 0
    net = diffusers.FluxTransformer2DModel.from_pretrained(folder / "transformer").eval()
    torch.manual_seed(0)
    latents, text, pooled, t = torch.randn(2, 4, 8, 12), torch.randn(2, 6, 12), torch.randn(2, 10), torch.tensor([0.3, 0.8])
    pipe = diffusers.FluxPipeline
    packed = pipe._pack_latents(latents, 2, 4, 8, 12)
    ids = pipe._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float32)
    with torch.no_grad():
        native = net(packed, text, pooled, t, ids, torch.zeros(6, 3), torch.full((2,), 3.5), return_dict=False)[0]
    native = pipe._unpack_latents(native, 64, 96, 8 * 2 // 2)
    given = {"sample": latents, "timestep": t, "encoder_hidden_states": text, "pooled_projections": pooled, "guidance": torch.full((2,), 3.5)}
    runner = ort.InferenceSession(str(tmp_path / "teacher.onnx"), providers=["CPUExecutionProvider"])
    (ours,) = runner.run(None, {name: value.numpy() for name, value in given.items()})
    np.testing.assert_allclose(ours, native.numpy(), atol=1e-4)


def test_pixart_masks_are_those_of_diffusers_itself(tmp_path):
    folder = small.write(tmp_path / "p", small.pixart(), "transformer", "PixArtAlphaPipeline", diffusers.DDIMScheduler())
    assert convert(folder, tmp_path / "teacher.onnx", "--tokens", 6) == 0
    net = diffusers.PixArtTransformer2DModel.from_pretrained(folder / "transformer").eval()
    torch.manual_seed(0)
    mask = torch.tensor([[1.0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    given = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3.0, 700.0]), "encoder_hidden_states": torch.randn(2, 6, 12)}
    added = {"resolution": torch.full((2, 2), 64.0), "aspect_ratio": torch.ones(2, 1)}
    with torch.no_grad():
        native = net(
            given["sample"], encoder_hidden_states=given["encoder_hidden_states"], timestep=given["timestep"],
            added_cond_kwargs=added, encoder_attention_mask=mask, return_dict=False,
        )[0][:, :4]  # fmt: skip
    runner = ort.InferenceSession(str(tmp_path / "teacher.onnx"), providers=["CPUExecutionProvider"])
    given["encoder_attention_mask"] = mask
    (ours,) = runner.run(None, {name: value.numpy() for name, value in given.items()})
    np.testing.assert_allclose(ours, native.numpy(), atol=1e-4)


def test_weights_above_the_limit_go_beside_the_graph(tmp_path, monkeypatch):
    from disback_convert.torch_route import export as torch_export

    monkeypatch.setattr(finish, "PROTO_LIMIT", 10_000)
    monkeypatch.setattr(torch_export, "PROTO_LIMIT", 10_000)
    folder = small.write(tmp_path / "p", small.unet(), "unet", "DDPMPipeline", diffusers.DDPMScheduler())
    (tmp_path / "out").mkdir()
    assert convert(folder, tmp_path / "out" / "teacher.onnx") == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["teacher.onnx", "teacher.onnx.data", "teacher.sample.npz"]
    count = sum(p.numel() for p in small.unet().parameters())
    assert (tmp_path / "out" / "teacher.onnx.data").stat().st_size > 3 * count
    model = onnx.load(tmp_path / "out" / "teacher.onnx", load_external_data=False)
    outside = [t for t in model.graph.initializer if t.external_data]
    assert outside and all(e.value == "teacher.onnx.data" for t in outside for e in t.external_data if e.key == "location")
    onnx.checker.check_model(str(tmp_path / "out" / "teacher.onnx"), full_check=True)


def test_decoder_text_encoder_and_prompts(tmp_path, capsys):
    encoder, tokenizer = small.clip(tmp_path)
    vae = small.autoencoder()
    parts = [("vae", vae, "diffusers"), ("text_encoder", encoder, "transformers"), ("tokenizer", tokenizer, "transformers")]
    folder = small.write(tmp_path / "p", small.conditional(), "unet", "StableDiffusionPipeline", diffusers.DDIMScheduler(**SD), parts)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "prompts.txt").write_text("a cat\n\nno dog\n")
    out = tmp_path / "teacher.onnx"
    more = ["--tokens", 12, "--vae", "--text-encoder", "--prompts", tmp_path / "prompts.txt", "--null-prompt", ""]
    assert convert(folder, out, *more) == 0, capsys.readouterr().err
    assert card(out)["latent_scale"] == "0.25" and "range" not in card(out)
    latents = torch.randn(3, 4, 8, 8)
    run = lambda name, given: ort.InferenceSession(str(tmp_path / name), providers=["CPUExecutionProvider"]).run(None, given)  # noqa: E731
    with torch.no_grad():
        np.testing.assert_allclose(
            run("teacher.vae_decoder.onnx", {"latents": latents.numpy()})[0], vae.decode(latents / 0.25).sample.numpy(), atol=1e-4
        )
        prompts = np.load(tmp_path / "teacher.prompts.npz")
        assert prompts.files == ["encoder_hidden_states"]
        ids = tokenizer(["a cat", "no dog"], padding="max_length", max_length=12, return_tensors="pt").input_ids
        np.testing.assert_allclose(prompts["encoder_hidden_states"], encoder(ids).last_hidden_state.numpy(), atol=1e-5)
        np.testing.assert_allclose(
            run("teacher.text_encoder.onnx", {"input_ids": ids.numpy()})[0], prompts["encoder_hidden_states"], atol=1e-4
        )
    null = tomllib.loads((tmp_path / "teacher.card.toml").read_text())["conditions"]["encoder_hidden_states"]["null"]
    assert len(null) == 12 * 32
    # Back as a pipeline of diffusers: one call of it gives what the student's and the decoder's files give.
    report = same_text_images(out, small.conditional(), folder, prompts)
    assert (report["pipeline"], report["scheduler"]) == ("StableDiffusionPipeline", "DDIMScheduler")
    # The decoder's file behind the student: the scale is applied once.
    disback("export", tmp_path / "student.onnx", "--decoder", tmp_path / "teacher.vae_decoder.onnx", "-o", tmp_path / "images.onnx")
    given = {"noise": latents[:1].numpy(), "encoder_hidden_states": prompts["encoder_hidden_states"][:1]}
    (made,) = run("images.onnx", given)
    with torch.no_grad():
        expected = vae.decode(torch.from_numpy(run("student.onnx", given)[0]) / 0.25).sample.numpy()
    np.testing.assert_allclose(np.clip(made, -1, 1), np.clip(expected, -1, 1), atol=1e-4)


@pytest.mark.parametrize(
    "kind", ["StableDiffusionXLPipeline", "PixArtAlphaPipeline", "FluxPipeline", "StableDiffusion3Pipeline", "StableDiffusion3 without T5"]
)
def test_prompts_of_every_pipeline(tmp_path, capsys, kind):
    folder, more = small.text_pipeline(kind, tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\nno dog\n")
    out = tmp_path / "teacher.onnx"
    words = ["--vae", "--text-encoder", "--prompts", tmp_path / "prompts.txt", "--null-prompt", ""]
    assert convert(folder, out, *more, *words) == 0, capsys.readouterr().err
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert {Path(name).name for name in result["files"]} == {p.name for p in tmp_path.iterdir() if p.name.startswith("teacher")}
    about, stored = card(out), np.load(tmp_path / "teacher.prompts.npz")
    conditions = [key.split(".")[1] for key in about if key.startswith("conditions.") and key.endswith(".kind")]
    assert sorted(stored.files) == sorted(conditions)
    net = ort.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    shape = [2, *json.loads(about["shape"])]
    given = {"sample": np.ones(shape, "f4"), "timestep": np.full(2, 0.5, "f4"), **{name: stored[name] for name in stored.files}}
    given |= {"guidance": np.full(2, 3.5, "f4")} if kind.startswith("Flux") else {}
    assert net.run(None, given)[0].shape == tuple(shape)
    # the whole pipeline's own embeddings, for one prompt at a time
    index = json.loads((folder / "model_index.json").read_text())
    pipe = getattr(diffusers, index["_class_name"]).from_pretrained(folder, **{part: None for part in index if index[part] == [None, None]})
    more = {"max_sequence_length": 6} if kind.startswith(("Flux", "PixArt")) else {"max_sequence_length": 8} if "3" in kind else {}
    more |= {"prompt_2": None, "prompt_3": None} if "3" in kind else {}
    with torch.no_grad():
        native = [pipe.encode_prompt(prompt=[text], **({"prompt_2": None} if kind.startswith("Flux") else {}), **more) for text in ("a cat", "no dog")]
    np.testing.assert_allclose(stored["encoder_hidden_states"], np.concatenate([row[0].numpy() for row in native]), atol=1e-5)
    if "pooled_projections" in stored:
        pooled = [row[1 if kind.startswith("Flux") else 2].numpy() for row in native]
        np.testing.assert_allclose(stored["pooled_projections"], np.concatenate(pooled), atol=1e-5)
    if "text_embeds" in stored:
        np.testing.assert_allclose(stored["text_embeds"], np.concatenate([row[2].numpy() for row in native]), atol=1e-5)
        assert stored["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    if "encoder_attention_mask" in stored:
        assert np.array_equal(stored["encoder_attention_mask"], np.concatenate([row[1].numpy() for row in native]))
    null = tomllib.loads((tmp_path / "teacher.card.toml").read_text())["conditions"]
    assert {name: len(value["null"]) for name, value in null.items()} == {name: stored[name][0].size for name in stored.files}
    assert (not any(null["encoder_hidden_states"]["null"])) == kind.startswith("StableDiffusionXL")
    # every encoder of the pipeline, and the decoder, give under ONNX Runtime what they give in PyTorch: the converter's own check
    encoders = sum(name.startswith("text_encoder") for name in pipe.components if pipe.components[name] is not None)
    assert len(list(tmp_path.glob("teacher.text_encoder*.onnx"))) == encoders and (tmp_path / "teacher.vae_decoder.onnx").exists()
    # Back as a pipeline of diffusers. (PixArt's gives networks of less than 1024 pixels no resolution, which this one wants.)
    if kind.startswith("PixArt"):
        return
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"shift_factor": 0.05}))
    flow = kind.startswith(("Flux", "StableDiffusion3"))
    more = {"max_sequence_length": 6 if kind.startswith("Flux") else 8, "height": 16, "width": 16} if flow else {}
    steps = {"sigmas": [3.0, 0.5], "stochastic": "without" in kind} if "3" in kind else None
    report = same_text_images(out, pipe.components.get("unet") or pipe.transformer, folder, dict(stored), steps, **more)
    assert report["scheduler"] == ("FlowMatchEulerDiscreteScheduler" if flow else "DDIMScheduler")


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (FLOW, {"schedule.kind": "flow", "schedule.shift": 3.0, "prediction": "flow", "time_unit": "thousand"}),
        (FLOW | {"invert_sigmas": True}, {"schedule.kind": "flow", "schedule.direction": "noise-to-data", "time_unit": "thousand"}),
        ({"_class_name": "EDMEulerScheduler", "sigma_max": 70}, {"schedule.kind": "edm", "schedule.sigma_max": 70.0, "prediction": "edm-raw"}),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}, {"schedule.betas": "cosine", "prediction": "denoised"}),
    ],
)  # fmt: skip
def test_scheduler_configurations(config, want):
    found = scheduler.card_of(config)
    assert {key: found[key] for key in want} == want


def test_schedule_tables_are_those_of_diffusers():
    for config in ({"rescale_betas_zero_snr": True, **SD}, {"trained_betas": [0.01, 0.02, 0.05]}):
        native = diffusers.DDIMScheduler(**config)
        table = scheduler.card_of(dict(native.config) | {"_class_name": "DDIMScheduler"})["schedule.table"]
        np.testing.assert_allclose(table[:-1], native.alphas_cumprod.numpy()[:-1], rtol=2e-4)
    betas = scheduler.betas_of("squaredcos_cap_v2", 0, 0, 1000)
    np.testing.assert_allclose(betas, diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").betas.numpy(), rtol=1e-5)


@pytest.mark.parametrize("config", [{"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"}, {"_class_name": "X", "prediction_type": "score"}])
def test_schedulers_without_a_card_are_refused(config):
    with pytest.raises(ConversionError, match="by --card"):
        scheduler.card_of(config)


def refused(folder, tmp_path, capsys, *more):
    before = sorted(p.name for p in tmp_path.iterdir())
    assert convert(folder, tmp_path / "teacher.onnx", *more) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    return capsys.readouterr().err


def test_bad_folders_are_refused(tmp_path, capsys):
    assert "no such folder" in refused(tmp_path / "absent", tmp_path, capsys)
    (tmp_path / "empty").mkdir()
    assert "not a diffusers model" in refused(tmp_path / "empty", tmp_path, capsys)
    folder = small.write(tmp_path / "p", small.unet(), "unet", "DDPMPipeline")
    assert "no scheduler/scheduler_config.json" in refused(folder, tmp_path, capsys)
    assert "no prior folder" in refused(folder, tmp_path, capsys, "--part", "prior").replace("no prior or", "no prior")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"_class_name": "UNet9000"}))
    said = refused(folder, tmp_path, capsys)
    assert "UNet9000 is not known" in said and "FluxTransformer2DModel" in said
    (folder / "unet" / "config.json").write_text("{")
    assert "not JSON" in refused(folder, tmp_path, capsys)


def test_a_folder_of_half_precision_weights_is_read(tmp_path, capsys):
    # what many pipelines are shipped with: diffusion_pytorch_model.fp16.safetensors alone
    net = small.unet().half()
    folder = small.write(tmp_path / "p", small.unet(), "unet", "DDPMPipeline", diffusers.DDPMScheduler())
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    net.save_pretrained(folder / "unet", variant="fp16")
    assert convert(folder, tmp_path / "teacher.onnx") == 0, capsys.readouterr().err
    kept = {t.name: t for t in onnx.load(tmp_path / "teacher.onnx").graph.initializer}
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(kept["conv_in.weight"]), net.conv_in.weight.float().numpy(force=True))


def test_weights_that_do_not_fit_are_listed(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    folder = small.write(tmp_path / "p", small.unet(), "unet", "DDPMPipeline", diffusers.DDPMScheduler())
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["foreign.weight"] = torch.zeros(3)
    del state["conv_in.bias"]
    save_file(state, path)
    said = refused(folder, tmp_path, capsys)
    assert "missing (1): conv_in.bias" in said and "surplus (1): foreign.weight" in said
