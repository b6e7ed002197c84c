"""A student in use, by onnxruntime: the samples of `disback sample` for the same seed."""

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

SEED_CONVENTION = "chacha8-box-muller-v1"


def words(seed: int, index: int, tag: bytes, count: int) -> NDArray[np.uint32]:
    """`count` 32-bit words of the ChaCha8 stream whose key is seed (u64), index (u64) and tag (16 bytes), little-endian."""
    key = np.frombuffer(seed.to_bytes(8, "little") + index.to_bytes(8, "little") + tag.ljust(16, b"\0"), "<u4")
    blocks = -(-count // 16)
    start = np.zeros((16, blocks), np.uint32)
    start[:4] = np.frombuffer(b"expand 32-byte k", "<u4")[:, None]
    start[4:12] = key[:, None]
    number = np.arange(blocks, dtype=np.uint64)
    start[12], start[13] = number & np.uint64(0xFFFFFFFF), number >> np.uint64(32)
    x = start.copy()

    def mix(a: int, b: int, c: int, d: int) -> None:
        for to, by, into, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[to] += x[by]
            turned = x[into] ^ x[to]
            x[into] = (turned << np.uint32(bits)) | (turned >> np.uint32(32 - bits))

    for _ in range(4):
        for k in range(4):
            mix(k, 4 + k, 8 + k, 12 + k)
        for k in range(4):
            mix(k, 4 + (k + 1) % 4, 8 + (k + 2) % 4, 12 + (k + 3) % 4)
    return (x + start).T.reshape(-1)[:count]


def noise(shape: Sequence[int], seed: int = 0, start: int = 0, count: int = 1) -> NDArray[np.float32]:
    """Standard normal noise `[count, *shape]` of the samples `start`, `start + 1`, ... of a seed: the convention that students
    carry in their metadata (`chacha8-box-muller-v1`).

    >>> [f"{v:.6f}" for v in noise([6], seed=42, start=7)[0]]
    ['-0.448621', '-0.794242', '0.370676', '-0.288420', '-0.291899', '-1.357797']
    """
    length = int(np.prod(shape))
    rows = np.empty((count, length), np.float32)
    for k in range(count):
        pairs = words(seed, start + k, b"noise", length + length % 2).astype(np.float64).reshape(-1, 2)
        radius = np.sqrt(-2.0 * np.log((pairs[:, 0] + 1.0) / 2.0**32))
        angle = 2.0 * np.pi * pairs[:, 1] / 2.0**32
        rows[k] = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)[:length]
    return rows.reshape(count, *shape)


def classes(number: int, seed: int = 0, start: int = 0, count: int = 1) -> NDArray[np.int64]:
    """Classes of the samples `start`, `start + 1`, ... of a seed, drawn uniformly from 0 to `number - 1`.

    >>> classes(10, seed=1, count=4).tolist()
    [9, 1, 5, 6]
    """
    low_high = [words(seed, start + k, b"class", 2).tolist() for k in range(count)]
    return np.array([((high << 32 | low) * number) >> 64 for low, high in low_high], np.int64)


