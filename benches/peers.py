"""Importers side by side on the same files: ONNX's plain operator cases, and exports of networks where given.

    python benches/peers.py [--cases DIR] [--exports DIR] [--peers a,b] [--json FILE]

Peers: `disback` (the built examples and binary), `onnxruntime`, `reference` (onnx.reference), `onnx2torch`, `onnx2pytorch`;
one whose package this interpreter lacks is named and left out. onnx2torch and onnx2pytorch are no requirement of the tests:

    python -m venv /tmp/peers && /tmp/peers/bin/pip install -r requirements.txt onnx2torch==1.5.15 onnx2pytorch==0.6.0
    cargo build --release --bin disback --example conformance && OMP_NUM_THREADS=1 /tmp/peers/bin/python benches/peers.py

A case has passed where every output has the expected type, shape and values (1e-3 relative + 1e-5); it is refused where the
peer fails with an error (or takes more than 60 s, or dies); anything else is wrong: other values without an error. Gradients
of the trainable importers: the directional derivative of a random sum of the outputs with respect to all float inputs, by
autograd and by central differences of the same module; counted over the passed cases with float inputs and outputs.

Beside all cases, two parts of them: those with float inputs and outputs only, and those whose operators are all among the
ones that exports of diffusion networks use (`DIFFUSION`).

`--exports` takes folders with model.onnx, inputs.npz, expected.npz and, for the number of weights that must be trainable,
grads.safetensors: what `cargo test --release --test corpus` leaves in `target/tmp/corpus-*`. Files in half precision are left
out: what computes in f16 and what computes in f32 differ by rounding.
"""

import argparse
import importlib.util
import json
import os
import select
import subprocess
import sys
import time
import warnings
from pathlib import Path

RTOL, ATOL = 1e-3, 1e-5
SECONDS = 60
PEERS = ["disback", "onnxruntime", "reference", "onnx2torch", "onnx2pytorch"]
TRAINABLE = {"disback", "onnx2torch", "onnx2pytorch"}
ROOT = Path(__file__).resolve().parents[1]
DIFFUSION = set(
    """Add Reshape Mul Sigmoid MatMul Concat Transpose Slice Softmax Conv Shape Unsqueeze Sin Cos Sqrt Cast Div Gather
    InstanceNormalization Gemm Identity Constant LayerNormalization Expand Squeeze Resize Gelu Pow Einsum Reciprocal Sub ReduceMean
    Range Split ConvTranspose CastLike Exp Log Tile Max Where ConstantOfShape Neg SequenceAt SplitToSequence Equal IsNaN ReduceProd
    AveragePool Pad Trilu LessOrEqual GroupNormalization Attention RMSNormalization""".split()
)


def close(got, want):
    import numpy as np

    got, want = np.asarray(got), np.asarray(want)
    if got.dtype != want.dtype or got.shape != want.shape:
        return f"{got.dtype}{list(got.shape)} instead of {want.dtype}{list(want.shape)}"
    a, b = got.astype(np.float64), want.astype(np.float64)
    with np.errstate(all="ignore"):
        same = (a == b) | (np.isnan(a) & np.isnan(b)) | (np.abs(a - b) <= ATOL + RTOL * np.abs(b))
    return "" if same.all() else f"{int((~same).sum())} of {same.size} values differ"


def plain(model):
    """Default domain, and dense float, integer and boolean tensors at the borders."""
    types = {1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13}
    ports = [*model.graph.input, *model.graph.output]
    return all(n.domain in ("", "ai.onnx") for n in model.graph.node) and all(
        p.type.HasField("tensor_type") and p.type.tensor_type.elem_type in types for p in ports
    )


def floats(model):
    """Float tensors in, float tensors out, one of each at least."""
    kinds = {1, 10, 11}
    of = lambda ports: [p.type.tensor_type.elem_type in kinds for p in ports]  # noqa: E731
    return any(of(model.graph.input)) and any(of(model.graph.output))


def case_data(folder, model):
    from onnx import TensorProto, numpy_helper

    def read(kind, count):
        files = [folder / "test_data_set_0" / f"{kind}_{i}.pb" for i in range(count)]
        return [numpy_helper.to_array(TensorProto.FromString(f.read_bytes())) for f in files]

    return read("input", len(model.graph.input)), read("output", len(model.graph.output))


def export_data(folder, model):
    import numpy as np

    weights = {t.name for t in model.graph.initializer}
    given, wanted = np.load(folder / "inputs.npz"), np.load(folder / "expected.npz")
    inputs = [given[i.name] for i in model.graph.input if i.name not in weights]
    return inputs, [wanted[o.name] for o in model.graph.output]


class OnnxRuntime:
    def __init__(self, path, model):
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(self, inputs):
        return self.session.run(None, dict(zip([i.name for i in self.session.get_inputs()], inputs)))


