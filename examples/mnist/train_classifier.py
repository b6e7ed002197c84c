"""Trains the classifier whose features measure the distance between sets of MNIST images: `python train_classifier.py` (a few
minutes on one core). Writes classifier.onnx and test.npz, the first 200 images of the test set, beside this file.

The accuracy is measured on the 10,000 images of the test set, which are never trained on.
"""

import argparse
import math
import sys
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
from fetch import read, scaled

VARIANCE = 1280.0  # of the features, summed over all 64, over the training images: the unit of the digits' distances


class Classifier(nn.Module):
    """images [B,1,28,28] in [-1,1] -> features [B,64] (after the ReLU of the last hidden layer), logits [B,10]."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.hidden = nn.Linear(64 * 49, 64)
        self.logits = nn.Linear(64, 10)

    def forward(self, images):
        h = F.relu(self.conv1(images))
        h = F.relu(self.conv2(h))
        h = F.relu(self.conv3(h))
        h = F.relu(self.hidden(h.flatten(1)))
        return h, self.logits(h)


def moved(x):
    """Scales, slants and shifts every image a little, at random; none is flipped. Black comes in from outside."""
    theta = torch.zeros(len(x), 2, 3)
    theta[:, 0, 0] = 1 + 0.08 * torch.randn(len(x))
    theta[:, 1, 1] = 1 + 0.08 * torch.randn(len(x))
    theta[:, 0, 1] = 0.1 * torch.randn(len(x))
    theta[:, :, 2] = 0.07 * torch.randn(len(x), 2)
    return F.grid_sample(x + 1, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False) - 1


def train(net, images, labels, epochs, batch=128):
    """Trains `net` in place."""
    steps = epochs * len(images) // batch
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    for step in range(steps):
        pick = torch.randint(0, len(images), (batch,))
        # A little noise: what a denoiser leaves should not be what decides.
        x = moved(images[pick])
        x = x + 0.1 * torch.rand(batch, 1, 1, 1) * torch.randn_like(x)
        loss = F.cross_entropy(net.logits(F.dropout(net(x)[0], 0.3)), labels[pick], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.param_groups[0]["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimiser.step()
        if step % 468 == 0:
            print(f"step {step}/{steps}  loss {loss.item():.4f}", flush=True)


def run(net, images):
    """Features and logits of many images, a part at a time."""
    with torch.no_grad():
        parts = [net(part) for part in images.split(1000)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def main():
    warnings.filterwarnings("ignore", category=FutureWarning)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images, labels = read("train")
    images, labels = torch.from_numpy(scaled(images)), torch.from_numpy(labels)
    pixels, classes = read("t10k")
    test = torch.from_numpy(scaled(pixels))
    net = Classifier()
    train(net, images, labels, args.epochs)
    net.eval()
    accuracy = float((run(net, test)[1].argmax(1).numpy() == classes).mean())
    print(f"accuracy on the 10,000 test images: {accuracy:.4f}")
    # A fixed scale of the features, whatever the training gave; the logits stay what they were.
    with torch.no_grad():
        factor = (VARIANCE / run(net, images)[0].var(0).sum()) ** 0.5
        net.hidden.weight *= factor
        net.hidden.bias *= factor
        net.logits.weight /= factor
    metadata = {
        "disback.features.input": "images",
        "disback.features.output": "features",
        "disback.features.range": "[-1.0, 1.0]",
        "disback.features.shape": "[1, 28, 28]",
        "disback.provenance": f"examples/mnist/train_classifier.py on the 60,000 training images of MNIST; accuracy on the test set {accuracy:.4f}",
    }
    path = args.out / "classifier.onnx"
    export(net, (images[:4],), path, metadata, ["images"], ["features", "logits"])
    ours = session(path).run(["features", "logits"], {"images": test[:1000].numpy()})
    worst = max(float(np.abs(a - b.numpy()).max()) for a, b in zip(ours, run(net, test[:1000])))
    if worst > 1e-3:
        raise SystemExit(f"ONNX Runtime differs from torch by {worst}")
    print(f"{path}: {path.stat().st_size} bytes, ONNX Runtime differs from torch by {worst:.1e}")
    np.savez_compressed(args.out / "test.npz", images=pixels[:200], labels=classes[:200])


if __name__ == "__main__":
    main()
