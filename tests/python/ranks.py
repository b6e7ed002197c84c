"""Small networks whose samples are no images, one folder each with a card: python ranks.py FOLDER

table [B, 9], with a learned variance; wave [B, 64]; policy [B, 16, 7], turned round for its convolutions, with an observation;
mel [B, 8, free]; points [B, 24, 3]; volume [B, 1, 4, 8, 8]; video [B, 4, 3, 8, 8], frames first; tokens [B, 6, 8], a transformer.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

FOLDER = Path(sys.argv[1])
CARD = """sample = "x"
time = "t"
output = "out"
prediction = "epsilon"
time_unit = "step"
{own}
[schedule]
kind = "vp"
betas = "linear"
{more}
"""


class Network(nn.Module):
    """`inside`: what is between a first and a last layer; `turn` puts the channels where these layers want them."""

    def __init__(self, first, last, width, turn=None, condition=0):
        super().__init__()
        self.first, self.last, self.turn = first, last, turn
        self.time = nn.Linear(1, width)
        self.condition = nn.Linear(condition, width) if condition else None

    def forward(self, x, t, observation=None):
        x = x.permute(self.turn) if self.turn else x
        effect = self.time(t.to(x.dtype)[:, None] / 1000)
        if self.condition is not None:
            effect = effect + self.condition(observation)
        h = self.first(x)
        linear = isinstance(self.last, nn.Linear)
        shape = (-1, *[1] * (h.dim() - 2), effect.shape[1]) if linear else (-1, effect.shape[1], *[1] * (h.dim() - 2))
        y = self.last(F.silu(h + effect.reshape(shape)))
        # (All of these are their own inverses.)
        return y.permute(self.turn) if self.turn else y


class Cloud(nn.Module):
    """PointNet's: what the whole cloud has at most is joined to each point's own features."""

    def __init__(self):
        super().__init__()
        self.first, self.time, self.whole, self.last = nn.Linear(3, 16), nn.Linear(1, 16), nn.Linear(16, 8), nn.Linear(24, 3)

    def forward(self, x, t):
        h = F.silu(self.first(x) + self.time(t.to(x.dtype)[:, None] / 1000)[:, None])
        whole = self.whole(h).max(1, keepdim=True).values
        return self.last(torch.cat([h, whole.expand(-1, x.shape[1], -1)], -1))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.time = nn.Linear(8, 16), nn.Linear(1, 16)
        self.qkv, self.outer = nn.Linear(16, 48), nn.Linear(16, 8)

    def forward(self, x, t):
        h = self.inner(x) + self.time(t.to(x.dtype)[:, None] / 1000)[:, None]
        q, k, v = self.qkv(h).chunk(3, -1)
        return self.outer(h + torch.softmax(q @ k.transpose(1, 2) / 4, -1) @ v)


def save(name, network, shape, own, more="", free=(), observation=0, real=None):
    torch.manual_seed(1)
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    inputs, names = [torch.randn(2, *shape), torch.tensor([3, 500])], ["x", "t"]
    if observation:
        inputs.append(torch.randn(2, observation))
        names.append("observation")
    axes = {n: {0: "batch"} for n in (*names, "out")}
    for axis in free:
        axes["x"][axis] = axes["out"][axis] = "length"
    torch.onnx.export(network.eval(), tuple(inputs), str(folder / "teacher.onnx"), input_names=names, output_names=["out"],
                      dynamic_axes=axes, opset_version=17, dynamo=False)
    (folder / "teacher.card.toml").write_text(CARD.format(own=own, more=more))
    rng = np.random.default_rng(0)
    arrays = {"samples": rng.normal(0, 0.5, (40, *(real or shape))).astype("f4")}
    if observation:
        arrays["observation"] = rng.normal(size=(40, observation)).astype("f4")
        np.savez(folder / "rows.npz", observation=arrays["observation"])
        np.save(folder / "observation.npy", arrays["observation"][:5])
    np.savez(folder / "real.npz", **arrays)


torch.manual_seed(0)
conv1, conv3 = [lambda a, b, c=c: c(a, b, 3, padding=1) for c in (nn.Conv1d, nn.Conv3d)]
save("table", Network(nn.Linear(9, 16), nn.Linear(16, 18), 16), (9,), "shape = [9]")
save("wave", Network(nn.Linear(64, 16), nn.Linear(16, 64), 16), (64,), "shape = [64]\nsample_rate = 8000\nrange = [-1.0, 1.0]")
save("policy", Network(conv1(7, 16), conv1(16, 7), 16, [0, 2, 1], 5), (16, 7), 'shape = [16, 7]\nlayout = "channels-last"',
     '[conditions.observation]\nkind = "embedding"\nshape = [5]', observation=5)
save("mel", Network(conv1(8, 16), conv1(16, 8), 16), (8, 12), "shape = [8, 20]", free=[2], real=(8, 20))
save("points", Cloud(), (24, 3),
     'shape = [24, 3]\nlayout = "channels-last"\nmodality = "points"')
save("volume", Network(conv3(1, 8), conv3(8, 1), 8), (1, 4, 8, 8), "shape = [1, 4, 8, 8]")
save("video", Network(conv3(3, 8), conv3(8, 3), 8, [0, 2, 1, 3, 4]), (4, 3, 8, 8),
     'shape = [4, 3, 8, 8]\nlayout = "frames-first"')
save("tokens", Transformer(), (6, 8), 'shape = [6, 8]\nlayout = "channels-last"')


def generator(name, network, noise):
    torch.onnx.export(network, (torch.randn(2, *noise),), str(FOLDER / name / "generator.onnx"), input_names=["z"],
                      output_names=["sample"], dynamic_axes={"z": {0: "batch"}, "sample": {0: "batch"}}, opset_version=17, dynamo=False)


generator("table", nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 9)), (5,))
generator("points", nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3)), (24, 3))
