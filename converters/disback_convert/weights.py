"""The framework's own names for the tensors of a graph.

Exporters rename weights, transpose them, reshape them, split and scale them, and merge those whose bytes are equal. A weight
is found again by its values, and how it lies in the file is written down. Weights whose bytes equal another's or one of their
own transposes are given values of their own while the exporter runs, so that nothing is merged that the framework keeps apart
and every orientation can be seen; the true values come back afterwards.
"""

import itertools
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Callable

import numpy as np
import onnx
from onnx import external_data_helper, numpy_helper

from . import layout, recover
from .layout import Stored

FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}


@dataclass
class Weight:
    """One tensor of the framework's network."""

    name: str
    get: Callable[[], np.ndarray]
    put: Callable[[np.ndarray], None]
    trained: bool = True
    aliases: list = field(default_factory=list)  # further names of the same tensor (tied weights)
    found: list = field(default_factory=list)  # initializers that hold it

    @property
    def module(self):
        return self.name.rpartition(".")[0]


def is_plain(array):
    """Whether all values are one number."""
    return array.size > 0 and bool((array == array.reshape(-1)[0]).all())


@contextmanager
def told_apart(weights, leave=()):
    """Within this, no weight equals another or a transpose of itself, but for those named in `leave`. Yields {name: (true
    values, shown values)} of those that were changed."""
    seen, changed = defaultdict(list), {}
    random = np.random.default_rng(0)
    # Buffers, which keep their values, are seen first.
    for weight in sorted(weights, key=lambda weight: weight.trained):
        value = np.asarray(weight.get())
        if not value.size:
            continue
        others = seen[layout.corners(value)]
        if weight.trained and value.dtype.kind == "f" and weight.name not in leave:
            twin = is_plain(value) or layout.is_own_transpose(value)
            if twin or any(layout.fitting(np.asarray(other.get()), value) and not tied(other, value) for other in others):
                size = float(np.abs(value).max()) or 1.0
                shown = (value + 0.01 * size * random.standard_normal(value.shape)).astype(value.dtype)
                changed[weight.name] = (value.copy(), shown)
                weight.put(shown)
                others = seen[layout.corners(shown)]
        others.append(weight)
    try:
        yield changed
    finally:
        for weight in weights:
            if weight.name in changed:
                weight.put(changed[weight.name][0])


def tied(weight, value):
    """Whether a weight's values lie in the same memory: they change together."""
    return np.may_share_memory(np.asarray(weight.get()), value)


def content(tensor, folder):
    """The values of an initializer, from the file beside the graph too."""
    if external_data_helper.uses_external_data(tensor):
        loaded = onnx.TensorProto()
        loaded.CopyFrom(tensor)
        external_data_helper.load_external_data_for_tensor(loaded, str(folder))
        loaded.data_location = onnx.TensorProto.DEFAULT
        del loaded.external_data[:]
        tensor = loaded
    return numpy_helper.to_array(tensor)


def constants(model):
    """Yields every float initializer and Constant node of the main graph: (tensor, node or None)."""
    nodes = [(n.attribute[0].t, n) for n in model.graph.node if n.op_type == "Constant" and n.attribute[0].name == "value"]
    for tensor, node in itertools.chain(((t, None) for t in model.graph.initializer), nodes):
        if tensor.data_type in FLOATS:
            yield tensor, node


@dataclass
class Named:
    """What [`name`] found."""

    parameters: list  # initializers that are trained, by their new names
    tied: list  # groups of names of one tensor; the first is in the graph
    lost: list  # framework weights that are nowhere in the graph: unused, or folded into others
    partial: list  # framework weights of which only parts were found
    unknown: list  # constants that are no weight of the framework, with more than one distinct value
    unclear: list  # weights that equal a transpose of themselves, in an order that nothing in the graph tells
    layout: dict  # initializer -> Stored


@dataclass
class Constant:
    """A constant of the exporter's graph."""

    tensor: onnx.TensorProto
    node: onnx.NodeProto | None
    hits: list  # [(weight, orders)]
    shape: tuple
    dtype: np.dtype
    plain: bool

    @property
    def old(self):
        return self.node.output[0] if self.node is not None else self.tensor.name

    def remove(self, graph):
        if self.node is None:
            graph.initializer.remove(self.tensor)
        else:
            graph.node.remove(self.node)


