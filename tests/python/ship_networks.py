"""Teachers with random weights for the tests of what ships: a DDPM++-like network of CIFAR's size and a DiT.

    python ship_networks.py OUT

Writes OUT/<name>/teacher.onnx with the card in its metadata, for

    ddpmpp-dynamic  32x32x3, EDM-raw, positional embedding turned by a negative step, resampling by filters, attention
    ddpmpp-static   the same with a batch of 2, by the older exporter
    dit-dynamic     16x16x4 latents, rectified flow, patches, adaptive LayerNorm, attention; needs a decoder
    decoder         latents to 32x32x3 images, alone, for --decoder
"""

import math
import sys
import warnings
from pathlib import Path

import onnx
import torch
from torch import nn
from torch.nn import functional as F

FILTER = torch.tensor([1.0, 1.0])


class Resample(nn.Module):
    def __init__(self, channels, up):
        super().__init__()
        kernel = FILTER.ger(FILTER) / FILTER.sum() ** 2
        self.register_buffer("filter", (kernel * (4 if up else 1))[None, None].repeat(channels, 1, 1, 1))
        self.channels, self.up = channels, up

    def forward(self, x):
        if self.up:
            return F.conv_transpose2d(x, self.filter, groups=self.channels, stride=2)
        return F.conv2d(x, self.filter, groups=self.channels, stride=2)


class Block(nn.Module):
    def __init__(self, c_in, c_out, emb, resample=None, heads=0):
        super().__init__()
        self.norm0 = nn.GroupNorm(8, c_in, eps=1e-6)
        self.resample = None if resample is None else Resample(c_in, resample == "up")
        self.conv0 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.affine = nn.Linear(emb, 2 * c_out)
        self.norm1 = nn.GroupNorm(8, c_out, eps=1e-6)
        self.conv1 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1)
        self.heads = heads
        if heads:
            self.norm2 = nn.GroupNorm(8, c_out, eps=1e-6)
            self.qkv = nn.Conv2d(c_out, 3 * c_out, 1)
            self.proj = nn.Conv2d(c_out, c_out, 1)

    def forward(self, x, emb):
        h, skip = F.silu(self.norm0(x)), x
        if self.resample is not None:
            h, skip = self.resample(h), self.resample(skip)
        h = self.conv0(h)
        scale, shift = self.affine(emb)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        x = (self.conv1(h) + self.skip(skip)) * math.sqrt(0.5)
        if self.heads:
            b, c, height, width = x.shape
            q, k, v = self.qkv(self.norm2(x)).reshape(b * self.heads, c // self.heads, 3, height * width).unbind(2)
            w = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(c // self.heads)).softmax(dim=2)
            a = torch.einsum("nqk,nck->ncq", w, v).reshape(b, c, height, width)
            x = (self.proj(a) + x) * math.sqrt(0.5)
        return x


class Ddpmpp(nn.Module):
    """x [B,3,32,32] scaled by c_in, c_noise [B], one-hot class [B,10] -> F."""

    def __init__(self, c=32, emb=64):
        super().__init__()
        self.c = c
        self.map0, self.map1 = nn.Linear(c, emb), nn.Linear(emb, emb)
        self.label = nn.Linear(10, c, bias=False)
        self.conv_in = nn.Conv2d(3, c, 3, padding=1)
        self.down = nn.ModuleList([Block(c, c, emb), Block(c, c, emb, "down"), Block(c, 2 * c, emb, heads=1), Block(2 * c, 2 * c, emb, "down")])
        self.mid = Block(2 * c, 2 * c, emb, heads=1)
        self.up = nn.ModuleList([Block(2 * c, 2 * c, emb, "up"), Block(4 * c, 2 * c, emb, heads=1), Block(2 * c, c, emb, "up"), Block(2 * c, c, emb)])
        self.norm, self.conv_out = nn.GroupNorm(8, c, eps=1e-6), nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, x, noise, classes):
        freqs = (1 / 10000) ** (torch.arange(self.c // 2, dtype=torch.float32) / (self.c // 2 - 1))
        emb = noise.ger(freqs)
        emb = torch.cat([emb.cos(), emb.sin()], dim=1)
        emb = emb.reshape(emb.shape[0], 2, -1).flip(1).reshape(*emb.shape)
        emb = emb + self.label(classes * math.sqrt(10))
        emb = F.silu(self.map1(F.silu(self.map0(emb))))
        h0 = self.down[0](self.conv_in(x), emb)
        h2 = self.down[2](self.down[1](h0, emb), emb)
        h = self.mid(self.down[3](h2, emb), emb)
        h = self.up[1](torch.cat([self.up[0](h, emb), h2], dim=1), emb)
        h = self.up[3](torch.cat([self.up[2](h, emb), h0], dim=1), emb)
        return self.conv_out(F.silu(self.norm(h)))


class DitBlock(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.fc1, self.fc2 = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.ada = nn.Linear(d, 6 * d)
        self.norm1 = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)

    def forward(self, x, c):
        s1, k1, g1, s2, k2, g2 = self.ada(F.silu(c))[:, None].chunk(6, dim=2)
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x) * (1 + k1) + s1).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
        x = x + g1 * self.proj(a)
        return x + g2 * self.fc2(F.gelu(self.fc1(self.norm2(x) * (1 + k2) + s2), approximate="tanh"))


class Dit(nn.Module):
    """latents [B,4,16,16], time [B] in 0..1000, label [B] -> velocity."""

    def __init__(self, d=96, depth=3, heads=4, patch=2, size=16, features=64, classes=10):
        super().__init__()
        self.d, self.patch, self.grid, self.features = d, patch, size // patch, features
        self.embed = nn.Conv2d(4, d, patch, stride=patch)
        self.pos = nn.Parameter(torch.randn(1, self.grid**2, d) * 0.1)
        self.t0, self.t1 = nn.Linear(features, d), nn.Linear(d, d)
        self.label = nn.Embedding(classes + 1, d)
        self.blocks = nn.ModuleList([DitBlock(d, heads) for _ in range(depth)])
        self.norm, self.ada = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6), nn.Linear(d, 2 * d)
        self.out = nn.Linear(d, patch * patch * 4)

    def forward(self, sample, timestep, label):
        half = self.features // 2
        half = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half)
        angle = timestep[:, None] * half[None]
        c = self.t1(F.silu(self.t0(torch.cat([angle.cos(), angle.sin()], dim=1)))) + self.label(label)
        x = self.embed(sample).flatten(2).transpose(1, 2) + self.pos
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.ada(F.silu(c))[:, None].chunk(2, dim=2)
        x = self.out(self.norm(x) * (1 + scale) + shift)
        g, p = self.grid, self.patch
        return x.reshape(-1, g, g, p, p, 4).permute(0, 5, 1, 3, 2, 4).reshape(-1, 4, g * p, g * p)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, latent):
        h = F.silu(self.a(latent))
        return torch.tanh(self.c(F.silu(self.b(F.interpolate(h, scale_factor=2.0, mode="nearest")))))


