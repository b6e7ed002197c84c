"""PyTorch: a module and its state dict -> teacher.onnx.

The factory returns a `torch.nn.Module`, or a pair (module, inputs) where `inputs` maps the names of the forward's
arguments, in order, to example tensors with the batch first. Without inputs they are made from the card: the sample from
`shape`, time as [B] f32, conditions from their kind.
"""

import importlib
import inspect
import os
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch

from . import ConversionError, card as cards

PROTO_LIMIT = 2_000_000_000  # bytes of weights above which they go into a file beside the graph


def build(spec):
    """`package.module:factory` -> (module, example inputs or None)."""
    name, colon, attribute = spec.partition(":")
    if not colon or not name or not attribute:
        raise ConversionError(f"{spec!r}: write the factory as module:function, for instance my_model:build")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(name), attribute)
    except ModuleNotFoundError as error:
        raise ConversionError(f"{spec!r}: {error}; run from the folder that holds the module, or set PYTHONPATH") from error
    except AttributeError as error:
        raise ConversionError(f"{spec!r}: {error}") from error
    made = factory()
    module, inputs = made if isinstance(made, tuple) else (made, None)
    if not isinstance(module, torch.nn.Module):
        raise ConversionError(f"{spec!r} returned {type(module).__name__}, not a torch.nn.Module")
    return module.eval(), inputs


