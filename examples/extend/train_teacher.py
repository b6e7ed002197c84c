"""Trains a small digits teacher with an activation that ONNX does not define, and exports it as a custom operator.

    python train_teacher.py           # writes teacher.onnx beside this file

The activation is Snake (Ziyin et al. 2020, arXiv 2006.08195, eq. 3): x + sin(alpha x)^2 / alpha, with an alpha for each channel
that is learned. In the file it is `com.example.Snake(x, alpha)`, which no runtime knows.
"""

import argparse
import io
import sys
from pathlib import Path

import onnx
import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "digits"))
from common import digits  # noqa: E402
from train_teacher import CARD, SIGMA_DATA, train  # noqa: E402


class SnakeFunction(torch.autograd.Function):
    """The same in training and in the file, where it is one operator."""

    @staticmethod
    def forward(ctx, x, alpha):
        ctx.save_for_backward(x, alpha)
        return x + torch.sin(alpha * x) ** 2 / alpha

    @staticmethod
    def backward(ctx, grad):
        x, alpha = ctx.saved_tensors
        double, squared = torch.sin(2 * alpha * x), torch.sin(alpha * x) ** 2
        to_alpha = grad * (x * double / alpha - squared / alpha**2)
        return grad * (1 + double), to_alpha.sum((0, 2, 3)).reshape(alpha.shape)

    @staticmethod
    def symbolic(g, x, alpha):
        return g.op("com.example::Snake", x, alpha).setType(x.type())


class Snake(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):
        return SnakeFunction.apply(x, self.alpha)


class Block(nn.Module):
    def __init__(self, channels, emb):
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.emb = nn.Linear(emb, channels)
        self.snake = Snake(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, emb):
        h = self.conv1(self.norm(x)) + self.emb(emb)[:, :, None, None]
        return x + self.conv2(self.snake(h))


class Denoiser(nn.Module):
    """x [B,1,8,8], sigma [B], labels [B] int64 (0..9, or 10 for none) -> denoised [B,1,8,8]; EDM's preconditioning."""

    def __init__(self, channels=24, emb=32, blocks=3):
        super().__init__()
        self.time = nn.Linear(1, emb)
        self.label = nn.Embedding(11, emb)
        self.first = nn.Conv2d(1, channels, 3, padding=1)
        self.blocks = nn.ModuleList(Block(channels, emb) for _ in range(blocks))
        self.last = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, x, sigma, labels):
        s = sigma[:, None, None, None]
        total = s * s + SIGMA_DATA**2
        emb = torch.tanh(self.time(sigma.log()[:, None] / 4) + self.label(labels))
        h = self.first(x / total.sqrt())
        for block in self.blocks:
            h = block(h, emb)
        return SIGMA_DATA**2 / total * x + s * SIGMA_DATA / total.sqrt() * self.last(h)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=HERE / "teacher.onnx")
    args = parser.parse_args()
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(array) for array in digits())
    net = train(Denoiser(), images, labels, args.steps, 128, 3e-3, 50_000)
    given = (torch.randn(2, 1, 8, 8), torch.tensor([0.5, 3.0]), torch.tensor([0, 3]))
    buffer = io.BytesIO()
    names = ["x", "sigma", "labels"]
    torch.onnx.export(
        net.eval(), given, buffer, dynamo=False, opset_version=17, input_names=names, output_names=["denoised"],
        dynamic_axes={name: {0: "batch"} for name in [*names, "denoised"]}, custom_opsets={"com.example": 1},
    )
    model = onnx.load_model_from_string(buffer.getvalue())
    card = {f"disback.{key}": value for key, value in CARD.items()}
    card["disback.provenance"] = f"examples/extend/train_teacher.py, {args.steps} steps of 128 digits, seed 0"
    for key, value in card.items():
        model.metadata_props.add(key=key, value=value)
    args.out.write_bytes(model.SerializeToString())


if __name__ == "__main__":
    main()
