"""A class-conditional diffusion model of 16x16 colour images that is cheap on a CPU: patches of 2x2 pixels become 12 channels
of an 8x8 grid, on which the blocks of the digits' UNet work; EDM preconditioning (arXiv 2206.00364) around it."""

import importlib.util
import math
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from render import CLASSES

_spec = importlib.util.spec_from_file_location("digits_model", Path(__file__).resolve().parents[1] / "digits" / "model.py")
digits = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(digits)
ResBlock, Attention = digits.ResBlock, digits.Attention

NULL_CLASS, SIGMA_DATA, PATCH = CLASSES, 0.5, 2


class UNet(nn.Module):
    """The raw network F: two levels (8x8 and 4x4), attention at 4x4."""

    def __init__(self, channels=(40, 64), emb=96):
        super().__init__()
        c8, c4 = channels
        self.register_buffer("freqs", torch.exp(torch.linspace(0.0, math.log(32.0), 16)))
        self.time1 = nn.Linear(32, emb)
        self.time2 = nn.Linear(emb, emb)
        self.label = nn.Embedding(CLASSES + 1, emb)
        self.conv_in = nn.Conv2d(3 * PATCH**2, c8, 3, padding=1)
        self.enc8 = ResBlock(c8, c8, emb)
        self.down = nn.Conv2d(c8, c4, 3, stride=2, padding=1)
        self.enc4 = ResBlock(c4, c4, emb)
        self.attn4 = Attention(c4)
        self.mid4 = ResBlock(c4, c4, emb)
        self.up = nn.Conv2d(c4, c8, 1)
        self.dec8 = ResBlock(2 * c8, c8, emb)
        self.norm_out = nn.GroupNorm(8, c8)
        self.conv_out = nn.Conv2d(c8, 3 * PATCH**2, 3, padding=1)

    def forward(self, x, c_noise, labels):
        angles = c_noise[:, None] * self.freqs
        emb = F.silu(self.time1(torch.cat([angles.cos(), angles.sin()], dim=1)))
        emb = F.silu(self.time2(emb) + self.label(labels))
        h8 = self.enc8(self.conv_in(F.pixel_unshuffle(x, PATCH)), emb)
        h = self.mid4(self.attn4(self.enc4(self.down(h8), emb)), emb)
        h = F.interpolate(self.up(h), scale_factor=2.0, mode="nearest")
        h = self.dec8(torch.cat([h, h8], dim=1), emb)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), PATCH)


class Denoiser(nn.Module):
    """x [B,3,16,16], sigma [B], labels [B] int64 (0..5, or 6 for none) -> denoised [B,3,16,16]."""

    def __init__(self):
        super().__init__()
        self.unet = UNet()

    def forward(self, x, sigma, labels):
        s = sigma[:, None, None, None]
        total = s * s + SIGMA_DATA**2
        raw = self.unet(x / total.sqrt(), sigma.log() / 4, labels)
        return SIGMA_DATA**2 / total * x + s * SIGMA_DATA / total.sqrt() * raw