class Student:
    """A `student.onnx` in onnxruntime.

    >>> student = Student("run/student.onnx")  # doctest: +SKIP
    >>> student(n=64, seed=1, labels=range(10)).shape  # doctest: +SKIP
    (64, 1, 8, 8)

    `providers` and `session_options` are onnxruntime's; the CPU where absent. Raises ValueError for a file that is no student.
    """

    def __init__(self, path: str | PathLike[str], providers: Sequence[Any] | None = None, session_options: Any = None):
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(path), session_options, providers=list(providers or ["CPUExecutionProvider"]))
        entries = self.session.get_modelmeta().custom_metadata_map
        self.metadata = {key.removeprefix("disback."): text for key, text in entries.items() if key.startswith("disback.")}
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        if "consumer" not in self.metadata or "noise" not in self.inputs:
            raise ValueError(f"{path}: not a student written by disback; `disback distill` and `disback export` write them")
        self.consumer: dict[str, Any] = json.loads(self.metadata["consumer"])
        said = self.consumer.get("seed_convention")
        if said != SEED_CONVENTION:
            raise ValueError(f"{path}: draws its noise by {said}; this package knows {SEED_CONVENTION}: take the version that wrote it")
        self.noise_shape = [d for d in self.inputs["noise"].shape[1:]]

    @property
    def classes(self) -> int | None:
        """Number of classes; `None` where no condition is a class."""
        found = [i["classes"] for i in self.consumer["inputs"] if "classes" in i]
        return found[0] if found else None

    @property
    def range(self) -> tuple[float, float] | None:
        """Range of the samples' values; `None` for latents."""
        found = next(o for o in self.consumer["outputs"] if o["name"] == "sample").get("range")
        return tuple(found) if found else None

    def labels(self, n: int, seed: int = 0, labels: ArrayLike | None = None, start: int = 0) -> NDArray[np.int64] | None:
        """Classes of the samples: those given, in turn, or drawn from the seed. `None` where the student has none."""
        if self.classes is None:
            if labels is not None:
                raise ValueError("the student has no classes")
            return None
        if labels is None:
            return classes(self.classes, seed, start, n)
        given = np.atleast_1d(np.asarray(list(labels) if isinstance(labels, range) else labels, np.int64))
        if given.size == 0 or given.min() < 0 or given.max() >= self.classes:
            raise ValueError(f"labels {given.tolist()}: the student has classes 0 to {self.classes - 1}")
        return given[(start + np.arange(n)) % len(given)]

    def __call__(
        self,
        n: int = 1,
        seed: int = 0,
        labels: ArrayLike | None = None,
        conditions: Mapping[str, ArrayLike] | None = None,
        start: int = 0,
        batch: int = 64,
    ) -> NDArray[np.float32]:
        """`n` samples as f32 `[n, ...]` in the student's range: those that `disback sample --seed` makes. `labels`: classes of the
        samples in turn, drawn from the seed where absent. `conditions`: rows for inputs that are no classes, in turn. `start`:
        number of the first sample of the seed. `batch`: samples a call of the network.

        Raises ValueError for labels or conditions that do not fit.
        """
        rows = {name: np.asarray(value) for name, value in (conditions or {}).items()}
        wanted = [i["name"] for i in self.consumer["inputs"] if i["name"] != "noise" and "classes" not in i]
        if set(rows) != set(wanted) or any(r.ndim == 0 or len(r) == 0 for r in rows.values()):
            raise ValueError(f"conditions {sorted(rows)}: the student wants rows for {sorted(wanted)}")
        fixed = self.inputs["noise"].shape[0]
        piece = fixed if isinstance(fixed, int) else max(batch, 1)
        made = []
        for first in range(start, start + n, piece):
            count = min(piece, start + n - first)
            # A file of a fixed batch is called with it; what is too many is left out.
            calls = piece if isinstance(fixed, int) else count
            made.append(self.session.run(["sample"], self.feed(calls, seed, labels, rows, first))[0][:count])
        return np.concatenate(made).astype(np.float32)

    def feed(self, count: int, seed: int, labels: ArrayLike | None, rows: Mapping[str, NDArray[Any]], start: int) -> dict[str, NDArray[Any]]:
        """The network's inputs for `count` samples from number `start` on."""
        chosen = self.labels(count, seed, labels, start)
        fed: dict[str, NDArray[Any]] = {"noise": noise(self.noise_shape, seed, start, count)}
        for entry in self.consumer["inputs"][1:]:
            name = entry["name"]
            if name in rows:
                fed[name] = rows[name][(start + np.arange(count)) % len(rows[name])]
            elif entry["distribution"].startswith("one-hot"):
                fed[name] = np.eye(entry["classes"], dtype=np.float32)[chosen]
            else:
                # Some graphs take a column of class numbers.
                fed[name] = chosen[:, None] if len(self.inputs[name].shape) == 2 else chosen
        return {name: np.ascontiguousarray(value, dtype(self.inputs[name].type)) for name, value in fed.items()}


def dtype(text: str) -> np.dtype:
    """The element type of an input, from onnxruntime's words.

    >>> dtype("tensor(float16)")
    dtype('float16')
    """
    names = {"float": "float32", "double": "float64"}
    inner = text.removeprefix("tensor(").removesuffix(")")
    return np.dtype(names.get(inner, inner))
