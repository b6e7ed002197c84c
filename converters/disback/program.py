"""Calls of the program: its answer for machines becomes Python's values, its errors become exceptions."""

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import launch


class DisbackError(RuntimeError):
    """The program failed; the text is its own, with what to do about it."""

    exit_code = 1


class UsageError(DisbackError, ValueError):
    """It refused its arguments, and changed nothing."""

    exit_code = 2


class Stopped(DisbackError):
    """A run was stopped with a checkpoint: by a signal, a time limit (75) or a person (130). Call it again to go on."""

    def __init__(self, text: str, exit_code: int = 75):
        super().__init__(text)
        self.exit_code = exit_code


def binary(command: str | None = None) -> Path:
    """The program that is called: `DISBACK`, the wheel's own, or the one built in the repository. `command`: what it is to do, where that
    is known.

    Raises DisbackError where there is none, or where the libtorch is missing that the command needs.
    """
    try:
        path = launch.program()
    except FileNotFoundError as error:
        raise DisbackError(str(error)) from None
    why = launch.missing(path, command)
    if why is not None:
        raise DisbackError(why)
    return path


def failure(code: int, text: str) -> DisbackError:
    """The exception of an exit code and what the program wrote.

    >>> failure(2, "warning: slow\\nerror: --steps 0: expected 1 or more")
    UsageError('--steps 0: expected 1 or more')
    """
    said = text.strip()
    at = ("\n" + said).rfind("\nerror: ")
    said = said[at + len("error: ") :] if at >= 0 else said
    if code < 0:
        return DisbackError(f"ended by signal {-code}" + (f"\n{said}" if said else ""))
    if code in (75, 130):
        return Stopped(said or "stopped with a checkpoint; the same call goes on", code)
    return (UsageError if code == 2 else DisbackError)(said or f"exit code {code}")


def words(options: dict[str, Any]) -> list[str]:
    """Options of the command line: `None` and False are left out, True is a flag, a list goes by commas, a dict by `KEY=VALUE`, as
    often as it has entries.

    >>> words({"steps": [9, 18], "by_class": True, "repeats": 3, "features": None, "condition": {"text": "rows.npy"}})
    ['--steps', '9,18', '--by-class', '--repeats', '3', '--condition', 'text=rows.npy']
    """
    out: list[str] = []
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        if value is None or value is False:
            continue
        if value is True:
            out.append(option)
        elif isinstance(value, dict):
            out += [word for key, entry in value.items() for word in (option, f"{key}={entry}")]
        else:
            out += [option, ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)]
    return out


def call(*args: Any, watch: Callable[[], None] | None = None, codes: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """Runs `disback ARGS --json` and gives its answer. `watch` is called five times a second while it runs, and at its end;
    where it raises, the program is told to stop (SIGTERM, which leaves a checkpoint), and the exception goes on. So it is with
    Ctrl-C.

    Raises DisbackError with the program's words where the exit code is not among `codes`.
    """
    path = binary(str(args[0]) if args else None)
    command = [str(path), *map(os.fspath, map(str, args)), "--json"]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(command, env=launch.environment(path), stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        try:
            while watch is not None and process.poll() is None:
                watch()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.2)
            process.wait()
            if watch is not None:
                watch()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        out.seek(0)
        err.seek(0)
        said, text = out.read().decode(errors="replace"), err.read().decode(errors="replace")
    if process.returncode not in codes:
        raise failure(process.returncode, text)
    try:
        return json.loads(said)
    except ValueError:
        raise DisbackError(f"{' '.join(command)}: no JSON in its answer: {said[-200:]!r}") from None
