"""Trains a diffusion model of a table and exports it with its card.

    python train_teacher.py           # writes teacher.onnx and real.csv beside this file

The table is scikit-learn's breast-cancer data (Wolberg et al. 1995; 569 rows, 30 measurements, two diagnoses), each column with mean
0 and standard deviation 0.5. The network is a residual MLP inside EDM's preconditioning (arXiv 2206.00364, eq. 7), as TabDDPM
(Kotelnikov et al. 2023) has MLPs for tables.
"""

import argparse
import copy
import math
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "digits"))
from common import export  # noqa: E402

SIGMA_DATA = 0.5

CARD = {
    "sample": "row",
    "time": "sigma",
    "output": "denoised",
    "prediction": "denoised",
    "time_unit": "sigma",
    "shape": "[30]",
    "layout": "none",
    "modality": "vector",
    "sigma_data": str(SIGMA_DATA),
    "dataset": "breast-cancer",
    "schedule.kind": "edm",
    "schedule.sigma_min": "0.002",
    "schedule.sigma_max": "20.0",
    "schedule.rho": "7.0",
    "conditions.diagnosis.kind": "class-index",
    "conditions.diagnosis.classes": "2",
}


def table():
    """Rows [569, 30] f32 with mean 0 and standard deviation 0.5, diagnoses [569]."""
    data = load_breast_cancer()
    rows = (data.data - data.data.mean(0)) / data.data.std(0) * SIGMA_DATA
    return rows.astype(np.float32), data.target.astype(np.int64), [name.replace(" ", "_") for name in data.feature_names]


class Denoiser(nn.Module):
    """row [B,30], sigma [B], diagnosis [B] int64 -> denoised [B,30]."""

    def __init__(self, wide=128, blocks=3):
        super().__init__()
        self.register_buffer("freqs", torch.exp(torch.linspace(0.0, math.log(16.0), 16)))
        self.time = nn.Linear(32, wide)
        self.label = nn.Embedding(2, wide)
        self.first = nn.Linear(30, wide)
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(wide), nn.Linear(wide, wide), nn.Linear(wide, wide)]) for _ in range(blocks)
        )
        self.last = nn.Linear(wide, 30)

    def forward(self, row, sigma, diagnosis):
        s = sigma[:, None]
        total = s * s + SIGMA_DATA**2
        angles = (sigma.log() / 4)[:, None] * self.freqs
        emb = F.silu(self.time(torch.cat([angles.cos(), angles.sin()], 1)) + self.label(diagnosis))
        h = self.first(row / total.sqrt())
        for norm, up, down in self.blocks:
            h = h + down(F.silu(up(norm(h) + emb)))
        return SIGMA_DATA**2 / total * row + s * SIGMA_DATA / total.sqrt() * self.last(h)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--out", type=Path, default=HERE / "teacher.onnx")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows, labels, names = table()
    np.savetxt(HERE / "real.csv", rows, delimiter=",", header=",".join(names), comments="", fmt="%.5f")
    rows, labels = torch.from_numpy(rows), torch.from_numpy(labels)
    net = Denoiser()
    average = copy.deepcopy(net)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda k: min(1, (k + 1) / 200) * 0.5 * (1 + math.cos(math.pi * k / args.steps)))
    total = 0.0
    for step in range(1, args.steps + 1):
        pick = torch.randint(0, len(rows), (256,))
        x0 = rows[pick]
        sigma = torch.exp(-1.2 + 1.4 * torch.randn(256))
        x = x0 + sigma[:, None] * torch.randn_like(x0)
        weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
        loss = (weight * (net(x, sigma, labels[pick]) - x0).square().mean(1)).mean()
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
        if step % 1000 == 0:
            print(f"step {step}/{args.steps}  loss {total / 1000:.4f}", flush=True)
            total = 0.0
    average.eval()
    given = (torch.randn(2, 30), torch.tensor([0.5, 3.0]), torch.tensor([0, 1]))
    card = {f"disback.{key}": value for key, value in CARD.items()}
    card["disback.provenance"] = f"examples/table/train_teacher.py, {args.steps} steps of 256 rows, seed 0"
    export(average, given, args.out, card, ["row", "sigma", "diagnosis"], ["denoised"])


if __name__ == "__main__":
    main()
