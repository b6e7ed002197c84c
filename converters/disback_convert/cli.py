"""Turns a native diffusion checkpoint into teacher.onnx with its teacher card, for disback. Exit codes: 0 written,
1 refused, 2 the command line, 130 and 143 stopped."""

import argparse
import contextlib
import json
import signal
import sys
from pathlib import Path

from . import ConversionError
from .routes import ROUTES


def onnx_file(text):
    """A path with a suffix: runtimes and `disback` know ONNX files by theirs."""
    path = Path(text)
    return path if path.suffix or not path.name else path.with_suffix(".onnx")


def common(parser):
    """Options of every route."""
    group = parser.add_argument_group("every route")
    group.add_argument("--card", action="append", default=[], metavar="KEY=VALUE", help="an entry of the teacher card")
    group.add_argument("--card-file", type=Path, help="the teacher card as TOML; --card wins over it")
    group.add_argument("--opset", type=int, help="ONNX opset (default: 23, or the newest that the exporter writes)")
    group.add_argument("--tolerance", type=float, default=1e-4, help="allowed difference from the framework, in standard deviations of the output")
    group.add_argument("--no-sample", action="store_true", help="leave out the side file of inputs and the framework's own outputs")
    group.add_argument("-o", "--out", type=onnx_file, default=Path("teacher.onnx"), help="the file to write; without a suffix it gets .onnx")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress")
    group.add_argument("--json", action="store_true", help="print the result for machines")


def parser():
    top = argparse.ArgumentParser(prog="disback-convert", description=__doc__)
    routes = top.add_subparsers(dest="route", required=True, metavar="ROUTE")
    for name, route in ROUTES.items():
        one = routes.add_parser(name, help=route.help, description=route.help)
        route.arguments(one)
        common(one)
    return top


class Stopped(BaseException):
    """SIGTERM or SIGHUP: what is half done is cleared away before the process ends."""


@contextlib.contextmanager
def stoppable():
    """Within this, the signals that ask a process to end become an exception."""

    def stop(number, _frame):
        raise Stopped(number)

    try:
        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    except ValueError:  # not the main thread: signals are somebody else's
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def folder(path):
    """Makes a folder; where this ends in an error, those that were made go again, unless somebody has put something there."""
    made = [place for place in (path, *path.parents) if not place.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConversionError(f"{path}: cannot be made: {error.strerror or error}") from error
    try:
        yield
    except BaseException:
        for place in made:
            with contextlib.suppress(OSError):
                place.rmdir()
        raise


def main(argv=None):
    args = parser().parse_args(argv)
    route = ROUTES[args.route]
    progress = (lambda text: None) if args.quiet or args.json else (lambda text: print(f"  {text} ...", file=sys.stderr, flush=True))
    try:
        # Before gigabytes are read.
        with stoppable(), folder(args.out.parent):
            result = route.run(args, progress)
    except (KeyboardInterrupt, Stopped) as error:
        print("error: stopped; no unfinished file is left", file=sys.stderr)
        return 128 + (error.args[0] if isinstance(error, Stopped) else signal.SIGINT)
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except MemoryError:
        print("error: not enough memory; no unfinished file is left", file=sys.stderr)
        return 1
    except ImportError as error:
        name = (error.name or "").partition(".")[0]
        if name not in route.needs:
            raise
        print(f"error: the {args.route} route needs {name}: pip install 'disback[{route.extra}]' (in a clone: './converters[{route.extra}]')", file=sys.stderr)
        return 1
    from .finish import show

    if args.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
