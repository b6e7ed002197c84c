"""How an exporter laid a framework's tensor out in the file: in which order of its axes, and in which shape.

Everywhere here `order` is a permutation of the framework's axes, and a tensor of the file holds a weight in that order where
`stored == weight.transpose(order).reshape(stored.shape)`, bit by bit. A few elements are looked at before whole tensors are.
"""

import itertools
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

MOST_AXES = 5  # longer than one, of which all permutations are tried: 120 of them
PROBES = 8


@dataclass(frozen=True)
class Stored:
    """Where and how a weight lies in the graph."""

    initializer: str
    own: tuple  # the framework's shape
    order: tuple
    shape: tuple  # in the file

    def entry(self):
        """Its entry of `disback.parameters.layout`; None where the file holds the framework's tensor as it is."""
        if self.order == tuple(range(len(self.own))) and self.shape == self.own:
            return None
        return {"shape": [int(n) for n in self.own], "perm": [int(axis) for axis in self.order]}


def bits(array):
    """The values as whole numbers, in row-major order: equal bits are equal values, of every type of number."""
    array = np.ascontiguousarray(array).reshape(-1)
    return array.view(f"u{array.dtype.itemsize}")


def corners(array):
    """What no transpose and no reshape changes: size, type, first and last value."""
    ends = np.array([array[(0,) * array.ndim], array[(-1,) * array.ndim]], array.dtype) if array.size else array.reshape(-1)
    return array.size, array.dtype.str, *bits(ends).tolist()


def orders(shape):
    """The permutations of a shape's axes that lie differently in memory, the identity first. Axes of length one make none."""
    yield tuple(range(len(shape)))
    long = [axis for axis, n in enumerate(shape) if n != 1]
    short = [axis for axis, n in enumerate(shape) if n == 1]
    if len(long) > MOST_AXES:
        yield (*reversed(long), *short)
        return
    for order in itertools.permutations(long):
        if list(order) != long:
            yield (*order, *short)


def natural(order, own, shape):
    """The same order with its axes of length one where the file's shape has them, if that is a transpose of the framework's."""
    if sorted(own) != sorted(shape) or order == tuple(range(len(own))):
        return order
    long, short = (iter([axis for axis in order if (own[axis] != 1) == wanted]) for wanted in (True, False))
    turned = tuple(next(short if n == 1 else long) for n in shape)
    return turned if tuple(own[axis] for axis in turned) == tuple(shape) else order


def probes(size):
    """A few positions, spread over a tensor without a period."""
    return np.unique((np.arange(1, PROBES + 1) * 0.6180339887 % 1 * size).astype(np.int64))


def at(array, order, positions):
    """Values at row-major positions of the transposed array, without transposing it."""
    turned = array.transpose(order) if array.ndim else array.reshape(1)
    return turned[np.unravel_index(positions, turned.shape)]


def same(own, order, value):
    """Whether `value` holds `own` in this order."""
    positions = probes(value.size)
    if not np.array_equal(bits(at(own, order, positions)), bits(at(value, range(value.ndim), positions))):
        return False
    return np.array_equal(bits(own.transpose(order)), bits(value))


def fitting(own, value):
    """All orders in which `value` holds `own`. More than one: `own` equals a transpose of itself."""
    if own.size != value.size or own.dtype != value.dtype or not own.size:
        return []
    return [order for order in orders(own.shape) if same(own, order, value)]


def is_own_transpose(value):
    """Whether another order of the axes gives the same values: symmetric matrices, and what is one number throughout."""
    return any(same(value, order, value) for order in orders(value.shape) if order != tuple(range(value.ndim)))


class Index:
    """Finds the weights that a tensor of the file holds. `shown(weight)`: the values that the exporter saw."""

    def __init__(self, weights, shown):
        self.shown, self.by_corners = shown, defaultdict(list)
        for weight in weights:
            value = shown(weight)
            if value.size:
                self.by_corners[corners(value)].append(weight)

    def find(self, value):
        """[(weight, orders in which it fits)]"""
        hits = []
        for weight in self.by_corners.get(corners(value), []):
            if found := fitting(self.shown(weight), value):
                hits.append((weight, found))
        return hits
