"""Draws samples.png: the teacher's samples in 35 calls (upper half) above the student's in one from the same noise (lower half).

    python sheet.py ../../runs/mnist/student/student.onnx

The teacher's: Heun's sampler (arXiv 2206.00364, algorithm 1 without noise) over 18 Karras levels of its schedule, under ONNX Runtime.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "digits"))

from common import session, to_uint8, write_png

ROWS, COLUMNS, STEPS = 5, 20, 18


def log_sigmas():
    """ln(sigma) of the 1000 steps of card.toml's schedule, rising."""
    abar = np.cumprod(1 - np.linspace(0.0001, 0.02, 1000))
    return 0.5 * np.log((1 - abar) / abar)


def denoiser(path):
    """x0 from (x0 + sigma e, sigma, labels) by the network's v at the step, with fractions, whose noise level is sigma."""
    runner, table = session(path), log_sigmas()

    def denoise(x, sigma, labels):
        step = np.interp(np.log(sigma), table, np.arange(len(table)))
        a = 1 / np.sqrt(1 + sigma**2)
        inputs = {"sample": x * a, "timestep": np.full(len(x), step), "class_labels": labels}
        v = runner.run(None, {k: value.astype(np.int64 if k == "class_labels" else np.float32) for k, value in inputs.items()})[0]
        return a * (a * x) - sigma * a * v

    return denoise


def heun(denoise, noise, labels, steps=STEPS, rho=7.0):
    """Samples [B,1,28,28] of the flow that begins at the schedule's highest noise level; 2 * steps - 1 calls."""
    low, high = np.exp(log_sigmas()[[0, -1]])
    sigmas = (high ** (1 / rho) + np.linspace(0, 1, steps) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    x = noise * np.sqrt(1 + high**2)
    for now, then in zip(sigmas, [*sigmas[1:], 0.0]):
        slope = (x - denoise(x, now, labels)) / now
        end = x + (then - now) * slope
        if then > 0:
            slope = (slope + (end - denoise(end, then, labels)) / then) / 2
            end = x + (then - now) * slope
        x = end
    return x


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "samples.png")
    args = parser.parse_args()
    count = ROWS * COLUMNS
    noise = np.random.default_rng(0).standard_normal((count, 1, 28, 28)).astype(np.float32)
    labels = np.arange(count) % 10
    upper = heun(denoiser(HERE / "teacher.onnx"), noise, labels)
    lower = session(args.student).run(None, {"noise": noise, "class_labels": labels})[0]
    halves = [to_uint8(h)[:, 0].reshape(ROWS, COLUMNS, 28, 28).transpose(0, 2, 1, 3).reshape(ROWS * 28, COLUMNS * 28) for h in (upper, lower)]
    write_png(args.out, np.concatenate([halves[0], np.full((8, COLUMNS * 28), 128, np.uint8), halves[1]]))
    print(args.out)


if __name__ == "__main__":
    main()
