"""Weights that the exporter computed with: what it split, scaled or stored twice is computed in the graph instead.

A constant of the file that is a slice of a weight along one axis, a multiple of a weight, or a multiple of a slice, in any
order of its axes, is replaced by nodes that make it of the weight itself.
"""

from dataclasses import dataclass

import numpy as np
from onnx import helper, numpy_helper

from . import layout

FEWEST = 8  # distinct values of a constant, below which it may equal a part of a weight by chance
ROUNDING = 4  # units in the last place within which a multiple is one


@dataclass
class Piece:
    """A constant of the file as a part of a weight."""

    weight: object
    order: tuple  # of the axes
    axis: int | None = None  # of the slice; None: the whole weight
    start: int = 0
    count: int = 0
    factor: tuple | None = None  # ("Mul" or "Div", number)

    @property
    def place(self):
        return self.weight.name, self.axis, self.start

    def values(self, own):
        """The slice of the framework's tensor."""
        return own if self.axis is None else part(own, self.axis, self.start, self.count)


def part(own, axis, start, count):
    return own[(slice(None),) * axis + (slice(start, start + count),)]


def telling(value):
    """Whether a constant has enough distinct values to be recognised by them."""
    flat = value.reshape(-1)
    return any(len(np.unique(layout.bits(flat[:few]))) >= FEWEST for few in (256, 1 << 16))


class Lines:
    """The first and the last values of all slices of one weight along one axis; no transpose changes which these are."""

    def __init__(self, weight, own, axis):
        self.weight, self.axis, self.length, self.dtype = weight, axis, own.shape[axis], own.dtype
        self.cross = own.size // self.length
        self.first, self.last = (
            np.array(own[tuple(end if k != axis else slice(None) for k in range(own.ndim))]) for end in (0, -1)
        )

    def starts(self, size):
        """(numbers of rows, starts) of the slices that have `size` values."""
        count, rest = divmod(size, self.cross)
        return (count, self.length - count + 1) if not rest and 0 < count <= self.length else (0, 0)


class Parts:
    """Finds the weight that a constant is a part of. `shown(weight)`: the values that the exporter saw."""

    def __init__(self, weights, shown):
        self.shown, self.lines, tables = shown, [], {}
        for weight in weights:
            own = shown(weight)
            if not weight.trained or own.size < FEWEST:
                continue
            for axis in (axis for axis, n in enumerate(own.shape) if n > 1):
                line = Lines(weight, own, axis)
                tables.setdefault(own.dtype.str, []).append((layout.bits(line.first), len(self.lines)))
                self.lines.append(line)
        # Where a slice begins with a given value: one sorted table of all, for each type of number.
        self.tables = {}
        for kind, entries in tables.items():
            values = np.concatenate([first for first, _ in entries])
            line = np.concatenate([np.full(len(first), number) for first, number in entries])
            start = np.concatenate([np.arange(len(first)) for first, _ in entries])
            order = np.argsort(values, kind="stable")
            self.tables[kind] = values[order], line[order], start[order]

    def find(self, value):
        """The part of a weight that this constant is, or None: nothing fits, or more than one part."""
        if not telling(value) or value.dtype.str not in self.tables:
            return None
        found = self.slices(value)
        if not found and value.dtype.kind == "f":
            found = self.multiples(value)
        return found[0] if len({(piece.place, piece.order) for piece in found}) == 1 else None

    def slices(self, value):
        """Slices that the constant equals bit by bit."""
        values, lines, starts = self.tables[value.dtype.str]
        first, last = layout.corners(value)[2:]
        low, high = (np.searchsorted(values, values.dtype.type(first), side) for side in ("left", "right"))
        found = []
        for line, start in ((self.lines[k], int(s)) for k, s in zip(lines[low:high], starts[low:high])):
            count, possible = line.starts(value.size)
            if count == line.length or start >= possible or int(layout.bits(line.last)[start + count - 1]) != last:
                continue
            own = part(self.shown(line.weight), line.axis, start, count)
            found += [Piece(line.weight, order, line.axis, start, count) for order in layout.fitting(own, value)]
        return found

    def multiples(self, value):
        """Weights and slices that the constant is a multiple of."""
        ends = np.array([value[(0,) * value.ndim], value[(-1,) * value.ndim]], np.float64)
        wholes, found = set(), []
        for line in self.lines:
            count, possible = line.starts(value.size)
            if not count or line.dtype != value.dtype or (count == line.length and line.weight.name in wholes):
                continue
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios = ends[0] / line.first[:possible].astype(np.float64), ends[1] / line.last[count - 1 :].astype(np.float64)
                apart = np.abs(ratios[0] - ratios[1])
            near = apart <= 2 * ROUNDING * np.finfo(value.dtype).eps * np.abs(ratios[0])
            # 0 / 0 says nothing; the other elements will.
            near |= np.isnan(apart) & ~np.isinf(ratios[0]) & ~np.isinf(ratios[1])
            for start in map(int, np.flatnonzero(near)):
                axis = None if count == line.length else line.axis
                wholes |= {line.weight.name} if axis is None else set()
                own = Piece(line.weight, (), axis, start, count).values(self.shown(line.weight))
                for order in layout.orders(own.shape):
                    if factor := multiple(own, order, value):
                        found.append(Piece(line.weight, order, axis, start, count, factor))
        return found


