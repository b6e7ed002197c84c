"""Colour images of 16x16 pixels with known factors: `python render.py` writes reference.npz and factors.png.

An image is one shape before a background. Its factors, all independent and uniform: the class of the shape (disc, square,
triangle, ring, cross, half disc), the place of its centre, its radius, its rotation, its hue, the hue of the background, and
the direction in which the background's brightness rises.
"""

import numpy as np

SIZE, SHAPES = 16, ("disc", "square", "triangle", "ring", "cross", "half disc")
CLASSES = len(SHAPES)
# name: lowest and highest value; places and radii in units of half the image's side, the rest in turns.
FACTORS = {"x": (-0.35, 0.35), "y": (-0.35, 0.35), "radius": (0.35, 0.6), "angle": (0, 1), "hue": (0, 1), "ground": (0, 1), "light": (0, 1)}
TURNS = ("hue", "ground", "light")


def draw(rng, count):
    """`count` sets of factors: labels [count] int64, and a dict of f64 arrays [count]."""
    labels = rng.integers(0, CLASSES, count)
    return labels, {name: rng.uniform(low, high, count) for name, (low, high) in FACTORS.items()}


def colour(hue, saturation):
    """Hue in turns -> RGB [n,3] in [0,1], the largest 1: colours of the HSV wheel, with rounded corners."""
    phase = 2 * np.pi * (hue[:, None] - np.array([0, 1, 2]) / 3)
    return 1 - saturation * (0.5 - 0.5 * np.cos(phase))


def distance(labels, u, v):
    """Signed distance, roughly, of (u, v) [n,H,W] to the outline of a unit shape of each class; negative inside."""
    length, far = np.hypot(u, v), np.maximum(np.abs(u), np.abs(v))
    near = np.minimum(np.abs(u), np.abs(v))
    root = np.sqrt(3) / 2
    triangle = np.maximum.reduce([-v - 0.5, 0.5 * v + root * u - 0.5, 0.5 * v - root * u - 0.5])
    every = (
        length - 0.9,
        far - 0.8,
        triangle,
        np.abs(length - 0.7) - 0.25,
        np.maximum(far - 0.95, near - 0.32),
        np.maximum(length - 1, -v - 0.15),
    )
    return np.choose(labels[:, None, None], every)


def render(labels, factors):
    """Labels and factors -> images [n,3,16,16] f32 in [-1,1], edges smoothed over about a pixel and a half."""
    axis = (np.arange(SIZE) + 0.5) / (SIZE / 2) - 1
    f = {name: value[:, None, None] for name, value in factors.items()}
    x, y = axis[None, None, :], axis[None, :, None]
    turn = 2 * np.pi * f["angle"]
    dx, dy = (x - f["x"]) / f["radius"], (y - f["y"]) / f["radius"]
    sd = distance(labels, dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)) * f["radius"]
    cover = np.clip(0.5 - sd * (SIZE / 2) / 1.5, 0, 1)[:, None]
    light = 2 * np.pi * f["light"]
    slope = 0.45 + 0.25 * (x * np.cos(light) + y * np.sin(light))
    ground = colour(factors["ground"], 0.6)[:, :, None, None] * slope[:, None]
    shape = colour(factors["hue"], 1.0)[:, :, None, None]
    return (2 * (cover * shape + (1 - cover) * ground) - 1).astype(np.float32)


def main():
    import sys
    from pathlib import Path

    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here.parent / "digits"))
    from common import to_uint8

    labels, factors = draw(np.random.default_rng(1), 4096)
    images = to_uint8(render(labels, factors)).transpose(0, 2, 3, 1)
    np.savez_compressed(here / "reference.npz", images=images, labels=labels)
    print(f"{here / 'reference.npz'}: {images.shape}")


if __name__ == "__main__":
    main()
