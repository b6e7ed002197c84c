"""seeds.py TARGET OUT: small valid inputs to start from. For `loader` and `plan` ONNX's operator cases, and the digits teacher with all
weights but the small ones made by ConstantOfShape; for the others files and requests of every kind that they read."""

import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np

LARGEST = 16384
PARTED = b"\n===\n"
ROOT = Path(__file__).resolve().parents[1]


def slim(model):
    """The same graph without the bytes of its larger weights."""
    import onnx
    from onnx import helper, numpy_helper

    graph = model.graph
    nodes, kept = [], []
    for t in graph.initializer:
        if np.prod(t.dims) <= 64 or t.data_type != onnx.TensorProto.FLOAT:
            kept.append(t)
            continue
        shape = numpy_helper.from_array(np.array(t.dims, np.int64), t.name + "_shape")
        kept.append(shape)
        value = numpy_helper.from_array(np.array([0.01], np.float32))
        nodes.append(helper.make_node("ConstantOfShape", [shape.name], [t.name], value=value))
    del graph.initializer[:], graph.value_info[:], model.metadata_props[:]
    graph.initializer.extend(kept)
    nodes.extend(graph.node)
    for n in nodes:
        del n.metadata_props[:]
        n.doc_string = ""
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def models():
    import onnx

    cases = Path(onnx.__file__).parent / "backend/test/data/node"
    for case in sorted(cases.iterdir()):
        data = (case / "model.onnx").read_bytes()
        if len(data) <= LARGEST:
            yield case.name, data
    yield "digits", slim(onnx.load(ROOT / "examples/digits/teacher.onnx")).SerializeToString()


def cards():
    import onnx

    digits = onnx.load(ROOT / "examples/digits/teacher.onnx")
    metadata = "\n".join(f"{p.key}={p.value}" for p in digits.metadata_props if len(p.value) < 2000).encode()
    yield "digits", metadata
    base = b'sample = "x"\ntime = "t"\noutput = "y"\nshape = [3, 8, 8]\nprediction = "%s"\ntime_unit = "%s"\n'
    tails = [
        b'range = [-1, 1]\n[schedule]\nkind = "edm"\nsigma_max = 60\nrho = 7\n[conditions.labels]\nkind = "class-index"\nclasses = 10\n',
        b'[schedule]\nkind = "vp"\nsteps = 1000\nbetas = "scaled-linear"\nbeta_start = 0.00085\nbeta_end = 0.012\n',
        b'[schedule]\nkind = "vp"\ntable = [0.1, 0.2, 0.3, 0.9]\n[conditions.text]\nkind = "embedding"\nshape = [77, 8]\nnull = "zeros"\n',
        b'[schedule]\nkind = "flow"\nshift = 3.0\ndirection = "noise-to-data"\n[constants]\nw = 1.5\n[dims]\nn = 4\n',
        b'[schedule]\nkind = "ve"\nsigma_min = 0.01\nsigma_max = 50\n',
        b'[schedule]\nkind = "trigflow"\nsigma_data = 0.5\n',
    ]
    for k, tail in enumerate(tails):
        for prediction, unit in ((b"denoised", b"sigma"), (b"epsilon", b"index"), (b"v", b"unit"), (b"flow", b"thousand")):
            yield f"side-{k}-{prediction.decode()}", PARTED.join([b"", base % (prediction, unit) + tail])
    schedulers = [
        {"_class_name": "DDPMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
         "prediction_type": "epsilon", "num_train_timesteps": 1000},
        {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction",
         "rescale_betas_zero_snr": True},
        {"_class_name": "EulerDiscreteScheduler", "trained_betas": [0.1, 0.2, 0.3], "prediction_type": "sample"},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "invert_sigmas": True},
    ]
    side = b'sample = "x"\ntime = "t"\noutput = "y"\nshape = [1, 8, 8]\n'
    for k, scheduler in enumerate(schedulers):
        yield f"scheduler-{k}", PARTED.join([b"", side, json.dumps(scheduler, indent=1).encode(), b"range=[-1,1]\ntime=2"])


