"""The peer of the benches: the digits network in native PyTorch eager, driven over stdin so that runs can alternate.

    python benches/peer.py [--threads 2] [--batch 128] [--device cpu|cuda]

Reads lines `stage1 N`, `stage2 N`, `call1 N`, `call64 N`, `quit`; answers each with one JSON line:
    {"measurement": "stage1", "n": N, "median_ms": .., "min_ms": .., "peak_rss_mb": .., "threads": .., "batch": ..}
N repetitions are timed after two that are not. The first line printed is {"ready": true, ...}.

stage1: one degradation step: images of the frozen student, denoising loss of the degrading copy, AdamW.
stage2: one backtracking step at ratio 1: student forward, target and fake denoisers on the noised images, the student's
        gradient and AdamW, its EMA, then the denoising loss of the fake score on the same images, and AdamW.
callB:  one call of the student (one forward) at batch B, without gradients.

Written as a PyTorch user would: eager, foreach optimisers, gradients clipped at 10, no compilation.
"""

import argparse
import copy
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "digits"))
from model import CLASSES, Denoiser, karras_sigmas  # noqa: E402

SIGMA_INIT = 80.0


class Peer:
    def __init__(self, batch, device):
        torch.manual_seed(0)
        self.batch = batch
        self.device = device
        self.table = karras_sigmas(1000).flip(0).float().to(device)
        self.teacher = Denoiser().to(device).requires_grad_(False)
        self.target = copy.deepcopy(self.teacher)
        self.student, self.fake = (copy.deepcopy(self.teacher).requires_grad_(True) for _ in range(2))
        self.average = copy.deepcopy(self.teacher)
        self.student_optimiser, self.fake_optimiser = (
            torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.0, 0.99)) for net in (self.student, self.fake)
        )

    def draw(self, batch):
        shape = (batch, 1, 8, 8)
        return torch.randn(shape, device=self.device), torch.randint(0, CLASSES, (batch,), device=self.device)

    def generate(self, net, noise, labels):
        return net(SIGMA_INIT * noise, torch.full((len(noise),), SIGMA_INIT, device=self.device), labels)

    def update(self, net, optimiser, loss):
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        optimiser.step()

    def denoising_step(self, images, labels):
        sigma = self.table[torch.randint(0, 1000, (self.batch,), device=self.device)]
        noisy = images + sigma[:, None, None, None] * torch.randn_like(images)
        weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
        loss = (weight * (self.fake(noisy, sigma, labels) - images).square().mean((1, 2, 3))).mean()
        self.update(self.fake, self.fake_optimiser, loss)

    def stage1(self):
        noise, labels = self.draw(self.batch)
        with torch.no_grad():
            images = self.generate(self.student, noise, labels)
        self.denoising_step(images, labels)

    def stage2(self):
        noise, labels = self.draw(self.batch)
        images = self.generate(self.student, noise, labels)
        with torch.no_grad():
            sigma = self.table[torch.randint(20, 981, (self.batch,), device=self.device)]
            noisy = images + sigma[:, None, None, None] * torch.randn_like(images)
            target, fake = self.target(noisy, sigma, labels), self.fake(noisy, sigma, labels)
            scale = (images - target).abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-5)
            goal = images - (fake - target) / scale
        loss = 0.5 * (images - goal).square().mean((1, 2, 3)).mean()
        self.update(self.student, self.student_optimiser, loss)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.student.parameters()), 0.01)
        self.denoising_step(images.detach(), labels)

    @torch.no_grad()
    def call(self, batch):
        noise, labels = self.draw(batch)
        return self.generate(self.student, noise, labels)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    peer = Peer(args.batch, args.device)
    synchronise = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    work = {
        "stage1": peer.stage1,
        "stage2": peer.stage2,
        "call1": lambda: peer.call(1),
        "call64": lambda: peer.call(64),
    }
    count = sum(p.numel() for p in peer.teacher.parameters())
    print(json.dumps({"ready": True, "torch": torch.__version__, "parameters": count, "threads": args.threads}), flush=True)
    for line in sys.stdin:
        words = line.split()
        if not words:
            continue
        if words[0] == "quit":
            break
        if words[0] not in work or len(words) != 2 or not words[1].isdigit() or int(words[1]) < 1:
            print(json.dumps({"error": f"not understood: {line.strip()}", "commands": [*work, "quit"]}), flush=True)
            continue
        times = []
        for k in range(int(words[1]) + 2):
            synchronise()
            started = time.perf_counter()
            work[words[0]]()
            synchronise()
            if k >= 2:
                times.append(1e3 * (time.perf_counter() - started))
        answer = {
            "measurement": words[0],
            "n": len(times),
            "median_ms": statistics.median(times),
            "min_ms": min(times),
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "threads": args.threads,
            "batch": args.batch if words[0].startswith("stage") else int(words[0][4:]),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
