"""The digits teacher as if it made latents, and decoders that make the digits of them again.

    latent_networks.py TEACHER FOLDER    writes latent.onnx (no range, latent_scale 0.5), decoder.onnx, twice.onnx (images
                                         of twice the size), wide.onnx (latents of three channels)
"""

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def decoder(folder, name, channels, nodes, out, weights):
    value = lambda n, dims: helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", *dims])
    initializers = [numpy_helper.from_array(w, n) for n, w in weights.items()]
    graph = helper.make_graph(nodes, "decoder", [value("z", [channels, 8, 8])], [value("image", out)], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / name)


def main(teacher, folder):
    folder.mkdir(parents=True, exist_ok=True)
    model = onnx.load(teacher)
    kept = [p for p in model.metadata_props if p.key not in ("disback.range", "disback.latent_scale")]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    model.metadata_props.add(key="disback.latent_scale", value="0.5")
    onnx.save(model, folder / "latent.onnx")
    half = {"half": np.array(0.5, "f4")}
    halved = helper.make_node("Mul", ["z", "half"], ["image"])
    decoder(folder, "decoder.onnx", 1, [halved], [1, 8, 8], half)
    twice = [
        helper.make_node("Mul", ["z", "half"], ["small"]),
        helper.make_node("Resize", ["small", "", "scales"], ["image"], mode="nearest"),
    ]
    decoder(folder, "twice.onnx", 1, twice, [1, 16, 16], {**half, "scales": np.array([1, 1, 2, 2], "f4")})
    decoder(folder, "wide.onnx", 3, [halved], [3, 8, 8], half)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
