"""Exports of a network, and what the native module computes: values, and gradients in f64.

A case is named `<network>-<weights>-<exporter><opset>-<shapes>`:

    weights     drawn       every weight at random, no two alike
                fresh       as initialised: scales of ones, biases of zeros, which exporters merge
                half        the module in f16 (`.half()`), weights in an external file
                brain       the module in bf16, inputs too (stored in f32: numpy has no bf16)
                converted   exported in f32, converted to f16 by ONNX Runtime's tool, inputs and outputs in f32
    exporter    legacy (TorchScript), dynamo, raw (dynamo with optimize=False); ort (legacy, then what ONNX Runtime's session
                saves with extended optimisations), fused (legacy, then onnxruntime.transformers.optimizer)
    shapes      static, dynamic (the batch), spatial (batch, height, width)

Its folder holds

    model.onnx              the exported graph
    inputs.npz expected.npz one array per graph input and output; at another batch (and size) than the exporter saw, where
                            shapes are dynamic. f16 and bf16 cases: what the module computes in f32
                            from its rounded weights
    traced.npz              inputs of the exporter's own shapes, with traced_expected.npz
    grads.safetensors       for every parameter the gradient of the sum over outputs of `output * R.<output>`, computed in
                            f64, under its native name; a parameter that takes no part is absent
                            f16 and bf16 cases: `file.<tensor>` too, of the file as it is, computed in f64 (`said.py`), with its
                            outputs in said.npz
    map.json                [{"onnx": initializer or Constant output, "natives": [names], "permutation": [axes]}]: the
                            tensors that hold native parameters, found by value. `natives` has several names where equal
                            ones were merged; the tensor has the native's elements after permuting its axes. With `piece`:
                            [heads, n, k], where q, k and v are one tensor: the last axis is [heads, n, rest], and its
                            k-th of n has them
"""

import copy
import itertools
import json
import sys

import numpy as np
import onnx
import torch
from families import FAMILIES
from networks import NETWORKS
from onnx import numpy_helper
from safetensors.torch import save_file
from said import what_it_says


def draw_weights(module):
    """Weights of a plausible size and no two alike: nothing at 0 or 1, no output gated away."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if not p.requires_grad:
                continue
            if p.dim() == 0:
                p.fill_(0.8)
            elif p.dim() > 1:
                fan = p[0].numel() if "embed" not in name else 4
                p.copy_(0.7 * torch.randn_like(p) * fan**-0.5)
            elif name.endswith("weight"):
                p.copy_(1 + 0.2 * torch.randn_like(p))
            else:
                p.copy_(0.1 * torch.randn_like(p))


def parse(case):
    network, weights, exporter, shapes = case.split("-")
    return network, weights, exporter.rstrip("0123456789"), int(exporter.lstrip("abcdefghijklmnopqrstuvwxyz")), shapes


def round_features(dtype, module, folded):
    """Features of time that are rounded to f16 or bf16 in the file, whatever the reference computes in; `folded`: constants
    are multiplied in that type already."""
    for part in module.modules():
        kind = type(part).__name__
        if kind == "Timesteps":
            part.register_forward_hook(lambda _, __, out: out.to(dtype).to(out.dtype))
        elif kind == "GaussianFourierProjection":
            # In radians up to hundreds: what pi is rounded to is seen.
            pi = torch.tensor(np.pi).to(dtype).item() / np.pi

            def fourier(part, args, out, pi=pi):
                x = args[0].log() if part.log else args[0]
                angles = x[:, None] * part.weight[None, :] * 2 * np.pi * pi
                parts = (angles.cos(), angles.sin()) if part.flip_sin_to_cos else (angles.sin(), angles.cos())
                return torch.cat(parts, dim=-1)

            part.register_forward_hook(fourier)
        elif kind == "Fourier":

            def drawn(part, args, out):
                turn = torch.tensor(2 * np.pi).to(dtype).to(out.dtype)
                freqs = (2 * np.pi * part.freqs.to(dtype)).to(out.dtype) if folded else turn * part.freqs
                angles = torch.outer(args[0], freqs)
                return torch.cat([angles.cos(), angles.sin()], dim=1)

            part.register_forward_hook(drawn)


def to(dtype, tensors):
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)


def export(net, module, args, path, exporter, opset, shapes, external):
    batched = [n for n in net.inputs if n not in net.unbatched]
    axes = {n: {0: "batch"} | ({2: "height", 3: "width"} if n in net.spatial and shapes == "spatial" else {}) for n in batched}
    if exporter in ("legacy", "ort", "fused"):
        for part in module.modules():
            if hasattr(part, "settle"):
                part.settle()
        axes |= {n: {0: "batch"} for n in net.outputs}
        torch.onnx.export(
            module, args, str(path), dynamo=False, opset_version=opset, input_names=net.inputs, output_names=net.outputs,
            dynamic_axes=axes if shapes != "static" else None, verbose=False,
        )  # fmt: skip
        if exporter == "ort":
            optimise(path)
        elif exporter == "fused":
            fuse(path, net)
        if external:
            model = onnx.load(path)
            onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=128)
        return
    dynamic = None
    if shapes != "static":
        batch = torch.export.Dim.AUTO if shapes == "spatial" else torch.export.Dim("batch", min=1, max=4096)
        sides = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
        specs = tuple({k: batch if k == 0 else sides[k] for k in axes.get(n, {})} for n in net.inputs)
        # one tuple for `*args` of the wrapper, one entry an argument for a plain forward
        dynamic = (specs,) if type(module).__name__ == "Call" else specs
    program = torch.onnx.export(
        module, args, dynamo=True, opset_version=opset, input_names=net.inputs, output_names=net.outputs,
        dynamic_shapes=dynamic, optimize=exporter == "dynamo", verbose=False,
    )  # fmt: skip
    program.save(str(path), external_data=external)


def optimise(path):
    """What ONNX Runtime's own session makes of a file: com.microsoft operators of every machine."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])


