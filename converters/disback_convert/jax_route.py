"""JAX and Flax: an NNX module, a Linen module with its variables, or a function of parameters -> teacher.onnx by jax2onnx.

The factory returns one of
  an NNX module,
  a Linen module, or (module, variables),
  (function, parameters) with function(parameters, sample, time, ...).
Layouts are as the network has them: Flax's convolutions are NHWC, which the card says (`layout=nhwc`).
"""

import inspect
import logging
from importlib.metadata import version

import jax
import jax2onnx
import numpy as np
from flax import linen, nnx

from . import ConversionError, card as cards, factory, trees
from .examples import names_input, rows
from .finish import Network
from .weights import Weight

INFERENCE = {"deterministic": True, "train": False, "training": False, "is_training": False, "use_running_average": True}


class Nnx:
    """An NNX module; every variable that is no nnx.Param is a buffer."""

    def __init__(self, module):
        module.eval()
        self.module, self.signature = module, inspect.signature(module.__call__)
        self.variables = {}
        for path, variable in nnx.to_flat_state(nnx.state(module)):
            # keys of random generators (dropout) are no weights
            if not isinstance(variable, nnx.RngState):
                self.variables[".".join(map(str, path))] = variable

    def tensors(self):
        return {name: self.tensor(name) for name in self.variables}

    def tensor(self, name):
        return np.asarray(self.variables[name][...])

    def put(self, values):
        state = nnx.state(self.module)
        for path, variable in nnx.to_flat_state(state):
            name = ".".join(map(str, path))
            if name in values:
                variable[...] = jax.numpy.asarray(values[name])
        nnx.update(self.module, state)

    def trained(self, name):
        return isinstance(self.variables[name], nnx.Param)

    def function(self, names):
        inference = {key: value for key, value in INFERENCE.items() if key in self.signature.parameters}
        return lambda *values: self.module(**dict(zip(names, values)), **inference)


class Tree:
    """Variables in nested tables: a Linen module's, or the parameters of a function."""

    def __init__(self, apply, signature, variables, inference):
        self.apply, self.signature, self.variables, self.inference = apply, signature, unfreeze(variables), inference
        if isinstance(self.variables.get("params"), dict):
            self.short = lambda name: name.removeprefix("params.")
            self.trained = lambda name: not any(name.startswith(f"{key}.") for key in self.variables if key != "params")
        else:
            self.short = lambda name: name
            self.trained = lambda name: True
        self.leaves = {self.short(name): where for name, where in leaves(self.variables)}  # name -> (table, key)

    def tensors(self):
        return {name: self.tensor(name) for name in self.leaves}

    def tensor(self, name):
        tree, key = self.leaves[name]
        return np.asarray(tree[key])

    def put(self, values):
        for name, value in values.items():
            tree, key = self.leaves[name]
            tree[key] = jax.numpy.asarray(value)

    def function(self, names):
        return lambda *values: self.apply(self.variables, *values, **self.inference)


