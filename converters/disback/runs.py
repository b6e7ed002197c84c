"""The way from a network to a student: `convert`, `inspect`, `distill`, `evaluate`, `load_student`."""

import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from .program import DisbackError, UsageError, call, words
from .student import Student

File = str | PathLike[str]


def convert(module: Any, example_inputs: Mapping[str, Any], card: Mapping[str, Any], out: File = "teacher.onnx", **options: Any) -> dict[str, Any]:
    """A torch.nn.Module as `teacher.onnx` with its card: exported, named, compared with the module at three batch sizes.

    `example_inputs`: the forward's arguments by name, in order, tensors with the batch first. `card`: the teacher card, nested as in
    TOML or by dotted keys. `options`: `opset`, `tolerance`, `sample` (False leaves `teacher.sample.npz` out), `progress` (a function
    of a text). Returns what `disback-convert --json` prints. Other frameworks go by `disback-convert` on the command line.

    Raises DisbackError where the network cannot be converted, with the remedy.
    """
    from disback_convert import ConversionError, card as cards, torch_route
    from disback_convert.finish import Options, finish

    try:
        flat = {"output": "output", **dict(leaves(card))}
        names = list(example_inputs)
        cards.check(flat, names, [flat["output"]])
        network = torch_route.network(module.eval(), flat, names, examples=torch_route.convert_inputs(dict(example_inputs)))
        return finish(network, Options(Path(out), **options))
    except ConversionError as error:
        raise DisbackError(str(error)) from error


