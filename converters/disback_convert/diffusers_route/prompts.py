"""Prompt lists -> a file of conditions to train from: one array a condition input, one row a prompt.

The pipeline's own `encode_prompt` does the work, so that tokenizers, layers and padding are those the teacher was trained
with.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from .. import ConversionError, card as cards
from .folder import Folder, variant


def lines(path):
    """The prompts of a text file, one a line; empty lines do not count."""
    try:
        found = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"--prompts {path}: {error}") from error
    if not found:
        raise ConversionError(f"--prompts {path}: no prompt in it; write one a line")
    return found


KNOWN = ("StableDiffusionXL", "StableDiffusion3", "StableDiffusion", "Flux", "PixArt")


def pipeline(source):
    """The folder of a pipeline whose prompts can be encoded."""
    folder = Folder(source)
    if folder.index is None:
        raise ConversionError(f"{source}: prompts need the whole pipeline's folder (model_index.json, tokenizers, text encoders)")
    name = folder.index.get("_class_name", "?")
    if not name.startswith(KNOWN):
        raise ConversionError(f"prompts of {name} cannot be encoded; known are Stable Diffusion (1, 2, XL, 3), PixArt and Flux")
    return folder


class Encoder:
    """A pipeline without its denoising network and VAE."""

    def __init__(self, source, card, tokens):
        import diffusers

        folder = pipeline(source)
        name = folder.index["_class_name"]
        self.name, self.card, self.tokens, self.scale = name, card, tokens, 1
        absent = {part: None for part in ("unet", "transformer", "vae", "safety_checker", "feature_extractor", "image_encoder")}
        absent = {part: None for part in absent if part in folder.index}
        absent |= {part: None for part, kind in folder.index.items() if kind == [None, None]}
        try:
            self.pipe = getattr(diffusers, name).from_pretrained(
                folder.path, torch_dtype=torch.float32, local_files_only=True, variant=variant(folder.path / "text_encoder"), **absent
            )
        except (AttributeError, OSError, ValueError, TypeError) as error:
            raise ConversionError(f"{source}: the text encoders of {name} do not load: {error}") from error
        # What the pipeline asks its network for, which is not loaded.
        if self.pipe.components.get("transformer", self) is None:
            self.pipe.transformer = SimpleNamespace(config=SimpleNamespace(**folder.config), dtype=torch.float32)
        vae = folder.vae() or {}
        self.scale = 2 ** (len(vae.get("block_out_channels", [0])) - 1)

    @torch.no_grad()
    def rows(self, prompts):
        """{condition: [len(prompts), ...]}."""
        arguments = {"prompt": prompts, "device": "cpu", "num_images_per_prompt": 1}
        if self.name.startswith("StableDiffusionXL"):
            embeds, _, pooled, _ = self.pipe.encode_prompt(do_classifier_free_guidance=False, **arguments)
            height, width = (n * self.scale for n in self.card["shape"][1:])
            ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32).expand(len(prompts), -1)
            return {"encoder_hidden_states": embeds, "text_embeds": pooled, "time_ids": ids}
        if self.name.startswith("StableDiffusion3"):
            length = max(self.tokens - self.pipe.tokenizer_max_length, 1)
            embeds, _, pooled, _ = self.pipe.encode_prompt(
                prompt_2=None, prompt_3=None, do_classifier_free_guidance=False, max_sequence_length=length, **arguments
            )
            return {"encoder_hidden_states": embeds, "pooled_projections": pooled}
        if self.name.startswith("Flux"):
            embeds, pooled, _ = self.pipe.encode_prompt(prompt_2=None, max_sequence_length=self.tokens, **arguments)
            return {"encoder_hidden_states": embeds, "pooled_projections": pooled}
        if self.name.startswith("PixArt"):
            embeds, mask, _, _ = self.pipe.encode_prompt(do_classifier_free_guidance=False, max_sequence_length=self.tokens, **arguments)
            return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask.float()}
        embeds, _ = self.pipe.encode_prompt(do_classifier_free_guidance=False, **arguments)
        return {"encoder_hidden_states": embeds}


def embed(source, path, card, out, tokens, progress, batch=16):
    """Writes `teacher.prompts.npz` for the prompts of a file."""
    prompts = lines(path)
    encoder = Encoder(source, card, tokens)
    parts = []
    for start in range(0, len(prompts), batch):
        progress(f"embedding prompts {start + 1} to {min(start + batch, len(prompts))} of {len(prompts)}")
        parts.append({name: value.float().numpy() for name, value in encoder.rows(prompts[start : start + batch]).items()})
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for name, value in arrays.items():
        want = card.get(f"conditions.{name}.shape")
        if want is None or list(value.shape[1:]) != list(want):
            raise ConversionError(
                f"the pipeline gives {name} {list(value.shape[1:])}, the graph takes {want}; set the number of text tokens by --tokens"
            )
    file = Path(out).with_suffix(".prompts.npz")
    cards.write_whole(file, lambda handle: np.savez(handle, **arrays))
    return file, len(prompts)


def null_card(source, text, card, out, tokens):
    """Writes the embedding of the empty prompt into `teacher.card.toml`: the null value for guidance."""
    encoder = Encoder(source, card, tokens)
    rows = encoder.rows([text])
    if not text and encoder.pipe.config.get("force_zeros_for_empty_prompt"):
        # SDXL's own pipeline takes zeros for no prompt at all.
        rows |= {name: torch.zeros_like(rows[name]) for name in ("encoder_hidden_states", "text_embeds") if name in rows}
    body = ""
    for name, value in rows.items():
        numbers = ", ".join(f"{v:.7g}" if "." in f"{v:.7g}" or "e" in f"{v:.7g}" else f"{v:.1f}" for v in value.float().flatten().tolist())
        body += f"[conditions.{name}]\nnull = [{numbers}]\n"
    file = Path(out).with_suffix(".card.toml")
    cards.write_whole(file, lambda handle: handle.write(body.encode()))
    return file
