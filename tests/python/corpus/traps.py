"""A network of everything that makes weights hard to tell from other tensors, in an export."""

import torch
from torch import nn
from torch.nn import functional as F


def sinusoids(length, channels):
    angles = torch.arange(length)[:, None] / 100 ** (torch.arange(channels // 2)[None, :] / (channels // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Traps(nn.Module):
    """tokens [B,5] int64, x [B,5,8] -> [B,5,20]."""

    def __init__(self, channels=8, words=20, length=5):
        super().__init__()
        c = channels
        # one matrix, read as it is and transposed
        self.words = nn.Embedding(words, c)
        # added to features: one learned, two not
        self.position = nn.Parameter(torch.randn(1, length, c) * 0.02)
        self.register_buffer("table", sinusoids(length, c)[None])
        self.register_buffer("causal", torch.full((length, length), float("-inf")).triu(1))
        # added to scores, and learned
        self.relative = nn.Parameter(torch.randn(1, length, length) * 0.02)
        # cosines and sines that multiply features
        angles = torch.outer(torch.arange(length).float(), 1 / 10 ** torch.arange(c // 2).float()).repeat(1, 2)
        self.register_buffer("turn_cos", angles.cos())
        self.register_buffer("turn_sin", angles.sin())
        # norms with and without weights; one of them called twice
        self.norm_affine = nn.LayerNorm(c)
        self.norm_plain = nn.LayerNorm(c, elementwise_affine=False)
        self.norm_twice = nn.LayerNorm(c)
        self.norm_other = nn.LayerNorm(c)
        self.group = nn.GroupNorm(2, c)
        self.group_plain = nn.GroupNorm(2, c, affine=False)
        self.batch = nn.BatchNorm1d(c)
        self.q, self.k, self.v = nn.Linear(c, c, bias=False), nn.Linear(c, c), nn.Linear(c, c)
        # one layer, called twice
        self.shared = nn.Linear(c, c, bias=False)
        # weights read as they are and squared, which exporters fold
        self.mixed = nn.Linear(c, c, bias=False)
        self.depthwise = nn.Conv1d(c, c, 3, padding=1, groups=c)
        self.register_buffer("blur", (torch.tensor([1.0, 2.0, 1.0]) / 4).expand(c, 1, 3).contiguous())
        self.gamma = nn.Parameter(torch.full((c,), 0.1))
        self.gate = nn.Parameter(torch.zeros(c))
        self.logit_scale = nn.Parameter(torch.tensor(0.7))
        self.prelu = nn.PReLU(c)
        self.register_token = nn.Parameter(torch.randn(1, 1, c) * 0.02)
        self.null = nn.Parameter(torch.randn(c) * 0.02)

    def forward(self, tokens, x):
        c = x.shape[2]
        h = self.words(tokens) + self.position
        h = h + self.v(torch.where((tokens > 12)[:, :, None], self.null, x))
        h = h + self.table
        n = self.norm_plain(h)
        half = torch.cat([-n[..., c // 2 :], n[..., : c // 2]], dim=-1)
        n = n * self.turn_cos + half * self.turn_sin
        scores = self.q(n) @ self.k(n).transpose(1, 2) * self.logit_scale + self.relative + self.causal
        h = h + self.gamma * (torch.softmax(scores, dim=-1) @ self.norm_affine(h))
        h = h + self.shared(self.norm_twice(h)) + self.shared(F.silu(self.norm_twice(h + self.norm_other(h.flip(1)))))
        h = h + self.mixed(n) * torch.rsqrt(F.linear(n * n, self.mixed.weight * self.mixed.weight) + 1)
        t = h.transpose(1, 2)
        t = t + F.conv1d(t, self.depthwise.weight * self.depthwise.weight, padding=1, groups=c)
        t = self.prelu(self.group(self.depthwise(t))) + F.conv1d(self.group_plain(t), self.blur, padding=1, groups=c)
        h = h + self.gate * self.batch(t).transpose(1, 2)
        h = torch.cat([self.register_token.expand(h.shape[0], -1, -1), h], dim=1)
        h = self.norm_plain(h * h.mean(dim=1, keepdim=True).exp())[:, 1:]
        return F.linear(h, self.words.weight)
