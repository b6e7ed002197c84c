"""PaddlePaddle: a layer and its .pdparams, or a saved inference model -> teacher.onnx by paddle2onnx.

paddle2onnx 2.1.0 is right with paddlepaddle 3.0.0 and wrong with what a plain `pip install` resolves today; the extra pins
both, and the comparison after the export refuses what is wrong.
"""

import contextlib
import inspect
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import paddle
import paddle2onnx

from . import ConversionError, card as cards, factory, trees
from .examples import names_input
from .finish import Network
from .weights import Weight

OPSET = 20


@contextlib.contextmanager
def off_stdout():
    """Sends what Paddle's C++ writes to standard output to standard error, so that --json stays readable."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def load(source):
    """`module:factory`, or the .json/.pdmodel of an inference model saved by paddle.jit.save."""
    path = Path(source)
    if path.suffix in (".json", ".pdmodel") or path.exists():
        if path.suffix not in (".json", ".pdmodel"):
            raise ConversionError(f"{source}: not a Paddle model; give the .json or .pdmodel of paddle.jit.save, or module:factory and --weights")
        if not path.is_file():
            raise ConversionError(f"{source}: no such file")
        try:
            return paddle.jit.load(str(path.with_suffix("")))
        except Exception as error:
            raise ConversionError(f"{source}: does not load: {first_line(error)}") from error
    layer = factory.call(source, factory.attribute(source))
    if not isinstance(layer, paddle.nn.Layer):
        raise ConversionError(f"{source!r} returned {type(layer).__name__}, not a paddle.nn.Layer")
    return layer


def first_line(error):
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def load_weights(layer, path):
    """.pdparams, .npz or .safetensors; every tensor of the layer and no others."""
    path = Path(path)
    if path.suffix == ".pdparams":
        if not path.is_file():
            raise ConversionError(f"{path}: no such file")
        try:
            given = {name: np.asarray(value) for name, value in paddle.load(str(path), return_numpy=True).items()}
        except Exception as error:
            raise ConversionError(f"{path}: not a file of Paddle parameters: {first_line(error)}") from error
    else:
        given = trees.read(path)
    given.pop("StructuredToParameterName@@", None)
    own = layer.state_dict()
    factory.fit(path, {name: tuple(value.shape) for name, value in own.items()}, {name: value.shape for name, value in given.items()})
    layer.set_state_dict({name: paddle.to_tensor(value) for name, value in given.items()})


def inputs_of(source, layer, card):
    """Names of the forward's inputs, in order."""
    if Path(source).suffix == ".json":
        return data_names(json.loads(Path(source).read_text()))
    if Path(source).suffix == ".pdmodel":
        return [spec.name for spec in layer._input_spec("forward")]
    return [name for name in inspect.signature(layer.forward).parameters if names_input(card, name)]


def data_names(program):
    """The inputs that a saved program declares, in its order."""
    if isinstance(program, list):
        return [name for item in program for name in data_names(item)]
    if not isinstance(program, dict):
        return []
    if program.get("#") == "1.data":
        return [item["AT"]["D"] for item in program.get("A", []) if item.get("N") == "name"]
    return [name for item in program.values() for name in data_names(item)]


