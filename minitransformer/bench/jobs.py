"""The program of the other process: it makes one job, and answers with what the methods of that return.

`python -m minitransformer.bench.jobs` reads one question a line and answers it with one line; see `peer.py`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from minitransformer.bench import memory, torch_sides
from minitransformer.errors import MiniTransformerError

JOBS: dict[str, Callable[..., Any]] = {
    "train": torch_sides.Train,
    "half": torch_sides.TrainHalf,
    "attention": torch_sides.Attention,
    "attention on a device": torch_sides.DeviceAttention,
    "gemm": torch_sides.Gemm,
    "decode": torch_sides.Decode,
    "memory of our step": memory.OurStep,
    "memory of torch's step": torch_sides.StepMemory,
    "memory of our attention": memory.OurAttention,
}


def main() -> None:
    """Answer questions until the parent closes its end, or is no more."""
    # Libraries say things on stdout, which is the parent's ear.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    job: Any = None
    for line in sys.stdin:
        question = json.loads(line)
        method, options = question["method"], question["options"]
        answer: dict[str, Any]
        try:
            if method == "make":
                job = JOBS[options.pop("job")](**options)
                answer = {"result": None}
            else:
                answer = {"result": getattr(job, method)(**options)}
        except MiniTransformerError as error:
            answer = {"error": type(error).__name__, "arguments": error.args}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
