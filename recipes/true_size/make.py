"""Writes a network of a recipe's true size, weights at random, as teacher.onnx with its card, through the converters.

    make.py NAME FOLDER    NAME: edm-cifar10, edm-ffhq64 (AFHQv2's network is the same), edm-imagenet64, sd15, sdxl

For `disback distill FOLDER/teacher.onnx --config recipes/NAME.toml --dry-run -o run`. sd15 takes 7 GB of disk and several
times its 3.4 GB of weights in memory; sdxl 10 GB of disk and 2 GB of memory (sdxl.py). Both also write FOLDER/prompts.npz, random
rows in the place of prompts' embeddings (conditions.file).
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
CONVERTERS = HERE.parent.parent / "converters"
EDM = {
    "edm-cifar10": ("cifar10", [3, 32, 32], 0),
    "edm-ffhq64": ("ffhq64", [3, 64, 64], 0),
    "edm-imagenet64": ("imagenet64", [3, 64, 64], 1000),
}


def convert(route, source, out, *more):
    command = [sys.executable, "-m", "disback_convert", route, source, "-o", out, "--no-sample", *more]
    code = f"import sys; sys.path[:0] = [{str(CONVERTERS)!r}, {str(HERE)!r}]; from disback_convert.cli import main; sys.exit(main())"
    subprocess.run([sys.executable, "-c", code, *map(str, command[3:])], check=True)


def edm(name, folder):
    function, shape, classes = EDM[name]
    card = {
        "sample": "x", "time": "sigma", "output": "denoised", "prediction": "denoised", "time_unit": "sigma", "shape": shape,
        "range": [-1.0, 1.0], "schedule.kind": "edm",
    }  # fmt: skip
    if classes:
        card |= {f"conditions.class_labels.{k}": v for k, v in {"kind": "one-hot", "classes": classes, "null": "zeros"}.items()}
    pairs = [part for key, value in card.items() for part in ("--card", f"{key}={value}")]
    convert("torch", f"edm_networks:{function}", folder / "teacher.onnx", *pairs)


def sd15(folder, channels=(320, 640, 1280, 1280), size=64, embedding=768):
    import diffusers
    import torch

    pipeline = folder / "pipeline"
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(
        sample_size=size, in_channels=4, out_channels=4, block_out_channels=channels, layers_per_block=2,
        cross_attention_dim=embedding, attention_head_dim=8,
    )  # fmt: skip
    print(f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} million weights", flush=True)
    net.save_pretrained(pipeline / "unet")
    del net
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False
    )
    scheduler.save_pretrained(pipeline / "scheduler")
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    (pipeline / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **parts}))
    random = np.random.default_rng(0)
    rows = lambda n: random.standard_normal((n, 77, embedding)).astype("f4")
    convert("diffusers", pipeline, folder / "teacher.onnx", "--card", "latent_scale=0.18215")
    np.savez(folder / "prompts.npz", encoder_hidden_states=rows(64))
    # What --null-prompt writes for the empty prompt, where there is a text encoder.
    null = json.dumps([float(v) for v in rows(1).ravel()])
    (folder / "teacher.card.toml").write_text(f"[conditions.encoder_hidden_states]\nnull = {null}\n")


if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    match name:
        case "sd15":
            sd15(folder)
        case "sdxl":
            from sdxl import sdxl

            sdxl(folder)
        case _:
            edm(name, folder)
