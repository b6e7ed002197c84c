#!/usr/bin/env python3
"""Writes ops.inc: the operators that have a CUDA kernel in the installed PyTorch wheel, and whether their devices are checked
strictly. `ops.py > ops.inc` makes it anew; `ops.py --check` exits 1 where it no longer fits."""

import sys
from pathlib import Path

import torch
import torchgen.gen

HERE = Path(__file__).parent
# They have kernels of their own in tensors.h.
OWN = """empty.memory_format empty_strided resize_ copy_ _local_scalar_dense set_ set_.source_Storage
set_.source_Storage_storage_offset set_.source_Tensor _fused_sdp_choice record_stream _softmax _log_softmax
_fused_rms_norm_backward""".split()
# On CUDA they end in cuDNN; here they stay whole.
WHOLE = ["convolution", "convolution_backward"]


def table():
    data = Path(torchgen.__file__).parent / "packaged/ATen/native"
    parsed = torchgen.gen.parse_native_yaml(str(data / "native_functions.yaml"), str(data / "tags.yaml"))
    loose = {str(f.func.name) for f in parsed.native_functions if f.device_check.name == "NoCheck"}
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    every = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("aten::")]
    names = ({n[len("aten::") :] for n in every if has(n, "CUDA")} | set(WHOLE)) - set(OWN)
    lines = [f'OP("{n}", {0 if n in loose else 1})\n' for n in sorted(names)]
    return f"// Of torch {torch.__version__}, by ops.py.\n" + "".join(lines)


if __name__ == "__main__":
    made = table()
    if "--check" in sys.argv:
        if (HERE / "ops.inc").read_text() != made:
            sys.exit("tests/stand_in_cuda/ops.inc is not that of the installed wheel: tests/stand_in_cuda/ops.py > tests/stand_in_cuda/ops.inc")
    else:
        sys.stdout.write(made)
