"""Frechet distance between samples of the teacher and the real digits, in the features of classifier.onnx.

    python check_teacher.py [--model teacher.onnx] [--samples 5120] [--steps 18] [--json]

Samples: Heun's deterministic sampler under ONNX Runtime, uniform labels, images rounded to 8 bits. Printed beside it: how
often the classifier reads the asked-for digit, and the distance between two random halves of the real digits (what the
size of the sets alone costs).
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from common import HERE, features, frechet, session, to_uint8, write_png
from model import CLASSES, heun_sample


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "teacher.onnx")
    parser.add_argument("--samples", type=int, default=5120)
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--png", type=Path, help="also write a grid of the first 100 samples")
    args = parser.parse_args()
    runner = session(args.model)

    def denoise(x, sigma, labels):
        inputs = {"x": x.numpy(), "sigma": sigma.numpy(), "labels": labels.numpy()}
        return torch.from_numpy(runner.run(["denoised"], inputs)[0])

    generator = torch.Generator().manual_seed(args.seed)
    noise = torch.randn(args.samples, 1, 8, 8, generator=generator)
    labels = torch.arange(args.samples) % CLASSES
    pixels = to_uint8(heun_sample(denoise, noise, labels, args.steps).numpy())
    ours, logits = features(pixels)
    data = np.load(HERE / "digits.npz")
    real, real_logits = features(data["images"])
    order = np.random.default_rng(0).permutation(len(real))
    half = len(real) // 2
    result = {
        "frechet": frechet(ours, real),
        "samples": args.samples,
        "nfe": 2 * args.steps - 1,
        "label_accuracy": float((logits.argmax(1) == labels.numpy()).mean()),
        "real_label_accuracy": float((real_logits.argmax(1) == data["labels"]).mean()),
        "real_halves_frechet": frechet(real[order[:half]], real[order[half:]]),
    }
    if args.png:
        write_png(args.png, pixels[:100, 0].reshape(10, 10, 8, 8).transpose(0, 2, 1, 3).reshape(80, 80), scale=8)
    if args.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:22} {value:.4g}")


if __name__ == "__main__":
    main()
