"""A small denoiser with a condition, for the tests of the converter."""

import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.label = nn.Embedding(4, 8)
        self.time = nn.Linear(1, 8)
        self.conv_in = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.conv_out = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x, sigma, labels):
        emb = self.time(sigma[:, None].log()) + self.label(labels)
        h = self.conv_in(x) + emb[:, :, None, None]
        return self.conv_out(nn.functional.silu(self.norm(h)))


def build():
    torch.manual_seed(0)
    return Tiny()


def build_with_inputs():
    return build(), {"x": torch.randn(2, 1, 8, 8), "sigma": torch.tensor([0.5, 2.0]), "labels": torch.tensor([1, 3])}


def build_nan():
    net = build()
    with torch.no_grad():
        net.conv_out.bias.fill_(float("nan"))
    return net


def not_a_module():
    return 3


class Square(nn.Module):
    """Square matrices everywhere, read as they are and the other way round; packed projections that the exporter has to split,
    scales that it folds into weights, values that equal their own transpose."""

    def __init__(self, c=16):
        super().__init__()
        self.conv_in, self.conv_out, self.time = nn.Conv2d(1, c, 3, padding=1), nn.Conv2d(c, 1, 3, padding=1), nn.Linear(1, c)
        self.q, self.k, self.v, self.out = (nn.Linear(c, c) for _ in range(4))
        self.own = nn.MultiheadAttention(c, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(c, 2, batch_first=True)
        self.scaled = nn.Parameter(torch.randn(c, c))  # twice, with two scales
        self.gain = nn.Parameter(torch.ones(c))
        self.three = nn.Parameter(torch.randn(3, c, c))  # one tensor of three matrices
        self.packed = nn.Linear(c, 3 * c, bias=False)
        self.eye, self.eye_too = nn.Parameter(torch.eye(c)), nn.Parameter(torch.eye(c))
        self.zero = nn.Linear(c, c)
        nn.init.zeros_(self.zero.weight)

    def forward(self, x, sigma):
        h = self.conv_in(x) + self.time(sigma[:, None].log())[:, :, None, None]
        c, height, width = h.shape[1:]
        z = h.flatten(2).transpose(1, 2)
        a = nn.functional.scaled_dot_product_attention(self.q(z)[:, None], self.k(z)[:, None], self.v(z)[:, None])[:, 0]
        z = z + self.out(a) + self.own(z, z, z, need_weights=False)[0]
        z = z + self.cross(z, z[:, :5], z[:, :5], need_weights=False)[0]
        z = z + nn.functional.linear(z, self.scaled * 0.125) + 0.1 * z @ (self.scaled / 3.0**0.5)
        z = z * (self.gain * 0.7) + 0.1 * z @ self.three[0] + z @ (self.three[1] * 0.05).T + nn.functional.linear(z, self.three[2]) * 0.1
        q, k, v = self.packed.weight.chunk(3)
        z = z + (nn.functional.linear(z, q) + z @ k + z @ v.T) * 0.1
        z = z + z @ self.eye + z @ self.eye_too.T + self.zero(z)
        return self.conv_out(z.transpose(1, 2).reshape(-1, c, height, width))


def build_square():
    torch.manual_seed(0)
    net = Square()
    nn.init.normal_(net.cross.in_proj_bias)
    return net


def build_product():
    """What is no multiple of one weight: a product of two."""
    torch.manual_seed(0)
    net = Tiny()

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.matrix, self.rows = net, nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.rand(8))

        def forward(self, x, sigma, labels):
            return self.net(x, sigma, labels) + x @ (self.matrix * self.rows)

    return Product()


class Begun(nn.Module):
    """As training begins: norms of ones and zeros, a last layer of nothing, and weights that nothing reads."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.time, self.norms = nn.Linear(1, 8), nn.ModuleList(nn.GroupNorm(2, 8) for _ in range(2))
        self.spare = nn.GroupNorm(2, 8)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x, sigma):
        frequencies = (torch.arange(1, dtype=x.dtype) - 3).exp()  # a constant that is no weight
        h = self.norms[0](self.first(x)) + self.time(sigma[:, None].log() * frequencies)[:, :, None, None]
        return self.last(nn.functional.silu(self.norms[1](h)))


def build_begun():
    torch.manual_seed(0)
    return Begun()
