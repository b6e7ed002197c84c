"""The small UNet in PaddlePaddle, NCHW: `Denoiser(x [B,1,8,8], sigma [B], labels [B]) -> denoised [B,1,8,8]`."""

import math
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F

CHANNELS, EMBEDDING, SIGMA_DATA = (16, 24, 48), 64, 0.5
WEIGHTS = Path(__file__).resolve().parent / "teacher.pdparams"


def silu(x):
    """x sigmoid(x). Paddle 3.0's own silu has NaN for a gradient below -88."""
    return x * F.sigmoid(x)


class ResBlock(nn.Layer):
    """GroupNorm-SiLU-conv twice; the embedding scales and shifts the second norm."""

    def __init__(self, c_in, c_out):
        super().__init__()
        small = paddle.ParamAttr(initializer=nn.initializer.Normal(0.0, 0.01))
        self.norm1 = nn.GroupNorm(8, c_in)
        self.conv1 = nn.Conv2D(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(EMBEDDING, 2 * c_out)
        self.norm2 = nn.GroupNorm(8, c_out)
        self.conv2 = nn.Conv2D(c_out, c_out, 3, padding=1, weight_attr=small)
        self.skip = nn.Conv2D(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x, emb):
        h = self.conv1(silu(self.norm1(x)))
        scale, shift = paddle.split(self.emb(emb).unsqueeze(-1).unsqueeze(-1), 2, axis=1)
        h = self.conv2(silu(self.norm2(h) * (1 + scale) + shift))
        return (x if self.skip is None else self.skip(x)) + h


class Attention(nn.Layer):
    """Self attention over the pixels, one head."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2D(channels, 3 * channels, 1)
        self.out = nn.Conv2D(channels, channels, 1)

    def forward(self, x):
        _, c, h, w = x.shape
        q, k, v = paddle.split(self.qkv(self.norm(x)).reshape([-1, 3 * c, h * w]).transpose([0, 2, 1]), 3, axis=2)
        weights = F.softmax(paddle.matmul(q, k, transpose_y=True) / math.sqrt(c), axis=-1)
        return x + self.out(paddle.matmul(weights, v).transpose([0, 2, 1]).reshape([-1, c, h, w]))


class UNet(nn.Layer):
    """The raw network F of EDM."""

    def __init__(self):
        super().__init__()
        c8, c4, c2 = CHANNELS
        frequencies = np.exp(np.linspace(0.0, math.log(32.0), 16)).astype("float32")
        self.register_buffer("frequencies", paddle.to_tensor(frequencies), persistable=False)
        self.time1 = nn.Linear(32, EMBEDDING)
        self.time2 = nn.Linear(EMBEDDING, EMBEDDING)
        self.label = nn.Embedding(11, EMBEDDING)
        self.conv_in = nn.Conv2D(1, c8, 3, padding=1)
        self.enc8 = ResBlock(c8, c8)
        self.down4 = nn.Conv2D(c8, c4, 3, stride=2, padding=1)
        self.enc4 = ResBlock(c4, c4)
        self.attn4 = Attention(c4)
        self.down2 = nn.Conv2D(c4, c2, 3, stride=2, padding=1)
        self.mid = ResBlock(c2, c2)
        self.attn2 = Attention(c2)
        self.up4 = nn.Conv2D(c2, c4, 1)
        self.dec4 = ResBlock(2 * c4, c4)
        self.up8 = nn.Conv2D(c4, c8, 1)
        self.dec8 = ResBlock(2 * c8, c8)
        self.norm_out = nn.GroupNorm(8, c8)
        self.conv_out = nn.Conv2D(c8, 1, 3, padding=1)

    def forward(self, x, c_noise, labels):
        angles = c_noise.unsqueeze(1) * self.frequencies
        emb = silu(self.time1(paddle.concat([paddle.cos(angles), paddle.sin(angles)], axis=1)))
        emb = silu(self.time2(emb) + self.label(labels))
        h8 = self.enc8(self.conv_in(x), emb)
        h4 = self.attn4(self.enc4(self.down4(h8), emb))
        h = self.attn2(self.mid(self.down2(h4), emb))
        h = F.interpolate(self.up4(h), scale_factor=2, mode="nearest")
        h = self.dec4(paddle.concat([h, h4], axis=1), emb)
        h = F.interpolate(self.up8(h), scale_factor=2, mode="nearest")
        h = self.dec8(paddle.concat([h, h8], axis=1), emb)
        return self.conv_out(silu(self.norm_out(h)))


class Denoiser(nn.Layer):
    """EDM preconditioning (arXiv 2206.00364, table 1) around the UNet."""

    def __init__(self):
        super().__init__()
        self.unet = UNet()

    def forward(self, x, sigma, labels):
        s = sigma.unsqueeze(-1).unsqueeze(-1).unsqueeze(-1)
        total = s * s + SIGMA_DATA**2
        raw = self.unet(x / paddle.sqrt(total), paddle.log(sigma) / 4, labels)
        return x * SIGMA_DATA**2 / total + raw * s * SIGMA_DATA / paddle.sqrt(total)  # paddle2onnx has no number / tensor


def build():
    """The network with fresh weights."""
    paddle.seed(0)
    return Denoiser()
