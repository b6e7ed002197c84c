"""`disback export --format diffusers` beside student.onnx: diffusers' own pipelines make the same images of the same noise."""

import json
import os
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from folders import called, export, noise, other_weights, run_of, same, student  # noqa: E402
from proof import TEACHERS, disback  # noqa: E402

DIGITS = TEACHERS / "diffusers_unet"
TEACHER = DIGITS / "teacher.onnx"
LABELS = np.arange(4)
# Another family for the same network: what its numbers mean is the card's to say.
EDM = ["schedule.kind=edm", "schedule.sigma_max=80.0", "schedule.sigma_min=0.002", "sigma_data=0.5"]
CARDS = {
    "v": [],
    "denoised": ["prediction=denoised"],
    "edm": [*EDM, "prediction=edm-raw", "time_unit=ln-sigma-4"],
    "consistency": [*EDM, "prediction=consistency", "time_unit=ln-sigma-250"],
}


def words(kind):
    """Command line of a card, the student at a level below the last."""
    given = [word for pair in CARDS[kind] for word in ("--card", pair)]
    return given + (["--sigma-init", "2.5"] if kind in ("v", "denoised") else [])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "student.safetensors"
    other_weights(TEACHER, diffusers.UNet2DModel.from_pretrained(DIGITS / "unet"), file)
    return file


@pytest.mark.parametrize("kind", CARDS)
def test_a_unet_of_pixels_makes_the_students_images(tmp_path, weights, kind):
    given = ["--weights", weights, *words(kind)]
    report = export(TEACHER, "diffusers", DIGITS, tmp_path / "p", *given)
    disback("export", TEACHER, *given, "-o", tmp_path / "student.onnx")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "p")
    assert type(pipe).__name__ == report["pipeline"] and type(pipe.scheduler).__name__ == report["scheduler"]
    made = called(report, pipe, output_type="np").images
    ours = student(tmp_path / "student.onnx", noise((4, 1, 8, 8))[0], class_labels=LABELS).transpose(0, 2, 3, 1)
    # EDM's pipelines start from noise that is 7.8e-5 larger, which the report says.
    assert (kind == "edm") == bool(report["warnings"])
    same(made, (ours / 2 + 0.5).clip(0, 1), 1e-3 if kind == "edm" else 1e-4)


@pytest.mark.parametrize("stochastic", [True, False])
def test_several_steps_are_those_of_the_student(tmp_path, weights, stochastic):
    """Steps at even places of the table: the sampler of latent consistency models with fresh noise, DDIM without."""
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    levels = [float(np.sqrt((1 - kept[k]) / kept[k])) for k in (499,)]
    given = ["--weights", weights, *run_of(tmp_path / "run", {"sigmas": levels, "stochastic": stochastic})]
    report = export(TEACHER, "diffusers", DIGITS, tmp_path / "p", *given)
    disback("export", TEACHER, *given, "-o", tmp_path / "student.onnx")
    assert report["scheduler"] == ("LCMScheduler" if stochastic else "DDIMScheduler")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "p")
    made = called(report, pipe, output_type="np").images
    drawn = torch.cat(noise(*[(4, 1, 8, 8)] * (2 if stochastic else 1)), 1)
    ours = student(tmp_path / "student.onnx", drawn, class_labels=LABELS).transpose(0, 2, 3, 1)
    same(made, (ours / 2 + 0.5).clip(0, 1))


