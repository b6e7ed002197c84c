"""Makes the tables of a study: `python study.py OUT` (what study.sh OUT has written) prints them as Markdown.

An arm's runs are compared with the base method at equal rates (arm `equal`) of the same seeds. The cost of a run is its forward passes in
images, stage 1 counted, as a share of the base method's whole run at equal rates. Headline, chosen before the runs: the final distance, and
the share of the cost after which an arm first comes down to the base method's final distance. Beside it, since a base method that rises
again makes its final distance an easy mark: the lowest distance of a run, and the mean logarithm of the distance over the cost that all
arms have measured (lower is sooner). Means and 95 % intervals (Student's t) over the seeds.
"""

import json
import math
import sys
from pathlib import Path

# Student's t, 97.5 %, by degrees of freedom.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
ARMS = [
    ("equal", "base", "base, equal rates"),
    ("fast", "base", "base, fake score twice as fast"),
    ("five", "base", "base, five fake-score steps an update"),
    ("equal", "trajectory", "trajectory, equal rates, defaults"),
    ("auto", "trajectory", "`auto`, equal rates"),
    ("fast", "trajectory", "`auto`, fake score twice as fast"),
    ("five", "trajectory", "`auto`, five fake-score steps an update"),
]


def interval(values):
    """Mean and 95 % interval of a few values, as text."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return f"{mean:.2f} (one seed)"
    half = T[n - 1] * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return f"{mean:.2f} [{mean - half:.2f}, {mean + half:.2f}]"


def reached(points, distance):
    """Forward passes at the first look at or below a distance; None: never."""
    return next((p["forwards"] for p in points if p["distance"] <= distance), None)


def mean_log(points, start, end):
    """The mean of ln(distance) between two costs, by the trapezoidal rule on the looks between them."""
    inside = [p for p in points if start <= p["forwards"] <= end]
    if len(inside) < 2:
        return None
    area = sum(
        (b["forwards"] - a["forwards"]) * (math.log(a["distance"]) + math.log(b["distance"])) / 2 for a, b in zip(inside, inside[1:])
    )
    return area / (inside[-1]["forwards"] - inside[0]["forwards"])


def rows(folder):
    """The rows of one task and objective: (arm, its runs by seed)."""
    for arm, part, name in ARMS:
        file = folder / arm / "compare.json"
        if file.is_file():
            runs = json.loads(file.read_text())[part]
            yield name, {run["seed"]: run["points"] for run in runs}


def table(folder):
    """The Markdown rows of one task and objective."""
    arms = list(rows(folder))
    base = dict(arms).get("base, equal rates")
    if base is None:
        return
    start = max(points[0]["forwards"] for _, runs in arms for points in runs.values())
    end = min(points[-1]["forwards"] for _, runs in arms for points in runs.values())
    for name, runs in arms:
        seeds = [s for s in runs if s in base]
        final = [runs[s][-1]["distance"] for s in seeds]
        best = [min(p["distance"] for p in runs[s]) for s in seeds]
        shares = [(reached(runs[s], base[s][-1]["distance"]), base[s][-1]["forwards"]) for s in seeds]
        never = sum(r is None for r, _ in shares)
        share = f"never in {never} of {len(seeds)}" if never else interval([r / whole for r, whole in shares])
        logs = [mean_log(runs[s], start, end) for s in seeds]
        area = "-" if None in logs else interval(logs)
        ratio = interval([runs[s][-1]["distance"] / base[s][-1]["distance"] for s in seeds])
        print(f"| {folder.parent.name} | {folder.name} | {name} | {len(seeds)} | {interval(final)} | {ratio} | {share} | {interval(best)} | {area} |")


def main():
    print("| task | objective | arm | seeds | final distance | over the base's | share of the cost to the base's end | lowest distance | mean ln distance |")
    print("|---|---|---|---|---|---|---|---|---|")
    for folder in sorted(Path(sys.argv[1]).glob("*/*/")):
        table(folder)


if __name__ == "__main__":
    main()
