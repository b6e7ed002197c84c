"""The dynamo exporter around a module, with the names of its parameters."""

import logging
import warnings

import torch

from .. import ConversionError
from ..finish import PROTO_LIMIT, Network
from ..weights import Weight


def tensors_of(made):
    """A forward's result as a list of tensors."""
    made = list(made.values()) if isinstance(made, dict) else made
    return list(made) if isinstance(made, (tuple, list)) else [made]


def weights(module):
    """Parameters, each once with the further names of tied ones, and floating buffers."""
    made, seen = [], {}
    trained = [(name, value, True) for name, value in module.named_parameters(remove_duplicate=False)]
    for name, value, train in trained + [(name, value, False) for name, value in module.named_buffers()]:
        if not value.is_floating_point():
            continue
        key = (value.data_ptr(), value.shape, value.stride())
        if value.numel() and key in seen:
            seen[key].aliases.append(name)
            continue

        def put(array, value=value):
            with torch.no_grad():
                value.copy_(torch.from_numpy(array))

        seen[key] = Weight(name, lambda value=value: value.detach().cpu().numpy(), put, train)
        made.append(seen[key])
    return made


def network(module, card, inputs, examples=None, exporter="dynamo exporter"):
    """A module in evaluation mode as a network to be converted; outputs beyond the card's are kept under numbered names."""
    half = {value.dtype for value in module.parameters()} & {torch.float16, torch.bfloat16}
    if half:
        module = module.float()
    module.requires_grad_(False)
    made = Network(
        card=card,
        framework=f"torch {torch.__version__.split('+')[0]}",
        exporter=exporter,
        inputs=inputs,
        outputs=[card["output"]],
        export=None,
        native=None,
        weights=weights(module),
        examples=examples,
    )

    def native(values):
        with torch.no_grad():
            results = tensors_of(module(**{name: torch.from_numpy(value) for name, value in values.items()}))
        made.outputs = [card["output"], *(f"output_{k}" for k in range(1, len(results)))]
        return [value.numpy() for value in results]

    def export(path, values, opset):
        batch = torch.export.Dim("batch", min=1, max=1 << 20)
        size = sum(value.nbytes for value in module.state_dict().values())
        logs = [(log, log.level) for log in map(logging.getLogger, ("torch.onnx", "onnxscript"))]
        for log, _ in logs:
            log.setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    module, (), str(path), kwargs={name: torch.from_numpy(value) for name, value in values.items()},
                    dynamo=True, opset_version=opset, input_names=list(values), output_names=made.outputs,
                    dynamic_shapes={name: {0: batch} for name in values}, external_data=size > PROTO_LIMIT, verbose=False,
                )  # fmt: skip
        except OSError:
            raise
        except Exception as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from error
            cause = error.__cause__ or error
            said = " ".join(line.strip() for line in str(cause).strip().splitlines()[:3])
            raise ConversionError(f"the dynamo exporter refuses this module: {type(cause).__name__}: {said}\n{advice(cause)}") from error
        finally:
            for log, level in logs:
                log.setLevel(level)

    made.native, made.export = native, export
    return made


def advice(error):
    """What to do about the exporter's commonest refusals."""
    text = str(error)
    if "batch" in text and ("Constraints violated" in text or "specialized" in text or "inferred to be a constant" in text):
        return "the forward ties the batch to a number: write -1 for the batch in reshapes, and no loop over it"
    if "data-dependent" in text or "GuardOnDataDependent" in text:
        return "the forward branches on values of a tensor: take the branch outside the module, or use torch.where"
    return "a wrapper module with a plainer forward often helps: fixed sizes, no caches, no inference on types"
