"""The peer of the benches: a network in native PyTorch, driven over stdin so that runs can alternate.

    python benches/peer.py [--network digits] [--phase stage1] [--batch 128] [--precision f32|bf16] [--threads 2]
                           [--device cpu|cuda] [--compile]

Reads lines `run N` (N steps or calls) or `phase NAME` (another one, in the same process) and `quit`; answers each with one
JSON line: {"ms": mean of the N, "peak_mb": highest resident size since the phase began (device memory on CUDA)}. The first
line printed is {"ready": true, ...}; a failure is {"error": ...}. Before the first answer of a phase two steps (at ratio 5: a
whole round of them) are done that are not timed.

stage1   one degradation step: images of the frozen student, denoising loss of the degrading copy, AdamW.
stage2   one backtracking step at ratio 1: student forward, target and fake denoisers on the noised images, the student's
         gradient and AdamW, its EMA, then the denoising loss of the fake score on the same images, and AdamW.
stage2r5 the same with five steps of the fake score for one of the student; a step is one of the five.
callB    one call of the student (one forward) at batch B, without gradients.

Written as a PyTorch user would: eager, foreach optimisers, gradients clipped at 10; --compile: the networks through
torch.compile. bf16 is autocast over f32 weights. FLOPs by torch's own counter: `--flops` prints those of one forward.
"""

import argparse
import copy
import gc
import json
import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from networks import NETWORKS, arguments, build, digits  # noqa: E402


class Peer:
    def __init__(self, args):
        self.spec = NETWORKS[args.network]
        self.batch = args.batch or self.spec.batch
        self.device = args.device
        self.bf16 = args.precision == "bf16"
        self.compiled = torch.compile if args.compile else lambda net: net
        self.table = digits.karras_sigmas(1000).flip(0).float().to(self.device)
        self.teacher = build(args.network).to(self.device).requires_grad_(False)
        self.nets, self.optimisers, self.iteration = {}, {}, 0

    def begin(self, phase):
        """The copies that the phase needs, made afresh."""
        self.nets, self.optimisers, self.iteration = {}, {}, 0
        gc.collect()
        torch.manual_seed(0)
        trained = {"stage1": ["fake"], "stage2": ["student", "fake"], "stage2r5": ["student", "fake"]}.get(phase, [])
        for name in ["student"] + (["fake"] if trained else []) + (["target", "average"] if len(trained) == 2 else []):
            net = copy.deepcopy(self.teacher).requires_grad_(name in trained)
            self.nets[name] = self.compiled(net)
            if name in trained:
                self.optimisers[name] = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.0, 0.99))

    def autocast(self):
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.bf16)

    def draw(self, batch):
        noise = torch.randn((batch, *self.spec.shape), device=self.device)
        return noise, torch.randint(0, self.spec.classes, (batch,), device=self.device)

    def generate(self, name, noise, labels):
        with self.autocast():
            return self.spec.generate(self.nets[name], noise, labels)

    def denoise(self, name, noisy, sigma, labels):
        with self.autocast():
            return self.spec.denoise(self.nets[name], noisy, sigma, labels)

    def update(self, name, loss):
        self.optimisers[name].zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.nets[name].parameters(), 10.0)
        self.optimisers[name].step()

    def noised(self, images, low, high):
        sigma = self.table[torch.randint(low, high, (self.batch,), device=self.device)]
        return sigma, images + sigma[:, None, None, None] * torch.randn_like(images)

    def denoising_step(self, images, labels):
        sigma, noisy = self.noised(images, 0, 1000)
        weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
        loss = (weight * (self.denoise("fake", noisy, sigma, labels) - images).square().mean((1, 2, 3))).mean()
        self.update("fake", loss)

    def stage1(self):
        noise, labels = self.draw(self.batch)
        with torch.no_grad():
            images = self.generate("student", noise, labels)
        self.denoising_step(images, labels)

    def stage2(self):
        noise, labels = self.draw(self.batch)
        images = self.generate("student", noise, labels)
        with torch.no_grad():
            sigma, noisy = self.noised(images, 20, 981)
            target, fake = (self.denoise(name, noisy, sigma, labels) for name in ("target", "fake"))
            scale = (images - target).abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-5)
            goal = images - (fake - target) / scale
        loss = 0.5 * (images - goal).square().mean((1, 2, 3)).mean()
        self.update("student", loss)
        with torch.no_grad():
            average, student = (list(self.nets[name].parameters()) for name in ("average", "student"))
            torch._foreach_lerp_(average, student, 0.01)
        self.denoising_step(images.detach(), labels)

    def stage2r5(self):
        self.iteration += 1
        (self.stage2 if self.iteration % 5 == 0 else self.stage1)()

    def work(self, phase):
        if not phase.startswith("call"):
            return getattr(self, phase)

        def call():
            with torch.no_grad():
                return self.generate("student", *self.draw(int(phase[4:])))

        return call


def reset_peak(device):
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass


def peak_mb(device):
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def forward_gmacs(name):
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        build(name)(*arguments(name, 1))
    return counter.get_total_flops() / 2e9


def say(**values):
    print(json.dumps(values), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="digits", choices=NETWORKS)
    parser.add_argument("--phase", default="stage1")
    parser.add_argument("--batch", type=int, default=0, help="0: the network's own")
    parser.add_argument("--precision", default="f32", choices=["f32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--flops", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.flops:
        return say(gmacs=forward_gmacs(args.network))
    peer = Peer(args)
    synchronise = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    count = sum(p.numel() for p in peer.teacher.parameters())
    say(ready=True, torch=torch.__version__, parameters=count, threads=args.threads, batch=peer.batch)
    clock = time.process_time if "DISBACK_BENCH_CPU" in os.environ else time.perf_counter
    phase, warm = args.phase, False
    for line in sys.stdin:
        words = line.split()
        if words == ["quit"]:
            break
        if len(words) == 2 and words[0] == "phase":
            phase, warm = words[1], False
            say(phase=phase)
            continue
        if len(words) != 2 or words[0] != "run" or not words[1].isdigit() or int(words[1]) < 1:
            say(error=f"not understood: {line.strip()}", commands=["run N", "phase NAME", "quit"])
            continue
        try:
            if not warm:
                peer.begin(phase)
                reset_peak(args.device)
                work = peer.work(phase)
                for _ in range(5 if phase == "stage2r5" else 2):
                    work()
                warm = True
            synchronise()
            started = clock()
            for _ in range(int(words[1])):
                work()
            synchronise()
            say(ms=1e3 * (clock() - started) / int(words[1]), peak_mb=peak_mb(args.device))
        except Exception as e:  # noqa: BLE001: what torch.compile throws is of many kinds
            say(error=f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"[:300])


if __name__ == "__main__":
    main()
