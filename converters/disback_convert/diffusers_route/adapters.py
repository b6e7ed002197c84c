"""One wrapper a network class: plain tensor arguments in, one image out, and what the class says about the card.

A wrapper's `forward` has the graph's inputs as arguments; `card()` names them. Latent sizes are in latent pixels.
"""

import contextlib

import torch
from torch import nn

from .. import ConversionError


# Conditions joined to a sample of so many channels, by the surplus: inpainting, InstructPix2Pix and the x4 upscaler.
PARTS = {4: {5: [("mask", 1), ("masked_image_latents", 4)], 4: [("image_latents", 4)], 3: [("image", 3)]}}


class Adapter(nn.Module):
    """What the wrappers share: the network, its configuration and the latent size."""

    time_unit = None  # where the class fixes it, over the scheduler's
    output = "prediction"

    def __init__(self, net, size=None, tokens=77, null=None):
        super().__init__()
        self.net, self.config, self.tokens, self.null = net, net.config, tokens, null
        size = size or self.config.get("sample_size")
        if size is None:
            raise ConversionError(f"{type(net).__name__} has no sample_size of its own; give --size HEIGHTxWIDTH in latent pixels")
        self.size = [int(size)] * 2 if isinstance(size, int) else [int(n) for n in size]

    @property
    def channels(self):
        """Channels of the sample: of what comes out the rest is a learned variance, of what goes in conditions that are joined."""
        return min(int(self.config["in_channels"]), int(self.config.get("out_channels") or self.config["in_channels"]))

    def joined(self):
        """(name, channels) of the conditions that the network's caller joins to the sample."""
        surplus = int(self.config["in_channels"]) - self.channels
        return {0: [], **PARTS.get(self.channels, {})}.get(surplus, [("condition", surplus)])

    def image_tokens(self):
        """Length of the image sequence of a transformer."""
        return None

    def card(self):
        """Card entries of the inputs and the sample."""
        made = {"sample": "sample", "time": "timestep", "output": self.output, "shape": [self.channels, *self.size], "layout": "nchw"}
        for name, channels in self.joined():
            made |= self.embedding(name, [channels, *self.size])
        return made | ({"concat": ["sample", *(name for name, _ in self.joined())]} if self.joined() else {})

    def labels(self, name, classes, null):
        """Entries of a class condition; the null of the command line wins."""
        null = self.null if self.null is not None else null
        made = {f"conditions.{name}.kind": "class-index", f"conditions.{name}.classes": classes}
        return made if null is None else made | {f"conditions.{name}.null": null}

    def embedding(self, name, shape):
        return {f"conditions.{name}.kind": "embedding", f"conditions.{name}.shape": [int(n) for n in shape]}

    def first(self, made):
        """The sample of an output; learned variances, which distillation has no use for, are cut off."""
        made = made[0] if isinstance(made, tuple) else made.sample
        return made[:, : self.channels] if made.shape[1] != self.channels else made


class UNet2D(Adapter):
    """UNet2DModel: images or latents, class labels or none."""

    def card(self):
        count = self.config.get("num_class_embeds")
        if not count and self.config.get("class_embed_type") is None:
            return super().card()
        if self.config.get("class_embed_type") not in (None, "timestep") or not count:
            raise ConversionError(f"UNet2DModel with class_embed_type {self.config['class_embed_type']!r} is not supported")
        # The classes without the extra one that means "none", where --null names it.
        return super().card() | self.labels("class_labels", count - (self.null is not None and self.null == count - 1), None)

    def forward(self, sample, timestep, class_labels=None):
        return self.first(self.net(sample, timestep, class_labels, return_dict=False))


class UNet2DCondition(Adapter):
    """UNet2DConditionModel: Stable Diffusion; SDXL with its pooled text embedding and size numbers."""

    def card(self):
        made = super().card() | self.embedding("encoder_hidden_states", [self.tokens, self.width()])
        if self.added():
            ids, text = 6, self.config["projection_class_embeddings_input_dim"] - 6 * self.config["addition_time_embed_dim"]
            made |= self.embedding("text_embeds", [text]) | self.embedding("time_ids", [ids])
        if self.config.get("num_class_embeds"):
            made |= self.labels("class_labels", self.config["num_class_embeds"], None)
        if self.config.get("time_cond_proj_dim"):
            made |= self.embedding("timestep_cond", [self.config["time_cond_proj_dim"]])
        return made

    def width(self):
        width = self.config["cross_attention_dim"]
        if self.config.get("encoder_hid_dim"):
            return self.config["encoder_hid_dim"]
        return width if isinstance(width, int) else width[0]

    def added(self):
        kind = self.config.get("addition_embed_type")
        if kind not in (None, "text_time"):
            raise ConversionError(f"UNet2DConditionModel with addition_embed_type {kind!r} is not supported; text_time (SDXL) is")
        return kind is not None

    def forward(self, sample, timestep, encoder_hidden_states, text_embeds=None, time_ids=None, class_labels=None, timestep_cond=None):
        more = {"added_cond_kwargs": {"text_embeds": text_embeds, "time_ids": time_ids}} if text_embeds is not None else {}
        return self.first(
            self.net(
                sample, timestep, encoder_hidden_states, class_labels=class_labels, timestep_cond=timestep_cond, return_dict=False, **more
            )
        )


class DiT(Adapter):
    """DiTTransformer2DModel: class labels, the last of them "none"; the variances that it predicts too are cut off."""

    def card(self):
        classes = int(self.config["num_embeds_ada_norm"])
        return super().card() | self.labels("class_labels", classes, classes)

    def image_tokens(self):
        return self.size[0] * self.size[1] // self.config["patch_size"] ** 2

    def forward(self, sample, timestep, class_labels):
        return self.first(self.net(sample, timestep, class_labels, return_dict=False))


