"""The task: move from the left edge to the goal at (1, 0), around a round obstacle, on either side.

A demonstrator passes above or below with equal chance, so that the right answer has two modes and their mean runs into the
obstacle. All in numpy; positions are in units of the way's length.
"""

import numpy as np

HORIZON = 16  # actions that a policy predicts at once
EXECUTED = 8  # of which so many are carried out before it looks again
STEPS = 32  # of a demonstration
RADIUS = 0.2  # of the obstacle, whose centre is at x = 0.5
MARGIN = 0.12  # by which the demonstrator keeps away from it
SCALE = 20.0  # network's units for one unit of displacement


def smooth(t):
    """0 to 1 with zero slope at both ends."""
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def demonstration(rng):
    """Positions [STEPS + 1, 2] and the obstacle's height."""
    start, obstacle = rng.uniform(-0.3, 0.3), rng.uniform(-0.2, 0.2)
    top = obstacle + rng.choice([-1.0, 1.0]) * (RADIUS + MARGIN + 0.03 * rng.standard_normal())
    x = np.linspace(0, 1, STEPS + 1)
    y = np.where(x < 0.5, start + (top - start) * smooth(x / 0.4), top * (1 - smooth((x - 0.6) / 0.4)))
    return np.stack([x, y], 1), obstacle


def windows(count, seed):
    """Observations [N, 3] (position, obstacle's height) and actions [N, HORIZON, 2] (displacements times SCALE), f32."""
    rng = np.random.default_rng(seed)
    observations, actions = [], []
    for _ in range(count):
        path, obstacle = demonstration(rng)
        moves = np.concatenate([np.diff(path, axis=0), np.zeros((HORIZON, 2))]) * SCALE
        for k in range(0, STEPS, 2):
            # A little off the path, with a first move that leads back: what a policy needs that sees its own errors.
            off = 0.01 * rng.standard_normal(2)
            chunk = moves[k : k + HORIZON].copy()
            chunk[:4] -= off * SCALE / 4
            observations.append([*(path[k] + off), obstacle])
            actions.append(chunk)
    return np.asarray(observations, np.float32), np.asarray(actions, np.float32)


def roll_out(policy, episodes, seed):
    """Closed loop: `policy` makes actions [N, HORIZON, 2] of observations [N, 3]. Returns paths [N, T, 2] and obstacles [N]."""
    rng = np.random.default_rng(seed)
    position = np.stack([np.zeros(episodes), rng.uniform(-0.3, 0.3, episodes)], 1)
    obstacle = rng.uniform(-0.2, 0.2, episodes)
    paths = [position]
    for _ in range(STEPS // EXECUTED):
        actions = policy(np.concatenate([position, obstacle[:, None]], 1).astype(np.float32))
        for k in range(EXECUTED):
            position = position + actions[:, k] / SCALE
            paths.append(position)
    return np.stack(paths, 1), obstacle


def judge(paths, obstacle):
    """Share of episodes that reach the goal without touching the obstacle, and share of those that pass above."""
    centre = np.stack([np.full(len(obstacle), 0.5), obstacle], 1)[:, None]
    # Between two positions as well.
    between = np.concatenate([paths, (paths[:, 1:] + paths[:, :-1]) / 2], 1)
    free = np.linalg.norm(between - centre, axis=2).min(1) > RADIUS
    reached = np.linalg.norm(paths[:, -1] - np.array([1.0, 0.0]), axis=1) < 0.1
    good = free & reached
    middle = np.abs(paths[:, :, 0] - 0.5).argmin(1)
    above = paths[np.arange(len(paths)), middle, 1] > obstacle
    return float(good.mean()), float(above[good].mean()) if good.any() else float("nan")
