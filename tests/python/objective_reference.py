"""Gradients of the score-distillation objectives, computed in f64 from their formulas in score units.

`python tests/python/objective_reference.py` writes tests/data/objectives.json, which the Rust tests compare with. The
denoisers are small nonlinear functions that both sides write down; everything else here is independent of the Rust code:
scores instead of denoised images, autograd through the whole expression.
"""

import json
from pathlib import Path

import torch

FILE = Path(__file__).parent.parent / "data" / "objectives.json"
SHAPE = (3, 2, 4, 3)
TARGET = (0.6, 0.3, -0.2, 0.1)
FAKE = (0.5, -0.4, 0.15, -0.3)
ALPHA = 1.2
C = 0.7


def denoiser(x, sigma, p):
    return (p[0] * x + p[1] * torch.tanh(x) + p[2] * torch.roll(x, 1, 3)) / (1 + sigma**2) + p[3]


def score(x_t, sigma, p):
    return (denoiser(x_t, sigma, p) - x_t) / sigma**2


def draw():
    g = torch.Generator().manual_seed(5)
    options = {"generator": g, "dtype": torch.float64}
    return torch.randn(SHAPE, **options), torch.randn(SHAPE, **options), torch.tensor([0.3, 1.1, 4.0]).double()


def gradients():
    x0, e, sigma = draw()
    s = sigma.view(-1, 1, 1, 1)
    pixels = (1, 2, 3)

    def of(loss):
        x = x0.clone().requires_grad_(True)
        value = loss(x, x + s * e)
        (gradient,) = torch.autograd.grad(value, x)
        return gradient

    def stopped(x_t):
        with torch.no_grad():
            return score(x_t, s, TARGET), score(x_t, s, FAKE)

    def kl(x, x_t):
        target, fake = stopped(x_t)
        return (s**2 * (fake - target) * x).mean()

    def dmd(x, x_t):
        target, fake = stopped(x_t)
        residual = (x_t - x + s**2 * target).detach().abs().mean(pixels, keepdim=True)
        return (s**2 * (fake - target) / residual * x).mean()

    def sds(x, x_t):
        target, _ = stopped(x_t)
        return (s * (-s * target - e) * x).mean()

    def sid(x, x_t):
        target, fake = score(x_t, s, TARGET), score(x_t, s, FAKE)
        weight = (s * e + s**2 * target).detach().abs().mean(pixels, keepdim=True)
        difference = target - fake
        return (s**4 / weight * difference * (target + e / s - ALPHA * difference)).mean()

    def sim(x, x_t):
        target, fake = score(x_t, s, TARGET), score(x_t, s, FAKE)
        y = fake - target
        direction = y / torch.sqrt((y**2).sum(pixels, keepdim=True) + C**2)
        return -(s**2 * direction * (fake + e / s)).sum(pixels).mean()

    methods = {"diff-instruct": kl, "dmd": dmd, "sds": sds, "sid": sid, "sim": sim}
    return {name: of(loss).flatten().tolist() for name, loss in methods.items()}


def reference():
    x0, e, sigma = draw()
    return {
        "shape": list(SHAPE),
        "x0": x0.flatten().tolist(),
        "noise": e.flatten().tolist(),
        "sigma": sigma.tolist(),
        "target": list(TARGET),
        "fake": list(FAKE),
        "alpha": ALPHA,
        "c": C,
        "gradients": gradients(),
    }


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(reference()) + "\n")