def leaves(tree, prefix=""):
    """(dotted name, (table, key)) of everything in nested tables."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", (tree, key)


def unfreeze(tree):
    """Plain nested dicts of any mapping."""
    return {key: unfreeze(value) if hasattr(value, "items") else value for key, value in tree.items()}


def build(spec, card):
    """What the factory returned, as one of the two."""
    made = factory.call(spec, factory.attribute(spec))
    thing, variables = made if isinstance(made, tuple) else (made, None)
    if isinstance(thing, nnx.Module):
        return Nnx(thing)
    if isinstance(thing, linen.Module):
        signature = inspect.signature(thing.__call__)
        inference = {key: value for key, value in INFERENCE.items() if key in signature.parameters}
        if variables is None:
            names = [name for name in signature.parameters if names_input(card, name)]
            variables = thing.init(jax.random.key(0), *rows(card, names, 2).values(), **inference)
        return Tree(thing.apply, signature, variables, inference)
    if callable(thing) and variables is not None and hasattr(variables, "items"):
        signature = inspect.signature(thing)
        signature = signature.replace(parameters=list(signature.parameters.values())[1:])
        return Tree(thing, signature, variables, {})
    raise ConversionError(
        f"{spec!r} returned {type(thing).__name__}; it returns an NNX module, a Linen module or (module, variables), "
        "or (function, parameters)"
    )


def prepare(spec, weights=None, pairs=(), card_file=None):
    """The network that the factory, the weights and the card make."""
    card = cards.parse(pairs, card_file)
    card.setdefault("output", "output")
    cards.need(card)
    made = build(spec, card)
    names = [name for name in made.signature.parameters if names_input(card, name)]
    cards.check(card, names, [card["output"]])
    for name, parameter in made.signature.parameters.items():
        if name not in names and name not in INFERENCE and parameter.default is inspect.Parameter.empty and parameter.kind not in (2, 4):
            raise ConversionError(
                f"argument {name!r} of the network is not in the card; name it as sample, time, conditions.{name} or constants.{name}"
            )
    if weights is not None:
        own, given = made.tensors(), trees.read(weights)
        given = {name.removeprefix("params."): value for name, value in given.items()}
        factory.fit(weights, {name: value.shape for name, value in own.items()}, {name: value.shape for name, value in given.items()})
        made.put({name: value.astype(own[name].dtype) for name, value in given.items()})
    broken = [name for name, value in made.tensors().items() if not np.isfinite(value).all()]
    if broken:
        raise ConversionError(f"{weights or spec}: NaN or infinite values in {', '.join(broken)}")
    return network(made, card, names)


def network(made, card, names):
    """A Flax network as a network to be converted."""
    # JAX has no int64 unless asked: class indices are int32.
    dtypes = {name: np.int32 for name in names if card.get(f"conditions.{name}.kind") == "class-index"}
    found = made.tensors()
    owners, weights, compiled = {}, [], {}

    def put(name, array):
        made.put({name: array})
        compiled.clear()  # the compiled network holds its weights as constants

    for name, value in found.items():
        if value.dtype.kind != "f":
            continue
        weights.append(
            Weight(name, lambda name=name: made.tensor(name), lambda array, name=name: put(name, array), made.trained(name))
        )
        owners[name] = weights[-1]

    def native(values):
        if "run" not in compiled:
            compiled["run"] = jax.jit(made.function(names))
        results = compiled["run"](*values.values())
        results = results if isinstance(results, (tuple, list)) else [results]
        done.outputs = [card["output"], *(f"output_{k}" for k in range(1, len(results)))]
        return [np.asarray(value) for value in results]

    def export(path, values, opset):
        specs = [jax.ShapeDtypeStruct(("batch", *value.shape[1:]), value.dtype) for value in values.values()]
        for noisy in ("jax2onnx", "onnx_ir"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        try:
            jax2onnx.to_onnx(
                made.function(names), specs, model_name="teacher", opset=opset, return_mode="file", output_path=str(path),
                input_names=list(values), output_names=done.outputs,
            )  # fmt: skip
        except OSError:
            raise
        except Exception as error:
            raise ConversionError(f"jax2onnx refuses this network: {type(error).__name__}: {str(error).strip().splitlines()[0]}\n{advice(error)}") from error

    done = Network(
        card=card,
        framework=f"jax {jax.__version__}, flax {version('flax')}",
        exporter=f"jax2onnx {version('jax2onnx')}",
        inputs=names,
        outputs=[card["output"]],
        export=export,
        native=native,
        weights=weights,
        dtypes=dtypes,
    )
    return done


def advice(error):
    """What to do about the exporter's commonest refusals."""
    text = str(error)
    if "InconclusiveDimensionOperation" in type(error).__name__ or "symbolic" in text:
        return "the forward computes with the batch size: reshape with -1 for the batch, and keep it the first axis"
    if "No plugin" in text or "not registered" in text or "Unsupported" in text:
        return "a primitive without an ONNX form: write that part with other jax.numpy operations"
    return "try another --opset, or write the part that it names with plainer jax.numpy operations"
