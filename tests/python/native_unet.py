"""Reference cases for the importer: small UNets as both PyTorch exporters write them, with native values and gradients.

    python native_unet.py OUT [--only SUBSTRING] [--list]

Every case is a folder OUT/<network>-<exporter>-opset<k>-<static|dynamic>/ with

    model.onnx          the exported graph
    inputs.npz          one array per graph input
    expected.npz        one array per graph output, computed by the native module
    grads.safetensors   `R`, and for every native parameter the gradient of sum(output * R), under its native name
    map.json            [{"onnx": initializer or Constant output, "native": name, "natives": [names], "transposed": bool}]

`natives` has several names where the exporter merged parameters with equal bytes (network `fresh`). A native parameter
and its initializer have the same elements in the same order unless `transposed`; shapes may differ ([C] and [C,1,1]).
OUT/cases.json lists the folders. Fails if a parameter of the module cannot be found in the graph.
"""

import argparse
import json
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "digits"))
from model import Denoiser  # noqa: E402


class Transformer(nn.Module):
    """GroupNorm, then LayerNorm-attention and LayerNorm-GELU blocks over the pixels, as diffusers arranges them."""

    def __init__(self, channels, heads, explicit):
        super().__init__()
        self.heads, self.explicit = heads, explicit
        self.norm = nn.GroupNorm(4, channels, eps=1e-6)
        self.norm1 = nn.LayerNorm(channels)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.ff1 = nn.Linear(channels, 2 * channels)
        self.ff2 = nn.Linear(2 * channels, channels)

    def forward(self, x):
        b, c, h, w = x.shape
        t = self.norm(x).flatten(2).transpose(1, 2)
        n = self.norm1(t)
        q, k, v = (f(n).view(b, h * w, self.heads, c // self.heads).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        if self.explicit:
            y = torch.softmax(q @ k.transpose(-1, -2) * (c // self.heads) ** -0.5, dim=-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        t = t + self.to_out(y.transpose(1, 2).reshape(b, h * w, c))
        t = t + self.ff2(F.gelu(self.ff1(self.norm2(t))))
        return x + t.transpose(1, 2).reshape(b, c, h, w)


class Block(nn.Module):
    def __init__(self, c_in, c_out, emb):
        super().__init__()
        self.norm1 = nn.GroupNorm(4, c_in, eps=1e-5)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(emb, c_out)
        self.norm2 = nn.GroupNorm(4, c_out, eps=1e-5)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class DiffusersLike(nn.Module):
    """sample [B,3,16,16], timestep [B] f32 (0..999), class_labels [B] int64 -> out_sample [B,3,16,16] (epsilon)."""

    def __init__(self, channels=16, emb=32, classes=5):
        super().__init__()
        c = channels
        self.channels = c
        self.linear_1 = nn.Linear(c, emb)
        self.linear_2 = nn.Linear(emb, emb)
        self.class_embedding = nn.Embedding(classes, emb)
        self.conv_in = nn.Conv2d(3, c, 3, padding=1)
        self.down0 = Block(c, c, emb)
        self.downsample0 = nn.Conv2d(c, c, 3, stride=2, padding=1)
        self.down1 = Block(c, 2 * c, emb)
        self.attn1 = Transformer(2 * c, 4, explicit=False)
        self.mid = Block(2 * c, 2 * c, emb)
        self.mid_attn = Transformer(2 * c, 2, explicit=True)
        self.upsample1 = nn.ConvTranspose2d(2 * c, 2 * c, 2, stride=2)
        self.up1 = Block(4 * c, 2 * c, emb)
        self.upsample0 = nn.Conv2d(2 * c, c, 3, padding=1)
        self.up0 = Block(2 * c, c, emb)
        self.conv_norm_out = nn.GroupNorm(4, c, eps=1e-5)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

    def time_embedding(self, timestep):
        half = self.channels // 2
        exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
        angles = timestep[:, None].float() * torch.exp(exponent)[None, :]
        emb = torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)
        return torch.cat([emb[:, half:], emb[:, :half]], dim=-1)

    def forward(self, sample, timestep, class_labels):
        emb = self.linear_2(F.silu(self.linear_1(self.time_embedding(timestep))))
        emb = emb + self.class_embedding(class_labels)
        h0 = self.down0(self.conv_in(sample), emb)
        h1 = self.attn1(self.down1(self.downsample0(h0), emb))
        h = F.avg_pool2d(h1, 2)
        h = self.mid_attn(self.mid(h, emb))
        h = self.up1(torch.cat([self.upsample1(h), h1], dim=1), emb)
        h = self.upsample0(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        h = self.up0(torch.cat([h, h0], dim=1), emb)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


def build(name):
    """-> (module, names of the inputs, name of the output, function batch -> inputs)."""
    torch.manual_seed(sum(map(ord, name)))
    if name == "digits":
        net = Denoiser(channels=(16, 16, 32), emb=32)

        def draw(batch):
            sigma = torch.exp(torch.linspace(-5.0, 4.0, batch))
            return torch.randn(batch, 1, 8, 8) * (0.25 + sigma[:, None, None, None] ** 2).sqrt(), sigma, torch.arange(batch) * 5 % 11

        inputs, output = ["x", "sigma", "labels"], "denoised"
    else:
        net = DiffusersLike()

        def draw(batch):
            return torch.randn(batch, 3, 16, 16), torch.linspace(0, 999, batch).round(), torch.arange(batch) * 2 % 5

        inputs, output = ["sample", "timestep", "class_labels"], "out_sample"
    if name != "fresh":  # as after a training: no two parameters alike, nothing at 0 or 1
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1 * parameter.std(correction=0).clamp_min(0.5) * torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 1.0))
    return net.eval(), inputs, output, draw


def export(net, args, path, exporter, opset, dynamic, inputs, output):
    if exporter == "dynamo":
        # one Dim for all: the batch is the same number everywhere
        batch = torch.export.Dim("batch", min=1, max=4096)
        shapes = tuple({0: batch} for _ in args) if dynamic else None
        program = torch.onnx.export(
            net, args, dynamo=True, opset_version=opset, input_names=inputs, output_names=[output],
            dynamic_shapes=shapes, external_data=False, verbose=False,
        )  # fmt: skip
        onnx.save(program.model_proto, path)
    else:
        axes = {name: {0: "batch"} for name in [*inputs, output]} if dynamic else None
        torch.onnx.export(
            net, args, str(path), dynamo=False, opset_version=opset, input_names=inputs, output_names=[output],
            dynamic_axes=axes, verbose=False,
        )  # fmt: skip


def find_parameters(model, net):
    """Matches the floating initializers and Constants of the graph with native parameters, by bytes."""
    tensors = [(t.name, numpy_helper.to_array(t)) for t in model.graph.initializer]
    for node in model.graph.node:
        if node.op_type == "Constant":
            tensors += [(node.output[0], numpy_helper.to_array(a.t)) for a in node.attribute if a.name == "value"]
    plain, turned = {}, {}
    for name, parameter in net.named_parameters():
        value = parameter.detach().numpy()
        plain.setdefault(value.tobytes(), []).append(name)
        if value.ndim == 2:
            turned.setdefault(np.ascontiguousarray(value.T).tobytes(), []).append(name)
    found, seen = [], set()
    for name, value in tensors:
        if value.dtype != np.float32:
            continue
        data = value.tobytes()
        natives, transposed = (plain[data], False) if data in plain else (turned.get(data, []), True)
        if natives:
            found.append({"onnx": name, "native": natives[0], "natives": natives, "transposed": transposed})
            seen.update(natives)
    missing = [name for name, _ in net.named_parameters() if name not in seen]
    if missing:
        raise SystemExit(f"parameters that are not in the graph: {missing}")
    return found


def write_case(folder, name, exporter, opset, dynamic):
    folder.mkdir(parents=True, exist_ok=True)
    net, inputs, output, draw = build(name)
    args = draw(3)
    path = folder / "model.onnx"
    export(net, args, path, exporter, opset, dynamic, inputs, output)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    mapping = find_parameters(model, net)
    if dynamic:
        args = draw(5)
    values = net(*args)
    weight = torch.randn_like(values)
    net.zero_grad()
    (values * weight).sum().backward()
    grads = {key: p.grad.contiguous() for key, p in net.named_parameters()}
    arrays = {key: arg.numpy() for key, arg in zip(inputs, args)}
    runner = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = float(np.abs(runner.run([output], arrays)[0] - values.detach().numpy()).max())
    if worst > 1e-3:
        raise SystemExit(f"{folder.name}: ONNX Runtime differs from torch by {worst}")
    np.savez(folder / "inputs.npz", **arrays)
    np.savez(folder / "expected.npz", **{output: values.detach().numpy()})
    save_file(grads | {"R": weight}, folder / "grads.safetensors")
    (folder / "map.json").write_text(json.dumps(mapping, indent=1))
    count = sum(p.numel() for p in net.parameters())
    print(f"{folder.name}: {len(model.graph.node)} nodes, {count} parameters, ONNX Runtime differs by {worst:.1e}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    modes = [("dynamo", 18, True), ("dynamo", 20, False), ("dynamo", 20, True), ("dynamo", 23, False), ("dynamo", 23, True)]
    modes += [("legacy", 17, False), ("legacy", 17, True), ("legacy", 18, True)]
    cases = [(name, *mode) for name in ("digits", "diffusers") for mode in modes]
    cases += [("fresh", "dynamo", 20, True), ("fresh", "legacy", 17, False)]
    names = {f"{n}-{e}-opset{o}-{'dynamic' if d else 'static'}": (n, e, o, d) for n, e, o, d in cases}
    names = {key: case for key, case in names.items() if args.only in key}
    if args.list:
        print("\n".join(names))
        return
    for key, case in names.items():
        write_case(args.out / key, *case)
    (args.out / "cases.json").write_text(json.dumps(list(names)))


if __name__ == "__main__":
    main()
