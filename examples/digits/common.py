"""The digits data set, the Frechet distance and the writing of ONNX metadata, shared by the scripts of this folder."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import scipy.linalg
from sklearn.datasets import load_digits

HERE = Path(__file__).resolve().parent


def digits():
    """scikit-learn's digits: images [1797,1,8,8] f32 in [-1,1] (17 grey levels), labels [1797] int64."""
    data = load_digits()
    images = data.images.astype(np.float32)[:, None] / 8 - 1
    return images, data.target.astype(np.int64)


def to_uint8(images):
    """[-1,1] -> 0..255, rounded and clipped."""
    return np.clip(np.rint((np.asarray(images, dtype=np.float64) + 1) * 127.5), 0, 255).astype(np.uint8)


def from_uint8(images):
    """0..255 -> [-1,1] f32."""
    return (images.astype(np.float64) / 127.5 - 1).astype(np.float32)


def session(path):
    """An ONNX Runtime session on the CPU; `path` is a file or the bytes of a model."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(path if isinstance(path, bytes) else str(path), options, ["CPUExecutionProvider"])


def features(images, classifier=HERE / "classifier.onnx"):
    """uint8 images [B,1,8,8] or [B,8,8] -> classifier features [B,64] f64 and logits [B,10]."""
    net = session(classifier)
    images = from_uint8(np.asarray(images).reshape(-1, 1, 8, 8))
    parts = [net.run(["features", "logits"], {"images": images[i : i + 512]}) for i in range(0, len(images), 512)]
    return np.concatenate([p[0] for p in parts]).astype(np.float64), np.concatenate([p[1] for p in parts])


def frechet(a, b):
    """Squared Frechet distance between Gaussians fitted to two feature sets [n,d] (float64)."""
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # trace of the root of cov_a cov_b, through the symmetric root of cov_a: real and stable for singular matrices
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(scipy.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def export(module, args, path, metadata, input_names, output_names, opset=20):
    """Exports by torch's dynamo exporter with a dynamic batch as one file, and writes `metadata` into the model."""
    import torch

    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    program = torch.onnx.export(
        module,
        args,
        dynamo=True,
        opset_version=opset,
        input_names=input_names,
        output_names=output_names,
        dynamic_shapes=tuple({0: batch} for _ in args),
        external_data=False,
        verbose=False,
    )
    buffer = io.BytesIO()
    onnx.save(program.model_proto, buffer)
    model = onnx.load_model_from_string(buffer.getvalue())
    for node in model.graph.node:  # module paths and source lines of the exporter: nothing a reader needs
        del node.metadata_props[:]
        node.doc_string = ""
    for value in list(model.graph.value_info) + list(model.graph.input) + list(model.graph.output):
        del value.metadata_props[:]
    for weight in model.graph.initializer:
        del weight.metadata_props[:]
        weight.doc_string = ""
    del model.graph.value_info[:]  # the checker infers shapes anew
    del model.graph.metadata_props[:]
    del model.metadata_props[:]
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(model, full_check=True)
    Path(path).write_bytes(model.SerializeToString())


def write_png(path, grey, scale=1):
    """A grey uint8 image [H,W] as PNG, every pixel enlarged to scale x scale."""
    grey = np.kron(grey, np.ones((scale, scale), np.uint8)).astype(np.uint8)
    rows = np.concatenate([np.zeros((len(grey), 1), np.uint8), grey], axis=1).tobytes()

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], 8, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows, 9)), chunk(b"IEND", b"")]
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def export_denoiser(net, args, path, metadata, trials):
    """Exports a denoiser of (x, sigma, labels) and checks the file against torch on `trials`, one triple a batch."""
    import torch

    net = net.eval()
    export(net, args, path, metadata, ["x", "sigma", "labels"], ["denoised"])
    runner = session(path)
    worst = 0.0
    for x, sigma, labels in trials:
        with torch.no_grad():
            native = net(x, sigma, labels).numpy()
        ours = runner.run(["denoised"], {"x": x.numpy(), "sigma": sigma.numpy(), "labels": labels.numpy()})[0]
        worst = max(worst, float(np.abs(ours - native).max()))
    if worst > 1e-4:
        raise SystemExit(f"{path}: ONNX Runtime differs from torch by {worst}")
    print(f"{path}: {Path(path).stat().st_size} bytes, ONNX Runtime differs from torch by at most {worst:.1e}")