class Reference:
    def __init__(self, path, model):
        from onnx.reference import ReferenceEvaluator

        self.evaluator = ReferenceEvaluator(str(path))

    def run(self, inputs):
        return self.evaluator.run(None, dict(zip(self.evaluator.input_names, inputs)))


class Torch:
    """A module that an importer made."""

    def run(self, inputs):
        import torch

        with torch.no_grad():
            return [t.numpy() for t in self.forward([torch.from_numpy(v.copy()) for v in inputs])]

    def forward(self, tensors):
        out = self.module(*tensors)
        return list(out) if isinstance(out, (list, tuple)) else [out]

    def trainable(self):
        return sum(p.numel() for p in self.module.parameters() if p.requires_grad)

    def gradient(self, inputs):
        """None where there is nothing to differentiate, else what is wrong (empty: nothing)."""
        import torch

        generator = torch.Generator().manual_seed(0)
        noise = lambda t: torch.randn(t.shape, generator=generator, dtype=t.dtype)  # noqa: E731
        points = [torch.from_numpy(v.copy()) for v in inputs]
        free = [i for i, t in enumerate(points) if t.is_floating_point()]
        directions = {i: noise(points[i]) for i in free}
        weights = {}

        def total(tensors):
            outputs = [y for y in self.forward(tensors) if y.is_floating_point()]
            for k, y in enumerate(outputs):
                weights.setdefault(k, noise(y))
            finite = [torch.where(torch.isfinite(y), y, 0) * weights[k] for k, y in enumerate(outputs)]
            return sum(y.double().sum() for y in finite) if finite else None

        leaves = [t.requires_grad_() if i in directions else t for i, t in enumerate(points)]
        value = total(leaves)
        if not free or value is None:
            return None
        value.backward()
        if any(leaves[i].grad is None for i in free):
            return "an input gets no gradient"
        mine = sum(float((leaves[i].grad.double() * directions[i].double()).sum()) for i in free)
        step = 1e-3
        with torch.no_grad():
            moved = [[t + s * step * directions[i] if i in directions else t for i, t in enumerate(points)] for s in (1, -1)]
            theirs = float(total(moved[0]) - total(moved[1])) / (2 * step)
        size = abs(theirs) + abs(mine) + float(abs(value)) * 1e-2 + 1e-2
        return "" if abs(mine - theirs) <= 0.05 * size else f"derivative {mine:.4g}, central difference {theirs:.4g}"


class Onnx2Torch(Torch):
    def __init__(self, path, model):
        from onnx2torch import convert

        self.module = convert(str(path))


class Onnx2Pytorch(Torch):
    def __init__(self, path, model):
        from onnx2pytorch import ConvertModel

        self.module = ConvertModel(model, experimental=True).eval()


IMPORTERS = {"onnxruntime": OnnxRuntime, "reference": Reference, "onnx2torch": Onnx2Torch, "onnx2pytorch": Onnx2Pytorch}


def judge(peer, folder, kind):
    import onnx

    folder = Path(folder)
    model = onnx.load(folder / "model.onnx")
    inputs, expected = (case_data if kind == "case" else export_data)(folder, model)
    try:
        network = IMPORTERS[peer](folder / "model.onnx", model)
        got = network.run(inputs)
    except Exception as e:  # every peer has errors of its own
        return {"outcome": "refused", "reason": f"{type(e).__name__}: {e}"[:200]}
    if len(got) != len(expected):
        return {"outcome": "wrong", "reason": f"{len(got)} outputs instead of {len(expected)}"}
    reasons = [r for r in map(close, got, expected) if r]
    if reasons:
        return {"outcome": "wrong", "reason": reasons[0]}
    answer = {"outcome": "passed"}
    if peer in TRAINABLE and kind == "case":
        try:
            problem = network.gradient(inputs)
        except Exception as e:
            problem = f"{type(e).__name__}: {e}"[:200]
        if problem is not None:
            answer["gradient"] = problem or "passed"
    if peer in TRAINABLE and kind == "export" and (folder / "grads.safetensors").exists():
        answer["trainable"] = [network.trainable(), weights_of(folder)]
    return answer


def weights_of(folder):
    """Elements of all native parameters that take part."""
    from safetensors.numpy import load_file

    tensors = load_file(folder / "grads.safetensors")
    return int(sum(t.size for n, t in tensors.items() if n != "R" and not n.startswith("R.")))


def worker(peer):
    warnings.filterwarnings("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if peer in TRAINABLE:
        import torch

        torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(judge(peer, *json.loads(line))), file=answers, flush=True)


