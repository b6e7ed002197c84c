"""Small networks as people's exporters write them, one folder each with a card: python exported_networks.py FOLDER

free: the length of a text is a free dimension, as in Stable Diffusion's files by diffusers' script and optimum.
baked-1, baked-2: the batch is declared free, but its number stands in the graph.
halves: the first half of the batch is used twice (forward_with_cfg).
bn: BatchNormalization in training mode. means: statistics over the batch.
mask: a condition of type bool. ids: an input without a batch dimension.
inputs: weights are listed among the graph's inputs.
f64: computed in double precision.
joined: a sequence whose steps of 9 channels are 4 of the sample's and 5 of what its caller joins to them.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

FOLDER = Path(sys.argv[1])
CARD = """sample = "x"
time = "t"
output = "out"
prediction = "epsilon"
time_unit = "step"
shape = [1, 8, 8]
[schedule]
kind = "vp"
betas = "linear"
"""


class Network(nn.Module):
    """x [B, 1, 8, 8], t [B]."""

    def __init__(self, channels=1):
        super().__init__()
        self.first, self.time, self.last = nn.Conv2d(channels, 8, 3, padding=1), nn.Linear(1, 8), nn.Conv2d(8, 1, 3, padding=1)

    def features(self, x, t):
        return self.first(x) + self.time(t.to(x.dtype)[:, None] / 1000)[:, :, None, None]

    def forward(self, x, t):
        return self.last(nn.functional.silu(self.features(x, t)))


class Text(Network):
    """Attends to rows of text [B, length, 6]; a mask [B, length] says which count."""

    def __init__(self):
        super().__init__()
        self.keys = nn.Linear(6, 8)

    def forward(self, x, t, text, mask):
        h, k = self.features(x, t), self.keys(text)
        scores = h.flatten(2).transpose(1, 2) @ k.transpose(1, 2) + (1 - mask[:, None]) * -1e4
        return self.last(h + (torch.softmax(scores, -1) @ k).transpose(1, 2).reshape(h.shape))


class Baked(Network):
    def __init__(self, batch):
        super().__init__()
        self.batch = batch

    def forward(self, x, t):
        return super().forward(x, t).reshape(self.batch, 64).reshape(self.batch, 1, 8, 8)


class Halves(Network):
    def forward(self, x, t):
        half = x[: x.shape[0] // 2]
        first, second = super().forward(torch.cat([half, half]), t).chunk(2)
        both = second + 4 * (first - second)
        return torch.cat([both, both])


class Norm(Network):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x, t):
        return self.last(torch.relu(self.norm(self.features(x, t))))


class Means(Network):
    def forward(self, x, t):
        h = self.features(x, t)
        return self.last(nn.functional.silu(h - h.mean(0, keepdim=True)))


class Mask(Network):
    """mask [B, 1, 8, 8], bool, beside the sample."""

    def __init__(self):
        super().__init__(2)

    def forward(self, x, t, mask):
        return super().forward(torch.cat([x, mask.float()], 1), t)


class Positions(Network):
    """ids [64, 3], one row a pixel, the same in every call."""

    def __init__(self):
        super().__init__()
        self.place = nn.Linear(3, 1)

    def forward(self, x, t, ids):
        return super().forward(x + self.place(ids).reshape(1, 1, 8, 8), t)


class Tokens(Network):
    """tokens [B, 5], int64 numbers of words, beside the sample."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 64)

    def forward(self, x, t, tokens):
        return super().forward(x + self.words(tokens).mean(1).reshape(-1, 1, 8, 8), t)


class Joined(nn.Module):
    """x [B, 6, 9] gives [B, 6, 4]."""

    def __init__(self):
        super().__init__()
        self.first, self.time, self.last = nn.Linear(9, 16), nn.Linear(1, 16), nn.Linear(16, 4)

    def forward(self, x, t):
        return self.last(torch.tanh(self.first(x) + self.time(t.to(x.dtype)[:, None] / 1000)[:, None]))


