#!/usr/bin/env python3
"""What a steady training step asks of a CUDA device, beside the same step in PyTorch eager: counts, never speed.

    python benches/counts.py [--networks digits,cifar,dit] [--exporters legacy,dynamo] [--steps stage1,stage2] [--precisions f32,bf16,recorded]
                             [--batch N] [--disback target/release/disback]

Ours: `disback` on the stand-in device (tests/stand_in_cuda; `cargo test --test stand_in` builds it), the difference of two runs
that differ in the number of steps alone. PyTorch: the loops of benches/peer.py on the CPU, operators counted where they are dispatched.
A launch is an operator that is no view, a copy within the device among them (foreach and fused optimisers count once: a device launches a few kernels
for each); bytes are those of its tensors, read and written. With recorded steps what a replay launches again is not the host's work: its
launches are those outside of recordings, plus one a replay.
"""

import argparse
import functools
import glob
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benches"))
from peer import Peer  # noqa: E402

NO_SHEETS = "--threads 1 --quiet --set log.samples=0 --set log.every=1000000 --set backtrack.ratio=1".split()
PHASES = {"stage1": ["--nodes", "1", "--updates", "1"], "stage2": ["--nodes", "0", "--degrade-steps", "0"]}
STEPS = {"stage1": "--degrade-steps", "stage2": "--updates"}
PRECISIONS = {
    "f32": ("f32", []),
    "bf16": ("bf16", ["--set", "precision=bf16"]),
    "recorded": ("f32, recorded", ["--set", "cuda_graphs=true"]),
}


def safe_softmax(x, dim, dtype=None):
    """aten::_safe_softmax by its parts: rows of minus infinity give zeros."""
    out = torch.softmax(x, dim, dtype)
    rows = x.isneginf().all(dim, keepdim=True)
    return torch.where(rows, torch.scalar_tensor(0.0, dtype=out.dtype), out)


class Count(TorchDispatchMode):
    """Launches and bytes of what is dispatched below autograd."""

    def __init__(self, hosts):
        """`hosts`: addresses of what lies on the host on a device too."""
        super().__init__()
        self.hosts = hosts
        self.launches = self.bytes = self.waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name == "aten::_safe_softmax":
            # Attention is decomposed on both sides; this is what it launches.
            with self:
                return safe_softmax(*args, **(kwargs or {}))
        out = function(*args, **(kwargs or {}))
        info = function._schema.returns[0].alias_info if function._schema.returns else None
        view = info is not None and not info.is_write
        if args and isinstance(args[0], torch.Tensor) and args[0].data_ptr() in self.hosts:
            return out
        self.waits += name == "aten::_local_scalar_dense"
        if view or name.startswith(("aten::empty", "aten::detach", "aten::_unsafe_view", "aten::_local_scalar", "profiler::")):
            return out
        self.launches += 1
        fresh = tree_leaves(out) if info is None else []
        for t in tree_leaves((args, kwargs)) + fresh:
            if isinstance(t, torch.Tensor):
                self.bytes += t.numel() * t.element_size()
        return out


def as_on_cuda(bf16):
    """Makes libtorch's CPU choose as it does on CUDA: lists in the optimiser and the clipping, and norms in f32 under autocast. What
    was there before, to be put back."""
    before = torch.optim.AdamW, torch.nn.utils.clip_grad_norm_, F.group_norm, F.layer_norm
    torch.optim.AdamW = functools.partial(before[0], foreach=True)
    torch.nn.utils.clip_grad_norm_ = functools.partial(before[1], foreach=True)
    if bf16:
        F.group_norm = lambda x, *more, **named: before[2](x.float(), *more, **named)
        F.layer_norm = lambda x, *more, **named: before[3](x.float(), *more, **named)
    return before


