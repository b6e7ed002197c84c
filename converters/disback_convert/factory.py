"""`module:function` of the user's own code, for every framework."""

import contextlib
import importlib
import os
import sys

from . import ConversionError


@contextlib.contextmanager
def importable(*folders):
    """Lets modules of these folders, and of the current one, be imported."""
    added = [str(folder) for folder in (*folders, os.getcwd()) if str(folder) not in sys.path]
    sys.path[:0] = added
    try:
        yield
    finally:
        for folder in added:
            with contextlib.suppress(ValueError):
                sys.path.remove(folder)


def attribute(spec, what="factory", code=None):
    """The object that `package.module:name` stands for."""
    name, colon, rest = spec.partition(":")
    if not colon or not name or not rest:
        raise ConversionError(f"{spec!r}: write the {what} as module:function, for instance my_model:build")
    with importable(*([code] if code else [])):
        try:
            found = importlib.import_module(name)
            for part in rest.split("."):
                found = getattr(found, part)
            return found
        except ModuleNotFoundError as error:
            where = "run from the folder that holds the module, or set PYTHONPATH" if not code else f"is {code} the right folder?"
            raise ConversionError(f"{spec!r}: {error}; {where}") from error
        except AttributeError as error:
            raise ConversionError(f"{spec!r}: {error}") from error


def call(spec, made, code=None):
    """Runs a factory. Errors inside the user's own code keep their words."""
    with importable(*([code] if code else [])):
        try:
            return made()
        except ConversionError:
            raise
        except Exception as error:
            raise ConversionError(f"{spec!r} failed: {type(error).__name__}: {error}") from error


def fit(source, own, given):
    """Refuses weights that do not fit key by key. `own` and `given`: {name: shape}."""
    missing = [key for key in own if key not in given]
    surplus = [key for key in given if key not in own]
    wrong = [
        f"{key} {list(given[key])} instead of {list(own[key])}"
        for key in own
        if key in given and tuple(given[key]) != tuple(own[key])
    ]
    problems = [
        f"  {title} ({len(keys)}): {', '.join(keys)}"
        for title, keys in (("missing", missing), ("surplus", surplus), ("of another shape", wrong))
        if keys
    ]
    if problems:
        raise ConversionError(f"{source} does not fit the network:\n" + "\n".join(problems))
