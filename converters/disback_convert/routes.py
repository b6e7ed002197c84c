"""The routes as the command line knows them: arguments, what must be installed, how each is run. Frameworks are imported
only when their route runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from . import ConversionError


@dataclass
class Route:
    help: str
    extra: str  # of pip install 'disback[extra]'
    needs: frozenset  # modules whose absence means that the extra is not installed
    arguments: Callable
    prepare: Callable  # prepare(args, progress) -> finish.Network
    after: Callable | None = None  # after(args, network, options, result): further files

    def run(self, args, progress):
        from .finish import Options, finish

        options = Options(args.out, args.tolerance, args.opset, not args.no_sample, progress)
        network = self.prepare(args, progress)
        result = finish(network, options)
        if self.after is not None:
            try:
                self.after(args, network, options, result)
            except ConversionError as error:
                raise ConversionError(f"{error}\n{args.out} was written before that and is whole") from error
        return result


def torch_arguments(parser):
    parser.add_argument("factory", help="module:function that returns the module, or (module, {argument: example tensor})")
    parser.add_argument("--state-dict", type=Path, help="weights: .safetensors, or a torch file of plain tensors")


def torch_prepare(args, progress):
    from .torch_route import prepare

    progress(f"building {args.factory}")
    return prepare(args.factory, args.card, args.card_file, args.state_dict)


def edm_arguments(parser):
    parser.add_argument("network", help="network pickle (its code runs: open only what you trust), or module:Class of the checkout")
    parser.add_argument("--code", type=Path, help="your checkout of the code that the pickle or class comes from")
    parser.add_argument("--raw", action="store_true", help="the raw network F, preconditioning outside the graph")
    parser.add_argument("--arguments", default="{}", metavar="JSON", help="arguments of module:Class")
    parser.add_argument("--state-dict", type=Path, help="weights for module:Class")


def edm_prepare(args, progress):
    from .torch_route.edm import prepare

    progress(f"reading {args.network}")
    return prepare(args.network, args.code, args.raw, args.state_dict, args.card, args.card_file, args.arguments)


def diffusers_arguments(parser):
    parser.add_argument("folder", help="a pipeline's or a network's folder")
    parser.add_argument("--part", help="sub-folder of the denoising network (default: unet or transformer)")
    parser.add_argument("--size", metavar="HxW", help="height and width of the sample (latent pixels), where the network leaves it open")
    parser.add_argument("--tokens", type=int, help="length of the text sequence (default: 77; PixArt 120, SD3 333, Flux 512)")
    parser.add_argument("--null", type=int, help="the class that means none, for guidance")
    parser.add_argument("--vae", action="store_true", help="also write the VAE's decoder")
    parser.add_argument("--text-encoder", action="store_true", help="also write the text encoders")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="also write the embeddings of a list of prompts, one a line")
    parser.add_argument("--null-prompt", metavar="TEXT", help="also write the embedding that stands for no prompt, for guidance")


def diffusers_prepare(args, progress):
    from .diffusers_route import prepare

    from .diffusers_route import parts, prompts

    # What is asked for beside the network is looked for before gigabytes are read.
    parts.check(args.folder, args.vae, args.text_encoder)
    if args.prompts is not None:
        prompts.lines(args.prompts)
    if args.prompts is not None or args.null_prompt is not None:
        prompts.pipeline(args.folder)
    progress(f"loading {args.folder}")
    return prepare(args.folder, args.part, args.size, args.tokens, args.null, args.card, args.card_file)


def diffusers_after(args, network, options, result):
    from .diffusers_route import parts, prompts

    tokens = network.card.get("conditions.encoder_hidden_states.shape", [args.tokens or 77])[0]
    if args.vae:
        result["files"] += parts.vae_decoder(args.folder, network.card, options)["files"]
    if args.text_encoder:
        for made in parts.text_encoders(args.folder, options):
            result["files"] += made["files"]
    if args.prompts is not None:
        file, count = prompts.embed(args.folder, args.prompts, network.card, options.out, tokens, options.progress)
        result["files"].append(str(file))
        result["prompts"] = {"file": str(file), "count": count}
    if args.null_prompt is not None:
        result["files"].append(str(prompts.null_card(args.folder, args.null_prompt, network.card, options.out, tokens)))


def jax_arguments(parser):
    parser.add_argument("factory", help="module:function that returns an NNX module, a Linen module, (module, variables) or (function, parameters)")
    parser.add_argument("--weights", type=Path, help=".npz, .safetensors or .msgpack of dotted names, or an Orbax folder")


def jax_prepare(args, progress):
    from .jax_route import prepare

    progress(f"building {args.factory}")
    return prepare(args.factory, args.weights, args.card, args.card_file)


def keras_arguments(parser):
    parser.add_argument("model", help="a .keras file, or module:function that returns a keras.Model")
    parser.add_argument("--weights", type=Path, help="weights for module:function: .weights.h5, or .npz/.safetensors of dotted variable paths")
    parser.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE", help="imported first: registers custom layers")
    parser.add_argument("--backend", choices=["tensorflow", "jax"], help="what Keras runs on (default: KERAS_BACKEND, else Keras's own choice)")
    parser.add_argument("--exporter", choices=["keras", "tf2onnx"], help="Keras's own export (default), or tf2onnx directly")


def keras_prepare(args, progress):
    from .keras_route import prepare

    progress(f"loading {args.model}")
    return prepare(args.model, args.weights, args.imports, args.backend, args.exporter, args.card, args.card_file)


def paddle_arguments(parser):
    parser.add_argument("layer", help="module:function that returns a paddle.nn.Layer, or the .json/.pdmodel of paddle.jit.save")
    parser.add_argument("--weights", type=Path, help=".pdparams, or .npz/.safetensors of the same names")


def paddle_prepare(args, progress):
    from .paddle_route import prepare

    progress(f"loading {args.layer}")
    return prepare(args.layer, args.weights, args.card, args.card_file)


ROUTES = {
    "torch": Route("a PyTorch module and its state dict", "torch", frozenset({"torch", "onnxscript", "safetensors"}), torch_arguments, torch_prepare),
    "edm": Route("a network pickle or class in EDM's form", "torch", frozenset({"torch", "onnxscript", "safetensors"}), edm_arguments, edm_prepare),
    "diffusers": Route(
        "a diffusers pipeline or network folder", "diffusers", frozenset({"torch", "onnxscript", "safetensors", "diffusers", "transformers"}),
        diffusers_arguments, diffusers_prepare, diffusers_after,
    ),
    "jax": Route("a Flax module (NNX or Linen) or a JAX function", "jax", frozenset({"jax", "flax", "jax2onnx", "orbax"}), jax_arguments, jax_prepare),
    "keras": Route(
        "a Keras 3 model on TensorFlow or JAX", "keras", frozenset({"keras", "tensorflow", "tf2onnx", "h5py", "jax", "jax2onnx"}),
        keras_arguments, keras_prepare,
    ),
    "paddle": Route("a PaddlePaddle layer or inference model", "paddle", frozenset({"paddle", "paddle2onnx"}), paddle_arguments, paddle_prepare),
}  # fmt: skip
