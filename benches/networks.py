"""The networks of the benches, in native PyTorch and as ONNX teachers.

    python benches/networks.py FOLDER [digits cifar dit adm]

Writes FOLDER/<network>-<exporter>.onnx for both of PyTorch's exporters, with the teacher card in the metadata; a file that
is there is kept. Weights are random: nothing here depends on what a network has learned.

    digits   the UNet of examples/digits, 0.65 M parameters, 8x8x1, preconditioning inside (its dynamo export is the example's)
    cifar    a DDPM++-like UNet of CIFAR's size, 56 M parameters, 32x32x3, EDM-raw: three levels of 256 channels, four blocks
             each, attention at 16x16, resampling by filters
    dit      DiT-S/2: 12 blocks of 384 channels, 6 heads, 33 M parameters, latents of 32x32x4, rectified flow
    adm      an ADM-like UNet of ImageNet 64's size, about 296 M parameters, 64x64x3, EDM-raw (for devices)
"""

import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples" / "digits"), str(ROOT / "tests" / "python"), str(ROOT / "tests" / "python" / "corpus")]
import model as digits  # noqa: E402
from edm import Block, Positional  # noqa: E402
from ship_networks import Dit, randomise, write  # noqa: E402


class Unet(nn.Module):
    """x [B,3,H,W] scaled by c_in, c_noise [B], one-hot class [B,classes] -> F, [B,3,H,W]."""

    def __init__(self, size, base, emb, multiples, blocks, attention, classes, head=None):
        super().__init__()
        taps = [1, 1]
        self.map_noise = Positional(base)
        self.map_label = nn.Linear(classes, base, bias=False)
        self.map_layer0, self.map_layer1 = nn.Linear(base, emb), nn.Linear(emb, emb)

        def block(c_in, c_out, side, **more):
            heads = 0 if side not in attention or "resample" in more else c_out // (head or c_out)
            return Block(c_in, c_out, emb, taps, heads=heads, groups=min(32, c_in // 4), **more)

        self.conv_in = nn.Conv2d(3, base, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        c, skips = base, [base]
        for level, multiple in enumerate(multiples):
            if level > 0:
                self.down.append(block(c, c, size >> level, resample="down"))
                skips.append(c)
            for _ in range(blocks):
                self.down.append(block(c, base * multiple, size >> level))
                c = base * multiple
                skips.append(c)
        side = size >> (len(multiples) - 1)
        self.middle = nn.ModuleList([Block(c, c, emb, taps, heads=c // (head or c), groups=32), block(c, c, 0)])
        self.joins = []
        for level, multiple in reversed(list(enumerate(multiples))):
            if side != size >> level:
                side = size >> level
                self.up.append(block(c, c, side, resample="up"))
                self.joins.append(False)
            for _ in range(blocks + 1):
                self.up.append(block(c + skips.pop(), base * multiple, side))
                self.joins.append(True)
                c = base * multiple
        self.out_norm = nn.GroupNorm(32, c, eps=1e-6)
        self.out_conv = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, x, noise_labels, classes):
        emb = self.map_noise(noise_labels) + self.map_label(classes * classes.shape[1] ** 0.5)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        h = self.conv_in(x)
        skips = [h]
        for block in self.down:
            h = block(h, emb)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        for block, joins in zip(self.up, self.joins):
            h = block(torch.cat([h, skips.pop()], dim=1) if joins else h, emb)
        return self.out_conv(F.silu(self.out_norm(h)))


class Digits:
    shape, classes, batch = (1, 8, 8), 10, 128
    inputs, output = ["x", "sigma", "labels"], "denoised"
    card = {
        "sample": '"x"', "time": '"sigma"', "output": '"denoised"', "prediction": '"denoised"', "time_unit": '"sigma"',
        "shape": "[1, 8, 8]", "range": "[-1.0, 1.0]", "sigma_data": "0.5", "schedule.kind": '"edm"',
        "conditions.labels.kind": '"class-index"', "conditions.labels.classes": "10", "conditions.labels.null": "10",
    }  # fmt: skip

    @staticmethod
    def module():
        return digits.Denoiser()

    @staticmethod
    def denoise(net, x, sigma, labels):
        """x0 estimated from x = x0 + sigma e; sigma and labels [B]."""
        return net(x, sigma, labels)

    @staticmethod
    def generate(net, z, labels):
        """x0 from standard normal z in one step."""
        return net(80.0 * z, torch.full((len(z),), 80.0, device=z.device), labels)


class Edm:
    """A raw network with EDM's preconditioning around it."""

    inputs, output = ["x", "noise_labels", "classes"], "F"

    def denoise(self, net, x, sigma, labels):
        s = sigma[:, None, None, None]
        total = s * s + 0.25
        hot = F.one_hot(labels, self.classes).float()
        raw = net(x / total.sqrt(), sigma.log() / 4, hot)
        return 0.25 / total * x + 0.5 * s / total.sqrt() * raw.float()

    def generate(self, net, z, labels):
        return self.denoise(net, 80.0 * z, torch.full((len(z),), 80.0, device=z.device), labels)

    @property
    def card(self):
        return {
            "sample": '"x"', "time": '"noise_labels"', "output": '"F"', "prediction": '"edm-raw"', "time_unit": '"ln-sigma-4"',
            "shape": str(list(self.shape)), "range": "[-1.0, 1.0]", "sigma_data": "0.5", "schedule.kind": '"edm"',
            "conditions.classes.kind": '"one-hot"', "conditions.classes.classes": str(self.classes),
        }  # fmt: skip


class Cifar(Edm):
    shape, classes, batch = (3, 32, 32), 10, 2

    @staticmethod
    def module():
        return Unet(32, 128, 256, [2, 2, 2], 4, {16}, 10)


class Adm(Edm):
    shape, classes, batch = (3, 64, 64), 1000, 40

    @staticmethod
    def module():
        return Unet(64, 192, 768, [1, 2, 3, 4], 3, {32, 16, 8}, 1000, head=64)


class DitS:
    shape, classes, batch = (4, 32, 32), 1000, 4
    inputs, output = ["sample", "timestep", "label"], "velocity"
    card = {
        "sample": '"sample"', "time": '"timestep"', "output": '"velocity"', "prediction": '"flow"', "time_unit": '"thousand"',
        "shape": "[4, 32, 32]", "latent_scale": "0.5", "schedule.kind": '"flow"',
        "conditions.label.kind": '"class-index"', "conditions.label.classes": "1000", "conditions.label.null": "1000",
    }  # fmt: skip

    @staticmethod
    def module():
        return Dit(d=384, depth=12, heads=6, patch=2, size=32, features=256, classes=1000)

    @staticmethod
    def denoise(net, x, sigma, labels):
        s = sigma[:, None, None, None]
        x_t = x / (1 + s)
        return x_t - s / (1 + s) * net(x_t, 1000 * sigma / (1 + sigma), labels).float()

    @staticmethod
    def generate(net, z, labels):
        return z - net(z, torch.full((len(z),), 1000.0, device=z.device), labels).float()


NETWORKS = {"digits": Digits(), "cifar": Cifar(), "dit": DitS(), "adm": Adm()}


def build(name):
    """The native module with random weights, in evaluation mode."""
    torch.manual_seed(0)
    return randomise(NETWORKS[name].module(), 1)


def arguments(name, batch=3):
    """Inputs of the module."""
    net = NETWORKS[name]
    labels = torch.arange(batch)
    labels = F.one_hot(labels, net.classes).float() if isinstance(net, Edm) else labels
    time = torch.linspace(100.0, 900.0, batch) if name == "dit" else torch.linspace(0.5, 2.0, batch)
    return torch.randn(batch, *net.shape), time, labels


def main():
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    folder, names = Path(sys.argv[1]), sys.argv[2:] or ["digits", "cifar", "dit"]
    for name in names:
        net = NETWORKS[name]
        for exporter in ("legacy", "dynamo"):
            path = folder / f"{name}-{exporter}.onnx"
            if path.exists():
                continue
            print(f"exporting {path.name}", file=sys.stderr, flush=True)
            module = build(name)
            if exporter == "legacy":
                for part in module.modules():
                    if hasattr(part, "settle"):
                        part.settle()
            part = path.with_suffix(".part")
            opset = 17 if exporter == "legacy" else 20
            write(part, module, arguments(name), net.inputs, net.output, net.card, opset=opset, dynamo=exporter == "dynamo")
            part.rename(path)


if __name__ == "__main__":
    main()
