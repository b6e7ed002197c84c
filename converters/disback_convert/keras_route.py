"""Keras 3: a saved model, or a factory and its weights -> teacher.onnx.

On TensorFlow the model goes through Keras's own export or tf2onnx directly, on JAX through Keras's own export (jax2onnx).
`KERAS_BACKEND` (or --backend) chooses. Keras is NHWC by default; the card then says `layout=nhwc`.
"""

import contextlib
import importlib
import inspect
import logging
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

from . import ConversionError, card as cards, factory, trees
from .examples import names_input
from .finish import Network
from .weights import Weight

EXPORTERS = {"tensorflow": ("keras", "tf2onnx"), "jax": ("keras",)}
TF2ONNX_OPSET = 18


def start(backend):
    """Imports Keras on the wanted backend."""
    if backend is not None:
        os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import keras

    if keras.config.backend() not in EXPORTERS:
        raise ConversionError(
            f"Keras runs on {keras.config.backend()}; --backend is one of {', '.join(EXPORTERS)} (a Keras model on torch is a "
            "torch.nn.Module: `disback-convert torch`)"
        )
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf
        import tf2onnx  # noqa: F401  its absence is told before anything runs

        threads = int(os.environ.get("OMP_NUM_THREADS", 0))
        with contextlib.suppress(RuntimeError):  # TensorFlow has started already
            tf.config.threading.set_intra_op_parallelism_threads(threads)
            tf.config.threading.set_inter_op_parallelism_threads(threads)
    else:
        import jax2onnx  # noqa: F401
    return keras


def load(source, imports=()):
    """A .keras or .h5 file, or what `module:factory` makes."""
    import keras

    with factory.importable():
        for name in imports:
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise ConversionError(f"--import {name}: {error}") from error
    path = Path(source)
    if path.suffix in (".keras", ".h5") or path.is_file():
        if not path.is_file():
            raise ConversionError(f"{source}: no such file")
        try:
            return keras.saving.load_model(path, compile=False)
        except Exception as error:
            raise ConversionError(
                f"{source}: does not load as a Keras model: {str(error).strip().splitlines()[0]}\n"
                "Custom layers must be registered: --import my_module, whose classes bear @keras.saving.register_keras_serializable()"
            ) from error
    if path.is_dir():
        raise ConversionError(f"{source}: a folder is no Keras model; give a .keras file, or module:factory and --weights")
    made = factory.attribute(source)
    # Layers without names of their own are numbered as in a fresh process, which the weights' names come from.
    keras.utils.clear_session()
    model = factory.call(source, made)
    if not isinstance(model, keras.Model):
        raise ConversionError(f"{source!r} returned {type(model).__name__}, not a keras.Model")
    return model


def name_of(variable):
    """`enc8/conv1/kernel` -> `enc8.conv1.kernel`."""
    return variable.path.replace("/", ".")


def load_weights(model, path):
    """Keras's own .weights.h5, or arrays under the variables' dotted paths; all of them and no others."""
    path = Path(path)
    if path.suffix != ".h5":
        # states of random generators (dropout) are no weights
        own = {name_of(v): v for v in model.weights if v.dtype.startswith("float")}
        given = {name: value for name, value in trees.read(path).items() if not name.endswith("seed_generator_state")}
        factory.fit(path, {name: v.shape for name, v in own.items()}, {name: a.shape for name, a in given.items()})
        for name, variable in own.items():
            variable.assign(given[name])
        return
    if not path.is_file():
        raise ConversionError(f"{path}: no such file")
    with tempfile.TemporaryDirectory() as folder:
        mine = Path(folder) / "own.weights.h5"
        model.save_weights(mine)
        factory.fit(path, h5_shapes(mine), h5_shapes(path))
    try:
        model.load_weights(path)
    except Exception as error:
        raise ConversionError(f"{path}: does not load: {str(error).strip().splitlines()[0]}") from error


