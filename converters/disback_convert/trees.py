"""Weights of frameworks without a file format of their own: npz, safetensors, msgpack and Orbax, as {dotted name: array}."""

from pathlib import Path

import numpy as np

from . import ConversionError


def flatten(tree, prefix=""):
    """Nested tables -> {dotted name: array}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = np.asarray(value)
    return flat


def read(path):
    """A file or an Orbax folder."""
    path = Path(path)
    if not path.exists():
        raise ConversionError(f"{path}: no such file")
    try:
        if path.is_dir():
            import orbax.checkpoint

            return flatten(orbax.checkpoint.PyTreeCheckpointer().restore(path.resolve()))
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                return {name: arrays[name] for name in arrays.files}
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return load_file(path)
        if path.suffix in (".msgpack", ".flax"):
            import flax.serialization

            return flatten(flax.serialization.msgpack_restore(path.read_bytes()))
    except ImportError:
        raise
    except Exception as error:
        raise ConversionError(f"{path}: does not read as a checkpoint: {type(error).__name__}: {error}") from error
    raise ConversionError(f"{path}: weights are .npz, .safetensors, .msgpack or an Orbax folder")
