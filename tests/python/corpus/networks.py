"""The networks of the corpus, at small sizes: what diffusion pipelines are made of, from diffusers, transformers and EDM.

`NETWORKS[name]()` gives a `Network`: a module that takes positional tensors and returns a tensor or a tuple of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from edm import EdmNetwork
from torch import nn
from traps import Traps


@dataclass
class Network:
    module: nn.Module
    inputs: list[str]
    outputs: list[str]
    draw: Callable[[int], tuple]  # inputs for a batch; other sizes come with `size`
    unbatched: tuple[str, ...] = ()  # inputs that have no batch dimension
    size: Callable[[int, int], tuple] | None = None  # (batch, size): inputs of another spatial size
    spatial: tuple[str, ...] = ()  # inputs whose dimensions 2 and 3 may change
    fusion: str = "unet"  # as what `onnxruntime.transformers.optimizer` takes it


class Call(nn.Module):
    """A diffusers module as a function of tensors: no keywords, no dataclasses."""

    def __init__(self, net, call):
        super().__init__()
        self.net, self.call = net, call

    def forward(self, *args):
        return self.call(self.net, *args)


def steps(batch):
    """Small ones: an exporter that folds the frequencies rounds them otherwise, by up to 1e-4 of a turn at step 1000."""
    return torch.linspace(3, 61, batch).round()


def unet2d():
    from diffusers import UNet2DModel

    net = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=8, num_class_embeds=5,
    )  # fmt: skip
    call = Call(net, lambda net, x, t, y: net(x, t, class_labels=y, return_dict=False)[0])
    size = lambda b, s: (torch.randn(b, 3, s, s), steps(b), torch.arange(b) * 2 % 5)  # noqa: E731
    names = ["sample", "timestep", "class_labels"]
    return Network(call, names, ["out_sample"], lambda b: size(b, 8), size=size, spatial=("sample",))


def ncsnpp():
    """Score-SDE form: Fourier time features, FIR resampling, skip branches, scale-shift norms."""
    from diffusers import UNet2DModel

    net = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(32, 32),
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"), up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        norm_num_groups=4, attention_head_dim=8, time_embedding_type="fourier", norm_eps=1e-6, mid_block_scale_factor=2**0.5,
    )  # fmt: skip
    call = Call(net, lambda net, x, t: net(x, t, return_dict=False)[0])
    draw = lambda b: (torch.randn(b, 3, 8, 8), torch.linspace(0.02, 30.0, b))  # noqa: E731
    return Network(call, ["sample", "timestep"], ["out_sample"], draw)


def sd():
    from diffusers import UNet2DConditionModel

    net = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4, attention_head_dim=2, cross_attention_dim=12,
    )  # fmt: skip
    call = Call(net, lambda net, x, t, c: net(x, t, c, return_dict=False)[0])
    size = lambda b, s: (torch.randn(b, 4, s, s), steps(b).long(), torch.randn(b, 5, 12))  # noqa: E731
    names = ["sample", "timestep", "encoder_hidden_states"]
    return Network(call, names, ["out_sample"], lambda b: size(b, 8), size=size, spatial=("sample",))


def sdxl():
    """Added conditions (text and time ids), linear projections, and a mask over the prompt."""
    from diffusers import UNet2DConditionModel

    net = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=2, cross_attention_dim=12, use_linear_projection=True,
        transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 10,
    )  # fmt: skip

    def run(net, x, t, c, pooled, ids, mask):
        added = {"text_embeds": pooled, "time_ids": ids}
        return net(x, t, c, added_cond_kwargs=added, encoder_attention_mask=mask, return_dict=False)[0]

    def draw(b):
        ids = torch.tensor([[64.0, 48.0, 0.0, 8.0, 64.0, 64.0]]).repeat(b, 1)
        mask = torch.arange(5)[None, :] < 2 + torch.arange(b)[:, None] % 4
        return torch.randn(b, 4, 8, 8), steps(b), torch.randn(b, 5, 12), torch.randn(b, 10), ids, mask

    names = ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids", "encoder_attention_mask"]
    return Network(Call(net, run), names, ["out_sample"], draw)


def dit():
    from diffusers import DiTTransformer2DModel

    net = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    call = Call(net, lambda net, x, t, y: net(x, timestep=t, class_labels=y, return_dict=False)[0])
    draw = lambda b: (torch.randn(b, 4, 8, 8), steps(b), torch.arange(b) * 3 % 10)  # noqa: E731
    return Network(call, ["hidden_states", "timestep", "class_labels"], ["out_sample"], draw)


def sd3():
    from diffusers import SD3Transformer2DModel

    net = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    call = Call(net, lambda net, x, c, p, t: net(x, c, p, t, return_dict=False)[0])
    draw = lambda b: (torch.randn(b, 4, 8, 8), torch.randn(b, 5, 12), torch.randn(b, 10), steps(b))  # noqa: E731
    names = ["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"]
    return Network(call, names, ["out_sample"], draw, fusion="mmdit")


def flux():
    from diffusers import FluxTransformer2DModel

    net = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    call = Call(net, lambda net, x, c, p, t, g, i, j: net(x, c, p, t, i, j, g, return_dict=False)[0])

    def draw(b):
        image = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), indexing="ij"), -1).reshape(16, 3)
        times, guidance = (1 + torch.arange(b)) / 64, (2 + torch.arange(b)) / 64  # exact in f16, also times 1000
        return torch.randn(b, 16, 4), torch.randn(b, 5, 12), torch.randn(b, 10), times, guidance, image, torch.zeros(5, 3)

    names = ["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance", "img_ids", "txt_ids"]
    return Network(call, names, ["out_sample"], draw, unbatched=("img_ids", "txt_ids"))


def pixart():
    from diffusers import PixArtTransformer2DModel

    net = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=16,
        sample_size=8, caption_channels=12, use_additional_conditions=False,
    )  # fmt: skip

    # diffusers squeezes a dimension that is not 1, which does nothing; exporters write a Squeeze that cannot be.
    squeeze = torch.Tensor.squeeze
    exact = lambda t, dim: squeeze(t, dim) if int(t.shape[dim]) == 1 else t  # noqa: E731

    def run(net, x, c, t, mask):
        added = {"resolution": None, "aspect_ratio": None}
        with mock.patch.object(torch.Tensor, "squeeze", exact):
            return net(x, c, t, added_cond_kwargs=added, encoder_attention_mask=mask, return_dict=False)[0]

    def draw(b):
        mask = (torch.arange(6)[None, :] < 2 + torch.arange(b)[:, None] % 4).long()
        return torch.randn(b, 4, 8, 8), torch.randn(b, 6, 12), steps(b).long(), mask

    names = ["hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask"]
    return Network(Call(net, run), names, ["out_sample"], draw)


def autoencoder():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16,
    )  # fmt: skip


def vae_decoder():
    call = Call(autoencoder(), lambda net, z: net.decode(z, return_dict=False)[0])
    size = lambda b, s: (torch.randn(b, 4, s, s),)  # noqa: E731
    return Network(call, ["latent"], ["image"], lambda b: size(b, 4), size=size, spatial=("latent",), fusion="vae")


def vae_encoder():
    call = Call(autoencoder(), lambda net, x: net.encode(x).latent_dist.parameters)
    size = lambda b, s: (torch.randn(b, 3, s, s),)  # noqa: E731
    return Network(call, ["image"], ["moments"], lambda b: size(b, 8), size=size, spatial=("image",))


def clip():
    from transformers import CLIPTextConfig, CLIPTextModel

    net = CLIPTextModel(CLIPTextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=7, bos_token_id=0, eos_token_id=39, pad_token_id=1,
    ))  # fmt: skip

    def run(net, ids):
        out = net(ids, return_dict=True)
        return out.last_hidden_state, out.pooler_output

    def draw(b):
        ids = torch.randint(2, 38, (b, 7))
        ids[:, 0], ids[torch.arange(b), 3 + torch.arange(b) % 4] = 0, 39
        return (ids,)

    return Network(Call(net, run), ["input_ids"], ["last_hidden_state", "pooler_output"], draw, fusion="clip")


def edm():
    """DDPM++ form: positional features, box filters."""
    net = EdmNetwork(classes=4, taps=(1, 1), fourier=False)
    draw = lambda b: (torch.randn(b, 3, 8, 8) * 3, torch.linspace(0.01, 20.0, b), torch.eye(4)[torch.arange(b) % 4])  # noqa: E731
    return Network(net, ["x", "sigma", "class_labels"], ["denoised"], draw)


def edm_ncsnpp():
    """NCSN++ form: random Fourier features, four-tap filters."""
    net = EdmNetwork(classes=0, taps=(1, 3, 3, 1), fourier=True)
    return Network(net, ["x", "sigma"], ["denoised"], lambda b: (torch.randn(b, 3, 8, 8) * 3, torch.linspace(0.01, 20.0, b)))


def traps():
    net = Traps()
    draw = lambda b: (torch.randint(0, 20, (b, 5)), torch.randn(b, 5, 8))  # noqa: E731
    return Network(net, ["tokens", "x"], ["logits"], draw)


NETWORKS = {
    "unet2d": unet2d, "ncsnpp": ncsnpp, "sd": sd, "sdxl": sdxl, "dit": dit, "sd3": sd3, "flux": flux, "pixart": pixart,
    "vae_decoder": vae_decoder, "vae_encoder": vae_encoder, "clip": clip, "edm": edm, "edm_ncsnpp": edm_ncsnpp,
    "traps": traps,
}  # fmt: skip
