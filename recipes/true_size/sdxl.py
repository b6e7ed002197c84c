"""SDXL's UNet at its true size, random weights, without ever having them in memory.

The network is built and exported on torch's `meta` device, where tensors have shapes and no elements; the weights are then drawn
one by one into the file beside the graph. So 2.6 billion weights need 10 GB of disk and 2 GB of memory. There is no PyTorch
network to compare with: the export's code is the converter's, which compares where it has weights.
"""

import logging
import sys
import warnings
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
CONFIG = {
    "sample_size": 128, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SCHEDULE = {"schedule.kind": "vp", "schedule.betas": "scaled-linear", "schedule.beta_start": 0.00085, "schedule.beta_end": 0.012}


def sdxl(folder, **changes):
    sys.path[:0] = [str(ROOT / "converters")]
    import diffusers
    import onnx_ir as ir
    import onnxscript
    import torch
    from disback_convert import card as cards
    from disback_convert.diffusers_route.adapters import UNet2DCondition

    with torch.device("meta"):
        net = diffusers.UNet2DConditionModel(**(CONFIG | changes)).eval().requires_grad_(False)
    print(f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} million weights", flush=True)
    module = UNet2DCondition(net)
    card = module.card() | {"prediction": "epsilon", "time_unit": "step", "latent_scale": 0.13025} | SCHEDULE
    names = ["encoder_hidden_states", "text_embeds", "time_ids"]
    # SDXL's own pipeline takes zeros for no prompt at all.
    card |= {f"conditions.{name}.null": "zeros" for name in names}
    shapes = {"sample": card["shape"], "timestep": []} | {name: card[f"conditions.{name}.shape"] for name in names}
    logging.disable(logging.WARNING)
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module, (), None, kwargs={name: torch.zeros(3, *shape, device="meta") for name, shape in shapes.items()}, dynamo=True,
            opset_version=23, input_names=list(shapes), output_names=["prediction"], optimize=False, verbose=False,
            dynamic_shapes={name: {0: batch} for name in shapes},
        )  # fmt: skip
    model = program.model
    data = folder / "teacher.onnx.data"
    # The optimiser looks at no weights, which would all be read.
    weights = [value for value in model.graph.initializers.values() if on_meta(value.const_value)]
    for value in weights:
        value.const_value = None
    onnxscript.optimizer.optimize_ir(model)
    draw({name: value for name, value in model.graph.initializers.items() if value.const_value is None}, data, ir)
    model.metadata_props.clear()
    model.metadata_props.update(cards.metadata(card))
    print(f"{len(weights)} weights, {data.stat().st_size / 1e9:.2f} GB beside the graph")
    ir.save(model, folder / "teacher.onnx")
    random = np.random.default_rng(0)
    rows = {name: random.standard_normal((64, *shapes[name])).astype("f4") for name in names}
    np.savez(folder / "prompts.npz", **rows)


def on_meta(tensor):
    return getattr(getattr(getattr(tensor, "raw", None), "device", None), "type", "") == "meta"


def draw(initializers, path, ir):
    """Random weights, scaled by their fan-in, one after the other into `path`; norms are ones, biases zeros."""
    block = np.random.default_rng(0).standard_normal(1 << 22).astype("<f4")
    with open(path, "wb") as file:
        for name, value in initializers.items():
            shape = tuple(value.shape.numpy())
            count, start = int(np.prod(shape)), file.tell()
            for at in range(0, count, len(block)):
                part = block[: min(len(block), count - at)]
                if len(shape) < 2:
                    part = np.full(len(part), float(name.endswith("weight")), "<f4")
                file.write((part * np.prod(shape[1:], dtype=float) ** -0.5).astype("<f4").tobytes())
            value.const_value = ir.ExternalTensor(
                location=path.name, offset=start, length=4 * count, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=name,
                base_dir=path.parent,
            )  # fmt: skip