def fuse(path, net):
    """What `onnxruntime.transformers.optimizer` makes of a file for GPUs: channels last, q, k and v in one matrix."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    def heads(self, reshape, is_torch2=False):
        """As it reads them, but for int() of an array of one element, which numpy 2 refuses."""
        shape = self.model.get_parent(reshape, 1)
        value = self.model.get_constant_value(shape.input[2]) if shape and shape.op_type == "Concat" else None
        return 0 if value is None else int(np.asarray(value).item())

    sys.modules["fusion_attention_unet"].FusionAttentionUnet.get_num_heads = heads
    options = FusionOptions(net.fusion)
    options.enable_packed_kv = True
    model = optimize_model(str(path), net.fusion, opt_level=0, optimization_options=options)
    model.save_model_to_file(str(path))


def match_parameters(model, parameters):
    """Which floating initializers and Constants hold which native parameters, by value, in any order of the axes."""
    tensors = [(t.name, numpy_helper.to_array(t)) for t in model.graph.initializer]
    for node in model.graph.node:
        if node.op_type == "Constant":
            tensors += [(node.output[0], numpy_helper.to_array(a.t)) for a in node.attribute if a.name == "value"]
    as64 = lambda a: np.ascontiguousarray(a, dtype=np.float64)  # noqa: E731
    natives = {}
    for name, value in parameters.items():
        natives.setdefault(np.sort(as64(value), axis=None).tobytes(), []).append((name, as64(value)))
    found, seen = [], set()
    pieces = []
    for name, value in tensors:
        if str(value.dtype) not in ("float16", "bfloat16", "float32", "float64"):
            continue
        pieces.append((name, None, as64(value)))
        if np.sort(pieces[-1][2], axis=None).tobytes() in natives:
            continue
        for heads, n in itertools.product((1, 2, 4), (2, 3)):
            if value.ndim and value.shape[-1] % (heads * n) == 0:
                parts = value.reshape(*value.shape[:-1], heads, n, -1)
                pieces += [(name, [heads, n, k], as64(parts[..., k, :]).reshape(*value.shape[:-1], -1)) for k in range(n)]
    for name, piece, value in pieces:
        for native, theirs in natives.get(np.sort(value, axis=None).tobytes(), []):
            # The file's tensor, permuted, is the native one; where only dimensions of 1 were added, nothing is.
            orders = [p for p in itertools.permutations(range(value.ndim)) if value.transpose(p).tobytes() == theirs.tobytes()]
            if orders:
                alike = {"onnx": name, "permutation": list(orders[0])} | ({"piece": piece} if piece else {})
                entry = next((e for e in found if alike.items() <= e.items()), None)
                if entry is None:
                    entry = alike | {"natives": []}
                    found.append(entry)
                entry["natives"].append(native)
                seen.add(native)
    return found, [name for name in parameters if name not in seen]


def reference(module, args, names, dtype):
    """Named outputs of the module in `dtype`."""
    out = module.to(dtype)(*to(dtype, args))
    return dict(zip(names, out if isinstance(out, tuple) else (out,)))


def arrays(names, tensors):
    return {n: (t.float() if t.dtype == torch.bfloat16 else t).detach().numpy() for n, t in zip(names, tensors)}


def write_case(case, folder):
    network, weights, exporter, opset, shapes = parse(case)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(sum(map(ord, network)))
    net = (NETWORKS | FAMILIES)[network]()
    module = net.module.eval()
    if weights != "fresh":
        draw_weights(module)
    half = {"half": torch.half, "converted": torch.half, "brain": torch.bfloat16}.get(weights)
    if half:
        module = module.to(half)
        round_features(half, module, folded=exporter != "raw")
    traced = net.draw(2)
    args = net.size(3, 12) if shapes == "spatial" else net.draw(3 if shapes == "dynamic" else 2)
    if half:
        traced, args = to(half, traced), to(half, args)
    path = folder / "model.onnx"
    exported = copy.deepcopy(module)
    for part in exported.modules():
        part._forward_hooks.clear()
    if weights == "converted":
        exported, traced = exported.float(), to(torch.float, traced)
        args = to(torch.float, args)
    export(net, exported, traced, path, exporter, opset, shapes, external=weights == "half")
    model = onnx.load(path)
    if weights == "converted":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        model = convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=False)
        onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=128)
        model = onnx.load(path)
    with torch.no_grad():
        single = copy.deepcopy(module)
        for name, inputs in (("traced", traced), ("inputs", args)):
            np.savez(folder / f"{name}.npz", **arrays(net.inputs, inputs))
            values = reference(single, inputs, net.outputs, torch.float)
            np.savez(folder / f"{'traced_' if name == 'traced' else ''}expected.npz", **arrays(values, values.values()))
    double = copy.deepcopy(module)
    values = reference(double, args, net.outputs, torch.double)
    factors = {f"R.{n}": torch.randn(v.shape) for n, v in values.items()}
    sum((v * factors[f"R.{n}"]).sum() for n, v in values.items()).backward()
    grads = {n: p.grad.float().contiguous() for n, p in double.named_parameters() if p.grad is not None}
    weights = {n: p.detach() for n, p in module.named_parameters() if n in grads}
    mapping, missing = match_parameters(model, arrays(weights, weights.values()))
    said = {}
    if half:
        outputs, said = what_it_says(model, mapping, arrays(net.inputs, args), factors)
        np.savez(folder / "said.npz", **{n: v.astype(np.float32) for n, v in outputs.items()})
    save_file(grads | factors | said, folder / "grads.safetensors")
    (folder / "map.json").write_text(json.dumps(mapping, indent=1))
    return {"nodes": len(model.graph.node), "parameters": sum(g.numel() for g in grads.values()), "missing": missing}


def check_written(path):
    """The ONNX checker on a file written back, unless it refuses the origin too (operators of ONNX Runtime in the default
    domain, bf16 where the specification has none); beside its origin, only weights may differ (parted ones are new)."""
    try:
        onnx.checker.check_model(str(path.with_name("model.onnx")), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        pass
    else:
        onnx.checker.check_model(str(path), full_check=True)
    written, origin = onnx.load(path), onnx.load(path.with_name("model.onnx"))
    calls = lambda m: [(n.op_type, n.name, list(n.output)) for n in m.graph.node]  # noqa: E731
    assert calls(written) == calls(origin), "nodes differ"
    ports = lambda m: [v.SerializeToString() for v in [*m.graph.input, *m.graph.output]]  # noqa: E731
    assert ports(written) == ports(origin), "inputs or outputs differ"
    kinds = {t.name: (t.data_type, list(t.dims)) for t in written.graph.initializer}
    for t in origin.graph.initializer:
        assert kinds.get(t.name) == (t.data_type, list(t.dims)), f"initializer {t.name} differs in type or shape"
    return {"checked": str(path)}
