"""disback from Python: the teacher to ONNX, the run, the student in use. A thin layer over the program: what it refuses, it says
in the exception's words.

>>> import disback
>>> run = disback.distill("teacher.onnx", "run", objective="sid", backtrack={"updates": 500})  # doctest: +SKIP
>>> images = run.load()(n=16, seed=1)  # doctest: +SKIP

What a function needs beside the standard library (numpy, onnxruntime, torch, the converters' packages) is imported when it is used,
so that the command line, which comes through here too, starts in milliseconds.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .program import DisbackError, Stopped, UsageError, binary, call
    from .runs import Run, convert, distill, evaluate, inspect, load_student
    from .student import Student, classes, noise

__version__ = "0.1.0"

__all__ = [
    "DisbackError",
    "Run",
    "Stopped",
    "Student",
    "UsageError",
    "binary",
    "call",
    "classes",
    "convert",
    "distill",
    "evaluate",
    "inspect",
    "load_student",
    "noise",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'disback' has no attribute {name!r}")
    for part in ("program", "runs", "student"):
        module = importlib.import_module(f".{part}", __name__)
        if hasattr(module, name):
            globals()[name] = getattr(module, name)
            return globals()[name]
    raise AttributeError(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
