"""Networks in EDM's form: `net(x, sigma, class_labels)` with `net.model(x, c_noise, class_labels, augment_labels)` inside.

The code is the user's own checkout (`--code`): the pickle names its classes. Preconditioning stays inside the graph (a
denoiser of sigma), or outside (`--raw`: the network F of ln(sigma) / 4). Labels are one-hot; augment labels are zero.
"""

import json
import pickle
from pathlib import Path

import torch

from .. import ConversionError, card as cards, factory
from .export import network
from .state import load_state


class Inside(torch.nn.Module):
    """x [B,C,H,W], sigma [B], class_labels [B,classes] -> denoised."""

    def __init__(self, net, augment):
        super().__init__()
        self.net, self.augment = net, augment

    def forward(self, x, sigma, class_labels=None):
        return self.net(x, sigma, class_labels, force_fp32=True, **augment_labels(x, self.augment))


class Raw(torch.nn.Module):
    """x = c_in(sigma) * noisy [B,C,H,W], c_noise = ln(sigma) / 4 [B], class_labels [B,classes] -> F."""

    def __init__(self, net, augment):
        super().__init__()
        self.net, self.augment = net, augment

    def forward(self, x, c_noise, class_labels=None):
        return self.net.model(x, c_noise, class_labels=class_labels, **augment_labels(x, self.augment))


def augment_labels(x, count):
    """The label that says "not distorted", where the network takes one."""
    return {"augment_labels": torch.zeros(1, count, dtype=x.dtype, device=x.device).expand(x.shape[0], -1)} if count else {}


def augment_dim(net):
    """Width of the augment labels, 0 where the network has none."""
    given = getattr(getattr(net, "model", net), "map_augment", None)
    return next((p.shape[1] for p in given.parameters()), 0) if isinstance(given, torch.nn.Module) else 0


def read(source, code, arguments):
    """A pickle (`ema`, `net` or `model` in it, or the network itself), or `module:Class` of the checkout."""
    path = Path(source)
    if not path.is_file():
        if ":" in source:
            made = factory.attribute(source, "class", code)
            return factory.call(source, lambda: made(**arguments), code)
        raise ConversionError(f"{source}: no such file; give a network pickle, or module:Class from the checkout")
    with factory.importable(*([code] if code else [])), open(path, "rb") as handle:
        try:
            found = pickle.load(handle)
        except ModuleNotFoundError as error:
            raise ConversionError(f"{path}: {error}; give the folder of the code that made it: --code path/to/checkout") from error
        except (pickle.UnpicklingError, EOFError, AttributeError, KeyError, ValueError) as error:
            raise ConversionError(f"{path}: not a network pickle of this code: {error}") from error
    if isinstance(found, dict):
        name = next((key for key in ("ema", "net", "model") if isinstance(found.get(key), torch.nn.Module)), None)
        if name is None:
            raise ConversionError(f"{path}: holds {', '.join(map(str, found)) or 'nothing'}, but no network under ema, net or model")
        found = found[name]
    return found


def check(source, net):
    """Refuses what has not EDM's form."""
    if not isinstance(net, torch.nn.Module):
        raise ConversionError(f"{source}: {type(net).__name__} is not a torch.nn.Module")
    lacking = [key for key in ("img_resolution", "img_channels", "label_dim") if not hasattr(net, key)]
    if lacking:
        raise ConversionError(
            f"{source}: {type(net).__name__} has no {', '.join(lacking)}, which EDM's networks have; for other modules there is "
            "`disback-convert torch`"
        )


def arguments_of(text):
    """--arguments as a table."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConversionError(f"--arguments: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConversionError("--arguments: write them as a JSON object, for instance '{\"img_resolution\": 64}'")
    return found


def prepare(source, code=None, raw=False, state=None, pairs=(), card_file=None, arguments="{}"):
    """The network of an EDM pickle or class, with its card."""
    net = read(str(source), code, arguments_of(arguments))
    check(source, net)
    if state is not None:
        load_state(net, state)
    net = net.eval().float()
    if getattr(net, "use_fp16", False):
        net.use_fp16 = False
    kind = type(net).__name__
    if raw and (kind in ("VPPrecond", "VEPrecond", "iDDPMPrecond") or not hasattr(net, "model")):
        raise ConversionError(f"{kind}: --raw is for EDM's own preconditioning; leave it out, and the preconditioning stays inside")
    time = "c_noise" if raw else "sigma"
    card = {
        "sample": "x",
        "time": time,
        "output": "raw" if raw else "denoised",
        "prediction": "edm-raw" if raw else "denoised",
        "time_unit": "ln-sigma-4" if raw else "sigma",
        "shape": [int(net.img_channels), int(net.img_resolution), int(net.img_resolution)],
        "layout": "nchw",
        "range": [-1.0, 1.0],
        "sigma_data": float(getattr(net, "sigma_data", 0.5)),
        "schedule.kind": "edm",
        "schedule.sigma_min": max(0.002, finite(net, "sigma_min", 0.002)),
        "schedule.sigma_max": min(80.0, finite(net, "sigma_max", 80.0)),
    }
    names = ["x", time]
    if int(net.label_dim):
        card |= {
            "conditions.class_labels.kind": "one-hot",
            "conditions.class_labels.classes": int(net.label_dim),
            "conditions.class_labels.null": "zeros",
        }
        names.append("class_labels")
    card |= cards.parse(pairs, card_file)
    cards.check(card, names, [card["output"]])
    wrapped = (Raw if raw else Inside)(net, augment_dim(net)).eval()
    made = network(wrapped, card, names)
    for weight in made.weights:
        weight.name = weight.name.removeprefix("net.")
        weight.aliases = [alias.removeprefix("net.") for alias in weight.aliases]
    return made


def finite(net, name, otherwise):
    """An attribute that may be missing or infinite."""
    value = float(getattr(net, name, otherwise))
    return value if 0.0 < value < float("inf") else otherwise
