"""The teacher card: what an ONNX graph does not say about the diffusion model in it.

Keys are dotted (`schedule.kind`); each is written into the model's metadata_props as `disback.<key>` with its TOML value
as text. `check` refuses what disback itself would refuse, so that a conversion fails early and not when distilling.
"""

import difflib
import os
import tomllib

from . import ConversionError

PREFIX = "disback."
PREDICTIONS = ("denoised", "edm-raw", "epsilon", "v", "flow", "trigflow", "scaled-score", "consistency")
TIME_UNITS = ("sigma", "ln-sigma-4", "ln-sigma-250", "ln-sigma-half", "radians", "step", "unit", "thousand")
SCHEDULES = ("edm", "vp", "flow", "trigflow")
CONDITIONS = ("class-index", "one-hot", "embedding")
LAYOUTS = ("channels-first", "nchw", "channels-last", "frames-first", "none", "nhwc")
MODALITIES = ("image", "volume", "video", "sequence", "audio", "points", "vector")
# Dimensions of a sample that a layout is for, where it is not for any number.
RANKS = {"nhwc": (3, "[channels, height, width] of one image"), "frames-first": (4, "[frames, channels, height, width] of one video")}
DIRECTIONS = ("data-to-noise", "noise-to-data")

PLAIN = {
    "sample", "time", "output", "prediction", "time_unit", "shape", "layout", "modality", "sample_rate", "range", "sigma_data",
    "latent_scale", "dataset", "provenance", "concat",
}  # fmt: skip
SCHEDULE = {"kind", "sigma_min", "sigma_max", "rho", "betas", "beta_start", "beta_end", "steps", "table", "shift", "direction", "scale"}
CONDITION = {"kind", "classes", "null", "shape"}
REQUIRED = ("sample", "time", "output", "prediction", "time_unit", "shape", "schedule.kind")


def value_of(text):
    """The value that a metadata text stands for: TOML where it parses as such, else the plain string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def text_of(value):
    """A value as metadata text; strings stay unquoted."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(f'"{item}"' if isinstance(item, str) else text_of(item) for item in value) + "]"
    return repr(value)


def flatten(table, prefix=""):
    """Nested tables -> {dotted key: value}."""
    flat = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def parse(pairs=(), file=None):
    """Card from a TOML file and `key=value` pairs (which win) -> {dotted key: value}."""
    card = {}
    if file is not None:
        try:
            with open(file, "rb") as handle:
                card = flatten(tomllib.load(handle))
        except OSError as error:
            raise ConversionError(f"card file {file}: {error.strerror or error}") from error
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConversionError(f"card file {file}: not TOML: {error}") from error
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise ConversionError(f"--card {pair}: write it as key=value, for instance --card prediction=epsilon")
        card[key.strip().removeprefix(PREFIX)] = value_of(text.strip())
    return card


def known(key):
    """Whether `key` is one that a card may have."""
    head, _, rest = key.partition(".")
    if head == "schedule":
        return rest in SCHEDULE
    if head == "conditions":
        name, _, leaf = rest.rpartition(".")
        return bool(name) and leaf in CONDITION
    if head == "constants":
        return bool(rest)
    return key in PLAIN


def nearest(key):
    """The known key most like `key`, or None."""
    names = PLAIN | {f"schedule.{leaf}" for leaf in SCHEDULE}
    head, _, rest = key.partition(".")
    if head == "conditions":
        names = {f"conditions.{rest.rpartition('.')[0] or rest}.{leaf}" for leaf in CONDITION}
    found = difflib.get_close_matches(key, sorted(names), 1, 0.0)
    return found[0] if found else None


def one_of(card, key, allowed):
    if key in card and card[key] not in allowed:
        raise ConversionError(f"card: {key} = {card[key]!r}; it is one of {', '.join(allowed)}")