def ratios(own, value):
    """value / own, element by element, where that is one number within rounding; else None."""
    own, value = own.astype(np.float64).reshape(-1), value.astype(np.float64).reshape(-1)
    some = own != 0
    if not some.any() or not np.array_equal(some, value != 0):
        return None
    return value[some] / own[some]


def multiple(own, order, value):
    """("Mul" or "Div", number) that makes `value` of `own` in this order, within rounding; else None."""
    kind, eps = value.dtype.type, np.finfo(value.dtype).eps
    positions = layout.probes(value.size)
    few = layout.at(own, order, positions), layout.at(value, range(value.ndim), positions)
    turned, flat = own.transpose(order), np.ascontiguousarray(value).reshape(-1)
    for mine, theirs in (few, (turned, flat)):
        found = ratios(mine, theirs)
        if found is None or np.ptp(found) > 2 * ROUNDING * eps * np.abs(found).max():
            return None
    turned, middle = np.ascontiguousarray(turned).reshape(-1), (found.max() + found.min()) / 2
    best, least = None, ROUNDING + 0.5
    for op, compute, number in (("Mul", np.multiply, middle), ("Div", np.divide, 1 / middle)):
        near = kind(number)
        for number in (near, np.nextafter(near, kind(0)), np.nextafter(near, kind(2) * near)):
            with np.errstate(over="ignore"):
                apart = float((np.abs(compute(turned, number) - flat) / np.abs(np.spacing(flat))).max())
            if apart < least:
                best, least = (op, number), apart
    return best


def derive(graph, stored, target, piece, shape, renamed, opset):
    """Reads or nodes that make `target`, of `shape`, out of a weight that lies in the graph as `stored`."""
    steps, here = [], tuple(stored.shape)
    turn = [stored.order.index(axis) for axis in piece.order]
    ordered = tuple(stored.own[axis] for axis in stored.order)
    if piece.axis is not None or turn != list(range(len(turn))):
        steps += [("Reshape", ordered)] if here != ordered else []
        here = ordered
    if piece.axis is not None:
        axis = stored.order.index(piece.axis)
        steps.append(("Slice", (axis, piece.start, piece.start + piece.count)))
        here = (*here[:axis], piece.count, *here[axis + 1 :])
    if turn != list(range(len(turn))):
        steps.append(("Transpose", turn))
        here = tuple(here[axis] for axis in turn)
    if piece.factor is not None:
        steps.append(piece.factor)
    steps += [("Reshape", shape)] if here != tuple(shape) else []
    if not steps:
        renamed[target] = stored.initializer
    source = stored.initializer
    for k, (op, given) in enumerate(steps):
        made = target if k == len(steps) - 1 else f"{target}/{k}"
        graph.node.insert(k, node_of(graph, op, given, source, made, opset))
        source = made


def node_of(graph, op, given, source, made, opset):
    """One step; what the operator takes as inputs is added to the initializers."""

    def constant(what, array):
        graph.initializer.append(numpy_helper.from_array(array, f"{made}/{what}"))
        return f"{made}/{what}"

    if op == "Transpose":
        return helper.make_node(op, [source], [made], perm=given)
    if op == "Reshape":
        return helper.make_node(op, [source, constant("shape", np.array(given, np.int64))], [made])
    if op == "Slice":
        axis, start, end = given
        if opset < 10:
            return helper.make_node(op, [source], [made], axes=[axis], starts=[start], ends=[end])
        numbers = (("starts", start), ("ends", end), ("axes", axis))
        return helper.make_node(op, [source, *(constant(what, np.array([n], np.int64)) for what, n in numbers)], [made])
    return helper.make_node(op, [source, constant("factor", np.asarray(given))], [made])