def prepare(source, weights=None, pairs=(), card_file=None):
    """The network that the layer, the weights and the card make."""
    paddle.set_device("cpu")
    card = cards.parse(pairs, card_file)
    card.setdefault("output", "output")
    cards.need(card)
    with off_stdout():
        layer = load(source)
    if weights is not None:
        load_weights(layer, weights)
    layer.eval()
    names = inputs_of(source, layer, card)
    cards.check(card, names, [card["output"]])
    state = layer.state_dict()
    broken = [name for name, value in state.items() if not np.isfinite(value.numpy()).all()]
    if broken:
        raise ConversionError(f"{weights or source}: NaN or infinite values in {', '.join(broken)}")
    made = Network(
        card=card,
        framework=f"paddlepaddle {paddle.__version__}",
        exporter=f"paddle2onnx {version('paddle2onnx')}",
        inputs=names,
        outputs=[card["output"]],
        export=None,
        native=None,
        weights=[
            Weight(name, value.numpy, lambda array, value=value: value.set_value(array), not value.stop_gradient)
            for name, value in state.items()
            if value.dtype in (paddle.float32, paddle.float16, paddle.float64)
        ],
        opset=OPSET,
        opset_why=f"paddle2onnx {version('paddle2onnx')} writes up to opset {OPSET}",
    )

    def native(values):
        with paddle.no_grad(), off_stdout():
            results = layer(*(paddle.to_tensor(value) for value in values.values()))
        results = results if isinstance(results, (tuple, list)) else [results]
        made.outputs = [card["output"], *(f"output_{k}" for k in range(1, len(results)))]
        return [value.numpy() for value in results]

    def export(path, values, opset):
        prefix = path.parent / "inference"
        specs = [paddle.static.InputSpec([None, *value.shape[1:]], str(value.dtype), name) for name, value in values.items()]
        try:
            # A saved model is saved again too: the values that it has now are not those of the file.
            with off_stdout():
                paddle.jit.save(layer, str(prefix), input_spec=specs)
            graph = prefix.with_suffix(".json") if prefix.with_suffix(".json").exists() else prefix.with_suffix(".pdmodel")
            by_paddle2onnx(graph, prefix.with_suffix(".pdiparams"), path, opset)
        except (ConversionError, OSError):
            raise
        except Exception as error:
            raise ConversionError(
                f"Paddle does not save this network: {first_line(error)}\nIt is right with paddlepaddle 3.0.0 (here {paddle.__version__}); "
                "try another --opset"
            ) from error
        finally:
            for file in prefix.parent.glob("inference*"):
                file.unlink()
        rename(path, names, made.outputs)

    def export_saved(path, values, opset):
        by_paddle2onnx(source, Path(source).with_suffix(".pdiparams"), path, opset)
        rename(path, names, made.outputs)

    made.native, made.export = native, export
    made.export_saved = export_saved if Path(source).suffix in (".json", ".pdmodel") else None
    return made


def by_paddle2onnx(graph, weights, out, opset):
    """Runs paddle2onnx in a process of its own: an operator that it does not know ends the process it runs in."""
    code = "import sys, paddle2onnx; paddle2onnx.export(*sys.argv[1:4], opset_version=int(sys.argv[4]))"
    command = [sys.executable, "-c", code, str(graph), str(weights), str(out), str(opset)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0 and out.is_file():
        return
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if "[ERROR]" in line or "Error" in line or "nsupported" in line]
    raise ConversionError(
        f"paddle2onnx {version('paddle2onnx')} at opset {opset} does not convert this network: {'; '.join(said[:4]) or 'no reason given'}\n"
        f"It is right with paddlepaddle 3.0.0 (here {paddle.__version__}); write the part that it names with plainer operations"
    )


def rename(path, inputs, outputs):
    """The card's names; paddle2onnx keeps those of the inputs and numbers the outputs."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    found = [value.name for value in model.graph.input]
    if sorted(found) != sorted(inputs) or len(model.graph.output) != len(outputs):
        raise ConversionError(f"the exported graph has the inputs {', '.join(found)}; wanted are {', '.join(inputs)}")
    pairs = {value.name: wanted for value, wanted in zip(model.graph.output, outputs)}
    for node in model.graph.node:
        for values in (node.input, node.output):
            for k, value in enumerate(values):
                values[k] = pairs.get(value, value)
    for value in [*model.graph.input, *model.graph.output]:
        value.name = pairs.get(value.name, value.name)
        dims = value.type.tensor_type.shape.dim
        if dims and not (dims[0].HasField("dim_value") and dims[0].dim_value > 0):
            dims[0].dim_param = "batch"
    path.write_bytes(model.SerializeToString())
