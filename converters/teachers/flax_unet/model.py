"""The small UNet in Flax NNX, NHWC: `Denoiser(x [B,8,8,1], sigma [B], labels [B]) -> denoised [B,8,8,1]`."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

CHANNELS, EMBEDDING, SIGMA_DATA = (16, 24, 48), 64, 0.5


class ResBlock(nnx.Module):
    """GroupNorm-SiLU-conv twice; the embedding scales and shifts the second norm."""

    def __init__(self, c_in, c_out, *, rngs):
        self.norm1 = nnx.GroupNorm(c_in, num_groups=8, rngs=rngs)
        self.conv1 = nnx.Conv(c_in, c_out, (3, 3), rngs=rngs)
        self.emb = nnx.Linear(EMBEDDING, 2 * c_out, rngs=rngs)
        self.norm2 = nnx.GroupNorm(c_out, num_groups=8, rngs=rngs)
        self.conv2 = nnx.Conv(c_out, c_out, (3, 3), kernel_init=nnx.initializers.normal(0.01), rngs=rngs)
        self.skip = nnx.Conv(c_in, c_out, (1, 1), rngs=rngs) if c_in != c_out else None

    def __call__(self, x, emb):
        h = self.conv1(nnx.silu(self.norm1(x)))
        scale, shift = jnp.split(self.emb(emb)[:, None, None, :], 2, axis=-1)
        h = self.conv2(nnx.silu(self.norm2(h) * (1 + scale) + shift))
        return (x if self.skip is None else self.skip(x)) + h


class Attention(nnx.Module):
    """Self attention over the pixels, one head."""

    def __init__(self, channels, *, rngs):
        self.norm = nnx.GroupNorm(channels, num_groups=8, rngs=rngs)
        self.qkv = nnx.Linear(channels, 3 * channels, rngs=rngs)
        self.out = nnx.Linear(channels, channels, rngs=rngs)

    def __call__(self, x):
        b, h, w, c = x.shape
        q, k, v = jnp.split(self.qkv(self.norm(x)).reshape(b, h * w, 3 * c), 3, axis=-1)
        weights = nnx.softmax(jnp.matmul(q, jnp.swapaxes(k, 1, 2)) / math.sqrt(c), axis=-1)
        return x + self.out(jnp.matmul(weights, v)).reshape(b, h, w, c)


def double(x):
    """Nearest-neighbour upsampling by two."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


class UNet(nnx.Module):
    """The raw network F of EDM."""

    def __init__(self, *, rngs):
        c8, c4, c2 = CHANNELS
        self.time1 = nnx.Linear(32, EMBEDDING, rngs=rngs)
        self.time2 = nnx.Linear(EMBEDDING, EMBEDDING, rngs=rngs)
        self.label = nnx.Embed(11, EMBEDDING, rngs=rngs)
        self.conv_in = nnx.Conv(1, c8, (3, 3), rngs=rngs)
        self.enc8 = ResBlock(c8, c8, rngs=rngs)
        self.down4 = nnx.Conv(c8, c4, (3, 3), strides=2, padding=((1, 1), (1, 1)), rngs=rngs)
        self.enc4 = ResBlock(c4, c4, rngs=rngs)
        self.attn4 = Attention(c4, rngs=rngs)
        self.down2 = nnx.Conv(c4, c2, (3, 3), strides=2, padding=((1, 1), (1, 1)), rngs=rngs)
        self.mid = ResBlock(c2, c2, rngs=rngs)
        self.attn2 = Attention(c2, rngs=rngs)
        self.up4 = nnx.Conv(c2, c4, (1, 1), rngs=rngs)
        self.dec4 = ResBlock(2 * c4, c4, rngs=rngs)
        self.up8 = nnx.Conv(c4, c8, (1, 1), rngs=rngs)
        self.dec8 = ResBlock(2 * c8, c8, rngs=rngs)
        self.norm_out = nnx.GroupNorm(c8, num_groups=8, rngs=rngs)
        self.conv_out = nnx.Conv(c8, 1, (3, 3), kernel_init=nnx.initializers.normal(0.02), rngs=rngs)

    def __call__(self, x, c_noise, labels):
        frequencies = jnp.exp(jnp.linspace(0.0, math.log(32.0), 16))
        angles = c_noise[:, None] * frequencies
        emb = nnx.silu(self.time1(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)))
        emb = nnx.silu(self.time2(emb) + self.label(labels))
        h8 = self.enc8(self.conv_in(x), emb)
        h4 = self.attn4(self.enc4(self.down4(h8), emb))
        h = self.attn2(self.mid(self.down2(h4), emb))
        h = self.dec4(jnp.concatenate([double(self.up4(h)), h4], axis=-1), emb)
        h = self.dec8(jnp.concatenate([double(self.up8(h)), h8], axis=-1), emb)
        return self.conv_out(nnx.silu(self.norm_out(h)))


class Denoiser(nnx.Module):
    """EDM preconditioning (arXiv 2206.00364, table 1) around the UNet."""

    def __init__(self, *, rngs):
        self.unet = UNet(rngs=rngs)

    def __call__(self, x, sigma, labels):
        s = sigma[:, None, None, None]
        total = s * s + SIGMA_DATA**2
        raw = self.unet(x / jnp.sqrt(total), jnp.log(sigma) / 4, labels)
        return SIGMA_DATA**2 / total * x + s * SIGMA_DATA / jnp.sqrt(total) * raw


def build():
    """The network with fresh weights."""
    return Denoiser(rngs=nnx.Rngs(0))


def save(state, path):
    """Writes an NNX state as npz, one entry a parameter under its dotted path."""
    flat = {".".join(map(str, key)): np.asarray(value[...]) for key, value in nnx.to_flat_state(state)}
    np.savez_compressed(path, **flat)


WEIGHTS = Path(__file__).resolve().parent / "weights.npz"