def randomise(net, seed):
    """Weights as of a trained network: nothing at zero, activations of order one."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * (0.7 / math.sqrt(p[0].numel())) if p.dim() > 1 else p + 0.1 * torch.randn_like(p))
    return net.eval()


def write(path, net, args, inputs, output, card, opset=20, dynamo=True, dynamic=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    if dynamo:
        batch = torch.export.Dim("batch", min=1, max=4096)
        shapes = tuple({0: batch} for _ in args) if dynamic else None
        program = torch.onnx.export(
            net, args, dynamo=True, opset_version=opset, input_names=inputs, output_names=[output],
            dynamic_shapes=shapes, external_data=False, verbose=False,
        )  # fmt: skip
        model = program.model_proto
    else:
        axes = {name: {0: "batch"} for name in [*inputs, output]} if dynamic else None
        torch.onnx.export(
            net, args, str(path), dynamo=False, opset_version=opset, input_names=inputs, output_names=[output],
            dynamic_axes=axes, verbose=False,
        )  # fmt: skip
        model = onnx.load(path)
    for key, value in card.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = f"disback.{key}", value
    onnx.save(model, path)


def main():
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    edm = {
        "sample": '"x"', "time": '"noise_labels"', "output": '"F"', "prediction": '"edm-raw"', "time_unit": '"ln-sigma-4"',
        "shape": "[3, 32, 32]", "range": "[-1.0, 1.0]", "sigma_data": "0.5", "schedule.kind": '"edm"',
        "conditions.classes.kind": '"one-hot"', "conditions.classes.classes": "10",
    }  # fmt: skip
    net = randomise(Ddpmpp(), 1)
    hot = F.one_hot(torch.arange(3) % 10, 10).float()
    args = (torch.randn(3, 3, 32, 32), torch.linspace(-1, 1, 3), hot)
    names = ["x", "noise_labels", "classes"]
    write(out / "ddpmpp-dynamic/teacher.onnx", net, args, names, "F", edm)
    two = tuple(a[:2] for a in args)
    write(out / "ddpmpp-static/teacher.onnx", net, two, names, "F", edm, opset=17, dynamo=False, dynamic=False)
    flow = {
        "sample": '"sample"', "time": '"timestep"', "output": '"velocity"', "prediction": '"flow"', "time_unit": '"thousand"',
        "shape": "[4, 16, 16]", "latent_scale": "0.5", "schedule.kind": '"flow"',
        "conditions.label.kind": '"class-index"', "conditions.label.classes": "10", "conditions.label.null": "10",
    }  # fmt: skip
    args = (torch.randn(3, 4, 16, 16), torch.tensor([100.0, 500.0, 900.0]), torch.arange(3))
    write(out / "dit-dynamic/teacher.onnx", randomise(Dit(), 2), args, ["sample", "timestep", "label"], "velocity", flow)
    write(out / "decoder/decoder.onnx", randomise(Decoder(), 3), (torch.randn(3, 4, 16, 16),), ["latent"], "image", {})


if __name__ == "__main__":
    main()
