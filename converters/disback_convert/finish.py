"""From an exporter's file to `teacher.onnx`: names and card written in, compared with the framework, put in place whole."""

import contextlib
import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import numpy as np
import onnx
import onnxruntime as ort
from onnx import external_data_helper, numpy_helper

from . import VERSION, ConversionError, card as cards, lost, weights as names
from .examples import repeat, rows

PROTO_LIMIT = 2_000_000_000  # bytes of weights above which they go into a file beside the graph


@dataclass
class Network:
    """A framework's network, ready to be exported and compared with."""

    card: dict
    framework: str  # name and version, as "torch 2.11.0"
    exporter: str
    inputs: list  # names of the graph's inputs, in order
    outputs: list
    export: Callable  # export(path, inputs, opset): writes the graph; returns the opset it wrote
    native: Callable  # native({input: array}) -> [array]: the framework's own forward
    weights: list  # of weights.Weight
    dtypes: dict = field(default_factory=dict)  # of inputs that are not f32 (classes: not i64)
    examples: dict | None = None  # inputs that the user's factory brought
    special: dict = field(default_factory=dict)  # {input: function of an array's shape} where noise makes no sense (masks)
    export_saved: Callable | None = None  # the same of the user's own file with its weights as they are, where `export` fails
    opset: int = 23
    opset_why: str = ""  # why not newer, where the exporter cannot


@dataclass
class Options:
    """What every route takes from the command line."""

    out: Path
    tolerance: float = 1e-4
    opset: int | None = None
    sample: bool = True
    progress: Callable = lambda text: None


def feed(network, batch):
    """Example inputs of one batch size."""
    if network.examples is not None:
        return repeat(network.examples, batch)
    made = rows(network.card, network.inputs, batch, network.dtypes)
    return made | {name: make(made[name].shape).astype(made[name].dtype) for name, make in network.special.items()}


def session(path):
    """ONNX Runtime on the CPU, or a ConversionError in its words."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", 0))
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ConversionError(f"ONNX Runtime cannot load what the exporter wrote: {error}\nTry another --opset.") from error


def check_batch(model, network):
    """Refuses a graph whose inputs have a fixed number of rows."""
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name in network.inputs and dims and dims[0].HasField("dim_value"):
            raise ConversionError(
                f"input {value.name!r} has a fixed batch of {dims[0].dim_value}: the exporter took the example's batch for a constant. "
                "Look for a shape that the forward turns into a Python number (x.shape[0] in a reshape: write -1 instead)"
            )


def check_types(model):
    """Refuses doubles among the inputs: nothing that follows computes in them."""
    for value in [*model.graph.input, *model.graph.output]:
        if value.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE:
            raise ConversionError(
                f"{value.name!r} is float64; bring the network and its inputs to float32 before converting "
                "(Keras: floatx, Paddle: set_default_dtype, JAX: leave jax_enable_x64 off)"
            )


def compare(runner, network, inputs, least=0.0):
    """Differences between ONNX Runtime and the framework: (largest absolute, largest in standard deviations, native outputs,
    largest standard deviation). `least`: what a standard deviation counts for at least."""
    try:
        ours = runner.run(network.outputs, inputs)
    except Exception as error:
        raise ConversionError(f"ONNX Runtime cannot run the graph on {len(next(iter(inputs.values())))} rows: {error}") from error
    native = network.native(inputs)
    absolute = relative = widest = 0.0
    for name, mine, theirs in zip(network.outputs, ours, native):
        if mine.shape != theirs.shape:
            raise ConversionError(f"output {name!r}: ONNX Runtime gives shape {mine.shape}, {network.framework} {theirs.shape}")
        if not np.isfinite(theirs).all():
            raise ConversionError(f"output {name!r}: the network itself gives NaN or infinite values in {network.framework}")
        apart = float(np.abs(mine.astype(np.float64) - theirs).max())
        # One row of one number has no spread; its size then stands for it.
        spread = float(theirs.std()) or float(np.abs(theirs).max())
        absolute, relative = max(absolute, apart), max(relative, apart / max(spread, least, 1e-12))
        widest = max(widest, spread)
    return absolute, relative, native, widest


def agree(path, network, tolerance, progress, least=0.0):
    """Compares at three batch sizes; returns the largest differences, the stored sample of the last and its outputs' spread."""
    runner = session(path)
    absolute = relative = 0.0
    stored = {}
    for batch in (1, 2, 5):
        progress(f"comparing with {network.framework} at batch {batch}")
        inputs = feed(network, batch)
        a, r, native, spread = compare(runner, network, inputs, least)
        absolute, relative = max(absolute, a), max(relative, r)
        stored = inputs | dict(zip(network.outputs, native))
    if not relative <= tolerance:
        raise ConversionError(
            f"ONNX Runtime differs from {network.framework} by {relative:.2e} of the output's standard deviation "
            f"({absolute:.2e} absolute; allowed {tolerance:.0e} of it); nothing was written. Try another --opset; if the network "
            "computes in half precision on purpose, --tolerance"
        )
    return absolute, relative, stored, spread


