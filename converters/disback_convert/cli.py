"""disback-convert: one subcommand a framework. Exit codes: 0 written, 1 refused, 2 the command line."""

import argparse
import json
import sys
from pathlib import Path

from . import ConversionError


def parser():
    top = argparse.ArgumentParser(prog="disback-convert", description=__doc__)
    routes = top.add_subparsers(dest="route", required=True)
    torch = routes.add_parser("torch", help="a PyTorch module and its state dict")
    torch.add_argument("factory", help="module:function that returns the module, or (module, {argument: example tensor})")
    torch.add_argument("--state-dict", type=Path, help="weights: .safetensors, or a torch file of plain tensors")
    torch.add_argument("--card", action="append", default=[], metavar="KEY=VALUE", help="an entry of the teacher card")
    torch.add_argument("--card-file", type=Path, help="the teacher card as TOML; --card wins over it")
    torch.add_argument("--opset", type=int, default=20, help="ONNX opset (default 20)")
    torch.add_argument("--tolerance", type=float, default=1e-4, help="allowed difference, in standard deviations of the output")
    torch.add_argument("-o", "--out", type=Path, default=Path("teacher.onnx"))
    torch.add_argument("--json", action="store_true", help="print the result for machines")
    return top


def main(argv=None):
    args = parser().parse_args(argv)
    try:
        from .torch_route import convert

        result = convert(args.factory, args.out, args.card, args.card_file, args.state_dict, args.opset, args.tolerance)
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"error: {error}; pip install 'disback-convert[torch]'", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{result['out']}: {result['parameters']} parameters, opset {result['opset']}")
        print(f"inputs {', '.join(result['inputs'])}; outputs {', '.join(result['outputs'])}")
        print(f"ONNX Runtime differs from torch by {result['max_relative_difference']:.1e} of the output's standard deviation")
    return 0


if __name__ == "__main__":
    sys.exit(main())