def h5_shapes(path):
    """{dataset: shape} of an HDF5 file."""
    import h5py

    found = {}
    try:
        with h5py.File(path, "r") as file:
            file.visititems(lambda name, item: found.update({name: item.shape}) if isinstance(item, h5py.Dataset) else None)
    except OSError as error:
        raise ConversionError(f"{path}: not an HDF5 file of weights: {error}") from error
    return found


class Callable:
    """A model as a function of its graph inputs in order."""

    def __init__(self, model, card):
        import keras

        self.model, self.dtypes, self.structure = model, {}, None
        if getattr(model, "_inputs_struct", None) is not None:
            self.structure = model._inputs_struct
            self.names = [tensor.name for tensor in keras.tree.flatten(self.structure)]
            self.shapes = {tensor.name: tuple(tensor.shape) for tensor in keras.tree.flatten(self.structure)}
            self.dtypes = {tensor.name: np.dtype(tensor.dtype) for tensor in keras.tree.flatten(self.structure)}
        else:
            signature = inspect.signature(model.call).parameters
            self.names = [name for name in signature if names_input(card, name)]
            self.dtypes = {name: np.dtype(np.int32) for name in self.names if card.get(f"conditions.{name}.kind") == "class-index"}

    def __call__(self, *values):
        import keras

        if self.structure is not None:
            return self.model(keras.tree.pack_sequence_as(self.structure, list(values)), training=False)
        return self.model(**dict(zip(self.names, values)), training=False)


