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


def conditional(xl=False, channels=4):
    torch.manual_seed(1)
    more = {}
    if xl:
        more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 32 + 48}
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=channels, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
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


def clip(folder, width=32, projection=None, seed=7):
    """A CLIP text model of `width` channels (with a projection: of so many) and a tokenizer of single letters, 12 tokens."""
    import transformers

    torch.manual_seed(seed)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = {token: k for k, token in enumerate([*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=52, eos_token_id=53, pad_token_id=53, projection_dim=projection or 32,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config).eval(), tokenizer


def t5(width=12):
    """A T5 encoder of `width` channels and a tokenizer of single letters."""
    import transformers

    torch.manual_seed(9)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0), *((chr(c), -2.0) for c in range(ord("a"), ord("z") + 1))]
    tokenizer = transformers.T5Tokenizer(vocab=pieces, extra_ids=0)
    config = transformers.T5Config(vocab_size=len(pieces), d_model=width, d_kv=6, d_ff=24, num_layers=2, num_heads=2)
    return transformers.T5EncoderModel(config).eval(), tokenizer


def text_pipeline(kind, folder):
    """A whole text-to-image pipeline of a kind, with the options of its conversion."""
    parts = lambda **given: [(name, part, "diffusers" if name == "vae" else "transformers") for name, part in given.items()]  # noqa: E731
    flow, ddim = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), diffusers.DDIMScheduler()
    if kind == "StableDiffusionXLPipeline":
        (one, token), (two, token_2) = clip(folder, 12), clip(folder, 20, 32, seed=8)
        more = parts(vae=autoencoder(), text_encoder=one, tokenizer=token, text_encoder_2=two, tokenizer_2=token_2)
        return write(folder / "p", conditional(xl=True), "unet", kind, ddim, more), ["--tokens", 12]
    if kind == "PixArtAlphaPipeline":
        encoder, token = t5()
        more = parts(vae=autoencoder(), text_encoder=encoder, tokenizer=token)
        return write(folder / "p", pixart(), "transformer", kind, ddim, more), ["--tokens", 6]
    if kind == "FluxPipeline":
        (one, token), (two, token_2) = clip(folder, 10), t5()
        more = parts(vae=autoencoder(), text_encoder=one, tokenizer=token, text_encoder_2=two, tokenizer_2=token_2)
        return write(folder / "p", flux(), "transformer", kind, flow, more), ["--tokens", 6, "--size", "8x8"]
    (one, token), (two, token_2), (three, token_3) = clip(folder, 6, 4), clip(folder, 6, 6, seed=8), t5()
    more = parts(vae=autoencoder(), text_encoder=one, tokenizer=token, text_encoder_2=two, tokenizer_2=token_2)
    if kind == "StableDiffusion3Pipeline":
        more += parts(text_encoder_3=three, tokenizer_3=token_3)
    path = write(folder / "p", sd3(), "transformer", "StableDiffusion3Pipeline", flow, more)
    if kind != "StableDiffusion3Pipeline":  # without its T5 encoder, as it is often kept
        index = json.loads((path / "model_index.json").read_text()) | {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
        (path / "model_index.json").write_text(json.dumps(index))
    return path, ["--tokens", 20]
