"""More networks of the corpus: other families of diffusers, and the modules of `others.py`."""

import torch
from networks import Call, Network, steps
from others import Branches, ConsistencyUnet, ConvNextUnet, MagnitudePreserving, RopeDit, UVit, Windows


def plain(module, inputs, draw, outputs=("out_sample",)):
    return Network(module, list(inputs), list(outputs), draw)


def u_vit():
    return plain(UVit(), ["x", "t", "y"], lambda b: (torch.randn(b, 3, 8, 8), steps(b), torch.arange(b) * 2 % 5))


def rope_dit():
    def draw(b):
        seen = torch.arange(5)[None, :] < 2 + torch.arange(b)[:, None] % 4
        return torch.randn(b, 4, 8, 8), steps(b), torch.randn(b, 5, 12), seen

    return plain(RopeDit(), ["x", "t", "text", "mask"], draw)


def convnext():
    return plain(ConvNextUnet(), ["x", "t"], lambda b: (torch.randn(b, 3, 8, 8), steps(b)))


def standardised():
    """Kernels that the network standardises; an exporter that folds the constants of the graph folds these too."""
    return plain(ConvNextUnet(standardised=True), ["x", "t"], lambda b: (torch.randn(b, 3, 8, 8), steps(b)))


def consistency():
    draw = lambda b: (torch.randn(b, 3, 8, 8) * 3, torch.linspace(0.02, 20.0, b), torch.arange(b) * 3 % 4)  # noqa: E731
    return plain(ConsistencyUnet(), ["x", "sigma", "y"], draw)


def edm2():
    draw = lambda b: (torch.randn(b, 3, 8, 8) * 3, torch.linspace(0.02, 20.0, b), torch.eye(4)[torch.arange(b) % 4])  # noqa: E731
    return plain(MagnitudePreserving(), ["x", "sigma", "y"], draw)


def windows():
    return plain(Windows(), ["x", "t", "text"], lambda b: (torch.randn(b, 4, 8, 8), steps(b), torch.randn(b, 5, 12)))


def branches():
    net = plain(Branches(), ["x", "flag"], lambda b: (torch.randn(b, 6), torch.tensor([1])))
    net.unbatched = ("flag",)
    return net


def latents(b, *shape):
    return torch.randn(b, *shape)


def sana():
    from diffusers import SanaTransformer2DModel

    net = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12, mlp_ratio=2.0, sample_size=8, patch_size=1,
    )  # fmt: skip
    call = Call(net, lambda net, x, c, t: net(x, c, t, return_dict=False)[0])
    draw = lambda b: (latents(b, 4, 8, 8), latents(b, 5, 12), steps(b))  # noqa: E731
    return plain(call, ["hidden_states", "encoder_hidden_states", "timestep"], draw)


def hunyuan():
    from diffusers import HunyuanDiT2DModel
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    net = HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, hidden_size=16, num_layers=2,
        mlp_ratio=2.0, cross_attention_dim=12, cross_attention_dim_t5=16, pooled_projection_dim=6, text_len=4, text_len_t5=3,
    )  # fmt: skip
    turned = get_2d_rotary_pos_embed(8, ((0, 0), (4, 4)), (4, 4), output_type="pt")

    def run(net, x, t, c, c5):
        b = x.shape[0]
        ones = lambda n: torch.ones(b, n, dtype=torch.int64)  # noqa: E731
        ids = torch.tensor([[64.0, 64.0, 64.0, 64.0, 0.0, 0.0]]).to(x.dtype).repeat(b, 1)
        style, rope = torch.zeros(b, dtype=torch.int64), tuple(r.to(x.dtype) for r in turned)
        return net(
            x, t, encoder_hidden_states=c, text_embedding_mask=ones(4), encoder_hidden_states_t5=c5, text_embedding_mask_t5=ones(3),
            image_meta_size=ids, style=style, image_rotary_emb=rope, return_dict=False,
        )[0]  # fmt: skip

    draw = lambda b: (latents(b, 4, 8, 8), steps(b), latents(b, 4, 12), latents(b, 3, 16))  # noqa: E731
    return plain(Call(net, run), ["hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_t5"], draw)


def aura():
    from diffusers import AuraFlowTransformer2DModel

    net = AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pos_embed_max_size=16,
    )  # fmt: skip
    call = Call(net, lambda net, x, c, t: net(x, c, t, return_dict=False)[0])
    draw = lambda b: (latents(b, 4, 8, 8), latents(b, 5, 12), (1 + torch.arange(b)) / 64)  # noqa: E731
    return plain(call, ["hidden_states", "encoder_hidden_states", "timestep"], draw)


def cog():
    from diffusers import CogVideoXTransformer3DModel

    net = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=12,
        num_layers=2, sample_width=4, sample_height=4, sample_frames=9, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=5,
    )  # fmt: skip
    call = Call(net, lambda net, x, c, t: net(x, c, t, return_dict=False)[0])
    draw = lambda b: (latents(b, 3, 4, 4, 4), latents(b, 5, 12), steps(b))  # noqa: E731
    return plain(call, ["hidden_states", "encoder_hidden_states", "timestep"], draw)


