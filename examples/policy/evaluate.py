"""The teacher with 35 calls and the student with one, in closed loop.

    python evaluate.py STUDENT.onnx [--picture paths.png] [--json]

Prints the share of episodes that succeed, the share of those that pass above (the demonstrator's is a half), and how many actions a
second come out of ONNX Runtime with one thread and one robot.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

from task import EXECUTED, HORIZON, RADIUS, judge, roll_out

HERE = Path(__file__).resolve().parent
SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 20.0, 7.0


def session(path):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])


def teacher_policy(net, rng, steps=18):
    """Heun's method, 35 calls (arXiv 2206.00364, algorithm 1)."""
    ramp = np.linspace(0, 1, steps)
    sigmas = (SIGMA_MAX ** (1 / RHO) + ramp * (SIGMA_MIN ** (1 / RHO) - SIGMA_MAX ** (1 / RHO))) ** RHO
    sigmas = np.append(sigmas, 0.0)

    def act(observation):
        n = len(observation)

        def slope(x, sigma):
            given = {"actions": x.astype(np.float32), "sigma": np.full(n, sigma, np.float32), "observation": observation}
            return (x - net.run(["denoised"], given)[0]) / sigma

        x = rng.standard_normal((n, HORIZON, 2)) * sigmas[0]
        for now, after in zip(sigmas[:-1], sigmas[1:]):
            d = slope(x, now)
            following = x + (after - now) * d
            if after > 0:
                following = x + (after - now) * 0.5 * (d + slope(following, after))
            x = following
        return x

    return act


def student_policy(net, rng):
    output = net.get_outputs()[0].name

    def act(observation):
        noise = rng.standard_normal((len(observation), HORIZON, 2)).astype(np.float32)
        return net.run([output], {"noise": noise, "observation": observation})[0]

    return act


def rate(policy, seconds=1.0):
    """Actions a second that a single robot gets."""
    observation = np.zeros((1, 3), np.float32)
    policy(observation)
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        policy(observation)
        calls += 1
    return calls * EXECUTED / (time.perf_counter() - started)


def picture(path, runs):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(runs), figsize=(4 * len(runs), 3), sharey=True)
    for axis, (name, paths, obstacle) in zip(axes, runs):
        for k in range(24):
            axis.plot(paths[k, :, 0], paths[k, :, 1] - obstacle[k], lw=0.8)
        axis.add_patch(plt.Circle((0.5, 0), RADIUS, color="0.7"))
        axis.set_title(name)
        axis.set_aspect("equal")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("--teacher", type=Path, default=HERE / "teacher.onnx")
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    policies = {
        "teacher, 35 calls": teacher_policy(session(args.teacher), rng),
        "student, 1 call": student_policy(session(args.student), rng),
    }
    found, runs = {}, []
    for name, policy in policies.items():
        paths, obstacle = roll_out(policy, args.episodes, seed=7)
        success, above = judge(paths, obstacle)
        found[name] = {"success": success, "above": above, "actions_a_second": rate(policy)}
        runs.append((name, paths, obstacle))
    if args.picture:
        picture(args.picture, runs)
    if args.json:
        print(json.dumps(found))
        return
    print(f"{'':<20} {'success':>8} {'above':>6} {'actions/s':>10}")
    for name, f in found.items():
        print(f"{name:<20} {f['success']:>8.1%} {f['above']:>6.1%} {f['actions_a_second']:>10.0f}")


if __name__ == "__main__":
    main()
