"""Networks of the size and kind of EDM's published ones, in our own words, with weights at random.

`ddpmpp(channels, mult, ...)` is the U-Net of CIFAR-10, FFHQ and AFHQv2 (DDPM++), `adm(...)` that of ImageNet-64 (Dhariwal and
Nichol); preconditioning is inside: x, sigma (and one-hot class_labels) in, the denoised sample out.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Embedding(nn.Module):
    def __init__(self, size, channels, classes, late):
        super().__init__()
        self.size, self.late = size, late
        self.layer0, self.layer1 = nn.Linear(size, channels), nn.Linear(channels, channels)
        self.label = nn.Linear(classes, channels if late else size, bias=not late) if classes else None

    def forward(self, noise, labels):
        half = self.size // 2
        exponents = torch.arange(half, dtype=torch.float32, device=noise.device) / (half - 0 if self.late else half - 1)
        angles = torch.outer(noise, (1 / 10000) ** exponents)
        emb = torch.cat([angles.sin(), angles.cos()], dim=1)
        if self.label is not None and not self.late:
            emb = emb + self.label(labels * labels.shape[1] ** 0.5)
        emb = self.layer1(F.silu(self.layer0(emb)))
        if self.label is not None and self.late:
            emb = emb + self.label(labels)
        return F.silu(emb)


class Block(nn.Module):
    def __init__(self, c_in, c_out, emb, adm, resample=None, attention=False):
        super().__init__()
        self.adm, self.resample = adm, resample
        self.heads = (c_out // 64 if adm else 1) if attention else 0
        self.norm0, self.conv0 = nn.GroupNorm(32, c_in, eps=1e-5), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.affine = nn.Linear(emb, c_out * (2 if adm else 1))
        self.norm1, self.conv1 = nn.GroupNorm(32, c_out, eps=1e-5), nn.Conv2d(c_out, c_out, 3, padding=1)
        project = c_in != c_out or (resample and not adm)
        self.skip = nn.Conv2d(c_in, c_out, 1) if project else None
        if attention:
            self.norm2 = nn.GroupNorm(32, c_out, eps=1e-5)
            self.qkv, self.proj = nn.Conv2d(c_out, 3 * c_out, 1), nn.Conv2d(c_out, c_out, 1)

    def sized(self, x):
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.resample else x

    def forward(self, x, emb):
        h = self.conv0(self.sized(F.silu(self.norm0(x))))
        shift = self.affine(emb)[:, :, None, None]
        if self.adm:
            scale, shift = shift.chunk(2, dim=1)
            h = F.silu(shift + self.norm1(h) * (scale + 1))
        else:
            h = F.silu(self.norm1(h + shift))
        x = self.sized(x)
        weight = 1.0 if self.adm else 0.5**0.5
        x = (self.conv1(h) + (x if self.skip is None else self.skip(x))) * weight
        if self.heads:
            b, c, height, width = x.shape
            q, k, v = self.qkv(self.norm2(x)).reshape(b, 3, self.heads, c // self.heads, height * width).unbind(1)
            a = F.scaled_dot_product_attention(*(t.transpose(-1, -2) for t in (q, k, v)))
            x = (self.proj(a.transpose(-1, -2).reshape(b, c, height, width)) + x) * weight
        return x


class UNet(nn.Module):
    def __init__(self, size, channels, mult, blocks, attention, adm, classes=0, sigma_data=0.5):
        super().__init__()
        self.sigma_data, self.classes = sigma_data, classes
        emb = 4 * channels
        self.embedding = Embedding(channels, emb, classes, late=adm)
        self.conv_in = nn.Conv2d(3, channels * (mult[0] if adm else 1), 3, padding=1)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        width = self.conv_in.out_channels
        skips = [width]
        for level, m in enumerate(mult):
            attends = size >> level in attention
            if level:
                self.encoder.append(Block(width, width, emb, adm, "down"))
                skips.append(width)
            for _ in range(blocks):
                self.encoder.append(Block(width, channels * m, emb, adm, attention=attends))
                width = channels * m
                skips.append(width)
        self.depth = len(mult)
        for level, m in reversed(list(enumerate(mult))):
            attends = size >> level in attention
            if level == len(mult) - 1:
                self.decoder.append(Block(width, width, emb, adm, attention=True))
                self.decoder.append(Block(width, width, emb, adm))
            else:
                self.decoder.append(Block(width, width, emb, adm, "up"))
            for k in range(blocks + 1):
                last = k == blocks
                here = attends and (adm or last)
                self.decoder.append(Block(width + skips.pop(), channels * m, emb, adm, attention=here))
                width = channels * m
        self.plain = [0, 1] + [2 + (blocks + 1) + k * (blocks + 2) for k in range(len(mult) - 1)]
        self.norm_out, self.conv_out = nn.GroupNorm(32, width, eps=1e-5), nn.Conv2d(width, 3, 3, padding=1)
        self.plain = frozenset(self.plain)

    def raw(self, x, noise, labels):
        emb = self.embedding(noise, labels)
        x = self.conv_in(x)
        kept = [x]
        for block in self.encoder:
            x = block(x, emb)
            kept.append(x)
        for k, block in enumerate(self.decoder):
            x = block(x if k in self.plain else torch.cat([x, kept.pop()], dim=1), emb)
        return self.conv_out(F.silu(self.norm_out(x)))

    def denoise(self, x, sigma, labels=None):
        s, data = sigma.reshape(-1, 1, 1, 1), self.sigma_data
        root = (s**2 + data**2).sqrt()
        return data**2 / root**2 * x + s * data / root * self.raw(x / root, sigma.log() / 4, labels)


class Unconditional(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, sigma):
        return self.net.denoise(x, sigma)


class Conditional(Unconditional):
    def forward(self, x, sigma, class_labels):
        return self.net.denoise(x, sigma, class_labels)


def made(*sizes, **more):
    torch.manual_seed(0)
    net = UNet(*sizes, **more)
    return (Conditional if net.classes else Unconditional)(net).eval()


def cifar10():
    """55.7 million weights."""
    return made(32, 128, [2, 2, 2], 4, {16}, adm=False)


def ffhq64():
    """61.8 million weights; AFHQv2's are the same."""
    return made(64, 128, [1, 2, 2, 2], 4, {16}, adm=False)


def imagenet64():
    """295.9 million weights."""
    return made(64, 192, [1, 2, 3, 4], 3, {32, 16, 8}, adm=True, classes=1000)
