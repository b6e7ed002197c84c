"""What the five small teachers have in common, in numpy: the training draws, the schedules, and the distance to the digits.

Every teacher is the same small UNet (8x8, 4x4, 2x2 with 16, 24, 48 channels) of about 125 000 weights, written in its own
framework and trained there by `train.py` in its folder. The noise levels are those of examples/digits/train_teacher.py:
ln sigma ~ N(-1.2, 1.2^2), a quarter of every batch uniform in ln sigma over [0.002, 80]; a tenth of the labels is dropped.
"""

import math
import sys
import time
from pathlib import Path

import numpy as np

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"
sys.path.append(str(DIGITS))  # last: its model.py is another

import common  # noqa: E402

CLASSES = 10
NULL_CLASS = 10
SIGMA_DATA = 0.5
CHANNELS = (16, 24, 48)
EMBEDDING = 64
FREQUENCIES = np.exp(np.linspace(0.0, math.log(32.0), 16)).astype(np.float32)  # of ln(sigma) / 4

STEPS = 3000
BATCH = 128
RATE = 3e-3
SEED = 0


def draw_sigma(random, count):
    """Noise levels of one batch, [count] f32."""
    ln = np.where(
        random.random(count) < 0.25,
        random.uniform(math.log(0.002), math.log(80.0), count),
        -1.2 + 1.2 * random.standard_normal(count),
    )
    return np.exp(ln).astype(np.float32)


def batches(steps=STEPS, batch=BATCH, seed=SEED):
    """Yields x0 [B,1,8,8], noise of the same shape, sigma [B], labels [B] int32 (10: none) of every step."""
    random = np.random.default_rng(seed)
    images, labels = common.digits()
    for _ in range(steps):
        pick = random.integers(0, len(images), batch)
        label = np.where(random.random(batch) < 0.1, NULL_CLASS, labels[pick]).astype(np.int32)
        noise = random.standard_normal((batch, 1, 8, 8)).astype(np.float32)
        yield images[pick], noise, draw_sigma(random, batch), label


def loss_weight(sigma):
    """EDM's weight of |D - x0|^2 (arXiv 2206.00364, section 5)."""
    return (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2


def rate(step, steps=STEPS, peak=RATE):
    """Learning rate of step 0, 1, ...: 200 steps up, then a half cosine down to zero."""
    return peak * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))


def keep(step, batch=BATCH):
    """How much of the weight average stays at step 1, 2, ...: half-life 50 000 images, shorter at first."""
    return 0.5 ** (batch / min(50_000.0, 0.05 * step * batch))


class Progress:
    """Prints the mean loss now and then."""

    def __init__(self, steps=STEPS, every=500):
        self.steps, self.every, self.total, self.count, self.started = steps, every, 0.0, 0, time.time()

    def __call__(self, step, loss):
        self.total, self.count = self.total + float(loss), self.count + 1
        if step % self.every == 0 or step == self.steps:
            print(f"step {step}/{self.steps}  loss {self.total / self.count:.4f}  {time.time() - self.started:.0f} s", flush=True)
            self.total, self.count = 0.0, 0


def sample(denoise, count, steps=18, seed=0):
    """Heun's sampler (arXiv 2206.00364, algorithm 1) over denoise(x, sigma, labels), all NCHW -> images, labels."""
    noise = np.random.default_rng(seed).standard_normal((count, 1, 8, 8)).astype(np.float32)
    labels = np.arange(count) % CLASSES
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    sigmas = [*((high + np.linspace(0, 1, steps) * (low - high)) ** 7), 0.0]
    x = noise * sigmas[0]
    for now, after in zip(sigmas[:-1], sigmas[1:]):
        slope = (x - denoise(x, np.full(count, now, np.float32), labels)) / now
        following = x + (after - now) * slope
        if after > 0:
            second = (following - denoise(following.astype(np.float32), np.full(count, after, np.float32), labels)) / after
            following = x + (after - now) * 0.5 * (slope + second)
        x = following.astype(np.float32)
    return x, labels


def distance(denoise, count=5120):
    """Frechet distance of `count` samples to the 1797 digits, and how often the classifier reads the asked-for digit."""
    images, labels = sample(denoise, count)
    ours, logits = common.features(common.to_uint8(images))
    real, _ = common.features(np.load(DIGITS / "digits.npz")["images"])
    return common.frechet(ours, real), float((logits.argmax(1) == labels).mean())


def report(name, count, denoise):
    """Prints the line that the folder's README quotes."""
    fd, accuracy = distance(denoise)
    print(f"{name}: {count} parameters, Frechet distance {fd:.2f} (5120 samples, 35 calls), reads as its label {100 * accuracy:.1f} %")