def read_state(path):
    """State dict from .safetensors or a torch file (weights only); one level of nesting (`state_dict`, `model`, `ema`) is opened."""
    path = Path(path)
    if not path.is_file():
        raise ConversionError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConversionError(f"{path}: not a torch file of plain tensors: {error}") from error
    for key in ("state_dict", "model", "ema"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ConversionError(f"{path}: holds no state dict (names to tensors)")
    return state


def load_state(module, path):
    """Loads strictly: every key of the module, and no other, with its shape."""
    state, own = read_state(path), module.state_dict()
    problems = []
    missing = [key for key in own if key not in state]
    surplus = [key for key in state if key not in own]
    wrong = [
        f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    for title, keys in (("missing", missing), ("surplus", surplus), ("of another shape", wrong)):
        if keys:
            problems.append(f"  {title} ({len(keys)}): {', '.join(keys)}")
    if problems:
        raise ConversionError(f"{path} does not fit the module:\n" + "\n".join(problems))
    broken = [key for key, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if broken:
        raise ConversionError(f"{path}: NaN or infinite values in {', '.join(broken)}")
    module.load_state_dict(state, strict=True)


def example_inputs(module, card, batch):
    """Named example tensors for the arguments of `module.forward`, in order, from the card; values fit to compare with."""
    generator = torch.Generator().manual_seed(batch)
    shape = card["shape"] if card.get("layout", "nchw") == "nchw" else [*card["shape"][1:], card["shape"][0]]
    low, high = {
        "sigma": (0.05, 5.0), "ln-sigma-4": (-0.7, 0.4), "step": (1.0, 900.0), "unit": (0.02, 0.98), "thousand": (20.0, 980.0),
    }[card["time_unit"]]  # fmt: skip
    time = torch.linspace(low, high, batch) if batch > 1 else torch.tensor([(low + high) / 2])
    inputs = {}
    for name, parameter in inspect.signature(module.forward).parameters.items():
        kind = card.get(f"conditions.{name}.kind")
        if name == card["sample"]:
            value = torch.randn(batch, *shape, generator=generator)
        elif name == card["time"]:
            value = time.round() if card["time_unit"] == "step" else time
        elif kind == "class-index":
            value = torch.arange(batch) % int(card[f"conditions.{name}.classes"])
        elif kind == "one-hot":
            classes = int(card[f"conditions.{name}.classes"])
            value = torch.nn.functional.one_hot(torch.arange(batch) % classes, classes).float()
        elif kind == "embedding":
            value = torch.randn(batch, *card[f"conditions.{name}.shape"], generator=generator)
        elif f"constants.{name}" in card:
            value = torch.full((batch,), card[f"constants.{name}"])
        elif parameter.default is not inspect.Parameter.empty:
            continue
        else:
            raise ConversionError(
                f"argument {name!r} of the module's forward is not in the card; name it as sample, time, "
                f"conditions.{name} or constants.{name}, or let the factory return (module, inputs)"
            )
        inputs[name] = value
    return inputs


def repeat(inputs, batch):
    """Example inputs of another batch size: rows taken round."""
    return {name: value[torch.arange(batch) % len(value)] for name, value in inputs.items()}


def outputs_of(module, inputs):
    with torch.no_grad():
        made = module(**inputs)
    made = list(made.values()) if isinstance(made, dict) else made
    return [value.numpy() for value in (made if isinstance(made, (tuple, list)) else (made,))]


def export(module, inputs, output_names, path, opset):
    """Writes the graph by the dynamo exporter with a dynamic batch."""
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    size = sum(value.nbytes for value in module.state_dict().values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (), str(path), kwargs=inputs, dynamo=True, opset_version=opset, input_names=list(inputs),
            output_names=output_names, dynamic_shapes={name: {0: batch} for name in inputs},
            external_data=size > PROTO_LIMIT, verbose=False,
        )  # fmt: skip


def compare(path, module, inputs, tolerance):
    """Largest difference between ONNX Runtime and the module, relative to the output's standard deviation."""
    runner = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    ours = runner.run(None, {name: value.numpy() for name, value in inputs.items()})
    worst = 0.0
    for name, mine, native in zip([o.name for o in runner.get_outputs()], ours, outputs_of(module, inputs)):
        if mine.shape != native.shape:
            raise ConversionError(f"output {name!r}: ONNX Runtime gives shape {mine.shape}, torch {native.shape}")
        if not np.isfinite(native).all():
            raise ConversionError(f"output {name!r}: the module itself gives NaN or infinite values")
        worst = max(worst, float(np.abs(mine.astype(np.float64) - native).max() / max(native.std(), 1e-12)))
    if not worst <= tolerance:
        raise ConversionError(
            f"ONNX Runtime differs from torch by {worst:.2e} of the output's standard deviation (allowed {tolerance:.0e}); "
            "nothing was written. Try another --opset."
        )
    return worst


def convert(spec, out, pairs=(), card_file=None, state=None, opset=20, tolerance=1e-4):
    """The whole route; returns a dict of what was done. Nothing is left at `out` unless every check passed."""
    out = Path(out)
    card = cards.parse(pairs, card_file)
    module, inputs = build(spec)
    if state is not None:
        load_state(module, state)
    # the names of the graph's inputs are the forward's arguments; check the card before the slow part
    arguments = list(inputs) if inputs is not None else None
    card.setdefault("output", "output")
    if arguments is None:
        cards.check(card, [n for n in inspect.signature(module.forward).parameters if names_input(card, n)], [card["output"]])
        inputs = example_inputs(module, card, 3)
    else:
        cards.check(card, arguments, [card["output"]])
        inputs = repeat(inputs, 3)
    count = len(outputs_of(module, inputs))
    names = [card["output"]] + [f"output_{k}" for k in range(1, count)]
    folder = out.parent
    if not folder.is_dir():
        raise ConversionError(f"{folder}: no such folder")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".convert-") as scratch:
        path = Path(scratch) / out.name
        export(module, inputs, names, path, opset)
        model = onnx.load(path, load_external_data=False)
        for node in model.graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
        del model.metadata_props[:]
        for key, value in cards.metadata(card).items():
            model.metadata_props.add(key=key, value=value)
        path.write_bytes(model.SerializeToString())
        onnx.checker.check_model(str(path), full_check=True)
        worst = 0.0
        for batch in (1, 2, 5):
            fresh = example_inputs(module, card, batch) if arguments is None else repeat(inputs, batch)
            worst = max(worst, compare(path, module, fresh, tolerance))
        files = sorted(Path(scratch).iterdir(), key=lambda file: file == path)  # the graph last
        for file in files:
            os.replace(file, folder / file.name)
    return {
        "out": str(out),
        "parameters": sum(p.numel() for p in module.parameters()),
        "inputs": list(inputs),
        "outputs": names,
        "opset": opset,
        "max_relative_difference": worst,
        "card": card,
    }


def names_input(card, name):
    """Whether the card names `name` as an input of the graph (an argument it leaves out keeps its default)."""
    prefixes = (f"conditions.{name}.", f"constants.{name}")
    return name in (card.get("sample"), card.get("time")) or any(key.startswith(prefixes) for key in card)
