"""A diffusers folder: a pipeline with its parts, or one network on its own."""

import json
from pathlib import Path

from .. import ConversionError
from .adapters import ADAPTERS

PARTS = ("unet", "transformer", "prior")


class Folder:
    """What lies in a pipeline's or network's folder. Nothing is fetched from anywhere."""

    def __init__(self, path, part=None):
        self.path = Path(path)
        if not self.path.is_dir():
            raise ConversionError(f"{path}: no such folder")
        self.index = read_json(self.path / "model_index.json")
        loose = not (self.path / "config.json").is_file() and any((self.path / name / "config.json").is_file() for name in (part, *PARTS) if name)
        # A pipeline that was saved part by part has no model_index.json.
        self.whole = self.index is not None or loose
        if not self.whole:
            self.network = self.path
        else:
            parts = [part] if part else [name for name in PARTS if (self.path / name).is_dir()]
            if not parts or not (self.path / parts[0]).is_dir():
                found = ", ".join(sorted(child.name for child in self.path.iterdir() if child.is_dir())) or "nothing"
                pipeline = (self.index or {}).get("_class_name", "without model_index.json")
                raise ConversionError(
                    f"{path}: the pipeline {pipeline} has no {part or 'unet or transformer'} folder (found {found}); "
                    "name the folder of the denoising network by --part"
                )
            self.network = self.path / parts[0]
        self.config = read_json(self.network / "config.json")
        if self.config is None or "_class_name" not in self.config:
            raise ConversionError(
                f"{path}: not a diffusers model: neither model_index.json (a pipeline) nor config.json with _class_name (a network) in it"
            )
        self.kind = self.config["_class_name"]
        if self.kind not in ADAPTERS:
            raise ConversionError(
                f"{self.network}: the class {self.kind} is not known; known are {', '.join(ADAPTERS)}. A module of your own that wraps "
                "it goes through `disback-convert torch`"
            )

    @property
    def root(self):
        """Where scheduler, VAE and text encoders lie."""
        return self.path if self.whole else self.network.parent

    def scheduler(self):
        """The scheduler's configuration, or None."""
        for place in (self.root / "scheduler", self.network):
            if (found := read_json(place / "scheduler_config.json")) is not None:
                return found
        return None

    def vae(self):
        """The autoencoder's configuration, or None (a network of pixels)."""
        if self.index is not None and (self.index.get("vae") or [None])[0] is None:
            return None
        return read_json(self.root / "vae" / "config.json")

    def load(self, place=None):
        """The network of a sub-folder with all its weights and no others, in f32."""
        import diffusers
        import torch

        place = self.network if place is None else self.root / place
        kind = read_json(place / "config.json")["_class_name"]
        diffusers.utils.logging.set_verbosity_error()
        try:
            net, info = getattr(diffusers, kind).from_pretrained(
                place, torch_dtype=torch.float32, low_cpu_mem_usage=False, local_files_only=True, output_loading_info=True,
                variant=variant(place),
            )  # fmt: skip
        except AttributeError as error:
            raise ConversionError(f"{place}: this diffusers ({diffusers.__version__}) has no class {kind}") from error
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise ConversionError(f"{place}: {kind} does not load: {str(error).strip()}") from error
        problems = [
            f"  {title} ({len(info[key])}): {', '.join(map(str, info[key]))}"
            for title, key in (("missing", "missing_keys"), ("surplus", "unexpected_keys"), ("of another shape", "mismatched_keys"))
            if info.get(key)
        ]
        if problems:
            raise ConversionError(f"{place}: the weights do not fit {kind}:\n" + "\n".join(problems))
        return net.eval()


def variant(place):
    """`fp16` of `diffusion_pytorch_model.fp16.safetensors`, where a folder holds that variant of the weights and no plain one."""
    files = [file.name.split(".") for file in place.glob("*") if file.suffix in (".safetensors", ".bin")]
    plain = any(len(parts) == 2 for parts in files)
    named = sorted({parts[1].partition("-")[0] for parts in files if len(parts) == 3})
    return named[0] if named and not plain else None


def read_json(path):
    """A JSON file's table, None where there is no such file."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: not JSON: {error}") from error
