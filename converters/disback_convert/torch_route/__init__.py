"""PyTorch: a module and its state dict -> teacher.onnx, by the dynamo exporter.

The factory returns a `torch.nn.Module`, or a pair (module, inputs) where `inputs` maps the names of the forward's
arguments, in order, to example tensors with the batch first. Without inputs they are made from the card.
"""

import inspect

import torch

from .. import ConversionError, card as cards, factory
from ..examples import names_input
from .export import network
from .state import load_state, read_state

__all__ = ["build", "convert_inputs", "load_state", "network", "prepare", "read_state"]


def build(spec, code=None):
    """`package.module:factory` -> (module, example inputs or None)."""
    made = factory.call(spec, factory.attribute(spec, code=code), code)
    module, inputs = made if isinstance(made, tuple) else (made, None)
    if not isinstance(module, torch.nn.Module):
        raise ConversionError(f"{spec!r} returned {type(module).__name__}, not a torch.nn.Module")
    return module.eval(), inputs


def convert_inputs(inputs):
    """Example tensors as arrays."""
    return {name: value.detach().cpu().numpy() for name, value in inputs.items()}


def prepare(spec, pairs=(), card_file=None, state=None):
    """The network that the factory, the weights and the card make."""
    card = cards.parse(pairs, card_file)
    module, inputs = build(spec)
    if state is not None:
        load_state(module, state)
    card.setdefault("output", "output")
    names = list(inputs) if inputs is not None else [n for n in inspect.signature(module.forward).parameters if names_input(card, n)]
    cards.check(card, names, [card["output"]])
    if inputs is None:
        for name, parameter in inspect.signature(module.forward).parameters.items():
            if name not in names and parameter.default is inspect.Parameter.empty and parameter.kind not in (2, 4):
                raise ConversionError(
                    f"argument {name!r} of the module's forward is not in the card; name it as sample, time, "
                    f"conditions.{name} or constants.{name}, or let the factory return (module, inputs)"
                )
    return network(module, card, names, examples=None if inputs is None else convert_inputs(inputs))
