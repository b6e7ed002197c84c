"""Trains the MNIST teacher and converts it: `python train_teacher.py` (about an hour on one core; it goes on where it was stopped).

The loss is the plain one of v-prediction (arXiv 2202.00512): |v(x_t; t, c) - (a_t e - s_t x0)|^2, where x_t = a_t x0 + s_t e. A
quarter of every batch takes its step uniformly from the 1000; the rest takes ln sigma = ln(s/a) ~ N(-0.4, 1.2^2), where the shapes
of digits are decided. A tenth of the labels is dropped to the null class. The converted weights are an average over the training
(EMA). The file is written by `disback-convert torch`, which compares it with this network under ONNX Runtime.
"""

import argparse
import copy
import math
import os
import sys
import time
import warnings
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.append(str(HERE.parents[1] / "converters"))

from fetch import read, scaled
from model import NULL_CLASS, Teacher, scheduler

WARM_UP, COOL_DOWN = 100, 0.5


def draw_steps(count, log_sigmas):
    """Steps of one batch, [count] int64: a quarter uniform, the others where their noise level is nearest."""
    log_sigma = -0.4 + 1.2 * torch.randn(count)
    near = torch.searchsorted(log_sigmas, log_sigma).clamp(max=len(log_sigmas) - 1)
    return torch.where(torch.rand(count) < 0.25, torch.randint(0, len(log_sigmas), (count,)), near)


def save(path, state):
    """Writes a checkpoint whole: a stopped process leaves the one before."""
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def train(net, images, labels, args):
    """Trains `net` for args.steps of args.batch images; returns the averaged copy. Checkpoints go to args.checkpoint."""
    average = copy.deepcopy(net)
    optimiser = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    abar = scheduler().alphas_cumprod
    a, s = abar.sqrt(), (1 - abar).sqrt()
    log_sigmas = (s / a).log()
    done = 0
    if args.checkpoint.is_file():
        state = torch.load(args.checkpoint, weights_only=True)
        for part, name in ((net, "net"), (average, "average"), (optimiser, "optimiser")):
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        done = state["step"]
        print(f"goes on after step {done}", flush=True)
    started, begun, total = time.time(), done, 0.0
    for step in range(done + 1, args.steps + 1):
        pick = torch.randint(0, len(images), (args.batch,))
        x0, t = images[pick], draw_steps(args.batch, log_sigmas)
        label = torch.where(torch.rand(args.batch) < 0.1, NULL_CLASS, labels[pick])
        noise, at, st = torch.randn_like(x0), a[t].view(-1, 1, 1, 1), s[t].view(-1, 1, 1, 1)
        loss = (net(at * x0 + st * noise, t.float(), label) - (at * noise - st * x0)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        left = (args.steps - step + 1) / (args.steps * COOL_DOWN)
        optimiser.param_groups[0]["lr"] = args.lr * min(1.0, step / WARM_UP) * math.sin(math.pi / 2 * min(1.0, left)) ** 2
        optimiser.step()
        # The average's memory grows with the training, so that it holds little of the random start.
        keep = 0.5 ** (1 / min(args.half_life, 0.05 * step))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), net.parameters()):
                mean.lerp_(value, 1 - keep)
        total += loss.item()
        if step % 50 == 0 or step == args.steps:
            rate = (step - begun) * args.batch / (time.time() - started)
            print(f"step {step}/{args.steps}  loss {total / (step % 50 or 50):.4f}  {rate:.0f} images/s", flush=True)
            total = 0.0
            parts = {"net": net.state_dict(), "average": average.state_dict(), "optimiser": optimiser.state_dict()}
            save(args.checkpoint, parts | {"step": step, "random": torch.get_rng_state()})
    return average.eval()


def convert(weights, out, steps, batch):
    """The averaged weights -> teacher.onnx with its card; raises where ONNX Runtime does not give this network's values."""
    from disback_convert import finish, torch_route
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in weights.items()}, out.with_suffix(".safetensors"))
    provenance = f"examples/mnist/train_teacher.py on the 60,000 training images of MNIST, {steps} steps of {batch}"
    network = torch_route.prepare("model:build", [f"provenance={provenance}"], HERE / "card.toml", out.with_suffix(".safetensors"))
    finish.show(finish.finish(network, finish.Options(out, sample=False)))
    out.with_suffix(".safetensors").unlink()


def main():
    warnings.filterwarnings("ignore", category=FutureWarning)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--half-life", type=float, default=150, help="of the average, in steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, default=HERE.parents[1] / "runs" / "mnist" / "teacher.pt")
    parser.add_argument("--out", type=Path, default=HERE / "teacher.onnx")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    images, labels = read("train")
    images, labels = torch.from_numpy(scaled(images)), torch.from_numpy(labels)
    args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    net = Teacher()
    print(f"{sum(p.numel() for p in net.parameters())} parameters; sigma_data {images.std().item():.4f}", flush=True)
    convert(train(net, images, labels, args).state_dict(), args.out, args.steps, args.batch)


if __name__ == "__main__":
    main()
