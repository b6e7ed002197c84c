"""Trains the network in whose features the shapes are judged: `python train_features.py` (about four minutes on one core).

It tells every factor of a rendered image: the class, and place, radius, hues and light as numbers (turns as cosine and
sine; the rotation as far as each shape shows it). Its last hidden layer is the feature space; `factors` is the second output.
"""

import argparse
import math
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.append(str(HERE.parent / "digits"))

from common import export, session
from render import CLASSES, FACTORS, draw, render

# Turns after which a shape looks the same; a disc shows no rotation.
SYMMETRY = np.array([0, 4, 3, 0, 4, 1])
VARIANCE = 64.0


def targets(labels, factors):
    """Labels and factors -> [n, 11]: x, y, radius to [-1,1], then (cos, sin) of rotation, hue, ground and light."""
    linear = [2 * (factors[n] - low) / (high - low) - 1 for n, (low, high) in FACTORS.items() if n in ("x", "y", "radius")]
    turns = [(SYMMETRY[labels] * factors["angle"], SYMMETRY[labels] > 0)] + [(factors[n], 1) for n in ("hue", "ground", "light")]
    circles = [shown * f(2 * np.pi * turn) for turn, shown in turns for f in (np.cos, np.sin)]
    return np.stack(linear + circles, 1).astype(np.float32)


class Network(nn.Module):
    """images [B,3,16,16] in [-1,1] -> features [B,64], class logits [B,6], factors [B,11]."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 48, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(48, 64, 3, stride=2, padding=1)
        self.hidden1 = nn.Linear(64 * 16, 128)
        self.hidden2 = nn.Linear(128, 64)
        self.logits = nn.Linear(64, CLASSES)
        self.factors = nn.Linear(64, 11)

    def forward(self, images):
        h = F.silu(self.conv1(images))
        h = F.silu(self.conv2(h))
        h = F.silu(self.conv3(h))
        features = self.hidden2(F.silu(self.hidden1(h.flatten(1))))
        return features, self.logits(F.silu(features)), self.factors(F.silu(features))


def main():
    warnings.filterwarnings("ignore", category=FutureWarning)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, default=32_000)
    parser.add_argument("--out", type=Path, default=HERE / "features.onnx")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = np.random.default_rng(2)
    parts = []
    for _ in range(args.images // 256):
        labels, factors = draw(rng, 256)
        parts.append((render(labels, factors), labels, targets(labels, factors)))
    images, labels, values = (torch.from_numpy(np.concatenate(p)) for p in zip(*parts))
    held = 2048
    net = Network()
    optimiser = torch.optim.Adam(net.parameters(), lr=0)
    started = time.time()
    for step in range(1, args.steps + 1):
        pick = torch.randint(held, len(images), (args.batch,))
        x = images[pick]
        # A little noise: what a denoiser leaves should not be what decides.
        x = x + 0.05 * torch.rand(args.batch, 1, 1, 1) * torch.randn_like(x)
        _, logits, made = net(x)
        loss = F.cross_entropy(logits, labels[pick]) + 4 * F.mse_loss(made, values[pick])
        optimiser.zero_grad()
        loss.backward()
        optimiser.param_groups[0]["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        optimiser.step()
        if step % 500 == 0:
            print(f"step {step}  loss {loss.item():.4f}  {time.time() - started:.0f} s", flush=True)
    net.eval()
    with torch.no_grad():
        features, logits, made = net(images[:held])
        accuracy = (logits.argmax(1) == labels[:held]).float().mean().item()
        error = (made - values[:held]).square().mean(0).sqrt()
        # The features' variance sums to VARIANCE over rendered images: a fixed unit of the distance.
        factor = (VARIANCE / features.var(0).sum()) ** 0.5
    print(f"held out: accuracy {accuracy:.4f}, root mean square errors {[round(e, 3) for e in error.tolist()]}")

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.factor = net, factor.item()

        def forward(self, images):
            features, logits, made = self.net(images)
            return features * self.factor, logits, made

    metadata = {
        "disback.features.input": "images",
        "disback.features.output": "features",
        "disback.features.range": "[-1.0, 1.0]",
        "disback.features.shape": "[3, 16, 16]",
        "disback.provenance": f"trained by examples/shapes/train_features.py on images of render.py; held-out accuracy {accuracy:.3f}",
    }
    scaled = Scaled().eval()
    export(scaled, (images[:4],), args.out, metadata, ["images"], ["features", "logits", "factors"])
    ours = session(args.out).run(None, {"images": images[:held].numpy()})
    with torch.no_grad():
        worst = max(float(np.abs(a - b.numpy()).max()) for a, b in zip(ours, scaled(images[:held])))
    print(f"{args.out}: {args.out.stat().st_size} bytes, ONNX Runtime differs from torch by {worst:.1e}")
    if worst > 1e-3:
        raise SystemExit("too far apart")


if __name__ == "__main__":
    main()
