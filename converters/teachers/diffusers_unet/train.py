"""Trains the diffusers teacher, a UNet2DModel with v-prediction on DDPM's linear schedule: python train.py (about ten minutes
on one core). Writes a pipeline folder: unet/, scheduler/ and model_index.json."""

import copy
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import diffusers
import numpy as np
import torch

import recipe

HERE = Path(__file__).resolve().parent


def build():
    """The network with fresh weights; class 10 means none."""
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 24),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, attention_head_dim=8, num_class_embeds=11, resnet_time_scale_shift="scale_shift", norm_eps=1e-5,
    )  # fmt: skip


def main():
    torch.set_num_threads(1)
    net = build()
    count = sum(p.numel() for p in net.parameters())
    print(f"{count} parameters", flush=True)
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    abar = scheduler.alphas_cumprod.double()
    ln_sigma = (0.5 * ((1 - abar) / abar).log()).numpy()
    average = copy.deepcopy(net)
    optimiser = torch.optim.Adam(net.parameters(), lr=0.0, betas=(0.9, 0.99))
    progress = recipe.Progress()
    for k, (x0, noise, sigma, labels) in enumerate(recipe.batches()):
        step = np.abs(np.log(sigma)[:, None] - ln_sigma[None]).argmin(1)
        x0, noise, labels, t = torch.from_numpy(x0), torch.from_numpy(noise), torch.from_numpy(labels), torch.from_numpy(step)
        made = net(scheduler.add_noise(x0, noise, t), t, labels.long()).sample
        loss = (made - scheduler.get_velocity(x0, noise, t)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.param_groups[0]["lr"] = recipe.rate(k)
        optimiser.step()
        with torch.no_grad():
            for mean, value in zip(average.parameters(), net.parameters()):
                mean.lerp_(value, 1 - recipe.keep(k + 1))
        progress(k + 1, loss.item())
    average.save_pretrained(HERE / "unet")
    scheduler.save_pretrained(HERE / "scheduler")
    index = {"_class_name": "DDPMPipeline", "_diffusers_version": diffusers.__version__}
    index |= {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    (HERE / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")

    @torch.no_grad()
    def denoise(x, sigma, labels):
        t = np.interp(np.log(sigma), ln_sigma, np.arange(1000)).astype(np.float32)
        a, b = (torch.tensor(v, dtype=torch.float32) for v in (1 / np.hypot(1, sigma[0]), sigma[0] / np.hypot(1, sigma[0])))
        x = a * torch.from_numpy(x).float()
        return (a * x - b * average(x, torch.from_numpy(t), torch.from_numpy(labels)).sample).numpy()

    recipe.report("diffusers UNet2DModel", count, denoise)


if __name__ == "__main__":
    main()
