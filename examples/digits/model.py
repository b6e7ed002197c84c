"""A class-conditional diffusion model of 8x8 grey digits: a small UNet inside EDM preconditioning.

`Denoiser(x, sigma, labels)` is the denoiser D(x; sigma, c) of Karras et al. 2022 (arXiv 2206.00364, eq. 7): an
estimate of the clean image x0 from `x = x0 + sigma * noise`. Most weights sit at 4x4 and 2x2, where they cost little.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

CLASSES = 10
NULL_CLASS = 10  # label of "no class", for classifier-free guidance
SIGMA_DATA = 0.5


class ResBlock(nn.Module):
    """GroupNorm-SiLU-conv twice; the embedding of time and class scales and shifts the second norm."""

    def __init__(self, c_in, c_out, emb):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb, 2 * c_out)
        self.norm2 = nn.GroupNorm(8, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        with torch.no_grad():
            self.conv2.weight.mul_(0.1)

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class Attention(nn.Module):
    """Self attention over the pixels, with heads of at least 32 channels."""

    def __init__(self, channels, head=32):
        super().__init__()
        self.heads = max(1, channels // head)
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w).transpose(-1, -2).unbind(1)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(-1, -2).reshape(b, c, h, w))


class UNet(nn.Module):
    """The raw network F of EDM: three levels (8x8, 4x4, 2x2), skips joined by concatenation.

    Attention works at 4x4 and 2x2. Levels are joined by strided convolutions on the way down and by
    nearest-neighbour upsampling on the way up.
    """

    def __init__(self, channels=(16, 48, 128), emb=128, classes=CLASSES):
        super().__init__()
        c8, c4, c2 = channels
        self.register_buffer("freqs", torch.exp(torch.linspace(0.0, math.log(32.0), emb // 4)))
        self.time1 = nn.Linear(2 * (emb // 4), emb)
        self.time2 = nn.Linear(emb, emb)
        self.label = nn.Embedding(classes + 1, emb)
        self.conv_in = nn.Conv2d(1, c8, 3, padding=1)
        self.enc8 = ResBlock(c8, c8, emb)
        self.down4 = nn.Conv2d(c8, c4, 3, stride=2, padding=1)
        self.enc4 = ResBlock(c4, c4, emb)
        self.attn4 = Attention(c4)
        self.down2 = nn.Conv2d(c4, c2, 3, stride=2, padding=1)
        self.mid1 = ResBlock(c2, c2, emb)
        self.attn2 = Attention(c2)
        self.up4 = nn.Conv2d(c2, c4, 1)
        self.dec4 = ResBlock(2 * c4, c4, emb)
        self.up8 = nn.Conv2d(c4, c8, 1)
        self.dec8 = ResBlock(2 * c8, c8, emb)
        self.norm_out = nn.GroupNorm(8, c8)
        self.conv_out = nn.Conv2d(c8, 1, 3, padding=1)

    def forward(self, x, c_noise, labels):
        angles = c_noise[:, None] * self.freqs
        emb = F.silu(self.time1(torch.cat([angles.cos(), angles.sin()], dim=1)))
        emb = F.silu(self.time2(emb) + self.label(labels))
        h8 = self.enc8(self.conv_in(x), emb)
        h4 = self.attn4(self.enc4(self.down4(h8), emb))
        h = self.attn2(self.mid1(self.down2(h4), emb))
        h = F.interpolate(self.up4(h), scale_factor=2.0, mode="nearest")
        h = self.dec4(torch.cat([h, h4], dim=1), emb)
        h = F.interpolate(self.up8(h), scale_factor=2.0, mode="nearest")
        h = self.dec8(torch.cat([h, h8], dim=1), emb)
        return self.conv_out(F.silu(self.norm_out(h)))


class Denoiser(nn.Module):
    """x [B,1,8,8], sigma [B], labels [B] int64 (0..9, or 10 for none) -> denoised [B,1,8,8]."""

    def __init__(self, sigma_data=SIGMA_DATA, **unet):
        super().__init__()
        self.sigma_data = sigma_data
        self.unet = UNet(**unet)

    def forward(self, x, sigma, labels):
        s = sigma[:, None, None, None]
        total = s * s + self.sigma_data**2
        c_skip = self.sigma_data**2 / total
        c_out = s * self.sigma_data / total.sqrt()
        c_in = 1 / total.sqrt()
        return c_skip * x + c_out * self.unet(c_in * x, sigma.log() / 4, labels)


def karras_sigmas(steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """`steps` noise levels from sigma_max down to sigma_min (arXiv 2206.00364, eq. 5), float64."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + ramp * (low - high)) ** rho


@torch.no_grad()
def heun_sample(denoise, noise, labels, steps=18):
    """Deterministic second-order sampler (arXiv 2206.00364, algorithm 1): standard normal noise -> images."""
    sigmas = torch.cat([karras_sigmas(steps), torch.zeros(1, dtype=torch.float64)]).tolist()
    x = noise * sigmas[0]
    for now, after in zip(sigmas[:-1], sigmas[1:]):
        level = torch.full((len(x),), now)
        slope = (x - denoise(x, level, labels)) / now
        following = x + (after - now) * slope
        if after > 0:
            level = torch.full((len(x),), after)
            following = x + (after - now) * 0.5 * (slope + (following - denoise(following, level, labels)) / after)
        x = following
    return x
