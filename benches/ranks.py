#!/usr/bin/env python3
"""Two processes of one thread beside one process of one thread and one of two: images a second of whole training loops, alternating.

    python benches/ranks.py [--networks digits,cifar] [--repeats 3] [--disback target/release/disback] [--json FILE]

All arms compute the same: an update of two micro-batches, stage 1 and stage 2 (SiD, ratio 1). Images a second are taken between the second row
of metrics and the last. `waiting`: the share of the time that rank 0 spends on sending, receiving and waiting.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Name: teacher's file, images a micro-batch, updates of each stage.
NETWORKS = {"digits": ("examples/digits/teacher.onnx", 32, 24), "cifar": ("cifar-dynamo.onnx", 2, 6)}
# Name: processes, threads of each.
ARMS = {"one process, one thread": (1, 1), "one process, two threads": (1, 2), "two processes, one thread": (2, 1)}


def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def measure(disback, teacher, batch, updates, processes, threads):
    """Images a second and share of waiting of each stage."""
    with tempfile.TemporaryDirectory() as folder:
        command = [disback, "distill", teacher, "-o", f"{folder}/run", "--device", "cpu", "--threads", threads, "--batch", batch]
        command += ["--accumulate", 2, "--nodes", 1, "--degrade-steps", updates, "--updates", updates, "--objective", "sid", "--quiet"]
        for pair in ["backtrack.ratio=1", "log.every=1", "log.samples=0", "log.checkpoint_every=0"]:
            command += ["--set", pair]
        place = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}
        started = []
        for rank in range(processes):
            env = os.environ | {k: str(v) for k, v in (place | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            started.append(subprocess.Popen([str(c) for c in command], env=env, stdout=subprocess.DEVNULL))
        if any([p.wait() != 0 for p in started]):
            sys.exit("error: a run has failed")
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for stage in ("degrade", "backtrack"):
        mine = [r for r in rows if r["stage"] == stage][1:]
        seconds = mine[-1]["seconds"] - mine[0]["seconds"]
        waited = sum(r.get("waited", 0.0) for r in mine[1:])
        found[stage] = ((mine[-1]["images"] - mine[0]["images"]) / seconds, waited / seconds)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", default="digits,cifar")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--disback", default=str(ROOT / "target/release/disback"))
    parser.add_argument("--json")
    args = parser.parse_args()
    results = {}
    for name in args.networks.split(","):
        file, batch, updates = NETWORKS[name]
        teacher = ROOT / file
        if not teacher.exists():
            folder = ROOT / "target" / "bench-networks"
            subprocess.run([sys.executable, ROOT / "benches/networks.py", folder, name], check=True, stdout=subprocess.DEVNULL)
            teacher = folder / file
        seen = {arm: [] for arm in ARMS}
        for repeat in range(args.repeats):
            # The order turns round, so that a drift of the machine meets all arms.
            for arm in list(ARMS) if repeat % 2 == 0 else list(ARMS)[::-1]:
                seen[arm].append(measure(args.disback, teacher, batch, updates, *ARMS[arm]))
        results[name] = seen
        for stage in ("degrade", "backtrack"):
            rates = {arm: statistics.median(m[stage][0] for m in seen[arm]) for arm in ARMS}
            waiting = statistics.median(m[stage][1] for m in seen["two processes, one thread"])
            single = rates["one process, one thread"]
            print(f"{name}, {stage}, micro-batches of {batch}:")
            for arm, rate in rates.items():
                print(f"  {arm:<28} {rate:9.2f} images/s  {rate / single:5.2f} of one process, one thread")
            print(f"  waiting of rank 0: {100 * waiting:.1f} % of the time")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
