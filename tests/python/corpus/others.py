"""Denoisers in the manner of other families than diffusers has, in our own words and at small sizes.

Each is a plain module of positional tensors. What their exports bring: learned tokens and long skips (U-ViT), rotary
embedding over two axes and gated adaptive norms (DiT), depthwise blocks with norms over channels, response norms, linear
attention and standardised weights (ConvNeXt U-Net), preconditioning and half-split attention (consistency model), weights
normalised when the network runs (EDM2), shifted windows with a table of relative positions (Swin), branches and loops.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def waves(t, channels):
    frequencies = torch.exp(-math.log(1000) * torch.arange(channels // 2, dtype=torch.float32) / (channels // 2))
    angles = t[:, None].float() * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(t.dtype)


def heads_of(x, heads):
    b, n, c = x.shape
    return x.reshape(b, n, heads, c // heads).transpose(1, 2)


def joined(x):
    return x.transpose(1, 2).flatten(2)


class UVit(nn.Module):
    """x [B,3,8,8], t [B], y [B] int64 -> [B,3,8,8]: time and class are tokens, skips are concatenated."""

    def __init__(self, c=16, heads=2, classes=5):
        super().__init__()
        self.heads = heads
        self.patch = nn.Conv2d(3, c, 2, 2)
        self.label = nn.Embedding(classes, c)
        self.time = nn.Sequential(nn.Linear(c, 2 * c), nn.SiLU(), nn.Linear(2 * c, c))
        self.position = nn.Parameter(torch.randn(1, 18, c) * 0.02)
        self.blocks = nn.ModuleList([self.block(c, k == 2) for k in range(3)])
        self.norm, self.out = nn.LayerNorm(c), nn.Linear(c, 12)
        self.last = nn.Conv2d(3, 3, 3, padding=1)

    @staticmethod
    def block(c, skip):
        parts = {"n1": nn.LayerNorm(c), "qkv": nn.Linear(c, 3 * c, bias=False), "proj": nn.Linear(c, c), "n2": nn.LayerNorm(c)}
        parts |= {"up": nn.Linear(c, 4 * c), "down": nn.Linear(4 * c, c)} | ({"skip": nn.Linear(2 * c, c)} if skip else {})
        return nn.ModuleDict(parts)

    def run(self, b, x, skip=None):
        if skip is not None:
            x = b["skip"](torch.cat([x, skip], dim=-1))
        q, k, v = (heads_of(p, self.heads) for p in b["qkv"](b["n1"](x)).chunk(3, dim=-1))
        x = x + b["proj"](joined(F.scaled_dot_product_attention(q, k, v)))
        return x + b["down"](F.gelu(b["up"](b["n2"](x))))

    def forward(self, x, t, y):
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        time = self.time(waves(t, tokens.shape[-1]))[:, None]
        h = torch.cat([time, self.label(y)[:, None], tokens], dim=1) + self.position
        first = self.run(self.blocks[0], h)
        h = self.run(self.blocks[2], self.run(self.blocks[1], first), first)
        h = self.out(self.norm(h))[:, 2:]
        h = h.reshape(-1, 4, 4, 2, 2, 3).permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, 8, 8)
        return self.last(h)


class Rms(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(c))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale


class RopeDit(nn.Module):
    """x [B,4,8,8], t [B], text [B,5,12], mask [B,5] bool -> [B,4,8,8]: rotary embedding over rows and columns."""

    def __init__(self, c=16, heads=2, depth=2):
        super().__init__()
        self.heads, self.head = heads, c // heads
        self.patch = nn.Linear(16, c)
        self.time = nn.Sequential(nn.Linear(c, c), nn.SiLU(), nn.Linear(c, c))
        self.text = nn.Linear(12, c)
        self.modulation = nn.Linear(c, 6 * c)
        parts = lambda: {  # noqa: E731
            "q": nn.Linear(c, c, bias=False), "kv": nn.Linear(c, 2 * c, bias=False), "qn": Rms(self.head), "kn": Rms(self.head),
            "proj": nn.Linear(c, c), "cross_q": nn.Linear(c, c), "cross_kv": nn.Linear(c, 2 * c), "cross": nn.Linear(c, c),
            "gate": nn.Linear(c, 2 * c, bias=False), "value": nn.Linear(c, 2 * c, bias=False), "down": nn.Linear(2 * c, c, bias=False),
        }  # fmt: skip
        self.blocks = nn.ModuleList([nn.ModuleDict(parts()) for _ in range(depth)])
        self.tables = nn.ParameterList([nn.Parameter(torch.randn(6, c) / c**0.5) for _ in range(depth)])
        self.registers = nn.Parameter(torch.randn(2, c) * 0.02)
        self.last_table = nn.Parameter(torch.randn(2, c) / c**0.5)
        self.out = nn.Linear(c, 16)
        self.register_buffer("frequencies", 10.0 ** -torch.linspace(0, 1, self.head // 4), persistent=False)

    def angles(self, side):
        at = torch.arange(side, dtype=torch.float32)
        rows = at[:, None, None] * self.frequencies.float()
        columns = at[None, :, None] * self.frequencies.float()
        both = torch.cat([rows.expand(side, side, -1), columns.expand(side, side, -1)], dim=-1).reshape(side * side, -1)
        # the registers stay where they are
        return torch.cat([torch.zeros(2, both.shape[1]), both])

    def turned(self, x, angles):
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)

    def forward(self, x, t, text, mask):
        b, side = x.shape[0], int(x.shape[2])
        h = x.reshape(b, 4, side // 2, 2, side // 2, 2).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        h = torch.cat([self.registers.expand(b, -1, -1), self.patch(h)], dim=1)
        e = self.time(waves(t, h.shape[-1]))
        common = self.modulation(F.silu(e)).reshape(b, 6, -1)
        text, seen = self.text(text), mask[:, None, None, :]
        angles = self.angles(side // 2)
        plain = lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-6)  # noqa: E731
        for block, table in zip(self.blocks, self.tables):
            shift1, scale1, gate1, shift2, scale2, gate2 = (common + table).chunk(6, dim=1)
            n = plain(h) * (1 + scale1) + shift1
            k, v = (heads_of(p, self.heads) for p in block["kv"](n).chunk(2, dim=-1))
            q = self.turned(block["qn"](heads_of(block["q"](n), self.heads)), angles)
            k = self.turned(block["kn"](k), angles)
            h = h + gate1 * block["proj"](joined(F.scaled_dot_product_attention(q, k, v)))
            k, v = (heads_of(p, self.heads) for p in block["cross_kv"](text).chunk(2, dim=-1))
            q = heads_of(block["cross_q"](h), self.heads)
            h = h + block["cross"](joined(F.scaled_dot_product_attention(q, k, v, attn_mask=seen)))
            n = plain(h) * (1 + scale2) + shift2
            h = h + gate2 * block["down"](F.silu(block["gate"](n)) * block["value"](n))
        shift, scale = (self.last_table[None] + e[:, None]).chunk(2, dim=1)
        h = self.out(plain(h[:, 2:]) * (1 + scale) + shift)
        half = side // 2
        return h.reshape(b, half, half, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(b, 4, side, side)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of an image."""

    def __init__(self, c):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class Standardised(nn.Conv2d):
    """Convolution whose kernels are standardised when it runs."""

    def forward(self, x):
        w = self.weight
        mean = w.mean(dim=(1, 2, 3), keepdim=True)
        variance = (w - mean).square().mean(dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(x, (w - mean) * torch.rsqrt(variance + 1e-5), self.bias)


class ConvNext(nn.Module):
    def __init__(self, c, time):
        super().__init__()
        self.depthwise = nn.Conv2d(c, c, 7, padding=3, groups=c)
        self.norm = nn.LayerNorm(c, eps=1e-6)
        self.film = nn.Linear(time, 2 * c)
        self.up, self.down = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)
        self.response_scale, self.response_shift = nn.Parameter(torch.zeros(1, 1, 1, 4 * c)), nn.Parameter(torch.zeros(1, 1, 1, 4 * c))
        self.gamma = nn.Parameter(1e-1 * torch.ones(c))

    def forward(self, x, e):
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        scale, shift = self.film(F.silu(e))[:, None, None].chunk(2, dim=-1)
        h = F.gelu(self.up(h * (scale + 1) + shift))
        size = torch.norm(h, p=2, dim=(1, 2), keepdim=True)
        h = h + self.response_scale * (h * (size / (size.mean(dim=-1, keepdim=True) + 1e-6))) + self.response_shift
        return x + (self.gamma * self.down(h)).permute(0, 3, 1, 2)


