"""Trains the digits classifier whose features measure the distance between sets of images.

    python train_classifier.py        # writes classifier.onnx and digits.npz beside this file

The held-out accuracy is measured on the last 297 digits (other writers than the first 1500); those are never trained on.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common import HERE, digits, export, features, from_uint8, session, to_uint8

VARIANCE = 1280.0  # of the features, summed over all 64, over the real digits


class Classifier(nn.Module):
    """images [B,1,8,8] in [-1,1] -> features [B,64] (after the ReLU of the last hidden layer), logits [B,10]."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.hidden = nn.Linear(32 * 16, 64)
        self.logits = nn.Linear(64, 10)

    def forward(self, images):
        h = F.relu(self.conv1(images))
        h = F.relu(self.conv2(h))
        h = F.relu(self.conv3(h))
        h = F.relu(self.hidden(h.flatten(1)))
        return h, self.logits(h)


def shifted(x):
    """Moves every image by a fraction of a pixel and scales it a little, at random; black comes in from outside."""
    count = len(x)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = 1 + 0.1 * torch.randn(count)
    theta[:, 1, 1] = 1 + 0.1 * torch.randn(count)
    theta[:, 0, 1] = 0.15 * torch.randn(count)
    theta[:, :, 2] = 0.15 * torch.randn(count, 2)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images, labels = digits()
    pixels = to_uint8(images)
    images = torch.from_numpy(from_uint8(pixels))
    targets = torch.from_numpy(labels)
    train, held_out = slice(0, 1500), slice(1500, None)
    net = Classifier()
    steps = args.epochs * 1500 // 100
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        pick = torch.randint(0, 1500, (100,))
        x = images[train][pick]
        x = shifted(x) + 0.1 * torch.rand(100, 1, 1, 1) * torch.randn_like(x)
        hidden = F.dropout(net(x)[0], 0.3)
        loss = F.cross_entropy(net.logits(hidden), targets[train][pick], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    net.eval()
    with torch.no_grad():
        held = (net(images[held_out])[1].argmax(1) == targets[held_out]).float().mean().item()
        seen = (net(images[train])[1].argmax(1) == targets[train]).float().mean().item()
    print(f"accuracy: {seen:.4f} on the 1500 trained digits, {held:.4f} on the 297 held out")
    # a fixed scale of the features, whatever the training gave: the distance is in units of the features' variance, which
    # over the real digits sums to VARIANCE; the logits stay what they were
    with torch.no_grad():
        factor = (VARIANCE / net(images)[0].var(0).sum()) ** 0.5
        net.hidden.weight *= factor
        net.hidden.bias *= factor
        net.logits.weight /= factor
    path = args.out / "classifier.onnx"
    metadata = {
        "disback.features.input": "images",
        "disback.features.output": "features",
        "disback.features.range": "[-1.0, 1.0]",
        "disback.features.shape": "[1, 8, 8]",
        "disback.provenance": f"digits classifier trained by examples/digits/train_classifier.py on the first 1500 of "
        f"scikit-learn's digits (UCI optical recognition of handwritten digits); held-out accuracy {held:.3f}",
    }
    export(net, (images[:4],), path, metadata, ["images"], ["features", "logits"])
    ours = session(path).run(["features", "logits"], {"images": images.numpy()})
    with torch.no_grad():
        native = net(images)
    worst = max(float(np.abs(a - b.numpy()).max()) for a, b in zip(ours, native))
    if worst > 1e-4:
        raise SystemExit(f"ONNX Runtime differs from torch by {worst}")
    print(f"{path}: {path.stat().st_size} bytes, ONNX Runtime differs from torch by {worst:.1e}")
    np.savez_compressed(args.out / "digits.npz", images=pixels[:, 0], labels=labels)
    values = features(pixels, path)[0]
    print(f"feature variance summed over the 64 features: {np.cov(values, rowvar=False).trace():.2f}")


if __name__ == "__main__":
    main()