def save(name, network, inputs, card=CARD, dims=None, fixed=False, **options):
    """One export with its card; `fixed`: for the batch of the inputs alone."""
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    names = list(inputs)
    free = {} if fixed else {n: {0: "batch"} | (dims or {}).get(n, {}) for n in [*names, "out"] if n != "ids"}
    torch.onnx.export(
        network if options.get("training") else network.eval(), tuple(inputs.values()), str(folder / "teacher.onnx"), input_names=names, output_names=["out"],
        dynamic_axes=free, opset_version=17, dynamo=False, **options,
    )  # fmt: skip
    (folder / "teacher.card.toml").write_text(card)
    return folder


def main():
    torch.manual_seed(0)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 500])
    text = {"x": x, "t": t, "text": torch.randn(2, 7, 6), "mask": torch.ones(2, 7)}
    free = {"x": {2: "height", 3: "width"}, "text": {1: "sequence"}, "mask": {1: "sequence"}, "out": {2: "height", 3: "width"}}
    conditions = '[conditions.text]\nkind = "embedding"\n[constants]\nmask = 1.0\n'
    folder = save("free", Text(), text, card=CARD + conditions, dims=free)
    rows = np.random.default_rng(0).standard_normal((16, 7, 6)).astype(np.float32)
    np.savez(folder / "rows.npz", text=rows)
    np.savez(folder / "longer.npz", text=np.concatenate([rows, rows], 1))
    for batch in (1, 2):
        save(f"baked-{batch}", Baked(batch), {"x": x[:batch], "t": t[:batch]})
    save("halves", Halves(), {"x": torch.cat([x, x]), "t": torch.tensor([3] * 4)})
    save("inputs", Network(), {"x": x, "t": t}, keep_initializers_as_inputs=True)
    save("bn", Norm().train(), {"x": x, "t": t}, training=torch.onnx.TrainingMode.TRAINING, do_constant_folding=False)
    save("means", Means(), {"x": x, "t": t})
    mask = '[conditions.mask]\nkind = "embedding"\nshape = [1, 8, 8]\n'
    folder = save("mask", Mask(), {"x": x, "t": t, "mask": torch.rand(2, 1, 8, 8) > 0.5}, card=CARD + mask)
    np.savez(folder / "rows.npz", mask=np.random.default_rng(0).random((8, 1, 8, 8)) > 0.5)
    at = torch.arange(64)
    ids = torch.stack([torch.zeros(64), at // 8, at % 8], -1).float()
    folder = save("ids", Positions(), {"x": x, "t": t, "ids": ids}, card=CARD + '[conditions.ids]\nkind = "constant"\nfile = "ids.npy"\n')
    np.save(folder / "ids.npy", ids.numpy())
    words = '[conditions.tokens]\nkind = "embedding"\nshape = [5]\nnull = "zeros"\n'
    tokens = {"x": torch.cat([x, x[:1]]), "t": torch.tensor([3, 500, 9]), "tokens": torch.arange(15).reshape(3, 5) % 7}
    folder = save("fixed", Tokens(), tokens, card=CARD + words, fixed=True)
    np.savez(folder / "rows.npz", tokens=np.random.default_rng(0).integers(0, 7, (8, 5)))
    seen = 'layout = "channels-last"\nconcat = ["x", "seen"]\n[schedule]'
    card = CARD.replace("[1, 8, 8]", "[6, 4]").replace("[schedule]", seen) + '[conditions.seen]\nkind = "embedding"\nshape = [6, 5]\n'
    folder = save("joined", Joined(), {"x": torch.randn(2, 6, 9), "t": t}, card=card)
    np.savez(folder / "rows.npz", seen=np.random.default_rng(0).standard_normal((8, 6, 5)).astype(np.float32))
    save("f64", Network().double(), {"x": x.double(), "t": t})


main()