class LinearAttention(nn.Module):
    def __init__(self, c, heads=2):
        super().__init__()
        self.heads = heads
        self.norm, self.qkv = ChannelNorm(c), nn.Conv2d(c, 3 * c, 1, bias=False)
        self.keys = nn.Parameter(torch.randn(1, heads, c // heads, 3))
        self.values = nn.Parameter(torch.randn(1, heads, c // heads, 3))
        self.out = nn.Sequential(nn.Conv2d(c, c, 1), ChannelNorm(c))

    def forward(self, x):
        b, c, height, width = x.shape
        q, k, v = (p.reshape(b, self.heads, c // self.heads, height * width) for p in self.qkv(self.norm(x)).chunk(3, dim=1))
        k = torch.cat([self.keys.expand(b, -1, -1, -1), k], dim=-1)
        v = torch.cat([self.values.repeat(b, 1, 1, 1), v], dim=-1)
        q, k = q.softmax(dim=-2) * (c // self.heads) ** -0.5, k.softmax(dim=-1)
        context = torch.einsum("b h d n, b h e n -> b h d e", k, v)
        return x + self.out(torch.einsum("b h d e, b h d n -> b h e n", context, q).reshape(b, c, height, width))


class ConvNextUnet(nn.Module):
    """x [B,3,8,8], t [B] -> [B,3,8,8]."""

    def __init__(self, c=8, standardised=False):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(c, 4 * c), nn.Mish(), nn.Linear(4 * c, c))
        self.stem = nn.Conv2d(3, c, 3, padding=1, padding_mode="reflect")
        self.first, self.linear = ConvNext(c, c), LinearAttention(c)
        self.down = nn.Conv2d(4 * c, 2 * c, 1)
        self.middle = ConvNext(2 * c, c)
        self.standard = (Standardised if standardised else nn.Conv2d)(2 * c, 2 * c, 3, padding=1)
        self.group = nn.GroupNorm(4, 2 * c)
        self.up = nn.Conv2d(2 * c, 4 * c, 1)
        self.last, self.out = ConvNext(2 * c, c), nn.Conv2d(2 * c, 3, 1)

    def forward(self, x, t):
        e = self.time(waves(t, 8))
        skip = self.linear(self.first(self.stem(x), e))
        h = self.middle(self.down(F.pixel_unshuffle(skip, 2)), e)
        h = h + F.silu(self.group(self.standard(h)))
        h = torch.cat([F.pixel_shuffle(self.up(h), 2), skip], dim=1)
        return self.out(self.last(h, e))


class ConsistencyUnet(nn.Module):
    """x [B,3,8,8], sigma [B], y [B] int64 -> [B,3,8,8]: boundary conditions and time inside the graph."""

    def __init__(self, c=8, classes=4):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(c, 4 * c), nn.SiLU(), nn.Linear(4 * c, 4 * c))
        self.label = nn.Embedding(classes, 4 * c)
        self.stem = nn.Conv2d(3, c, 3, padding=1)
        block = lambda a, b: nn.ModuleDict({  # noqa: E731
            "n1": nn.GroupNorm(4, a), "c1": nn.Conv2d(a, b, 3, padding=1), "e": nn.Linear(4 * c, 2 * b), "n2": nn.GroupNorm(4, b),
            "c2": nn.Conv2d(b, b, 3, padding=1), "skip": nn.Conv2d(a, b, 1) if a != b else nn.Identity(),
        })  # fmt: skip
        self.down, self.middle, self.up = block(c, 2 * c), block(2 * c, 2 * c), block(3 * c, c)
        self.norm, self.qkv, self.proj = nn.GroupNorm(4, 2 * c), nn.Conv1d(2 * c, 6 * c, 1), nn.Conv1d(2 * c, 2 * c, 1)
        self.out_norm, self.out = nn.GroupNorm(4, c), nn.Conv2d(c, 3, 3, padding=1)

    def block(self, m, x, e, resize=None):
        h = F.silu(m["n1"](x))
        if resize is not None:
            h, x = resize(h), resize(x)
        h = m["c1"](h)
        scale, shift = m["e"](F.silu(e))[:, :, None, None].chunk(2, dim=1)
        return m["skip"](x) + m["c2"](F.silu(m["n2"](h) * (1 + scale) + shift))

    def attention(self, x, heads=2):
        b, c, *side = x.shape
        q, k, v = self.qkv(self.norm(x).reshape(b, c, -1)).reshape(b * heads, 3 * c // heads, -1).split(c // heads, dim=1)
        factor = 1 / math.sqrt(math.sqrt(c // heads))
        weights = torch.softmax(torch.einsum("bct,bcs->bts", q * factor, k * factor).float(), dim=-1).type(x.dtype)
        return x + self.proj(torch.einsum("bts,bcs->bct", weights, v).reshape(b, c, -1)).reshape(x.shape)

    def forward(self, x, sigma, y):
        s = sigma.reshape(-1, 1, 1, 1)
        low = s - 0.002
        c_skip, c_out, c_in = 0.25 / (low**2 + 0.25), low * 0.5 / (s**2 + 0.25) ** 0.5, 1 / (s**2 + 0.25) ** 0.5
        e = self.time(waves(250 * torch.log(sigma + 1e-6), 8)) + self.label(y)
        first = self.stem(c_in * x)
        h = self.block(self.down, first, e, lambda h: F.avg_pool2d(h, 2))
        h = self.attention(self.block(self.middle, h, e))
        h = self.block(self.up, torch.cat([F.interpolate(h, scale_factor=2, mode="nearest"), first], dim=1), e)
        return c_skip * x + c_out * self.out(F.silu(self.out_norm(h)))


def unit(x, dim=None, eps=1e-4):
    dim = list(range(1, x.dim())) if dim is None else dim
    return x / (eps + x.square().mean(dim=dim, keepdim=True).sqrt())


class UnitConv(nn.Module):
    """Convolution or linear layer whose weight has unit size when it runs."""

    def __init__(self, a, b, kernel=0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(b, a, *([kernel] * 2 if kernel else [])))

    def forward(self, x, gain=1):
        w = unit(self.weight) * (gain * self.weight[0].numel() ** -0.5)
        return x @ w.t() if w.dim() == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


class MagnitudePreserving(nn.Module):
    """x [B,3,8,8], sigma [B], y [B,4] one-hot -> [B,3,8,8]."""

    def __init__(self, c=8):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(c))
        self.register_buffer("phases", 2 * math.pi * torch.rand(c))
        self.noise, self.label = UnitConv(c, 2 * c), UnitConv(4, 2 * c)
        self.stem, self.c1, self.c2 = UnitConv(4, c, 3), UnitConv(c, c, 3), UnitConv(c, c, 3)
        self.embed, self.emb_gain = UnitConv(2 * c, c), nn.Parameter(torch.tensor(0.0))
        self.qkv, self.proj = UnitConv(c, 3 * c, 1), UnitConv(c, c, 1)
        self.out, self.out_gain = UnitConv(c, 3, 3), nn.Parameter(torch.tensor(0.0))

    def forward(self, x, sigma, y):
        silu = lambda x: F.silu(x) / 0.596  # noqa: E731
        mixed = lambda a, b, t: (a + (b - a) * t) / math.sqrt((1 - t) ** 2 + t**2)  # noqa: E731
        s = sigma.reshape(-1, 1, 1, 1)
        scaled = x / (0.25 + s**2).sqrt()
        e = (sigma.log() / 4)[:, None] * self.freqs + self.phases
        e = silu(mixed(self.noise(e.cos() * math.sqrt(2)), self.label(y * math.sqrt(y.shape[1])), 0.5))
        h = self.stem(torch.cat([scaled, torch.ones_like(scaled[:, :1])], dim=1))
        h = unit(h, dim=1)
        gain = self.embed(e, gain=self.emb_gain) + 1
        r = self.c2(silu(self.c1(silu(h)) * gain[:, :, None, None]))
        h = mixed(h, r, 0.3)
        q, k, v = unit(self.qkv(h).reshape(h.shape[0], 2, -1, 3, h.shape[2] * h.shape[3]), dim=2).unbind(3)
        w = torch.einsum("nhcq,nhck->nhqk", q, k / math.sqrt(q.shape[2])).softmax(dim=3)
        a = torch.einsum("nhqk,nhck->nhcq", w, v)
        h = mixed(h, self.proj(a.reshape(*h.shape)), 0.3).clip(-256, 256)
        out = self.out(h, gain=self.out_gain)
        return x * 0.25 / (s**2 + 0.25) + out * (s * 0.5 / (s**2 + 0.25).sqrt())


class Windows(nn.Module):
    """x [B,4,8,8], t [B], text [B,5,12] -> [B,4,8,8]: shifted windows, pooled condition, layers of torch as they are."""

    def __init__(self, c=16, heads=2, window=4):
        super().__init__()
        self.heads, self.window = heads, window
        self.stem = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, c, 3, padding=1))
        self.time = nn.Linear(c, c)
        self.qkv, self.proj, self.norm = nn.Linear(c, 3 * c), nn.Linear(c, c), nn.LayerNorm(c)
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.02)
        at = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        apart = (at[:, :, None] - at[:, None, :]).permute(1, 2, 0) + window - 1
        self.register_buffer("relative_position_index", apart[..., 0] * (2 * window - 1) + apart[..., 1])
        region = torch.zeros(8, 8)
        region[4:6], region[6:] = 1, 2
        region = region * 3 + region.t()
        region = region.reshape(2, 4, 2, 4).permute(0, 2, 1, 3).reshape(4, 16)
        self.register_buffer("attn_mask", (region[:, None] != region[:, :, None]).float() * -100.0)
        self.merge, self.merge_norm = nn.Linear(4 * c, 2 * c, bias=False), nn.LayerNorm(4 * c)
        self.layer = nn.TransformerEncoderLayer(2 * c, 4, 3 * c, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.latent = nn.Parameter(torch.randn(1, 1, 12) * 0.02)
        self.pool = nn.MultiheadAttention(12, 2, batch_first=True)
        self.reader = nn.GRU(12, c, batch_first=True)
        self.lora_down, self.lora_up = nn.Linear(2 * c, 2, bias=False), nn.Linear(2, 2 * c, bias=False)
        self.expand = nn.ConvTranspose2d(2 * c, c, 4, stride=2, padding=1, groups=2)
        self.batch = nn.BatchNorm2d(c)
        self.act = nn.PReLU()
        self.out = nn.Conv2d(c, 4, 3, padding=2, dilation=2)

    def windows(self, x, shift):
        b, height, width, c = x.shape
        w = self.window
        if shift:
            x = torch.roll(x, (-w // 2, -w // 2), (1, 2))
        x = x.reshape(b, height // w, w, width // w, w, c).transpose(2, 3).reshape(-1, w * w, c)
        q, k, v = self.qkv(self.norm(x)).reshape(-1, w * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = q * (c // self.heads) ** -0.5 @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.reshape(-1)].reshape(w * w, w * w, -1)
        scores = scores + bias.permute(2, 0, 1)[None]
        if shift:
            scores = scores.reshape(b, -1, self.heads, w * w, w * w) + self.attn_mask[None, :, None]
            scores = scores.reshape(-1, self.heads, w * w, w * w)
        x = x + self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, w * w, c))
        x = x.reshape(b, height // w, width // w, w, w, c).transpose(2, 3).reshape(b, height, width, c)
        return torch.roll(x, (w // 2, w // 2), (1, 2)) if shift else x

    def forward(self, x, t, text):
        b = x.shape[0]
        pooled = self.pool(self.latent.expand(b, -1, -1), text, text, need_weights=False)[0]
        read = self.reader(torch.cat([pooled, text], dim=1))[0][:, -1]
        h = (self.stem(x) + (self.time(waves(t, 16)) + read)[:, :, None, None]).permute(0, 2, 3, 1)
        h = self.windows(self.windows(h, False), True)
        parts = [h[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        m = self.merge(self.merge_norm(torch.cat(parts, -1))).reshape(b, 16, -1)
        m = self.layer(m)
        m = m + self.lora_up(self.lora_down(m)) * 0.5
        m = self.expand(m.transpose(1, 2).reshape(b, -1, 4, 4))
        return self.out(self.act(self.batch(m + h.permute(0, 3, 1, 2))))


class Branches(nn.Module):
    """x [B,6], flag [1] int64 -> [B,6]: torch.cond with layers in both branches."""

    def __init__(self, c=6):
        super().__init__()
        self.first, self.yes, self.no = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c, bias=False)
        self.norm = nn.LayerNorm(c)
        self.last = nn.Linear(c, c)

    def forward(self, x, flag):
        h = self.first(x)
        h = torch.cond(flag.reshape(()) > 0, lambda h: self.norm(torch.tanh(self.yes(h))), lambda h: self.no(h) * 0.5, (h,))
        return self.last(h)
