"""What a file in half precision says, computed in f64: an interpreter of our own of the operators that such files have here.

Weights and numbers are those of the file, rounded as they are in it; nothing is rounded after that, but what the file casts to
half precision before its first weight (features of time). What an import computes in f32 must be this, to rounding in f32; how
far the native module in f32 is from it is what the exporter rounded.
"""

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch.nn import functional as F

HALF = {TensorProto.FLOAT16: torch.half, TensorProto.BFLOAT16: torch.bfloat16}
KINDS = {TensorProto.INT64: torch.int64, TensorProto.INT32: torch.int32, TensorProto.BOOL: torch.bool}


def wide(array):
    """A tensor of the file: floats in f64."""
    array = np.asarray(array)
    if str(array.dtype) in ("float16", "bfloat16", "float32", "float64"):
        return torch.from_numpy(array.astype(np.float64))
    return torch.from_numpy(np.array(array))


def numbers(t):
    return [int(v) for v in t.reshape(-1)]


class Said:
    def __init__(self, model, weights):
        graph = model.graph
        self.nodes, self.outputs = graph.node, [o.name for o in graph.output]
        self.opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        self.values, self.half = {}, set()
        for t in graph.initializer:
            self.hold(t.name, t, t.name in weights)
        self.weights = weights
        self.half |= {i.name for i in graph.input if i.type.tensor_type.elem_type in HALF}

    def hold(self, name, proto, trained):
        self.values[name] = wide(numpy_helper.to_array(proto))
        if trained:
            self.values[name].requires_grad_()
        if proto.data_type in HALF:
            self.half.add(name)

    def run(self, inputs):
        self.values |= {n: wide(v) for n, v in inputs.items()}
        self.values[""] = None
        waiting = list(self.nodes)
        while waiting:
            # The tool that converts to f16 leaves nodes in no order.
            at = next(k for k, n in enumerate(waiting) if all(i in self.values for i in n.input))
            node = waiting.pop(at)
            a = {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}
            if node.op_type == "Constant" and "value" in a:
                self.hold(node.output[0], a["value"], node.output[0] in self.weights)
                continue
            xs = [self.values[i] for i in node.input]
            if node.op_type in ("Cast", "CastLike"):
                out = self.cast(node, a, xs)
            else:
                out = getattr(self, node.op_type)(a, node, *xs)
            out = out if isinstance(out, (tuple, list)) else (out,)
            self.values |= dict(zip(node.output, out))
            floats = any(i in self.half for i in node.input)
            if floats and node.op_type not in ("Cast", "CastLike", "Shape"):
                self.half |= {o for o, v in zip(node.output, out) if v is not None and v.is_floating_point()}
        return {n: self.values[n] for n in self.outputs}

    def cast(self, node, a, xs):
        x, to = xs[0], a.get("to")
        if to is None:
            like = xs[1]
            to = TensorProto.FLOAT16 if node.input[1] in self.half else TensorProto.FLOAT
            if not like.is_floating_point():
                return x.to(like.dtype)
        if to in KINDS:
            return x.to(KINDS[to])
        x = x.to(torch.double)
        if to in HALF:
            if node.input[0] not in self.half and not x.requires_grad:
                x = x.float().to(HALF[to]).double()
            self.half.add(node.output[0])
        return x

    # elementwise
    Add = staticmethod(lambda a, n, x, y: x + y)
    Sub = staticmethod(lambda a, n, x, y: x - y)
    Mul = staticmethod(lambda a, n, x, y: x * y)
    Div = staticmethod(lambda a, n, x, y: x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc"))
    Pow = staticmethod(lambda a, n, x, y: x**y)
    Equal = staticmethod(lambda a, n, x, y: x == y)
    Neg = staticmethod(lambda a, n, x: -x)
    Sqrt = staticmethod(lambda a, n, x: x.sqrt())
    Log = staticmethod(lambda a, n, x: x.log())
    Exp = staticmethod(lambda a, n, x: x.exp())
    Cos = staticmethod(lambda a, n, x: x.cos())
    Sin = staticmethod(lambda a, n, x: x.sin())
    Erf = staticmethod(lambda a, n, x: x.erf())
    Tanh = staticmethod(lambda a, n, x: x.tanh())
    Sigmoid = staticmethod(lambda a, n, x: x.sigmoid())
    Reciprocal = staticmethod(lambda a, n, x: 1 / x)
    IsNaN = staticmethod(lambda a, n, x: x.isnan())
    Identity = staticmethod(lambda a, n, x: x)
    Where = staticmethod(lambda a, n, c, x, y: torch.where(c, x, y))
    Gelu = staticmethod(lambda a, n, x: F.gelu(x, approximate=a.get("approximate", b"none").decode()))
    Clip = staticmethod(lambda a, n, x, low=None, high=None: torch.clamp(x, low, high))

    # shapes
    Shape = staticmethod(lambda a, n, x: torch.tensor(x.shape)[a.get("start", 0) : a.get("end", None)])
    Concat = staticmethod(lambda a, n, *xs: torch.cat(xs, dim=a["axis"]))
    Transpose = staticmethod(lambda a, n, x: x.permute(a.get("perm", list(range(x.dim()))[::-1])))
    Expand = staticmethod(lambda a, n, x, s: x * torch.ones(numbers(s), dtype=x.dtype) if x.dtype != torch.bool else x.expand(torch.broadcast_shapes(x.shape, numbers(s))))
    Range = staticmethod(lambda a, n, x, y, z: torch.arange(x.item(), y.item(), z.item(), dtype=x.dtype))
    Flatten = staticmethod(lambda a, n, x: x.reshape(int(np.prod(x.shape[: a.get("axis", 1)])), -1))
    ArgMax = staticmethod(lambda a, n, x: x.argmax(a.get("axis", 0), keepdim=bool(a.get("keepdims", 1))))
    Einsum = staticmethod(lambda a, n, *xs: torch.einsum(a["equation"].decode(), *xs))
    Softmax = staticmethod(lambda a, n, x: x.softmax(a.get("axis", -1)))

    def Reshape(self, a, n, x, shape):
        return x.reshape([x.shape[i] if s == 0 and not a.get("allowzero") else s for i, s in enumerate(numbers(shape))])

    def Unsqueeze(self, a, n, x, axes):
        axes = numbers(axes)
        for axis in sorted(v % (x.dim() + len(axes)) for v in axes):
            x = x.unsqueeze(axis)
        return x

    def Squeeze(self, a, n, x, axes=None):
        return x.squeeze() if axes is None else x.squeeze(numbers(axes))

    def Slice(self, a, n, x, starts, ends, axes=None, steps=None):
        axes = range(len(starts)) if axes is None else numbers(axes)
        steps = [1] * len(starts) if steps is None else numbers(steps)
        for start, end, axis, step in zip(numbers(starts), numbers(ends), axes, steps):
            picked = list(range(x.shape[axis]))[start : (None if step < 0 and end < -x.shape[axis] else end) : step]
            x = x.index_select(axis, torch.tensor(picked, dtype=torch.int64))
        return x

    def Split(self, a, n, x, sizes=None):
        axis = a.get("axis", 0)
        if sizes is not None:
            return x.split(numbers(sizes), axis)
        return x.chunk(len(n.output), axis)

    def Gather(self, a, n, x, index):
        axis = a.get("axis", 0) % x.dim()
        rows = x.index_select(axis, index.reshape(-1).long() % x.shape[axis])
        return rows.reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))

    def GatherND(self, a, n, x, index):
        assert not a.get("batch_dims", 0)
        return x[tuple(index.long().unbind(-1))]

    def ConstantOfShape(self, a, n, shape):
        value = wide(numpy_helper.to_array(a["value"])) if "value" in a else torch.zeros(1, dtype=torch.double)
        return torch.full(numbers(shape), value.item(), dtype=value.dtype)

    def Pad(self, a, n, x, pads, value=None, axes=None):
        pads = numbers(pads)
        axes = list(range(x.dim())) if axes is None else [v % x.dim() for v in numbers(axes)]
        both = [(0, 0)] * x.dim()
        for k, axis in enumerate(axes):
            both[axis] = (pads[k], pads[k + len(axes)])
        flat = [p for pair in reversed(both) for p in pair]
        assert a.get("mode", b"constant") == b"constant"
        return F.pad(x, flat, value=0.0 if value is None else value.item())

    def ReduceMean(self, a, n, x, axes=None):
        axes = a.get("axes") if axes is None else numbers(axes)
        return x.mean(list(axes), keepdim=bool(a.get("keepdims", 1)))

    def Resize(self, a, n, x, roi=None, scales=None, sizes=None):
        assert a.get("mode", b"nearest") == b"nearest"
        wanted = numbers(sizes) if sizes is not None else [int(s * d) for s, d in zip(scales.tolist(), x.shape)]
        for axis, size in enumerate(wanted):
            assert size % x.shape[axis] == 0, "only whole steps up"
            x = x.repeat_interleave(size // x.shape[axis], axis)
        return x

    # layers
    MatMul = staticmethod(lambda a, n, x, y: x @ y)

    def Gemm(self, a, n, x, y, c=None):
        out = a.get("alpha", 1.0) * ((x.t() if a.get("transA") else x) @ (y.t() if a.get("transB") else y))
        return out if c is None else out + a.get("beta", 1.0) * c

    def window(self, a, x):
        spatial = x.dim() - 2
        pads = a.get("pads", [0] * 2 * spatial)
        assert pads[:spatial] == pads[spatial:] and a.get("auto_pad", b"NOTSET") == b"NOTSET"
        return a.get("strides", [1] * spatial), pads[:spatial], a.get("dilations", [1] * spatial)

    def Conv(self, a, n, x, w, b=None):
        stride, pads, dilation = self.window(a, x)
        return torch.convolution(x, w, b, stride, pads, dilation, False, [0] * len(pads), a.get("group", 1))

    def ConvTranspose(self, a, n, x, w, b=None):
        stride, pads, dilation = self.window(a, x)
        return torch.convolution(x, w, b, stride, pads, dilation, True, a.get("output_padding", [0] * len(pads)), a.get("group", 1))

    def InstanceNormalization(self, a, n, x, scale, bias):
        axes = list(range(2, x.dim()))
        y = (x - x.mean(axes, keepdim=True)) / (x.var(axes, unbiased=False, keepdim=True) + a.get("epsilon", 1e-5)).sqrt()
        shape = [-1] + [1] * len(axes)
        return y * scale.reshape(shape) + bias.reshape(shape)

    def LayerNormalization(self, a, n, x, scale, bias=None):
        axes = list(range(a.get("axis", -1) % x.dim(), x.dim()))
        y = (x - x.mean(axes, keepdim=True)) / (x.var(axes, unbiased=False, keepdim=True) + a.get("epsilon", 1e-5)).sqrt() * scale
        return y if bias is None else y + bias

    def RMSNormalization(self, a, n, x, scale):
        axes = list(range(a.get("axis", -1) % x.dim(), x.dim()))
        return x / (x.square().mean(axes, keepdim=True) + a.get("epsilon", 1e-5)).sqrt() * scale

    def Attention(self, a, n, q, k, v, mask=None):
        assert q.dim() == 4 and not a.get("is_causal") and not a.get("softcap") and q.shape[1] == k.shape[1]
        scores = q @ k.transpose(-1, -2) * a.get("scale", q.shape[-1] ** -0.5)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1) @ v


def what_it_says(model, mapping, inputs, factors):
    """Outputs of the file, and the gradient of the sum of `output * factor` by each of its tensors that holds a parameter."""
    said = Said(model, {entry["onnx"] for entry in mapping})
    outputs = said.run(inputs)
    sum((v * factors[f"R.{n}"].double()).sum() for n, v in outputs.items()).backward()
    grads = {n: said.values[n].grad for n in said.weights}
    found = {f"file.{n}": g.float().contiguous() for n, g in grads.items() if g is not None}
    return {n: v.detach().numpy() for n, v in outputs.items()}, found