@contextlib.contextmanager
def no_idle_squeeze():
    """Within this, squeezing a dimension that is not 1, which does nothing, leaves no node: the exporter writes a Squeeze that
    ONNX forbids."""
    original = torch.Tensor.squeeze

    def squeeze(tensor, *dims):
        if len(dims) == 1 and isinstance(dims[0], int) and tensor.shape[dims[0]] != 1:
            return tensor
        return original(tensor, *dims)

    torch.Tensor.squeeze = squeeze
    try:
        yield
    finally:
        torch.Tensor.squeeze = original


class PixArt(Adapter):
    """PixArtTransformer2DModel: text embeddings with a mask; the alpha version's resolution inputs are this size's constants."""

    def card(self):
        made = super().card() | self.embedding("encoder_hidden_states", [self.tokens, self.config["caption_channels"]])
        return made | self.embedding("encoder_attention_mask", [self.tokens])

    def image_tokens(self):
        return self.size[0] * self.size[1] // self.config["patch_size"] ** 2

    def forward(self, sample, timestep, encoder_hidden_states, encoder_attention_mask):
        added = {"resolution": None, "aspect_ratio": None}
        if self.net.use_additional_conditions:
            height, width = (8.0 * n for n in self.size)
            added = {
                "resolution": sample.new_tensor([[height, width]]).expand(sample.shape[0], -1),
                "aspect_ratio": sample.new_tensor([[height / width]]).expand(sample.shape[0], -1),
            }
        # The bias that the network makes of the mask, for every head and image token: repeating it inside ties the batch to
        # the example's, and ONNX Runtime's Attention wants it in full.
        heads, tokens = self.config["num_attention_heads"], encoder_attention_mask.shape[1]
        bias = ((1 - encoder_attention_mask) * -10000.0)[:, None, None].expand(-1, heads, self.image_tokens(), -1)
        bias = bias.reshape(-1, self.image_tokens(), tokens)
        with no_idle_squeeze():
            made = self.net(
                sample, encoder_hidden_states=encoder_hidden_states, timestep=timestep, added_cond_kwargs=added,
                encoder_attention_mask=bias, return_dict=False,
            )  # fmt: skip
        return self.first(made)


class SD3(Adapter):
    """SD3Transformer2DModel: joint text embeddings and a pooled one; rectified flow."""

    time_unit = "thousand"

    def card(self):
        made = super().card() | self.embedding("encoder_hidden_states", [self.tokens, self.config["joint_attention_dim"]])
        return made | self.embedding("pooled_projections", [self.config["pooled_projection_dim"]])

    def image_tokens(self):
        return self.size[0] * self.size[1] // self.config["patch_size"] ** 2

    def forward(self, sample, timestep, encoder_hidden_states, pooled_projections):
        return self.first(self.net(sample, encoder_hidden_states, pooled_projections, timestep, return_dict=False))


class Flux(Adapter):
    """FluxTransformer2DModel: 2x2 patches are packed and unpacked inside the graph, so that the sample is an image."""

    time_unit = "unit"

    def __init__(self, net, size=None, tokens=512, null=None, guidance=3.5):
        super().__init__(net, size, tokens, null)
        self.guidance = guidance
        given, made = int(self.config["in_channels"]), int(self.config.get("out_channels") or self.config["in_channels"])
        if given != made:
            raise ConversionError(
                f"FluxTransformer2DModel that takes {given} channels and gives {made} (Fill, Depth, Canny) is not supported: its packed "
                "conditions are not channels of the image. Export it with the conditions as inputs of their own"
            )
        height, width = (n // 2 for n in self.size)
        ids = torch.zeros(height, width, 3)
        ids[..., 1] += torch.arange(height)[:, None]
        ids[..., 2] += torch.arange(width)[None, :]
        self.register_buffer("img_ids", ids.reshape(height * width, 3), persistent=False)
        self.register_buffer("txt_ids", torch.zeros(tokens, 3), persistent=False)

    @property
    def channels(self):
        return int(self.config["in_channels"]) // 4

    def joined(self):
        return []

    def card(self):
        made = super().card() | self.embedding("encoder_hidden_states", [self.tokens, self.config["joint_attention_dim"]])
        made |= self.embedding("pooled_projections", [self.config["pooled_projection_dim"]])
        return made | ({"constants.guidance": self.guidance} if self.config.get("guidance_embeds") else {})

    def image_tokens(self):
        return self.size[0] * self.size[1] // 4

    def forward(self, sample, timestep, encoder_hidden_states, pooled_projections, guidance=None):
        c, height, width = self.channels, self.size[0] // 2, self.size[1] // 2
        packed = sample.reshape(-1, c, height, 2, width, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, height * width, 4 * c)
        made = self.net(
            hidden_states=packed, encoder_hidden_states=encoder_hidden_states, pooled_projections=pooled_projections,
            timestep=timestep, img_ids=self.img_ids, txt_ids=self.txt_ids, guidance=guidance, return_dict=False,
        )[0]  # fmt: skip
        return made.reshape(-1, height, width, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(-1, c, 2 * height, 2 * width)


ADAPTERS = {
    "UNet2DModel": UNet2D,
    "UNet2DConditionModel": UNet2DCondition,
    "DiTTransformer2DModel": DiT,
    "PixArtTransformer2DModel": PixArt,
    "SD3Transformer2DModel": SD3,
    "FluxTransformer2DModel": Flux,
}
