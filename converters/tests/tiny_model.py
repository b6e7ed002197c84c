"""A small denoiser with a condition, for the tests of the converter."""

import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.label = nn.Embedding(4, 8)
        self.time = nn.Linear(1, 8)
        self.conv_in = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.conv_out = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x, sigma, labels):
        emb = self.time(sigma[:, None].log()) + self.label(labels)
        h = self.conv_in(x) + emb[:, :, None, None]
        return self.conv_out(nn.functional.silu(self.norm(h)))


def build():
    torch.manual_seed(0)
    return Tiny()


def build_with_inputs():
    return build(), {"x": torch.randn(2, 1, 8, 8), "sigma": torch.tensor([0.5, 2.0]), "labels": torch.tensor([1, 3])}


def build_nan():
    net = build()
    with torch.no_grad():
        net.conv_out.bias.fill_(float("nan"))
    return net


def not_a_module():
    return 3
