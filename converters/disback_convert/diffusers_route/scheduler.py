"""diffusers' scheduler_config.json -> prediction, time unit and schedule of the card. What cannot be said there is refused."""

import math

import numpy as np

from .. import ConversionError


def refuse(what):
    raise ConversionError(f"{what}; give schedule.*, prediction and time_unit by --card")


def card_of(config, tokens=None):
    """Card entries of a scheduler's configuration. `tokens`: length of the image sequence, for shifts that depend on it."""
    name = config.get("_class_name", "a scheduler without _class_name")
    if name.startswith("FlowMatch"):
        made = {"schedule.kind": "flow", "schedule.shift": flow_shift(name, config, tokens), "prediction": "flow", "time_unit": "thousand"}
        # Mochi's: its times are 1 - sigma.
        return made | {"schedule.direction": "noise-to-data"} if config.get("invert_sigmas") else made
    prediction = config.get("prediction_type", "epsilon")
    if name.startswith("EDM"):
        if prediction != "epsilon":
            refuse(f"{name} with prediction_type {prediction!r}")
        made = {"schedule.kind": "edm", "prediction": "edm-raw", "time_unit": "ln-sigma-4"}
        made["sigma_data"] = float(config.get("sigma_data", 0.5))
        return made | {f"schedule.{key}": float(config[key]) for key in ("sigma_min", "sigma_max", "rho") if key in config}
    known = {"epsilon": "epsilon", "v_prediction": "v", "sample": "denoised"}
    if prediction not in known:
        refuse(f"{name} with prediction_type {prediction!r}")
    return {"prediction": known[prediction], "time_unit": "step"} | vp(name, config)


def flow_shift(name, config, tokens):
    """The shift of the times; where it depends on the resolution, that of this one."""
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", 1.0))
    if tokens is None:
        refuse(f"{name} with use_dynamic_shifting, for a network whose sequence length is unknown")
    if config.get("time_shift_type", "exponential") != "exponential":
        refuse(f"{name} with time_shift_type {config['time_shift_type']!r}")
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    bottom, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return math.exp(bottom + (top - bottom) * (tokens - low) / (high - low))


def vp(name, config):
    """A variance-preserving schedule: by its betas' name, or as a table."""
    steps = int(config.get("num_train_timesteps", 1000))
    # diffusers' own defaults, where the file leaves them out
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    names = {"linear": "linear", "scaled_linear": "scaled-linear", "squaredcos_cap_v2": "cosine"}
    trained, zero_snr = config.get("trained_betas"), config.get("rescale_betas_zero_snr")
    if trained is None and kind not in names:
        refuse(f"{name} with beta_schedule {kind!r}")
    if trained is None and not zero_snr:
        made = {"schedule.kind": "vp", "schedule.betas": names[kind], "schedule.steps": steps}
        return made if kind == "squaredcos_cap_v2" else made | {"schedule.beta_start": start, "schedule.beta_end": end}
    betas = np.asarray(trained, np.float64) if trained is not None else betas_of(kind, start, end, steps)
    abar = np.cumprod(1 - betas)
    if zero_snr:
        # Lin et al. 2023, algorithm 1; the last entry as in diffusers' Euler schedulers, so that sigma stays finite.
        roots = np.sqrt(abar)
        abar = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
        abar[-1] = 2.0**-24
    return {"schedule.kind": "vp", "schedule.betas": "table", "schedule.table": [float(v) for v in abar]}


def betas_of(kind, start, end, steps):
    """The betas that diffusers makes, in f64."""
    if kind == "linear":
        return np.linspace(start, end, steps)
    if kind == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, steps) ** 2

    def abar(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - abar((k + 1) / steps) / abar(k / steps), 0.999) for k in range(steps)])
