"""Trains the digits teacher and exports it with its card.

    python train_teacher.py           # writes teacher.onnx beside this file

The loss is EDM's (arXiv 2206.00364, eq. 8): lambda(sigma) |D(x0 + sigma e; sigma, c) - x0|^2 with ln sigma ~ N(-1.2, 1.2^2);
a quarter of every batch takes ln sigma uniform over [0.002, 80] instead, so that the levels at which distillation
compares scores are all trained. A tenth of the labels is dropped to the null class. The exported weights are an average
over the training (EMA).
"""

import argparse
import copy
import math
import time
import warnings
from pathlib import Path

import torch

from common import HERE, digits, export_denoiser
from model import CLASSES, NULL_CLASS, SIGMA_DATA, Denoiser

CARD = {
    "sample": "x",
    "time": "sigma",
    "output": "denoised",
    "prediction": "denoised",
    "time_unit": "sigma",
    "shape": "[1, 8, 8]",
    "layout": "nchw",
    "range": "[-1.0, 1.0]",
    "sigma_data": "0.5",
    "dataset": "digits",
    "schedule.kind": "edm",
    "schedule.sigma_min": "0.002",
    "schedule.sigma_max": "80.0",
    "schedule.rho": "7.0",
    "conditions.labels.kind": "class-index",
    "conditions.labels.classes": str(CLASSES),
    "conditions.labels.null": str(NULL_CLASS),
}


def draw_sigma(count):
    """Noise levels of one batch, [count] f32."""
    log_sigma = -1.2 + 1.2 * torch.randn(count)
    uniform = math.log(0.002) + torch.rand(count) * math.log(80 / 0.002)
    return torch.where(torch.rand(count) < 0.25, uniform, log_sigma).exp()


def train(net, images, labels, steps, batch, lr, ema_half_life, weights=None):
    """Trains `net` in place; returns the averaged copy. `ema_half_life` is in images."""
    average = copy.deepcopy(net)
    optimiser = torch.optim.Adam(net.parameters(), lr=lr, betas=(0.9, 0.99))
    warm_up = 200
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda k: min(1.0, (k + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * k / steps)),
    )
    started, kept, total = time.time(), 0, 0.0
    for step in range(1, steps + 1):
        pick = torch.randint(0, len(images), (batch,))
        x0 = images[pick]
        dropped = torch.rand(batch) < 0.1
        label = torch.where(dropped, torch.full_like(labels[pick], NULL_CLASS), labels[pick])
        sigma = draw_sigma(batch)
        x = x0 + sigma[:, None, None, None] * torch.randn_like(x0)
        weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
        loss = (weight * (net(x, sigma, label) - x0).square().mean((1, 2, 3))).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        # the average's memory grows with the training, so that it holds little of the random start
        half_life = min(ema_half_life, 0.05 * step * batch)
        keep = 0.5 ** (batch / max(half_life, 1e-8))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), net.parameters()):
                mean.lerp_(value, 1 - keep)
        total, kept = total + loss.item(), kept + 1
        if step % 500 == 0 or step == steps:
            if weights:
                torch.save(average.state_dict(), weights)
            print(f"step {step}/{steps}  loss {total / kept:.4f}  {time.time() - started:.0f} s", flush=True)
            total, kept = 0.0, 0
    return average


def write(net, path, provenance):
    """Exports the denoiser with its card; checks the file against torch at batch sizes 1, 5 and 64."""
    metadata = {f"disback.{key}": value for key, value in CARD.items()} | {"disback.provenance": provenance}
    args = (torch.randn(4, 1, 8, 8), torch.tensor([0.01, 0.5, 3.0, 80.0]), torch.tensor([0, 3, 9, NULL_CLASS]))
    trials = []
    for batch in (1, 5, 64):
        sigma = torch.exp(torch.linspace(math.log(0.002), math.log(80), batch))
        x = sigma[:, None, None, None] * torch.randn(batch, 1, 8, 8)
        trials.append((x, sigma, torch.arange(batch) % (CLASSES + 1)))
    export_denoiser(net, args, path, metadata, trials)


def main():
    warnings.filterwarnings("ignore", category=FutureWarning)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--ema", type=float, default=50_000, help="half-life of the weight average, in images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--init", type=Path, help="go on from this state dict (of --weights) instead of a random start")
    parser.add_argument("--history", default="", help="how the weights of --init came about, for the provenance")
    parser.add_argument("--weights", type=Path, help="also save the torch state dict here")
    parser.add_argument("--out", type=Path, default=HERE / "teacher.onnx")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    images, labels = (torch.from_numpy(array) for array in digits())
    net = Denoiser()
    if args.init:
        net.load_state_dict(torch.load(args.init))
    count = sum(p.numel() for p in net.parameters())
    print(f"{count} parameters")
    net = train(net, images, labels, args.steps, args.batch, args.lr, args.ema, args.weights)
    provenance = (
        f"class-conditional EDM UNet, {count} parameters, trained by examples/digits/train_teacher.py on scikit-learn's "
        f"digits (UCI optical recognition of handwritten digits, 1797 images): {args.history}{args.steps} steps of {args.batch} images, "
        f"Adam {args.lr}, EMA half-life {args.ema:.0f} images, seed {args.seed}, torch {torch.__version__.split('+')[0]}"
    )
    write(net, args.out, provenance)


if __name__ == "__main__":
    main()