class Naming:
    """One pass over a graph. `leave`: weights that are not whole in it, whatever equals them."""

    def __init__(self, model, folder, weights, changed, leave=()):
        self.model, self.graph, self.folder, self.weights, self.changed = model, model.graph, folder, weights, changed
        self.renamed, self.moved, self.derived, self.unknown, self.unclear = {}, [], [], [], []
        self.first, self.layout = {}, {}  # weight -> Stored of its first initializer; initializer -> Stored
        self.taken = {v for n in self.graph.node for v in (*n.input, *n.output)}
        self.taken |= {value.name for value in (*self.graph.input, *self.graph.initializer)}
        index = layout.Index([weight for weight in weights if weight.name not in leave], self.shown)
        self.constants = []
        for tensor, node in constants(model):
            value = content(tensor, folder)
            self.constants.append(Constant(tensor, node, index.find(value), value.shape, value.dtype, is_plain(value)))
        self.habits = Habits(model.graph, self.constants)

    def shown(self, weight):
        """The values that the exporter saw."""
        return self.changed[weight.name][1] if weight.name in self.changed else np.asarray(weight.get())

    def true(self, weight):
        return self.changed[weight.name][0] if weight.name in self.changed else np.asarray(weight.get())

    def free_name(self, wanted, old=None):
        new, k = wanted, 1
        while new in self.layout or (new in self.taken and new != old):
            k += 1
            new = f"{wanted}:{k}"
        return new

    def order_of(self, constant, weight, orders):
        """The order in which the constant holds the weight."""
        if len(orders) == 1 or not weight.trained:
            return orders[0]
        usual = self.habits.order(constant, orders)
        if usual is None:
            self.unclear.append(weight.name)
        return usual or orders[0]

    def wholes(self):
        """Names the constants that hold a weight; the second of a kind is computed from the first."""
        for constant in self.constants:
            hits, old = constant.hits, constant.old
            if not hits:
                if not constant.plain:
                    self.unknown.append(constant)
                continue
            weight, orders = next((hit for hit in hits if hit[0].name not in self.first), hits[0])
            if weight.name in self.first and constant.plain:
                continue  # ones or zeros of the graph's own
            order = self.order_of(constant, weight, orders)
            if weight.name in self.first and len(hits) == 1:
                self.derived.append((constant, self.first[weight.name], recover.Piece(weight, order)))
                continue
            own = self.shown(weight).shape
            order = layout.natural(order, own, constant.shape)
            stored = Stored(self.free_name(weight.name, old), own, order, constant.shape)
            new = stored.initializer
            self.note(weight, stored)
            self.renamed[old] = new
            if weight.name in self.changed:
                true = np.ascontiguousarray(self.true(weight).transpose(order)).reshape(constant.shape)
                constant.tensor.CopyFrom(numpy_helper.from_array(true.astype(constant.dtype), new))
            if constant.node is not None:
                self.moved.append((constant.node, new))
            constant.tensor.name = new

    def note(self, weight, stored):
        weight.found.append(stored.initializer)
        self.layout[stored.initializer] = stored
        self.first.setdefault(weight.name, stored)

    def parts(self):
        """Computes the constants that are parts or multiples of a weight from it. Returns the weights of which some is missing."""
        if not self.unknown:
            return []
        finder, covered, left = recover.Parts(self.weights, self.shown), {}, []
        for constant in self.unknown:
            piece = finder.find(content(constant.tensor, self.folder))
            if piece is None:
                left.append(constant)
                continue
            weight = piece.weight
            if weight.name not in self.first:
                true = self.true(weight)
                stored = Stored(self.free_name(weight.name), true.shape, tuple(range(true.ndim)), true.shape)
                self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(true), stored.initializer))
                self.note(weight, stored)
                covered[weight.name] = np.zeros(true.shape, bool)
            if weight.name in covered:
                piece.values(covered[weight.name])[...] = True
            self.derived.append((constant, self.first[weight.name], piece))
        self.unknown = left
        return [name for name, done in covered.items() if not done.all()]

    def run(self):
        self.wholes()
        partial = self.parts()
        for node, new in self.moved:
            self.graph.initializer.add().CopyFrom(node.attribute[0].t)
            self.graph.initializer[-1].name = new
            self.graph.node.remove(node)
        opset = next((entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx")), 23)
        for constant, stored, piece in self.derived:
            old = constant.old
            constant.remove(self.graph)
            recover.derive(self.graph, stored, old, piece, constant.shape, self.renamed, opset)
        rename_reads(self.graph, self.renamed)
        mark_modules(self.graph, {new: weight.module for weight in self.weights for new in weight.found})
        return Named(
            parameters=[new for weight in self.weights if weight.trained for new in weight.found],
            tied=[[weight.found[0], *weight.aliases] for weight in self.weights if weight.aliases and weight.found],
            lost=[weight.name for weight in self.weights if weight.trained and not weight.found],
            partial=partial,
            unknown=[constant.old for constant in self.unknown],
            unclear=self.unclear,
            layout=self.layout,
        )


def name(model, folder, weights, changed, leave=()):
    """Gives the graph's tensors the framework's names, and the true values where `changed` has them."""
    return Naming(model, folder, weights, changed, leave).run()


class Habits:
    """In which order the graph's nodes read weights that lie in only one: what reads a weight in the same way wants the same."""

    def __init__(self, graph, constants):
        self.readers = defaultdict(set)
        for node in graph.node:
            how = [a.SerializeToString() for a in node.attribute] if node.op_type in ("Gemm", "Transpose") else []
            for k, value in enumerate(node.input):
                self.readers[value].add((node.op_type, k, *how))
        self.orders = defaultdict(Counter)
        for constant in constants:
            for weight, orders in constant.hits[:1]:
                if len(orders) == 1 and len(constant.hits) == 1 and all(n > 1 for n in constant.shape):
                    self.orders[self.key(constant, orders[0])][orders[0]] += 1

    def key(self, constant, order):
        return frozenset(self.readers[constant.old]), len(order), len(constant.shape)

    def order(self, constant, orders):
        """The one of these orders that its readers take everywhere else; None where they have no one habit."""
        usual = self.orders[self.key(constant, orders[0])]
        return next(iter(usual)) if len(usual) == 1 and next(iter(usual)) in orders else None


def rename_reads(graph, renamed):
    """New names wherever the old ones are read, in subgraphs too."""
    for node in graph.node:
        for k, value in enumerate(node.input):
            if value in renamed:
                node.input[k] = renamed[value]
        for attribute in node.attribute:
            for sub in [attribute.g, *attribute.graphs] if attribute.type in (5, 10) else []:
                rename_reads(sub, renamed)
    for info in graph.value_info:
        if info.name in renamed:
            info.name = renamed[info.name]


def mark_modules(graph, modules):
    """Writes the module path of the weights that a node reads into its metadata, as `namespace`; drops what the exporter
    wrote there (source lines of the machine that exported)."""
    for node in graph.node:
        paths = {modules[v] for v in node.input if v in modules}
        del node.metadata_props[:]
        node.doc_string = ""
        if len(paths) == 1 and (path := paths.pop()):
            node.metadata_props.add(key="namespace", value=path)
