"""Trains the EDM-style PyTorch teacher: python train.py (about five minutes on one core). Writes weights.safetensors."""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file

import networks
import recipe

WEIGHTS = Path(__file__).resolve().parent / "weights.safetensors"


def one_hot(labels):
    """Class indices, 10 for none -> [B,10] with zeros for none."""
    return torch.nn.functional.one_hot(torch.as_tensor(labels).long(), 11)[:, :10].float()


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = networks.EDMPrecond()
    average = copy.deepcopy(net)
    optimiser = torch.optim.Adam(net.parameters(), lr=0.0, betas=(0.9, 0.99))
    progress = recipe.Progress()
    mirror = torch.Generator().manual_seed(1)
    for k, (x0, noise, sigma, labels) in enumerate(recipe.batches()):
        x0, noise, sigma = map(torch.from_numpy, (x0, noise, sigma))
        # The augmentation that the labels describe: shifts by one pixel, in a tenth of the images.
        shifts = torch.randint(-1, 2, (len(x0), 2), generator=mirror) * (torch.rand(len(x0), 1, generator=mirror) < 0.1)
        for dx in (-1, 1):
            for axis in (0, 1):
                rows = shifts[:, axis] == dx
                x0[rows] = torch.roll(x0[rows], dx, 2 + axis)
        augment = torch.cat([shifts.float(), shifts.any(1, keepdim=True).float()], dim=1)
        made = net(x0 + sigma[:, None, None, None] * noise, sigma, one_hot(labels), augment_labels=augment)
        loss = (recipe.loss_weight(sigma) * (made - x0).square().mean((1, 2, 3))).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.param_groups[0]["lr"] = recipe.rate(k)
        optimiser.step()
        with torch.no_grad():
            for mean, value in zip(average.parameters(), net.parameters()):
                mean.lerp_(value, 1 - recipe.keep(k + 1))
        progress(k + 1, loss.item())
    save_file(average.state_dict(), WEIGHTS)

    @torch.no_grad()
    def denoise(x, sigma, labels):
        given = torch.from_numpy(x), torch.from_numpy(sigma), one_hot(labels)
        return average(*given, augment_labels=torch.zeros(len(x), 3)).numpy()

    recipe.report("PyTorch, EDM classes", sum(p.numel() for p in net.parameters()), denoise)


if __name__ == "__main__":
    main()
