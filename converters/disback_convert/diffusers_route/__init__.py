"""diffusers: a pipeline or network folder -> teacher.onnx, and on request its VAE decoder, text encoders and embeddings."""

from pathlib import Path

import numpy as np

from .. import ConversionError, card as cards
from .adapters import ADAPTERS
from .folder import Folder
from .scheduler import card_of

TOKENS = {"PixArtTransformer2DModel": 120, "SD3Transformer2DModel": 333, "FluxTransformer2DModel": 512}


def size_of(text):
    """`64` or `64x96` -> [height, width]."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) for part in parts):
        raise ConversionError(f"--size {text}: write it as HEIGHTxWIDTH in latent pixels, for instance 64x64")
    return [int(part) for part in (parts * 2)[:2]]


def prepare(path, part=None, size=None, tokens=None, null=None, pairs=(), card_file=None):
    """The network of a folder, with its card."""
    import diffusers

    from ..torch_route.export import network

    folder = Folder(path, part)
    # What the user says is checked before gigabytes are read.
    given = cards.parse(pairs, card_file)
    size = size_of(size) if size else None
    wrapped = ADAPTERS[folder.kind](folder.load(), size, tokens or TOKENS.get(folder.kind, 77), null).eval()
    card = wrapped.card()
    config = folder.scheduler()
    if config is not None:
        try:
            card |= card_of(config, wrapped.image_tokens())
        except ConversionError:
            if "schedule.kind" not in given:
                raise
    elif "schedule.kind" not in given:
        raise ConversionError(f"{path}: no scheduler/scheduler_config.json; give schedule.*, prediction and time_unit by --card")
    if wrapped.time_unit is not None:
        card["time_unit"] = wrapped.time_unit
    vae = folder.vae()
    if vae is None:
        card["range"] = [-1.0, 1.0]
    else:
        card["latent_scale"] = float(vae.get("scaling_factor") or 1.0)
    card = merged(card, given)
    names = [key.split(".")[1] for key in card if key.startswith("conditions.") and key.endswith(".kind")]
    names = [card["sample"], card["time"], *(name for name in names if name not in cards.joined(card))]
    names += [key.split(".")[1] for key in card if key.startswith("constants.")]
    cards.check(card, names, [card["output"]])
    made = network(wrapped, card, names)
    if "encoder_attention_mask" in names:
        made.special["encoder_attention_mask"] = first_half
    made.framework = f"diffusers {diffusers.__version__} ({made.framework})"
    for weight in made.weights:
        weight.name = weight.name.removeprefix("net.")
        weight.aliases = [alias.removeprefix("net.") for alias in weight.aliases]
    return made


def first_half(shape):
    """A mask that lets the first half of the tokens through."""
    return np.broadcast_to(np.arange(shape[1]) < (shape[1] + 1) // 2, shape)


def merged(card, given):
    """The user's entries over the configuration's; another kind of schedule takes the old one's numbers with it."""
    if given.get("schedule.kind", card.get("schedule.kind")) != card.get("schedule.kind"):
        card = {key: value for key, value in card.items() if not key.startswith("schedule.")}
    return card | given


def beside(out, what):
    """`teacher.onnx`, `vae` -> `teacher.vae.onnx`."""
    return Path(out).with_suffix(f".{what}.onnx")