def inspect(model: File, card: Mapping[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """What `disback inspect --json` says of a file: inputs, parameters, operators, the card. `options` are the command's, with
    underscores: `parameters=True`.

    Raises DisbackError, in the program's words.
    """
    return call("inspect", model, *card_words(card), *words(options))


def evaluate(*sets: File, **options: Any) -> dict[str, Any]:
    """What `disback evaluate --json` measures: the sets, and last the reference. `options` are the command's, with underscores:
    `evaluate("run/student.onnx", "reference.npz", features="features.onnx", repeats=3)`.

    Raises DisbackError, in the program's words.
    """
    return call("evaluate", *sets, *words(options))


@dataclass
class Run:
    """A finished run."""

    path: Path
    student: Path
    warnings: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def load(self, **options: Any) -> Student:
        """The student in onnxruntime; `options` as of `Student`."""
        return Student(self.student, **options)


def distill(
    teacher: File,
    out: File,
    *,
    config: File | None = None,
    card: Mapping[str, Any] | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = True,
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Run:
    """Distils a teacher into `out/student.onnx`; goes on with what an earlier call left unfinished there, if anything.

    `settings` are the configuration's keys (README, `config.toml` of any run): `distill(..., objective="sid",
    backtrack={"updates": 500}, device="cuda")`; they win over the file `config`. `batch="auto"` takes what fits into memory.
    `on_row` is called with each new row of metrics while the run goes on, in this thread: hand it to a tracker there. `progress`:
    a bar in the terminal or the notebook where tqdm is installed. `options` are further ones of the command: `{"time_limit": "2h"}`.

    Raises UsageError for what is refused before the first step, Stopped where the run ended early with a checkpoint, DisbackError
    where it failed; each in the program's words. What `on_row` raises stops the run with a checkpoint.
    """
    given: dict[str, Any] = {"resume": "auto", **(options or {})}
    if settings.get("batch") == "auto":
        given["batch"] = settings.pop("batch")
    pairs = [f"{key}={toml(value)}" for key, value in leaves(settings)]
    args = ["distill", teacher, "-o", out, *card_words(card)]
    if config is not None:
        args += ["--config", config]
    # (`--resume auto` would take the next word for its value.)
    args += [f"--resume={given.pop('resume')}"] if given.get("resume") else []
    args += [word for pair in pairs for word in ("--set", pair)] + words(given)
    follow = Follow(Path(out), on_row, progress)
    try:
        answer = call(*args, watch=follow.look)
    finally:
        follow.close()
    if not answer.get("student"):
        raise DisbackError(f"{out}: the run ended without a student: {answer}")
    return Run(Path(out), Path(answer["student"]), answer.get("warnings", []))


def load_student(run: File | Run, module: Any) -> Any:
    """Loads a student's weights into the torch module that the teacher came from, and returns it. `run`: a run, its folder, or a
    `.safetensors` file of it. Buffers stay as they are.

    Raises DisbackError where the names or shapes are not the module's.
    """
    import torch
    from safetensors.torch import load_file

    path = run.path if isinstance(run, Run) else Path(run)
    file = path / "student.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise DisbackError(f"{file}: no such file\n  help: a run that has not finished has no student yet")
    weights = load_file(file)
    own = dict(module.named_parameters(remove_duplicate=False))
    known = {**own, **dict(module.named_buffers())}
    surplus = [name for name in weights if name not in known]
    wrong = [f"{n} {list(w.shape)} instead of {list(known[n].shape)}" for n, w in weights.items() if n in known and w.shape != known[n].shape]
    held = {id(own[name]) for name in weights if name in own}
    missing = [name for name, value in own.items() if id(value) not in held]
    if surplus or wrong or missing:
        problems = [("not the module's", surplus), ("of another shape", wrong), ("missing", missing)]
        text = "; ".join(f"{what}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}" for what, names in problems if names)
        raise DisbackError(f"{file} does not fit the module: {text}\n  help: it wants the module that the teacher was converted from")
    with torch.no_grad():
        for name, value in weights.items():
            known[name].copy_(value)
    return module


def leaves(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Entries of a nested table by dotted keys.

    >>> list(leaves({"seed": 1, "backtrack": {"updates": 5}}))
    [('seed', 1), ('backtrack.updates', 5)]
    """
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{before}{key}.")
        else:
            yield before + key, value


def toml(value: Any) -> str:
    """A value as TOML has it. (JSON's strings, numbers and arrays are TOML's.)

    >>> toml("sid"), toml([1, 2.5]), toml(Path("a b.npz")), toml(True)
    ('"sid"', '[1, 2.5]', '"a b.npz"', 'true')
    """
    if value is None:
        raise UsageError("a setting is None; leave it out for its default")
    return json.dumps(str(value) if isinstance(value, PathLike) else value)


def card_words(card: Mapping[str, Any] | None) -> list[str]:
    return [word for key, value in leaves(card or {}) for word in ("--card", f"{key}={toml(value)}")]


class Follow:
    """Follows `metrics.jsonl` of a run that another process works at."""

    STAGES = ("degrade", "backtrack")

    def __init__(self, folder: Path, on_row: Callable[[dict[str, Any]], None] | None, progress: bool):
        self.folder, self.on_row, self.bar, self.offset = folder, on_row, None, 0
        self.file = folder / "metrics.jsonl"
        self.wanted = progress
        # What an earlier call has reported; a run that goes on writes some of it again.
        self.last = (-1, 0)
        for row in self.new():
            self.last = max(self.last, self.place(row))
        self.offset = 0

    def place(self, row: dict[str, Any]) -> tuple[int, int]:
        return (self.STAGES.index(row["stage"]), row["iteration"]) if row.get("stage") in self.STAGES else (-1, 0)

    def new(self) -> Iterator[dict[str, Any]]:
        """Rows that were written since the last call. A file that became shorter is read anew."""
        try:
            with open(self.file, "rb") as file:
                if file.seek(0, 2) < self.offset:
                    self.offset = 0
                file.seek(self.offset)
                text = file.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self.offset += len(whole)
        for line in whole.splitlines():
            yield json.loads(line)

    def look(self) -> None:
        for row in self.new():
            if self.place(row) <= self.last:
                continue
            self.last = self.place(row)
            self.show(row)
            if self.on_row is not None:
                self.on_row(row)

    def show(self, row: dict[str, Any]) -> None:
        if not self.wanted:
            return
        if self.bar is None:
            try:
                from tqdm.auto import tqdm
            except ImportError:
                self.wanted = False
                return
            self.bar = tqdm(total=sum(self.totals()), unit="step")
        done = row["iteration"] if row["stage"] == "degrade" else self.totals()[0] + row["updates"]
        self.bar.set_description(row["stage"], refresh=False)
        self.bar.set_postfix({k: f"{row[k]:.4g}" for k in ("mismatch", "images_per_s") if row.get(k) is not None}, refresh=False)
        self.bar.update(done - self.bar.n)

    def totals(self) -> tuple[int, int]:
        """Steps of the stages, by the run's configuration."""
        config = tomllib.loads((self.folder / "config.toml").read_text())
        degrade, backtrack = config.get("degrade", {}), config.get("backtrack", {})
        return (degrade.get("steps", 0) if degrade.get("nodes", 0) else 0, backtrack.get("updates", 0))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
