"""The examples whose samples are no images, distilled for a few seconds: a policy in closed loop, rows of a table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
DISBACK = os.environ.get("DISBACK", str(ROOT / "target/release/disback"))


def run(folder, *args):
    done = subprocess.run([str(a) for a in args], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def distil(folder, out, *sets):
    pairs = [word for pair in sets for word in ("--set", pair)]
    run(folder, DISBACK, "distill", "teacher.onnx", "-o", out, "--config", "config.toml", "--quiet", *pairs)
    return out / "student.onnx"


def test_a_student_passes_the_obstacle_on_both_sides_in_one_call(tmp_path):
    folder = ROOT / "examples/policy"
    student = distil(folder, tmp_path / "run", "batch=64", "backtrack.updates=400", "degrade.steps=60", "log.sample_steps=4")
    found = json.loads(run(folder, sys.executable, "evaluate.py", student, "--json", "--episodes", "300"))
    teacher, student = found["teacher, 35 calls"], found["student, 1 call"]
    assert teacher["success"] > 0.97 and 0.4 < teacher["above"] < 0.6, found
    assert student["success"] > 0.75 and 0.3 < student["above"] < 0.7, found


def test_a_policy_of_one_answer_would_fail():
    """What the task is for: the mean of the demonstrations runs into the obstacle."""
    sys.path.insert(0, str(ROOT / "examples/policy"))
    import task

    observations, actions = task.windows(2000, seed=0)

    def nearest(observation):
        found = []
        for row in observation:
            near = np.argsort(np.square(observations - row).sum(1))[:40]
            found.append(actions[near].mean(0))
        return np.stack(found)

    success, _ = task.judge(*task.roll_out(nearest, 40, seed=3))
    assert success < 0.75, success


def test_rows_of_a_table_are_drawn_in_one_call(tmp_path):
    folder = ROOT / "examples/table"
    student = distil(folder, tmp_path / "run", "backtrack.updates=300", "degrade.steps=60", "log.sample_steps=4")
    run(folder, DISBACK, "sample", student, "-n", "569", "-o", tmp_path / "rows.csv")
    written = np.loadtxt(tmp_path / "rows.csv", delimiter=",", skiprows=1)
    assert written.shape == (569, 31) and set(written[:, 30]) == {0, 1}
    rows = written[:, :30]
    np.save(tmp_path / "rows.npy", rows.astype(np.float32))
    found = json.loads(run(folder, DISBACK, "evaluate", tmp_path / "rows.npy", "real.csv", "--json"))
    real = np.loadtxt(folder / "real.csv", delimiter=",", skiprows=1)
    # A normal distribution with the real means and deviations, but no correlations, is 5.7 away.
    assert found["frechet"] < 2.5, found
    apart = np.abs(np.corrcoef(rows.T) - np.corrcoef(real.T)).mean()
    assert apart < 0.15, apart


def test_rows_of_a_table_are_compared_by_their_values(tmp_path):
    """`compare` judges an untrained student of each arm as `evaluate` does: the distance falls from that of the start."""
    folder = ROOT / "examples/table"
    sets = ["backtrack.updates=40", "degrade.steps=8", "degrade.nodes=1", "batch=64", "backtrack.cooldown=0.5"]
    words = ["--config", "config.toml", "--reference", "real.csv", "--seeds", "0", "--samples", "256", "--every", "20"]
    run(folder, DISBACK, "compare", "teacher.onnx", "-o", tmp_path / "c", *words, *(w for s in sets for w in ("--set", s)))
    found = json.loads((tmp_path / "c" / "compare.json").read_text())
    for name in ("base", "trajectory"):
        [curve] = found[name]
        assert [point["updates"] for point in curve["points"]][-1] == 40, found
        assert all(0.3 < point["distance"] < 4 for point in curve["points"]), curve
        assert curve["points"][-1]["distance"] < curve["points"][0]["distance"], curve