def agree_drawn_anew(path, network, named, fates, tolerance, progress):
    """The comparison once more where weights are all but zero (layers that training begins at zero): they hide what comes
    before them, and two outputs of zeros are always alike. None where no weight is. A tensor that stands for several weights of
    equal values stays as it is, and they do."""
    readers = Counter(name for weight in network.weights for name in weight.found)
    alone = [w for w in network.weights if w.found and all(readers[name] == 1 for name in w.found)]
    alone = [w for w in alone if w.name not in fates.merged.values()]
    if not any(lost.faint(weight) for weight in alone):
        return None
    model = onnx.load(path)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    with tempfile.TemporaryDirectory(dir=path.parent) as side, lost.drawn_anew(alone) as drawn:
        for weight in alone:
            for name in weight.found if weight.name in drawn else []:
                stored, tensor = named.layout[name], tensors[name]
                value = np.ascontiguousarray(drawn[weight.name].transpose(stored.order)).reshape(stored.shape)
                tensor.CopyFrom(numpy_helper.from_array(value.astype(numpy_helper.to_array(tensor).dtype), name))
        file = Path(side) / path.name
        big = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > PROTO_LIMIT
        onnx.save(model, file, save_as_external_data=big, location=f"{path.name}.data")
        absolute, relative, _, spread = agree(file, network, tolerance, progress)
    return {"max_abs": absolute, "max_relative": relative, "spread": spread, "weights": sorted(drawn)}


def deterministic(network):
    """Refuses a network that gives two answers to one question: dropout or noise left on."""
    inputs = feed(network, 2)
    try:
        first, second = network.native(inputs), network.native(inputs)
    except (ConversionError, MemoryError):
        raise
    except Exception as error:
        given = ", ".join(f"{name} {value.dtype} {list(value.shape)}" for name, value in inputs.items())
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise ConversionError(
            f"the network does not run in {network.framework} on {given}: {type(error).__name__}: {said}\n"
            "The shapes are the card's: shape, layout, conditions.NAME.kind, .classes and .shape"
        ) from error
    if any(a.shape != b.shape or not np.array_equal(a, b, equal_nan=True) for a, b in zip(first, second)):
        raise ConversionError(
            f"two calls of the network in {network.framework} differ on the same inputs: dropout or noise is on. Switch it to "
            "inference (torch: eval(), Flax: deterministic or use_running_average, Keras: training=False, Paddle: eval())"
        )
    return first


def describe(model, network, named):
    """Card, parameters and origin into the model's metadata."""
    del model.metadata_props[:]
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer]:
        del value.metadata_props[:]
        value.doc_string = ""
    model.doc_string = model.graph.doc_string = ""
    entries = cards.metadata(network.card)
    entries["disback.converter"] = f"disback-convert {VERSION}, {network.framework}, {network.exporter}"
    if named.parameters:
        entries["disback.parameters"] = json.dumps(named.parameters)
    if named.tied:
        entries["disback.parameters.tied"] = json.dumps(named.tied)
    laid = {name: stored.entry() for name, stored in named.layout.items() if stored.entry() is not None}
    if laid:
        entries["disback.parameters.layout"] = json.dumps(laid)
    for key, value in entries.items():
        model.metadata_props.add(key=key, value=value)


