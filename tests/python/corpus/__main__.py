"""Writes cases of the corpus as they are asked for: one request a line on standard input, one JSON answer a line.

    python tests/python/corpus OUT < requests

A request is the name of a case (`export.py` says how they are named and what their folders hold), or `check FILE`: ONNX's
checker on a file written back, which must be the `model.onnx` beside it but for its weights.
"""

import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path


def main():
    out = Path(sys.argv[1])
    # Exporters print; the answers have a channel of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    import torch
    from export import check_written, write_case

    torch.set_num_threads(1)
    for line in sys.stdin:
        case = line.strip()
        start = time.process_time()
        try:
            answer = check_written(Path(case[6:])) if case.startswith("check ") else write_case(case, out / case)
        except Exception as e:  # noqa: BLE001
            traceback.print_exc()
            answer = {"error": f"{type(e).__name__}: {e}"}
        answer["seconds"] = round(time.process_time() - start, 1)
        print(json.dumps({"case": case} | answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