def ltx():
    from diffusers import LTXVideoTransformer3DModel

    net = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, num_layers=2,
        caption_channels=12,
    )  # fmt: skip

    def run(net, x, c, t, mask):
        return net(x, c, t, mask, num_frames=2, height=3, width=2, return_dict=False)[0]

    def draw(b):
        seen = torch.arange(5)[None, :] < 2 + torch.arange(b)[:, None] % 4
        return latents(b, 12, 4), latents(b, 5, 12), steps(b), seen.long()

    return plain(Call(net, run), ["hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask"], draw)


def wan():
    from diffusers import WanTransformer3DModel

    net = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12,
        freq_dim=8, ffn_dim=32, num_layers=2, rope_max_seq_len=16,
    )  # fmt: skip
    call = Call(net, lambda net, x, t, c: net(x, t, c, return_dict=False)[0])
    draw = lambda b: (latents(b, 4, 2, 4, 4), steps(b).long(), latents(b, 5, 12))  # noqa: E731
    return plain(call, ["hidden_states", "timestep", "encoder_hidden_states"], draw)


def kandinsky():
    from diffusers import UNet2DConditionModel

    net = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=8, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=12, encoder_hid_dim=10, encoder_hid_dim_type="image_proj", addition_embed_type="image",
        resnet_time_scale_shift="scale_shift", only_cross_attention=False,
    )  # fmt: skip
    call = Call(net, lambda net, x, t, c: net(x, t, None, added_cond_kwargs={"image_embeds": c}, return_dict=False)[0])
    draw = lambda b: (latents(b, 4, 8, 8), steps(b), latents(b, 10))  # noqa: E731
    return plain(call, ["sample", "timestep", "image_embeds"], draw)


def cascade():
    from diffusers.models import StableCascadeUNet

    net = StableCascadeUNet(
        in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, patch_size=1, conditioning_dim=8, block_out_channels=(8, 8),
        num_attention_heads=(0, 2), down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1), up_blocks_repeat_mappers=(1, 1), clip_text_pooled_in_channels=10, clip_seq=2,
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock"), ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")),
        kernel_size=3, dropout=(0.0, 0.0), self_attn=True, timestep_conditioning_type=("sca",), switch_level=(False,),
    )  # fmt: skip
    call = Call(net, lambda net, x, t, c: net(x, t, c, return_dict=False)[0])
    draw = lambda b: (latents(b, 4, 8, 8), (1 + torch.arange(b)) / 64, latents(b, 1, 10))  # noqa: E731
    return plain(call, ["sample", "timestep_ratio", "clip_text_pooled"], draw)


def prior():
    from diffusers import PriorTransformer

    net = PriorTransformer(num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=12, num_embeddings=4, additional_embeddings=4)

    def run(net, x, t, c, text, mask):
        return net(x, t, c, text, mask, return_dict=False)[0]

    def draw(b):
        seen = torch.arange(4)[None, :] < 2 + torch.arange(b)[:, None] % 3
        return latents(b, 12), steps(b), latents(b, 12), latents(b, 4, 12), seen

    names = ["hidden_states", "timestep", "proj_embedding", "encoder_hidden_states", "attention_mask"]
    return plain(Call(net, run), names, draw)


def unet1d():
    from diffusers import UNet1DModel

    net = UNet1DModel(
        sample_size=16, in_channels=3, out_channels=3, extra_in_channels=64, time_embedding_type="fourier", flip_sin_to_cos=True,
        use_timestep_embedding=False, down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
        mid_block_type="UNetMidBlock1D", up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
        block_out_channels=(32, 32, 32),
    )  # fmt: skip
    call = Call(net, lambda net, x, t: net(x, t, return_dict=False)[0])
    return plain(call, ["sample", "timestep"], lambda b: (latents(b, 3, 32), torch.linspace(0.1, 0.9, b)))


def tiny():
    from diffusers import AutoencoderTiny

    net = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    )  # fmt: skip
    call = Call(net, lambda net, z: net.decode(z, return_dict=False)[0])
    return plain(call, ["latent"], lambda b: (latents(b, 4, 4, 4),), ["image"])


def dc():
    from diffusers import AutoencoderDC

    net = AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), (3,)),
        decoder_qkv_multiscales=((), (3,)), upsample_block_type="interpolate", downsample_block_type="pixel_unshuffle",
        decoder_norm_types="rms_norm", decoder_act_fns="silu",
    )  # fmt: skip
    call = Call(net, lambda net, z: net.decode(z, return_dict=False)[0])
    return plain(call, ["latent"], lambda b: (latents(b, 4, 4, 4),), ["image"])


def t5():
    from transformers import T5Config, T5EncoderModel

    net = T5EncoderModel(T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8, relative_attention_max_distance=16,
    ))  # fmt: skip
    call = Call(net, lambda net, ids, mask: net(ids, attention_mask=mask, return_dict=False)[0])

    def draw(b):
        return torch.randint(2, 38, (b, 7)), (torch.arange(7)[None, :] < 4 + torch.arange(b)[:, None] % 4).long()

    return plain(call, ["input_ids", "attention_mask"], draw, ["last_hidden_state"])


FAMILIES = {
    "u_vit": u_vit, "rope_dit": rope_dit, "convnext": convnext, "standardised": standardised, "consistency": consistency, "edm2": edm2, "windows": windows,
    "branches": branches, "sana": sana, "hunyuan": hunyuan, "aura": aura, "cog": cog, "ltx": ltx, "wan": wan,
    "kandinsky": kandinsky, "cascade": cascade, "prior": prior, "unet1d": unet1d, "tiny": tiny, "dc": dc, "t5": t5,
}  # fmt: skip