def npy(array, fortran=False, order="<"):
    out = io.BytesIO()
    array = array.astype(array.dtype.newbyteorder(order))
    np.save(out, np.asfortranarray(array) if fortran else array)
    return out.getvalue()


def arrays():
    images = (np.arange(2 * 4 * 4 * 3) % 256).reshape(2, 4, 4, 3)
    for dtype in ("u1", "f4", "f8", "f2", "i8", "i4", "u2", "?"):
        for tag, fortran, order in (("c", False, "<"), ("f", True, "<"), ("b", False, ">")):
            data = npy(images.astype(dtype), fortran, order)
            yield f"npy-{tag}-{dtype.strip('?') or 'bool'}", b"\x02" + data
            yield f"in-{tag}-{dtype.strip('?') or 'bool'}", b"\x05" + data
    for kind in (1, 5, 9, 13, 25):
        yield f"lies-{kind}", bytes([kind]) + npy(images.astype("u1"))
    for tag, save in (("savez", np.savez), ("packed", np.savez_compressed)):
        out = io.BytesIO()
        save(out, images=images.astype("u1"), labels=np.array([1, 2]))
        yield tag, b"\x00" + out.getvalue()
    header = json.dumps({"images": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    yield "safetensors", b"\x03" + len(header).to_bytes(8, "little") + header + bytes(24)
    yield "pickled", b"\x02\x93NUMPY\x01\x00\x3a\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }    \n"


def pictures():
    from PIL import Image

    for k, (ending, options) in enumerate([("png", {}), ("jpeg", {}), ("webp", {}), ("bmp", {}), ("tiff", {})]):
        for mode in ("L", "RGB", "RGBA"):
            if (ending, mode) in (("jpeg", "RGBA"), ("bmp", "RGBA")):
                continue
            out = io.BytesIO()
            Image.new(mode, (5, 4), 100 if mode == "L" else (10, 200, 30, 255)[: len(mode)]).save(out, ending, **options)
            one = out.getvalue()
            yield f"{ending}-{mode}", bytes([k + 1]) + one
            labels = {"labels": [[f"a.{'jpg' if ending == 'jpeg' else ending}", 3], [f"b.{'jpg' if ending == 'jpeg' else ending}", 0]]}
            yield f"{ending}-{mode}-labels", bytes([k + 1]) + one + PARTED + json.dumps(labels).encode()
            if ending == "png":
                for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    out = io.BytesIO()
                    with zipfile.ZipFile(out, "w", method) as archive:
                        archive.writestr("0/a.png", one)
                        archive.writestr("1/b.png", one)
                        archive.writestr("dataset.json", '{"labels": {"0/a.png": 1, "1/b.png": 0}}')
                    yield f"zip-{mode}-{method}", b"\x00" + out.getvalue()


def runs():
    degrade = [
        {"stage": "degrade", "iteration": k, "node": k // 4, "loss_fake": 1 / (k + 1), "loss_generator": None, "lr": 1e-4,
         "grad_norm_fake": 0.5, "updates": 0, "images": 8 * k, "images_per_s": 3.0, "seconds": 0.5 * k, "skipped": 0}
        for k in range(1, 9)
    ]
    back = [
        {"stage": "backtrack", "iteration": k, "node": 2 - k // 4, "loss_fake": 0.5, "loss_generator": 0.1 * k, "mismatch": 0.2,
         "loss_gan": 0.1, "loss_discriminator": 0.6, "grad_norm_fake": 0.5, "grad_norm_generator": 0.4, "lr": 1e-5,
         "updates": k // 2, "images": 8 * k, "images_per_s": 3.0, "seconds": 0.5 * k, "skipped": 0}
        for k in range(1, 12)
    ]
    lines = lambda rows: "\n".join(map(json.dumps, rows))
    levels = [
        {"stage": "backtrack", "iteration": k, "node": 2 - k // 4, "sigmas": [0.01, 1.0, 60.0], "target": [0.1, 0.2, 0.3],
         "fake": [0.1, 0.1, 0.2] if k % 2 else None}
        for k in range(1, 12, 4)
    ]
    nodes = [{"index": k, "file": f"node-{k:03}.safetensors", "iteration": 4 * k, "loss": 0.5 * k, "hash": "ab" * 32} for k in range(3)]
    trajectory = {"teacher_hash": "ab" * 32, "complete": True, "nodes": nodes}
    summary = {
        "run": {"command": "disback distill t.onnx", "teacher": "t.onnx", "device": "cpu", "nodes": 2, "objective": "sid"},
        "student": {"frechet": 5.6, "nfe": 1, "ms_per_image": 0.4}, "teacher": {"frechet": 1.6, "nfe": 35}, "warnings": [],
    }
    row = {"name": "student.onnx", "frechet": 5.6, "kernel": 0.01, "kernel_standard_error": 0.001, "precision": 0.8, "recall": 0.7,
           "sliced": None, "samples": 1000}
    book = {"setting": "s", "entries": [{"file": "student.onnx", "hash": "ab" * 32, "setting": "s", "row": row}],
            "best": "student.onnx", "others": [], "neighbours": [], "command": "disback evaluate", "reference": "r.npz"}
    points = [{"updates": k, "node": 1, "iteration": 2 * k, "frechet": 9.0 - k, "samples": 100, "best": True} for k in range(4)]
    bench = {"rows": [{"engine": "ort", "batch": 1, "ms": 0.5, "images_per_s": 2000.0}], "student": {"ms": 0.4}}
    warnings = [{"stage": "backtrack", "iteration": 3, "text": "the loss grows"}]
    config = (ROOT / "recipes").glob("*.toml")
    config = next(iter(sorted(config)), None)
    config = config.read_text() if config else "seed = 1\n[student]\nsigmas = [0.5]\n"
    parts = [lines(degrade + back), lines(levels), json.dumps(trajectory), json.dumps(summary), json.dumps(book), lines(points),
             json.dumps(bench), lines(warnings), config]
    yield "whole", PARTED.join(p.encode() for p in parts)
    yield "begun", PARTED.join(p.encode() for p in [lines(degrade), "", json.dumps(trajectory), "", "", "", "", "", "seed = 1"])
    yield "levels", PARTED.join(p.encode() for p in [lines(back), lines(levels)])
    for k, part in enumerate(parts[2:8], 2):
        yield f"part-{k}", PARTED.join([b""] * k + [part.encode()] + [b""] * (8 - k)) + b"seed = 1"


def requests():
    def post(query, body, accept=""):
        return f"{query}\n{accept}\n".encode() + body

    noise = np.zeros((2, 1, 2, 2), np.float32)
    yield "get", post("seed=1&n=3&classes=0,1,2", b"", "image/png")
    yield "npy", post("format=npy", npy(noise))
    yield "wide", post("seed=18446744073709551615&index=5", b"", "application/octet-stream")
    for tag, save in (("npz", np.savez), ("packed", np.savez_compressed)):
        out = io.BytesIO()
        save(out, noise=noise, text=np.ones((2, 3), np.float32))
        yield tag, post("", out.getvalue())
    yield "json", post("n=2", json.dumps({"noise": noise.tolist(), "text": [[1, 2, 3.5]]}).encode())
    yield "rows", post("n=4&format=npy", json.dumps({"text": [[1, 2, 3]]}).encode())
    yield "flat", post("format=npy", json.dumps({"noise": [[1, 2, 3, 4, 5]]}).encode())
    v2 = {"id": "1", "inputs": [{"name": "noise", "shape": [1, 1, 2, 2], "datatype": "FP32", "data": [0, 1, 2, 3]}]}
    yield "v2", post("", json.dumps(v2).encode())


SEEDS = {"loader": models, "plan": models, "card": cards, "npz": arrays, "images": pictures, "run": runs, "body": requests}


def main():
    target, out = sys.argv[1], Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    for name, data in SEEDS[target]():
        (out / name).write_bytes(data)


if __name__ == "__main__":
    main()
