"""Inputs to compare with: a few rows for every input of the graph, from the card alone and the same for every framework."""

import numpy as np

from . import ConversionError
from .card import joined

# A range of times within which every network is well defined.
TIMES = {
    "sigma": (0.05, 5.0), "ln-sigma-4": (-0.7, 0.4), "ln-sigma-250": (-700.0, 400.0), "step": (1.0, 900.0), "unit": (0.02, 0.98),
    "thousand": (20.0, 980.0), "ln-sigma-half": (-3.7, 0.9), "radians": (0.05, 1.5),
}  # fmt: skip


def sample_shape(card):
    """Shape of one sample as the graph takes it, with the channels of the conditions that are joined to it."""
    layout, shape = card.get("layout"), list(card["shape"])
    if layout == "nhwc":
        shape = [*shape[1:], shape[0]]
    axis = {"nhwc": -1, "channels-last": -1, "frames-first": 1}.get(layout, 0)
    shape[axis] += sum(card[f"conditions.{name}.shape"][axis] for name in joined(card))
    return shape


def rows(card, names, batch, dtypes=None, seed=0):
    """{input: array [batch, ...]} for `names`, in order; `dtypes` says where they differ from f32 and (classes) int64."""
    dtypes = dtypes or {}
    random = np.random.default_rng([seed, batch])
    low, high = TIMES[card["time_unit"]]
    if card["time_unit"] == "step":
        steps = len(card["schedule.table"]) if "schedule.table" in card else int(card.get("schedule.steps", 1000))
        high = min(high, steps - 2.0)
    time = np.linspace(low, high, batch) if batch > 1 else np.array([(low + high) / 2])
    made = {}
    for name in names:
        kind = card.get(f"conditions.{name}.kind")
        if name == card["sample"]:
            value = random.standard_normal((batch, *sample_shape(card)))
        elif name == card["time"]:
            value = np.round(time) if card["time_unit"] == "step" else time
        elif kind == "class-index":
            value = (np.arange(batch) % int(card[f"conditions.{name}.classes"])).astype(np.int64)
        elif kind == "one-hot":
            classes = int(card[f"conditions.{name}.classes"])
            value = np.eye(classes)[np.arange(batch) % classes]
        elif kind == "embedding":
            value = random.standard_normal((batch, *card[f"conditions.{name}.shape"]))
        elif f"constants.{name}" in card:
            value = np.full((batch,), float(card[f"constants.{name}"]))
        else:
            raise ConversionError(
                f"input {name!r} of the network is not in the card; name it as sample, time, conditions.{name} or constants.{name}"
            )
        value = np.asarray(value)
        made[name] = value.astype(dtypes.get(name, value.dtype if value.dtype.kind == "i" else np.float32))
    return made


def names_input(card, name):
    """Whether the card names `name` as an input of the graph (an argument it leaves out keeps its default)."""
    prefixes = (f"conditions.{name}.", f"constants.{name}")
    return name in (card.get("sample"), card.get("time")) or any(key.startswith(prefixes) for key in card)


def repeat(inputs, batch):
    """Example inputs of another batch size: rows taken round."""
    return {name: value[np.arange(batch) % len(value)] for name, value in inputs.items()}