def prepare(source, weights=None, imports=(), backend=None, exporter=None, pairs=(), card_file=None):
    """The network of a Keras model, with its card."""
    keras = start(backend)
    running = keras.config.backend()
    if exporter is not None and exporter not in EXPORTERS[running]:
        raise ConversionError(f"--exporter {exporter}: on {running} it is one of {', '.join(EXPORTERS[running])}")
    card = cards.parse(pairs, card_file)
    card.setdefault("output", "output")
    cards.need(card)
    model = load(source, imports)
    if weights is not None:
        load_weights(model, weights)
    function = Callable(model, card)
    card = card if set(function.names) - {None} else card
    cards.check(card, function.names, [card["output"]])
    broken = [name_of(v) for v in model.variables if v.dtype.startswith("float") and not np.isfinite(keras.ops.convert_to_numpy(v.value)).all()]
    if broken:
        raise ConversionError(f"{weights or source}: NaN or infinite values in {', '.join(broken)}")
    trained = {id(v) for v in model.trainable_variables} | {id(v) for v in model.weights if v.trainable}
    tensors = [
        Weight(name_of(v), lambda v=v: keras.ops.convert_to_numpy(v.value), lambda array, v=v: v.assign(array), id(v) in trained)
        for v in model.weights
        if v.dtype.startswith("float")
    ]
    exporter = exporter or "keras"
    label = {"keras": f"Keras's own export ({'tf2onnx' if running == 'tensorflow' else 'jax2onnx'} {{}})", "tf2onnx": "tf2onnx {}"}[exporter]
    tool = version("tf2onnx" if running == "tensorflow" else "jax2onnx")
    made = Network(
        card=card,
        framework=f"keras {keras.__version__} on {running} {version('tensorflow-cpu' if running == 'tensorflow' else 'jax')}"
        if running == "jax" or installed("tensorflow-cpu")
        else f"keras {keras.__version__} on tensorflow {version('tensorflow')}",
        exporter=label.format(tool),
        inputs=function.names,
        outputs=[card["output"]],
        export=None,
        native=None,
        weights=tensors,
        dtypes=function.dtypes,
        opset=TF2ONNX_OPSET if running == "tensorflow" else 23,
        opset_why=f"tf2onnx {tool} writes up to opset {TF2ONNX_OPSET}" if running == "tensorflow" else "",
    )

    def native(values):
        results = keras.tree.flatten(function(*(keras.ops.convert_to_tensor(value) for value in values.values())))
        made.outputs = [card["output"], *(f"output_{k}" for k in range(1, len(results)))]
        return [np.asarray(keras.ops.convert_to_numpy(value)) for value in results]

    def export(path, values, opset):
        for noisy in ("tf2onnx", "jax2onnx", "onnx_ir"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        try:
            if exporter == "tf2onnx":
                by_tf2onnx(function, path, values, opset)
            else:
                by_keras(keras, model, function, path, values, opset)
        except (ConversionError, OSError):
            raise
        except Exception as error:
            other = " Try --exporter tf2onnx." if exporter == "keras" and running == "tensorflow" else ""
            raise ConversionError(f"{made.exporter} refuses this model: {type(error).__name__}: {str(error).strip().splitlines()[0]}.{other}") from error
        rename(path, made.inputs, made.outputs)

    made.native, made.export = native, export
    return made


def installed(name):
    from importlib.metadata import PackageNotFoundError

    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def by_keras(keras, model, function, path, values, opset):
    """`model.export`, with the batch left open."""
    specs = {name: keras.InputSpec(dtype=str(value.dtype), shape=(None, *value.shape[1:]), name=name) for name, value in values.items()}
    if function.structure is not None:
        signature = [keras.tree.pack_sequence_as(function.structure, list(specs.values()))]
    else:
        model(**{name: keras.ops.convert_to_tensor(value) for name, value in values.items()}, training=False)
        signature = list(specs.values())
    model.export(str(path), format="onnx", verbose=False, input_signature=signature, opset_version=opset)


def by_tf2onnx(function, path, values, opset):
    """A tf.function of the inputs in order, straight into tf2onnx."""
    import tensorflow as tf
    import tf2onnx
    from keras.src.export.tf2onnx_lib import patch_tf2onnx

    patch_tf2onnx()
    signature = [tf.TensorSpec((None, *value.shape[1:]), tf.as_dtype(value.dtype), name=name) for name, value in values.items()]
    run = tf.function(lambda *given: function(*given), input_signature=signature)
    tf2onnx.convert.from_function(run, signature, opset=opset, output_path=str(path))


def rename(path, inputs, outputs):
    """The card's names for inputs and outputs; exporters append numbers and slots, and may change the order."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    weights = {tensor.name for tensor in model.graph.initializer}
    found = [value.name for value in model.graph.input if value.name not in weights]
    pairs = {}
    for wanted in inputs:
        fitting = [name for name in found if name.split(":")[0].split("/")[-1] in (wanted, f"serve_{wanted}", f"args_{wanted}") or name == wanted]
        if len(fitting) != 1:
            raise ConversionError(f"the exported graph has the inputs {', '.join(found)}; which of them is {wanted!r} cannot be told")
        pairs[fitting[0]] = wanted
    if len(model.graph.output) != len(outputs):
        raise ConversionError(f"the exported graph has {len(model.graph.output)} outputs, the model {len(outputs)}")
    pairs |= {value.name: wanted for value, wanted in zip(model.graph.output, outputs)}
    # a node in the middle may bear the wanted name already
    wanted = {name for old, name in pairs.items() if old != name}
    for node in model.graph.node:
        for values in (node.input, node.output):
            for k, value in enumerate(values):
                values[k] = pairs.get(value, f"{value}_inner" if value in wanted else value)
    for value in [*model.graph.input, *model.graph.output]:
        value.name = pairs.get(value.name, value.name)
        dims = value.type.tensor_type.shape.dim
        if dims and not dims[0].HasField("dim_value"):
            dims[0].dim_param = "batch"
    order = {name: k for k, name in enumerate(inputs)}
    ordered = sorted(model.graph.input, key=lambda value: order.get(value.name, len(order)))
    del model.graph.input[:]
    model.graph.input.extend(ordered)
    del model.graph.value_info[:]
    path.write_bytes(model.SerializeToString())
