"""The teacher's network, diffusers' UNet2DModel on patches of 2x2 pixels, and the process that it learns; card.toml says both to
disback.

Around the 28x28 image go two rows and columns on each side, so that it halves three times: 2x2 pixels become 4 channels of a
16x16 grid, and the UNet works at 16x16, 8x8 and 4x4. Most of the 1.4 million weights stand at 4x4, where they are cheap.
"""

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import nn
from torch.nn import functional as F

CLASSES = NULL_CLASS = 10
SIZE, MARGIN, PATCH = 28, 2, 2


def scheduler():
    """The diffusion process that the teacher is trained on, as diffusers has it."""
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="v_prediction")


class Teacher(nn.Module):
    """sample [B,1,28,28] at noise level `timestep` [B] (0..999), class_labels [B] int64 (0..9, or 10 for none) -> v [B,1,28,28]."""

    def __init__(self, channels=(24, 48, 96)):
        super().__init__()
        self.unet = UNet2DModel(
            sample_size=(SIZE + 2 * MARGIN) // PATCH,
            in_channels=PATCH**2,
            out_channels=PATCH**2,
            block_out_channels=channels,
            down_block_types=("DownBlock2D",) * 3,
            up_block_types=("UpBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=16,
            num_class_embeds=CLASSES + 1,
        )

    def forward(self, sample, timestep, class_labels):
        patches = F.pixel_unshuffle(F.pad(sample, (MARGIN,) * 4), PATCH)
        made = self.unet(patches, timestep, class_labels, return_dict=False)[0]
        return F.pixel_shuffle(made, PATCH)[:, :, MARGIN:-MARGIN, MARGIN:-MARGIN]


def build():
    """The network with fresh weights and example inputs: what `disback-convert torch model:build` calls."""
    inputs = {"sample": torch.randn(2, 1, SIZE, SIZE), "timestep": torch.tensor([20.0, 700.0]), "class_labels": torch.tensor([3, NULL_CLASS])}
    return Teacher(), inputs
