"""Folders that `disback export` writes for a framework's pipelines, beside student.onnx: the same noise gives the same images."""

import functools
import json

import numpy as np
import onnx
import onnxruntime as ort
import torch
from proof import card, disback
from safetensors.torch import save_file

# Between PyTorch and ONNX Runtime, in standard deviations of the images.
TOLERANCE = 1e-4


def other_weights(teacher, net, file):
    """Weights that are not the teacher's, as a run writes them: in the framework's names and layout."""
    random = torch.Generator().manual_seed(5)
    held = {t.name for t in onnx.load(teacher).graph.initializer} & set(json.loads(card(teacher)["parameters"]))
    state = {name: value.detach() for name, value in net.state_dict().items() if name in held}
    # Zeros, as layers begin, would hide what is before them.
    state = {n: v * (1 + 0.2 * torch.randn(v.shape, generator=random)) + 0.02 * torch.randn(v.shape, generator=random) for n, v in state.items()}
    save_file({name: value.contiguous() for name, value in state.items()}, file)
    return state


def export(teacher, form, folder, out, *words):
    """The folder's report."""
    made = disback("export", teacher, "--format", form, "--pipeline", folder, "-o", out, *words)
    assert made["out"] == str(out) and not [p for p in out.parent.iterdir() if p.name.startswith(".disback")]
    return made["report"]


def student(path, noise, **conditions):
    """What student.onnx makes of noise."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["sample"], {"noise": noise.numpy(), **conditions})[0]


def called(report, pipe, prompt="a cat", **more):
    """The pipeline, called as the report says."""
    pipe.set_progress_bar_config(disable=True)
    call = report["call"].replace("a prompt", prompt)
    # diffusers' flows draw the noise between steps from torch's own generator.
    torch.manual_seed(10)
    return eval(call, {"pipe": functools.partial(pipe, generator=torch.Generator().manual_seed(9), **more)})  # noqa: S307


def noise(*shapes, seed=9):
    """What a pipeline draws from that generator, in turn."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def same(ours, theirs, tolerance=TOLERANCE):
    """Equal to the tolerance, and not trivially so."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape and theirs.std() > 1e-3
    off = np.abs(ours - theirs).max() / theirs.std()
    assert off <= tolerance, f"{off:.2e} standard deviations apart"
    return off


def decoded(pipe, latents):
    """Images of latents by the pipeline's own VAE."""
    config = pipe.vae.config
    with torch.no_grad():
        made = pipe.vae.decode(torch.from_numpy(latents) / config.scaling_factor + (config.shift_factor or 0)).sample
    return pipe.image_processor.postprocess(made, output_type="np")


def run_of(folder, student):
    """A run of these settings of the student, which names its steps to an export."""
    folder.mkdir()
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in student.items())
    (folder / "config.toml").write_text(f"[student]\n{lines}")
    return ["--run", folder]


def same_text_images(teacher, net, folder, prompts, steps=None, **more):
    """A text-to-image pipeline with other weights in its network, by one call beside student.onnx and the VAE. Gives the report."""
    import diffusers

    place, steps = teacher.parent, steps or {"sigmas": []}
    other_weights(teacher, net, place / "w.safetensors")
    given = ["--weights", place / "w.safetensors", *run_of(place / "run", steps)]
    report = export(teacher, "diffusers", folder, place / "exported", *given)
    disback("export", teacher, *given, "-o", place / "student.onnx")
    index = json.loads((place / "exported" / "model_index.json").read_text())
    absent = {part: None for part, kind in index.items() if kind == [None, None]}
    pipe = diffusers.DiffusionPipeline.from_pretrained(place / "exported", **absent)
    assert all((place / "exported" / part).is_symlink() for part in report["linked"]) and "vae" in report["linked"]
    made = called(report, pipe, output_type="np", **more).images
    shape = (1, *json.loads(card(teacher)["shape"]))
    drawn = noise(shape) + (noise(*[shape] * len(steps["sigmas"]), seed=10) if steps.get("stochastic") else [])
    ours = student(place / "student.onnx", torch.cat(drawn, 1), **{name: value[:1] for name, value in prompts.items()})
    off = same(made, decoded(pipe, ours))
    print(f"{report['pipeline']}, {report['scheduler']}: {off:.1e} deviations apart")
    return report
