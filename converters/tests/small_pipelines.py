"""Small diffusers pipelines with random weights, written as folders the way `save_pretrained` does."""

import json

import diffusers
import torch


def write(folder, net, part, pipeline, scheduler=None, parts=()):
    """`folder/part` and what belongs beside it."""
    net.save_pretrained(folder / part)
    index = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__, part: ["diffusers", type(net).__name__]}
    if scheduler is not None:
        scheduler.save_pretrained(folder / "scheduler")
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
    for name, thing, library in parts:
        thing.save_pretrained(folder / name)
        index[name] = [library, type(thing).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def unet(classes=11):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, num_class_embeds=classes,
    )  # fmt: skip


def conditional(xl=False):
    torch.manual_seed(1)
    more = {}
    if xl:
        more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 32 + 48}
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=2, use_linear_projection=xl, **more,
    )  # fmt: skip


def dit():
    torch.manual_seed(2)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10,
    )  # fmt: skip


def pixart():
    torch.manual_seed(3)
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=1, sample_size=8, patch_size=2,
        cross_attention_dim=24, caption_channels=12, use_additional_conditions=True,
    )  # fmt: skip


def sd3():
    torch.manual_seed(4)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip


def flux():
    torch.manual_seed(5)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def autoencoder():
    torch.manual_seed(6)
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, scaling_factor=0.25,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
    )  # fmt: skip


def text_encoder(folder):
    """A CLIP text model of 32 channels and a tokenizer of single letters."""
    import transformers

    torch.manual_seed(7)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = {token: k for k, token in enumerate([*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    return transformers.CLIPTextModel(config).eval(), tokenizer
