"""The small UNet in PyTorch, with the interface of EDM's networks: what a user's own checkout of such code looks like.

`EDMPrecond(x, sigma, class_labels)` is the denoiser, `EDMPrecond.model(x, c_noise, class_labels, augment_labels)` the raw
network F. Class labels are one-hot (all zero: none), augment labels describe a distortion of training images.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

CHANNELS, EMBEDDING = (16, 24, 48), 64


class ResBlock(nn.Module):
    """GroupNorm-SiLU-conv twice; the embedding scales and shifts the second norm."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(EMBEDDING, 2 * c_out)
        self.norm2 = nn.GroupNorm(8, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        with torch.no_grad():
            self.conv2.weight.mul_(0.1)

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)
        return self.skip(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))


class Attention(nn.Module):
    """Self attention over the pixels, one head."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, c, h * w).unbind(1)
        weights = torch.einsum("bcq,bck->bqk", q, k / math.sqrt(c)).softmax(dim=2)
        return x + self.out(torch.einsum("bqk,bck->bcq", weights, v).reshape(b, c, h, w))


class Filter(nn.Module):
    """Resampling by two with a fixed 2x2 box: depthwise convolutions whose kernel is a buffer."""

    def __init__(self, up):
        super().__init__()
        self.up = up
        self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))

    def forward(self, x):
        c = x.shape[1]
        if self.up:
            return F.conv_transpose2d(x, (4 * self.resample_filter).tile([c, 1, 1, 1]), stride=2, groups=c)
        return F.conv2d(x, self.resample_filter.tile([c, 1, 1, 1]), stride=2, groups=c)


class SmallUNet(nn.Module):
    """The raw network F."""

    def __init__(self, img_channels=1, label_dim=10, augment_dim=3):
        super().__init__()
        c8, c4, c2 = CHANNELS
        self.register_buffer("freqs", torch.exp(torch.linspace(0.0, math.log(32.0), 16)))
        self.map_noise = nn.Linear(32, EMBEDDING)
        self.map_label = nn.Linear(label_dim, EMBEDDING, bias=False) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, EMBEDDING, bias=False) if augment_dim else None
        self.map_layer = nn.Linear(EMBEDDING, EMBEDDING)
        self.conv_in = nn.Conv2d(img_channels, c8, 3, padding=1)
        self.enc8 = ResBlock(c8, c8)
        self.down4 = nn.Sequential(Filter(up=False), nn.Conv2d(c8, c4, 3, padding=1))
        self.enc4 = ResBlock(c4, c4)
        self.attn4 = Attention(c4)
        self.down2 = nn.Sequential(Filter(up=False), nn.Conv2d(c4, c2, 3, padding=1))
        self.mid = ResBlock(c2, c2)
        self.attn2 = Attention(c2)
        self.up4 = nn.Sequential(nn.Conv2d(c2, c4, 1), Filter(up=True))
        self.dec4 = ResBlock(2 * c4, c4)
        self.up8 = nn.Sequential(nn.Conv2d(c4, c8, 1), Filter(up=True))
        self.dec8 = ResBlock(2 * c8, c8)
        self.norm_out = nn.GroupNorm(8, c8)
        self.conv_out = nn.Conv2d(c8, img_channels, 3, padding=1)

    def forward(self, x, noise_labels, class_labels, augment_labels=None):
        angles = torch.outer(noise_labels, self.freqs)
        emb = F.silu(self.map_noise(torch.cat([angles.cos(), angles.sin()], dim=1)))
        emb = self.map_layer(emb)
        if self.map_label is not None:
            emb = emb + self.map_label(class_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = F.silu(emb)
        h8 = self.enc8(self.conv_in(x), emb)
        h4 = self.attn4(self.enc4(self.down4(h8), emb))
        h = self.attn2(self.mid(self.down2(h4), emb))
        h = self.dec4(torch.cat([self.up4(h), h4], dim=1), emb)
        h = self.dec8(torch.cat([self.up8(h), h8], dim=1), emb)
        return self.conv_out(F.silu(self.norm_out(h)))


class EDMPrecond(nn.Module):
    """EDM's preconditioning (arXiv 2206.00364, table 1) around the raw network."""

    def __init__(self, img_resolution=8, img_channels=1, label_dim=10, use_fp16=False, sigma_data=0.5, augment_dim=3):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.use_fp16, self.sigma_min, self.sigma_max, self.sigma_data = use_fp16, 0.0, float("inf"), sigma_data
        self.model = SmallUNet(img_channels, label_dim, augment_dim)

    def forward(self, x, sigma, class_labels=None, force_fp32=False, **more):
        x = x.to(torch.float32)
        sigma = sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        if self.label_dim == 0:
            class_labels = None
        elif class_labels is None:
            class_labels = torch.zeros([1, self.label_dim], device=x.device)
        total = sigma**2 + self.sigma_data**2
        dtype = torch.float16 if self.use_fp16 and not force_fp32 and x.device.type == "cuda" else torch.float32
        raw = self.model((x / total.sqrt()).to(dtype), (sigma.log() / 4).flatten(), class_labels, **more)
        return self.sigma_data**2 / total * x + sigma * self.sigma_data / total.sqrt() * raw.to(torch.float32)