def eager(network, phase, precision, batch):
    peer = Peer(argparse.Namespace(network=network, batch=batch, device="cpu", precision=precision, compile=False))
    before = as_on_cuda(precision == "bf16")
    peer.begin(phase)
    step = peer.work(phase)
    # The optimisers make their state in the first step.
    step()
    # The optimiser's step numbers lie on the host.
    states = [s for o in peer.optimisers.values() for s in o.state.values()]
    # (The stand-in decomposes attention: so does this, where the CPU has a kernel for it.)
    with sdpa_kernel(SDPBackend.MATH), Count({s["step"].data_ptr() for s in states}) as count:
        step()
    torch.optim.AdamW, torch.nn.utils.clip_grad_norm_, F.group_norm, F.layer_norm = before
    return count.launches, count.bytes, count.waits


def ours(disback, library, model, phase, batch, more, folder):
    # The first ones settle (and record, where steps are recorded).
    few, many = (6, 8) if "cuda_graphs=true" in more else (3, 5)
    counts = []
    for steps in (few, many):
        report = folder / "report.json"
        run = folder / f"run-{steps}"
        words = [disback, "distill", model, "-o", run, "--device", "cuda", "--batch", batch, *NO_SHEETS, *PHASES[phase], STEPS[phase], steps, *more]
        env = dict(os.environ, LD_LIBRARY_PATH=str(library), STAND_IN_CUDA_REPORT=str(report), OMP_NUM_THREADS="1")
        out = subprocess.run([str(w) for w in words], env=env, capture_output=True, text=True)
        if out.returncode != 0:
            sys.exit(f"{' '.join(str(w) for w in words)}\n{out.stderr[-2000:]}")
        counts.append(json.loads(report.read_text()))
        subprocess.run(["rm", "-rf", str(run)], check=True)
    a, b = counts
    each = lambda f: (f(b) - f(a)) / (many - few)
    waits = lambda r: sum(r["waits"].values())
    return each(lambda r: r["launches"] + r["replays"]), each(lambda r: r["touched_bytes"]), each(waits), each(lambda r: r["to_device"] + r["to_host"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="digits,cifar,dit")
    parser.add_argument("--exporters", default="legacy,dynamo")
    parser.add_argument("--steps", default=",".join(PHASES), help="of which stages")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--batch", type=int, help="images a step; a network's own where absent")
    parser.add_argument("--disback", default=str(ROOT / "target/release/disback"))
    parser.add_argument("--models", default=str(ROOT / "target/bench"), help="where benches/networks.py writes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    built = sorted(glob.glob(str(ROOT / "target/tmp/stand-in-cuda-*/libtorch_cuda.so")), key=os.path.getmtime)
    if not built:
        sys.exit("no stand-in: cargo test --release --test stand_in doctor")
    library = Path(built[-1]).parent
    networks = options.networks.split(",")
    Path(options.models).mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, str(ROOT / "benches/networks.py"), options.models, *networks], check=True)
    print("| network | step | exporter | precision | launches (PyTorch) | ratio | MB touched (PyTorch) | ratio | waits (PyTorch) | copies to and from the host |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for network in networks:
            from networks import NETWORKS

            batch = options.batch or NETWORKS[network].batch
            for phase in options.steps.split(","):
                for precision, more in (PRECISIONS[p] for p in options.precisions.split(",")):
                    launches, size, waits = eager(network, phase, precision.split(",")[0], batch)
                    for exporter in options.exporters.split(","):
                        model = Path(options.models) / f"{network}-{exporter}.onnx"
                        l, s, w, c = ours(options.disback, library, model, phase, batch, more, Path(folder))
                        # What a replay touches was counted when it was recorded.
                        touched = "" if "recorded" in precision else f"{s / 1e6:.0f} ({size / 1e6:.0f}) | {s / size:.2f}"
                        print(
                            f"| {network}, batch {batch} | {phase} | {exporter} | {precision} | {l:.0f} ({launches}) | {l / launches:.2f} | "
                            f"{touched or '- | -'} | {w:.0f} ({waits}) | {c:.0f} |",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
