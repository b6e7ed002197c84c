"""What a latent teacher's pipeline has beside the network: the VAE's decoder and the text encoders, as ONNX of their own."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from .. import ConversionError
from ..finish import Network, Options, finish_part
from .folder import Folder, read_json, variant


class Decoder(nn.Module):
    """Latents as the diffusion network has them [B,C,h,w] -> images in [-1,1] [B,3,H,W]: scale and shift are inside."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae
        self.scale = float(vae.config.get("scaling_factor") or 1.0)
        self.shift = float(vae.config.get("shift_factor") or 0.0)

    def forward(self, latents):
        return self.vae.decode(latents / self.scale + self.shift, return_dict=False)[0]


class TextEncoder(nn.Module):
    """Token ids [B,S] -> last hidden state, the one before it (which SDXL uses), and the pooled one where there is one."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids):
        made = self.encoder(input_ids, output_hidden_states=True, return_dict=True)
        pooled = made.get("text_embeds", made.get("pooler_output"))
        return (made.last_hidden_state, made.hidden_states[-2], *([] if pooled is None else [pooled]))


def part(module, name, examples, out, options, outputs, metadata=()):
    """One of them exported and compared like a teacher."""
    from ..torch_route.export import network

    made = network(module, {"output": outputs[0]}, list(examples), examples, "dynamo exporter")
    made.outputs = outputs
    native = made.native

    def renamed(values):
        results = native(values)
        made.outputs = outputs[: len(results)]
        return results

    made.native = renamed
    path = Path(out).with_suffix(f".{name}.onnx")
    options.progress(f"{name}: {path.name}")
    return finish_part(made, Options(path, options.tolerance, options.opset, False, options.progress), metadata)


def check(source, vae, text_encoder):
    """Refuses a folder that lacks what is asked for."""
    folder = Folder(source)
    if vae and folder.vae() is None:
        raise ConversionError(f"{source}: no vae folder: this teacher works on pixels")
    if text_encoder and not list(folder.root.glob("text_encoder*")):
        raise ConversionError(f"{source}: no text_encoder folder")


def vae_decoder(source, card, options):
    """`teacher.vae_decoder.onnx`, which says that it takes the network's samples: scale and shift are inside."""
    folder = Folder(source)
    vae = folder.load("vae")
    shape = card["shape"]
    latents = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    takes = [("disback.decoder.takes", "samples")]
    return part(Decoder(vae).eval(), "vae_decoder", {"latents": latents}, options.out, options, ["images"], takes)


def text_encoders(source, options):
    """`teacher.text_encoder.onnx`, `teacher.text_encoder_2.onnx` ...: one for each folder of that name."""
    import transformers

    root = Folder(source).root
    made = []
    for place in sorted(root.glob("text_encoder*")):
        config = read_json(place / "config.json") or {}
        kind = (config.get("architectures") or ["?"])[0]
        if not hasattr(transformers, kind):
            raise ConversionError(f"{place}: this transformers ({transformers.__version__}) has no class {kind}")
        try:
            # The exporter has no form for other attention kernels' masks.
            encoder = getattr(transformers, kind).from_pretrained(
                place, dtype=torch.float32, local_files_only=True, variant=variant(place),
                attn_implementation="eager" if "T5" in kind else "sdpa",
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError) as error:
            raise ConversionError(f"{place}: {kind} does not load: {error}") from error
        length = min(int(config.get("max_position_embeddings") or 77), 77)
        ids = np.random.default_rng(0).integers(1, int(config["vocab_size"]) - 1, (2, length))
        # CLIP pools at the end token, which has the highest id.
        ids[:, -1] = config.get("eos_token_id") if isinstance(config.get("eos_token_id"), int) else config["vocab_size"] - 1
        outputs = ["last_hidden_state", "penultimate_hidden_state", "pooled"]
        made.append(part(TextEncoder(encoder.eval()), place.name, {"input_ids": ids}, options.out, options, outputs))
    return made
