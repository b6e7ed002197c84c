"""State dicts: read without running code, loaded key by key or not at all."""

from pathlib import Path

import torch

from .. import ConversionError
from ..factory import fit


def read_state(path):
    """State dict from .safetensors or a torch file (weights only); one level of nesting (`state_dict`, `model`, `ema`) is opened."""
    path = Path(path)
    if not path.is_file():
        raise ConversionError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except Exception as error:
            raise ConversionError(f"{path}: not a safetensors file: {error}") from error
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


def finite(source, state):
    """Refuses weights that are not numbers."""
    broken = [key for key, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if broken:
        raise ConversionError(f"{source}: NaN or infinite values in {', '.join(broken)}")


def load_state(module, path):
    """Loads strictly: every key of the module, and no other, with its shape."""
    state, own = read_state(path), module.state_dict()
    fit(path, {key: value.shape for key, value in own.items()}, {key: value.shape for key, value in state.items()})
    finite(path, state)
    module.load_state_dict(state, strict=True)
