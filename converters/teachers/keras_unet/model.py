"""The small UNet in Keras 3, NHWC: a functional model of `x [B,8,8,1]`, `sigma [B]`, `labels [B]` -> `denoised`.

Any backend; `KERAS_BACKEND` chooses.
"""

import math
from pathlib import Path

import keras
import numpy as np
from keras import layers, ops

CHANNELS, EMBEDDING, SIGMA_DATA = (16, 24, 48), 64, 0.5
WEIGHTS = Path(__file__).resolve().parent / "weights.npz"  # arrays under the variables' dotted paths


def norm(channels):
    return layers.GroupNormalization(groups=8, epsilon=1e-5)


@keras.saving.register_keras_serializable("disback")
class ResBlock(layers.Layer):
    """GroupNorm-SiLU-conv twice; the embedding scales and shifts the second norm."""

    def __init__(self, c_in, c_out, **kwargs):
        super().__init__(**kwargs)
        self.c_in, self.c_out = c_in, c_out
        self.norm1, self.norm2 = norm(c_in), norm(c_out)
        self.conv1 = layers.Conv2D(c_out, 3, padding="same")
        self.emb = layers.Dense(2 * c_out)
        self.conv2 = layers.Conv2D(c_out, 3, padding="same", kernel_initializer=keras.initializers.RandomNormal(stddev=0.01))
        self.skip = layers.Conv2D(c_out, 1) if c_in != c_out else None

    def build(self, x_shape, emb_shape):
        image = (*x_shape[:-1], self.c_out)
        self.norm1.build(x_shape)
        self.conv1.build(x_shape)
        self.emb.build(emb_shape)
        self.norm2.build(image)
        self.conv2.build(image)
        if self.skip is not None:
            self.skip.build(x_shape)
        self.built = True

    def compute_output_shape(self, x_shape, emb_shape):
        return (*x_shape[:-1], self.c_out)

    def call(self, x, emb):
        h = self.conv1(ops.silu(self.norm1(x)))
        scale, shift = ops.split(ops.expand_dims(ops.expand_dims(self.emb(emb), 1), 1), 2, axis=-1)
        h = self.conv2(ops.silu(self.norm2(h) * (1 + scale) + shift))
        return (x if self.skip is None else self.skip(x)) + h

    def get_config(self):
        return {**super().get_config(), "c_in": self.c_in, "c_out": self.c_out}


@keras.saving.register_keras_serializable("disback")
class Attention(layers.Layer):
    """Self attention over the pixels, one head."""

    def __init__(self, channels, **kwargs):
        super().__init__(**kwargs)
        self.channels = channels
        self.norm = norm(channels)
        self.qkv = layers.Dense(3 * channels)
        self.out = layers.Dense(channels)

    def build(self, shape):
        self.pixels = (shape[1], shape[2])
        for layer in (self.norm, self.qkv, self.out):
            layer.build(shape)
        self.built = True

    def compute_output_shape(self, shape):
        return shape

    def call(self, x):
        h, w = self.pixels
        q, k, v = ops.split(ops.reshape(self.qkv(self.norm(x)), (-1, h * w, 3 * self.channels)), 3, axis=-1)
        weights = ops.softmax(ops.matmul(q, ops.transpose(k, (0, 2, 1))) / math.sqrt(self.channels), axis=-1)
        return x + self.out(ops.reshape(ops.matmul(weights, v), (-1, h, w, self.channels)))

    def get_config(self):
        return {**super().get_config(), "channels": self.channels}


@keras.saving.register_keras_serializable("disback")
class TimeFeatures(layers.Layer):
    """sigma [B] -> cosines and sines of ln(sigma) / 4 at 16 frequencies [B,32]."""

    def call(self, sigma):
        frequencies = ops.convert_to_tensor(np.exp(np.linspace(0.0, math.log(32.0), 16)).astype("float32"))
        angles = ops.expand_dims(ops.log(sigma) / 4, 1) * frequencies
        return ops.concatenate([ops.cos(angles), ops.sin(angles)], axis=1)

    def compute_output_shape(self, shape):
        return (shape[0], 32)


@keras.saving.register_keras_serializable("disback")
class Scale(layers.Layer):
    """One of EDM's coefficients (arXiv 2206.00364, table 1) times the images."""

    def __init__(self, which, **kwargs):
        super().__init__(**kwargs)
        self.which = which

    def call(self, x, sigma):
        s = ops.reshape(sigma, (-1, 1, 1, 1))
        total = s * s + SIGMA_DATA**2
        coefficient = {
            "in": 1 / ops.sqrt(total),
            "skip": SIGMA_DATA**2 / total,
            "out": s * SIGMA_DATA / ops.sqrt(total),
        }[self.which]
        return coefficient * x

    def compute_output_shape(self, x_shape, sigma_shape):
        return x_shape

    def get_config(self):
        return {**super().get_config(), "which": self.which}


def build():
    """The network with fresh weights."""
    keras.utils.set_random_seed(0)
    c8, c4, c2 = CHANNELS
    x = keras.Input((8, 8, 1), name="x")
    sigma = keras.Input((), name="sigma")
    labels = keras.Input((), name="labels", dtype="int32")
    emb = ops.silu(layers.Dense(EMBEDDING, name="time1")(TimeFeatures(name="features")(sigma)))
    emb = ops.silu(layers.Dense(EMBEDDING, name="time2")(emb) + layers.Embedding(11, EMBEDDING, name="label")(labels))
    h = layers.Conv2D(c8, 3, padding="same", name="conv_in")(Scale("in", name="c_in")(x, sigma))
    h8 = ResBlock(c8, c8, name="enc8")(h, emb)
    h = layers.Conv2D(c4, 3, strides=2, padding="same", name="down4")(h8)
    h4 = Attention(c4, name="attn4")(ResBlock(c4, c4, name="enc4")(h, emb))
    h = layers.Conv2D(c2, 3, strides=2, padding="same", name="down2")(h4)
    h = Attention(c2, name="attn2")(ResBlock(c2, c2, name="mid")(h, emb))
    h = layers.UpSampling2D(2, name="double4")(layers.Conv2D(c4, 1, name="up4")(h))
    h = ResBlock(2 * c4, c4, name="dec4")(layers.Concatenate(name="join4")([h, h4]), emb)
    h = layers.UpSampling2D(2, name="double8")(layers.Conv2D(c8, 1, name="up8")(h))
    h = ResBlock(2 * c8, c8, name="dec8")(layers.Concatenate(name="join8")([h, h8]), emb)
    h = layers.GroupNormalization(groups=8, epsilon=1e-5, name="norm_out")(h)
    raw = layers.Conv2D(1, 3, padding="same", name="conv_out")(ops.silu(h))
    denoised = layers.Add(name="denoised")([Scale("skip", name="c_skip")(x, sigma), Scale("out", name="c_out")(raw, sigma)])
    return keras.Model({"x": x, "sigma": sigma, "labels": labels}, denoised, name="denoiser")