def export(network, path, opset, progress):
    """Writes the graph with the framework's names; returns it with them and with what became of the weights it lacks. Weights
    that another value of theirs makes disappear (they were folded into another tensor) have their own value when the graph is
    written again."""
    wanted = opset or network.opset
    examples = feed(network, 3)
    folded, unused = set(), None
    while True:
        try:
            with names.told_apart(network.weights, folded) as changed:
                network.export(path, examples, wanted)
        except ConversionError:
            if network.export_saved is None:
                raise
            network.export_saved(path, examples, wanted)
            changed = {}
        progress("naming the weights")
        model = onnx.load(path, load_external_data=False)
        named = names.name(model, path.parent, network.weights, changed, folded)
        if unused is None:
            missing = [weight for weight in network.weights if weight.name in named.lost]
            unused = lost.without_effect(missing, network.native, feed(network, 2), network.weights)
        again = {name for name in (*named.lost, *named.partial) if name in changed and name not in unused} if named.unknown else set()
        if not again:
            break
        folded |= again
        for weight in network.weights:
            weight.found.clear()
        clear(path.parent)
    if named.unclear:
        raise ConversionError(
            f"which way round {', '.join(named.unclear)} lies in the exporter's file cannot be told: its values equal their own "
            "transpose. Change one of its numbers a little (by 1e-6), save the network again and convert that"
        )
    with tempfile.TemporaryDirectory(dir=path.parent) as side:
        file = Path(side) / path.name

        def once_more():
            export = network.export if network.export_saved is None else network.export_saved
            export(file, examples, wanted)
            return onnx.load(file, load_external_data=False)

        fates = lost.fates(named, network.weights, unused, once_more, file.parent)
    # Of a saved network nothing but the file's structure tells which constants hold what was folded: without a list it decides.
    named.parameters = [] if fates.folded and not fates.constants else named.parameters + fates.constants
    return model, named, fates


def clear(folder):
    """Removes the files of an export."""
    for file in folder.iterdir():
        file.unlink()


def save(model, path):
    """Writes the graph back. Weights beside it stay there; where the ones inside grew above the limit, all go beside it."""
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > PROTO_LIMIT:
        external_data_helper.load_external_data_for_model(model, str(path.parent))
        clear(path.parent)
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
    else:
        path.write_bytes(model.SerializeToString())


SCRATCH = ".disback-convert-"


