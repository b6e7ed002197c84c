"""The framework's own names for the tensors of a graph.

Exporters rename weights, transpose them, reshape them and merge those whose bytes are equal. A weight is found again by its
values. Weights whose bytes equal another's, or which are the same number throughout, are given values of their own while
the exporter runs, so that nothing is merged that the framework keeps apart; the true values come back afterwards.
"""

import hashlib
import itertools
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Callable

import numpy as np
import onnx
from onnx import external_data_helper, helper, numpy_helper

FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}
ORDERS = {2: [(1, 0)], 3: [(2, 1, 0)], 4: [(3, 2, 0, 1), (2, 3, 1, 0), (1, 0, 2, 3), (0, 2, 3, 1), (0, 3, 1, 2)]}


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


def digest(array):
    """Hash of an array's values in row-major order; shapes play no part, since exporters reshape."""
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=16).digest(), array.size, array.dtype.str


def is_plain(array):
    """Whether all values are one number."""
    return array.size > 0 and bool((array == array.reshape(-1)[0]).all())


@contextmanager
def told_apart(weights):
    """Within this, no two weights have equal bytes. Yields {name: (true values, shown values)} of those that were changed."""
    seen, changed = {}, {}
    random = np.random.default_rng(0)
    for weight in weights:
        value = np.asarray(weight.get())
        if value.dtype.kind != "f" or not weight.trained:
            continue
        key = digest(value)
        if key in seen or is_plain(value):
            shown = (value + 0.01 * random.standard_normal(value.shape)).astype(value.dtype)
            changed[weight.name] = (value.copy(), shown)
            weight.put(shown)
        seen[key] = weight.name
    try:
        yield changed
    finally:
        for weight in weights:
            if weight.name in changed:
                weight.put(changed[weight.name][0])


def constants(model, folder):
    """Yields every float initializer and Constant node of the main graph: (tensor, node or None, values)."""
    nodes = [(n.attribute[0].t, n) for n in model.graph.node if n.op_type == "Constant" and n.attribute[0].name == "value"]
    for tensor, node in itertools.chain(((t, None) for t in model.graph.initializer), nodes):
        if tensor.data_type not in FLOATS:
            continue
        loaded = tensor
        if external_data_helper.uses_external_data(tensor):
            loaded = onnx.TensorProto()
            loaded.CopyFrom(tensor)
            external_data_helper.load_external_data_for_tensor(loaded, str(folder))
            loaded.data_location = onnx.TensorProto.DEFAULT
            del loaded.external_data[:]
        yield tensor, node, numpy_helper.to_array(loaded)


@dataclass
class Named:
    """What [`name`] found."""

    parameters: list  # initializers that are trained, by their new names
    tied: list  # groups of names of one tensor; the first is in the graph
    lost: list  # framework weights that are nowhere in the graph: unused, or folded into others
    unknown: list  # constants that are no weight of the framework, with more than one distinct value
    modules: dict  # initializer -> module path


def name(model, folder, weights, changed):
    """Gives the graph's tensors the framework's names, and the true values where `changed` has them."""
    index = {}
    for weight in weights:
        sought = changed[weight.name][1] if weight.name in changed else np.asarray(weight.get())
        for order in [tuple(range(sought.ndim)), *ORDERS.get(sought.ndim, [])]:
            fitting = index.setdefault(digest(sought.transpose(order)), [])
            if all(other is not weight for other, *_ in fitting):
                fitting.append((weight, sought.shape, order))
    renamed, unknown, moved, first, derived = {}, [], [], {}, []
    taken = {v for n in model.graph.node for v in (*n.input, *n.output)} | {i.name for i in model.graph.input}
    for tensor, node, value in constants(model, folder):
        fitting = index.get(digest(value), [])
        if not fitting:
            if value.size > 1 and not is_plain(value):
                unknown.append(tensor.name or node.output[0])
            continue
        weight, whole, order = next((hit for hit in fitting if hit[0].name not in first), fitting[0])
        old = node.output[0] if node is not None else tensor.name
        if weight.name in first and is_plain(value):
            continue  # ones or zeros of the graph's own
        if weight.name in first and len(fitting) == 1:
            # The exporter stored one weight twice, in another form: the second is computed from the first.
            derived.append((tensor, node, old, *first[weight.name], (whole, order, value.shape)))
            continue
        new, k = weight.name, 1
        while new in renamed.values() or (new in taken and new != old):
            k += 1
            new = f"{weight.name}:{k}"
        weight.found.append(new)
        first.setdefault(weight.name, (new, (whole, order, value.shape)))
        renamed[old] = new
        if weight.name in changed:
            true = np.ascontiguousarray(changed[weight.name][0].transpose(order)).reshape(value.shape)
            tensor.CopyFrom(numpy_helper.from_array(true.astype(value.dtype), new))
        if node is not None:
            moved.append((node, new))
        tensor.name = new
    for node, new in moved:
        model.graph.initializer.add().CopyFrom(node.attribute[0].t)
        model.graph.initializer[-1].name = new
        model.graph.node.remove(node)
    for tensor, node, old, new, stored, wanted in derived:
        if node is None:
            model.graph.initializer.remove(tensor)
        else:
            model.graph.node.remove(node)
        derive(model.graph, new, stored, old, wanted, renamed)
    rename_reads(model.graph, renamed)
    modules = {new: weight.module for weight in weights for new in weight.found}
    mark_modules(model.graph, modules)
    return Named(
        parameters=[new for weight in weights if weight.trained for new in weight.found],
        tied=[[weight.found[0], *weight.aliases] for weight in weights if weight.aliases and weight.found],
        lost=[weight.name for weight in weights if weight.trained and not weight.found],
        unknown=unknown,
        modules=modules,
    )


def derive(graph, source, stored, target, wanted, renamed):
    """Reads or nodes that make `target` of the initializer `source`, the same weight. `stored` and `wanted`: the framework's
    shape, the order of its axes, the shape in the file."""
    (whole, order, shape), (_, wanted_order, wanted_shape) = stored, wanted
    steps, here = [], tuple(shape)
    if tuple(order) != tuple(wanted_order):
        ordered = tuple(whole[axis] for axis in order)
        steps += [("Reshape", ordered)] if here != ordered else []
        steps.append(("Transpose", [order.index(axis) for axis in wanted_order]))
        here = tuple(whole[axis] for axis in wanted_order)
    steps += [("Reshape", wanted_shape)] if here != tuple(wanted_shape) else []
    if not steps:
        renamed[target] = source
    for k, (op, numbers) in enumerate(steps):
        made = target if k == len(steps) - 1 else f"{target}/{k}"
        if op == "Transpose":
            node = helper.make_node(op, [source], [made], perm=numbers)
        else:
            graph.initializer.append(numpy_helper.from_array(np.array(numbers, np.int64), f"{made}/shape"))
            node = helper.make_node(op, [source, f"{made}/shape"], [made])
        graph.node.insert(k, node)
        source = made


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
