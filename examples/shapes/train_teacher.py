"""Trains the shapes teacher and exports it with its card: `python train_teacher.py` (a quarter of an hour on one core).

The loss and the noise levels are those of the digits' teacher (examples/digits/train_teacher.py); the images are rendered.
"""

import argparse
import copy
import math
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from model import NULL_CLASS, SIGMA_DATA, Denoiser
from render import CLASSES, draw, render

CARD = {
    "sample": "x",
    "time": "sigma",
    "output": "denoised",
    "prediction": "denoised",
    "time_unit": "sigma",
    "shape": "[3, 16, 16]",
    "layout": "nchw",
    "range": "[-1.0, 1.0]",
    "sigma_data": "0.5",
    "dataset": "shapes",
    "schedule.kind": "edm",
    "schedule.sigma_min": "0.002",
    "schedule.sigma_max": "80.0",
    "schedule.rho": "7.0",
    "conditions.labels.kind": "class-index",
    "conditions.labels.classes": str(CLASSES),
    "conditions.labels.null": str(NULL_CLASS),
}


def data(count, seed=0):
    """`count` rendered images [count,3,16,16] f32 and their labels."""
    rng = np.random.default_rng(seed)
    parts = []
    for start in range(0, count, 256):
        labels, factors = draw(rng, min(256, count - start))
        parts.append((render(labels, factors), labels))
    return (torch.from_numpy(np.concatenate(p)) for p in zip(*parts))


def draw_sigma(count):
    """As for the digits: lognormal, a quarter log-uniform over the whole range."""
    log_sigma = -1.2 + 1.2 * torch.randn(count)
    uniform = math.log(0.002) + torch.rand(count) * math.log(80 / 0.002)
    return torch.where(torch.rand(count) < 0.25, uniform, log_sigma).exp()


def train(net, images, labels, steps, batch, lr, ema_half_life):
    """Trains `net` in place; returns the averaged copy. `ema_half_life` is in images."""
    average = copy.deepcopy(net)
    optimiser = torch.optim.Adam(net.parameters(), lr=lr, betas=(0.9, 0.99))
    started, total = time.time(), 0.0
    for step in range(1, steps + 1):
        pick = torch.randint(0, len(images), (batch,))
        x0 = images[pick]
        label = torch.where(torch.rand(batch) < 0.1, NULL_CLASS, labels[pick])
        sigma = draw_sigma(batch)
        made = net(x0 + sigma[:, None, None, None] * torch.randn_like(x0), sigma, label)
        weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
        loss = (weight * (made - x0).square().mean((1, 2, 3))).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.param_groups[0]["lr"] = lr * min(1.0, step / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimiser.step()
        keep = 0.5 ** (batch / min(ema_half_life, 0.05 * step * batch))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), net.parameters()):
                mean.lerp_(value, 1 - keep)
        total += loss.item()
        if step % 100 == 0:
            print(f"step {step}/{steps}  loss {total / 100:.4f}  {time.time() - started:.0f} s", flush=True)
            total = 0.0
    return average


def write(net, path, provenance):
    """Exports the denoiser with its card; checks the file against torch."""
    sys.path.append(str(HERE.parent / "digits"))
    from common import export_denoiser

    metadata = {f"disback.{key}": value for key, value in CARD.items()} | {"disback.provenance": provenance}
    args = (torch.randn(4, 3, 16, 16), torch.tensor([0.01, 0.5, 3.0, 80.0]), torch.tensor([0, 3, 5, NULL_CLASS]))
    x, labels = torch.randn(33, 3, 16, 16), torch.arange(33) % (CLASSES + 1)
    sigma = torch.exp(torch.linspace(math.log(0.002), math.log(80), 33))
    x = x * (sigma**2 + 0.25).sqrt()[:, None, None, None]
    export_denoiser(net, args, path, metadata, [(x, sigma, labels)])


def main():
    warnings.filterwarnings("ignore", category=FutureWarning)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=24_000)
    parser.add_argument("--out", type=Path, default=HERE / "teacher.onnx")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = Denoiser()
    print(f"{sum(p.numel() for p in net.parameters())} parameters")
    images, labels = data(args.images)
    net = train(net, images, labels, args.steps, args.batch, 3e-3, 20_000)
    torch.save(net.state_dict(), args.out.with_suffix(".pt"))
    write(net, args.out, f"trained by examples/shapes/train_teacher.py on {args.images} images of render.py, {args.steps} steps of {args.batch}")


if __name__ == "__main__":
    main()
