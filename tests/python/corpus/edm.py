"""A small U-Net in the manner of EDM's networks: what makes their exports special, in our own words.

Positional features turned round by a flip (Slice with a negative step), resampling by depthwise filters that are built
from a buffer when the network runs (Tile inside the graph), attention as Einsum, preconditioning inside.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Resample(nn.Module):
    """Depthwise low-pass filter with stride 2, downwards or (transposed) upwards."""

    def __init__(self, channels, taps, up):
        super().__init__()
        self.channels = channels
        taps = torch.tensor(taps, dtype=torch.float32)
        window = torch.outer(taps, taps) / taps.sum() ** 2
        self.register_buffer("resample_filter", window[None, None])
        self.up, self.pad = up, (len(taps) - 1) // 2
        self.ready = False

    def settle(self):
        """Keeps the tiled filter as the buffer: the TorchScript exporter wants kernels of a known shape."""
        self.resample_filter = self.tiled()
        self.ready = True

    def tiled(self):
        filters = self.resample_filter * 4 if self.up else self.resample_filter
        return filters.tile([self.channels, 1, 1, 1])

    def forward(self, x):
        filters = self.resample_filter if self.ready else self.tiled()
        conv = F.conv_transpose2d if self.up else F.conv2d
        return conv(x, filters, groups=self.channels, stride=2, padding=self.pad)


class Positional(nn.Module):
    """cos and sin of geometric frequencies, then swapped: sin first."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, t):
        half = self.channels // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / (half - 1)
        angles = torch.outer(t, (1 / 10000) ** exponents.to(t.dtype))
        features = torch.cat([angles.cos(), angles.sin()], dim=1)
        return features.reshape(features.shape[0], 2, -1).flip(1).reshape(features.shape)


class Fourier(nn.Module):
    """Random frequencies, drawn once and never trained."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * 4)

    def forward(self, t):
        angles = torch.outer(t, (2 * torch.pi * self.freqs).to(t.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class Block(nn.Module):
    """Scale-shift residual block, with resampling before the convolutions and attention after them."""

    def __init__(self, c_in, c_out, emb, taps, resample=None, heads=0, groups=4):
        super().__init__()
        self.heads = heads
        self.norm0 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv0 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.affine = nn.Linear(emb, 2 * c_out)
        self.norm1 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv1 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None
        self.resample = Resample(c_in, taps, resample == "up") if resample else None
        if heads:
            self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
            self.qkv = nn.Conv2d(c_out, 3 * c_out, 1)
            self.proj = nn.Conv2d(c_out, c_out, 1)

    def forward(self, x, emb):
        h = F.silu(self.norm0(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv0(h)
        scale, shift = self.affine(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(shift + self.norm1(h) * (scale + 1)))
        x = (h + (x if self.skip is None else self.skip(x))) * 0.5**0.5
        if self.heads:
            b, c, height, width = x.shape
            q, k, v = self.qkv(self.norm2(x)).reshape(b * self.heads, c // self.heads, 3, height * width).unbind(2)
            w = torch.einsum("ncq,nck->nqk", q, k / k.shape[1] ** 0.5).softmax(dim=2)
            a = torch.einsum("nqk,nck->ncq", w, v)
            x = (self.proj(a.reshape(b, c, height, width)) + x) * 0.5**0.5
        return x


class EdmNetwork(nn.Module):
    """x [B,3,8,8], sigma [B], class_labels [B,classes] one-hot (where there are classes) -> denoised."""

    def __init__(self, classes, taps, fourier, channels=8, emb=16, sigma_data=0.5):
        super().__init__()
        self.sigma_data = sigma_data
        c = channels
        self.map_noise = Fourier(emb) if fourier else Positional(emb)
        self.map_label = nn.Linear(classes, emb, bias=False) if classes else None
        self.map_layer0 = nn.Linear(emb, emb)
        self.map_layer1 = nn.Linear(emb, emb)
        self.conv_in = nn.Conv2d(3, c, 3, padding=1)
        self.enc0 = Block(c, c, emb, taps)
        self.down = Block(c, c, emb, taps, resample="down")
        self.enc1 = Block(c, 2 * c, emb, taps, heads=2)
        self.dec1 = Block(4 * c, 2 * c, emb, taps, heads=1)
        self.up = Block(2 * c, c, emb, taps, resample="up")
        self.dec0 = Block(2 * c, c, emb, taps)
        self.out_norm = nn.GroupNorm(4, c, eps=1e-6)
        self.out_conv = nn.Conv2d(c, 3, 3, padding=1)

    def features(self, x, noise, labels):
        emb = self.map_noise(noise)
        if self.map_label is not None:
            emb = emb + self.map_label(labels * labels.shape[1] ** 0.5)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        h0 = self.enc0(self.conv_in(x), emb)
        h1 = self.enc1(self.down(h0, emb), emb)
        h = self.dec1(torch.cat([h1, h1], dim=1), emb)
        h = self.dec0(torch.cat([self.up(h, emb), h0], dim=1), emb)
        return self.out_conv(F.silu(self.out_norm(h)))

    def forward(self, x, sigma, class_labels=None):
        s, data = sigma.reshape(-1, 1, 1, 1), self.sigma_data
        root = (s**2 + data**2).sqrt()
        raw = self.features(x / root, sigma.log() / 4, class_labels)
        return data**2 / root**2 * x + s * data / root * raw
