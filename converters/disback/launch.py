"""What `disback` on the command line is: finds libtorch and ONNX Runtime without importing their packages, then becomes the
program. Nothing but the standard library is imported here, so that it takes milliseconds."""

import importlib.util
import os
import sys
from pathlib import Path

PACKAGED = Path(__file__).resolve().with_name("_bin") / "disback"
# Beside the program, where it trains: the version of torch that it was built for.
NEEDS_TORCH = PACKAGED.with_name("torch-version")
# What the program does without torch.
WITHOUT_TORCH = {"sample", "evaluate", "serve", "bench", "report", "package", "completions", "man", "help"}


def folder(package, *more):
    """A folder of an installed package; `None` where it is not installed.

    >>> folder("no_such_package", "lib") is None
    True
    """
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0], *more) if places else None


def torch_version(lib):
    """Version of the torch whose libraries lie in `lib`; empty where it does not say."""
    try:
        text = (lib.parent / "version.py").read_text()
    except OSError:
        return ""
    line = next((line for line in text.splitlines() if line.startswith("__version__")), "")
    return line.replace('"', "'").partition("'")[2].rstrip("'")


def missing(program, command=None):
    """Why the program at `program` cannot do `command` (none: one that trains), in a sentence with the remedy; `None` where it can."""
    if program != PACKAGED or not NEEDS_TORCH.is_file() or command in WITHOUT_TORCH:
        return None
    wanted = NEEDS_TORCH.read_text().strip()
    remedy = f"pip install torch=={wanted}"
    lib = folder("torch", "lib")
    if lib is None or not (lib / "libtorch_cpu.so").is_file():
        return f"disback trains with libtorch, and this Python has no torch\n  help: {remedy}"
    found = torch_version(lib)
    if found.partition("+")[0] != wanted:
        return f"disback was built for torch {wanted}, this Python has {found or 'another'} ({lib.parent})\n  help: {remedy}"
    return None


def environment(program):
    """The environment in which the program finds libtorch and ONNX Runtime. Variables that the user has set win."""
    env = dict(os.environ)
    lib = folder("torch", "lib")
    if program == PACKAGED and lib is not None and lib.resolve() != (program.parents[2] / "torch" / "lib").resolve():
        # Not installed beside us, where the program's own search path leads.
        env["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(lib), env.get("LD_LIBRARY_PATH")]))
    capi = folder("onnxruntime", "capi")
    if capi is not None and not env.get("ORT_DYLIB_PATH"):
        found = sorted(capi.glob("libonnxruntime.so*"))
        if found:
            env["ORT_DYLIB_PATH"] = str(found[-1])
    env.setdefault("DISBACK_PYTHON", sys.executable)
    return env


def program():
    """The program: `DISBACK` where it is set, the one in this package, or the one built in the repository around it.

    Raises FileNotFoundError, with the remedy.
    """
    named = os.environ.get("DISBACK")
    built = Path(__file__).resolve().parents[2] / "target" / "release" / "disback"
    for path in [Path(named)] if named else [PACKAGED, built]:
        if path.is_file():
            return path
    where = f"DISBACK={named}: no such file" if named else "the disback program is not in this package"
    raise FileNotFoundError(f"{where}\n  help: install a wheel (make wheel), or build it (cargo build --release); DISBACK=FILE names another")


def main():
    """The console script: becomes the program, or says why it cannot."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "help")
    if {"-h", "--help", "-V", "--version"} & set(sys.argv[1:]):
        command = "help"
    try:
        path = program()
        why = missing(path, command)
    except FileNotFoundError as error:
        path, why = None, str(error)
    if why is not None:
        if path is None or command != "doctor":
            print(f"error: {why}", file=sys.stderr)
            return 1
        # (On standard output there may be JSON.)
        print(f"missing  libtorch           {why}", file=sys.stderr, flush=True)
    os.execve(path, ["disback", *sys.argv[1:]], environment(path))


if __name__ == "__main__":
    sys.exit(main())