def test_what_was_not_trained_stays_and_the_teachers_files_may_be_of_any_kind(tmp_path, weights):
    folder = tmp_path / "teacher"
    (folder / "unet").mkdir(parents=True)
    for name in ("model_index.json", "unet/config.json"):
        (folder / name).write_text((DIGITS / name).read_text())
    state = load_file(DIGITS / "unet" / "diffusion_pytorch_model.safetensors")
    # Two shards in half precision, and a tensor that the graph does not have.
    names = sorted(state)
    halves = [names[::2], names[1::2]]
    for k, half in enumerate(halves):
        tensors = {name: state[name].half() for name in half} | ({"unused.table": torch.arange(3)} if k else {})
        save_file(tensors, folder / "unet" / f"diffusion_pytorch_model.fp16-0000{k + 1}-of-00002.safetensors")
    export(TEACHER, "diffusers", folder, tmp_path / "p", "--weights", weights)
    made, student_state = load_file(tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors"), load_file(weights)
    assert set(made) == {*state, "unused.table"} and torch.equal(made["unused.table"], torch.arange(3))
    for name, value in student_state.items():
        assert made[name].dtype == torch.float32 and torch.equal(made[name], value), name
    with safe_open(tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def refused(*arguments, out):
    """Standard error of an export that fails, and that nothing was left of it."""
    import subprocess

    binary = Path(os.environ.get("DISBACK", Path(__file__).resolve().parents[2] / "target" / "release" / "disback"))
    done = subprocess.run([binary, "export", *map(str, arguments), "-o", out], capture_output=True, text=True)
    assert done.returncode, done.stdout
    assert not [p.name for p in out.parent.iterdir() if p.name.startswith(".disback")]
    return done.stderr


def test_what_cannot_be_a_folder_is_refused_and_leaves_nothing(tmp_path, weights):
    given = [TEACHER, "--weights", weights, "--format"]
    out = tmp_path / "out" / "p"
    out.parent.mkdir()

    def said(*more, form="diffusers"):
        text = refused(*given, form, *more, out=out)
        assert not out.exists(), text
        return text

    assert "--pipeline DIR" in said() and "optimum-cli" in said(form="optimum")
    assert "no such folder" in said("--pipeline", tmp_path / "absent")
    assert "_class_name" in said("--pipeline", tmp_path)
    assert "UNet2DModel" in said("--pipeline", DIGITS, form="optimum")
    assert "7.7% more" in said("--pipeline", DIGITS, "--sigma-init", "2.5", *words("edm"))
    flow = ["schedule.kind=flow", "prediction=flow", "time_unit=thousand"]
    flow = [word for pair in flow for word in ("--card", pair)]
    assert "classes in pixels" in said("--pipeline", DIGITS, *flow)
    assert "keeps the network as it is" in said("--pipeline", DIGITS, "--precision", "fp16")
    assert "--format diffusers or" in refused(TEACHER, "--weights", weights, "--pipeline", DIGITS, out=out)
    # A folder of another network: found while the weights are written.
    other = tmp_path / "other"
    (other / "unet").mkdir(parents=True)
    (other / "unet" / "config.json").write_text((DIGITS / "unet" / "config.json").read_text())
    assert "diffusion_pytorch_model*.safetensors" in said("--pipeline", other)
    state = load_file(DIGITS / "unet" / "diffusion_pytorch_model.safetensors")
    state["conv_in.weight"] = state["conv_in.weight"][:1].contiguous()
    save_file(state, other / "unet" / "diffusion_pytorch_model.safetensors")
    assert "`conv_in.weight` is" in said("--pipeline", other)
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    assert "not empty" in refused(*given, "diffusers", "--pipeline", DIGITS, out=out)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_the_written_files_say_what_they_are(tmp_path, weights):
    report = export(TEACHER, "diffusers", DIGITS, tmp_path / "new" / "p", "--weights", weights)
    index = json.loads((tmp_path / "new" / "p" / "model_index.json").read_text())
    assert index == {
        "_class_name": "ConsistencyModelPipeline", "_diffusers_version": "0.42.1",
        "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDIMScheduler"],
    }  # fmt: skip
    about = (tmp_path / "new" / "p" / "README.md").read_text()
    assert report["call"] in about and report["linked"] == []
    assert report["call"] == "pipe(batch_size=4, class_labels=[0, 1, 2, 3], num_inference_steps=1)"
