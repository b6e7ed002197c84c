"""Trains a diffusion policy on demonstrations and exports it with its card.

    python train_teacher.py           # writes teacher.onnx and observations.npz beside this file

The network is a small 1-D UNet over time, conditioned on the observation, inside EDM's preconditioning (arXiv 2206.00364, eq. 7);
diffusion policies are Chi et al. 2023 (arXiv 2303.04137). A sample is a chunk of actions [16, 2].
"""

import argparse
import copy
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from task import HORIZON, windows

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "digits"))
from common import export  # noqa: E402

SIGMA_DATA = 0.5

CARD = {
    "sample": "actions",
    "time": "sigma",
    "output": "denoised",
    "prediction": "denoised",
    "time_unit": "sigma",
    "shape": f"[{HORIZON}, 2]",
    "layout": "channels-last",
    "modality": "sequence",
    "sigma_data": str(SIGMA_DATA),
    "dataset": "obstacle",
    "schedule.kind": "edm",
    "schedule.sigma_min": "0.002",
    "schedule.sigma_max": "20.0",
    "schedule.rho": "7.0",
    "conditions.observation.kind": "embedding",
    "conditions.observation.shape": "[3]",
}


class Block(nn.Module):
    """Convolution over time, scaled and shifted by the embedding."""

    def __init__(self, c_in, c_out, emb):
        super().__init__()
        self.conv1 = nn.Conv1d(c_in, c_out, 3, padding=1)
        self.norm = nn.GroupNorm(8, c_out)
        self.emb = nn.Linear(emb, 2 * c_out)
        self.conv2 = nn.Conv1d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv1d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        scale, shift = self.emb(emb)[:, :, None].chunk(2, dim=1)
        h = self.norm(self.conv1(x)) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class Policy(nn.Module):
    """actions [B,16,2], sigma [B], observation [B,3] -> denoised [B,16,2]."""

    def __init__(self, wide=(32, 64), emb=64):
        super().__init__()
        a, b = wide
        self.register_buffer("freqs", torch.exp(torch.linspace(0.0, math.log(16.0), 16)))
        self.time = nn.Linear(32, emb)
        self.see = nn.Sequential(nn.Linear(3, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.first = nn.Conv1d(2, a, 3, padding=1)
        self.down1 = Block(a, a, emb)
        self.down = nn.Conv1d(a, b, 3, stride=2, padding=1)
        self.middle = nn.ModuleList([Block(b, b, emb), Block(b, b, emb)])
        self.up = nn.ConvTranspose1d(b, a, 4, stride=2, padding=1)
        self.up1 = Block(2 * a, a, emb)
        self.last = nn.Conv1d(a, 2, 3, padding=1)

    def forward(self, actions, sigma, observation):
        s = sigma[:, None, None]
        total = s * s + SIGMA_DATA**2
        angles = (sigma.log() / 4)[:, None] * self.freqs
        emb = F.silu(self.time(torch.cat([angles.cos(), angles.sin()], 1)) + self.see(observation))
        x = (actions / total.sqrt()).transpose(1, 2)
        h = self.down1(self.first(x), emb)
        m = self.down(h)
        for block in self.middle:
            m = block(m, emb)
        h = self.up1(torch.cat([self.up(m), h], 1), emb)
        f = self.last(F.silu(h)).transpose(1, 2)
        return SIGMA_DATA**2 / total * actions + s * SIGMA_DATA / total.sqrt() * f


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--demonstrations", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=HERE / "teacher.onnx")
    args = parser.parse_args()
    torch.manual_seed(0)
    observations, actions = (torch.from_numpy(a) for a in windows(args.demonstrations, seed=0))
    net = Policy()
    average = copy.deepcopy(net)
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda k: min(1, (k + 1) / 200) * 0.5 * (1 + math.cos(math.pi * k / args.steps)))
    total = 0.0
    for step in range(1, args.steps + 1):
        pick = torch.randint(0, len(actions), (256,))
        x0 = actions[pick]
        sigma = torch.exp(-1.2 + 1.4 * torch.randn(256))
        some = torch.rand(256) < 0.2
        sigma[some] = torch.exp(math.log(0.002) + torch.rand(int(some.sum())) * math.log(20 / 0.002))
        x = x0 + sigma[:, None, None] * torch.randn_like(x0)
        weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
        loss = (weight * (net(x, sigma, observations[pick]) - x0).square().mean((1, 2))).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        rate.step()
        with torch.no_grad():
            keep = min(0.999, step / (step + 20))
            for mean, value in zip(average.parameters(), net.parameters()):
                mean.lerp_(value, 1 - keep)
        total += loss.item()
        if step % 500 == 0:
            print(f"step {step}/{args.steps}  loss {total / 500:.4f}", flush=True)
            total = 0.0
    average.eval()
    given = (torch.randn(2, HORIZON, 2), torch.tensor([0.5, 3.0]), torch.randn(2, 3))
    card = {f"disback.{key}": value for key, value in CARD.items()}
    card["disback.provenance"] = f"examples/policy/train_teacher.py, {args.steps} steps of 256 action chunks, seed 0"
    export(average, given, args.out, card, ["actions", "sigma", "observation"], ["denoised"])
    # What training is conditioned on: observations as they are met, without actions.
    some = np.random.default_rng(1).choice(len(observations), min(8192, len(observations)), replace=False)
    np.savez_compressed(HERE / "observations.npz", observation=observations.numpy()[some])


if __name__ == "__main__":
    main()
