"""What became of the weights that a graph does not hold, and what weights that are all but zero hide from a comparison."""

from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from . import layout, weights as names

FAINT = 1e-3  # of the size that keeps the spread of what a layer is given; layers drawn as zero have 0 or 1e-5 of it


@dataclass
class Fates:
    """The weights that are nowhere in a graph."""

    unused: list  # nothing that the network gives depends on them
    merged: dict  # weight -> the weight of equal values that stands for both
    folded: list  # computed into constants of other values
    constants: list  # names of those constants


def faint(weight):
    """Whether a matrix or kernel is so small that what it is given does not reach what it gives."""
    value = np.asarray(weight.get())
    if not weight.trained or value.ndim < 2 or not value.size or value.dtype.kind != "f":
        return False
    return float(np.abs(value).max()) < FAINT * usual(value)


def usual(value):
    """The size of a kernel's elements that keeps the spread: one over the root of the terms of a sum."""
    return (max(value.shape) / value.size) ** 0.5


@contextmanager
def drawn_anew(weights):
    """Within this, the faint weights have values of usual size. Yields {name: those values}."""
    random, kept, drawn = np.random.default_rng(1), {}, {}
    try:
        for weight in weights:
            if faint(weight):
                true = np.asarray(weight.get()).copy()
                kept[weight.name] = true
                drawn[weight.name] = (usual(true) * random.standard_normal(true.shape)).astype(true.dtype)
                weight.put(drawn[weight.name])
        yield drawn
    finally:
        for weight in weights:
            if weight.name in kept:
                weight.put(kept[weight.name])


@contextmanager
def moved(weights):
    """Within this, these weights have other values."""
    random = np.random.default_rng(2)
    kept = {weight.name: np.asarray(weight.get()).copy() for weight in weights}
    try:
        for weight in weights:
            value = kept[weight.name]
            size = float(np.abs(value).max(initial=0.0)) or 1.0
            weight.put((value + 0.1 * size * random.standard_normal(value.shape)).astype(value.dtype))
        yield
    finally:
        for weight in weights:
            weight.put(kept[weight.name])


def without_effect(weights, native, inputs, every):
    """The names of those of these weights that nothing depends on. `every`: all weights of the network."""
    if not weights:
        return set()
    same = lambda a, b: all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b))  # noqa: E731
    with drawn_anew(every):
        before = native(inputs)

        def idle(some):
            with moved(some):
                return same(before, native(inputs))

        if idle(weights):
            return {weight.name for weight in weights}
        return {weight.name for weight in weights if idle([weight])}


def twin(weight, weights, held):
    """The name of a weight in the graph whose values are this one's, or None."""
    value = np.asarray(weight.get())
    equal = lambda other: other.shape == value.shape and np.array_equal(layout.bits(other), layout.bits(value))  # noqa: E731
    return next((w.name for w in weights if w.name in held and equal(np.asarray(w.get()))), None)


def fates(named, weights, unused, export, folder):
    """Tells the lost weights apart. `export()`: the graph written once more, into `folder`, with the weights as they are then."""
    lost = [weight for weight in weights if weight.name in named.lost and weight.name not in unused]
    held = {weight.name for weight in weights if weight.found}
    merged = {weight.name: other for weight in lost if (other := twin(weight, weights, held)) is not None}
    folded = [weight for weight in lost if weight.name not in merged]
    found = []
    if folded and named.unknown:
        before = read(export(), folder)
        with moved(folded):
            after = read(export(), folder)
        same = lambda name: name in before and name in after and np.array_equal(before[name], after[name])  # noqa: E731
        found = [name for name in named.unknown if not same(name)]
    return Fates([n for n in named.lost if n in unused], merged, [weight.name for weight in folded], found)


def read(model, folder):
    """The float constants of an exporter's graph by their names."""
    return {node.output[0] if node else tensor.name: names.content(tensor, folder) for tensor, node in names.constants(model)}