@contextlib.contextmanager
def locked(folder):
    """Holds a folder for as long as this process lives; yields whether it was free."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError:
            free = False
        yield free
    finally:
        os.close(handle)


def sweep(folder):
    """Removes what conversions that were killed outright left here; those of living processes are locked."""
    for left in folder.glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError), locked(left) as free:
            if free:
                shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def scratch(out, need):
    """A folder beside `out` that vanishes; full disks and missing folders are said in words."""
    folder = out.parent
    if not folder.is_dir():
        raise ConversionError(f"{folder}: no such folder")
    sweep(folder)
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ConversionError(f"no space left in {folder}: {need / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free; nothing was written")
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=SCRATCH) as made, locked(made):
            yield Path(made)
    except OSError as error:
        raise ConversionError(f"cannot write in {folder}: {error.strerror or error}; nothing was written") from error


def place(files, folder):
    """Moves finished files into the folder, each whole, the last one last. A graph of an earlier conversion goes first: it
    must not be found beside weights that are not its own."""
    for file in files:
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
    *others, graph = files
    data = folder / f"{graph.name}.data"
    if data.exists() or any(file.name == data.name for file in others):
        (folder / graph.name).unlink(missing_ok=True)
        data.unlink(missing_ok=True)
    for file in files:
        os.replace(file, folder / file.name)


def finish(network, options):
    """The whole way from a network to files in place. Returns what was done, for people and machines."""
    cards.check(network.card, network.inputs, network.outputs)
    return write(network, options, describe)


def finish_part(network, options, metadata=()):
    """The same for what is no teacher (a decoder, a text encoder): no card, its own example inputs. `metadata`: pairs for the file."""

    def origin(model, network, _named):
        del model.metadata_props[:]
        model.metadata_props.add(key="disback.converter", value=f"disback-convert {VERSION}, {network.framework}, {network.exporter}")
        for key, value in metadata:
            model.metadata_props.add(key=key, value=value)

    return write(network, options, origin)


def write(network, options, describe):
    """Exports, names, compares, puts in place."""
    out, progress = Path(options.out), options.progress
    count = sum(int(np.prod(np.shape(w.get()))) for w in network.weights if w.trained)
    size = sum(np.asarray(w.get()).nbytes for w in network.weights)
    progress(f"running {network.framework} on example inputs")
    deterministic(network)
    # Twice: exporters and the rewriting above hold a copy of the weights.
    with scratch(out, 2 * size + (1 << 20)) as folder:
        path = folder / out.name
        progress(f"exporting by {network.exporter}")
        model, named, fates = export(network, path, options.opset, progress)
        check_batch(model, network)
        check_types(model)
        describe(model, network, named)
        save(model, path)
        progress("checking the file")
        try:
            onnx.checker.check_model(str(path), full_check=size < PROTO_LIMIT)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ConversionError(f"the exporter wrote an invalid file: {str(error).strip()}\nTry another --opset.") from error
        drawn = agree_drawn_anew(path, network, named, fates, options.tolerance, progress)
        # Rounding counts against what the network gives once these weights are trained, not against next to nothing.
        least = drawn["spread"] if drawn is not None else 0.0
        absolute, relative, stored, _ = agree(path, network, options.tolerance, progress, least)
        if drawn is not None:
            absolute, relative = drawn["max_abs"], drawn["max_relative"]
        files = sorted(folder.iterdir(), key=lambda file: file == path)
        if options.sample:
            side = folder / (out.stem + ".sample.npz")
            np.savez(side, **stored)
            files.insert(0, side)
        place(files, out.parent)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return {
        "out": str(out),
        "files": [str(out.parent / file.name) for file in files],
        "framework": network.framework,
        "exporter": network.exporter,
        "parameters": count,
        "opset": opset,
        "opset_note": network.opset_why if opset < 23 else "",
        "inputs": list(network.inputs),
        "outputs": list(network.outputs),
        "max_abs_difference": absolute,
        "max_relative_difference": relative,
        "compared_with_drawn_weights": drawn["weights"] if drawn is not None else [],
        "not_in_the_graph": named.lost,
        "unused": fates.unused,
        "merged": fates.merged,
        "folded": fates.folded,
        "tied": named.tied,
        "card": network.card,
    }


def some(names, most=5):
    """The first few of a list."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def show(result, stream=None):
    """The summary for people, with the next command to type."""
    say = lambda text: print(text, file=stream or sys.stdout)  # noqa: E731
    count = f"{result['parameters']:,}".replace(",", " ")
    say(f"{result['out']}: {count} parameters, opset {result['opset']}")
    if result["opset_note"]:
        say(f"  opset      {result['opset_note']}")
    say(f"  from       {result['framework']}, {result['exporter']}")
    say(f"  inputs     {', '.join(result['inputs'])}")
    say(f"  output     {result['card']['output']} ({result['card']['prediction']}, {result['card'].get('layout', 'nchw')})")
    say(
        f"  compared   ONNX Runtime differs from {result['framework']} by at most {result['max_abs_difference']:.1e} "
        f"({result['max_relative_difference']:.1e} of the output's standard deviation)"
    )
    if drawn := result["compared_with_drawn_weights"]:
        say(f"  there      {some(drawn)}: all but zero, and drawn anew for the comparison, which would see nothing else")
    if result["unused"]:
        say(f"  left out   {some(result['unused'])}: unused by the forward")
    for name, other in result["merged"].items():
        say(f"  merged     {name} with {other}: equal values, which train as one")
    if result["folded"]:
        say(f"  folded     {some(result['folded'])}: computed into other constants by the exporter, which train in their place")
    for file in result["files"]:
        say(f"  wrote      {file} ({Path(file).stat().st_size / 1e6:.1f} MB)")
    prompts = f" --set conditions.file={result['prompts']['file']}" if "prompts" in result else ""
    say(f"next: disback parity {result['out']} && disback distill {result['out']}{prompts} -o run/")