def need(card):
    """Refuses unknown and missing keys and words that no key takes."""
    for key in card:
        if not known(key):
            raise ConversionError(f"card: unknown key {key!r}; did you mean {nearest(key)!r}?")
    missing = [key for key in REQUIRED if key not in card]
    if missing:
        raise ConversionError(f"card: {', '.join(missing)} missing; give each by --card key=value or in a --card-file")
    one_of(card, "prediction", PREDICTIONS)
    one_of(card, "time_unit", TIME_UNITS)
    one_of(card, "layout", LAYOUTS)
    one_of(card, "modality", MODALITIES)
    one_of(card, "schedule.kind", SCHEDULES)
    one_of(card, "schedule.direction", DIRECTIONS)
    shape = card["shape"]
    rank, meant = RANKS.get(card.get("layout"), (None, "the dimensions of one sample without the batch"))
    fits = isinstance(shape, list) and len(shape) == (rank or max(len(shape), 1))
    if not fits or not all(type(n) is int and n > 0 for n in shape):
        raise ConversionError(f"card: shape = {shape!r}; it is {meant}")
    rate = card.get("sample_rate", 1)
    if type(rate) is not int or rate < 1:
        raise ConversionError(f"card: sample_rate = {rate!r}; it is a whole number of Hz")


def joined(card):
    """Conditions that are joined to the sample's channels, so that the graph takes them in the sample's input."""
    return [name for name in card.get("concat", []) if name != card["sample"]]


def check_concat(card):
    concat = card.get("concat", [card["sample"]])
    if not isinstance(concat, list) or concat.count(card["sample"]) != 1 or len(set(map(str, concat))) != len(concat):
        raise ConversionError(f"card: concat = {concat!r}; it lists {card['sample']!r}, for the sample, and the conditions that are joined to it")
    for name in joined(card):
        if card.get(f"conditions.{name}.kind") != "embedding" or len(card.get(f"conditions.{name}.shape", [])) != len(card["shape"]):
            raise ConversionError(f"card: concat names {name!r}; give conditions.{name}.kind=embedding and conditions.{name}.shape, as long as shape")


def check(card, inputs, outputs):
    """Refuses unknown and missing keys, bad values, and names that the graph does not have."""
    need(card)
    conditions = {key.split(".", 1)[1].rpartition(".")[0] for key in card if key.startswith("conditions.")}
    for name in conditions:
        if f"conditions.{name}.kind" not in card:
            raise ConversionError(f"card: conditions.{name}.kind missing; it is one of {', '.join(CONDITIONS)}")
        one_of(card, f"conditions.{name}.kind", CONDITIONS)
    check_concat(card)
    constants = {key.split(".", 1)[1] for key in card if key.startswith("constants.")}
    named = [card["sample"], card["time"], *sorted(conditions.difference(joined(card))), *sorted(constants)]
    for name in named:
        if name not in inputs:
            raise ConversionError(f"card: the graph has no input {name!r}; its inputs are {', '.join(inputs)}")
        if named.count(name) > 1:
            raise ConversionError(f"card: input {name!r} is named twice")
    unnamed = [name for name in inputs if name not in named]
    if unnamed:
        raise ConversionError(
            f"card: nothing said about the inputs {', '.join(unnamed)}; each is a condition (conditions.NAME.kind) "
            "or a constant (constants.NAME)"
        )
    if card["output"] not in outputs:
        raise ConversionError(f"card: the graph has no output {card['output']!r}; its outputs are {', '.join(outputs)}")


def metadata(card):
    """{dotted key: value} -> metadata_props entries."""
    return {PREFIX + key: text_of(value) for key, value in card.items()}


def write_whole(path, write):
    """A file that is there complete or not at all; `write` gets a binary handle."""
    scratch = path.with_name(f".{path.name}.part")
    try:
        with open(scratch, "wb") as handle:
            write(handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise ConversionError(f"cannot write {path}: {error.strerror or error}; nothing was written") from error