class Peer:
    """A worker process; one that dies or hangs costs its case and is started again."""

    def __init__(self, name):
        self.name, self.process = name, None

    def ask(self, folder, kind):
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--worker", self.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        self.process.stdin.write(json.dumps([str(folder), kind]) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], SECONDS * (5 if kind == "export" else 1))
        line = self.process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        self.process.kill()
        self.process.wait()
        return {"outcome": "refused", "reason": "died" if ready else f"no answer within {SECONDS} s"}

    def close(self):
        if self.process is not None and self.process.poll() is None:
            self.process.stdin.close()
            self.process.wait()


def ours_on_cases(cases, folders):
    binary = ROOT / "target/release/examples/conformance"
    done = subprocess.run([binary, cases, "--json", "--gradients"], capture_output=True, text=True)
    wanted = {f.name for f in folders}
    out = {}
    for c in json.loads(done.stdout)["cases"]:
        if c["name"] in wanted:
            out[c["name"]] = {"outcome": c["outcome"], "reason": c.get("reason", "")}
            gradient = c.get("gradient")
            # {"passed": {...}}, {"wrong": {"reason": ...}}; excepted where there is no derivative.
            if gradient and "excepted" not in gradient:
                out[c["name"]]["gradient"] = "passed" if "passed" in gradient else gradient["wrong"]["reason"]
    return out


def ours_on_export(folder):
    binary = ROOT / "target/release/disback"
    args = ["parity", folder / "model.onnx", "--inputs", folder / "inputs.npz", "--expected", folder / "expected.npz", "--json"]
    done = subprocess.run([binary, *args], capture_output=True, text=True)
    if done.returncode == 0:
        answer = {"outcome": "passed"}
        if (folder / "grads.safetensors").exists():
            seen = subprocess.run([binary, "inspect", folder / "model.onnx", "--json"], capture_output=True, text=True)
            answer["trainable"] = [json.loads(seen.stdout)["parameters"]["elements"], weights_of(folder)]
        return answer
    mismatch = done.stdout.lstrip().startswith("{")
    return {"outcome": "wrong" if mismatch else "refused", "reason": (done.stderr or done.stdout)[:200]}


def table(title, results, total):
    print(f"\n{title} ({total})\n\n| peer | passed | refused | wrong | gradients right | seconds |\n|---|---|---|---|---|---|")
    for peer, (answers, seconds) in results.items():
        count = lambda o: sum(a["outcome"] == o for a in answers.values())  # noqa: B023, E731
        tried = [a["gradient"] for a in answers.values() if "gradient" in a]
        whole = [a["trainable"] for a in answers.values() if "trainable" in a]
        gradients = f"{tried.count('passed')} of {len(tried)}" if tried else ""
        if whole:
            gradients = f"all weights trainable: {sum(a == b for a, b in whole)} of {len(whole)}"
        print(f"| {peer} | {count('passed')} | {count('refused')} | {count('wrong')} | {gradients} | {seconds:.0f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=Path, help="default: the suite of the installed onnx")
    parser.add_argument("--exports", type=Path)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--json", type=Path, help="every answer")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker)
    import onnx

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    peers = []
    for peer in options.peers.split(","):
        package = {"reference": "onnx", "disback": "onnx"}.get(peer, peer)
        built = peer != "disback" or (ROOT / "target/release/examples/conformance").exists()
        if importlib.util.find_spec(package) and built:
            peers.append(peer)
        else:
            print(f"{peer} is missing: {'not built' if not built else f'no package {package} here'}", file=sys.stderr)
    cases = options.cases or Path(onnx.__file__).parent / "backend/test/data/node"
    folders, parts = [], {"with floats in and out": set(), "of operators of diffusion exports": set()}
    for file in sorted(cases.glob("*/model.onnx")):
        model = onnx.load(file, load_external_data=False)
        if plain(model):
            folders.append(file.parent)
            of = [floats(model), all(n.op_type in DIFFUSION for n in model.graph.node)]
            [names.add(file.parent.name) for names, fits in zip(parts.values(), of) if fits]
    exports = sorted(f.parent for f in options.exports.glob("*/model.onnx")) if options.exports else []
    exports = [f for f in exports if not {"half", "brain", "converted"} & set(f.name.split("-")) and (f / "expected.npz").exists()]
    report = {}
    for kind, title, list_ in (("case", "plain operator cases", folders), ("export", "exports of networks", exports)):
        results = {}
        for peer in peers if list_ else []:
            start = time.monotonic()
            if peer == "disback":
                answers = ours_on_cases(cases, list_) if kind == "case" else {f.name: ours_on_export(f) for f in list_}
            else:
                process = Peer(peer)
                answers = {f.name: process.ask(f, kind) for f in list_}
                process.close()
            results[peer] = (answers, time.monotonic() - start)
        if results:
            table(title, results, len(list_))
        for part, names in parts.items() if kind == "case" and results else ():
            table(f"plain cases {part}", {p: ({n: a[n] for n in names if n in a}, s) for p, (a, s) in results.items()}, len(names))
        report[kind] = {p: a for p, (a, _) in results.items()}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
